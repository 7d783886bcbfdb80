"""16-bit products as float32, against float64."""

import pytest
import torch

from hf_accel_patch.ops import wide


@pytest.fixture(params=(False, True), ids=("as they are", "as float32"))
def widened(request, monkeypatch):
    """Whatever this processor can do."""
    monkeypatch.setattr(wide, "widens", lambda dtype: request.param and dtype != torch.float32)


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


def test_which_are_widened():
    assert not wide.widens(torch.float32) and not wide.widens(torch.float64)
    flags = wide.platform.machine() in ("x86_64", "AMD64")
    assert wide.widens(torch.bfloat16) == (flags and not torch.ops.mkldnn._is_mkldnn_bf16_supported())


def test_other_machines_are_left_alone(monkeypatch):
    monkeypatch.setattr(wide.platform, "machine", lambda: "aarch64")
    assert not wide.widens.__wrapped__(torch.bfloat16)
