"""What callers do with attention that programs seldom do: masks of their own, caches whose first call has one token,
derivatives that go forward, steps that are compiled on a cache that grows."""

import copy

import pytest
import torch
from cases import build, prompt
from torch._dynamo.utils import counters
from torch.autograd import forward_ad
from transformers import DynamicCache, StaticCache

from hf_accel_patch import patch

LOWEST = torch.finfo(torch.float32).min


@pytest.fixture(scope="module")
def pairs():
    made = {}

    def pair(family):
        if family not in made:
            stock = build(family)
            made[family] = stock, patch(copy.deepcopy(stock))
        return made[family]

    return pair


def logits(model, ids, mask):
    with torch.no_grad():
        return model(ids, attention_mask=mask).logits


def apart(found, expected):
    return ((found - expected).abs().max() / expected.std()).item()


@pytest.mark.parametrize("length", [8, 40])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss", "deepseek_v3"])
def test_shapes(family, length, pairs):
    stock, ours = pairs(family)
    ids = prompt(length=length)
    seen = torch.ones(1, 1, length, length, dtype=torch.bool).tril()
    kinds = {torch.bool: seen, torch.float32: torch.zeros(seen.shape).masked_fill(~seen, LOWEST)}
    mask = kinds[torch.bool if stock.config._attn_implementation == "sdpa" else torch.float32]
    row, heads = mask[:, :, -1:], mask.expand(1, stock.config.num_attention_heads, -1, -1)  # a row for all queries
    for given in (mask, row, mask[..., :1], row[..., :1], heads):
        assert apart(logits(ours, ids, given), logits(stock, ids, given)) < 1e-4, tuple(given.shape)
    sequences, some = mask.expand(2, 1, -1, -1), mask.expand(1, 3, -1, -1)
    for given in (mask[..., :3], mask[:, :, :2], torch.cat([mask] * 2, -1), some, sequences):
        for model in (stock, ours):
            with pytest.raises(RuntimeError, match=r"(?i)size|shape"):
                logits(model, ids, given.contiguous())


def additive(T, S):
    """Causal ones by what they add, one without, and one that hides every query's own key."""
    places = torch.arange(S - T, S)[:, None]
    keys, zeros = torch.arange(S), torch.zeros(1, 1, T, S)
    found = {hidden: zeros.masked_fill(keys > places, hidden) for hidden in (LOWEST, float("-inf"), -1e9, -1e4)}
    soft = torch.randn(1, 1, T, S, generator=torch.Generator().manual_seed(0))
    found |= {"nothing": zeros, "soft": soft.masked_fill(keys > places, LOWEST)}
    return found | {"own": zeros.masked_fill((keys > places) | (keys == places) & (keys > 0), LOWEST)}


@pytest.mark.parametrize("family", ["gpt_neo", "codegen", "gptj", "gpt_neox_japanese"])
def test_what_is_added_to_scores(family, pairs):
    """GPT-Neo is causal without a mask as well, CodeGen scales what is added; a prompt, and one in two parts."""
    stock, ours = pairs(family)
    ids = prompt(length=40)
    for name, mask in additive(40, 40).items():
        assert apart(logits(ours, ids, mask), logits(stock, ids, mask)) < 1e-4, name
    for name, mask in additive(20, 40).items():
        found = []
        for model in (stock, ours):
            with torch.no_grad():
                past = model(ids[:, :20], use_cache=True).past_key_values
                found.append(model(ids[:, 20:], attention_mask=mask, past_key_values=past).logits)
        assert apart(found[1], found[0]) < 1e-4, name


def test_keys_beyond_the_end_of_a_mask(pairs):
    """They are not seen, as in stock; a text whose mask of all scores would be large."""
    stock, ours = pairs("llama")
    ids = prompt(length=530)
    mask = torch.ones(1, 520, dtype=torch.long)
    assert apart(logits(ours, ids, mask), logits(stock, ids, mask)) < 1e-4
    assert apart(logits(ours, ids, mask), logits(ours, ids, None)) > 1e-2, "it matters"


@pytest.mark.parametrize(
    "family, options",
    [
        ("bloom", {}),
        ("llama", {}),
        ("mpt", {}),
        ("falcon", {"alibi": False}),
        ("falcon", {"alibi": True, "multi_query": False, "num_kv_heads": 4}),  # stock raises
    ],
)
def test_a_static_cache_whose_first_call_has_one_token(family, options):
    """Its other places are empty, and not seen."""
    stock = build(family, **options)
    ours, ids = patch(copy.deepcopy(stock)), prompt(length=4)
    cache = StaticCache(config=ours.config, max_cache_len=32)
    with torch.no_grad():
        truth = stock(ids, use_cache=False).logits
        found = [ours(ids[:, i : i + 1], past_key_values=cache).logits for i in range(4)]
    assert apart(torch.cat(found, 1), truth) < 1e-4


@pytest.mark.parametrize("pieces", [1, 2])
def test_derivatives_that_go_forward(pieces):
    """Kernels outside of PyTorch know nothing of them, so they compute nothing then."""
    stock = build("gemma2").requires_grad_(False)
    ours, ids = patch(copy.deepcopy(stock)), prompt(length=9)
    embedded = stock.get_input_embeddings()(ids)
    direction = torch.randn(embedded.shape, generator=torch.Generator().manual_seed(1))
    found = []
    for model in (stock, ours):
        cache = DynamicCache(config=model.config)
        with forward_ad.dual_level():
            start = 8 if pieces == 2 else 0
            if start:
                model(ids[:, :start], past_key_values=cache)
            given = forward_ad.make_dual(embedded[:, start:], direction[:, start:])
            found.append(forward_ad.unpack_dual(model(inputs_embeds=given, past_key_values=cache).logits).tangent)
    assert apart(found[1], found[0]) < 1e-4


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_step_on_a_growing_cache_is_one_graph(family, pairs):
    """Compiled, and with ordinary steps before and after it."""
    ours, ids = pairs(family)[1], prompt(length=30)
    torch._dynamo.reset()
    counters.clear()
    compiled, cache = torch.compile(ours, backend="eager", fullgraph=True), DynamicCache(config=ours.config)
    with torch.no_grad():
        truth = ours(ids).logits
        found = [ours(ids[:, :20], past_key_values=cache).logits]
        for place in range(20, 30):
            call = compiled if 22 <= place < 27 else ours
            found.append(call(ids[:, place : place + 1], past_key_values=cache).logits)
    assert apart(torch.cat(found, 1), truth) < 1e-4
    assert counters["stats"]["unique_graphs"] <= 2, "the second is for any length"
    torch._dynamo.reset()
