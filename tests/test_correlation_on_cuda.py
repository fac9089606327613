"""The operator's way on CUDA, on a machine without: its arithmetic on a CPU, its devices on tensors without values."""

import pytest
import torch
from test_correlation import LAYOUTS, reference_loss
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from timm_mfd import MFDLoss, correlation

SHAPES = {"many samples": (6, 9, 6, 4), "few samples": (2, 320, 2, 2)}
SCOPES = (correlation.Scope(), correlation.Scope("position"), correlation.Scope("channel", max_samples=70))


class AsOnCuda(TorchFunctionMode):
    """Tensors on a CPU say that they are on CUDA, whose bf16 products with float32 sums are spelled out.

    Attributes:
        products: How many there were.
    """

    def __init__(self):
        super().__init__()
        self.products = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func == torch.Tensor.is_cuda.__get__:
            return True
        if func is torch.mm:
            a, b = args
            assert a.dtype == b.dtype == torch.bfloat16
            assert kwargs == {"out_dtype": torch.float32}
            self.products += 1
            return func(a.float(), b.float())
        return func(*args, **kwargs)


def test_products_split_into_bf16_are_as_good_as_float32():
    y, a = torch.randn(500, 60) * torch.logspace(-3, 3, 60), torch.randn(60, 60)
    gram = torch.zeros(60, 60)
    with AsOnCuda():
        correlation._add_gram_of_bf16_products(gram, y)
    scale = y.double().norm(dim=0)
    assert ((gram - y.double().T @ y.double()) / (scale[:, None] * scale)).abs().max() < 1e-6
    for products, bound in ((6, 1e-6), (3, 1e-4)):
        with AsOnCuda():
            product = correlation._sum_of_bf16_products(correlation._split(y), correlation._split(a), products)
        assert ((product - y.double() @ a.double()).abs() / (y.double().abs() @ a.double().abs())).max() < bound


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("center", ["channel", "position"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_loss_and_gradient_match_float64_autograd_in_many_chunks(layout, shape, center, dtype, monkeypatch):
    monkeypatch.setattr(correlation, "_GPU_CHUNK", 300)
    values = torch.randn(SHAPES[shape])
    values += torch.randn_like(values[:, :1]) + 3
    x = LAYOUTS[layout](values.to(dtype)).detach().requires_grad_()
    expected = x.detach().double().requires_grad_()
    with AsOnCuda() as mode:
        loss = MFDLoss(center=center)([x]).loss
        loss.backward()
    assert (mode.products > 0) == (dtype != torch.float64)
    expected_loss = reference_loss(expected, center)
    expected_loss.backward()
    assert loss.item() == pytest.approx(expected_loss.item(), abs=1e-6)
    bound = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 5e-3, torch.float16: 5e-3}[dtype]
    assert (x.grad - expected.grad).norm() <= bound * expected.grad.norm()


class Context:
    """What autograd hands to a function."""

    needs_input_grad = (False, True)

    def save_for_backward(self, *tensors):
        self.saved_tensors = tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("function", [correlation._Correlation, correlation._MeanSquaredCorrelations])
def test_nothing_is_read_back_and_everything_is_on_the_device(function, shape, scope, dtype):
    """A tensor without values cannot be read, and refuses to meet one of another device."""
    context = Context()
    with FakeTensorMode(), torch.no_grad():
        x = torch.empty(SHAPES[shape], dtype=dtype, device="cuda").contiguous(memory_format=torch.channels_last)
        out = function.forward(context, scope, x)
        _, gradient = function.backward(context, torch.ones_like(out))
    assert out.device == gradient.device == x.device
    assert (gradient.shape, gradient.dtype) == (x.shape, x.dtype)
