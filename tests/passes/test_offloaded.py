"""A cache whose older tokens lie in the host's memory: the model of these tests is taken to be elsewhere."""

import pytest
import torch
from cases import entry, greedy, left_padded, prompt, tiny
from fingerprint import changes, fingerprint

from hf_accel_patch import KVCache, UnsupportedModel, patch, report
from hf_accel_patch.ops.stored import Content
from hf_accel_patch.passes import cache as passes_cache
from hf_accel_patch.passes.layers import InPlaceSlidingWindowLayer
from hf_accel_patch.passes.offloaded_layers import OffloadedLayer

FAMILIES = ("llama", "gemma2", "gpt_oss", "deepseek_v3", "gptj", "bloom", "mpt")
EXACT = 1e-4  # of logits of about 1: parts are joined by their statistics, in float32


@pytest.fixture
def elsewhere(monkeypatch):
    monkeypatch.setattr(passes_cache, "HOST", "nowhere")


def read(model, width=200):
    """Logits of a padded batch read in parts, and the cache."""
    batch = left_padded(width, width - 70, width - 20)
    cache, found, end = None, [], 0
    for part in batch["input_ids"].split([150, 1, 1, 30, 18], dim=1):
        end += part.shape[1]
        mask = batch["attention_mask"][:, :end]
        with torch.no_grad():
            output = model(part, attention_mask=mask, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        found.append(output.logits)
    return torch.cat(found, 1)[:, 70:].double(), cache


@pytest.mark.parametrize("family", FAMILIES)
def test_it_answers_as_stock(family, elsewhere, monkeypatch):
    model = tiny(family)
    expected, _ = read(model)
    tokens = greedy(model, prompt(150), 8)
    patch(model, cache=KVCache(offload=64))
    fetched, inner = [], Content.unpacked
    monkeypatch.setattr(Content, "unpacked", lambda *args: (fetched.append(args[1:]), inner(*args))[1])
    found, cache = read(model)
    assert (found - expected).abs().max() < EXACT * expected.std()
    assert torch.equal(greedy(model, prompt(150), 8), tokens)
    kinds = {type(layer) for layer in cache.layers}
    assert OffloadedLayer in kinds and kinds <= {OffloadedLayer, InPlaceSlidingWindowLayer}
    assert all(layer._blocks() == 1 for layer in cache.layers if type(layer) is OffloadedLayer) and fetched


@pytest.mark.parametrize("bits", [8, 4])
def test_what_is_far_may_be_quantized(bits, elsewhere):
    models = [patch(tiny("llama"), cache=KVCache(f"int{bits}", recent=64, offload=offload)) for offload in (None, 64)]
    (near, _), (far, cache) = (read(model) for model in models)
    assert (far - near).abs().max() < EXACT * near.std(), "the same numbers, whose sums are in another order"
    assert cache.layers[0].bits == bits


def test_beams_and_crops_and_chats(elsewhere):
    model = tiny("llama")
    ways = ({"num_beams": 3}, {"prompt_lookup_num_tokens": 3}, {"prefill_chunk_size": 50})
    expected = [greedy(model, prompt(170), 8, **way) for way in ways]
    patch(model, cache=KVCache(offload=64, prefixes="1MiB"))
    for _ in range(2):
        assert all(torch.equal(greedy(model, prompt(170), 8, **way), e) for way, e in zip(ways, expected, strict=True))


def test_the_report_says_where_the_bytes_are(elsewhere):
    facts = {}
    for kind in ("exact", "int8"):
        model = patch(tiny("llama"), cache=KVCache(kind, offload=64))
        facts[kind] = entry(report(model).to_dict(), "cache")
        assert facts[kind]["exact"] == (kind == "exact")
    exact = facts["exact"]
    assert exact["bytes_after"] == exact["bytes_before"] * 128 // exact["context"]
    assert exact["host_bytes"] == exact["bytes_before"] - exact["bytes_after"] > facts["int8"]["host_bytes"] > 0


@pytest.mark.parametrize(
    "family, message", [("llama", "the model is in the host's memory"), ("mistral", "a sliding window of its own")]
)
def test_where_it_brings_nothing_it_is_refused(family, message):
    model = tiny(family)
    before = fingerprint(model)
    with pytest.raises(UnsupportedModel, match=rf"cache=KVCache\('exact', offload=64\): .*{message}"):
        patch(model, cache=KVCache(offload=64))
    assert not changes(before, fingerprint(model))
