"""Readers on small files in the official layouts, and the errors for wrong ones."""

import shutil

import numpy as np
import pytest
import torch

from timm_mfd.data import FileImages, ImageDecodeError, load_dataset
from timm_mfd.data.images import ArrayImages, ImageData


def test_digits_are_embedded_and_split_without_overlap():
    data = load_dataset("digits")
    assert (len(data.train), len(data.test), data.image_size, data.num_classes) == (1437, 360, (8, 8), 10)
    train = {image.numpy().tobytes() for image in data.train.pixels}
    assert sum(image.numpy().tobytes() in train for image in data.test.pixels) == 0
    assert torch.bincount(data.test.labels).min() >= 35
    assert not data.flip
    pixels = data.train.pixels.float() / 255
    assert pixels.mean().item() == pytest.approx(data.mean[0], abs=2e-3)
    assert pixels.std().item() == pytest.approx(data.std[0], abs=2e-3)


def test_tiny_imagenet_takes_validation_labels_from_the_annotations(tiny_imagenet_dataset):
    for root in (tiny_imagenet_dataset, tiny_imagenet_dataset.parent):
        data = load_dataset("tiny_imagenet", root)
        assert (len(data.train), len(data.test), data.image_size) == (12, 4, (64, 64))
        assert data.class_names == ("goldfish", "tabby, cat")
        assert data.test_split == "val"
        # The fixture paints class 0 black and class 1 grey 100.
        for split in (data.train, data.test):
            for i, label in enumerate(split.labels.tolist()):
                assert split[i].shape == (64, 64, 3)
                assert abs(split[i].float().mean() - 100 * label) < 3
        assert sorted(data.test.labels.tolist()) == [0, 0, 1, 1]


def test_folder_reads_val_or_test(folder_dataset):
    data = load_dataset("folder", folder_dataset)
    assert (len(data.train), len(data.test), data.image_size, data.test_split) == (24, 12, (16, 16), "val")
    assert data.class_names == ("ant", "bee", "cat")
    for i, label in enumerate(data.train.labels.tolist()):
        assert data.train[i][0, 0, 0] // 80 == label
    (folder_dataset / "val").rename(folder_dataset / "test")
    assert load_dataset("folder", folder_dataset).test_split == "test"


def test_folder_resizes_when_asked_and_refuses_mixed_sizes_otherwise(folder_dataset):
    from PIL import Image

    Image.new("RGB", (30, 20), (10, 20, 30)).save(folder_dataset / "train" / "bee" / "wide.png")
    data = load_dataset("folder", folder_dataset)
    index = next(i for i, path in enumerate(data.train.paths) if path.endswith("wide.png"))
    with pytest.raises(ImageDecodeError, match=r"wide.png is 30x20, the other images are 16x16.*image_size"):
        data.train[index]
    resized = load_dataset("folder", folder_dataset, image_size=8)
    assert resized.train[index].shape == (8, 8, 3)
    assert resized.train[index][4, 4].tolist() == [10, 20, 30]


@pytest.mark.parametrize("content", [b"", b"no image"])
def test_an_undecodable_image_is_named(tmp_path, content):
    path = tmp_path / "broken.png"
    path.write_bytes(content)
    with pytest.raises(ImageDecodeError, match=f"cannot decode {path}: not an image"):
        FileImages([str(path)], [0], (8, 8))[0]


def test_a_truncated_image_and_a_missing_one_are_named(tmp_path, tiny_imagenet_dataset):
    path = next((tiny_imagenet_dataset / "val" / "images").iterdir())
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(ImageDecodeError, match=f"(?i)cannot decode {path}: .*truncated"):
        FileImages([str(path)], [0], (64, 64))[0]
    with pytest.raises(ImageDecodeError, match="cannot decode .*gone.png: No such file or directory$"):
        FileImages([str(tmp_path / "gone.png")], [0], (64, 64))[0]


def _without(*parts):
    def change(root):
        for part in parts:
            path = root / part
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return change


def _annotate_unknown_class(root):
    with (root / "val" / "val_annotations.txt").open("a") as file:
        file.write("val_9.JPEG\tn99999999\t0\t0\t1\t1\n")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without("wnids.txt"), r"lacks wnids.txt; expected .* found train/, val/, words.txt"),
        (_without("val/val_annotations.txt"), "lacks val/val_annotations.txt"),
        (_without("train/n02000000"), "no training images of class n02000000"),
        (_annotate_unknown_class, r"val_annotations.txt:5 names no class of wnids.txt: 'val_9.JPEG\\tn99999999"),
    ],
)
def test_a_wrong_tiny_imagenet_layout_says_what_is_expected_and_found(tiny_imagenet_dataset, change, message):
    change(tiny_imagenet_dataset)
    with pytest.raises(ValueError, match=message):
        load_dataset("tiny_imagenet", tiny_imagenet_dataset)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            _without("val"),
            r"hold train/ and val/, validation/, valid/ or test/, each with one folder per class, found train/",
        ),
        (_without("train"), r"found val/"),
        (_without("train/bee"), "class 'bee' is in val/ but not in train/"),
        (_without(*(f"train/cat/{i}.png" for i in range(8))), "cat"),
        (_without("train/ant", "train/bee", "train/cat"), "no class folder with images in .*, found nothing"),
    ],
)
def test_a_wrong_folder_layout_says_what_is_expected_and_found(folder_dataset, change, message):
    change(folder_dataset)
    with pytest.raises(ValueError, match=message):
        load_dataset("folder", folder_dataset)


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("cifar11", {}, "unknown dataset 'cifar11'; did you mean cifar1"),
        ("mnist!", {}, "choose one of digits, cifar10, cifar100, tiny_imagenet, facescrub, folder"),
        ("cifar10", {}, r"needs a data directory \(--data-dir\)"),
        ("tiny_imagenet", {"data_dir": "/no/such"}, "'/no/such' does not exist .*; choose another --data-dir"),
        ("digits", {"data_dir": "images"}, "'digits' is built in and does not read 'images'"),
        ("digits", {"image_size": 32}, "image size 32 applies to 'folder' and"),
    ],
)
def test_wrong_arguments_are_named(name, kwargs, message):
    with pytest.raises(ValueError, match=message):
        load_dataset(name, **kwargs)


def test_a_class_without_held_out_images_is_mentioned(folder_dataset):
    shutil.rmtree(folder_dataset / "val" / "bee")
    with pytest.warns(UserWarning, match="no class folder 'bee' in val/"):
        assert load_dataset("folder", folder_dataset).num_classes == 3


def test_labels_outside_the_classes_and_empty_splits_are_refused():
    images = ArrayImages(np.zeros((2, 4, 4, 3), np.uint8), [0, 5])
    with pytest.raises(ValueError, match="label 5 in train is outside the 3 classes"):
        ImageData("x", images, images, ("a", "b", "c"))
    with pytest.raises(ValueError, match="the train split has no images"):
        ImageData("x", ArrayImages(np.zeros((0, 4, 4, 3), np.uint8), []), images, ("a",))
