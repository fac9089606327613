"""CIFAR is one data set whatever form it comes in, and nothing else passes for it."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import small_cifar, write_archive, write_class_folders
from PIL import Image

from timm_mfd.data import FileImages, TrainLoader, load_dataset
from timm_mfd.data.cifar import PUBLISHED, in_canonical_order
from timm_mfd.data.images import ArrayImages

NAMES = ["cifar10", "cifar100"]
REAL = Path(__file__).parents[3] / "shared"


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def write_parquet(folder, name, splits):
    """Write a copy as the Hub has it: columns, names of files, and a class of another name."""
    datasets = pytest.importorskip("datasets")
    published = PUBLISHED[name]
    classes = ["cra" if each == "crab" else each for each in published.class_names]
    features = {"img": datasets.Image()}
    if name == "cifar100":  # a first column of labels that is not theirs
        features["coarse_label"] = datasets.ClassLabel(num_classes=20)
    features[published.hub_label] = datasets.ClassLabel(names=classes)
    folder.mkdir(parents=True)
    for split, (pixels, labels) in splits.items():
        encoded = []
        for image in pixels:
            file = io.BytesIO()
            Image.fromarray(image).save(file, "PNG")
            encoded.append({"bytes": file.getvalue(), "path": None})
        columns = {"img": encoded, published.hub_label: labels.tolist(), "coarse_label": (labels % 20).tolist()}
        table = datasets.Dataset.from_dict({key: columns[key] for key in features}, datasets.Features(features))
        table.to_parquet(str(folder / f"{split}-00000-of-00001.parquet"))


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("name", NAMES)
def test_images_batches_and_identity_are_the_same_from_every_form(name, tmp_path, monkeypatch):
    splits = small_cifar(name, monkeypatch)
    write_archive(tmp_path / "archive", name, splits, monkeypatch)
    write_class_folders(tmp_path / "folders", name, splits)
    monkeypatch.setattr(pytest.importorskip("datasets").config, "HF_DATASETS_CACHE", tmp_path / "hub_cache")
    write_parquet(tmp_path / "hub" / name / PUBLISHED[name].hub_folder, name, splits)
    forms = {"archive": "official archive", "folders": "class folders", "hub": "parquet files"}
    seen = {}
    for folder, form in forms.items():
        data = load_dataset(name, tmp_path / folder)
        assert data.source.startswith(f"{form} in ")
        loader = TrainLoader(data, 6, seed=0, device=torch.device("cpu"))
        batches = [(images, labels) for epoch in range(4) for images, labels in loader.epoch(epoch)][:10]
        seen[folder] = data, batches
    first, batches = seen["archive"]
    assert first.class_names == PUBLISHED[name].class_names
    for data, others in seen.values():
        assert data.identity() == first.identity()
        assert (data.mean, data.std, data.class_names) == (first.mean, first.std, first.class_names)
        for (images, labels), (expected, wanted) in zip(others, batches, strict=True):
            assert torch.equal(images, expected)
            assert torch.equal(labels, wanted)
    # They are the images that were written, under their labels.
    for images, (pixels, labels) in ((first.train, splits["train"]), (first.test, splits["test"])):
        found = sorted((int(y), x.numpy().tobytes()) for x, y in zip(images.pixels, images.labels, strict=True))
        assert found == sorted((int(y), x.tobytes()) for x, y in zip(pixels, labels, strict=True))


def test_canonical_order_moves_labels_and_paths_with_the_pixels():
    pixels = np.zeros((4, 32, 32, 3), np.uint8)
    pixels[:, 0, 0, 0] = [1, 2, 3, 4]
    ordered = in_canonical_order(ArrayImages(pixels, [1, 0, 1, 0], ["a", "b", "c", "d"]))
    assert ordered.labels.tolist() == [0, 0, 1, 1]
    by_pixel = dict(zip((1, 2, 3, 4), "abcd", strict=True))
    assert ordered.paths == [by_pixel[value] for value in ordered.pixels[:, 0, 0, 0].tolist()]


@pytest.mark.parametrize("name", NAMES)
def test_the_folder_is_the_data_sets_own_or_its_parent_and_the_archive_goes_first(name, tmp_path, monkeypatch):
    splits = small_cifar(name, monkeypatch)
    own = write_class_folders(tmp_path, name, splits)
    assert load_dataset(name, tmp_path).source == load_dataset(name, own).source == f"class folders in {own}"
    (own / "extra.parquet").write_bytes(b"goes after class folders")
    assert load_dataset(name, own).source == f"class folders in {own}"
    archive = write_archive(tmp_path, name, splits, monkeypatch)
    for root in (tmp_path, archive):
        assert load_dataset(name, root).source == f"official archive in {archive}"


def test_upper_case_endings_are_images_too(tmp_path, monkeypatch):
    splits = small_cifar("cifar10", monkeypatch)
    write_class_folders(tmp_path / "upper", "cifar10", splits, ".PNG")
    write_class_folders(tmp_path / "lower", "cifar10", splits)
    identities = {load_dataset("cifar10", tmp_path / case).identity() for case in ("upper", "lower")}
    assert len(identities) == 1


def flip_a_pixel(folder):
    path = next((folder / "test" / "cat").iterdir())
    pixels = np.array(Image.open(path))
    pixels[3, 4, 1] ^= 1
    Image.fromarray(pixels).save(path)


def remove_one(folder):
    next((folder / "train" / "dog").iterdir()).unlink()


def double_one(folder):
    path = next((folder / "train" / "dog").iterdir())
    shutil.copy(path, path.with_name("again.png"))


def double_one_and_remove_one(folder):
    path, other = (folder / "train" / "dog").iterdir()
    shutil.copy(path, other)


def move_one(folder):
    path = next((folder / "train" / "dog").iterdir())
    path.rename(folder / "train" / "cat" / "moved.png")


def swap_two(folder):
    path, other = (next((folder / "test" / name).iterdir()) for name in ("cat", "dog"))
    content = path.read_bytes()
    path.write_bytes(other.read_bytes())
    other.write_bytes(content)


def encode_as_jpeg(folder):
    for path in (folder / "train").rglob("*.png"):
        Image.open(path).save(path.with_suffix(".jpg"))
        path.unlink()


def enlarge(folder):
    for path in folder.rglob("*.png"):
        Image.open(path).resize((64, 64)).save(path)


@pytest.mark.parametrize(
    ("change", "split", "reason"),
    [
        (flip_a_pixel, "test", "changed"),
        (remove_one, "train", "19 images, not 20"),
        (double_one, "train", "21 images, not 20"),
        (double_one_and_remove_one, "train", "changed"),
        (move_one, "train", "3 images of 'cat', not 2"),
        (swap_two, "test", "of another class"),
        (encode_as_jpeg, "train", "encoded anew"),
        (enlarge, "train", "images of 64x64 pixels, not 32x32"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_copy_that_is_not_the_published_one_is_refused_in_one_line(change, split, reason, tmp_path, monkeypatch):
    folder = write_class_folders(tmp_path, "cifar10", small_cifar("cifar10", monkeypatch))
    load_dataset("cifar10", tmp_path)  # as it was, it passes
    change(folder)
    with pytest.raises(ValueError, match=f"cifar10: the {split} split of .*{reason}.*--dataset folder") as error:
        load_dataset("cifar10", tmp_path)
    assert "\n" not in str(error.value)


def test_a_changed_parquet_copy_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(pytest.importorskip("datasets").config, "HF_DATASETS_CACHE", tmp_path / "hub_cache")
    splits = small_cifar("cifar10", monkeypatch)
    splits["test"][0][0, 0, 0, 0] ^= 1
    write_parquet(tmp_path / "copy", "cifar10", splits)
    with pytest.raises(ValueError, match=r"the test split of the parquet files in .*changed.*hfds/FOLDER"):
        load_dataset("cifar10", tmp_path / "copy")
    with pytest.raises(ValueError, match="has no column of labels 'fine_label', but img, label"):
        load_dataset("cifar100", tmp_path / "copy")


def rename_a_class(folder):
    (folder / "train" / "cat").rename(folder / "train" / "kitten")


def remove_a_class(folder):
    shutil.rmtree(folder / "test" / "cat")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (rename_a_class, r"the folder 'kitten' in '.*train' .* none of its 10 classes; --dataset folder"),
        (remove_a_class, r"'.*test' lacks the class folder 'cat'"),
    ],
)
def test_other_class_folders_are_named(change, message, tmp_path, monkeypatch):
    change(write_class_folders(tmp_path, "cifar10", small_cifar("cifar10", monkeypatch)))
    with pytest.raises(ValueError, match=message):
        load_dataset("cifar10", tmp_path)


def test_what_is_no_class_lies_in_the_way_of_nothing(tmp_path, monkeypatch):
    folder = write_class_folders(tmp_path, "cifar10", small_cifar("cifar10", monkeypatch))
    before = load_dataset("cifar10", tmp_path).identity()
    for name in (".ipynb_checkpoints", "@eaDir"):
        (folder / "train" / name).mkdir()
        shutil.copy(next((folder / "train" / "cat").iterdir()), folder / "train" / name / "copy.png")
    with pytest.warns(UserWarning, match="left out of train/: 2 hidden or system names"):
        assert load_dataset("cifar10", tmp_path).identity() == before


def test_a_class_without_images_is_named(tmp_path, monkeypatch):
    folder = write_class_folders(tmp_path, "cifar10", small_cifar("cifar10", monkeypatch))
    for split in ("train", "test"):
        for file in (folder / split / "cat").iterdir():
            file.unlink()
    with pytest.warns(UserWarning, match="cat"), pytest.raises(ValueError, match="class folder 'cat' in .* is empty"):
        load_dataset("cifar10", tmp_path)


def test_the_folder_may_be_the_one_we_are_in(tmp_path, monkeypatch):
    splits = small_cifar("cifar10", monkeypatch)
    monkeypatch.chdir(write_archive(tmp_path, "cifar10", splits, monkeypatch))
    assert load_dataset("cifar10", ".").source.startswith("official archive")


def test_an_archive_with_the_official_checksums_is_never_refused(tmp_path, monkeypatch):
    splits = small_cifar("cifar10", monkeypatch)
    known = PUBLISHED["cifar10"]
    splits["train"][0][0] = 0
    write_archive(tmp_path, "cifar10", splits, monkeypatch)
    with pytest.warns(UserWarning, match="cifar10: the train split .* own identity"):
        data = load_dataset("cifar10", tmp_path)
    assert len(data.train) == 20
    assert PUBLISHED["cifar10"] is known


def test_a_damaged_archive_and_an_empty_folder_say_what_is_there(tmp_path, monkeypatch):
    archive = write_archive(tmp_path, "cifar100", small_cifar("cifar100", monkeypatch), monkeypatch)
    (archive / "train").write_bytes(b"changed")
    with pytest.raises(ValueError, match="missing or do not have the official checksums, found meta, test, train"):
        load_dataset("cifar100", tmp_path)
    (tmp_path / "empty" / "something").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"cifar-100-python/ of the official archive, .* found something/"):
        load_dataset("cifar100", tmp_path / "empty")


def test_files_are_decoded_once_a_machine(tmp_path, monkeypatch):
    write_class_folders(tmp_path, "cifar10", small_cifar("cifar10", monkeypatch))
    first = load_dataset("cifar10", tmp_path, cache_dir=tmp_path / "decoded")
    monkeypatch.setattr(FileImages, "__getitem__", lambda *_: pytest.fail("decoded again"))
    again = load_dataset("cifar10", tmp_path, cache_dir=tmp_path / "decoded")
    assert torch.equal(again.train.pixels, first.train.pixels)


@pytest.mark.slow
@pytest.mark.skipif(not (REAL / "data").is_dir(), reason="the real images are not here")
def test_the_real_images_have_the_known_digests(tmp_path):
    import subprocess
    import sys

    subprocess.run([sys.executable, REAL / "data" / "unpack.py", tmp_path, *NAMES], check=True)
    for name in NAMES:
        data = load_dataset(name, tmp_path, workers=2)
        assert (len(data.train), len(data.test)) == (50_000, 10_000)
        if name == "cifar100":
            result = next((Path(__file__).parents[2] / "results" / "paper").glob("mobilenetv2-cifar100-*.json"))
            assert data.identity() == json.loads(result.read_text())["data"]
