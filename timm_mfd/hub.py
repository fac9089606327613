"""Export folders, and their way to the Hugging Face Hub: checked before, compared after, tagged last."""

import hashlib
import json
import math
import re
import tempfile
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors import safe_open
from safetensors.torch import save_file
from timm.models._hub import save_config_for_hf  # not among the public names
from timm.utils import unwrap_model
from torch import Tensor, nn

from .atomic import new_folder
from .model_card import PICTURES, check_card, render_card
from .models import create_model
from .models.download import hub_errors
from .models.saved import CARD, CONFIG, WEIGHTS, check_config, check_weights, identity, names_by_index, sha256_of
from .staged import without_stages

FILES = (WEIGHTS, CONFIG, CARD, *PICTURES)  # nothing else is ever uploaded
_PICKLES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")


class Published(NamedTuple):
    """What `push_to_hub` left on the Hub.

    Attributes:
        repo_id: `ORG/NAME`.
        commit: A commit that holds the folder's files as they are.
        sha256: Of the weights.
        tag: The tag on that commit, if one was asked for.
        changed: False if the Hub had all of it before.
    """

    repo_id: str
    commit: str
    sha256: str
    tag: str | None
    changed: bool


def save_pretrained(
    model: nn.Module,
    folder: str | Path,
    *,
    label_names: Sequence[str] | Mapping[int, str] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    image_size: tuple[int, int] | None = None,
    crop_pct: float = 1.0,
    license: str = "apache-2.0",
    repo_id: str | None = None,
    run: Mapping[str, Any] | None = None,
) -> Path:
    """Write `model.safetensors`, timm's `config.json` and `README.md` (the model card) into a folder.

    The model itself is left as it is: wrappers (DDP, `torch.compile`) and channels_last memory are undone on a copy.
    The weights carry a copy of the configuration, and the configuration their sha256, so that loading notices a change.

    Args:
        model: A model from `create_model`, possibly wrapped.
        folder: New or empty folder.
        label_names: One name per class, in their order or by index. Default: those that the model was loaded with, if
            any.
        mean: Per-channel mean of pixel values in [0, 1] that the model was trained with.
        std: Per-channel standard deviation.
        image_size: `(H, W)` of the images.
        crop_pct: With `image_size`: how much of the shorter side of a test image timm's central crop is to keep.
        license: Licence of the weights, by the Hub's name, for the card.
        repo_id: Where it will be published, for the card.
        run: How it was trained, for the card: `args` and `summary` as a run folder has them.

    Returns:
        The folder; `timm.create_model("local-dir:FOLDER", pretrained=True)` loads it after `import timm_mfd`; a pruned
        model other than `*_mfd` only `timm_mfd.create_model`.

    Raises:
        FileExistsError: If the folder already holds something.
        ValueError: If the model did not come from `create_model`, has another number of classes than `label_names` or
            than it was created with, or what loading the folder would give is not this model: it has arguments that
            loading refuses, or layers that were put in later. Then nothing is written.

    Example:
        >>> save_pretrained(model, "export", label_names=["cat", "dog"])
    """
    folder = Path(folder)
    plain = without_stages(unwrap_model(model))
    if getattr(plain, "pretrained_cfg", None) is None or not hasattr(plain, "num_classes"):
        hint = "give its .model" if isinstance(getattr(plain, "model", None), nn.Module) else "nothing would load it"
        raise ValueError(f"{type(plain).__name__} is not a classifier from create_model; {hint}")
    classifier = plain.get_classifier() if hasattr(plain, "get_classifier") else None
    if isinstance(classifier, nn.Linear) and classifier.out_features != plain.num_classes:
        raise ValueError(
            f"the classifier has {classifier.out_features} outputs, the model was created with {plain.num_classes} "
            f"classes; change them with model.reset_classifier({classifier.out_features})"
        )
    if image_size is not None and (not isinstance(image_size, Sequence) or len(image_size) != 2):
        raise ValueError(f"image_size must be (H, W), not {image_size!r}")
    mean, std = _per_channel("mean", mean, plain.in_chans), _per_channel("std", std, plain.in_chans)
    known = plain.pretrained_cfg.get("label_names")
    if label_names is None and known and plain.pretrained_cfg.get("num_classes", len(known)) == plain.num_classes:
        kept = names_by_index(known, plain.num_classes)
        label_names = kept if len(kept) == plain.num_classes else None
    names = None if label_names is None else _names(label_names, plain.num_classes)
    if folder.is_file() or (folder.exists() and any(folder.iterdir())):
        raise FileExistsError(f"{str(folder)!r} is there already; choose a new folder for the model")
    copy = deepcopy(plain).cpu().to(memory_format=torch.contiguous_format)
    preprocessing: dict[str, object] = {}
    if image_size is not None:
        preprocessing |= {"input_size": (plain.in_chans, *image_size), "crop_pct": crop_pct}
    if mean is not None:
        preprocessing["mean"] = mean
    if std is not None:
        preprocessing["std"] = std
    model_config: dict[str, Any] = {
        # The tag of the default weights says nothing about these; the file name keeps timm from pickled ones.
        "pretrained_cfg": {"tag": "", "hf_hub_filename": WEIGHTS},
        **({"label_names": names} if names is not None else {}),
        **({"pruned": True} if getattr(plain, "pruned", False) else {}),
    }
    with new_folder(folder) as new:
        save_config_for_hf(copy, new / CONFIG, model_config=model_config, data_config=preprocessing)
        config = check_config(new)
        config["pretrained_cfg"].pop("license", None)  # that of timm's weights; the card names the licence of these
        # One entry: several would be written in any order, and the same model would have another sha256 every time.
        save_file(copy.state_dict(), new / WEIGHTS, {"timm_mfd": json.dumps(identity(config))})
        (new / WEIGHTS).chmod((new / CONFIG).stat().st_mode & 0o777)  # was for the owner alone
        sha256 = sha256_of(new / WEIGHTS)
        (new / CONFIG).write_text(
            json.dumps(config | {"timm_mfd": {"sha256": sha256}}, indent=2) + "\n", encoding="utf-8"
        )
        card = render_card(config, sha256, run, repo_id=repo_id, license=license)
        (new / CARD).write_text(card, encoding="utf-8")
        check_weights(new / WEIGHTS, check_config(new))
        _load_back(copy, new)
    return folder


