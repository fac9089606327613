"""The operator: against float64 autograd, in every precision, in what it keeps, and on several processes."""

import pytest
import timm
import torch
import torch.distributed as dist
from processes import run_processes
from torch import nn

from timm_mfd import MFDClassificationTask, MFDLoss, channel_correlation, mfd_loss
from timm_mfd.loss import cpu

RESNET50_STAGES = ((64, 32), (256, 32), (512, 16), (1024, 8), (2048, 4))
FORMATS = (torch.contiguous_format, torch.channels_last)


def realistic(batch, channels, side, dtype=torch.float32):
    """Rectified noise with a part that all channels share."""
    x = torch.randn(batch, channels, side, side) + 0.5 * torch.randn(batch, 1, side, side)
    return x.relu().to(dtype).contiguous(memory_format=torch.channels_last)


def reference_r(x, center="channel"):
    """Eq. 6 in float64 from textbook covariance, differentiable by autograd; constant channels give 0."""
    x = x.double()
    y = (x - x.mean((0, 2, 3) if center == "channel" else 0, keepdim=True)).transpose(0, 1).flatten(1)
    covariance = y @ y.T
    variance = covariance.diagonal()
    alive = variance > 1e-20
    scale = torch.where(alive, variance, 1).sqrt()
    return covariance / (scale[:, None] * scale) * (alive[:, None] & alive)


def reference_loss(x, center="channel"):
    r = reference_r(x, center)
    return (r.square().sum() - r.diagonal().square().sum()) / (len(r) * (len(r) - 1))


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("center", ["channel", "position"])
@pytest.mark.parametrize("shape", [(4, 5, 3, 2), (9, 3, 1, 4), (16, 300, 5, 5), (3, 200, 4, 4), (5, 40, 1, 1)])
def test_loss_and_gradient_match_float64_autograd(shape, center, memory_format):
    x = torch.randn(shape) + 0.5 * torch.randn(shape[0], 1, *shape[2:]) + 3
    ours = x.clone(memory_format=memory_format).requires_grad_()
    expected = x.double().requires_grad_()
    loss, expected_loss = mfd_loss(ours, center), reference_loss(expected, center)
    assert loss.item() == pytest.approx(expected_loss.item(), abs=1e-6)
    loss.backward()
    expected_loss.backward()
    assert (ours.grad - expected.grad).norm() <= 2e-5 * expected.grad.norm()
    assert ours.grad.is_contiguous(memory_format=memory_format)


