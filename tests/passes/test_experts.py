"""Quantized experts against experts of the weights that the codes stand for."""

import pytest
import torch
from cases import greedy, prompt, tiny
from torch import nn

from hf_accel_patch import Quantize, patch, report, unpatch
from hf_accel_patch.ops.modules import QuantizedExperts
from hf_accel_patch.ops.products import as_floats
from hf_accel_patch.ops.routed import routed_op

FAMILIES = ("mixtral", "gpt_oss")  # [E, N, K]; [E, K, N] with biases and interleaved gates
BFLOAT16 = 2**-6


def experts_of(model):
    return next(
        (name, m) for name, m in model.named_modules() if hasattr(m, "_apply_gate") and hasattr(m, "is_transposed")
    )


@pytest.fixture(params=FAMILIES)
def pair(request):
    """Quantized experts by each scheme, and stock's own with the same weights."""

    def make(scheme):
        name, ours = experts_of(patch(tiny(request.param), quantize=scheme))
        stock = tiny(request.param).get_submodule(name)
        for key, spec in ours.specs.items():
            dense = torch.stack([ours.dequantize_expert(key, e, torch.float32) for e in range(ours.num_experts)])
            assert dense.shape[1:] == spec.shape
            stock._parameters[key] = nn.Parameter(dense.mT.contiguous() if stock.is_transposed else dense)
        return ours, stock

    return make


def routed(tokens, hidden, experts, chosen=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(tokens, experts, generator=generator)
    weights, index = scores.topk(chosen)
    return torch.randn(tokens, hidden, generator=generator), index, weights


@torch.no_grad()
@pytest.mark.parametrize("implementation", ("eager", "grouped_mm"))
@pytest.mark.parametrize("tokens", (0, 1, 2, 7, 300))
@pytest.mark.parametrize("scheme", ("int8", "int4", "nf4", "llm.int8"))
def test_they_are_stock_experts_with_rounded_weights(pair, scheme, tokens, implementation):
    ours, stock = pair(scheme)
    stock.config._experts_implementation = implementation
    x, index, weights = routed(tokens, stock.hidden_size if hasattr(stock, "hidden_size") else 64, stock.num_experts)
    expected, y = stock(x, index, weights), ours(x, index, weights)
    assert isinstance(ours, QuantizedExperts) and y.shape == expected.shape and y.dtype == expected.dtype
    assert not tokens or (y - expected).norm() < BFLOAT16 * expected.norm()


@torch.no_grad()
@pytest.mark.parametrize(
    "scheme, backend",
    (
        *((scheme, "eager") for scheme in ("int8", "int4", "nf4", "llm.int8")),
        pytest.param("int4", "inductor", marks=pytest.mark.slow),
    ),
)
def test_they_are_one_graph_for_any_tokens(pair, scheme, backend):
    ours, stock = pair(scheme)
    torch._dynamo.reset()
    compiled = torch.compile(ours, backend=backend, fullgraph=True, dynamic=True)
    for tokens in (2, 7, 300):
        inputs = routed(tokens, 64, stock.num_experts)
        expected = ours(*inputs)
        close = 1e-5 if backend == "inductor" else 0  # which adds up in another order
        assert (compiled(*inputs) - expected).norm() <= close * expected.norm()


def test_the_operator_of_graphs_is_a_whole_one(pair):
    ours, _ = pair("int4")
    codes, scales, spec = ours.held(ours.into)
    how = (spec.backend.compiled, spec.backend.rows, spec.backend.decomposed, spec.backend.many)
    experts = torch.tensor([0, 0, 2, 3, 3, 3])
    arguments = (torch.randn(6, codes.shape[2]), experts, codes, as_floats(scales), spec.scheme, *how)
    torch.library.opcheck(routed_op, arguments)


@torch.no_grad()
def test_one_expert_may_have_all_tokens(pair):
    ours, stock = pair("int8")
    x, index, weights = routed(5, 64, stock.num_experts)
    index = torch.full_like(index, 3)
    assert (ours(x, index, weights) - stock(x, index, weights)).norm() < BFLOAT16 * stock(x, index, weights).norm()


def test_gradients_reach_what_is_before_the_experts(pair):
    ours, stock = pair("int4")
    grads = []
    for module in (ours, stock):
        x, index, weights = routed(6, 64, stock.num_experts)
        x.requires_grad_()
        weights.requires_grad_()
        module(x, index, weights).square().sum().backward()
        grads.append(torch.cat([x.grad.flatten(), weights.grad.flatten()]))
    assert (grads[0] - grads[1]).norm() < BFLOAT16 * grads[1].norm()


@pytest.mark.parametrize("family", FAMILIES)
def test_models_with_experts_shrink_and_come_back(family):
    model = tiny(family)
    tokens = greedy(model, input_ids=prompt(), tokens=5)
    patch(model, quantize=Quantize("int4", originals="keep"))
    row = next(row for row in report(model).to_dict()["passes"] if row["pass"] == "quantize")
    assert row["bytes_after"] < 0.4 * row["bytes_before"]
    assert not any("Experts" in skip["reason"] for skip in row["skipped"])
    assert greedy(model, input_ids=prompt(), tokens=5).shape == tokens.shape
    unpatch(model)
    assert torch.equal(greedy(model, input_ids=prompt(), tokens=5), tokens)


def test_a_module_of_experts_can_be_skipped():
    model = patch(tiny("mixtral"), quantize=Quantize("int4", skip=("model.layers.0.mlp.experts",)))
    kinds = [isinstance(layer.mlp.experts, QuantizedExperts) for layer in model.model.layers]
    assert kinds == [False] + [True] * (len(kinds) - 1)
    greedy(model, input_ids=prompt(), tokens=2)
