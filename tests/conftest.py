"""How the tests run; fixtures: fixed seeds, and small image folders in the official layouts."""

import hashlib
import os
import pickle
import signal
from dataclasses import replace
from pathlib import Path

# Before torch is imported. In networks of this size threads wait for each other longer than they compute: where cores
# are shared, a step takes ten times as long with two. Processes that tests start follow.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# What imports torch is imported below, where it is used: the process that hands out the tests does without.
import numpy as np
import pytest
from PIL import Image

# A shell starts jobs in the background with Ctrl-C ignored, and so would all processes be that the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """The whole suite runs in several processes, a part of it in this one: it is done before they have started."""
    whole = config.args_source is config.ArgsSource.TESTPATHS and not config.option.keyword
    return min((os.cpu_count() or 1) + 1, 4) if whole else 0  # one more than cores: tests wait for processes, too


def pytest_sessionstart(session: pytest.Session) -> None:
    """Each of several processes imports what tests need once, for those that the tests start as well."""
    if hasattr(session.config, "workerinput"):
        from processes import fork_the_server

        fork_the_server()


# A process takes whole files, so those that take longest begin first, and none of them is left for the end.
_LONGEST = (
    "test_publish",
    "test_pruning",
    "test_session",
    "test_train",
    "test_compile",
    "test_recipes",
    "test_models",
    "test_analyze",
    "test_wrappers",
    "test_reproduce",
    "test_hub",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Bring the longest files to the front; the order within a file stays."""
    place = {name: number for number, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


@pytest.fixture(autouse=True)
def _seed():
    import torch

    torch.manual_seed(0)


@pytest.fixture
def runs_here(tmp_path, monkeypatch):
    """A folder and a cache of its own for `train.main` in this process; the runs draw no curves."""
    from accelerate.state import AcceleratorState

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("timm_mfd.figures.training_curves", lambda *_: None)
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def folder_dataset(tmp_path) -> Path:
    """Three classes of 8 + 4 images, 16x16, each class of one colour, so that labels can be checked."""
    root = tmp_path / "images"
    for split, count in (("train", 8), ("val", 4)):
        for label, name in enumerate(("ant", "bee", "cat")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                write_image(folder / f"{i}.png", colour=80 * label + i)
    return root


@pytest.fixture
def tiny_imagenet_dataset(tmp_path) -> Path:
    """Two classes in Tiny ImageNet's layout; validation labels are only in val_annotations.txt, one image is grey."""
    root = tmp_path / "tiny-imagenet-200"
    wnids = ("n02000000", "n01000000")
    (root / "val" / "images").mkdir(parents=True)
    (root / "wnids.txt").write_text("\n".join(wnids) + "\n")
    (root / "words.txt").write_text("n01000000\tgoldfish\nn02000000\ttabby, cat\n")
    annotations = []
    for label, wnid in enumerate(sorted(wnids)):
        (root / "train" / wnid / "images").mkdir(parents=True)
        (root / "train" / wnid / f"{wnid}_boxes.txt").write_text("")
        for i in range(6):
            write_image(
                root / "train" / wnid / "images" / f"{wnid}_{i}.JPEG", 64, 100 * label, "L" if i == 0 else "RGB"
            )
        for i in range(2):
            name = f"val_{2 * i + label}.JPEG"
            write_image(root / "val" / "images" / name, 64, 100 * label)
            annotations.append(f"{name}\t{wnid}\t0\t0\t63\t63")
    (root / "val" / "val_annotations.txt").write_text("\n".join(annotations) + "\n")
    return root


def write_image(path: Path, side: int = 16, colour: int = 0, mode: str = "RGB") -> None:
    pixels = np.full((side, side) if mode == "L" else (side, side, 3), colour, dtype=np.uint8)
    Image.fromarray(pixels, mode=None).save(path)


Splits = dict[str, tuple[np.ndarray, np.ndarray]]


def small_cifar(name: str, monkeypatch, labels: dict[str, np.ndarray] | None = None) -> Splits:
    """Random images that count as the published ones from now on: two and one a class, or of the given labels."""
    from timm_mfd.data import cifar

    rng = np.random.default_rng(0)
    classes = 10 if name == "cifar10" else 100
    per_class = {"train": 2, "test": 1}
    splits, digests = {}, {}
    for split, count in per_class.items():
        wanted = rng.permutation(np.repeat(np.arange(classes), count)) if labels is None else labels[split]
        pixels = rng.integers(0, 256, (len(wanted), 32, 32, 3), dtype=np.uint8)
        splits[split] = pixels, wanted
        # By class, then by the SHA-256 of the 3,072 bytes.
        rows = sorted(
            (int(y), hashlib.sha256(x.tobytes()).digest(), x.tobytes()) for x, y in zip(pixels, wanted, strict=True)
        )
        content = b"".join(row[2] for row in rows) + b"".join(row[0].to_bytes(8, "little") for row in rows)
        digests[split] = hashlib.sha256(content).hexdigest()
    published = cifar.PUBLISHED[name]
    monkeypatch.setitem(cifar.PUBLISHED, name, replace(published, per_class=per_class, digests=digests))
    return splits


def write_archive(root: Path, name: str, splits: Splits, monkeypatch) -> Path:
    """Write the official python format, whose checksums the reader then expects."""
    from torchvision.datasets import CIFAR10, CIFAR100

    reader = CIFAR10 if name == "cifar10" else CIFAR100
    folder = root / reader.base_folder
    folder.mkdir(parents=True)
    key = "labels" if name == "cifar10" else "fine_labels"
    for split, files in (("train", reader.train_list), ("test", reader.test_list)):
        pixels, labels = splits[split]
        for (file, _), part in zip(files, np.array_split(np.arange(len(labels)), len(files)), strict=True):
            planes = pixels[part].transpose(0, 3, 1, 2).reshape(len(part), 3072)  # of red, green and blue
            (folder / file).write_bytes(pickle.dumps({"data": planes, key: labels[part].tolist()}))
    names = {"label_names" if name == "cifar10" else "fine_label_names": ["not read"]}
    (folder / reader.meta["filename"]).write_bytes(pickle.dumps(names))
    sums = {path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    for attribute in ("train_list", "test_list"):
        monkeypatch.setattr(reader, attribute, [[n, sums[n]] for n, _ in getattr(reader, attribute)])
    monkeypatch.setattr(reader, "meta", {**reader.meta, "md5": sums[reader.meta["filename"]]})
    return folder


def write_class_folders(root: Path, name: str, splits: Splits, ending: str = ".png") -> Path:
    """Write one file per image under names that say nothing of the order."""
    from timm_mfd.data import cifar

    rng = np.random.default_rng(1)
    for split, (pixels, labels) in splits.items():
        for image, label, number in zip(pixels, labels, rng.permutation(len(labels)), strict=True):
            folder = root / name / split / cifar.PUBLISHED[name].class_names[label]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / f"{number}{ending}")
    return root / name


@pytest.fixture
def official_datasets(tmp_path, tiny_imagenet_dataset, monkeypatch) -> Path:
    """A folder with a small version of every data set of the paper in its official format."""
    for name in ("cifar10", "cifar100"):
        labels = {"train": np.arange(15) % 10, "test": np.arange(12) % 10}
        write_archive(tmp_path, name, small_cifar(name, monkeypatch, labels), monkeypatch)
    for split, count in (("train", 6), ("test", 2)):
        for label, name in enumerate(("Adam_Old", "Zoe_Young")):
            (tmp_path / "facescrub" / split / name).mkdir(parents=True)
            for i in range(count):
                write_image(tmp_path / "facescrub" / split / name / f"{i}.png", 64, 100 * label + i)
    return tmp_path