def check_folder(folder: str | Path) -> dict[str, Any]:
    """Refuse an export folder that could not be loaded, or whose card the Hub would not understand.

    Args:
        folder: What `save_pretrained` wrote.

    Returns:
        Content of its `config.json`.

    Raises:
        ValueError: Naming the first fault.
    """
    folder = Path(folder)
    config = check_config(folder)
    check_weights(folder / WEIGHTS, config)
    with safe_open(folder / WEIGHTS, framework="pt") as tensors:
        for key in tensors.keys():  # noqa: SIM118
            if not torch.isfinite(tensors.get_tensor(key)).all():
                raise ValueError(f"the weights in {str(folder)!r} are not all finite: {key}")
    if not (folder / CARD).is_file():
        raise ValueError(f"{str(folder)!r} has no model card ({CARD})")
    check_card((folder / CARD).read_text(encoding="utf-8-sig"), folder)
    return config


def push_to_hub(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    tag: str | None = None,
    parent_commit: str | None = None,
) -> Published:
    """Publish an export folder; every step can be repeated, and nothing is tagged before it was read back.

    The folder is checked; weights, configuration, card and pictures are uploaded in one commit; the Hub's checksums are
    compared with the folder; the model is loaded from that commit with an empty cache and must answer bit for bit as
    the folder's; last, the commit is tagged. The token is that of the environment (`HF_TOKEN`) or of `hf auth login`.

    Args:
        folder: What `save_pretrained` wrote, or `train_scripts/publish.py`.
        repo_id: `ORG/NAME`; made if it does not exist.
        private: Make it private.
        tag: Name for the commit, such as `"v1.0"`. An existing one is never moved.
        parent_commit: Refuse if the Hub's newest commit is another. Default: the one found at the start.

    Returns:
        What was published.

    Raises:
        ValueError: If the folder is not in order, the Hub refuses, somebody else changed the repository meanwhile, the
            tag exists on other files, or what the Hub holds is not the folder.
        ConnectionError: If the Hub cannot be reached.

    Example:
        >>> push_to_hub("runs/NAME/model", "me/resnet50_mfd.cifar100", tag="v1.0").commit
        '0c1d...'
    """
    folder = Path(folder)
    check_target(repo_id, tag)
    check_folder(folder)
    api = HfApi(library_name="timm_mfd")
    files = [name for name in FILES if (folder / name).is_file()]
    with hub_errors(repo_id, parent_commit):
        api.create_repo(repo_id, private=private, exist_ok=True)
        head = api.model_info(repo_id, files_metadata=True)
        if private and not head.private:
            raise ValueError(f"{repo_id!r} exists and is public; nothing was uploaded")
        if parent_commit not in (None, head.sha):
            raise ValueError(f"{repo_id!r} is at {head.sha}, not at {parent_commit}; look, then try again")
        names = [file.rfilename for file in head.siblings or ()]
        if pickled := [name for name in names if name.endswith(_PICKLES)]:
            raise ValueError(f"{repo_id!r} holds weights in other formats ({', '.join(pickled)}); delete them first")
        refs = api.list_repo_refs(repo_id)
        tags = {ref.name: ref.target_commit for ref in refs.tags}
        if tag in [branch.name for branch in refs.branches]:
            raise ValueError(f"{repo_id!r} has a branch {tag!r}; choose another tag")
        if tag in tags and (differs := _differing(api, repo_id, tags[tag], folder, files)):
            raise ValueError(f"{repo_id!r} has the tag {tag!r} on other files ({differs}); choose a new --tag")
        if tag in tags:
            commit, changed = tags[tag], False
        else:
            commit = api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                allow_patterns=files,
                delete_patterns=[name for name in PICTURES if name in names and name not in files] or None,
                commit_message=f"Upload {check_config(folder)['architecture']}",
                parent_commit=head.sha,
            ).oid
            changed = commit != head.sha
            if differs := _differing(api, repo_id, commit, folder, files):
                raise ValueError(f"{repo_id!r} at {commit} does not hold what was sent ({differs}); nothing was tagged")
    reload_from_hub(folder, repo_id, commit)
    if tag is not None and tag not in tags:
        try:
            with hub_errors(repo_id, commit):
                api.create_tag(repo_id, tag=tag, revision=commit)
        except (ValueError, ConnectionError) as error:
            raise type(error)(f"{error}. The files are there as {commit}, only the tag {tag!r} is missing") from None
    return Published(repo_id, commit, sha256_of(folder / WEIGHTS), tag, changed)


