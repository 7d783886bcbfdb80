"""Recorded steps give the tokens of the ordinary ones: on a CPU, and with a simulated CUDA graph."""

import argparse
import copy
import gc
import logging
import pickle
import weakref

import pytest
import torch
from cases import build, entry, left_padded, prompt, tiny
from fingerprint import changes, fingerprint
from interpreter import INTERPRETED, interpreted, load
from simulated_graphs import CountingTapes, SimulatedRecorder
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CompileConfig, DynamicCache, GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from benchmarks import graphs as benchmark
from hf_accel_patch import KVCache, Quantize, Speculative, UnsupportedModel, patch, report, unpatch
from hf_accel_patch.kernels import cpu, cpu_decode, cpu_steps
from hf_accel_patch.ops import backends, dense, linear
from hf_accel_patch.ops.graphs import marked
from hf_accel_patch.ops.pacing import Pace
from hf_accel_patch.passes import drafting, drafts, graphs, replaying, rooms
from hf_accel_patch.passes.attention import attention_forward
from hf_accel_patch.passes.graphs import GRAPHS, decoding_call, identity

RECORDED = KVCache(graphs=True)
SLOW = pytest.mark.slow


@pytest.fixture(params=["graph", "tape"])
def kind(request):
    """What records."""
    if request.param == "tape" and cpu_steps.library() is None:
        pytest.skip(cpu_steps.why_not())
    return SimulatedRecorder if request.param == "graph" else CountingTapes


@pytest.fixture(autouse=True)
def _operators_only(monkeypatch, request):
    """What compiled kernels do, no dispatcher sees; on a CPU it is noted."""
    if without := "kind" not in request.fixturenames or request.getfixturevalue("kind") is SimulatedRecorder:
        for module in (cpu, cpu_decode):
            monkeypatch.setattr(module, "library", lambda width=None: None)
    monkeypatch.setattr(backends, "_triton", lambda: None)
    monkeypatch.setattr(rooms, "LEAST_VISIBLE", 16)  # so that short texts pass several of the lengths that steps see
    monkeypatch.setattr(replaying, "AHEAD", 8)
    yield
    if without:  # or other tests would find what was measured without kernels
        for measured in (linear.backend_for, dense._measured):
            measured.cache_clear()


@pytest.fixture(autouse=True)
def _texts_are_short(monkeypatch):
    passes(monkeypatch, 8)


def passes(monkeypatch, count):
    for kind in (SimulatedRecorder, CountingTapes):
        monkeypatch.setattr(kind, "passes", count)


@pytest.fixture
def made(monkeypatch, kind):
    """The recorders that were asked for."""
    recorders = []

    def recorder_for(device):
        recorders.append(kind(device))
        return recorders[-1]

    monkeypatch.setattr(graphs, "recorder_for", recorder_for)
    return recorders


def small():
    return build("llama", num_hidden_layers=2)


def generate(model, inputs=None, new=22, seed=0, **kwargs):
    inputs = prompt(20) if inputs is None else inputs
    inputs = inputs if isinstance(inputs, dict) else {"input_ids": inputs}
    torch.manual_seed(seed)
    return model.generate(**inputs, **({"do_sample": False, "max_new_tokens": new} | kwargs))


def replays(made):
    return sum(recorder.replays for recorder in made)


def said(model):
    return entry(report(model).to_dict(), "cache")


# Tokens


