"""Under torch.compile a patched model is one graph, as stock is: for prompts of any length, and for steps."""

import pytest
import torch
from cases import build, prompt, relative_error
from torch._dynamo.testing import CompileCounter
from transformers import DynamicCache, StaticCache

from hf_accel_patch import patch
from hf_accel_patch.ops.attended import attended
from hf_accel_patch.ops.attention import reference
from hf_accel_patch.ops.case import Variant

CACHES = {"growing": DynamicCache, "static": lambda config: StaticCache(config=config, max_cache_len=64)}
TWO = {"num_hidden_layers": 2}
SOME = {"gptj": {"n_layer": 2}, "bloom": {"n_layer": 2}, "gemma2": TWO}
MORE = {
    "openai-gpt": {"n_layer": 2}, "falcon": TWO | {"alibi": True, "multi_query": False, "num_kv_heads": 4},
    "gpt_oss": TWO, "deepseek_v3": TWO,
}  # fmt: skip
EVERY = [*SOME, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)]


@pytest.fixture
def graphs():
    torch._dynamo.reset()
    yield CompileCounter()
    torch._dynamo.reset()


def compiled(model, graphs):
    return torch.compile(model, backend=graphs, fullgraph=True, dynamic=True)


def patched(name):
    return patch(build(name, **{**SOME, **MORE}[name]))


@torch.no_grad()
@pytest.mark.parametrize("name", EVERY)
def test_prompts_of_any_length_are_one_graph(name, graphs):
    model = patched(name)
    call, options = compiled(model, graphs), {} if name == "openai-gpt" else {"use_cache": False}
    for length in (20, 33, 50):
        given = {"input_ids": prompt(length), "attention_mask": torch.ones(1, length, dtype=torch.long), **options}
        assert relative_error(call(**given).logits, model(**given).logits) < 1e-4
    assert graphs.frame_count == 1


@torch.no_grad()
@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("name", EVERY)
def test_steps_are_one_graph(name, kind, graphs):
    if name == "openai-gpt" or (name == "falcon" and kind == "static"):
        pytest.skip("the model's own code knows no cache, or cannot be traced so")
    model, ids = patched(name), prompt(30)
    call, cache, truth = compiled(model, graphs), CACHES[kind](config=model.config), model(ids).logits
    model(ids[:, :24], past_key_values=cache)
    for place in range(24, 30):
        found = call(ids[:, place : place + 1], past_key_values=cache).logits[:, 0]
        assert relative_error(found, truth[:, place]) < 1e-4
    assert graphs.frame_count == 1


@torch.no_grad()
@pytest.mark.parametrize("rope", [None, pytest.param("yarn:4", marks=pytest.mark.slow)])
def test_tables_of_positions_grow_in_graphs(rope, graphs):
    """One more graph, each time that a table is twice as long."""
    model = patch(build("gptj", n_positions=64, n_layer=2), rope=rope)
    call = compiled(model, graphs)
    for length, expected in ((20, 1), (64, 1), (65, 2), (120, 2), (140, 3)):
        ids = prompt(length)
        assert relative_error(call(ids, use_cache=False).logits, model(ids, use_cache=False).logits) < 1e-4
        assert graphs.frame_count == expected


@torch.no_grad()
def test_weights_are_given_where_they_are_asked_for(graphs):
    model, ids = patched("bloom"), prompt(20)
    call = torch.compile(model, backend=graphs)
    weights = call(ids, output_attentions=True).attentions
    for given, expected in zip(weights, model(ids, output_attentions=True).attentions, strict=True):
        assert torch.allclose(given, expected, atol=1e-6)
    assert not call(ids).attentions


@torch.no_grad()
@pytest.mark.parametrize("given", ["causal", "masked", "sinks", "bias", "all"])
def test_the_operator(given):
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 4, 150, 16), torch.randn(2, 2, 150, 16), torch.randn(2, 2, 150, 8)
    seen = torch.ones(150, 150, dtype=torch.bool).tril()
    mask = (seen & (torch.rand(2, 1, 1, 150) < 0.7)).index_fill(-1, torch.tensor([0]), True)
    sinks, bias = torch.randn(1, 4, 1, 1), torch.randn(1, 4, 1, 150)
    have = {"masked": (mask, None, None, None), "sinks": (None, None, sinks, None), "bias": (None, None, None, bias)}
    mask, cap, sinks, bias = {**have, "causal": (None,) * 4, "all": (mask, 5.0, sinks, bias)}[given]
    arguments = query, key, value, mask, mask is None, 0.3, cap, sinks, bias
    torch.library.opcheck(attended, arguments)
    every = (seen if mask is None else mask).expand(2, 4, 150, 150)
    truth = reference(query, key, value, every, Variant(0.3, softcap=cap, sinks=sinks, bias=bias))
    assert relative_error(attended(*arguments).transpose(1, 2), truth) < 1e-5