def check_target(repo_id: str, tag: str | None) -> None:
    """Refuse names under which nothing can be published.

    Args:
        repo_id: `ORG/NAME`.
        tag: Name of the commit, if any.

    Raises:
        ValueError: If the Hub would refuse one of them, or the tag would hide a branch or a commit.
    """
    with hub_errors(repo_id):
        validate_repo_id(repo_id)
        if repo_id.count("/") != 1:
            raise HFValidationError
    if tag is not None and (tag == "main" or not re.fullmatch(r"\w([\w.-]{0,37}\w)?", tag, re.ASCII) or ".." in tag):
        raise ValueError(f"{tag!r} cannot be a tag; expected a name like v1.0")


def reload_from_hub(folder: Path, repo_id: str, commit: str) -> None:
    """Load a commit with an empty cache, and refuse if it does not answer bit for bit as the folder.

    Args:
        folder: The export folder.
        repo_id: `ORG/NAME`.
        commit: Its 40 digits.
    """
    with tempfile.TemporaryDirectory() as cache:
        there = create_model(f"hf-hub:{repo_id}@{commit}", pretrained=True, cache_dir=cache)
    here = create_model(f"local-dir:{folder}", pretrained=True)
    size = check_config(folder)["pretrained_cfg"]["input_size"]
    if not torch.equal(probe(there, size), probe(here, size)):
        raise ValueError(f"{repo_id!r} at {commit} does not answer as {str(folder)!r}; nothing was tagged")