EVERY = ("qwen3", "gpt_neox", "opt", "gpt_bigcode", "deepseek_v3", "mixtral", "gemma2", "gpt_oss")


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "mistral", *(pytest.param(n, marks=SLOW) for n in EVERY)])
def test_tokens_are_those_of_stock(family, made):
    """Alone and left-padded, past several of the lengths that steps see."""
    model = tiny(family)
    for inputs in (prompt(20), left_padded(20, 11, 5)):
        truth = generate(model, inputs)
        patch(model, cache=RECORDED)
        before = replays(made)
        assert torch.equal(generate(model, inputs), truth)
        found = said(model)
        assert found["graphs"] == "on" and found["graphs_recorded"] >= 2 and found["graphs_replayed"] >= 16
        assert replays(made) - before == found["graphs_replayed"] and "graphs_not_used" not in found
        unpatch(model)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_transformers_attention_takes_recorded_steps(implementation, made):
    model, inputs = small(), left_padded(20, 11, 5)
    model.set_attn_implementation(implementation)
    truth = generate(model, inputs)
    patch(model, cache=RECORDED, attention=False)
    assert torch.equal(generate(model, inputs), truth) and replays(made) >= 16


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_quantized_weights_are_recorded(scheme, made):
    model = small()
    patch(model, quantize=Quantize(scheme, originals="keep"))
    truth = generate(model)
    unpatch(model)
    patch(model, quantize=scheme, cache=RECORDED)
    assert torch.equal(generate(model), truth) and replays(made) >= 16


def test_sampled_tokens_are_those_of_stock(made):
    model, options = small(), {"do_sample": True, "top_k": 0, "temperature": 0.8}
    truths = [generate(model, seed=seed, **options) for seed in range(2)]
    assert not torch.equal(*truths)
    patch(model, cache=RECORDED)
    for seed, truth in enumerate(truths):
        assert torch.equal(generate(model, seed=seed, **options), truth)
    assert replays(made) >= 32


def test_the_next_call_replays_what_was_recorded(made):
    """Other prompts, shorter and longer, and another batch size in between."""
    model = small()
    inputs = [prompt(20), prompt(9, seed=1), prompt(26, seed=2)]
    truths = [generate(model, each, 20) for each in inputs]
    pair = generate(model, left_padded(12, 7))
    patch(model, cache=RECORDED)
    for each, truth in zip(inputs, truths, strict=True):
        assert torch.equal(generate(model, each, 20), truth)
    recorded = said(model)["graphs_recorded"]
    assert len(made) == 2 and recorded <= 4, "one to ask, one to record"
    assert torch.equal(generate(model, inputs[0], 20), truths[0]) and said(model)["graphs_recorded"] == recorded
    assert torch.equal(generate(model, left_padded(12, 7)), pair)
    assert len(vars(model)[GRAPHS].rooms) == 1


def test_a_cache_goes_on_and_its_views_stay(made):
    """A cache that is returned is handed in again, grows out of its room, and is not written to by the next call."""
    model, first = small(), prompt(20)
    truth = generate(model, first, 60)
    patch(model, cache=RECORDED)
    cache = DynamicCache()
    half = generate(model, first, 20, past_key_values=cache)
    before = replays(made)
    assert before > 8 and cache.get_seq_length() == half.shape[1] - 1
    assert torch.equal(generate(model, half, 40, past_key_values=cache), truth) and replays(made) > before + 20
    keys = cache.layers[0].keys
    held = keys.clone()
    del cache
    gc.collect()
    generate(model, prompt(30, seed=3), 40)
    assert torch.equal(keys, held)


def test_ordinary_calls_in_between(made):
    """A call of the model itself is an ordinary one, and what it leaves in the cache counts."""
    model, first = small(), prompt(20)
    truth = generate(model, first, 24)
    patch(model, cache=RECORDED)
    cache = DynamicCache()
    half = generate(model, first, 12, past_key_values=cache)
    count = replays(made)
    with torch.no_grad():
        best = model(half[:, -1:], past_key_values=cache).logits[:, -1:].argmax(-1)
    assert replays(made) == count and torch.equal(best, truth[:, 32:33])
    cache.crop(-3)
    again = generate(model, truth[:, :31], 13, past_key_values=cache)
    assert torch.equal(again, truth) and replays(made) > count


def test_beams_and_chunks_are_as_before(made):
    model = small()
    beams, chunks = generate(model, num_beams=3), generate(model, prefill_chunk_size=6)
    patch(model, cache=RECORDED)
    assert torch.equal(generate(model, num_beams=3), beams)
    assert torch.equal(generate(model, prefill_chunk_size=6), chunks) and replays(made) > 10


