"""A memory budget: the least lossy set that fits, what is fixed, what is said, what cannot fit."""

from __future__ import annotations

import re
from itertools import chain

import pytest
import torch
from cases import build as small
from cases import entry
from planned_sizes import build
from transformers import AutoModelForCausalLM

from hf_accel_patch import AlreadyPatched, HfAccelError, Quantize, load, patch, patched, plan, report, unpatch
from hf_accel_patch.families import bind
from hf_accel_patch.options import LADDER, from_text, parse
from hf_accel_patch.planning.budget import Budget, fitted, in_binary
from hf_accel_patch.planning.memory import Estimates

TOKENS = 256


def sizes(**options):
    """The peak that a plan gives for these options, in bytes."""
    return plan(build("llama"), context=TOKENS, **options).memory.asked.peak


def chosen(model):
    return entry(report(model).to_dict(), "budget")


def weights_of(model):
    return sum(tensor.nbytes for tensor in chain(model.parameters(), model.buffers()))


@pytest.mark.parametrize(
    ("roomy", "label", "quantized"),
    [
        ({}, "exact", ""),
        ({"quantize": "int8"}, "weights in int8", "int8"),
        ({"quantize": "int4"}, "weights in int4", "int4"),
    ],
)
def test_the_least_lossy_that_fits_is_taken(roomy, label, quantized):
    model = build("llama")
    assert patch(model, budget=sizes(**roomy), context=TOKENS) is model
    row, quantize = chosen(model), entry(report(model).to_dict(), "quantize")
    assert row["chosen"] == label and row["exact"] is (label == "exact")
    assert quantize.get("scheme", "") == quantized and ("reason" in quantize) is not bool(quantized)
    assert weights_of(model) == row["weight_bytes"] and row["bytes_after"] <= row["budget_bytes"]
    assert "reason" in entry(report(model).to_dict(), "gqa") and "reason" in entry(report(model).to_dict(), "rope")
    if quantized:
        assert "exact needs" in row["why"] and f"needs {in_binary(row['bytes_after'])}" in row["why"]


def test_candidates_go_from_the_least_lossy_on():
    budget = parse({"budget": 1})[0]
    assert isinstance(budget, Budget)
    labels = [each.label for each in budget.candidates if "stock" not in each.label]
    assert labels == [
        "exact",
        "cache in int8",
        "weights in int8",
        "weights and cache in int8",
        "cache in int4",
        "weights in int8, cache in int4",
        "weights in int4",
        "weights in int4, cache in int8",
        "weights and cache in int4",
    ]
    assert len(labels) == len(LADDER)
    assert [each.exact for each in budget.candidates[:3]] == [True, True, False]


def test_whatever_fits_less_is_more_lossy():
    """As the budget shrinks, the choice moves down the list, and what is chosen always fits."""
    view, places = bind(build("llama")), []
    names = [each.label for each in parse({"budget": 1})[0].candidates]
    for share in (1.0, 0.8, 0.6, 0.5, 0.45, 0.4):
        limit = int(share * sizes())
        row = dict(fitted(view, parse({"budget": limit, "context": TOKENS}))[0].facts)
        assert row["bytes_after"] <= limit
        places.append(names.index(row["chosen"]))
    assert places == sorted(places) and len(set(places)) > 2


def test_what_the_user_fixes_stays(monkeypatch):
    monkeypatch.setattr("hf_accel_patch.planning.budget.CHUNKS", ())  # the cache is what there is to choose
    limit = plan(build("llama"), context=1024, quantize="int8", cache="int4").memory.asked.peak
    model = patch(build("llama"), budget=limit, context=1024, quantize="int8")
    assert entry(report(model).to_dict(), "quantize")["scheme"] == "int8"
    assert entry(report(model).to_dict(), "cache")["kind"] == "int4"
    fixed = {"cache": "int8", "quantize": "int8"}
    assert len(parse({"budget": 1, **fixed})[0].candidates) == 1
    row = entry(plan(build("llama"), budget="1GiB", context=TOKENS, **fixed).to_dict(), "budget")
    assert row["chosen"] == "what was asked for" and not row["exact"]
    assert all("cache" not in each.label for each in parse({"budget": 1, "cache": True})[0].candidates)
    model = patch(build("llama"), budget=sizes(quantize="int4"), context=TOKENS, attention=False)
    assert entry(report(model).to_dict(), "attention")["reason"] == "switched off: attention=False"


def test_a_cache_that_would_not_pay_is_stocks():
    """Exact, but for the room for more tokens that ours keeps."""
    limit = sizes(cache=False)
    model = patch(build("llama"), budget=limit, context=TOKENS)
    row = chosen(model)
    assert row["exact"] and row["chosen"] == "exact with stock's cache"
    assert "does not fit into the budget" in entry(report(model).to_dict(), "cache")["reason"]


