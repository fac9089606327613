"""Decoded images: the same pixels, decoded once, and a cache that is never believed blindly."""

import errno
import os

import pytest
import torch
from conftest import write_image
from processes import CONTEXT, start_process
from safetensors.torch import save_file

from timm_mfd.data import ImageDecodeError, load_dataset, place, resident
from timm_mfd.data.images import ArrayImages, FileImages

CPU = torch.device("cpu")


def put(root, cache, mode="resident", **kwargs):
    return place(load_dataset("folder", root), mode, CPU, cache_dir=cache, **kwargs)


def cached(cache):
    return sorted(path.name for path in cache.iterdir() if path.suffix != ".lock")


@pytest.mark.parametrize("workers", [0, 2])
def test_resident_pixels_are_those_of_the_files(folder_dataset, tmp_path, workers):
    data = load_dataset("folder", folder_dataset)
    placed = put(folder_dataset, tmp_path / "cache", workers=workers)
    for images, files in ((placed.train, data.train), (placed.test, data.test)):
        assert isinstance(images, ArrayImages)
        assert torch.equal(images.labels, files.labels)
        assert torch.equal(images.pixels, torch.stack([files[i] for i in range(len(files))]))


def test_images_are_decoded_once(folder_dataset, tmp_path, monkeypatch):
    first = put(folder_dataset, tmp_path / "cache")
    monkeypatch.setattr(FileImages, "__getitem__", lambda *_: pytest.fail("decoded again"))
    assert torch.equal(put(folder_dataset, tmp_path / "cache").train.pixels, first.train.pixels)


@pytest.mark.parametrize("change", ["content", "new file", "other size"])
def test_changed_files_are_decoded_again(folder_dataset, tmp_path, change):
    put(folder_dataset, tmp_path / "cache")
    if change == "content":
        path = folder_dataset / "train" / "ant" / "0.png"
        write_image(path, colour=200)
        os.utime(path, ns=(1, 1))
    elif change == "new file":
        write_image(folder_dataset / "train" / "ant" / "00.png", colour=200)
    data = load_dataset("folder", folder_dataset, image_size=8 if change == "other size" else None)
    placed = place(data, "resident", CPU, cache_dir=tmp_path / "cache")
    assert torch.equal(placed.train.pixels, torch.stack([data.train[i] for i in range(len(data.train))]))


def test_other_content_of_the_same_name_size_and_time_is_decoded_again(tmp_path, monkeypatch):
    """As `touch -r`, `rsync -t`, or two folders of the same relative path make it."""
    pixels = []
    for place_, colour in (("first", 10), ("second", 200)):
        for name in ("train/b/0.bmp", "val/b/0.bmp", "train/a/0.bmp", "val/a/0.bmp"):
            file = tmp_path / place_ / "images" / name
            file.parent.mkdir(parents=True)
            write_image(file, colour=colour if "/a/" in name else 0)
            os.utime(file, ns=(10**18, 10**18))
        monkeypatch.chdir(tmp_path / place_)
        pixels.append(put("images", tmp_path / "cache").train.pixels)
    write_image(file.parents[2] / "train/a/0.bmp", colour=90)
    os.utime(file.parents[2] / "train/a/0.bmp", ns=(10**18, 10**18))
    pixels.append(put("images", tmp_path / "cache").train.pixels)
    assert [int(each.max()) for each in pixels] == [10, 200, 90]