def test_a_cache_that_others_move_is_left_alone(made):
    """As where sequences change places at every step. It is not recorded again and again."""

    class Reordering(LogitsProcessor):
        def __call__(self, ids, scores):
            if cache.get_seq_length():
                cache.reorder_cache(torch.tensor([1, 0]))
                cache.reorder_cache(torch.tensor([1, 0]))
            return scores

    model, inputs, moving = small(), left_padded(20, 11), LogitsProcessorList([Reordering()])
    truth = generate(model, inputs, 30)
    patch(model, cache=RECORDED)
    cache = DynamicCache(config=model.config)
    assert torch.equal(generate(model, inputs, 30, past_key_values=cache, logits_processor=moving), truth)
    found = said(model)
    assert found["graphs_recorded"] <= 1 + replaying.MOVES and any("move" in why for why in found["graphs_not_used"])


def test_inference_mode_and_ordinary_calls_share_a_model(made):
    model = small()
    truth = generate(model)
    patch(model, cache=RECORDED)
    with torch.inference_mode():
        assert torch.equal(generate(model), truth)
    assert torch.equal(generate(model), truth)
    with torch.inference_mode():
        assert torch.equal(generate(model), truth)
    assert replays(made) > 45


# Speculative decoding


def as_many_as(limit):
    return lambda self, guesses, *rest: min(max(guess.most for guess in guesses), limit)


@pytest.mark.parametrize("drafted", [1, 3, 6, 12])
def test_drafts_are_verified_by_recorded_passes(drafted, made, monkeypatch):
    monkeypatch.setattr(Pace, "choose", as_many_as(drafted))
    passes(monkeypatch, 3)
    model, inputs = small(), torch.cat([prompt(10)] * 3, 1)
    truth = generate(model, inputs, 44)
    patch(model, cache=RECORDED, speculative="ngram")
    assert torch.equal(generate(model, inputs, 44), truth)
    room = next(iter(vars(model)[GRAPHS].rooms))
    width = next(each for each in replaying.WIDTHS if each > drafted)
    assert sum(step.recorded.replays for (tokens, *_), step in room.steps.items() if tokens == width) > 2
    assert entry(report(model).to_dict(), "speculative")["acceptance"] >= 0


def test_drafts_of_a_copy_are_recorded_too(made, monkeypatch):
    """On the model's own cache, beside its steps; another copy records anew."""
    monkeypatch.setattr(Pace, "choose", as_many_as(3))
    monkeypatch.setattr(drafts, "DOUBT", 0.0)
    passes(monkeypatch, 3)
    model, inputs = small(), prompt(20)
    truth = generate(model, inputs, 44)
    patch(model, cache=RECORDED, speculative="self")
    for _ in range(2):
        found = generate(model, inputs, 44)
        with torch.no_grad():
            model.model.norm.weight.mul_(1)  # which may be another weight now
        (room,) = vars(model)[GRAPHS].rooms
        theirs = [step for (*_, of), step in room.steps.items() if of is not None]
        assert sum(step.recorded.replays for step in theirs) > 5 and len(theirs) <= 3
        assert torch.equal(found, truth)
    unpatch(model)
    assert GRAPHS not in vars(model)


@pytest.mark.parametrize("wider, full, recorded", [(1, (), 1), (0, (), 2), (1, (4, 4), 2)])
def test_a_wider_pass_serves_until_another_pays(wider, full, recorded, made, monkeypatch):
    monkeypatch.setattr(replaying, "WIDER", wider)
    monkeypatch.setattr(rooms, "LEAST_VISIBLE", 256)
    stock, ids, at = small(), prompt(60), 20
    model = patch(copy.deepcopy(stock), cache=RECORDED)
    caches = [DynamicCache(config=stock.config) for _ in range(2)]
    with torch.no_grad():
        for each, cache in zip((stock, model), caches, strict=True):
            each(ids[:, :at], past_key_values=cache)
        decoding = graphs.begin(model, GenerationConfig(max_length=1000, use_cache=True))
        for width in (8, 8, 3, 3, 3, 3, *full):
            given = {"input_ids": ids[:, at : at + width], "use_cache": True}
            expected, found = stock(past_key_values=caches[0], **given), decoding(past_key_values=caches[1], **given)
            assert found.logits.shape == expected.logits.shape
            assert (found.logits - expected.logits).abs().max() < 1e-4
            at += width
    assert said(model)["graphs_recorded"] == recorded and said(model)["graphs_replayed"] >= 4


