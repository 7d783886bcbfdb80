"""Whole models whose attention is computed by a backend that was asked for by name."""

import sys

import pytest
import torch
from cases import entry, greedy, left_padded, logits, prompt, relative_error, tiny
from interpreter import INTERPRETED, interpreted, load

from hf_accel_patch import Attention, UnsupportedModel, patch, plan, report, unpatch
from hf_accel_patch.ops import backends
from hf_accel_patch.passes import described as described_masks

TOLERANCE = 1e-4  # of the logits' standard deviation
pytestmark = pytest.mark.skipif(not INTERPRETED, reason="these models are on the CPU, where kernels are interpreted")


@pytest.fixture
def triton(monkeypatch):
    """Interpreted kernels; returns the calls of the one for prompts."""
    kernels, calls = load("triton_prefill"), []
    load("triton_prefill_backward"), load("triton_decode")
    real = kernels.attend
    monkeypatch.setattr(kernels, "attend", lambda *args: calls.append(args) or real(*args))
    monkeypatch.setattr(backends, "_triton", lambda: kernels)
    with interpreted():
        yield calls


def row(model):
    return next(each for each in report(model).to_dict()["passes"] if each["pass"] == "attention")


@pytest.mark.parametrize("name", ("gemma2", "gpt_oss", "deepseek_v3", "bloom", "mpt"))
def test_triton_agrees_with_stock(name, triton, monkeypatch):
    monkeypatch.setattr(described_masks, "DENSE_ELEMENTS", 0)  # masks are described
    model, padded = tiny(name), left_padded(20, 13)
    stock = logits(model, **padded)
    patch(model, attention=Attention("triton"))
    assert relative_error(logits(model, **padded), stock) < TOLERANCE
    assert len(triton) == model.config.num_hidden_layers
    assert row(model)["backend"] == "triton" and row(model)["used"] == ["triton: asked for"]


def test_generation_with_triton(triton):
    """Masks are stored, as they are small; prompts are longer than the window."""
    model, padded = tiny("mistral"), left_padded(20, 13)
    stock = greedy(model, tokens=3, **padded)
    patch(model, attention=Attention("triton"))
    assert torch.equal(greedy(model, tokens=3, **padded), stock)
    assert len(triton) == model.config.num_hidden_layers  # tokens that follow take the kernel for few queries
    assert row(model)["used"] == ["triton: asked for"]


def test_training_with_triton(triton):
    grads = []
    for model in (tiny("gpt_oss"), patch(tiny("gpt_oss"), attention=Attention("triton"))):
        model.train()
        model(prompt(), labels=prompt()).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    assert triton and any("sinks" in name for name in grads[0])
    for name, stock in grads[0].items():
        assert (grads[1][name] - stock).abs().max() < 2e-5 * stock.abs().max(), name


@pytest.mark.parametrize("name", ("mistral", "gemma2", "gpt_oss"))
def test_flex_agrees_with_stock(name):
    model = tiny(name)
    padded = left_padded()
    stock = logits(model, **padded)
    patch(model, attention=Attention("flex"))
    assert relative_error(logits(model, **padded), stock) < TOLERANCE
    assert row(model)["used"] == ["flex: asked for"]


def test_what_a_backend_cannot_do_is_done_and_reported(triton):
    model = tiny("llama").double()
    stock = logits(model, prompt())
    patch(model, attention=Attention("triton"))
    assert row(model)["backend"] == "torch" and row(model)["why"] == "triton: the kernels take no float64"
    assert torch.allclose(logits(model, prompt()), stock) and not triton
    assert row(model)["used"] == ["torch: triton: the kernels take no float64"]
    assert "triton: the kernels take no float64" in str(report(model))


def test_the_default_says_why():
    model = patch(tiny("llama"))
    assert row(model)["backend"] == "torch" and row(model)["why"].startswith("on cpu PyTorch's")
    logits(model, prompt())
    assert "used" not in row(model)  # nothing was to be chosen
    unpatch(model)
    assert row(patch(model, attention=Attention("torch")))["why"] == "asked for"


def test_backends_come_off():
    model = tiny("llama")
    before = [set(vars(module)) for module in model.modules()]
    unpatch(patch(model, attention=Attention("flex")))
    assert [set(vars(module)) for module in model.modules()] == before


def test_who_is_missing(monkeypatch):
    model = tiny("llama")
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    with pytest.raises(
        UnsupportedModel, match=r"backend='flash-attn' was asked for, but flash-attn cannot be imported"
    ):
        patch(model, attention=Attention("flash-attn"))
    monkeypatch.setattr(backends, "_triton", lambda: None)
    with pytest.raises(
        UnsupportedModel, match=r"triton is not installed\n\nhint: pip install 'hf_accel_patch\[triton\]'"
    ):
        plan(model, attention=Attention("triton"))
    assert "attention_backend" not in vars(model.model.layers[0].self_attn)


def test_kernels_for_cuda_leave_a_cpu_to_pytorch(monkeypatch):
    monkeypatch.setattr(backends, "_interpreted", lambda: False)
    model = tiny("llama")
    stock = logits(model, prompt())
    patch(model, attention=Attention("triton"))
    assert relative_error(logits(model, prompt()), stock) < 1e-4
    said = entry(report(model).to_dict(), "attention")
    assert said["backend"] == "torch" and "the kernels are for CUDA, and this is on cpu" in said["why"]


def test_unknown_backends():
    allowed = "'auto', 'torch', 'triton', 'flash-attn', 'flex'"
    with pytest.raises(ValueError, match=f"unknown backend 'fast'; allowed: {allowed}"):
        Attention(backend="fast")