LAYOUTS = {
    "NCHW": lambda x: x.contiguous(),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "height and width swapped": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "batch innermost": lambda x: x.permute(3, 1, 2, 0).contiguous().permute(3, 1, 2, 0),
    "every second channel": lambda x: x.repeat_interleave(2, 1)[:, ::2],
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["channel", "position", "few samples", "max_samples"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_in_many_chunks_gives_the_same_gradient(layout, kind, dtype, monkeypatch):
    monkeypatch.setattr(cpu, "_CHUNK", 16)
    monkeypatch.setattr(cpu, "_ROWS_PER_CHANNEL", 0)
    channels = 200 if kind == "few samples" else 9
    values = (torch.randn(6, channels, 6, 4) + torch.randn(6, 1, 6, 4) + torch.randn(1, channels, 6, 4)).to(dtype)
    x = LAYOUTS[layout](values.clone()).detach().requires_grad_()
    mfd = MFDLoss(
        center="position" if kind == "position" else "channel", max_samples=70 if kind == "max_samples" else None
    )
    mfd([x]).loss.backward()
    expected = values.double().requires_grad_()
    seen = expected.flatten(2)[:, :, ::3, None] if kind == "max_samples" else expected
    reference_loss(seen, mfd.center).backward()
    bound = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 5e-3}[dtype]
    assert (x.grad - expected.grad).norm() <= bound * expected.grad.norm()


@pytest.mark.parametrize("channels", [6, 200])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_decides_neither_values_nor_gradients(channels, dtype):
    x = torch.randn(4, channels, 3, 3)
    outside, inside = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected = mfd_loss(outside)
    expected.backward()
    with torch.autocast("cpu", dtype=dtype):
        loss = mfd_loss(inside)
        loss.backward()
    assert loss.dtype == torch.float32
    assert torch.equal(loss, expected)
    assert torch.equal(inside.grad, outside.grad)


def test_the_gradient_too_is_accurate_where_the_mean_is_a_thousand_times_the_deviation():
    x = torch.randn(32, 50, 16, 16) + 0.5 * torch.randn(32, 1, 16, 16)
    x = (x + 1000 * x.std()).contiguous(memory_format=torch.channels_last)
    ours, expected = x.clone().requires_grad_(), x.double().requires_grad_()
    mfd_loss(ours).backward()
    reference_loss(expected).backward()
    assert (ours.grad - expected.grad).norm() <= 1e-4 * expected.grad.norm()


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("channels", [6, 200])
def test_without_onednn_the_values_are_the_same(channels, memory_format, monkeypatch):
    x = torch.randn(4, channels, 5, 5).contiguous(memory_format=memory_format)
    with_onednn, without = x.clone().requires_grad_(), x.clone().requires_grad_()
    assert cpu._has_onednn(x) == torch.backends.mkldnn.is_available()
    mfd_loss(with_onednn).backward()
    monkeypatch.setattr(cpu, "_has_onednn", lambda _: False)
    mfd_loss(without).backward()
    torch.testing.assert_close(without.grad, with_onednn.grad, rtol=1e-4, atol=1e-7)


def test_a_channel_that_differs_from_a_constant_by_its_rounding_only_is_constant():
    x = torch.randn(16, 4, 16, 16)
    x[:, 2] = 0.1 * (1 + torch.finfo(torch.float32).eps * torch.randint(0, 2, (16, 16, 16)))
    assert torch.equal(channel_correlation(x)[2], torch.zeros(4))


@pytest.mark.parametrize("memory_format", FORMATS)
def test_gradient_of_the_matrix_matches_float64_autograd_for_any_weights(memory_format):
    x = torch.randn(4, 30, 3, 3).contiguous(memory_format=memory_format)
    weights = torch.randn(30, 30)
    ours, expected = x.clone().requires_grad_(), x.double().requires_grad_()
    (channel_correlation(ours) * weights).sum().backward()
    (reference_r(expected) * weights).sum().backward()
    assert (ours.grad - expected.grad).norm() <= 1e-5 * expected.grad.norm()


@pytest.mark.parametrize(("channels", "side"), RESNET50_STAGES)
def test_error_on_realistic_maps_is_below_1e_4_in_float32_and_5e_3_in_half_precision(channels, side):
    x = realistic(16, channels, side)
    for dtype, bound in ((torch.float32, 1e-4), (torch.bfloat16, 5e-3), (torch.float16, 5e-3)):
        rounded = x.to(dtype)
        assert (channel_correlation(rounded) - reference_r(rounded)).abs().max() <= bound


@pytest.mark.parametrize("memory_format", FORMATS)
def test_error_is_below_1e_3_where_the_mean_is_a_thousand_times_the_deviation(memory_format):
    x = torch.randn(64, 100, 16, 16) + 0.5 * torch.randn(64, 1, 16, 16)
    x = (x + 1000 * x.std()).contiguous(memory_format=memory_format)
    assert (channel_correlation(x) - reference_r(x)).abs().max() <= 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("case", ["batch of 2", "constant", "large", "dead", "nearly constant", "tiny", "one strong"])
def test_nothing_is_nan_or_infinite(case, dtype):
    x = torch.randn(2, 8, 1 if case == "batch of 2" else 4, 1 if case == "batch of 2" else 4, dtype=torch.float64)
    if case == "constant":
        x[:] = 0.1
    elif case == "large":
        x *= 6e4 / x.abs().max()
    elif case == "dead":
        x[:, 3:] = 0
    elif case == "nearly constant":
        x[:, 2] = 0.1
        x[0, 2, 0, 0] += 0.1 * 2 * torch.finfo(dtype).eps
    elif case == "tiny":
        x *= torch.finfo(dtype).tiny * 8
    elif case == "one strong":
        x[:, 0] *= 1e4
    x = x.to(dtype).requires_grad_()
    loss = mfd_loss(x)
    loss.backward()
    assert torch.isfinite(loss)
    assert 0 <= loss <= 1 + 1e-6
    assert torch.isfinite(x.grad).all()
    assert torch.isfinite(channel_correlation(x)).all()


def test_a_dying_channel_gets_no_exploding_gradient():
    """What is a million times weaker than the strongest channel counts as constant."""
    x = torch.randn(16, 8, 8, 8)
    for scale, alive in ((1e-5, True), (1e-7, False), (1e-14, False)):
        weak = x.clone()
        weak[:, 3] *= scale
        weak.requires_grad_()
        mfd_loss(weak).backward()
        assert bool(weak.grad[:, 3].any()) == alive
        assert weak.grad.abs().max() < 10


def test_rounded_matrix_products_do_not_decide_a_correlation():
    x = realistic(32, 128, 8)
    exact = channel_correlation(x.double()).float()
    before = torch.get_float32_matmul_precision()
    try:
        for mode in ("medium", "high"):
            torch.set_float32_matmul_precision(mode)
            torch.testing.assert_close(channel_correlation(x), exact, rtol=0, atol=1e-6)
            assert torch.get_float32_matmul_precision() == mode, "the mode is the user's"
            assert cpu._product_dtype(x) == torch.float64
    finally:
        torch.set_float32_matmul_precision(before)
    assert cpu._product_dtype(x) == torch.float32


def test_rounded_matrix_products_do_not_decide_the_loss_of_few_samples():
    x = torch.randn(4, 300, 3, 3)
    exact, before = mfd_loss(x), torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        torch.testing.assert_close(mfd_loss(x), exact, rtol=1e-6, atol=0)
    finally:
        torch.set_float32_matmul_precision(before)


def test_the_backward_keeps_the_inputs_and_at_most_a_tenth_of_their_bytes():
    stages = [realistic(128, channels, side).requires_grad_() for channels, side in RESNET50_STAGES]
    inputs = {stage.data_ptr(): stage.numel() * 4 for stage in stages}
    kept = {}

    def note(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        MFDLoss()(stages)
    assert set(inputs) <= set(kept), "the inputs are kept as they are, not copied"
    extra = sum(size for pointer, size in kept.items() if pointer not in inputs)
    assert extra <= 0.1 * sum(inputs.values())


def test_a_second_derivative_is_refused_and_a_second_backward_too():
    x = torch.randn(4, 3, 2, 2, requires_grad=True)
    with pytest.raises(RuntimeError, match="no second derivative; call backward without create_graph=True"):
        mfd_loss(x).backward(create_graph=True)
    loss = mfd_loss(x)
    loss.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


@pytest.mark.parametrize("memory_format", FORMATS)
def test_max_samples_is_the_loss_of_a_subset_of_positions(memory_format):
    x = torch.randn(8, 12, 6, 6).contiguous(memory_format=memory_format).requires_grad_()
    out = MFDLoss(max_samples=80)([x])
    # 288 samples for at most 80: every 4th position would do, but 4 and the width share a factor, so every 5th.
    subset = x.detach().double().flatten(2)[:, :, ::5, None].requires_grad_()
    expected = reference_loss(subset)
    assert out.loss.item() == pytest.approx(expected.item(), abs=1e-6)
    out.loss.backward()
    expected.backward()
    torch.testing.assert_close(x.grad.flatten(2)[:, :, ::5, None].double(), subset.grad, rtol=1e-4, atol=1e-8)
    rest = torch.ones(36, dtype=torch.bool)
    rest[::5] = False
    assert not x.grad.flatten(2)[:, :, rest].any()


def test_max_samples_above_the_number_of_samples_changes_nothing():
    x = torch.randn(8, 12, 6, 6)
    assert torch.equal(MFDLoss(max_samples=288)([x]).loss, MFDLoss()([x]).loss)


def build():
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=5)
    return MFDClassificationTask(model, None, MFDLoss(), verbose=False)


def gradients_of(task, x, y):
    task.model.zero_grad()
    out = task(x, y)
    out["loss"].backward()
    return out, {name: parameter.grad.clone() for name, parameter in task.model.named_parameters()}


def test_gradient_checkpointing_changes_nothing():
    x, y = torch.randn(6, 3, 32, 32), torch.arange(6) % 5
    _, expected = gradients_of(build(), x, y)
    task = build()
    task.model.set_grad_checkpointing()
    _, gradients = gradients_of(task, x, y)
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient)