def test_sequences_apart_are_recorded(made, monkeypatch):
    """Each at its own place, padded on the left."""
    monkeypatch.setattr(Pace, "choose", as_many_as(3))
    model = small()
    for inputs in (torch.cat([torch.cat([prompt(10, seed=s)] * 3, 1) for s in range(2)]), left_padded(24, 11)):
        truth = generate(model, inputs, 32)
        patch(model, cache=RECORDED, speculative="ngram")
        calls, inner = [], drafting.decode_apart
        with monkeypatch.context() as here:
            here.setattr(
                drafting, "decode_apart", lambda *args, calls=calls, inner=inner: (calls.append(1), inner(*args))
            )
            assert torch.equal(generate(model, inputs, 32), truth)
        assert calls and said(model)["graphs_replayed"] > 10
        unpatch(model)


@pytest.mark.parametrize("family", ["mistral", pytest.param("gemma2", marks=SLOW)])
def test_windows_go_on_after_drafts_and_ordinary_calls(family, made, monkeypatch):
    """Tokens are taken back beyond the window, and what a layer holds afterwards is what it would hold without."""
    monkeypatch.setattr(Pace, "choose", as_many_as(3))
    model, inputs = tiny(family), torch.cat([prompt(7)] * 3, 1)
    patch(model, speculative="ngram")
    plain, found = DynamicCache(config=model.config), DynamicCache(config=model.config)
    truth = generate(model, inputs, 30, past_key_values=plain)
    unpatch(model)
    patch(model, cache=RECORDED, speculative="ngram")
    assert torch.equal(generate(model, inputs, 30, past_key_values=found), truth) and replays(made) > 5
    for mine, theirs in zip(found.layers, plain.layers, strict=True):
        assert mine.keys.shape == theirs.keys.shape and mine.get_seq_length() == theirs.get_seq_length()
        assert torch.allclose(mine.keys, theirs.keys, atol=1e-4) and torch.allclose(
            mine.values, theirs.values, atol=1e-4
        )
    with torch.no_grad():
        after = [model(truth[:, -1:], past_key_values=cache).logits for cache in (found, plain)]
    assert torch.allclose(*after, atol=1e-4)


@pytest.mark.parametrize("family", ["mistral", pytest.param("gemma2", marks=SLOW), pytest.param("gpt_oss", marks=SLOW)])
def test_windows_over_a_cache_that_knows_of_none(family, made):
    """A cache that was made without a configuration keeps all tokens, and the model hides those behind its windows."""
    model = tiny(family)
    truth = generate(model, prompt(40), 40, past_key_values=DynamicCache())
    patch(model, cache=RECORDED)
    assert torch.equal(generate(model, prompt(40), 40, past_key_values=DynamicCache()), truth)
    assert said(model)["graphs"] == "on" and said(model)["graphs_replayed"] >= 20


def test_windows_that_are_not_the_models_are_not_recorded(made):
    model, others = tiny("mistral"), DynamicCache(config=build("mistral", sliding_window=4).config)
    truth = generate(model, prompt(40), 20, past_key_values=copy.deepcopy(others))
    patch(model, cache=RECORDED)
    assert torch.equal(generate(model, prompt(40), 20, past_key_values=others), truth)
    assert "a layer of the cache has another window than the model's" in said(model)["graphs_not_used"]


def test_graphs_are_on_where_there_are_any_and_nobody_says_otherwise(made):
    model = small()
    truth = generate(model)
    assert torch.equal(generate(patch(model)), truth) and replays(made)
    before = replays(made)
    unpatch(model)
    for cache in (KVCache(graphs=False), "int8", False):
        generate(patch(model, cache=cache))
        unpatch(model)
    assert replays(made) == before


