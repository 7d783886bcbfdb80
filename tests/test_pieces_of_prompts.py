"""Prompts in pieces, where a budget asks for them: what is chosen, the tokens, calls that do not fit, memory."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import build, entry, greedy, left_padded, prompt, relative_error
from planned_sizes import IN_PIECES, LONG, PIECE
from test_planner import CLOSE
from transformers import AutoModelForCausalLM, GenerationMixin

from hf_accel_patch import (
    GQA,
    AlreadyPatched,
    HfAccelError,
    KVCache,
    Quantize,
    Speculative,
    load,
    patch,
    plan,
    report,
    unpatch,
)
from hf_accel_patch.api import parse
from hf_accel_patch.families import bind
from hf_accel_patch.passes.prefill import InChunks
from hf_accel_patch.planning import budget
from hf_accel_patch.planning.memory import Estimates

HERE = Path(__file__).parent
SMALL = (32, 16)  # tokens of pieces, for tiny models
UNSEEN = 2 << 20  # bytes that libraries take for a product with one of these models' weights, which no plan knows
TOKENS = 100
LLAMA_8B = {"model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336}
LLAMA_8B |= {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "dtype": "bfloat16"}
LLAMA_8B |= {"max_position_embeddings": 131072, "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}
WITHOUT_MASKS = "_mask_length" in inspect.getsource(GenerationMixin.generate)  # transformers that drop masks of ones
CACHES = {"exact": {}, "stock's": {"cache": False}, "int8": {"cache": "int8"}, "int4": {"cache": "int4"}}
FAMILIES = (
    "llama",
    "mistral",
    "gemma2",
    "gpt_oss",
    "deepseek_v3",
    "gpt2",
    "bloom",
    "falcon",
    "qwen3_next",
    "falcon_h1",
)


@pytest.fixture
def small(monkeypatch):
    """Pieces of a few tokens."""
    monkeypatch.setattr(budget, "CHUNKS", SMALL)


def with_pieces(passes, tokens):
    return tuple(dataclasses.replace(one, chunk_tokens=tokens) if one.name == "prefill" else one for one in passes)


def limit(model, tokens=TOKENS, chunk=SMALL[-1], **options):
    """The bytes that it takes with prompts in pieces of so many tokens."""
    return Estimates(bind(model), tokens).of(with_pieces(parse(options), chunk)).peak


def budgeted(model, **options):
    """Patched so that prompts are read in the smallest pieces."""
    patch(model, budget=limit(model, **options), context=TOKENS, **options)
    assert entry(report(model).to_dict(), "prefill")["chunk_tokens"] == SMALL[-1]
    return model


def lengths(model, call):
    """How many tokens each forward of a call reads."""
    found = []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: found.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    call()
    hook.remove()
    return found


# What is chosen


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    folder = tmp_path_factory.mktemp("8B")
    (folder / "config.json").write_text(json.dumps(LLAMA_8B))
    return folder


def test_a_prompt_of_16384_tokens_of_8_billion_weights_fits_into_6_gib(large):
    planned = plan(large, budget="6GiB", context=16384)
    row, reading = (entry(planned.to_dict(), name) for name in ("budget", "prefill"))
    assert row["bytes_after"] <= 6 * 2**30 and planned.memory.fits(planned.memory.asked)
    assert row["chunk_tokens"] == reading["chunk_tokens"] > 256 and reading["exact"]
    assert row["chosen"] == f"weights and cache in int4, prompts in pieces of {row['chunk_tokens']}"
    assert "weights and cache in int4 needs 7.35 GiB;" in row["why"] and row["holds_for"] == "generate"
    assert planned.memory.asked.peak == row["bytes_after"] and str(row["chunk_tokens"]) in str(planned)
    with pytest.raises(HfAccelError, match="prompts in pieces of 256"):
        plan(large, budget="5GiB", context=16384)


def test_pieces_come_before_what_changes_outputs(large):
    whole = plan(large, context=16384).memory.asked.peak
    assert entry(plan(large, context=16384, budget=whole).to_dict(), "budget")["chosen"] == "exact"
    row = entry(plan(large, context=16384, budget=whole - 1).to_dict(), "budget")
    assert row["exact"] and row["chosen"] == "exact, prompts in pieces of 4096"


def test_the_largest_piece_that_fits(small):
    model = build("llama")
    for chunk in SMALL:
        needed = limit(model, chunk=chunk)
        row = entry(plan(model, budget=needed, context=TOKENS).to_dict(), "budget")
        assert row["chunk_tokens"] == chunk and row["exact"] and row["bytes_after"] == needed
    short = plan(model, budget=plan(model, context=SMALL[-1]).memory.asked.peak, context=SMALL[-1])
    assert "chunk_tokens" not in entry(short.to_dict(), "budget"), "there is nothing to cut"


@pytest.mark.parametrize(
    "options",
    [{"attention": False}, {"cache": "sinks:64"}, {"rope": "dynamic:4"}],
    ids=["no attention", "sinks", "frequencies by length"],
)
def test_what_pieces_would_change_is_not_read_in_pieces(options, small):
    with pytest.raises(HfAccelError, match="too small") as raised:
        plan(build("llama"), budget=1, context=TOKENS, **options)
    assert "pieces" not in str(raised.value)


def test_a_model_that_does_not_go_on_from_a_piece(small):
    with pytest.raises(HfAccelError, match="too small") as raised:
        plan(build("jamba"), budget=1, context=TOKENS)
    assert "pieces" not in str(raised.value)


def test_load_and_the_environment(small, tmp_path, on):
    model = build("llama")
    model.save_pretrained(tmp_path)
    needed = limit(model)
    expected = greedy(model, prompt(TOKENS), 8)
    loaded = [load(tmp_path, budget=needed, context=TOKENS)]
    on(BUDGET=needed, CONTEXT=TOKENS)
    for each in [*loaded, AutoModelForCausalLM.from_pretrained(tmp_path)]:
        row = entry(report(each).to_dict(), "budget")
        assert row["chunk_tokens"] == SMALL[-1] and row["exact"]
        assert torch.equal(greedy(each, prompt(TOKENS), 8), expected)


def test_a_pass_that_is_refused_under_the_environment_changes_nothing(tmp_path, on):
    build("codegen").save_pretrained(tmp_path)
    on(BUDGET="1GiB", CONTEXT=64, GQA=1)
    described = report(AutoModelForCausalLM.from_pretrained(tmp_path)).to_dict()
    assert "reason" in entry(described, "gqa")
    assert entry(described, "budget")["exact"] and entry(described, "budget")["chosen"] == "exact"
    on(CACHE="int8")
    row = entry(report(AutoModelForCausalLM.from_pretrained(tmp_path)).to_dict(), "budget")
    assert not row["exact"] and row["chosen"] == "what was asked for"


# What comes out


@pytest.mark.parametrize("model_type", FAMILIES)
def test_tokens_are_those_of_stock(model_type, small):
    model = build(model_type)
    stock = greedy(model, prompt(TOKENS), 8, use_cache=True), greedy(model, tokens=8, **left_padded(90, 41, 7))
    budgeted(model)
    found = []
    read = lengths(model, lambda: found.append(greedy(model, prompt(TOKENS), 8, use_cache=True)))
    assert read[:7] == [16] * 6 + [4] and read[7:] == [1] * 7
    assert torch.equal(found[0], stock[0])
    assert torch.equal(greedy(model, tokens=8, **left_padded(90, 41, 7)), stock[1])
    assert model.generation_config.prefill_chunk_size is None
    assert "_prefill" not in vars(unpatch(model))


@torch.no_grad()
@pytest.mark.parametrize("kind", CACHES)
def test_every_cache(kind, small):
    """Logits after the prompt: those of the whole one; with a quantized cache, those of transformers' own chunks."""
    ids, many = prompt(TOKENS + 60), {"max_new_tokens": 3, "return_dict_in_generate": True, "output_logits": True}
    whole = torch.stack(build("llama").generate(ids, **many).logits)
    found = budgeted(build("llama"), **CACHES[kind]).generate(ids, **many)
    ours, quantized = torch.stack(found.logits), kind in ("int8", "int4")
    assert found.past_key_values.get_seq_length() == ids.shape[1] + 2
    if quantized:
        plain = patch(build("llama"), **CACHES[kind])
        assert relative_error(ours, whole) > 1e-3 and lengths(plain, lambda: plain.generate(ids, **many))[0] == 160
        whole = torch.stack(plain.generate(ids, prefill_chunk_size=SMALL[-1], **many).logits)
    assert relative_error(ours, whole) < 1e-4


