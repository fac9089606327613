"""`with_stages` is the model itself with another forward, and `forward_stages` refuses what it would run past."""

import copy
import pickle
import warnings

import pytest
import timm
import torch
import torchvision
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from processes import run_processes
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import timm_mfd
from timm_mfd import MFDLoss, forward_stages, with_stages


def build(**kwargs):
    torch.manual_seed(0)
    return timm.create_model("test_convnext", num_classes=5, **kwargs)


X = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("mfd", [None, MFDLoss(2.0)])
def test_it_is_the_plain_model_to_everything_but_its_forward(mfd):
    model = build()
    net = with_stages(model, mfd=mfd)
    assert isinstance(net, type(model))
    for view in (nn.Module.named_parameters, nn.Module.named_buffers, nn.Module.named_modules):
        ours, theirs = (dict(view(module)) for module in (net, model))
        assert list(ours) == list(theirs)
        assert all(ours[name] is theirs[name] for name in ours if name)
    assert list(net.state_dict()) == list(model.state_dict())
    assert net.group_matcher() == model.group_matcher()
    assert net.default_cfg == model.default_cfg
    assert isinstance(model(X), torch.Tensor)  # as before
    model.load_state_dict(net.state_dict())


def test_its_outputs_are_those_of_forward_stages():
    model = build().eval()
    expected = forward_stages(model, X, (1, 3))
    found = with_stages(model, (1, 3))(X)
    assert type(found) is timm_mfd.StageOutput
    for ours, theirs in zip(found.stages, expected.stages, strict=True):
        assert torch.equal(ours, theirs)
    inside = with_stages(model, (1, 3), MFDLoss(2.0))(X)
    assert type(inside) is timm_mfd.LossOutput
    assert torch.equal(inside.logits, model(X))
    assert torch.equal(inside.embedding, expected.embedding)
    loss, per_stage = MFDLoss(2.0)(expected.stages)
    assert torch.equal(inside.mfd.loss, loss)
    assert torch.equal(inside.mfd.per_stage, per_stage)


def test_training_and_evaluation_mode_are_the_models_too():
    model, mfd = build(drop_rate=0.5), MFDLoss()
    net = with_stages(model, mfd=mfd)
    net.eval()
    assert not any(module.training for module in (model, mfd, *model.modules()))
    assert torch.equal(model(X), net(X).logits)
    net.train()
    assert all(module.training for module in (model, mfd, *model.modules()))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_copies_are_whole_and_their_own(duplicate):
    net = with_stages(build(), (0, 2), MFDLoss(2.0)).eval()
    other = duplicate(net)
    assert torch.equal(other(X).mfd.loss, net(X).mfd.loss)
    with torch.no_grad():
        next(other.parameters()).zero_()
    assert torch.equal(next(other.plain_model.parameters()), next(other.parameters()))  # also when it trains on
    assert next(net.parameters()).abs().sum() > 0


def test_averages_and_layer_decay_see_the_models_own_names():
    net = with_stages(build(), mfd=MFDLoss())
    average = ModelEmaV3(net, decay=0.5)
    assert list(average.module.state_dict()) == list(net.state_dict())
    groups, plain_groups = (
        create_optimizer_v2(module, "adamw", lr=1.0, weight_decay=0.1, layer_decay=0.5).param_groups
        for module in (net, build())
    )
    assert [group["lr_scale"] for group in groups] == [group["lr_scale"] for group in plain_groups]
    assert len({group["lr_scale"] for group in groups}) > 2


def prepared():
    AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(mixed_precision="bf16", cpu=True).prepare(build())


def compiled_in_place():
    model = build()
    model.compile(backend="eager")
    return model


class Wrapper(nn.Module):
    """As transformers wraps a timm model."""

    def __init__(self):
        super().__init__()
        self.timm_model = build()


REFUSED = {
    "torch.compile": (lambda: torch.compile(build(), backend="eager"), r"torch\.compile\(timm_mfd\.with_stages"),
    "model.compile()": (compiled_in_place, r"torch\.compile\(timm_mfd\.with_stages"),
    "Accelerate": (prepared, r"accelerator\.prepare\(timm_mfd\.with_stages"),
    "DataParallel": (lambda: nn.DataParallel(build()), r"DataParallel\(timm_mfd\.with_stages"),
    "transformers' wrapper": (Wrapper, "timm_model"),
    "torchvision": (lambda: torchvision.models.resnet18(), "feature maps of another network to MFDLoss"),
}