def test_short_texts_are_recorded_once_there_were_many(made, monkeypatch):
    passes(monkeypatch, 40)
    model = small()
    truth = generate(model)
    patch(model, cache=RECORDED)
    recorded = []
    for _ in range(4):  # of 22 tokens each
        assert torch.equal(generate(model), truth)
        recorded.append(said(model).get("graphs_recorded", 0))
    assert recorded[0] == 0 < recorded[1] and replays(made)


def test_passes_that_record_are_no_measure(made, monkeypatch):
    timed = []

    def noted(inner):
        return lambda self, *args: (timed.append(self.held_up), inner(self, *args))[1]

    monkeypatch.setattr(Pace, "choose", as_many_as(3))
    for name in ("timed", "passed"):
        monkeypatch.setattr(Pace, name, noted(vars(Pace)[name]))
    model = small()
    patch(model, cache=RECORDED, speculative="ngram")
    generate(model, torch.cat([prompt(10)] * 3, 1), 60)
    assert sum(timed) == said(model)["graphs_recorded"] + tried(model) and timed.count(False) > 4


def tried(model):
    return sum(step.tried for room in vars(model)[GRAPHS].rooms for step in room.steps.values())


# What does not fit


@pytest.mark.parametrize(
    "model_type, why",
    [("bloom", "forward takes no positions"), ("bamba", "LinearAttention"), ("llama4_text", "other ways")],
)
def test_a_model_that_does_not_fit_says_why(model_type, why, made):
    model = build(model_type)
    truth = generate(model)
    patch(model, cache=RECORDED)
    assert torch.equal(generate(model), truth) and not replays(made)
    assert why in said(model)["graphs"] and said(model)["graphs"].startswith("off: ")


@pytest.mark.parametrize(
    "options, why",
    [
        ({"use_cache": False}, "without a cache"),
        ({"disable_compile": True}, "compiled"),
        ({"compile_config": CompileConfig()}, "compiled"),
        ({"output_hidden_states": True, "return_dict_in_generate": True}, "hidden states"),
        ({"cache_implementation": "static"}, "StaticCache"),
    ],
)
def test_a_call_that_does_not_fit_says_why(options, why, made, monkeypatch):
    model = small()
    truth = generate(model, new=12, **options)
    patch(model, cache=RECORDED)
    found = generate(model, new=12, **options)
    assert torch.equal(*(getattr(each, "sequences", each) for each in (found, truth))) and not replays(made)
    assert any(why in reason for reason in said(model)["graphs_not_used"])
    assert torch.equal(generate(model), generate(small())) and replays(made), "and the next call is recorded"


def test_a_hook_is_called(made):
    model, calls = small(), []
    patch(model, cache=RECORDED)
    generate(model, new=20)
    count = replays(made)
    handle = model.get_output_embeddings().register_forward_hook(lambda *_: calls.append(1))
    generate(model, new=20)
    assert len(calls) == 20 and replays(made) == count and "a hook on" in next(iter(said(model)["graphs_not_used"]))
    handle.remove()
    generate(model, new=20)
    assert len(calls) == 20 and replays(made) > count


def test_short_outputs_are_not_recorded(made):
    model = small()
    patch(model, cache=RECORDED)
    generate(model, new=7)
    assert "graphs_recorded" not in said(model)


def test_a_large_cache_is_not_moved_on_a_cpu(monkeypatch, made, kind):
    monkeypatch.setattr(kind, "most_bytes", 10_000)
    model = small()
    truth = generate(model)
    assert torch.equal(generate(patch(model, cache=RECORDED)), truth) and not replays(made)
    assert any("more than 0 MiB" in reason for reason in said(model)["graphs_not_used"])


@pytest.mark.parametrize("cache", [True, RECORDED], ids=["by default", "asked for"])
def test_what_cannot_be_recorded_is_no_warning_unless_asked_for(cache, made, monkeypatch, warned):
    model, inner = small(), LlamaRMSNorm.forward
    monkeypatch.setattr(LlamaRMSNorm, "forward", lambda self, x: inner(self, x + 0 * x.sum().item()))
    generate(patch(model, cache=cache, linear=False))
    assert not replays(made) and "waits for its numbers" in said(model)["graphs"]
    assert any("run as before" in line for line in warned()) is (cache is RECORDED)