@torch.no_grad()
def probe(model: nn.Module, size: Sequence[int]) -> Tensor:
    """Return a model's logits for two fixed images: equal for equal weights, on one machine.

    Args:
        model: The model; it is put into evaluation mode.
        size: `(C, H, W)` of the images.
    """
    return model.eval()(torch.randn(2, *size, generator=torch.Generator().manual_seed(0)))


def _names(given: Sequence[str] | Mapping[int, str], classes: int) -> list[str]:
    """Return one name per class, in their order."""
    if isinstance(given, str):
        raise ValueError(f"label_names must be one name per class, not the text {given!r}")
    if isinstance(given, Mapping):
        by_index = {str(index): str(name) for index, name in given.items()}
        if by_index.keys() != set(map(str, range(classes))):
            raise ValueError(f"label_names must have the indices 0 to {classes - 1}, not {', '.join(by_index)[:100]}")
        return [by_index[str(index)] for index in range(classes)]
    if len(given) != classes:
        raise ValueError(f"{len(given)} label names for a model of {classes} classes")
    return [str(name) for name in given]


@torch.no_grad()
def _load_back(model: nn.Module, folder: Path) -> None:
    """Refuse a folder from which another model comes back than the one that was saved."""
    with torch.random.fork_rng(devices=[]):  # building a model draws numbers that a training would miss
        try:
            loaded = create_model(f"local-dir:{folder}", pretrained=True)
        except ValueError as error:
            reason = str(error).replace(f"local-dir:{folder}", "the saved model")
            raise ValueError(
                f"{type(model).__name__} could not be loaded again: {reason}; layers that were put in after "
                "create_model cannot be saved"
            ) from None
    saved, found = model.state_dict(), loaded.state_dict()
    differs = next((key for key in found if not _same(saved[key].to(found[key].dtype), found[key])), None)
    if differs is None and not _same(*(_answers(one, check_config(folder)) for one in (model, loaded))):
        differs = "its answer to an image"  # of a layer without weights
    if differs is not None:
        raise ValueError(
            f"{type(model).__name__} would come back as another model: {differs} differs after loading; what was "
            "changed after create_model, beside the weights, cannot be saved"
        )


def _same(first: Tensor, second: Tensor) -> bool:
    return torch.allclose(first, second, rtol=0, atol=0, equal_nan=True)


def _answers(model: nn.Module, config: Mapping[str, Any]) -> Tensor:
    """Return what `probe` returns; nothing for a model that does not take images of the size it is saved with."""
    try:
        return probe(model.float(), config["pretrained_cfg"]["input_size"])
    except (RuntimeError, AssertionError):
        return torch.empty(0)


def _per_channel(name: str, values: Sequence[float] | None, channels: int) -> tuple[float, ...] | None:
    if values is None:
        return None
    try:
        numbers = tuple(float(value) for value in values)
    except TypeError:
        numbers = ()
    if len(numbers) != channels:
        raise ValueError(f"{name} must be {channels} numbers, one per channel, not {values!r}")
    if not all(map(math.isfinite, numbers)) or (name == "std" and min(numbers) <= 0):
        raise ValueError(f"{name} must be finite{' and above 0' if name == 'std' else ''}, not {values!r}")
    return numbers


def _differing(api: HfApi, repo_id: str, commit: str, folder: Path, files: Sequence[str]) -> str:
    """Return which files of a commit are not the folder's, by the Hub's own checksums; empty if none."""
    info = api.model_info(repo_id, revision=commit, files_metadata=True)
    there = {file.rfilename: file for file in info.siblings or ()}
    return ", ".join(name for name in files if not _is_same(there.get(name), folder / name))


def _is_same(file: Any, path: Path) -> bool:
    if file is None:
        return False
    if file.lfs is not None:
        return file.lfs.sha256 == sha256_of(path)
    content = path.read_bytes()  # the Hub names small files as git does
    return file.blob_id == hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
