"""The paper's SGD, timm's optimizers with timm's groups, and learning rates that are timm's in every step."""

from dataclasses import replace

import pytest
import timm
import torch
from timm.optim import list_optimizers, param_groups_layer_decay, param_groups_weight_decay
from timm.scheduler import create_scheduler_v2
from torch import nn

from timm_mfd import MFDClassificationTask, checkpoint
from timm_mfd.arguments import Args
from timm_mfd.training.optimizer import create_optimizer, set_learning_rate


def described(groups, model):
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {
        frozenset(names[p] for p in group["params"]): (group["weight_decay"], group.get("lr_scale", 1.0))
        for group in groups
    }


def test_the_papers_sgd_decays_every_parameter_and_looks_not_ahead():
    model = timm.create_model("test_resnet")
    optimizer = create_optimizer(Args(lr=0.3, weight_decay=0.01), model)
    (group,) = optimizer.param_groups
    assert len(group["params"]) == len([*model.parameters()])
    assert (group["lr"], group["momentum"], group["weight_decay"], group["nesterov"]) == (0.3, 0.9, 0.01, False)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext"])
@pytest.mark.parametrize("layer_decay", [None, 0.7])
def test_the_groups_of_a_trained_task_are_timms(name, layer_decay):
    model = timm.create_model(name, num_classes=3)
    MFDClassificationTask(model, verbose=False)
    optimizer = create_optimizer(Args(opt="adamw", lr=1e-3, weight_decay=0.05, layer_decay=layer_decay), model)
    skip = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
    expected = (
        param_groups_weight_decay(model, weight_decay=0.05, no_weight_decay_list=skip)
        if layer_decay is None
        else param_groups_layer_decay(model, 0.05, skip, layer_decay=layer_decay)
    )
    found = described(optimizer.param_groups, model)
    assert found == described(expected, model)
    assert {decay for decay, _ in found.values()} == {0.0, 0.05}
    assert (len({scale for _, scale in found.values()}) > 1) == (layer_decay is not None)
    set_learning_rate(optimizer, 0.5)
    assert all(group["lr"] == pytest.approx(0.5 * group.get("lr_scale", 1)) for group in optimizer.param_groups)


@pytest.mark.parametrize(
    "change",
    [
        {"schedule": "cosine"},
        {"schedule": "cosine", "warmup_epochs": 2},
        {"schedule": "step", "milestones": (3, 5)},
        {"schedule": "step", "milestones": (3, 5), "warmup_epochs": 1, "lr_decay": 0.2},
    ],
)
def test_the_learning_rate_of_every_step_is_that_of_timms_scheduler(change):
    args, steps = replace(Args(epochs=7, lr=0.3), **change).checked(), 11
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], args.lr)
    scheduler, _ = create_scheduler_v2(
        optimizer, {"step": "multistep"}.get(args.schedule, args.schedule), num_epochs=args.epochs,
        decay_milestones=list(args.milestones or ()), decay_rate=args.lr_decay, warmup_epochs=args.warmup_epochs,
        step_on_epochs=False, updates_per_epoch=steps,
    )  # fmt: skip
    # timm's steps come one update before their milestone; the paper's, as torch's, with it.
    early = {milestone * steps - 1 for milestone in args.milestones or ()}
    for update in sorted({*range(args.epochs * steps)} - early):
        scheduler.step_update(update)
        ours = args.learning_rate(update // steps + update % steps / steps)
        assert ours == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9), update


def made(opt):
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=4).to(memory_format=torch.channels_last)
    task = MFDClassificationTask(model, verbose=False).train()
    args = Args(opt=opt, lr=1e-3, weight_decay=0.05).checked()
    return task, create_optimizer(args, model)


def train(task, optimizer, steps):
    for step in steps:
        torch.manual_seed(step)
        images = torch.randn(4, 3, 32, 32).to(memory_format=torch.channels_last)
        task(images, torch.arange(4))["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()


NEEDS_CUDA = {name for name in list_optimizers() if name.startswith(("bnb", "fused"))}


def check_resumes_to_the_bit(opt, path):
    task, optimizer = made(opt)
    train(task, optimizer, range(3))
    checkpoint.write(path, checkpoint.tensors_of(task, optimizer), {"optimizer": checkpoint.values_of(optimizer)})
    train(task, optimizer, range(3, 6))
    resumed, its_optimizer = made(opt)
    tensors, record = checkpoint.read(path)
    checkpoint.restore(resumed, its_optimizer, tensors, record["optimizer"])
    train(resumed, its_optimizer, range(3, 6))
    expected, found = (checkpoint.tensors_of(*run) for run in ((task, optimizer), (resumed, its_optimizer)))
    assert expected.keys() == found.keys()
    assert [name for name, value in expected.items() if not torch.equal(value, found[name])] == []
    assert checkpoint.values_of(its_optimizer) == checkpoint.values_of(optimizer)


@pytest.mark.parametrize(
    "opt", ["paper", "adamw", "adafactorbv", "radam"]
)  # a state, a factored one, numbers in groups
def test_an_optimizer_resumes_to_the_bit(opt, tmp_path):
    check_resumes_to_the_bit(opt, tmp_path / "state.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("opt", list_optimizers())
@pytest.mark.filterwarnings("ignore")
def test_every_optimizer_of_timm_resumes_to_the_bit_or_is_refused_by_name(opt, tmp_path):
    if opt in {"adahessian", "kron", "kronc", "kronw"} or (opt in NEEDS_CUDA and not torch.cuda.is_available()):
        with pytest.raises(ValueError, match=f"--opt {opt} cannot be used"):
            made(opt)
    else:
        check_resumes_to_the_bit(opt, tmp_path / "state.safetensors")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there it works")
def test_what_is_missing_for_an_optimizer_is_said_with_its_flag():
    with pytest.raises(ValueError, match="--opt bnbadam cannot be used here: .*"):
        create_optimizer(Args(opt="bnbadam", lr=1e-3), timm.create_model("test_resnet"))