def test_prefixes_drafts_and_other_ways(small):
    ids = torch.cat([prompt(30)] * 4, 1)
    ways = {"beams": {"num_beams": 3}, "lookup": {"prompt_lookup_num_tokens": 3}, "own": {"prefill_chunk_size": 7}}
    ways |= {"static": {"cache_implementation": "static"}, "no cache": {"use_cache": False}, "plain": {}}
    stock = build("llama")
    expected = {name: greedy(stock, ids, 12, **way) for name, way in ways.items()}
    model = budgeted(build("llama"), cache=KVCache(prefixes="64MB"), speculative=Speculative("ngram"))
    for _ in range(2):
        for name, way in ways.items():
            assert torch.equal(greedy(model, ids, 12, **way), expected[name]), name
    read = lengths(model, lambda: greedy(model, torch.cat([ids, prompt(50, seed=3)], 1), 2))
    assert max(read) <= 16 and (sum(read) < 80 or not WITHOUT_MASKS), "what is known is not read again"


def test_calls_that_do_not_fit_are_read_whole(small):
    model = budgeted(build("llama"))
    ids, many = prompt(TOKENS), {"max_new_tokens": 2, "return_dict_in_generate": True}
    embedded = model.get_input_embeddings()(ids)
    calls = {
        "hidden states": lambda: model.generate(ids, output_hidden_states=True, **many),
        "attentions": lambda: model.generate(ids, output_attentions=True, **many),
        "static": lambda: model.generate(ids, cache_implementation="static", disable_compile=True, **many),
        "no cache": lambda: model.generate(ids, use_cache=False, **many),
        "a call of the model": lambda: model(input_ids=ids),
    }
    for name, call in calls.items():
        assert lengths(model, call)[0] == TOKENS, name
    model.generate(inputs_embeds=embedded, **many)
    assert lengths(model, lambda: model.generate(prompt(16), **many)) == [16, 1], "it is short"


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_vectors_that_peft_puts_before_a_prompt(kind, small):
    """They come with the first piece only, and the mask of each piece is too short for them."""
    peft = pytest.importorskip("peft")
    kinds = {"prompt": peft.PromptTuningConfig, "prefix": peft.PrefixTuningConfig}

    def made():
        torch.manual_seed(0)
        return peft.get_peft_model(build("llama"), kinds[kind](task_type="CAUSAL_LM", num_virtual_tokens=5)).eval()

    given = {"input_ids": prompt(TOKENS), "attention_mask": torch.ones(1, TOKENS, dtype=torch.long)}
    expected = made().generate(**given, max_new_tokens=8, do_sample=False)
    assert torch.equal(budgeted(made()).generate(**given, max_new_tokens=8, do_sample=False), expected)


