"""Data sets that the Hugging Face library reads: the pixels and labels of the files behind them."""

import sys

import pytest
import torch

from timm_mfd.data import load_dataset, place

datasets = pytest.importorskip("datasets")
# The library opens files that it leaves to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture
def offline(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub_cache"


def test_an_image_folder_gives_the_same_images_as_our_own_reader(folder_dataset, offline):
    ours = load_dataset("folder", folder_dataset)
    hub = load_dataset(f"hfds/{folder_dataset}", offline)
    assert (hub.class_names, hub.image_size, hub.test_split) == (ours.class_names, (16, 16), "validation")
    for expected, found in ((ours.train, hub.train), (ours.test, hub.test)):
        assert len(expected) == len(found)
        by_label = [
            sorted((images.labels[i].item(), images[i].numpy().tobytes()) for i in range(len(images)))
            for images in (expected, found)
        ]
        assert by_label[0] == by_label[1]


def test_decoded_images_are_cached_and_resident(folder_dataset, offline, tmp_path, monkeypatch):
    data = load_dataset(f"hfds/{folder_dataset}", offline)
    for _ in range(2):
        resident = place(data, "resident", torch.device("cpu"), cache_dir=tmp_path / "cache", quiet=True)
        assert all(torch.equal(resident.train[i], data.train[i]) for i in range(len(data.train)))
        # The second time no image is decoded.
        monkeypatch.setattr("timm_mfd.data.resident._decode", None)


def test_identity_goes_by_the_content(folder_dataset, offline):
    first = load_dataset(f"hfds/{folder_dataset}", offline).identity()
    assert load_dataset(f"hfds/{folder_dataset}", offline).identity() == first
    assert load_dataset(f"hfds/{folder_dataset}", offline, image_size=8).identity() != first


def test_other_sizes_need_an_image_size(folder_dataset, offline):
    from PIL import Image

    Image.new("RGB", (30, 20)).save(folder_dataset / "train" / "bee" / "wide.png")
    data = load_dataset(f"hfds/{folder_dataset}", offline)
    wide = next(i for i in range(len(data.train)) if data.train._reader[i][0].name.endswith("wide.png"))
    with pytest.raises(ValueError, match=f"image {wide} of hfds/.* train is 30x20, the other images are 16x16"):
        data.train[wide]
    assert load_dataset(f"hfds/{folder_dataset}", offline, image_size=8).train[wide].shape == (8, 8, 3)


def test_columns_of_other_names_are_found(tmp_path, offline):
    from PIL import Image

    features = datasets.Features(
        {"img": datasets.Image(), "fine_label": datasets.ClassLabel(names=["x", "y"]),
         "coarse_label": datasets.ClassLabel(names=["z"])}
    )  # fmt: skip
    (tmp_path / "parquet").mkdir()
    for split in ("train", "test"):
        rows = {"img": [Image.new("RGB", (8, 8), (50 * i,) * 3) for i in range(4)], "fine_label": [0, 1, 1, 0],
                "coarse_label": [0] * 4}  # fmt: skip
        table = datasets.Dataset.from_dict(rows, features=features)
        table.to_parquet(tmp_path / "parquet" / f"{split}-00000-of-00001.parquet")
    data = load_dataset(f"hfds/{tmp_path / 'parquet'}", offline)
    assert (data.class_names, data.test_split) == (("x", "y"), "test")
    assert data.train.labels.tolist() == [0, 1, 1, 0]
    assert [data.train[i][0, 0, 0].item() for i in range(4)] == [0, 50, 100, 150]


def test_what_cannot_be_read_is_named(folder_dataset, offline, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="dataset 'hfds/' lacks a name: hfds/ORG/NAME on the Hub, or a folder"):
        load_dataset("hfds/")
    with pytest.raises(ValueError, match="dataset 'hfds/no/such' cannot be loaded: "):
        load_dataset("hfds/no/such", offline)
    (tmp_path / "text").mkdir()
    for split in ("train", "test"):
        (tmp_path / "text" / f"{split}.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="has no column of images, but a .int64., b .int64."):
        load_dataset(f"hfds/{tmp_path / 'text'}", offline)
    for path in (folder_dataset / "val").rglob("*.png"):
        path.unlink()
    with pytest.raises(ValueError, match="has no train and validation or test splits, but train"):
        load_dataset(f"hfds/{folder_dataset}", offline / "new")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"needs the library 'datasets'; pip install 'timm_mfd\[hfds\]'"):
        load_dataset("hfds/no/such")
