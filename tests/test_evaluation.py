"""Accuracy counts every held-out image once, whatever the batch size and the number of processes."""

import pytest
import torch
from processes import run_processes
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from timm_mfd.data import ArrayImages, EvalLoader, ImageData
from timm_mfd.evaluation import Accuracy, evaluate

CLASSES, IMAGES = 7, 101


class Linear(nn.Module):
    """A fixed classifier with a buffer that processes may disagree on."""

    def __init__(self, offset=0.0):
        super().__init__()
        torch.manual_seed(3)
        self.weight = nn.Parameter(torch.randn(3 * 4 * 4, CLASSES))
        self.register_buffer("offset", torch.full((CLASSES,), offset))

    def forward(self, images):
        assert not self.training
        return images.flatten(1) @ self.weight + self.offset * torch.arange(CLASSES)


def dataset():
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (IMAGES, 4, 4, 3), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, CLASSES, (IMAGES,), generator=generator)
    images = ArrayImages(pixels, labels)
    return ImageData("test", images, images, tuple("abcdefg"))


def expected():
    """Counted image by image."""
    model, data = Linear().eval(), dataset()
    first = fifth = 0
    answers = [0] * CLASSES
    mean, std = torch.tensor(data.mean), torch.tensor(data.std)
    for pixels, label in zip(data.test.pixels, data.test.labels.tolist(), strict=True):
        logits = model(((pixels / 255 - mean) / std).permute(2, 0, 1)[None])[0].tolist()
        order = sorted(range(CLASSES), key=lambda k: -logits[k])
        first += order[0] == label
        fifth += label in order[:5]
        answers[order[0]] += 1
    return Accuracy(100 * first / IMAGES, 100 * fifth / IMAGES, IMAGES, answers)


@pytest.mark.parametrize("batch_size", [1, 7, 100, 101, 500])
def test_any_batch_size_counts_every_image_once(batch_size):
    loader = EvalLoader(dataset(), batch_size, device=torch.device("cpu"))
    assert evaluate(Linear().train(), loader, CLASSES) == expected()


def count(rank, processes, batch_size):
    loader = EvalLoader(dataset(), batch_size, device=torch.device("cpu"), rank=rank, processes=processes)
    return tuple(evaluate(Linear(offset=rank), loader, CLASSES))


@pytest.mark.parametrize(("processes", "batch_size"), [(2, 16), (3, 200)])
def test_any_number_of_processes_counts_the_same_with_the_buffers_of_the_main_one(processes, batch_size, tmp_path):
    assert run_processes(count, processes, tmp_path, batch_size) == [tuple(expected())] * processes


def count_one(rank, processes):
    data = dataset()
    one = ArrayImages(data.test.pixels[:1], data.test.labels[:1])
    loader = EvalLoader(
        ImageData("one", one, one, data.class_names), 4, device=torch.device("cpu"), rank=rank, processes=processes
    )
    return evaluate(Linear(), loader, CLASSES).images


def test_a_process_without_an_image_counts_none(tmp_path):
    assert run_processes(count_one, 2, tmp_path) == [1, 1]


def test_fewer_than_five_classes_have_a_top5_of_all():
    model = nn.Conv2d(3, 2, 4)
    wrapped = nn.Sequential(model, nn.Flatten())
    assert evaluate(wrapped, [(torch.randn(3, 3, 4, 4), torch.tensor([0, 1, 0]))], 2).top5 == 100


def test_no_image_is_an_error():
    with pytest.raises(ValueError, match="no images to measure the accuracy on"):
        evaluate(Linear(), [], CLASSES)


def test_nothing_is_read_back_from_a_gpu_before_the_last_batch():
    """Tensors without values stand for a GPU; reading one raises."""
    taken = []

    def batches():
        for number in range(3):
            yield torch.zeros(5, 8, device="cuda"), torch.zeros(5, dtype=torch.long, device="cuda")
            taken.append(number)

    with FakeTensorMode():
        with torch.device("cuda"):
            model = nn.Linear(8, CLASSES)
        with pytest.raises(DataDependentOutputException):
            evaluate(model, batches(), CLASSES)
    assert taken == [0, 1, 2]
