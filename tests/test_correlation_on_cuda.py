"""The operator's way on CUDA, on a machine without: its arithmetic on a CPU, its devices on tensors without values."""

from contextlib import ExitStack, contextmanager
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from counters import Kernels, Operations, Traffic, opened
from test_correlation import LAYOUTS, reference_loss, reference_r
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from timm_mfd import MFDLoss, channel_correlation
from timm_mfd.loss import correlation, cuda
from timm_mfd.loss.samples import Scope

HALF = (torch.bfloat16, torch.float16)
SHAPES = {"many samples": (6, 9, 6, 4), "few samples": (2, 320, 2, 2)}
SCOPES = (Scope(), Scope("position"), Scope(max_samples=70), Scope(synced=True), Scope("position", synced=True))


class AsOnCuda(TorchFunctionMode):
    """Tensors on a CPU say that they are on CUDA, whose half-precision products with float32 sums are spelled out.

    Args:
        cut: Whether sums are cut to float32 after every 16 products, as the least exact tensor cores do.

    Attributes:
        products: How many there were.
    """

    def __init__(self, cut=False):
        super().__init__()
        self.products, self.cut = 0, cut

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func == torch.Tensor.is_cuda.__get__:
            return True
        if func in (torch.mm, torch.bmm) and args[0].dtype in HALF:
            assert kwargs == {"out_dtype": torch.float32}
            return self.multiply(*args)
        if func is torch.addmm and args[1].dtype in HALF:
            bias, a, b = args
            assert a.dtype == b.dtype == bias.dtype, "else a GPU refuses"
            return (kwargs["beta"] * bias.float() + self.multiply(a, b)).to(a.dtype)
        return func(*args, **kwargs)

    def multiply(self, a, b):
        assert a.dtype == b.dtype
        self.products += 1
        if not self.cut:
            return a.float() @ b.float()
        total = torch.zeros(*a.shape[:-1], b.shape[-1])
        for some, others in zip(a.double().split(16, -1), b.double().split(16, -2), strict=True):
            exact = total.double() + some @ others
            total = exact.float()
            beyond = total.double().abs() > exact.abs()
            total = torch.where(beyond, total.nextafter(torch.zeros_like(total)), total)
        return total


@contextmanager
def as_on_cuda(cut=False):
    """Forward and backward as a GPU computes them; autograd calls the backward outside of all modes."""
    mode = AsOnCuda(cut)

    def inside(backward):
        def call(*args):
            with mode:
                return backward(*args)

        return call

    functions = correlation._Correlation, correlation._MeanSquaredCorrelations
    with mode, ExitStack() as stack:
        for function in functions:
            stack.enter_context(mock.patch.object(function, "backward", staticmethod(inside(function.backward))))
        yield mode


@pytest.fixture(autouse=True)
def _inside_the_operators():
    """What is registered with torch is called directly: inside an operator no mode would see a thing."""
    with opened():
        yield


def on_cuda(x, center="channel", scale=1.0, cut=False):
    """Return correlation, loss and gradient of a map as a GPU computes them."""
    x = x.detach().requires_grad_()
    with as_on_cuda(cut) as mode:
        r = channel_correlation(x.detach(), center)
        loss = MFDLoss(center=center)([x]).loss
        forward = mode.products
        (loss * scale).backward()
    assert (mode.products > forward > 0) == (x.dtype != torch.float64)
    assert x.grad.dtype == x.dtype
    return r, loss.detach(), x.grad.double() / scale


def exactly(x, center="channel"):
    """Return the same from float64 autograd of the same rounded values."""
    x = x.detach().double().requires_grad_()
    r, loss = reference_r(x, center), reference_loss(x, center)
    loss.backward()
    return r.detach(), loss.detach(), x.grad


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def shifted(shape, ratio, dtype=torch.float32):
    """Correlated channels whose means are `ratio` deviations from 0, to either side."""
    x = torch.randn(shape) + 0.5 * torch.randn(shape[0], 1, *shape[2:])
    side = torch.where(torch.arange(shape[1]) % 3 == 0, -1.0, 1.0)[:, None, None]
    return (x + ratio * x.std() * side).to(dtype).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF])