def test_whoever_looks_on_sees_every_operator(made):
    class Zeros(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            found = func(*args, **(kwargs or {}))
            return found * 0 if func is torch.ops.aten.silu.default else found

    model, hooked = patch(small(), cache=RECORDED), []
    truth = generate(model)
    count = replays(made)
    with Zeros():
        others = generate(model)
    assert count and replays(made) == count and not torch.equal(others, truth)
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *args: hooked.append(1))
    try:
        assert torch.equal(generate(model), truth) and replays(made) == count and len(hooked) > 22
    finally:
        handle.remove()
    assert torch.equal(generate(model), truth) and replays(made) > count


def test_other_options(monkeypatch):
    for options in ({"kind": "int8"}, {"kind": "sinks", "window": 64}, {"offload": 64}):
        with pytest.raises(ValueError, match=r"graphs with .*; allowed: the exact cache"):
            KVCache(graphs=True, **options)
    model = small()
    before = fingerprint(model)
    monkeypatch.setattr(cpu_steps, "_load", lambda: (None, "there is no C compiler"))
    with pytest.raises(UnsupportedModel, match=r"graphs=True: .* there is no C compiler") as raised:
        patch(model, cache=RECORDED)
    assert "leave graphs out" in raised.value.hint and not changes(before, fingerprint(model))


# Weights, copies, and the way back


def test_other_weights_are_recorded_anew(made):
    model, other = small(), small()
    patch(model, cache=RECORDED)
    generate(model)
    with torch.no_grad():
        for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
            theirs.mul_(1.1)
            mine.copy_(theirs)  # in place: replays see it
    recorded = said(model)["graphs_recorded"]
    assert torch.equal(generate(model), generate(other)) and said(model)["graphs_recorded"] == recorded
    with torch.no_grad():
        for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
            theirs.mul_(0.8)
            mine.data = theirs.clone()  # elsewhere: a replay would go on reading the old ones
    assert torch.equal(generate(model), generate(other)) and said(model)["graphs_recorded"] > recorded


def test_adapters_that_are_switched_are_recorded_anew(made):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    model = peft.get_peft_model(small(), config).eval()
    on = generate(model, new=14)
    with model.disable_adapter():
        off = generate(model, new=14)
    assert not torch.equal(on, off)
    patch(model, cache=RECORDED)
    assert torch.equal(generate(model, new=14), on) and replays(made) > 8
    with model.disable_adapter():
        assert torch.equal(generate(model, new=14), off)
    for layer in model.modules():
        if isinstance(getattr(layer, "scaling", None), dict):
            layer.scaling["default"] = 0.0  # in place, in a dictionary
    count = replays(made)
    assert torch.equal(generate(model, new=14), off) and replays(made) > count


def test_a_number_is_known_by_its_value(made):
    """Not by where it lies: another one may lie there later."""
    model = small()
    held = float("3.5"), float("3.5")
    model.model.norm.extra = held[0]
    first = identity(model)
    model.model.norm.extra = held[1]
    assert held[0] is not held[1] and identity(model) == first
    model.model.norm.extra = [held[0]]
    second = identity(model)
    model.model.norm.extra[0] = 2.5
    assert identity(model) != second != first


def test_copies_record_for_themselves_and_the_patch_comes_off(made):
    model = small()
    truth, before = generate(model), fingerprint(model)
    patch(model, cache=RECORDED)
    generate(model)
    twin = copy.deepcopy(model)
    assert vars(twin)[GRAPHS] is not vars(model)[GRAPHS] and not vars(twin)[GRAPHS].rooms
    assert not pickle.loads(pickle.dumps(vars(model)[GRAPHS])).rooms
    assert (
        vars(twin)["get_compiled_call"].__func__ is decoding_call and vars(twin)["get_compiled_call"].__self__ is twin
    )
    unpatch(model)
    assert not changes(before, fingerprint(model)) and GRAPHS not in vars(model)
    count = replays(made)
    assert torch.equal(generate(model), truth) and replays(made) == count
    assert torch.equal(generate(twin), truth) and replays(made) > count
    unpatch(twin)
    assert GRAPHS not in vars(twin) and "get_compiled_call" not in vars(twin)


