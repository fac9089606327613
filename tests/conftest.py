"""Fixtures: fixed seeds, and small image folders in the official layouts."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image


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
