"""Images in class folders: `train/` and `val/` or `test/`, each with one folder per class."""

import os
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .held_out import split_held_out
from .images import IMAGE_ENDINGS, FileImages, ImageData, read_image
from .remarks import remarks

# What systems put beside images, in whatever letters, together with every name that begins with a dot.
_OF_THE_SYSTEM = {
    *("__macosx", "lost+found", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"),
    *("$recycle.bin", "system volume information", "@eadir", "@recycle", "@recently-snapshot", "#recycle", "#snapshot"),
}


def load_folder(
    root: Path,
    image_size: int | None = None,
    name: str = "folder",
    held_out: Sequence[str] = ("val", "validation", "valid", "test"),
    val_fraction: float | None = None,
    seed: int = 0,
) -> ImageData:
    """Open a folder of class folders.

    Hidden names, thumbnails of the system, files that are no images, and links that lead back into the data set are
    left out, with a warning that counts them.

    Args:
        root: Holds `train/` and one of `held_out`, or with `val_fraction` `train/` alone or the class folders.
        image_size: Resize every image to this side. Default: all must be as large as the first.
        name: What to call the data set.
        held_out: Names for the held-out split, in the order of preference.
        val_fraction: Hold out this part of the images, see `split_held_out`.
        seed: Which of them.

    Returns:
        Its images, in the order of class names and paths.

    Raises:
        ValueError: If the layout is another one, there are fewer than two classes, or one has no training images.
    """
    test_split = next((split for split in held_out if (root / split).is_dir()), None)
    resize = image_size is not None if name == "folder" else None
    if val_fraction is not None:
        classes, train_samples, test_samples = _held_out_part(root, name, test_split, val_fraction, seed)
        test_split = "held-out part"
    else:
        if test_split is None or not (root / "train").is_dir():
            raise ValueError(_other_layout(root, name, held_out))
        splits = [root / split for split in ("train", test_split)]
        train, test = (_Split.scan(split, splits) for split in splits)
        classes = _classes(name, train, test)
        train_samples, test_samples = (split.samples(classes) for split in (train, test))
        _warn(name, classes, train, test)
    size = (image_size, image_size) if image_size else read_image(train_samples[0][0]).size[::-1]
    for remark in remarks([path for path, _ in train_samples]):
        warnings.warn(f"{name}: {remark}", stacklevel=2)
    return ImageData(
        name=name,
        train=file_images(train_samples, size, resize),
        test=file_images(test_samples, size, resize),
        class_names=tuple(readable(label) for label in classes),
        test_split=test_split,
    )


def _other_layout(root: Path, name: str, held_out: Sequence[str]) -> str:
    *others, last = (f"{split}/" for split in held_out)
    expected = " or ".join([", ".join(others), last] if others else [last])
    below = [path for path in sorted(root.iterdir()) if path.is_dir() and not is_hidden(path.name)]
    datasets = [path for path in below if (path / "train").is_dir()]
    hint = f"; did you mean {datasets[0]}?" if len(datasets) == 1 else ""
    if name == "folder" and not datasets and below:
        hint = "; a val_fraction (--val-fraction 0.2) holds out a part of images that come without one"
    return (
        f"{name}: expected {str(root)!r} to hold train/ and {expected}, each with one folder per class, "
        f"found {listing(root)}{hint}"
    )


def _held_out_part(
    root: Path, name: str, test_split: str | None, fraction: float, seed: int
) -> tuple[list[str], list[tuple[str, int]], list[tuple[str, int]]]:
    """Return the classes of a folder without a held-out split, and the samples of its two parts."""
    top = root / "train" if (root / "train").is_dir() else root
    if top != root and test_split:
        raise ValueError(f"{name}: {str(root)!r} has {test_split}/ already; leave val_fraction (--val-fraction) out")
    if not 0 < fraction < 1:
        raise ValueError(f"val_fraction (--val-fraction) must be between 0 and 1, not {fraction:g}")
    everything = _Split.scan(top, [top])
    classes = _classes(name, everything, everything)
    _warn(name, classes, everything)
    samples = everything.samples(classes)
    if single := [label for label in classes if len(everything.images[label]) == 1]:
        raise ValueError(f"{name}: class {single[0]!r} has one image, of which nothing can be held out; add another")
    parts = split_held_out([path for path, _ in samples], [classes[label] for _, label in samples], fraction, seed)
    train, test = ([samples[index] for index in part] for part in parts)
    return classes, train, test


def _warn(name: str, classes: Sequence[str], *splits: "_Split") -> None:
    for split in splits:
        if said := split.left_out(classes):
            warnings.warn(f"{name}: left out of {split.path.name}/: {said}", stacklevel=3)
    for doubt in _doubts(classes, *splits):
        warnings.warn(f"{name}: {doubt}", stacklevel=3)


def file_images(samples: Sequence[tuple[str, int]], size: tuple[int, int], resize: bool | None = None) -> FileImages:
    """Return the images of pairs of path and label; `size` and `resize` are as for `FileImages`."""
    return FileImages([path for path, _ in samples], [label for _, label in samples], size, resize)


def listing(folder: Path) -> str:
    """Return a few names of what is in a folder, for error messages."""
    names = sorted(entry.name + ("/" if entry.is_dir() else "") for entry in os.scandir(folder))
    shown = ", ".join(names[:8]) or "nothing"
    return shown + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _classes(name: str, train: "_Split", test: "_Split") -> list[str]:
    """Return the names of the classes: those with training images."""
    held_out = f"{test.path.name}/"
    for label, images in train.images.items():
        if images:
            continue
        if endings := train.foreign[label]:
            raise ValueError(f"{name}: no image in {str(train.path / label)!r}, only {_counted(endings)}")
        if test.images.get(label):
            raise ValueError(f"{name}: class {label!r} has images in {held_out} but none in train/")
    classes = [label for label, images in train.images.items() if images]
    if not classes:
        raise ValueError(f"{name}: no class folder with images in {str(train.path)!r}, found {listing(train.path)}")
    if unknown := sorted(label for label, images in test.images.items() if images and label not in classes):
        raise ValueError(f"{name}: class {unknown[0]!r} is in {held_out} but not in train/")
    if len(classes) < 2:
        raise ValueError(
            f"{name}: {str(train.path)!r} has one class, {classes[0]!r}; a classifier needs two, a folder for each"
        )
    missing = [label for label in classes if not test.images.get(label)]
    if missing:
        more = f" and {len(missing) - 1} more" if missing[1:] else ""
        what = "no image in class folder" if missing[0] in test.images else "no class folder"
        ending = "it is" if not more else "they are"
        warnings.warn(f"{name}: {what} {missing[0]!r}{more} in {held_out}; {ending} not evaluated", stacklevel=3)
    return classes


def _doubts(classes: Sequence[str], *splits: "_Split") -> Iterator[str]:
    """Say what of the classes is hardly meant."""
    alike: dict[str, str] = {}
    for label in classes:
        other = alike.setdefault(" ".join(label.casefold().split()), label)
        if other != label:
            yield f"the classes {other!r} and {label!r} differ in capitals or spaces only"
    for split in splits:
        for label, folders in split.folders.items():
            for folder in [folder for folder in folders if Path(folder).name in {*classes} - {label}][:1]:
                inside = f"{split.path.name}/{label}/{folder}"
                yield f"the folder {inside!r} is named like another class, and its images count as {label!r}"


@dataclass
class _Split:
    """What lies in the folder of a split.

    Attributes:
        path: The folder.
        images: Paths of the images of each class folder, both sorted.
        foreign: For each class folder, how many files of which ending are no images.
        folders: For each class folder, the folders below it that have files.
        hidden: Names that are hidden or of the system.
        loops: Links that lead back into the data set.
        beside: How many files lie beside the class folders.
    """

    path: Path
    images: dict[str, list[str]] = field(default_factory=dict)
    foreign: dict[str, Counter[str]] = field(default_factory=dict)
    folders: dict[str, list[str]] = field(default_factory=dict)
    hidden: list[str] = field(default_factory=list)
    loops: list[str] = field(default_factory=list)
    beside: int = 0

    @classmethod
    def scan(cls, path: Path, splits: Sequence[Path]) -> "_Split":
        """Look at everything in the folder of a split.

        Args:
            path: The folder.
            splits: The folders of all splits.
        """
        found = cls(path)
        all_splits = [split.resolve() for split in splits]
        for entry in sorted(os.scandir(path), key=lambda entry: entry.name):
            if is_hidden(entry.name):
                found.hidden.append(entry.name)
            elif not entry.is_dir():
                found.beside += 1
            elif entry.is_symlink() and _leads_back(Path(entry.path), all_splits, inside=all_splits):
                found.loops.append(f"{path.name}/{entry.name}")
            else:
                found.images[entry.name], found.foreign[entry.name] = [], Counter()
                found.folders[entry.name] = []
                for folder, names in sorted(found._folders(entry.path, all_splits)):
                    found._sort(entry.name, folder, names)
                    if names and folder != entry.path:
                        found.folders[entry.name].append(os.path.relpath(folder, entry.path))
        return found

    def _folders(self, top: str, splits: Sequence[Path]) -> Iterator[tuple[str, list[str]]]:
        """Yield all folders of a class with the names of their files; links are followed unless they lead back."""
        for folder, names, files in os.walk(top, followlinks=True):
            yield folder, files
            for name in names[:]:
                path = Path(folder, name)
                if is_hidden(name):
                    self.hidden.append(name)
                elif not path.is_symlink():
                    continue
                # The way here may have led through links itself, so every folder on it counts.
                elif _leads_back(path, [*splits, Path(folder).resolve()], inside=splits) or any(
                    path.resolve() == above.resolve() for above in path.parents
                ):
                    self.loops.append(os.path.relpath(path, self.path.parent))
                else:
                    continue
                names.remove(name)

    def _sort(self, label: str, folder: str, names: Sequence[str]) -> None:
        for name in sorted(names):
            if is_hidden(name):
                self.hidden.append(name)
            elif name.lower().endswith(IMAGE_ENDINGS):
                self.images[label].append(os.path.join(folder, name))
            else:
                self.foreign[label][os.path.splitext(name)[1].lower()] += 1

    def samples(self, classes: Sequence[str]) -> list[tuple[str, int]]:
        """Return path and label of every image, in the order of the classes and paths."""
        return [(path, label) for label, name in enumerate(classes) for path in self.images.get(name, ())]

    def left_out(self, classes: Sequence[str]) -> str:
        """Say what is left out beside the classes; empty if nothing is."""
        said = []
        if foreign := sum(self.foreign.values(), Counter()):
            said.append(_counted(foreign))
        if self.beside:
            said.append(f"{self.beside:,} beside the class folders")
        empty = [label for label, images in self.images.items() if not images and label not in classes]
        for names, one, several in (
            (self.hidden, "hidden or system name", "hidden or system names"),
            (empty, "folder without a file", "folders without a file"),
            (self.loops, "link back into the data set", "links back into the data set"),
        ):
            if names:
                shown = ", ".join(list(dict.fromkeys(names))[:3]) + ", ..." * (len(set(names)) > 3)
                said.append(f"{len(names):,} {several if names[1:] else one} ({shown})")
        return "; ".join(said)


def readable(name: str) -> str:
    """Return a name of a file as text, also one that is not UTF-8 and could not be written into a file."""
    return os.fsencode(name).decode("utf-8", "replace")


def is_hidden(name: str) -> bool:
    """Return whether a name in a folder is nobody's image or class, such as `.ipynb_checkpoints` or `@eaDir`."""
    return name.startswith(".") or name.lower() in _OF_THE_SYSTEM


def _leads_back(link: Path, above: Sequence[Path], inside: Sequence[Path]) -> bool:
    """Whether a link leads to one of some folders or to a folder above it, or into one of others."""
    target = link.resolve()
    return any(target == folder or target in folder.parents for folder in above) or any(
        folder in target.parents for folder in inside
    )


def _counted(endings: "Counter[str]") -> str:
    total = endings.total()
    shown = ", ".join(f"{ending or 'without an ending'} {count:,}" for ending, count in endings.most_common(6))
    return f"{total:,} file{'s' if total > 1 else ''} ({shown}{', ...' if len(endings) > 6 else ''})"