@pytest.mark.parametrize("damage", ["flipped bit", "truncated", "garbage", "foreign", "empty", "other shape"])
def test_a_damaged_or_foreign_cache_is_refused_and_rebuilt(folder_dataset, tmp_path, damage, capsys):
    cache = tmp_path / "cache"
    expected = put(folder_dataset, cache)
    names = cached(cache)
    for name in names:
        path = cache / name
        if damage == "flipped bit":
            content = bytearray(path.read_bytes())
            content[-1000] ^= 16
            path.write_bytes(content)
        elif damage == "truncated":
            path.write_bytes(path.read_bytes()[:-10])
        elif damage in ("garbage", "empty"):
            path.write_bytes(b"garbage" * 100 if damage == "garbage" else b"")
        else:
            shape = (24, 16, 16, 3) if damage == "foreign" else (1, 16, 16, 3)
            key = resident.cache_key(load_dataset("folder", folder_dataset).train)
            metadata = {"fingerprint": "another" if damage == "foreign" else key}
            save_file({"pixels": torch.zeros(shape, dtype=torch.uint8)}, path, metadata=metadata)
    again = put(folder_dataset, cache)
    assert torch.equal(again.train.pixels, expected.train.pixels)
    assert "is damaged or belongs to other images; decoding again" in capsys.readouterr().err
    put(folder_dataset, cache)
    assert capsys.readouterr().err == ""


def test_a_full_disk_costs_the_cache_and_nothing_else(folder_dataset, tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(resident, "save_file", full)
    placed = put(folder_dataset, tmp_path / "cache")
    assert len(placed.train) == 24
    assert cached(tmp_path / "cache") == []
    assert "are not cached in" in capsys.readouterr().err


def _build(root, cache, ready, decoded):
    real = FileImages.__getitem__

    def counted(self, index):
        with decoded.get_lock():
            decoded.value += 1
        return real(self, index)

    FileImages.__getitem__ = counted
    ready.wait()
    put(root, cache)


def test_three_processes_that_start_together_decode_once_and_leave_a_whole_cache(folder_dataset, tmp_path, capsys):
    ready, decoded = CONTEXT.Barrier(3), CONTEXT.Value("i", 0)
    builders = [start_process(_build, folder_dataset, tmp_path / "cache", ready, decoded) for _ in range(3)]
    for builder in builders:
        builder.join(120)
        assert builder.exitcode == 0
    assert decoded.value == 24 + 12
    assert len(cached(tmp_path / "cache")) == 2
    assert not any(name.endswith(".partial") for name in cached(tmp_path / "cache"))
    put(folder_dataset, tmp_path / "cache")
    assert capsys.readouterr().err == ""


def test_where_nothing_can_be_locked_images_are_decoded_all_the_same(folder_dataset, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(resident, "FileLock", refuse)
    assert len(put(folder_dataset, tmp_path / "cache").train) == 24


def test_auto_is_resident_if_it_fits_into_a_part_of_the_free_memory(folder_dataset, tmp_path, monkeypatch):
    needed = resident.resident_bytes(load_dataset("folder", folder_dataset))
    assert needed == 36 * 16 * 16 * 3
    for free, processes, kind in (
        (needed / 0.4 + 1, 1, ArrayImages),
        (needed / 0.4 - 1, 1, FileImages),
        (needed / 0.4 + 1, 2, FileImages),
    ):
        monkeypatch.setattr(resident, "_free_memory", lambda _, free=free: free)
        assert isinstance(put(folder_dataset, tmp_path / "cache", "auto", processes=processes).train, kind)
    monkeypatch.setattr(resident, "_free_memory", lambda _: needed / 3 / 0.4 + 1)  # for the 12 held-out images
    without = put(folder_dataset, tmp_path / "cache", "auto", train=False)
    assert (type(without.train), type(without.test)) == (FileImages, ArrayImages)


def test_workers_mode_leaves_the_files(folder_dataset, tmp_path):
    assert isinstance(put(folder_dataset, tmp_path / "cache", "workers").train, FileImages)
    assert not (tmp_path / "cache").exists()


def test_mistakes_are_named(folder_dataset, tmp_path):
    with pytest.raises(ValueError, match="loader must be one of auto, resident, workers, not 'fast'"):
        put(folder_dataset, tmp_path, "fast")
    broken = folder_dataset / "train" / "ant" / "3.png"
    broken.write_bytes(b"no image")
    with pytest.raises(ImageDecodeError, match=f"cannot decode {broken}"):
        put(folder_dataset, tmp_path / "cache")