@pytest.mark.parametrize("caller", [forward_stages, lambda model, _: with_stages(model)], ids=["forward", "with"])
@pytest.mark.parametrize(("make", "remedy"), REFUSED.values(), ids=REFUSED.keys())
def test_what_it_would_run_past_is_refused_with_what_works(make, remedy, caller):
    with pytest.raises(TypeError, match=remedy):
        caller(make(), X)


def test_a_compiled_net_is_not_called_by_forward_stages_either():
    net = with_stages(build())
    net.compile(backend="eager")
    with pytest.raises(TypeError, match=r"then net\(images\)"):
        forward_stages(net, X)


def test_one_index_and_tokens_are_refused_with_what_to_write():
    with pytest.raises(TypeError, match=r"write \(3,\) for one stage"):
        forward_stages(build(), X, indices=3)
    tokens = torch.randn(2, 9, 6)
    with pytest.raises(ValueError, match=r"stage 0: .*x\.transpose\(1, 2\)\[\.\.\., None\]"):
        MFDLoss()([tokens])
    assert MFDLoss()([tokens.transpose(1, 2)[..., None]]).per_stage.shape == (1,)


def past_ddp(rank, processes):
    model = build()
    wrapped = DistributedDataParallel(model)
    said = []
    for call in (
        lambda: forward_stages(wrapped, X),
        lambda: forward_stages(model, X),
        lambda: forward_stages(model, X),
        lambda: DistributedDataParallel(with_stages(model))(X),
    ):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                call()
                said.append([str(warning.message) for warning in caught if "forward_stages" in str(warning.message)])
            except TypeError as error:
                said.append(str(error))
    return said


def test_past_an_active_ddp_it_refuses_the_wrapper_and_warns_once_of_the_model_inside(tmp_path):
    for wrapper, first, second, right in run_processes(past_ddp, 2, tmp_path):
        assert "DistributedDataParallel(timm_mfd.with_stages(model))" in wrapper
        (warning,) = first
        assert "DistributedDataParallel(timm_mfd.with_stages(model))" in warning
        assert second == right == []


def test_measuring_without_a_weight_gives_the_values_and_no_gradient():
    stages = [torch.randn(4, 6, 5, 5, requires_grad=True), torch.randn(4, 3, 2, 2, requires_grad=True)]
    measured = MFDLoss(weight=0, measure=True)(stages)
    torch.testing.assert_close(measured.per_stage, MFDLoss()(stages).per_stage)
    assert measured.loss == 0
    assert not measured.loss.requires_grad
    assert not measured.per_stage.requires_grad
    mfd = MFDLoss(weight=0)
    assert mfd(stages).per_stage.isnan().all()
    mfd.measure = True
    assert not mfd(stages).per_stage.isnan().any()
    assert MFDLoss(weight=0, measure=True)([torch.full((2, 2, 2, 2), torch.inf)]).loss == 0  # no NaN in the baseline


def test_in_evaluation_mode_processes_do_not_wait_for_each_other(tmp_path):
    losses = run_processes(only_the_first_evaluates, 2, tmp_path)
    torch.testing.assert_close(losses[0], MFDLoss()(forward_stages(build(), X).stages).loss)


def only_the_first_evaluates(rank, processes):
    net = with_stages(build(), mfd=MFDLoss()).eval()
    return net(X).mfd.loss.detach() if rank == 0 else None


@pytest.mark.parametrize("averaged", [False, True])
def test_it_is_saved_as_the_plain_model(averaged, tmp_path):
    net = with_stages(build(), mfd=MFDLoss())
    timm_mfd.save_pretrained(ModelEmaV3(net).module if averaged else net, tmp_path / "saved", image_size=(32, 32))
    loaded = timm.create_model(f"local-dir:{tmp_path / 'saved'}", pretrained=True).eval()
    assert torch.equal(loaded(X), net.eval()(X).logits)