def test_a_room_goes_when_nobody_needs_it(made):
    """At once: its buffers may be gigabytes, and where a collector finds a graph it may be in the middle of another."""
    model = small()
    patch(model, cache=RECORDED)
    generate(model, left_padded(20, 11))
    (room,) = map(weakref.ref, vars(model)[GRAPHS].rooms)
    gc.collect()
    gc.disable()
    try:
        unpatch(model)
        assert room() is None
    finally:
        gc.enable()


# What goes wrong


class Lying(SimulatedRecorder):
    """Its replays give what they gave at the capture: a number was taken for a tensor."""

    def __call__(self, function):
        found = super().__call__(function)
        found.replay()
        first = found.output.clone()
        replay, found.replay = found.replay, lambda: (replay(), found.output.copy_(first))[1]
        return found


class Failing(SimulatedRecorder):
    def __call__(self, function):
        function()
        raise RuntimeError("operation not permitted when stream is capturing\nmore")


class FailingLater(SimulatedRecorder):
    def __call__(self, function):
        found = super().__call__(function)
        found.replay = None  # not callable
        return found


@pytest.mark.parametrize(
    "kind, why",
    [(Lying, "other logits"), (Failing, "not permitted when stream is capturing"), (FailingLater, "replay failed")],
)
@pytest.mark.parametrize("options", [{}, {"speculative": "ngram"}])
def test_what_goes_wrong_costs_no_token(kind, why, options, monkeypatch, logged):
    monkeypatch.setattr(graphs, "recorder_for", kind)
    model, inputs = small(), left_padded(20, 11)
    truth = generate(model, inputs)
    patch(model, cache=RECORDED, **options)
    lines = logged(logging.WARNING)
    assert torch.equal(generate(model, inputs), truth) and torch.equal(generate(model, inputs), truth)
    assert why in said(model)["graphs"] and len([text for _, text in lines if why in text]) == 1
    assert not vars(model)[GRAPHS].rooms
    unpatch(model)
    assert torch.equal(generate(model, inputs), truth)


def test_what_a_wrong_recording_writes_is_taken_back(made, monkeypatch):
    """It runs behind the ordinary pass, over the same entries."""

    def blind(model, room, places, size, cache):
        return replaying_masks(model, room, places, size, cache) & (room.columns[:size] == places[:, :, None])[:, None]

    replaying_masks, model = replaying.masks, small()
    monkeypatch.setattr(replaying, "masks", blind)
    truth, cache = generate(model, new=30), DynamicCache(config=model.config)
    patch(model, cache=RECORDED)
    assert torch.equal(generate(model, new=30, past_key_values=cache), truth)
    assert "other logits" in said(model)["graphs"]
    expected = DynamicCache(config=model.config)
    generate(unpatch(model), new=30, past_key_values=expected)
    for ours, theirs in zip(cache.layers, expected.layers, strict=True):
        assert torch.allclose(ours.values, theirs.values, atol=1e-5)


@pytest.mark.parametrize("fault", ["item", "kept"])
def test_what_no_capture_takes_is_refused_before_it(fault, made, monkeypatch):
    model = small()
    truth, inner, kept = generate(model), type(model.model.norm).forward, []

    def forward(self, x):
        if fault == "item":
            x[0, 0, 0].item()
        else:
            kept[:] = [x * 1]
        return inner(self, x)

    monkeypatch.setattr(type(model.model.norm), "forward", forward)
    patch(model, cache=RECORDED, linear=False)
    assert torch.equal(generate(model), truth) and not replays(made)
    assert {"item": "waits for its numbers", "kept": "kept outside"}[fault] in said(model)["graphs"]


