"""Image files decoded once: a uint8 array on the device, with a cache file that survives the process."""

import hashlib
import os
import sys
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Literal, get_args

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from ..atomic import replacing
from ..extras import require
from .decoding import decoded_batches
from .images import ArrayImages, FileImages, ImageData

LoaderMode = Literal["auto", "resident", "workers"]

# Changes whenever the same file would decode to other pixels.
_DECODER = 2
# Part of the free memory that resident images may take.
_SHARE = 0.4
_BATCH_BYTES = 4 << 20  # each decoding process holds two batches


def place(
    data: ImageData,
    mode: LoaderMode,
    device: torch.device,
    *,
    workers: int = 0,
    processes: int = 1,
    cache_dir: str | Path | None = None,
    quiet: bool = False,
    train: bool = True,
) -> ImageData:
    """Put a data set where training reads it fastest.

    Args:
        data: The data set.
        mode: `"resident"`: decode all images once and keep them as uint8 on the device. `"workers"`: decode every image
            every time, in worker processes. `"auto"`: resident if it fits into 40 % of the free memory.
        device: Where the batches are needed.
        workers: Decoding processes.
        processes: Training processes that share the memory.
        cache_dir: Where decoded images are kept between runs. Default: `~/.cache/timm_mfd`, or under `XDG_CACHE_HOME`.
        quiet: Show no progress bar.
        train: Whether the training images go there, too, or stay as they are: to be augmented from their own size, or
            because nobody needs them.

    Returns:
        The same data set; its images are `ArrayImages` on the device if resident.

    Raises:
        ValueError: If `mode` is unknown.
        ImageDecodeError: If an image cannot be decoded.

    Example:
        >>> data = place(load_dataset("tiny_imagenet", root), "auto", torch.device("cuda"), workers=8)
    """
    if mode not in get_args(LoaderMode):
        raise ValueError(f"loader must be one of {', '.join(get_args(LoaderMode))}, not {mode!r}")
    if mode == "workers" or (
        mode == "auto" and resident_bytes(data, train) > _SHARE * _free_memory(device) / processes
    ):
        return data

    def resident(images: ArrayImages | FileImages, split: str) -> ArrayImages:
        if isinstance(images, FileImages):
            pixels = decoded(images, cache_dir, workers, f"{data.name} {split}", quiet)
        else:
            pixels = images.pixels
        return ArrayImages(pixels.to(device), images.labels, images.paths)

    placed = resident(data.train, "train") if train else data.train
    return replace(data, train=placed, test=resident(data.test, data.test_split))


def resident_bytes(data: ImageData, train: bool = True) -> int:
    """Return the memory that the decoded data set takes, with or without its training images."""
    height, width = data.image_size
    return (len(data.train) * train + len(data.test)) * height * width * 3


def decoded(images: FileImages, cache_dir: str | Path | None, workers: int, title: str, quiet: bool = False) -> Tensor:
    """Return the pixels of image files, which one process decodes for all that want them, now or later.

    Args:
        images: The files.
        cache_dir: As for `place`.
        workers: Decoding processes.
        title: What to call the images on the screen.
        quiet: Show no progress bar.

    Returns:
        uint8 `[N, H, W, 3]`, on the CPU.

    Raises:
        ImageDecodeError: If an image cannot be decoded.
    """
    folder = _cache_folder(cache_dir)
    if folder is None:
        _tell(f"{title}: decoded images are not kept: there is no home; choose a --cache-dir")
        return _decode(images, workers, title, quiet)
    key = cache_key(images)
    path = folder / f"{key[:32]}.safetensors"
    with _alone(path.with_suffix(".lock"), title):
        pixels = read_cache(path, key, (len(images), *images.size, 3))
        if pixels is None:
            pixels = _decode(images, workers, title, quiet)
            _write_cache(path, key, pixels, quiet)
    return pixels


