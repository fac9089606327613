"""N processes with synchronized batch norm train as one process with all the images."""

import pytest
import timm
import torch
import torch.nn.functional as F
from processes import run_processes
from torch import nn

from timm_mfd import MFDClassificationTask, MFDLoss
from timm_mfd.sync_batch_norm import synchronize_batch_norm

SPLIT = (5, 2, 1)  # images of each process


def one_dimensional():
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 6), nn.BatchNorm1d(6, affine=False), nn.Linear(6, 4))


def without_running_statistics():
    return nn.Sequential(
        nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5, track_running_stats=False), nn.Flatten(), nn.LazyLinear(4)
    )


def efficientnet():
    return timm.create_model("test_efficientnet", num_classes=4)


def resnet():
    return timm.create_model("test_resnet", num_classes=4)


def network(build, dtype):
    torch.manual_seed(0)
    model = build()
    model(torch.zeros(2, 3, 8, 8))  # lazy layers
    torch.manual_seed(1)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.to(dtype).to(memory_format=torch.channels_last).train()


def images(count, dtype):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(count, 3, 8, 8, generator=generator, dtype=dtype)
    return x + torch.arange(count, dtype=dtype)[:, None, None, None], torch.arange(count) % 4


def train(model, wrapped, x, y, weight):
    """Three SGD steps; `weight` makes uneven shares count as in the mean over all images."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(3):
        loss = weight * F.cross_entropy(wrapped(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {name: value.double() for name, value in model.state_dict().items()}


def train_share(rank, processes, build, dtype):
    model = network(build, dtype)
    synchronize_batch_norm(model)
    x, y = (tensor.split(SPLIT[:processes])[rank] for tensor in images(sum(SPLIT[:processes]), dtype))
    wrapped = nn.parallel.DistributedDataParallel(model)
    return train(model, wrapped, x, y, processes * len(y) / sum(SPLIT[:processes]))


@pytest.mark.parametrize(
    ("build", "processes", "dtype", "tolerance"),
    [
        (resnet, 2, torch.float64, 1e-11),
        (resnet, 2, torch.float32, 1e-3),
        (efficientnet, 3, torch.float64, 1e-11),
        (one_dimensional, 2, torch.float64, 1e-11),
        (without_running_statistics, 2, torch.float64, 1e-11),
    ],
)
def test_processes_with_uneven_batches_get_the_weights_and_statistics_of_one(
    build, processes, dtype, tolerance, tmp_path
):
    model = network(build, dtype)
    count = sum(SPLIT[:processes])
    start = {name: value.double().clone() for name, value in model.state_dict().items()}
    synchronize_batch_norm(model)
    assert not model._forward_hooks, "one process has nothing to synchronize"
    expected = train(model, model, *images(count, dtype), 1.0)
    for state in run_processes(train_share, processes, tmp_path, build, dtype):
        for name, value in expected.items():
            moved = max((value - start[name]).norm().item(), 1e-3)
            assert (state[name] - value).norm().item() <= tolerance * moved, name


def train_task(rank, processes, backend=None):
    """As `train.py` puts it together."""
    model = network(resnet, torch.float64)
    task = MFDClassificationTask(model, mfd=MFDLoss(0.0), verbose=False)
    synchronize_batch_norm(task)
    if backend:
        task.compile(backend=backend, dynamic=False)
    net = nn.parallel.DistributedDataParallel(task) if processes > 1 else task
    x, y = (tensor.chunk(processes)[rank] for tensor in images(8, torch.float64))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(3):
        optimizer.zero_grad()
        net(x, y)["loss"].backward()
        optimizer.step()
    return model.state_dict()


@pytest.mark.slow
def test_a_compiled_task_is_synchronized_as_well(tmp_path):
    expected = train_task(0, 1)
    for state in run_processes(train_task, 2, tmp_path, "aot_eager"):
        for name, value in expected.items():
            torch.testing.assert_close(state[name], value, msg=name)


def in_evaluation(rank, processes):
    model, x = network(resnet, torch.float32).eval(), images(4, torch.float32)[0]
    before = model(x)
    synchronize_batch_norm(model)
    return torch.equal(model(x), before)


def after_an_error(rank, processes):
    """A forward that fails, as it does when memory runs out, leaves the mode that takes over `F.batch_norm`."""
    model = network(resnet, torch.float32)
    synchronize_batch_norm(model)
    try:
        model(torch.zeros(2, 5, 8, 8))
    except RuntimeError:
        x = images(4, torch.float32)[0] + rank
        ours = F.batch_norm(x, None, None, training=True)
        return torch.allclose(ours.mean((0, 2, 3)), torch.zeros(3), atol=1e-5)
    return False


@pytest.mark.parametrize("function", [in_evaluation, after_an_error])
def test_evaluation_and_what_follows_an_error_are_left_alone(function, tmp_path):
    assert run_processes(function, 2, tmp_path) == [True, True]


def bf16(rank, processes):
    model = network(resnet, torch.float32)
    synchronize_batch_norm(model)
    x = F.interpolate(images(4, torch.float32)[0], size=64)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x)
    out.sum().backward()
    return out.isfinite().all().item() and all(p.grad.isfinite().all() for p in model.parameters())


def test_it_works_under_autocast(tmp_path):
    assert run_processes(bf16, 2, tmp_path) == [True, True]
