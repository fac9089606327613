"""Models of the Hugging Face Hub: which files are fetched, at which commit, and what every failure means."""

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, get_token, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import repo_folder_name

from ..errors import one_line
from .saved import CONFIG, WEIGHTS, check_sha256

_SECONDS = 10.0  # before a Hub that does not answer counts as unreachable
_COMMIT = re.compile(r"[0-9a-f]{40}")
_REVISION = re.compile(r"[\w][\w./-]*")


def split_revision(model_id: str) -> tuple[str, str | None]:
    """Split `ORG/NAME@REVISION`.

    Raises:
        ValueError: If that is not what it is.
    """
    repo_id, at, revision = model_id.partition("@")
    if repo_id.count("/") != 1 or (at and (not _REVISION.fullmatch(revision) or ".." in revision)):
        raise ValueError(f"{model_id!r} is not a model of the Hub; expected ORG/NAME or ORG/NAME@REVISION")
    return repo_id, revision or None


def download(model_id: str, cache_dir: str | Path | None = None, weights: bool = True) -> Path:
    """Fetch configuration and weights of a model, all of one commit, into the Hub's own cache.

    Args:
        model_id: `ORG/NAME` or `ORG/NAME@REVISION`.
        cache_dir: Where the cache is. Default: the Hub's.
        weights: Fetch them, too. Only `model.safetensors`; pickled weights are not touched.

    Returns:
        The folder, named by its commit. Without a network: what the cache holds.

    Raises:
        ValueError: If there is no such model, a tag moved since it was first seen here, or the weights are not what
            the Hub announces.
        ConnectionError: If the Hub cannot be reached and the cache does not have it.
    """
    repo_id, revision = split_revision(model_id)
    place: dict[str, Any] = {"repo_id": repo_id, "cache_dir": cache_dir}
    known = try_to_load_from_cache(filename=CONFIG, revision=revision, **place)
    seen = _record(repo_id, revision, cache_dir)
    with hub_errors(repo_id, revision):
        info = None if revision and _COMMIT.fullmatch(revision) and isinstance(known, str) else _info(repo_id, revision)
        if info is None:  # a commit that is here, or no network
            folder = Path(hf_hub_download(filename=CONFIG, revision=revision, local_files_only=True, **place)).parent
            if weights:
                path = _weights(place, folder.name, local_files_only=True)
                check_sha256(path, path.resolve().name if re.fullmatch("[0-9a-f]{64}", path.resolve().name) else None)
            return folder
        before = (
            seen.read_text(encoding="utf-8-sig")
            if seen.is_file()
            else Path(known).parent.name
            if isinstance(known, str)
            else info.sha
        )
        if revision and before != info.sha:
            _refuse_moved_tag(repo_id, revision, before, info.sha)
        files = {file.rfilename: file for file in info.siblings}
        for name in (CONFIG, WEIGHTS)[: 1 + weights]:
            if name not in files:
                found = ", ".join(sorted(files)[:8]) or "nothing"
                raise ValueError(f"{repo_id!r} has no {name}; other formats are not loaded (found {found})")
        # By its name, so that the cache learns what the revision is.
        folder = Path(hf_hub_download(filename=CONFIG, revision=revision, **place)).parent
        if folder.name != info.sha:
            raise ValueError(f"{repo_id!r} changed while it was loaded; try again")
        if weights:
            announced = files[WEIGHTS].lfs
            check_sha256(_weights(place, info.sha), announced.sha256 if announced else None)
        if revision:
            with suppress(OSError):  # a cache that others fill and this user may only read
                seen.parent.mkdir(parents=True, exist_ok=True)
                seen.write_text(info.sha, encoding="utf-8")
        return folder


def download_weights(repo_id: str, commit: str, cache_dir: str | Path | None = None) -> Path:
    """Fetch the weights of one commit; no request is made if the cache has them.

    Args:
        repo_id: `ORG/NAME`.
        commit: Its 40 digits.
        cache_dir: As for `download`.

    Raises:
        ValueError: If there is no such commit.
        ConnectionError: If the Hub cannot be reached and the cache does not have it.
    """
    place: dict[str, Any] = {"repo_id": repo_id, "cache_dir": cache_dir}
    with hub_errors(repo_id, commit):
        cached = try_to_load_from_cache(filename=WEIGHTS, revision=commit, **place)
        absent = not isinstance(cached, str) and _info(repo_id, commit) is None
        return _weights(place, commit, local_files_only=absent)


def _record(repo_id: str, revision: str | None, cache_dir: str | Path | None) -> Path:
    """Return the file that says which commit a revision was when its weights were last loaded and found in order.

    The cache's own memory of that is overwritten by whoever asks first, such as timm before it asks us.
    """
    name = repo_folder_name(repo_id=repo_id, repo_type="model")
    return Path(cache_dir or constants.HF_HUB_CACHE) / name / "timm_mfd" / (revision or "main")


def _weights(place: dict[str, Any], commit: str, local_files_only: bool = False) -> Path:
    return Path(hf_hub_download(filename=WEIGHTS, revision=commit, local_files_only=local_files_only, **place))