@pytest.mark.parametrize(("unread", "wanted"), [(40, 1), (40, 3), (33, 4), (48, 16), (100, 9), (17, 2)])
def test_the_last_chunk_has_all_logits_that_are_wanted(unread, wanted):
    size = InChunks(16).size(unread, wanted)
    assert size is not None and size <= 16
    last = unread - (unread - 1) // size * size
    assert wanted <= last <= size
    assert InChunks(16).size(40, 17) is None


# Plans of patched models


def test_a_plan_of_a_patched_model_says_what_is_on(small):
    model = budgeted(build("llama"))
    needed = dataclasses.asdict(vars(model)["_hf_accel_patch"].asked[0])["limit"]
    for options in ({}, {"budget": needed, "context": TOKENS}):
        planned = plan(model, **options)
        assert not planned.steps and planned.memory.asked.peak == needed
        rows = {row["pass"]: row["reason"] for row in planned.to_dict()["passes"]}
        assert rows["prefill"] == rows["attention"] == rows["cache"] == "it is on already"
        assert "not asked for" in rows["quantize"]
    with pytest.raises(AlreadyPatched):
        plan(model, quantize="int8")


def test_stock_of_a_patched_model_is_that_of_the_unpatched_one():
    def stock(planned):
        return dict(planned.memory.sizes)["stock"]

    model = build("bloom")
    before = stock(plan(model, context=TOKENS))
    assert stock(plan(patch(model, context=TOKENS))) == before


@pytest.mark.parametrize(
    ("model_type", "options"),
    [
        ("bloom", {"context": 2048}),  # attention that was hand-written: no pieces of 1024 are needed any more
        ("mpt", {"cache": "int8"}),
        ("gpt2", {"gqa": 1}),  # its class knows no key/value heads
        ("llama", {"gqa": GQA(1, originals="discard")}),
        ("llama", {"quantize": Quantize("int8", originals="keep")}),
    ],
    ids=str,
)
def test_a_plan_of_a_patched_model_has_the_sizes_of_the_plan_before(model_type, options):
    model = build(model_type)
    before = plan(model, **options).memory
    after = plan(patch(model, **options)).memory
    assert after.asked.cache == before.asked.cache and after.asked.activations == before.asked.activations
    assert abs(after.asked.weights / before.asked.weights - 1) < 0.002  # biases that were merged
    assert not [size for _, size in after.sizes if isinstance(size, str)], "no scheme is refused"


def test_a_dequantized_model_is_named_as_one():
    model = patch(build("llama"), quantize="int8")
    model.dequantize()
    with pytest.raises(AlreadyPatched, match="dequantized"):
        plan(model)


# Memory


def _measured(*families, way=""):
    """As tests/test_planner.py does."""
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent)}
    command = [sys.executable, str(HERE / "planned_sizes.py"), "--pieces" + (f"={way}" if way else ""), *families]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def _compare(rows, count):
    assert len(rows) == count
    for row in rows:
        said, measured = row["said"], row["measured"]
        assert row["chunk_tokens"] == PIECE and not row["problem"]
        assert abs(said["peak"] - measured["peak"]) < max(CLOSE["peak"] * measured["peak"], UNSEEN), row
        beside = measured["peak"] - measured["weights"]
        assert beside < 0.65 * (row["whole"] - measured["weights"]), f"{LONG} tokens at once take no more"


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process is measured on Linux only")
def test_a_prompt_in_pieces_takes_what_is_said_and_less_than_the_whole():
    _compare(_measured("llama", way="int4, int4 cache"), 1)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process is measured on Linux only")
def test_more_families_and_ways():
    names = ("llama", "gpt2", "gemma2", "mixtral", "deepseek_v3", "falcon", "bloom")
    _compare(_measured(*names), len(names) * len(IN_PIECES))
