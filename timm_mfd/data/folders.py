"""Images in class folders: `train/` and `val/` or `test/`, each with one folder per class."""

import os
import warnings
from collections.abc import Sequence
from pathlib import Path

from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, make_dataset

from .images import FileImages, ImageData, read_image


def load_folder(
    root: Path, image_size: int | None = None, name: str = "folder", held_out: Sequence[str] = ("val", "test")
) -> ImageData:
    """Open a folder of class folders.

    Args:
        root: Holds `train/` and one of `held_out`.
        image_size: Resize every image to this side. Default: all must be as large as the first.
        name: What to call the data set.
        held_out: Names for the held-out split, in the order of preference.

    Returns:
        Its images, in the order of class names and paths.

    Raises:
        ValueError: If the layout is another one, a class has no images, or a link leads in a circle.
    """
    test_split = next((split for split in held_out if (root / split).is_dir()), None)
    if test_split is None or not (root / "train").is_dir():
        expected = " or ".join(f"{split}/" for split in held_out)
        raise ValueError(
            f"{name}: expected {str(root)!r} to hold train/ and {expected}, each with one folder per class, "
            f"found {listing(root)}"
        )
    try:
        classes, index = find_classes(str(root / "train"))
        tested, _ = find_classes(str(root / test_split))
        if missing := sorted(set(classes) - set(tested)):
            warnings.warn(f"{name}: no class folder {missing[0]!r} in {test_split}/; it is not evaluated", stacklevel=2)
        if unknown := sorted(set(tested) - set(classes)):
            raise ValueError(f"{name}: class {unknown[0]!r} is in {test_split}/ but not in train/")
        for split in ("train", test_split):
            _refuse_loops(root / split)
        train = make_dataset(str(root / "train"), index, extensions=IMG_EXTENSIONS)
        test = make_dataset(
            str(root / test_split), {label: index[label] for label in tested}, extensions=IMG_EXTENSIONS
        )
    except FileNotFoundError as error:
        raise ValueError(f"{name}: {error}") from None
    size = (image_size, image_size) if image_size else read_image(train[0][0]).size[::-1]
    return ImageData(
        name=name,
        train=file_images(train, size, resize=image_size is not None),
        test=file_images(test, size, resize=image_size is not None),
        class_names=tuple(classes),
        test_split=test_split,
    )


def file_images(samples: Sequence[tuple[str, int]], size: tuple[int, int], resize: bool = False) -> FileImages:
    """Return the images of pairs of path and label; `size` and `resize` are as for `FileImages`."""
    return FileImages([path for path, _ in samples], [label for _, label in samples], size, resize)


def listing(folder: Path) -> str:
    """Return a few names of what is in a folder, for error messages."""
    names = sorted(entry.name + ("/" if entry.is_dir() else "") for entry in os.scandir(folder))
    shown = ", ".join(names[:8]) or "nothing"
    return shown + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _refuse_loops(root: Path) -> None:
    """Refuse a link to a folder above it, through which every image would be found again and again."""
    for folder, names, _ in os.walk(root, followlinks=True):
        for link in (path for name in names if os.path.islink(path := os.path.join(folder, name))):
            target = Path(link).resolve()
            # The way here may have led through links itself, so every folder on it counts.
            way = [Path(folder), *Path(folder).parents]
            if any(target == above.resolve() for above in way) or target in root.resolve().parents:
                raise ValueError(f"folder: the link {link!r} leads back to a folder above it")