def _cache_folder(cache_dir: str | Path | None) -> Path | None:
    """Return where decoded images are kept; None for a user without a home, as in some containers."""
    if cache_dir:
        return Path(cache_dir)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "timm_mfd"
    except RuntimeError:
        return None


@contextmanager
def _alone(lock: Path, title: str) -> Iterator[None]:
    """Wait for other processes of this machine that decode the same; where nothing can be locked, do not."""
    with ExitStack() as held:
        try:
            lock.parent.mkdir(parents=True, exist_ok=True)
            try:
                held.enter_context(FileLock(lock, blocking=False))
            except Timeout:
                _tell(f"{title}: waiting for another process that decodes it")
                held.enter_context(FileLock(lock))
        except (OSError, NotImplementedError):  # a folder or a file system that cannot be written to or locked
            pass
        yield


def cache_key(images: FileImages) -> str:
    """Return a sha256 that changes whenever the images would decode to other pixels."""
    cropped = () if images.crop_pct == 1 else (images.crop_pct,)
    parts = (_DECODER, images.size, images.resize, *cropped, images.fingerprint())
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def read_cache(path: Path, key: str, shape: tuple[int, ...]) -> Tensor | None:
    """Return the cached pixels, or None if there are none, they are damaged, or belong to other files."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            pixels, header = file.get_tensor("pixels"), file.metadata() or {}
            fits = header.get("fingerprint") == key and tuple(pixels.shape) == shape and pixels.dtype == torch.uint8
            if fits and header.get("crc32") == _checksum(pixels):
                return pixels
    except PermissionError as error:
        _tell(f"cannot read decoded images: {error}")
        return None
    except (SafetensorError, OSError, KeyError):
        pass
    _tell(f"{path} is damaged or belongs to other images; decoding again")
    return None


def _decode(images: FileImages, workers: int, title: str, quiet: bool) -> Tensor:
    pixels = torch.empty(len(images), *images.size, 3, dtype=torch.uint8)
    # Batches come through /dev/shm, of which a container has 64 MiB.
    height, width = images.size
    at_a_time = max(1, min(256, _BATCH_BYTES // (height * width * 3)))
    batches = decoded_batches(images, workers, batch_size=at_a_time)
    done = 0
    quiet = quiet or not _is_first()
    if not quiet and not _is_terminal():  # where no bar is shown
        _tell(f"decoding {title}: {len(images):,} images, once")
    with tqdm(total=len(images), desc=f"decoding {title}", unit="img", disable=True if quiet else None) as bar:
        for batch in batches:
            pixels[done : done + len(batch)] = batch
            done += len(batch)
            bar.update(len(batch))
    return pixels


def _write_cache(path: Path, key: str, pixels: Tensor, quiet: bool) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path, shared=True) as partial:
            save_file({"pixels": pixels}, partial, metadata={"fingerprint": key, "crc32": _checksum(pixels)})
        if quiet:
            return
        size = sum(file.stat().st_size for file in path.parent.glob("*.safetensors"))
        _tell(
            f"decoded images are kept in {path.parent}: {pixels.nbytes / 2**20:,.1f} MiB of {size / 2**20:,.1f} MiB; "
            "the folder may be deleted at any time, and --cache-dir chooses another one"
        )
    except (OSError, SafetensorError) as error:
        _tell(f"decoded images are not cached in {path.parent}: {error}")


def _is_first() -> bool:
    """Return whether this is the process that speaks for all of a run."""
    return os.environ.get("RANK", "0") == "0"


def _is_terminal() -> bool:
    return sys.stderr is not None and sys.stderr.isatty()  # None where it is closed


def _tell(text: str) -> None:
    if _is_first():
        print(text, file=sys.stderr, flush=True)  # noqa: T201


def _checksum(pixels: Tensor) -> str:
    return str(zlib.crc32(pixels.contiguous().numpy().data))


def _free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    require("train", "a look at the free memory (loader='auto')")
    import psutil

    return psutil.virtual_memory().available