def _info(repo_id: str, revision: str | None) -> Any:
    """Return what the Hub says about a revision; None if it cannot be reached.

    Asked first because a download alone tries to connect for half a minute.
    """
    try:
        return HfApi().model_info(repo_id, revision=revision, files_metadata=True, timeout=_SECONDS)
    except Exception as error:
        if _is_unreachable(error):
            return None
        raise


def _refuse_moved_tag(repo_id: str, revision: str, before: str, now: str) -> None:
    if revision in (tag.name for tag in HfApi().list_repo_refs(repo_id).tags):
        raise ValueError(
            f"the tag {revision!r} of {repo_id!r} moved: it is {now} now, and was {before} when it was first loaded "
            f"here; nothing was loaded. If that is right, name the commit: hf-hub:{repo_id}@{now}"
        )


def check_reachable(repo_id: str, filename: str | None = None, cache_dir: str | Path | None = None) -> None:
    """Refuse at once a model that timm would try to download for a minute.

    Args:
        repo_id: `ORG/NAME`.
        filename: Of its weights, if timm names one.
        cache_dir: As for `download`.

    Raises:
        ValueError: If there is no such model.
        ConnectionError: If the Hub cannot be reached and the cache does not have it.
    """
    names = (filename,) if filename else (WEIGHTS, "pytorch_model.bin")
    if any(isinstance(try_to_load_from_cache(repo_id, name, cache_dir), str) for name in names):
        return
    with hub_errors(repo_id):
        info = _info(repo_id, None)
    if info is None:
        raise ConnectionError(f"the Hub cannot be reached, and the cache does not hold {repo_id!r}")


@contextmanager
def hub_errors(repo_id: str, revision: str | None = None) -> Iterator[None]:
    """Turn what the Hub's client raises into one line that says what to do; a token never is in it.

    Args:
        repo_id: What was asked for.
        revision: Which of it.

    Raises:
        ValueError: For what the user can mend.
        ConnectionError: If the Hub cannot be reached.
    """
    try:
        try:
            yield
        except RuntimeError as error:  # in which the client wraps what cut the upload of a large file
            if (cause := error.__cause__) and (isinstance(cause, HfHubHTTPError) or _is_unreachable(cause)):
                raise cause from None
            raise
    except ImportError as error:  # a proxy whose protocol needs another package
        reason = without_token(one_line(error))
        raise ValueError(f"the Hub's client cannot work with the environment as it is: {reason}") from None
    except UnicodeEncodeError:
        raise ValueError("the Hub's token has characters that no token has; look at HF_TOKEN") from None
    except HFValidationError:
        raise ValueError(f"{repo_id!r} is not a name that the Hub accepts; expected ORG/NAME") from None
    except GatedRepoError:
        raise ValueError(f"access to {repo_id!r} is restricted; ask for it on its page on the Hub") from None
    except RevisionNotFoundError:
        raise ValueError(f"{repo_id!r} has no revision {revision!r}") from None
    except (RepositoryNotFoundError, HfHubHTTPError) as error:
        status = error.response.status_code if error.response is not None else None
        if status == 401 and get_token():  # who is logged in is told 404 instead
            raise ValueError(
                "the Hub refused the token (401); set another HF_TOKEN, log in with `hf auth login`, or unset HF_TOKEN"
            ) from None
        if isinstance(error, RepositoryNotFoundError):
            raise ValueError(
                f"the Hub has no model {repo_id!r} that you may see; check the name, or log in with `hf auth login` "
                "if it is private"
            ) from None
        if status in (401, 403):
            raise ValueError(
                f"the Hub does not let you do this with {repo_id!r} ({status}); log in with `hf auth login`, with a "
                "token that may write"
            ) from None
        if status == 412:
            raise ValueError(f"{repo_id!r} was changed by somebody else meanwhile; look, then try again") from None
        if status is not None and status < 500:
            said = error.server_message or f"status {status}"
            raise ValueError(f"the Hub refused the request about {repo_id!r}: {without_token(said)}") from None
        raise ConnectionError(f"the Hub failed ({status}) on a request about {repo_id!r}; try again") from None
    except EntryNotFoundError as error:  # also: not in the cache
        if isinstance(error, OSError):
            raise ConnectionError(
                f"the Hub cannot be reached, and the cache does not hold {repo_id!r}"
                + (f" at {revision!r}" if revision else "")
            ) from None
        raise ValueError(f"{repo_id!r} lacks a file: {without_token(str(error)).splitlines()[-1]}") from None
    except Exception as error:
        if not _is_unreachable(error):
            raise
        reason = without_token(" ".join(str(error).split())) or "no answer"
        raise ConnectionError(f"the Hub cannot be reached, or hung up: {reason}; try again") from None


def without_token(text: str) -> str:
    """Return a text in which the user's token is not."""
    token = get_token()
    return text.replace(token, "<token>") if token else text


def _is_unreachable(error: BaseException) -> bool:
    if isinstance(error, HfHubHTTPError):
        return error.response is not None and error.response.status_code >= 500
    # The client lets the errors of its transport through, whose name changes with its version.
    transport = type(error).__module__.split(".")[0].startswith(("httpx", "httpcore"))
    return isinstance(error, OfflineModeIsEnabled | ConnectionError | TimeoutError) or transport