@pytest.mark.parametrize("center", ["channel", "position"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_loss_and_gradient_match_float64_autograd_in_many_pieces(layout, shape, center, dtype, monkeypatch):
    monkeypatch.setattr(cuda, "_CHUNK", 300)
    monkeypatch.setattr(cuda, "_ROWS", 20)
    monkeypatch.setattr(cuda, "_ROWS_PER_CHANNEL", 0)
    values = torch.randn(SHAPES[shape])
    values += torch.randn_like(values[:, :1]) + 3
    x = LAYOUTS[layout](values.to(dtype))
    scale = 2.0**16 if dtype == torch.float16 else 1.0
    _, loss, gradient = on_cuda(x, center, scale)
    _, expected_loss, expected = exactly(x, center)
    bound = {torch.float64: 1e-12, torch.float32: 5e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    assert loss.item() == pytest.approx(expected_loss.item(), abs=1e-5)
    assert relative(gradient, expected) <= bound


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize(("ratio", "of_r", "of_gradient"), [(0, 2e-3, 1e-2), (10, 2e-3, 1e-2), (30, 1e-2, 3e-2)])
@pytest.mark.parametrize("dtype", HALF)
def test_errors_of_half_precision_stay_small_where_the_mean_is_far_off_0(dtype, ratio, of_r, of_gradient, cut):
    x = shifted((64, 32, 16, 16) if cut else (32, 96, 16, 16), ratio, dtype)
    r, _, gradient = on_cuda(x, scale=2.0**16, cut=cut)
    expected_r, _, expected = exactly(x)
    assert (r - expected_r).abs().max() <= of_r
    assert relative(gradient, expected) <= of_gradient


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("ratio", [0, 10, 1000])
def test_errors_of_float32_stay_small_where_the_mean_is_a_thousand_deviations(ratio, cut):
    x = shifted((64, 32, 16, 16) if cut else (32, 96, 16, 16), ratio)
    r, _, gradient = on_cuda(x, cut=cut)
    expected_r, _, expected = exactly(x)
    assert (r - expected_r).abs().max() <= (1e-4 if ratio <= 10 else 1e-3)
    assert relative(gradient, expected) <= (1e-4 if ratio <= 10 else 1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("case", ["batch of 2", "one channel", "constant", "dead", "large", "all dead", "far off 0"])
def test_nothing_is_nan_or_infinite(case, dtype):
    x = torch.randn(2, 8, 1, 1) if case == "batch of 2" else torch.randn(2, 8, 4, 4)
    if case == "one channel":
        x = x[:, :1].clone()
    elif case == "constant":
        x[:, 3:] = torch.linspace(-300, 300, 5)[:, None, None]
    elif case == "dead":
        x[:, 3:] = 0
    elif case == "large":
        x *= 6e4 / x.abs().max()
    elif case == "all dead":
        x[:] = 0
    elif case == "far off 0":
        x += 3e4
    r, loss, gradient = on_cuda(x.to(dtype))
    assert torch.isfinite(gradient).all()
    assert r.isfinite().all()
    assert 0 <= loss <= 1 + 1e-6
    if case in ("constant", "dead"):
        assert torch.equal(r[3:], torch.zeros(5, 8))
        assert not gradient[:, 3:].any()
        assert gradient[:, :3].any()


def test_several_stages_at_once_have_the_values_of_each_alone():
    kinds = ((9, HALF[0]), (20, HALF[1]), (300, HALF[0]), (5, torch.float32), (20, HALF[0]), (9, HALF[1]))
    stages = [shifted((4, channels, 6, 6), 1, dtype) for channels, dtype in kinds]
    together = [x.clone().requires_grad_() for x in stages]
    with as_on_cuda():
        out = MFDLoss()(together)
        (out.loss * 2.0**16).backward()
    for x, ours, loss in zip(stages, together, out.per_stage, strict=True):
        _, alone, gradient = on_cuda(x, scale=2.0**16)
        torch.testing.assert_close(loss.detach(), alone)
        torch.testing.assert_close(ours.grad.double() / 2**16, gradient, rtol=1e-2, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_a_mean_over_all_processes_is_taken_as_it_is_given(dtype):
    """The images of this process have another."""
    view, mean = torch.randn(6, 5, 9).to(dtype), torch.randn(5, 9)
    with AsOnCuda():
        gram = cuda.centered_gram(view, mean, known=True)
    y = (view.double() - mean.double()).flatten(0, 1)
    assert relative(gram.double(), y.T @ y) <= 1e-4


def test_a_stage_that_needs_no_gradient_gets_none():
    frozen, free = shifted((4, 9, 6, 6), 1, HALF[0]), shifted((4, 20, 6, 6), 1, HALF[0]).requires_grad_()
    with as_on_cuda():
        MFDLoss()([frozen, free]).loss.backward()
    assert frozen.grad is None
    assert torch.equal(free.grad.double(), on_cuda(free)[2])


# ---- tensors without values: what is launched, and where ----


class Context:
    """In the place of autograd's, whose engine needs a device."""

    def save_for_backward(self, *tensors):
        self.saved_tensors = tensors


def forward_and_backward(stages, scope):
    losses, *kept = correlation.loss_forward(stages, *scope)
    yield losses
    yield correlation.loss_backward(torch.empty_like(losses), stages, kept, range(len(stages)), *scope)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_nothing_is_read_back_and_everything_is_on_the_device(shape, scope, dtype, monkeypatch):
    """A tensor without values cannot be read, and refuses to meet one of another device."""
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: tensor.add_(tensor))
    # Of one that is made on the host, the device would wait for the copy.
    monkeypatch.setattr(torch.Tensor, "new_tensor", None)
    monkeypatch.setattr(torch, "tensor", None)
    with FakeTensorMode(), torch.no_grad():
        x = torch.empty(SHAPES[shape], dtype=dtype, device="cuda").contiguous(memory_format=torch.channels_last)
        losses, (gradient,) = forward_and_backward([x], scope)
        context = Context()
        r = correlation._Correlation.forward(context, scope, x)
        _, of_r = correlation._Correlation.backward(context, r)
    assert losses.device == r.device == x.device
    for found in (gradient, of_r):
        assert (found.shape, found.dtype, found.device, found.stride()) == (x.shape, x.dtype, x.device, x.stride())


RESNET50_AT_64_PX = ((64, 64), (256, 32), (512, 16), (1024, 8), (2048, 4))


@pytest.mark.parametrize(
    ("dtype", "kernels", "bytes_per_element", "operations"),
    [(torch.bfloat16, 120, 16, 1.05), (torch.float16, 120, 16, 1.05), (torch.float32, 150, 60, 3.1)],
)
def test_a_step_costs_few_kernels_bytes_and_operations(dtype, kernels, bytes_per_element, operations):
    """Limits for the five maps of ResNet-50; each product of the straightforward way is 2 n C^2 operations."""
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        stages = [
            torch.empty(128, c, s, s, dtype=dtype, device="cuda").contiguous(memory_format=torch.channels_last)
            for c, s in RESNET50_AT_64_PX
        ]
        with Kernels() as launched, Traffic() as traffic, Operations() as counted:
            list(forward_and_backward(stages, Scope()))
    assert launched.started <= kernels
    assert traffic.bytes <= bytes_per_element * sum(x.numel() for x in stages)
    needed = sum(4 * x.numel() * x.shape[1] for x in stages)
    assert needed <= counted.total <= operations * needed


def test_a_count_of_hidden_kernels_is_refused():
    with pytest.raises(ValueError, match="timm_mfd.loss.default hides its kernels"), Kernels():
        torch.ops.timm_mfd.loss([torch.randn(4, 3, 2, 2)], "channel", None, False)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_the_gradient_of_the_matrix_matches_float64_autograd_for_any_weights(dtype):
    x, weights = shifted((8, 30, 6, 6), 1, dtype), torch.randn(30, 30)
    ours, expected = x.clone().requires_grad_(), x.double().requires_grad_()
    with as_on_cuda() as mode:
        r = channel_correlation(ours)
        forward = mode.products
        (r * weights).sum().backward()
    assert mode.products > forward
    (reference_r(expected) * weights).sum().backward()
    assert relative(ours.grad.double(), expected.grad) <= (1e-4 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("dtype", HALF)
def test_matrix_and_bias_cancel_at_the_mean_better_than_a_rounded_bias_can(dtype):
    mean, a = 30 * torch.rand(40), torch.randn(40, 40)
    (rounded, bias), (dead, nothing) = cuda._round([(mean, a.to(dtype)), (torch.zeros(7), a[:7, :7].to(dtype))])
    left = (mean.double() @ rounded.double() - bias.double()).norm()
    exact = mean.double() @ a.to(dtype).double()
    assert left < 0.5 * (exact.to(dtype).double() - exact).norm()
    torch.testing.assert_close(bias.double(), exact, rtol=1e-2, atol=0, msg="nearly all of it is in the bias")
    assert torch.equal(dead, a[:7, :7].to(dtype)), "where all means are 0 there is nothing to mend"
    assert not nothing.any()


@pytest.mark.parametrize("dtype", HALF)
def test_a_constant_channel_is_constant_however_its_many_squares_are_rounded(dtype):
    x = shifted((64, 12, 16, 16), 1, dtype)
    x[:, 3:] = torch.linspace(0.1, 90, 9).to(dtype)[:, None, None]
    r, loss, gradient = on_cuda(x)
    assert torch.equal(r[3:], torch.zeros(9, 12))
    assert not gradient[:, 3:].any()
    assert loss.item() == pytest.approx(exactly(x)[1].item(), rel=1e-2)