def test_accumulated_statistics_are_those_of_each_micro_batch():
    x = torch.randn(8, 6, 4, 4)
    whole = x.clone().requires_grad_()
    for part in whole.split(4):
        (MFDLoss()([part]).loss / 2).backward()
    for part, gradient in zip(x.split(4), whole.grad.split(4), strict=True):
        alone = part.clone().requires_grad_()
        (mfd_loss(alone) / 2).backward()
        torch.testing.assert_close(gradient, alone.grad)


# ---- several processes ----

BATCHES = (5, 2, 1)  # one of the processes alone could not form a correlation with center="position"


def stages_of(layers, x):
    first = layers[0](x)
    return [first, layers[1](first.relu())]


def layers_and_data(dtype, processes):
    torch.manual_seed(0)
    layers = nn.ModuleList([nn.Conv2d(3, 6, 3), nn.Conv2d(6, 40, 3, stride=3)]).to(dtype)
    x = torch.randn(sum(BATCHES[:processes]), 3, 8, 8, dtype=dtype) + torch.randn(1, 3, 8, 8, dtype=dtype)
    return layers, x


class Stages(nn.Module):
    def __init__(self, layers, mfd):
        super().__init__()
        self.layers, self.mfd = layers, mfd

    def forward(self, x):
        stages = stages_of(self.layers, x)
        stages[1] = torch.cat([stages[1], torch.zeros_like(stages[1][:, :1])], 1)  # a dead channel
        return self.mfd(stages)