def test_what_is_not_a_number_beyond_the_text_is_not_seen(made):
    """Entries that an earlier text has left behind are cleared."""
    model = small()
    truth = generate(model, prompt(9), 20)
    patch(model, cache=RECORDED)
    generate(model, prompt(30), 24)
    (room,) = vars(model)[GRAPHS].rooms
    for pair in room._buffers:
        for buffer in pair:
            buffer.fill_(torch.nan)
    recorded = said(model)["graphs_recorded"]
    assert torch.equal(generate(model, prompt(9), 20), truth) and said(model)["graphs_recorded"] <= recorded + 2
    assert vars(model)[GRAPHS].rooms == [room]


# Beside other passes, and measured


def test_prefixes_and_a_copy_that_drafts(made):
    """Prompts that begin alike, and drafts that a copy of the model writes into the cache."""
    model, first = small(), prompt(40)
    second = torch.cat([first[:, :32], prompt(8, seed=4)], 1)
    truths = [generate(model, each, 30) for each in (first, second)]
    patch(model, cache=KVCache(graphs=True, prefixes="1MiB"), speculative=Speculative("self", scheme="int4"))
    for each, truth in zip((first, second), truths, strict=True):
        assert torch.equal(generate(model, each, 30), truth)
    assert replays(made) > 10 and vars(model)[GRAPHS].off == ""


EVERY = {"widths": replaying.WIDTHS, "apart": False}


def test_what_the_benchmark_measures(made, monkeypatch):
    monkeypatch.setattr(benchmark, "recorder_for", graphs.recorder_for)
    passes(monkeypatch, 4)
    asked = {"shape": "tiny", "layers": 1, "quantize": None, "batch": 2, "prompt": 40, "rounds": 2} | EVERY
    with torch.no_grad():
        rows = benchmark.measured(argparse.Namespace(**asked, dtype="float32", device="cpu", profile=False))
    assert [row["width"] for row in rows] == list(replaying.WIDTHS)
    assert all(row["replays"] == 2 and row["difference"] < 1e-3 and "reason" not in row for row in rows)


def test_the_benchmark_says_why_there_is_nothing(made, monkeypatch):
    monkeypatch.setattr(benchmark, "recorder_for", graphs.recorder_for)
    asked = {"shape": "tiny", "layers": 1, "quantize": None, "batch": 1, "prompt": 9, "rounds": 1} | EVERY
    options = argparse.Namespace(**asked, dtype="float32", device="cpu", profile=False)
    monkeypatch.setattr(graphs, "why_not", lambda *_: "a reason of this call")
    with torch.no_grad():
        assert benchmark.measured(options) == [{"reason": "a reason of this call"}]


@pytest.mark.skipif(not INTERPRETED, reason="kernels are interpreted on the CPU")
@pytest.mark.parametrize(
    "family, T, splits", [("llama", 1, True), ("gpt_oss", 4, True), ("llama", 16, True), ("mpt", 2, False)]
)
def test_a_recorded_step_takes_the_kernel_that_splits_the_keys(family, T, splits, monkeypatch):
    """Under a mask over all that is visible. What it does not take, PyTorch does."""
    prefill, kernels, calls = load("triton_prefill"), load("triton_decode"), []
    attend = kernels.attend
    monkeypatch.setattr(kernels, "attend", lambda *args: calls.append(1) or attend(*args))
    monkeypatch.setattr(backends, "_triton", lambda: prefill)
    draw = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, heads, n, 16, generator=draw) for heads, n in ((4, T), (2, 40), (2, 40)))
    mask = torch.rand(2, 1, T, 40, generator=draw) < 0.5
    mask[..., 0] = True
    module, options = tiny(family), {"s_aux": torch.randn(4, generator=draw)} if family == "gpt_oss" else {}
    if family == "mpt":
        options["position_bias"] = torch.randn(1, 4, 1, 40, generator=draw)
    with torch.no_grad(), interpreted():
        plain, _ = attention_forward(module, query, key, value, mask, **options)
        assert not calls
        with marked():
            found, _ = attention_forward(module, query, key, value, mask, **options)
    assert torch.allclose(found, plain, atol=1e-5) and bool(calls) == splits
