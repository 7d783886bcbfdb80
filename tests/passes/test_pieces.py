"""Float experts that take a prompt in pieces: the same output, less memory, nothing left behind."""

import copy
import io

import pytest
import torch
from cases import build, entry, greedy, left_padded, logits, prompt, relative_error, tiny
from fingerprint import changes, fingerprint
from torch.utils._python_dispatch import TorchDispatchMode

from hf_accel_patch import Quantize, patch, report, unpatch
from hf_accel_patch.ops import experts
from hf_accel_patch.ops.experts import InPieces, Routed, piece_tokens

TYPES = ("mixtral", "gpt_oss", "deepseek_v3", "qwen3_moe")
ROUNDING = 5e-5  # of the standard deviation of float32 logits: products over fewer rows add up in another order


@pytest.fixture
def small(monkeypatch):
    """Pieces of a few tokens."""
    monkeypatch.setattr(experts, "PIECE_BYTES", 1)
    monkeypatch.setattr(experts, "LEAST_ROWS", 4)


def modules(model):
    return [module for module in model.modules() if isinstance(module, InPieces)]


class Sizes(TorchDispatchMode):
    """The rows of every matrix that is made."""

    def __init__(self):
        super().__init__()
        self.rows = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **kwargs or {})
        self.rows += [len(made)] if isinstance(made, torch.Tensor) and made.ndim == 2 else []
        return made


@pytest.mark.parametrize("implementation", ("grouped_mm", "eager", "batched_mm"))
@pytest.mark.parametrize("model_type", TYPES)
def test_models_answer_as_stock_does(model_type, implementation, small):
    stock = build(model_type)
    stock.set_experts_implementation(implementation)
    ours = patch(copy.deepcopy(stock))
    assert modules(ours) and entry(report(ours).to_dict(), "prefill")["modules"] == len(modules(ours))
    assert relative_error(logits(ours, prompt(60)), logits(stock, prompt(60))) <= ROUNDING
    padded = left_padded(60, 33)
    assert relative_error(logits(ours, **padded), logits(stock, **padded)) <= ROUNDING
    assert torch.equal(greedy(ours, prompt(60)), greedy(stock, prompt(60)))


@torch.no_grad()
@pytest.mark.parametrize("model_type", TYPES)
def test_they_are_right_and_small(model_type, small):
    """Against the experts' own eager forward in float64; no matrix has a row for each token and expert."""
    ours = modules(patch(build(model_type)))[0]
    T, k, E = 300, 2, ours.routed.experts
    generator = torch.Generator().manual_seed(0)
    weights, index = torch.rand(T, E, generator=generator).topk(k)
    inputs = torch.randn(T, 64, generator=generator), index, weights
    reference = copy.deepcopy(ours).double()
    reference.__class__ = type(ours).made
    reference.config._experts_implementation = "eager"
    expected = reference(inputs[0].double(), index, weights.double())
    ours.config._experts_implementation = "grouped_mm"
    with Sizes() as seen:
        found = ours(*inputs)
    assert (found - expected).abs().max() <= ROUNDING * expected.std()
    assert max(seen.rows) == T, "the whole output is the largest"
    with Sizes() as whole, torch.enable_grad():
        ours(*inputs)
    assert max(whole.rows) == T * k


def test_gradients_are_those_of_stock(small):
    stock = build("gpt_oss")
    ours, found = patch(copy.deepcopy(stock)), []
    for model in (stock, ours):
        model(prompt(60), labels=prompt(60)).loss.backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert (found[1] - found[0]).abs().max() <= 1e-4 * found[0].abs().max()


def test_pieces_fit_the_room_and_keep_experts_busy():
    hidden = torch.zeros(1, 8)
    few, many = Routed(4, 1024 + 256), Routed(128, 1024 + 256)
    assert piece_tokens(hidden, 4, few) == experts.PIECE_BYTES // (4 * experts.COPIES * 1280 * 4)
    assert piece_tokens(hidden, 8, many) == experts.LEAST_ROWS * 128 // 8
    assert piece_tokens(hidden.bfloat16(), 4, few) == 2 * piece_tokens(hidden, 4, few) + 1


def test_quantized_experts_stay_as_they_are():
    name = "model.layers.0.mlp.experts"
    model = patch(tiny("mixtral"), quantize=Quantize("int4", skip=(name,)))
    assert modules(model) == [model.get_submodule(name)]
    assert "reason" in entry(report(patch(tiny("mixtral"), quantize="int4")).to_dict(), "prefill")


def test_it_comes_off_and_copies(small):
    model = build("gpt_oss")
    expected, before = logits(model, prompt()), fingerprint(model)
    patch(model)
    twin = copy.deepcopy(model)
    assert relative_error(logits(twin, prompt()), expected) <= ROUNDING
    assert len(modules(twin)) == len(modules(model)) > 0
    assert not modules(unpatch(twin)) and torch.equal(logits(twin, prompt()), expected)
    stored = io.BytesIO()
    torch.save(modules(model)[0], stored)
    stored.seek(0)
    read, module = torch.load(stored, weights_only=False), modules(model)[0]
    assert type(read) is type(module) and read.routed == module.routed
    assert not changes(before, fingerprint(unpatch(model)))