def test_what_cannot_fit_names_the_smallest_size_and_touches_nothing():
    model = build("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(HfAccelError, match="too small") as raised:
        patch(model, budget="100kB", context=TOKENS)
    least = int(re.search(r"\((\d+) bytes\)", str(raised.value))[1])
    assert "weights in" in str(raised.value) and f"{TOKENS} tokens" in str(raised.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not report(model).rows
    with pytest.raises(HfAccelError, match="too small"):
        patch(model, budget=least - 1, context=TOKENS)
    assert chosen(patch(model, budget=least, context=TOKENS))["bytes_after"] == least


def test_the_same_budget_again_changes_nothing_and_another_is_refused():
    model, limit = build("llama"), sizes(quantize="int8")
    patch(model, budget=limit, context=TOKENS)
    weights = model.model.layers[0].mlp.up_proj._buffers["weight"]
    patch(model, budget=limit, context=TOKENS)
    assert model.model.layers[0].mlp.up_proj._buffers["weight"] is weights
    for other in ({"budget": 2 * limit, "context": TOKENS}, {"budget": limit}, {}):
        with pytest.raises(AlreadyPatched):
            patch(model, **other)


def test_originals_that_are_kept_count():
    """Quantizing frees nothing then, so only the cache can become smaller."""
    model, small = build("llama"), sizes(cache="int4")
    with patched(model, budget=small, context=TOKENS):
        assert chosen(model)["chosen"] in ("cache in int8", "cache in int4")
    assert not report(model).rows
    with (
        pytest.raises(HfAccelError, match="originals of quantized weights would be kept"),
        patched(model, budget=sizes(quantize="int8"), context=TOKENS),
    ):
        pass
    kept = Quantize("int8", originals="keep")
    assert plan(model, quantize=kept, context=TOKENS).memory.asked.weights > weights_of(model)


def test_an_exact_choice_comes_off():
    model = build("llama")
    ids = torch.arange(40)[None] % 500
    before = model(ids).logits
    unpatch(patch(model, budget="1GiB", context=TOKENS))
    assert torch.equal(model(ids).logits, before) and not report(model).rows


def test_load_decides_before_it_reads(tmp_path):
    build("llama").save_pretrained(tmp_path)
    limit = sizes(quantize="int8")
    model = load(tmp_path, budget=limit, context=TOKENS)
    assert chosen(model)["chosen"] == "weights in int8" and weights_of(model) <= limit
    assert entry(report(model).to_dict(), "quantize")["scheme"] == "int8"
    patch(model, budget=limit, context=TOKENS)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(HfAccelError, match="too small"):
        load(tmp_path, budget="100kB", context=TOKENS)


def test_load_of_a_quantized_checkpoint_chooses_the_cache(tmp_path):
    patch(build("llama"), quantize="int8").save_pretrained(tmp_path)
    model = load(tmp_path, budget=sizes(quantize="int8", cache="int8"), context=TOKENS)
    assert chosen(model)["chosen"] == "cache in int8"
    assert entry(report(model).to_dict(), "cache")["kind"] == "int8"


def test_load_of_a_checkpoint_with_fewer_heads_of_our_own(tmp_path):
    """It says that it is quantized, and only its heads are fewer: weights are no choice while it is read."""
    patch(small("gpt2"), gqa=1).save_pretrained(tmp_path)
    assert "quantization_config" in (tmp_path / "config.json").read_text()
    model = load(tmp_path, budget="1GB", context=64)
    assert chosen(model)["chosen"] == "exact" and "reason" in entry(report(model).to_dict(), "quantize")
    with pytest.raises(HfAccelError, match="too small") as raised:
        load(tmp_path, budget=weights_of(model), context=64)
    assert "weights in" not in str(raised.value)


@pytest.mark.parametrize("keywords", [{"quantize": "int8"}, {"budget": 0}])
def test_load_merges_heads_before_it_quantizes(keywords, tmp_path):
    build("llama").save_pretrained(tmp_path)
    if "budget" in keywords:
        keywords = {"budget": sizes(quantize="int8", gqa=1), "context": TOKENS}
    model = load(tmp_path, gqa=1, **keywords)
    expected = patch(AutoModelForCausalLM.from_pretrained(tmp_path), gqa=1, **keywords)
    assert model.config.num_key_value_heads == 1
    assert entry(report(model).to_dict(), "quantize")["scheme"] == "int8"
    ids = torch.arange(40)[None] % 500
    assert torch.equal(model(ids).logits, expected(ids).logits)
    assert patch(model, gqa=1, **keywords) is model


def test_one_byte_is_a_size():
    """And not the word for true."""
    assert parse({"budget": from_text("budget", "1")})[0].limit == 1
    assert from_text("budget", "0") is False and from_text("cache", "1") is True


def test_a_model_without_a_cache_that_can_be_packed_gets_weights():
    """Kinds of passes that it cannot have are passed over."""
    model = small("mamba")
    limit = Estimates(bind(model), 64).of(parse({"quantize": "int8"})).peak
    patch(model, budget=limit, context=64)
    assert "weights in" in chosen(model)["chosen"] and "cache in" not in chosen(model)["chosen"]


@pytest.mark.parametrize("value", ["6XB", "lots", 0, -1, True, 1.5, [], "-3GiB"])
def test_bad_budgets_name_what_is_allowed(value):
    with pytest.raises(ValueError, match=r"budget=.*GiB"):
        patch(build("llama"), budget=value)


@pytest.mark.parametrize("keywords", [{"batch": 2}, {"budget": 10**9, "batch": 0}, {"budget": 10**9, "context": 0}])
def test_bad_counts(keywords):
    with pytest.raises(ValueError, match=r"batch|context"):
        patch(build("llama"), **keywords)


def test_sizes_are_rounded_up():
    assert in_binary(2**30) == "1.00 GiB" and in_binary(2**30 + 1) == "1.01 GiB"
    assert in_binary(1536) == "1.50 KiB" and in_binary(5) == "5 bytes"