def train_share(rank, processes, dtype, center):
    layers, x = layers_and_data(dtype, processes)
    calls = []
    real = dist.all_reduce
    dist.all_reduce = lambda tensor, **kwargs: calls.append(tensor.numel()) or real(tensor, **kwargs)
    network = nn.parallel.DistributedDataParallel(Stages(layers, MFDLoss(center=center)))
    out = network(x.split(BATCHES[:processes])[rank])
    sent = list(calls)
    out.loss.backward()
    with torch.no_grad():
        MFDLoss(weight=0)([x]), MFDLoss(sync=False)([x])
    later = len(calls)
    # The processes leave out different positions, and still agree on the correlation of what they kept.
    bounded = MFDLoss(max_samples=60)([x.split(BATCHES[:processes])[rank].float()]).loss
    return {
        "loss": out.loss.detach(), "gradients": [p.grad for p in layers.parameters()],
        "sent": sent, "sent later": later - len(sent), "bounded": bounded,
    }  # fmt: skip


@pytest.mark.parametrize("center", ["channel", "position"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("processes", [2, 3])
def test_processes_with_uneven_batches_give_the_loss_and_averaged_gradient_of_one(
    processes, dtype, tolerance, center, tmp_path
):
    results = run_processes(train_share, processes, tmp_path, dtype, center)
    layers, x = layers_and_data(dtype, processes)
    steps = {5: 7, 2: 3, 1: 3}  # 5 x 64, 2 x 64 and 1 x 64 positions for at most 60, no step even
    kept = [part.float().double().flatten(2)[:, :, :: steps[len(part)]] for part in x.split(BATCHES[:processes])]
    kept = torch.cat([part.transpose(0, 1).flatten(1) for part in kept], 1).T[:, :, None, None]
    expected = Stages(layers.double(), MFDLoss(center=center))(x.double())
    expected.loss.backward()
    for result in results:
        assert result["bounded"].item() == pytest.approx(reference_loss(kept).item(), rel=1e-4)
        assert result["loss"].item() == pytest.approx(expected.loss.item(), rel=tolerance)
        for gradient, parameter in zip(result["gradients"], layers.parameters(), strict=True):
            if parameter.grad.norm() > 1e-9:  # shifts (biases) cannot change a correlation
                assert (gradient - parameter.grad).norm() <= tolerance * parameter.grad.norm()
        # Of stages with 6 and 41 channels: an upper triangle each, and a row a process of a count and a mean each.
        triangles, maps = 6 * 7 // 2 + 41 * 42 // 2, 36 * 6 + 4 * 41
        once = [processes * (2 + 6 + 41) + triangles]
        means_first = [2 + maps, processes * 2 + triangles]
        assert result["sent"] == (once if center == "channel" else means_first)
        assert result["sent later"] == 0, "backward, weight 0 and sync=False send nothing"
