"""Loaders: every image once, the same batches on any number of processes, augmentation tied to the image."""

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from timm_mfd.data import ArrayImages, EvalLoader, ImageData, TrainLoader, load_dataset

CPU = torch.device("cpu")


def numbered(train=23, test=11, **kwargs) -> ImageData:
    """Images whose pixels all hold the image's number."""

    def split(count):
        pixels = np.broadcast_to(np.arange(count, dtype=np.uint8)[:, None, None, None], (count, 6, 6, 3)).copy()
        return ArrayImages(pixels, np.arange(count) % 3)

    return ImageData(
        "numbered", split(train), split(test), ("a", "b", "c"), mean=(0,) * 3, std=(1 / 255,) * 3, **kwargs
    )


def test_an_epoch_holds_every_image_once_with_its_label():
    loader = TrainLoader(numbered(24, pad=0), 4, seed=0, device=CPU)
    numbers, labels = [], []
    for images, target in loader.epoch(0):
        assert images.shape == (4, 3, 6, 6)
        numbers += images[:, 0, 0, 0].round().long().tolist()
        labels += target.tolist()
    assert sorted(numbers) == list(range(24))
    assert labels == [number % 3 for number in numbers]
    assert numbers != sorted(numbers)


def test_the_last_incomplete_batch_is_dropped():
    loader = TrainLoader(numbered(23), 4, seed=0, device=CPU)
    assert len(loader) == len(list(loader.epoch(0))) == 5


@pytest.mark.parametrize("processes", [2, 3, 6])
def test_processes_together_see_the_batches_of_one_process_with_the_same_augmentation(processes):
    data = numbered()
    alone = list(TrainLoader(data, 6, seed=3, device=CPU).epoch(4))
    ranks = [
        list(TrainLoader(data, 6, seed=3, device=CPU, rank=rank, processes=processes).epoch(4))
        for rank in range(processes)
    ]
    for step, (images, labels) in enumerate(alone):
        for rank in range(processes):
            assert torch.equal(ranks[rank][step][0], images[rank::processes])
            assert torch.equal(ranks[rank][step][1], labels[rank::processes])


def test_epochs_differ_and_repeat_exactly():
    loader = TrainLoader(numbered(), 5, seed=0, device=CPU)
    first, again, second = (torch.cat([images for images, _ in loader.epoch(e)]) for e in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("workers", [0, 2])
def test_image_files_give_the_same_epoch_for_any_number_of_workers(folder_dataset, workers):
    data = load_dataset("folder", folder_dataset)
    loader = TrainLoader(data, 6, seed=0, device=CPU, workers=workers)
    expected = TrainLoader(data, 6, seed=0, device=CPU)
    for got, want in zip(loader.epoch(1), expected.epoch(1), strict=True):
        assert torch.equal(got[0], want[0])
        assert torch.equal(got[1], want[1])


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_evaluation_counts_every_image_exactly_once(processes):
    numbers = []
    for rank in range(processes):
        for images, labels in EvalLoader(numbered(), 2, device=CPU, rank=rank, processes=processes):
            numbers += images[:, 0, 0, 0].round().long().tolist()
            assert (images == images[:, :1, :1, :1]).all(), "test images must not be cropped"
            assert labels.tolist() == [n % 3 for n in numbers[-len(labels) :]]
    assert sorted(numbers) == list(range(11))


def test_more_processes_than_images_leave_some_without_batches():
    assert len(EvalLoader(numbered(test=2), 2, device=CPU, rank=3, processes=4)) == 0


def test_a_limit_takes_images_spread_over_the_split():
    loader = EvalLoader(numbered(test=100), 8, device=CPU, limit=10)
    numbers = torch.cat([images[:, 0, 0, 0] for images, _ in loader]).round().long().tolist()
    assert numbers == list(range(0, 100, 10))


@pytest.mark.parametrize(
    ("batch_size", "processes", "message"),
    [(24, 1, "24 is larger than the 23 training images; choose a smaller --batch"), (0, 1, "batch size 0 must be"),
     (4, 3, "batch size 4 must be a positive multiple of the 3 processes")],
)  # fmt: skip
def test_wrong_batch_sizes_are_named(batch_size, processes, message):
    with pytest.raises(ValueError, match=message):
        TrainLoader(numbered(), batch_size, seed=0, device=CPU, processes=processes)


class HostMeetsDevice(TorchDispatchMode):
    """Notes the operations that have operands or results both on the host and on a GPU.

    Attributes:
        operations: How many operations there were.
        mixed: Names of those.
    """

    def __init__(self):
        super().__init__()
        self.operations, self.mixed = 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, torch.Tensor)]
        self.operations += 1
        if {tensor.device.type for tensor in tensors} == {"cpu", "cuda"}:
            self.mixed.append(str(func))
        return out


@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
def test_no_step_on_a_gpu_waits_for_numbers_of_the_host(device):
    """Tensors without values stand for a GPU, so this needs none; `Accelerator.device` of a single GPU has no index."""
    data = numbered(12, 9)
    with FakeTensorMode(allow_non_fake_inputs=True):
        for images in (data.train, data.test):
            images.pixels = torch.zeros(images.pixels.shape, dtype=torch.uint8, device=device)
        train = TrainLoader(data, 4, seed=0, device=torch.device(device)).epoch(0)
        for batches in (train, iter(EvalLoader(data, 4, device=torch.device(device)))):
            next(batches)
            with HostMeetsDevice() as seen:
                images, labels = next(batches)
            assert images.device.type == labels.device.type == "cuda"
            assert seen.operations > 0
            assert seen.mixed == []


def test_an_epoch_of_any_length_begins_with_the_same_few_copies_to_a_gpu():
    copies = []
    for count in (12, 120):
        data = numbered(count, count)
        with FakeTensorMode(allow_non_fake_inputs=True):
            data.train.pixels = torch.zeros(data.train.pixels.shape, dtype=torch.uint8, device="cuda")
            with HostMeetsDevice() as seen:
                next(TrainLoader(data, 4, seed=0, device=torch.device("cuda")).epoch(0))
        copies.append(len(seen.mixed))
    assert 0 < copies[0] == copies[1]
