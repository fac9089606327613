"""What lies in a folder is not believed blindly, and what is left out of it is counted."""

import os
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_image
from PIL import Image

from timm_mfd.data import ImageDecodeError, load_dataset
from timm_mfd.data.decoding import decoded_batches
from timm_mfd.data.images import FileImages, read_image
from timm_mfd.sources import data_name


def load(root):
    """Return the data set and what was said of it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        data = load_dataset("folder", root)
    return data, " | ".join(str(warning.message) for warning in caught)


@pytest.mark.parametrize(
    "name", [".ipynb_checkpoints", "__MACOSX", "@eaDir", "$RECYCLE.BIN", "lost+found", "System Volume Information"]
)
def test_a_folder_of_the_system_is_no_class_wherever_it_lies(folder_dataset, name):
    for place in ("train", "val", "train/ant", "val/bee"):
        (folder_dataset / place / name).mkdir()
        shutil.copy(folder_dataset / "train" / "ant" / "0.png", folder_dataset / place / name / "copy.png")
    data, said = load(folder_dataset)
    assert data.class_names == ("ant", "bee", "cat")
    assert (len(data.train), len(data.test)) == (24, 12)
    assert f"left out of train/: 2 hidden or system names ({name})" in said
    assert f"left out of val/: 2 hidden or system names ({name})" in said


def test_classes_that_are_hardly_meant_are_told(folder_dataset):
    shutil.copytree(folder_dataset / "train" / "bee", folder_dataset / "train" / "ant" / "copy" / "bee")
    for split in ("train", "val"):
        shutil.copytree(folder_dataset / split / "bee", folder_dataset / split / "Bee ")
    said = load(folder_dataset)[1]
    assert "the classes 'Bee ' and 'bee' differ in capitals or spaces only" in said
    assert "the folder 'train/ant/copy/bee' is named like another class, and its images count as 'ant'" in said


def test_a_name_that_is_not_utf8_can_be_written_everywhere(folder_dataset):
    for split in ("train", "val"):
        (folder_dataset / split / "bee").rename(folder_dataset / split / os.fsdecode(b"B\xe4r"))
    assert load(folder_dataset)[0].class_names == ("B\ufffdr", "ant", "cat")
    assert data_name("folder", os.fsdecode(b"im\xe4g")) == "im\ufffdg"


def test_a_folder_too_high_is_told_which_one_is_meant(folder_dataset):
    with pytest.raises(ValueError, match="found images/; did you mean .*/images[?]$"):
        load(folder_dataset.parent)


def test_files_that_a_mac_or_windows_puts_beside_images_are_no_images(folder_dataset):
    for name in ("._0.png", "thumbs.db", ".DS_Store"):
        (folder_dataset / "train" / "ant" / name).write_bytes(b"not pixels")
    data, said = load(folder_dataset)
    assert len(data.train) == 24
    assert "left out of train/: 3 hidden or system names (" in said


def test_every_raster_format_that_pillow_decodes_is_read_and_the_rest_counted_by_ending(folder_dataset):
    image = Image.open(folder_dataset / "train" / "ant" / "0.png")
    for ending, kind in {"jfif": "JPEG", "gif": "GIF", "jpe": "JPEG", "tga": "TGA", "jp2": "JPEG2000"}.items():
        image.save(folder_dataset / "train" / "bee" / f"x.{ending}", format=kind)
    for name in ("x.heic", "y.heic", "notes.txt", "README"):
        (folder_dataset / "train" / "bee" / name).write_bytes(b"not for Pillow")
    data, said = load(folder_dataset)
    assert len(data.train) == 24 + 5
    assert torch.stack(list(data.train)).shape == (29, 16, 16, 3)
    assert "left out of train/: 4 files (.heic 2, without an ending 1, .txt 1)" in said


def test_no_file_starts_another_program(folder_dataset):
    path = folder_dataset / "train" / "ant" / "0.png"
    Image.open(path).save(folder_dataset / "x.eps")
    path.write_bytes((folder_dataset / "x.eps").read_bytes())  # which Pillow would hand to Ghostscript
    with pytest.raises(ImageDecodeError, match="train/ant/0.png: not an image"):
        read_image(path)


def test_the_order_is_that_of_torchvision_so_that_earlier_runs_are_the_same(folder_dataset):
    from torchvision.datasets import ImageFolder

    for name in ("ant/b/0.png", "ant/b-c/0.png", "ant/B/0.png", "ant/10.png", "ant/b/d/1.png"):
        path = folder_dataset / "train" / name
        path.parent.mkdir(exist_ok=True)
        write_image(path)
    data, _ = load(folder_dataset)
    expected = ImageFolder(str(folder_dataset / "train")).samples
    assert list(zip(data.train.paths, data.train.labels.tolist(), strict=True)) == expected


@pytest.mark.parametrize("target", ["..", ".", "../../val", "../bee", "../.."])
def test_a_link_back_into_the_data_set_is_left_out_and_named(folder_dataset, target):
    (folder_dataset / "train" / "ant" / "loop").symlink_to(target)
    data, said = load(folder_dataset)
    assert len(data.train) == 24
    assert "1 link back into the data set (train/ant/loop)" in said


def test_a_class_that_is_a_link_to_another_one_would_give_its_images_two_labels(folder_dataset):
    (folder_dataset / "train" / "insect").symlink_to("bee")
    data, said = load(folder_dataset)
    assert data.class_names == ("ant", "bee", "cat")
    assert "(train/insect)" in said


@pytest.mark.parametrize(("split", "other"), [("train", "val"), ("val", "train")])
def test_a_class_that_is_a_link_into_the_other_split_is_left_out_and_named(folder_dataset, split, other):
    (folder_dataset / split / "bird").symlink_to(f"../{other}/bee")
    with pytest.warns(UserWarning, match=rf"left out of {split}/: 1 link back into the data set \({split}/bird\)"):
        data = load_dataset("folder", folder_dataset)
    assert data.class_names == ("ant", "bee", "cat")
    assert (len(data.train), len(data.test)) == (24, 12)


def test_a_class_may_be_a_link_to_a_folder_beside_the_splits(folder_dataset):
    shutil.move(folder_dataset / "train" / "bee", folder_dataset / "all")
    (folder_dataset / "train" / "bee").symlink_to("../all")
    data, said = load(folder_dataset)
    assert (len(data.train), said) == (24, "")


def test_a_class_without_images_is_refused_with_its_split_and_an_empty_folder_left_out(folder_dataset):
    (folder_dataset / "train" / "tmp").mkdir()
    data, said = load(folder_dataset)
    assert data.class_names == ("ant", "bee", "cat")
    assert "left out of train/: 1 folder without a file (tmp)" in said

    (folder_dataset / "train" / "tmp" / "x.heic").write_bytes(b"")
    with pytest.raises(ValueError, match=r"no image in '.*train/tmp', only 1 file \(.heic 1\)"):
        load(folder_dataset)
    shutil.rmtree(folder_dataset / "train" / "tmp")

    for path in (folder_dataset / "val" / "ant").iterdir():
        path.unlink()
    assert "no image in class folder 'ant' in val/; it is not evaluated" in load(folder_dataset)[1]

    for path in (folder_dataset / "train" / "bee").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match="class 'bee' has images in val/ but none in train/"):
        load(folder_dataset)


def test_one_class_is_refused(folder_dataset):
    for split in ("train", "val"):
        for name in ("bee", "cat"):
            shutil.rmtree(folder_dataset / split / name)
    with pytest.raises(ValueError, match="one class, 'ant'; a classifier needs two"):
        load(folder_dataset)


def test_pictures_that_lie_on_their_side_and_dark_16_bits_are_told(folder_dataset):
    assert load(folder_dataset)[1] == ""
    exif = Image.Exif()
    exif[0x0112] = 6  # a viewer turns it
    Image.new("RGB", (16, 16)).save(folder_dataset / "train" / "ant" / "x.jpg", exif=exif)
    twelve = np.arange(256, dtype=np.uint16).reshape(16, 16) * 16
    Image.fromarray(twelve).save(folder_dataset / "train" / "ant" / "y.png")
    said = load(folder_dataset)[1]
    assert "1 of 26 images that were looked at" in said
    assert "x.jpg, are turned by a note in the file (EXIF), which is not applied" in said
    assert "y.png, have no value above 4,080 of 65,535 and are nearly black" in said
    Image.fromarray(twelve * 16).save(folder_dataset / "train" / "ant" / "y.png")
    assert "nearly black" not in load(folder_dataset)[1]


class Broken(FileImages):
    """Fails as /dev/shm or a decoder of somebody else would, in one decoding process."""

    def __getitem__(self, index):
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")


def test_whatever_fails_in_a_decoding_process_is_one_line_that_says_what_helps(folder_dataset):
    paths = load(folder_dataset)[0].train.paths
    Path(paths[0]).write_bytes(b"no image")
    with pytest.raises(ImageDecodeError, match="^cannot decode .*train/ant/0.png: not an image, [^\n]*$"):
        list(decoded_batches(FileImages(paths, [0] * 24, (16, 16)), 1, batch_size=4))
    with pytest.raises(ImageDecodeError) as error:
        list(decoded_batches(Broken(paths, [0] * 24, (16, 16)), 1, batch_size=4))
    message = str(error.value)
    assert "\n" not in message
    assert "No space left on device (28); if /dev/shm is full or small" in message
    assert "--workers 0" in message


def test_an_image_of_another_size_names_the_argument_where_there_is_one(folder_dataset, tiny_imagenet_dataset):
    for loaded, remedy in (("folder", folder_dataset), ("tiny_imagenet", tiny_imagenet_dataset)):
        data = load_dataset(loaded, remedy)
        write_image(Path(data.train.paths[3]), side=20)
        with pytest.raises(ImageDecodeError, match="is 20x20, the other images are") as error:
            data.train[3]
        assert ("image_size (--image-size SIDE)" in str(error.value)) == (loaded == "folder")


def test_text_files_are_utf8_with_or_without_a_mark_and_one_that_is_not_is_named(tiny_imagenet_dataset):
    names = "n01000000\tcafé\nn02000000\t金魚\n"
    for mark in ("", "\ufeff"):
        (tiny_imagenet_dataset / "words.txt").write_text(mark + names, encoding="utf-8")
        for name in ("wnids.txt", "val/val_annotations.txt"):
            path = tiny_imagenet_dataset / name
            path.write_text(mark + path.read_text(encoding="utf-8-sig"), encoding="utf-8")
        assert load_dataset("tiny_imagenet", tiny_imagenet_dataset).class_names == ("café", "金魚")
    (tiny_imagenet_dataset / "words.txt").write_bytes(names.encode("gb18030"))
    with pytest.raises(ValueError, match="words.txt is not UTF-8 at byte 13; save it as UTF-8"):
        load_dataset("tiny_imagenet", tiny_imagenet_dataset)
