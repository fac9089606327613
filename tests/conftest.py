"""Fixtures: fixed seeds, and small image folders in the official layouts."""

import hashlib
import pickle
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100

# A shell starts jobs in the background with Ctrl-C ignored, and so would all processes be that the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


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


def write_cifar(root: Path, reader: type[CIFAR10], label_key: str, monkeypatch, count: int = 4) -> dict:
    """Write the official python format with `count` images a batch, whose checksums the reader then expects."""
    folder = root / reader.base_folder
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    rows = {}
    for name, _ in reader.train_list + reader.test_list:
        pixels = rng.integers(0, 256, (count, 3072), dtype=np.uint8)
        labels = [int(label) for label in rng.integers(0, 10, count)]
        rows[name] = (pixels, labels)
        (folder / name).write_bytes(pickle.dumps({"data": pixels, label_key: labels}))
    classes = 10 if label_key == "labels" else 100
    names = {"label_names" if classes == 10 else "fine_label_names": [f"c{i}" for i in range(classes)]}
    (folder / reader.meta["filename"]).write_bytes(pickle.dumps(names))
    sums = {path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    for attribute in ("train_list", "test_list"):
        monkeypatch.setattr(reader, attribute, [[n, sums[n]] for n, _ in getattr(reader, attribute)])
    monkeypatch.setattr(reader, "meta", {**reader.meta, "md5": sums[reader.meta["filename"]]})
    return rows


@pytest.fixture
def official_datasets(tmp_path, tiny_imagenet_dataset, monkeypatch) -> Path:
    """A folder with a small version of every data set of the paper in its official format."""
    write_cifar(tmp_path, CIFAR10, "labels", monkeypatch, count=3)
    write_cifar(tmp_path, CIFAR100, "fine_labels", monkeypatch, count=12)
    for split, count in (("train", 6), ("test", 2)):
        for label, name in enumerate(("Adam_Old", "Zoe_Young")):
            (tmp_path / "facescrub" / split / name).mkdir(parents=True)
            for i in range(count):
                write_image(tmp_path / "facescrub" / split / name / f"{i}.png", 64, 100 * label + i)
        for label, name in enumerate(("airplane", "automobile")):
            (tmp_path / "cifar10-jpeg" / split / name).mkdir(parents=True)
            for i in range(count):
                write_image(tmp_path / "cifar10-jpeg" / split / name / f"{i}.jpg", 32, 100 * label + i)
    return tmp_path
