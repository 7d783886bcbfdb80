"""16-bit products as float32, against float64."""

import pytest
import torch

from hf_accel_patch.ops import wide
from hf_accel_patch.ops.attention import scored
from hf_accel_patch.ops.case import Variant


@pytest.fixture(params=(False, True), ids=("as they are", "as float32"))
def widened(request, monkeypatch):
    """Whatever this processor can do."""
    monkeypatch.setattr(wide, "WIDENED", frozenset({torch.bfloat16, torch.float16} if request.param else ()))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_products_and_gradients(dtype, widened):
    torch.manual_seed(0)
    a, b = (torch.randn(2, 3, *shape).to(dtype).requires_grad_() for shape in ((5, 7), (7, 4)))
    y = wide.matmul(a, b)
    exact = a.double() @ b.double()
    assert y.dtype == dtype and (y - exact).abs().max() < 1e-5 + 8 * torch.finfo(dtype).eps
    y.sum().backward()
    expected = b.double().sum(-1).unsqueeze(-2).expand_as(a)
    assert a.grad.dtype == dtype and (a.grad - expected).abs().max() < 1e-5 + 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_products_in_pieces(dtype, widened, monkeypatch):
    """Into a part of a larger matrix, with fewer rows in the last piece."""
    monkeypatch.setattr(wide, "ROWS", 4)
    torch.manual_seed(0)
    a, b, bias = torch.randn(11, 7).to(dtype), torch.randn(5, 7).to(dtype).T, torch.randn(5).to(dtype)
    out = torch.full((11, 9), 3.0).to(dtype)
    exact, close = a.double() @ b.double(), 1e-5 + 8 * torch.finfo(dtype).eps
    wide.matmul_into(a, b, out[:, 2:7])
    assert (out[:, 2:7] - exact).abs().max() < close and (out[:, [0, 1, 7, 8]] == 3).all()
    wide.widened_into(a, b, out[:, 2:7], bias)
    assert (out[:, 2:7] - exact - bias).abs().max() < close and (out[:, [0, 1, 7, 8]] == 3).all()


def test_which_are_widened():
    flags = wide.platform.machine() in ("x86_64", "AMD64")
    assert {torch.bfloat16, torch.float16} >= wide.WIDENED
    assert (torch.bfloat16 in wide.WIDENED) == (flags and not torch.ops.mkldnn._is_mkldnn_bf16_supported())


def test_other_machines_are_left_alone(monkeypatch):
    monkeypatch.setattr(wide.platform, "machine", lambda: "aarch64")
    assert not wide._widened()


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_one_graph(dtype):
    torch.manual_seed(0)
    q, k = torch.randn(1, 4, 6, 8).to(dtype), torch.randn(1, 2, 6, 8).to(dtype)
    function = lambda: scored(q, k, k, None, None, Variant(0.25, softcap=30.0))[0]  # noqa: E731
    ours = torch.compile(function, backend="eager", fullgraph=True)()
    assert torch.allclose(ours, function(), atol=1e-2)
