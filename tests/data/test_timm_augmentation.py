"""timm's augmentation, with random numbers that belong to an image and an epoch."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform

from timm_mfd.data import ImageDecodeError, TrainLoader, load_dataset
from timm_mfd.data.timm_augmentation import AugmentedImages

CPU = torch.device("cpu")


@pytest.fixture
def data(folder_dataset):
    """Images of several sizes, shown at 16 px."""
    for index, path in enumerate(sorted((folder_dataset / "train").rglob("*.png"))):
        with Image.open(path) as image:
            resized = image.resize((20 + 3 * index, 24))
        resized.save(path)
    return load_dataset("folder", folder_dataset, 16)


def test_an_image_is_what_timms_transform_makes_of_it_with_the_same_seed(data):
    augmented = AugmentedImages(data, seed=4, aa="rand-m9-mstd0.5-inc1", random_erasing=0.5)
    transform = create_transform(
        (3, 16, 16), is_training=True, hflip=0.5, auto_augment="rand-m9-mstd0.5-inc1", interpolation="bicubic",
        mean=data.mean, std=data.std, re_prob=0.5, re_mode="pixel",
    )  # fmt: skip
    seen = []
    real = random.seed
    try:
        random.seed = lambda number: seen.append(number) or real(number)
        found = augmented[2, 5]
    finally:
        random.seed = real
    (number,) = seen
    random.seed(number), np.random.seed(number & 0xFFFFFFFF), torch.manual_seed(number >> 1)
    with Image.open(data.train.paths[5]) as image:
        assert torch.equal(transform(image.convert("RGB")), found)


def batches(data, workers, start=0, rank=0, processes=1, epoch=1):
    augmented = AugmentedImages(data, seed=0, aa="rand-m5", random_erasing=0.3)
    loader = TrainLoader(
        data, 8, seed=0, device=CPU, workers=workers, augmented=augmented, rank=rank, processes=processes
    )
    return [*loader.epoch(epoch, start)]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [0, 1, 3])
def test_order_workers_processes_and_resuming_change_no_image(data, workers):
    whole = batches(data, workers=0)
    assert len(whole) == 3
    for (images, labels), (found, its_labels) in zip(whole[1:], batches(data, workers, start=1), strict=True):
        assert torch.equal(images, found)
        assert torch.equal(labels, its_labels)
    if workers == 1:
        shares = [batches(data, workers, rank=rank, processes=2) for rank in range(2)]
        for step, (images, _) in enumerate(whole):
            for rank, share in enumerate(shares):
                assert torch.equal(share[step][0], images[rank::2])
    assert not torch.equal(batches(data, 0, epoch=2)[0][0], whole[0][0])


def test_images_in_memory_are_augmented_too():
    data = load_dataset("digits")
    image = AugmentedImages(data, seed=0)[0, 3]
    assert image.shape == (3, 8, 8)
    flipped = [AugmentedImages(data, seed=seed)[0, 3] for seed in range(3)]
    assert not torch.equal(flipped[0], flipped[1])


def test_an_unknown_augmentation_and_one_that_fails_name_flag_and_file(data, monkeypatch):
    with pytest.raises(ValueError, match=r"--aa nonsense is not of timm"):
        AugmentedImages(data, seed=0, aa="nonsense")
    augmented = AugmentedImages(data, seed=0, aa="v0")

    def fail(image):
        raise ValueError("bits must be between or equal to 1 and 8")

    augmented.transform = fail
    with pytest.raises(ImageDecodeError, match=r"png: timm's augmentation failed: bits .* another --aa than v0"):
        augmented[0, 0]


def test_a_cropped_test_image_is_what_timm_evaluates(data, folder_dataset):
    cropped = data.cropped(0.875)
    assert (cropped.crop_pct, data.crop_pct, cropped.identity() != data.identity()) == (0.875, 1.0, True)
    transform = create_transform((3, 16, 16), crop_pct=0.875, interpolation="bicubic", mean=(0,) * 3, std=(1,) * 3)
    for index, path in enumerate(data.test.paths):
        with Image.open(path) as image:
            expected = (transform(image.convert("RGB")) * 255).round().byte().permute(1, 2, 0)
        assert torch.equal(cropped.test[index], expected)
    assert load_dataset("digits").cropped(0.5).crop_pct == 1.0, "images of the right size are shown whole"
