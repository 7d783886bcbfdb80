"""Speculative decoding: the tokens of plain decoding, whatever is drafted, in everything that `generate` can do."""

import copy
import gc
import threading
import time
import warnings
import weakref
from pathlib import Path

import pytest
import torch
import transformers
from cases import FAMILIES, VOCABULARY, build, configuration, entry, left_padded, prompt, randomise, tiny
from fingerprint import changes, fingerprint
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)

import hf_accel_patch
from hf_accel_patch import KVCache, PrefixCache, Quantize, Speculative, UnsupportedModel, patch, plan, report, unpatch
from hf_accel_patch.ops.pacing import Guess, Pace
from hf_accel_patch.passes import apart as passes_apart
from hf_accel_patch.passes import drafting, drafts
from hf_accel_patch.passes.choosing import Draft
from hf_accel_patch.passes.drafts import ModelDrafter, NGramDrafter
from hf_accel_patch.passes.speculative import SPECULATING

MODEL = Path(hf_accel_patch.__file__).parent / "models" / "code-llama-8m"
BARE = {"attention": False, "cache": False}  # transformers' own attention and cache
MODES = ("right", "wrong", "mixed")
ROUNDING = 1e-3  # of float32 logits of about 1: passes over several tokens add up in another order
SLOW = pytest.mark.slow
SOON = ("llama", "mistral", "gemma2", "gpt_oss", "gpt2", "gptj", "bloom", "falcon_new", "mpt", "deepseek_v3")
EVERY = [pytest.param(name, marks=() if name in SOON else pytest.mark.slow) for name in FAMILIES]


@pytest.fixture
def always(monkeypatch):
    """Drafts are tried wherever there are any."""
    monkeypatch.setattr(Pace, "choose", as_many_as(4))


def as_many_as(limit):
    return lambda self, guesses, draft_cost=0.0: min(max(guess.most for guess in guesses), limit)


@pytest.fixture
def oracle(monkeypatch):
    """oracle(truth, mode): drafts are what stock says next, or never that, or that with faults."""

    def install(truth, mode):
        draw = torch.Generator().manual_seed(7)

        def tokens(self, most, *_):
            place, width = len(self.texts[0].tokens), min(most, 5)
            end = truth[:, place : place + width]
            if not end.shape[1]:
                return None
            return Draft(spoilt(end).tolist())

        def spoilt(end):
            fault = torch.rand(end.shape, generator=draw) < {"right": 0.0, "wrong": 1.0, "mixed": 0.25}[mode]
            return (end + fault.long() * 3) % VOCABULARY

        def of_row(self, row, ahead, most):
            place = len(self.texts[row].tokens) + len(ahead)
            found = spoilt(truth[row, place : place + min(most, 5)]).tolist()
            return found, Guess(0, 0.5, len(found))

        monkeypatch.setattr(Pace, "choose", as_many_as(5))
        monkeypatch.setattr(NGramDrafter, "of_row", of_row)
        monkeypatch.setattr(NGramDrafter, "first", tokens)
        monkeypatch.setattr(NGramDrafter, "draft", tokens)

    return install


def generate(model, inputs=None, new=16, seed=0, **kwargs):
    if "input_ids" not in kwargs:
        inputs = prompt() if inputs is None else inputs
        inputs = inputs if isinstance(inputs, dict) else {"input_ids": inputs}
    inputs = inputs or {}
    torch.manual_seed(seed)
    return model.generate(**inputs, **({"do_sample": False, "max_new_tokens": new, "use_cache": True} | kwargs))


def passes(model, call):
    """What the call returns, and how often it ran the model's head."""
    count = []
    handle = model.get_output_embeddings().register_forward_hook(lambda *_: count.append(1))
    try:
        return call(), len(count)
    finally:
        handle.remove()


def repeating(length=10, times=4):
    return torch.cat([prompt(length)] * times, 1)


# Tokens


@pytest.mark.parametrize("family", EVERY)
def test_tokens_are_those_of_stock(family, oracle):
    """Alone and padded with our cache and attention, and padded with transformers' own."""
    for inputs, options in ((prompt(), {}), (left_padded(), {}), (left_padded(), BARE)):
        model = tiny(family)
        truth, plain = passes(model, lambda model=model, inputs=inputs: generate(model, inputs))
        patch(model, speculative="ngram", **options)
        for mode in MODES:
            oracle(truth, mode)
            found, fewer = passes(model, lambda model=model, inputs=inputs: generate(model, inputs))
            assert torch.equal(found, truth), (mode, options)
            assert fewer <= plain if mode != "right" else fewer < plain / 2, mode
        said = entry(report(model).to_dict(), "speculative")
        assert "fallbacks" not in said and said["tokens"] > 16 and said["tokens_per_pass"] > 1


def longrope(**overrides):
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 64}
    rope |= {"short_factor": [1.0] * 8, "long_factor": [2.0 + i for i in range(8)]}
    lengths = {"max_position_embeddings": 256, "original_max_position_embeddings": 64}
    return build("phi3", rope_parameters=rope, **lengths, **overrides)


VARYING = {  # frequencies of rotary positions that are others beyond 64 tokens
    "longrope": longrope,
    "dynamic": lambda: build(
        "llama", max_position_embeddings=64, rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    ),
}  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"rope": False}], ids=["ours", "theirs"])
@pytest.mark.parametrize("kind", VARYING)
def test_drafts_keep_to_the_frequencies_of_each_token(kind, options, oracle):
    """No pass goes across the length at which frequencies change, alone or where one of two sequences is padded."""
    alone, padded = prompt(58), left_padded(58, 49)
    for inputs in (alone, padded):
        model = patch(VARYING[kind](), **options)
        truth, plain = passes(model, lambda model=model, inputs=inputs: generate(model, inputs, 24))
        model = patch(VARYING[kind](), speculative="ngram", **options)
        for mode in MODES:
            oracle(truth, mode)
            found, fewer = passes(model, lambda model=model, inputs=inputs: generate(model, inputs, 24))
            assert torch.equal(found, truth), mode
            assert mode != "right" or fewer < (plain * 2 / 3 if kind == "longrope" else plain), fewer


@pytest.fixture
def apart(monkeypatch):
    """How often the sequences of a batch went on at their own pace."""
    calls, inner = [], drafting.decode_apart
    monkeypatch.setattr(drafting, "decode_apart", lambda *args: (calls.append(1), inner(*args))[1])
    return calls


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "opt", "qwen2", "deepseek_v3"])
def test_each_sequence_goes_on_at_its_own_pace(family, oracle, apart, monkeypatch):
    """The first is drafted well, the second badly, the third not at all: the first needs few passes for its tokens."""
    model, inputs = tiny(family), left_padded()
    truth = generate(model, inputs, 40)
    patch(model, speculative="ngram")
    oracle(truth, "right")
    lengths, drafted = [], NGramDrafter.of_row

    def of_row(self, row, ahead, most):
        if row == 0:
            lengths.append(len(self.texts[0].tokens) + len(ahead))
        found, _ = drafted(self, row, ahead, most)
        found = [found, [(token + 1) % VOCABULARY for token in found], []][row]
        return found, Guess(0, 0.5, len(found))

    monkeypatch.setattr(NGramDrafter, "first", lambda self, most, pace: None)
    monkeypatch.setattr(NGramDrafter, "of_row", of_row)
    found, count = passes(model, lambda: generate(model, inputs, 40))
    assert torch.equal(found, truth) and apart == [1] and count == 40, "as many passes as the slowest needs"
    assert len(lengths) <= 8 and lengths[-1] - inputs["input_ids"].shape[1] > 30, (
        "five drafted tokens and one in a pass"
    )


class Guided(LogitsProcessor):
    """The second sequence is guided by the first."""

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        scores[1] = 1.5 * scores[1] - 0.5 * scores[0]
        return scores


@pytest.mark.parametrize("mode", MODES)
def test_a_processor_that_compares_sequences_sees_those_that_have_ended(mode, oracle, apart):
    model, inputs = tiny("llama"), left_padded()
    end = int(generate(model, inputs, 40)[0, 45])
    options = {"eos_token_id": end, "pad_token_id": 0, "logits_processor": LogitsProcessorList([Guided()])}
    truth = generate(model, inputs, 40, **options)
    patch(model, speculative="ngram")
    oracle(truth, mode)
    assert torch.equal(generate(model, inputs, 40, **options), truth) and not apart


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_transformers_attention_takes_sequences_of_different_lengths(implementation, oracle, apart):
    model, inputs = tiny("llama"), left_padded()
    model.set_attn_implementation(implementation)
    truth = generate(model, inputs)
    patch(model, speculative="ngram", attention=False)
    oracle(truth, "mixed")
    assert torch.equal(generate(model, inputs), truth) and apart == [1]


@pytest.mark.parametrize("model_type", ["openai-gpt", "xlm"])
def test_a_model_without_a_cache_is_refused(model_type):
    with pytest.raises(UnsupportedModel, match="no layer of it takes a cache"):
        patch(build(model_type), speculative="ngram")


@pytest.mark.parametrize("family", ["mistral", "bloom", "gemma2"])
def test_sequences_go_on_together_where_the_cache_or_the_attention_asks_for_it(family, oracle, apart):
    model, inputs = tiny(family), left_padded()
    truth = generate(model, inputs)
    patch(model, speculative="ngram")
    oracle(truth, "mixed")
    assert torch.equal(generate(model, inputs), truth) and not apart


def test_a_cache_that_is_handed_in_has_no_gaps(oracle, apart):
    model, inputs, cache = tiny("llama"), left_padded(), DynamicCache()
    truth = generate(model, inputs)
    patch(model, speculative="ngram")
    oracle(truth, "mixed")
    assert torch.equal(generate(model, inputs, past_key_values=cache), truth) and not apart
    assert cache.get_seq_length() == truth.shape[1] - 1
    assert torch.equal(generate(model, inputs), truth) and apart == [1]


def test_a_sequence_that_is_ahead_waits(oracle, apart, monkeypatch):
    """It keeps at most so many rows of logits."""
    monkeypatch.setattr(passes_apart, "LEAD", 8)
    model, inputs, most = tiny("llama"), left_padded(), []
    truth = generate(model, inputs, 40)
    patch(model, speculative="ngram")
    oracle(truth, "right")
    drafted, settle = NGramDrafter.of_row, passes_apart.Row.settle

    def settled(row):
        settle(row)
        most.append(len(row.logits))
        assert all(each.untyped_storage().nbytes() == each.nbytes for each in row.logits)

    monkeypatch.setattr(passes_apart.Row, "settle", settled)
    monkeypatch.setattr(NGramDrafter, "first", lambda self, most, pace: None)
    monkeypatch.setattr(
        NGramDrafter, "of_row", lambda self, row, *rest: drafted(self, row, *rest) if row else ([], Guess(0, 0.5, 0))
    )
    assert torch.equal(generate(model, inputs, 40), truth) and apart == [1]
    assert 6 <= max(most) <= 8 + 1


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "bloom", "gptj"])
def test_sampled_tokens_are_those_of_stock(family, oracle):
    options = {"do_sample": True, "top_k": 0, "temperature": 0.8}
    model = tiny(family)
    runs = [(inputs, seed) for inputs in (prompt(), left_padded()) for seed in range(3)]
    truths = [generate(model, inputs, seed=seed, **options) for inputs, seed in runs]
    assert len({str(truth.tolist()) for truth in truths}) == len(truths)
    patch(model, speculative="ngram")
    for mode in ("right", "mixed"):
        for (inputs, seed), truth in zip(runs, truths, strict=True):
            oracle(truth, mode)
            found, count = passes(model, lambda i=inputs, s=seed: generate(model, i, seed=s, **options))
            assert torch.equal(found, truth)
            assert count < 16


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt_oss", "falcon_alibi", "gpt2"])
def test_drafts_from_the_text_give_the_tokens_of_stock(family, always):
    model = tiny(family)
    batch = torch.cat([repeating(), repeating(8, 5)])
    for inputs in (repeating(), batch):
        expected = generate(model, inputs, 30)
        patch(model, speculative="ngram")
        assert torch.equal(generate(model, inputs, 30), expected)
        assert entry(report(model).to_dict(), "speculative")["acceptance"] >= 0
        unpatch(model)


class PerRow(StoppingCriteria):
    """The first row stops after five tokens, and each further one three later."""

    def __init__(self, start):
        self.start = start

    def __call__(self, input_ids, scores, **kwargs):
        return self.start + 5 + 3 * torch.arange(len(input_ids)) <= input_ids.shape[1]


class Counting(LogitsProcessor):
    """Its answer depends on how often it was called, and with what."""

    def __init__(self):
        self.calls, self.last = 0, None

    def __call__(self, input_ids, scores):
        assert self.last is None or torch.equal(input_ids[:, :-1], self.last), "a call was left out or made twice"
        self.calls, self.last = self.calls + 1, input_ids
        return scores.roll(self.calls, dims=-1)


CALLS = {
    "an end token": lambda truth, width: {"eos_token_id": int(truth[0, width + 6]), "pad_token_id": 0},
    "two end tokens": lambda truth, width: {"eos_token_id": truth[0, [width + 5, width + 9]].tolist()},
    "the end token at once": lambda truth, width: {"eos_token_id": int(truth[0, width])},
    "the end token last": lambda truth, width: {"eos_token_id": int(truth[-1, -1]), "pad_token_id": 9},
    "at least so many": lambda truth, width: {"eos_token_id": int(truth[0, width + 4]), "min_new_tokens": 9},
    "one token": lambda truth, width: {"max_new_tokens": 1},
    "two tokens": lambda truth, width: {"max_new_tokens": 2},
    "three tokens": lambda truth, width: {"max_new_tokens": 3},
    "a length in all": lambda truth, width: {"max_length": width + 7, "max_new_tokens": None},
    "rows that stop": lambda truth, width: {"stopping_criteria": StoppingCriteriaList([PerRow(width)])},
    "rows that stop, padded": lambda truth, width: {
        "stopping_criteria": StoppingCriteriaList([PerRow(width)]),
        "eos_token_id": int(truth[0, width + 12]),
        "pad_token_id": 0,
    },
    "a processor with a state": lambda truth, width: {"logits_processor": LogitsProcessorList([Counting()])},
    "repetitions": lambda truth, width: {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3},
    "one that runs the model": lambda truth, width: {"guidance_scale": 1.5},
    "sampling": lambda truth, width: {"do_sample": True, "top_p": 0.9, "top_k": 20, "min_p": 0.01},
    "sampling to an end": lambda truth, width: {
        "do_sample": True,
        "temperature": 0.5,
        "eos_token_id": list(range(100, 130)),
        "pad_token_id": 0,
    },
    "in chunks": lambda truth, width: {"prefill_chunk_size": 7},
    "no mask": lambda truth, width: {"attention_mask": None},
    "all logits": lambda truth, width: {"output_logits": True},
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("batch", ["alone", "padded"])
def test_what_generate_can_do(name, batch, oracle):
    model = tiny("llama")
    inputs = {"input_ids": prompt(), "attention_mask": torch.ones(1, 40).long()} if batch == "alone" else left_padded()
    free = generate(model, inputs)
    call = lambda: generate(model, **(inputs | CALLS[name](free, 40)))  # noqa: E731 - with new processors for each
    expected, plain = passes(model, call)
    patch(model, speculative="ngram")
    for mode in MODES:
        oracle(expected, mode)
        found, count = passes(model, call)
        assert torch.equal(found, expected), mode
        assert count <= plain
    assert "fallbacks" not in entry(report(model).to_dict(), "speculative")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gptj"])
def test_scores_logits_and_the_cache_are_those_of_stock(family, mode, oracle):
    more = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True, "temperature": 0.7}
    for inputs, options in ((prompt(), {}), (left_padded(), {"eos_token_id": 7, "pad_token_id": 0})):
        for sample in (False, True):
            stock, model = tiny(family), patch(tiny(family), speculative="ngram")
            options = options | more | {"do_sample": sample}
            expected = generate(stock, inputs, **options)
            oracle(expected.sequences, mode)
            found = generate(model, inputs, **options)
            assert type(found) is type(expected) and found.keys() == expected.keys()
            assert torch.equal(found.sequences, expected.sequences)
            for name in ("scores", "logits"):
                assert len(found[name]) == len(expected[name])
                for a, b in zip(found[name], expected[name], strict=True):
                    torch.testing.assert_close(a, b, atol=ROUNDING, rtol=0)
            assert found.past_key_values.get_seq_length() == expected.past_key_values.get_seq_length()
            for a, b in zip(found.past_key_values.layers, expected.past_key_values.layers, strict=True):
                assert a.keys.shape == b.keys.shape and not getattr(a, "record_past", False)
                for row, length in enumerate(inputs["attention_mask"].sum(-1) if isinstance(inputs, dict) else [40]):
                    start = a.keys.shape[2] - min(a.keys.shape[2], int(length) + len(found.scores) - 1)
                    torch.testing.assert_close(a.keys[row, :, start:], b.keys[row, :, start:], atol=ROUNDING, rtol=0)


@pytest.mark.parametrize("made", ["with a configuration", "without one"])
@pytest.mark.parametrize("family", ["llama", "mistral", "gpt_oss"])
def test_a_chat_goes_on_with_its_cache(family, made, oracle):
    said = {}
    for mode in (None, *MODES):
        model = tiny(family)
        if mode is not None:
            patch(model, speculative="ngram")
        cache = DynamicCache(config=model.config) if made == "with a configuration" else DynamicCache()
        ids, turns = prompt(20), []
        for turn in range(3):
            if mode is not None:
                oracle(said[None][turn], mode)
            ids = generate(model, ids, 9, past_key_values=cache)
            turns.append(ids)
            ids = torch.cat([ids, prompt(7, seed=turn)], 1)
        said[mode] = turns
        assert cache.get_seq_length() == 20 + 9 * 3 + 7 * 2 - 1
        assert all(torch.equal(a, b) for a, b in zip(turns, said[None], strict=True)), mode


def test_finished_rows_of_a_batch_leave_a_usable_cache(oracle):
    """The next turn hides what came after their ends."""
    inputs, said = left_padded(), {}
    for mode in (None, "right", "mixed"):
        model = tiny("llama")
        free = generate(model, inputs)
        options = {"eos_token_id": int(free[1, 43]), "pad_token_id": 0, "return_dict_in_generate": True}
        if mode is not None:
            patch(model, speculative="ngram")
            oracle(said[None][0], mode)
        first = generate(model, inputs, **options)
        ended = (first.sequences[:, 40:] == options["eos_token_id"]).cumsum(1) > 0
        mask = torch.cat([inputs["attention_mask"], (~ended).long(), torch.ones(3, 5).long()], 1)
        ids = torch.cat([first.sequences, prompt(5, 3)], 1)
        if mode is not None:
            oracle(said[None][1], mode)
        second = generate(model, {"input_ids": ids, "attention_mask": mask}, 6, past_key_values=first.past_key_values)
        said[mode] = (first.sequences, second)
        assert all(torch.equal(a, b) for a, b in zip(said[mode], said[None], strict=True))


# Ways to ask


class Streamer:
    def __init__(self):
        self.heard = []

    def put(self, value):
        self.heard.append(value.tolist())

    def end(self):
        self.heard.append("end")


@pytest.mark.parametrize("given", ["by name", "by place"])
def test_streamers_hear_what_they_hear_from_stock(given, oracle):
    model, heard, truth = tiny("llama"), {}, generate(tiny("llama"))
    for mode in (None, *MODES):
        if mode is not None:
            patch(model, speculative="ngram")
            oracle(truth, mode)
        streamer, options = Streamer(), GenerationConfig(do_sample=False, max_new_tokens=16, pad_token_id=0)
        if given == "by name":
            generate(model, streamer=streamer)
        else:
            model.generate(prompt(), options, None, None, None, None, None, streamer)
        heard[mode] = streamer.heard
        assert streamer.heard == heard[None] and len(streamer.heard) == 18


def test_a_streamer_that_raises_leaves_the_model_as_it_was(oracle):
    model = tiny("llama")
    truth = generate(model)
    patch(model, speculative="ngram")
    oracle(truth, "right")
    streamer = Streamer()
    streamer.put = lambda value: 1 / (value.numel() - 1)
    with pytest.raises(ZeroDivisionError):
        generate(model, streamer=streamer)
    assert torch.equal(generate(model), truth)


@pytest.mark.parametrize("heard", [12, 15])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_streamer_that_raises_leaves_a_cache_that_was_handed_in_as_stock_does(family, heard, oracle):
    model, truth, said = tiny(family), generate(tiny(family), new=30), []
    for patched in (False, True):
        if patched:
            patch(model, speculative="ngram")
            oracle(truth, "right")
        cache, streamer = DynamicCache(config=model.config), Streamer()
        streamer.put = lambda value, put=streamer.put, kept=streamer.heard: put(value) if len(kept) < heard else 1 / 0
        with pytest.raises(ZeroDivisionError):
            generate(model, new=30, past_key_values=cache, streamer=streamer)
        assert not any(getattr(layer, "record_past", False) for layer in cache.layers)
        said.append((cache.get_seq_length(), [layer.keys.shape for layer in cache.layers]))
        said[-1] += (generate(model, truth[:, : 40 + heard], 5, past_key_values=cache).tolist(),)
    assert said[1][0] == said[0][0] == 40 + heard - 1 and said[1][2] == said[0][2]


def test_a_clock_that_stands_still(monkeypatch):
    monkeypatch.setattr(time, "perf_counter", lambda: 5.0)
    for inputs in (repeating(), torch.cat([repeating(), repeating(8, 5)])):
        for speculative in ("ngram", "self"):
            model = patch(tiny("llama"), speculative=speculative)
            assert torch.equal(generate(model, inputs, 30), generate(tiny("llama"), inputs, 30))


def test_where_drafts_do_not_pay_none_is_made_with_the_prompt(monkeypatch):
    model, widths, inner = patch(tiny("llama"), speculative="ngram"), [], NGramDrafter.first
    monkeypatch.setattr(NGramDrafter, "first", lambda *args: (widths.append(inner(*args)), widths[-1])[1])
    expected = generate(model, repeating())
    (pace,) = vars(model)[SPECULATING].paces.values()
    pace.ratios.update(dict.fromkeys((2, 4, 5, 8, 9, 16), 9.0))
    assert torch.equal(generate(model, repeating()), expected)
    assert len(widths) == 2 and widths[0] is not None and widths[1] is None


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture
def bundled():
    return transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)


CODE = "def area(width, height):\n    return width * height\n\n\ndef area(width, height):\n    return"


@pytest.mark.parametrize(
    "given", ["by name", "in the configuration", "in both", "criteria by place", "with criteria", "beside their own"]
)
def test_stop_strings(given, bundled, tokenizer, always):
    ids = tokenizer(CODE, return_tensors="pt")["input_ids"]
    config = GenerationConfig(do_sample=False, max_new_tokens=40, pad_token_id=0)

    def ask(model):
        criteria = StoppingCriteriaList([PerRow(ids.shape[1] + 30)])
        if given == "by name":
            return generate(model, ids, 40, stop_strings=["\n\n", "xyz"], tokenizer=tokenizer)
        if given == "with criteria":
            return generate(model, ids, 40, stop_strings="\n\n", tokenizer=tokenizer, stopping_criteria=criteria)
        if given == "criteria by place":
            return model.generate(ids, config, None, criteria, stop_strings=["\n\n"], tokenizer=tokenizer)
        if given == "beside their own":
            own = StoppingCriteriaList([StopStringCriteria(tokenizer, ["\n\n"])])
            return generate(model, ids, 40, stop_strings="height", tokenizer=tokenizer, stopping_criteria=own)
        config.stop_strings = ["\n\n"]
        both = {"stop_strings": ["\n\n"]} if given == "in both" else {}
        return model.generate(ids, config, tokenizer=tokenizer, **both)

    expected = ask(bundled)
    assert ids.shape[1] < expected.shape[1] < ids.shape[1] + 35
    patch(bundled, speculative="ngram")
    assert torch.equal(ask(bundled), expected)
    if given not in ("in the configuration", "in both"):
        assert entry(report(bundled).to_dict(), "speculative")["tokens"] > 0


def test_stop_strings_without_a_tokenizer_are_the_error_of_stock():
    for model in (tiny("llama"), patch(tiny("llama"), speculative="ngram")):
        with pytest.raises(ValueError, match="tokenizer"):
            generate(model, stop_strings=["a"])


def test_healed_tokens(bundled, tokenizer, always):
    ids = tokenizer(CODE, return_tensors="pt")["input_ids"]
    try:
        expected = generate(bundled, ids, token_healing=True, tokenizer=tokenizer)
    except Exception as error:
        pytest.skip(f"stock: {error}")
    patch(bundled, speculative="ngram")
    assert torch.equal(generate(bundled, ids, token_healing=True, tokenizer=tokenizer), expected)


@pytest.mark.parametrize("with_ids", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_embeddings_in_the_place_of_tokens(family, with_ids, oracle, always):
    model = tiny(family)
    ids = repeating()
    with torch.no_grad():
        inputs = {"inputs_embeds": model.get_input_embeddings()(ids)} | ({"input_ids": ids} if with_ids else {})
    expected = generate(model, inputs)
    patch(model, speculative="ngram")
    assert torch.equal(generate(model, inputs), expected)
    for mode in MODES:
        oracle(expected, mode)
        assert torch.equal(generate(model, inputs), expected)


def test_configurations_by_place_stay_as_they_are(oracle):
    model = tiny("llama")
    config = GenerationConfig(max_new_tokens=16, do_sample=True, top_k=0, pad_token_id=0, return_dict_in_generate=True)
    before, own = config.to_dict(), model.generation_config.to_dict()
    torch.manual_seed(5)
    expected = model.generate(prompt(), config).sequences
    patch(model, speculative="ngram")
    oracle(expected, "mixed")
    torch.manual_seed(5)
    assert torch.equal(model.generate(prompt(), config).sequences, expected)
    assert config.to_dict() == before and model.generation_config.to_dict() == own


@pytest.mark.parametrize("given", [(), (None,) * 10, (None,) * 9], ids=["by name", "by place", "by both"])
def test_no_loop_of_the_callers_is_none(given, always):
    options = {"max_new_tokens": 12} | ({"custom_generate": None} if len(given) < 10 else {})
    model = tiny("llama")
    truth = model.generate(repeating(), *given, **options)
    patch(model, speculative="ngram")
    assert torch.equal(model.generate(repeating(), *given, **options), truth)
    assert entry(report(model).to_dict(), "speculative")["tokens"] == 11, "all but that of the prompt"


def test_prompts_of_a_single_token_and_of_none(always):
    model = tiny("llama")
    calls = [lambda: generate(model, prompt(1)), lambda: model.generate(max_new_tokens=9, do_sample=False)]
    expected = [call() for call in calls]
    patch(model, speculative="ngram")
    assert all(torch.equal(call(), truth) for call, truth in zip(calls, expected, strict=True))


def test_pipelines(bundled, tokenizer, always):
    pipe = transformers.pipeline("text-generation", model=bundled, tokenizer=tokenizer)
    texts, options = [CODE, "def f(x):\n    return"], {"max_new_tokens": 20, "do_sample": False}
    expected = pipe(texts, **options), pipe(texts, batch_size=2, **options)
    assert patch(pipe, speculative="ngram") is pipe
    assert (pipe(texts, **options), pipe(texts, batch_size=2, **options)) == expected
    assert entry(report(pipe).to_dict(), "speculative")["tokens_per_pass"] > 1


@pytest.mark.parametrize("method", ["ngram", "self"])
def test_adapters(method, always, monkeypatch):
    peft = pytest.importorskip("peft")
    monkeypatch.setattr(ModelDrafter, "least", 99)

    def adapted():
        torch.manual_seed(3)
        settings = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False}
        return peft.get_peft_model(tiny("llama"), peft.LoraConfig(**settings, task_type="CAUSAL_LM")).eval()

    stock, model = adapted(), adapted()
    assert patch(model, speculative=method) is model
    for _ in range(2):
        expected, found = generate(stock, repeating(), 24), generate(model, repeating(), 24)
        assert torch.equal(found, expected)
        with stock.disable_adapter(), model.disable_adapter():
            assert torch.equal(generate(model, repeating()), generate(stock, repeating()))
    assert entry(report(model).to_dict(), "speculative")["tokens"] > 20


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_adapters_that_put_tokens_before_the_text_run_as_before(kind, always, warned):
    peft = pytest.importorskip("peft")

    def adapted():
        torch.manual_seed(3)
        settings = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=6)
        return peft.get_peft_model(tiny("llama"), settings).eval()

    ids = repeating()
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    expected = generate(adapted(), inputs, 24)
    model = patch(adapted(), speculative="ngram")
    assert torch.equal(generate(model, inputs, 24), expected)
    assert any("an adapter that puts tokens" in text for text in warned())


class Until(StoppingCriteria):
    """Ends a text at so many tokens, as an end token would."""

    def __init__(self, length):
        self.length = length

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("family, name", [("gpt2", "n_positions"), ("opt", "max_position_embeddings")])
def test_drafts_end_with_the_positions(family, name, batch, oracle):
    model, ids = build(family, **{name: 64}), prompt(40, batch)
    until = StoppingCriteriaList([Until(63)])
    truth = generate(model, ids, 100, stopping_criteria=until)
    longer = torch.cat([truth, prompt(40, batch, seed=3)], 1)
    patch(model, speculative="ngram")
    for mode in MODES:
        oracle(longer, mode)
        assert torch.equal(generate(model, ids, 100, stopping_criteria=until), truth), mode


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("family, name", [("gpt2", "n_positions"), ("opt", "max_position_embeddings")])
@pytest.mark.parametrize("given", ["embeddings", "positions"])
def test_drafts_end_with_the_positions_of_tokens_that_are_not_given(given, family, name, batch, oracle):
    """Stock ends within the table, at its last row."""
    model, ids = build(family, **{name: 64}), prompt(40, batch)
    if given == "embeddings":
        inputs = {"inputs_embeds": model.get_input_embeddings()(ids)}
        options = {"new": 400, "stopping_criteria": StoppingCriteriaList([Until(23)])}
    else:
        inputs = {"input_ids": ids, "position_ids": torch.arange(10, 50)[None].expand(batch, -1)}
        options = {"new": 400, "stopping_criteria": StoppingCriteriaList([Until(53)])}
    truth = generate(model, inputs, **options)
    longer = torch.cat([truth, prompt(40, batch, seed=3)], 1)
    patch(model, speculative="ngram")
    for mode in MODES:
        oracle(longer, mode)
        found, count = passes(model, lambda: generate(model, inputs, **options))
        assert torch.equal(found, truth), mode
        assert mode != "right" or count < truth.shape[1] - 40 * (given != "embeddings")


@pytest.mark.parametrize("types", [[7] * 39 + [9], [7, 7, 8] * 13 + [8]], ids=["last", "in turns"])
def test_types_of_tokens(types, oracle):
    inputs = {"input_ids": prompt(40), "token_type_ids": torch.tensor([types])}
    truth = generate(build("gpt2"), inputs, 24)
    model = patch(build("gpt2"), speculative="ngram")
    for mode in MODES:
        oracle(truth, mode)
        assert torch.equal(generate(model, inputs, 24), truth), mode
    short = {"input_ids": prompt(3), "token_type_ids": torch.full((1, 3), 7)}
    truth = generate(build("gpt2"), short, 24)
    oracle(truth, "right")
    assert torch.equal(generate(model, short, 24), truth)


def test_a_generate_with_other_names_for_its_arguments(bundled, tokenizer, always):
    class Mine(type(bundled)):
        def generate(self, *args, **generate_kwargs):
            return super().generate(*args, **generate_kwargs)

    bundled.__class__ = Mine
    patch(bundled, speculative="ngram")
    ids, streamer = tokenizer(CODE, return_tensors="pt").input_ids, Streamer()
    tokens = bundled.generate(ids, max_new_tokens=12, do_sample=False, streamer=streamer)
    assert streamer.heard == [ids.tolist(), *([each] for each in tokens[0, ids.shape[1] :].tolist()), "end"]
    lookup = bundled.generate(ids, max_new_tokens=12, do_sample=False, prompt_lookup_num_tokens=3)
    assert torch.equal(lookup, tokens)


@pytest.mark.parametrize("method", ["ngram", "self"])
def test_threads_generate_at_once(method, always):
    model = tiny("llama")
    inputs = [repeating(9 + i) for i in range(4)]
    expected = [generate(model, ids, 20) for ids in inputs]
    patch(model, speculative=Speculative(method, history="1MB"))
    found, failures = {}, []

    def work(number):
        try:
            for _ in range(4):
                found.setdefault(number, []).append(generate(model, inputs[number], 20))
                if method == "self" and number == 0:
                    with torch.no_grad():
                        model.lm_head.weight.add_(0)  # the copy is made anew while others use it
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures
    assert all(torch.equal(each, expected[number]) for number, all_of in found.items() for each in all_of)


# What runs as before


class Stopped(Exception):
    pass


FALLBACKS = {
    "beams": ({"num_beams": 3}, "beams"),
    "sampled beams": ({"num_beams": 2, "do_sample": True}, "beams"),
    "returned sequences": ({"num_return_sequences": 2, "do_sample": True}, "num_return_sequences"),
    "a static cache": ({"cache_implementation": "static"}, "StaticCache cannot be taken back"),
    "no cache": ({"use_cache": False}, "without a cache"),
    "attentions": ({"output_attentions": True, "return_dict_in_generate": True}, "attentions"),
    "hidden states": ({"output_hidden_states": True, "return_dict_in_generate": True}, "hidden states"),
}


@pytest.mark.parametrize("name", FALLBACKS)
def test_what_cannot_be_speculated_runs_as_before(name, warned, always):
    options, said = FALLBACKS[name]
    model, ids = tiny("llama"), repeating()
    eager = name == "attentions"
    if eager:
        model.set_attn_implementation("eager")
    expected = generate(model, ids, **options)
    patch(model, speculative="ngram", **(BARE if eager else {}))
    for _ in range(2):
        found = generate(model, ids, **options)
        if isinstance(expected, torch.Tensor):
            assert torch.equal(found, expected)
        else:
            assert torch.equal(found.sequences, expected.sequences) and found.keys() == expected.keys()
            for key in ("attentions", "hidden_states"):
                assert found.get(key) is None or len(found[key]) == len(expected[key]) == 16
    assert len(warned()) == 1 and said in warned()[0]
    (reason,) = entry(report(model).to_dict(), "speculative")["fallbacks"]
    assert said in reason
    assert entry(report(model).to_dict(), "speculative")["fallbacks"][reason] == 2
    assert torch.equal(generate(model, ids), generate(tiny("llama"), ids)) and len(warned()) == 1


@pytest.mark.parametrize(
    "options", [{"num_beams": 2}, {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5}]
)
def test_errors_of_stock_stay(options):
    errors = []
    for model in (tiny("llama"), patch(tiny("llama"), speculative="ngram")):
        with pytest.raises(Exception) as caught:
            generate(model, streamer=Streamer(), **options)
        errors.append((caught.type, str(caught.value)))
    assert errors[0] == errors[1]


THEIRS = {
    "an assistant": lambda: {"assistant_model": tiny("llama")},
    "lookup": lambda: {"prompt_lookup_num_tokens": 3},
    "lookup in a configuration": lambda: {
        "generation_config": GenerationConfig(prompt_lookup_num_tokens=3, do_sample=False, max_new_tokens=16)
    },
    "a loop of the caller's": lambda: {"custom_generate": lambda model, input_ids, **kwargs: input_ids + 1},
}


@pytest.mark.parametrize("name", THEIRS)
def test_what_the_caller_asks_of_transformers_is_theirs(name, warned):
    model, ids = tiny("llama"), repeating()
    expected = generate(model, ids, **THEIRS[name]())
    patch(model, speculative="ngram")
    assert torch.equal(generate(model, ids, **THEIRS[name]()), expected)
    assert entry(report(model).to_dict(), "speculative")["tokens"] == 0 and not warned()


def test_a_patched_model_assists_another(warned):
    model = tiny("llama")
    expected = generate(model)
    helper = patch(tiny("llama"), speculative="ngram")
    assert torch.equal(generate(model, assistant_model=helper), expected)
    assert not warned()


# Caches


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_quantized_caches(kind, oracle):
    """The same numbers are packed at the same time, whatever was drafted; in between, they are a little more exact."""
    ids = torch.cat([prompt(100)], 1)
    model = patch(tiny("llama"), cache=kind)
    truth = generate(model, ids, 80)
    unpatch(model)
    patch(model, cache=kind, speculative="ngram")
    for mode in ("wrong", "mixed"):
        oracle(truth, mode)
        found = generate(model, ids, 80, return_dict_in_generate=True)
        assert found.past_key_values.get_seq_length() == 179
        same = (found.sequences == truth).long().cumprod(1).sum().item() - 100
        assert same > 20, f"{same} tokens"


def test_sinks_run_as_before(always, warned):
    model = patch(tiny("llama"), cache="sinks:32")
    expected = generate(model, repeating(), 60)
    unpatch(model)
    patch(model, cache="sinks:32", speculative="ngram")
    assert torch.equal(generate(model, repeating(), 60), expected)
    assert len(warned()) == 1 and "sinks" in warned()[0]


@pytest.mark.parametrize("family", ["llama", "mistral", "bloom", "gpt2"])
def test_prefixes_and_speculation_together(family, always, oracle):
    model, ids = tiny(family), repeating()
    prompts = [ids, ids, torch.cat([ids, prompt(5)], 1), ids[:, :30], ids]
    expected = [generate(model, each, 24) for each in prompts]
    prefixes = PrefixCache("10MB")
    patch(model, cache=KVCache(prefixes=prefixes), speculative="ngram")
    assert all(torch.equal(generate(model, a, 24), b) for a, b in zip(prompts, expected, strict=True))
    for mode in MODES:
        for each, truth in zip(prompts, expected, strict=True):
            oracle(truth, mode)
            assert torch.equal(generate(model, each, 24), truth), mode
    assert prefixes.hits > 10


@pytest.mark.parametrize("length", [500, pytest.param(1100, marks=SLOW)])
def test_long_prompts_that_are_read_in_chunks(length, always):
    """Chunks by the prefill pass, of a model with hand-written attention."""
    model = build("bloom", max_position_embeddings=2048) if length < 1000 else build("mpt", max_seq_len=2048)
    ids = torch.cat([prompt(25)] * (length // 25), 1)
    expected = generate(model, ids, 12)
    patch(model, speculative="ngram")
    assert torch.equal(generate(model, ids, 12), expected)


# Copies and other models that draft


@pytest.fixture
def modelled(monkeypatch, always):
    """Only models draft, and go on where they are not sure."""
    monkeypatch.setattr(ModelDrafter, "least", 99)
    monkeypatch.setattr(drafts, "DOUBT", 0.0)


SELVES = {
    "int4": {"scheme": "int4"},
    "nf4": {"scheme": "nf4"},
    "second layer": {"scheme": None, "skip_layers": (1,)},
    "last layers": {"scheme": None, "skip_layers": (2, 3)},
    "both": {"scheme": "int4", "skip_layers": (1, 3)},
}


def check_drafting_by_models(model, speculative, options=None, new=20):
    runs = [(prompt(), False), (left_padded(), False), (prompt(), True)]
    expected = [generate(model, inputs, new, do_sample=sample) for inputs, sample in runs]
    patch(model, speculative=speculative, **(options or {}))
    for (inputs, sample), truth in zip(runs, expected, strict=True):
        assert torch.equal(generate(model, inputs, new, do_sample=sample), truth)
    said = entry(report(model).to_dict(), "speculative")
    assert said["tokens"] > 3 * (new - 2) and "fallbacks" not in said


@pytest.mark.parametrize("copied", SELVES)
@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2", "bloom"])
def test_a_copy_drafts(family, copied, modelled):
    check_drafting_by_models(tiny(family), Speculative("self", **SELVES[copied]))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_copy_of_any_family_drafts(family, modelled):
    check_drafting_by_models(tiny(family), "self", BARE)


def test_a_copy_in_4_bits_is_often_right(bundled, tokenizer, modelled):
    ids = tokenizer(CODE, return_tensors="pt")["input_ids"]
    expected = generate(bundled, ids, 40)
    patch(bundled, speculative="self")
    assert torch.equal(generate(bundled, ids, 40), expected)
    said = entry(report(bundled).to_dict(), "speculative")
    assert said["acceptance"] > 0.6 and said["tokens_per_pass"] > 2
    copied = said["bytes_after"] - said["bytes_before"]
    assert 0 < copied < 0.3 * said["bytes_before"]


def test_an_int8_model_has_a_copy_in_4_bits(modelled):
    model = patch(tiny("llama"), quantize=Quantize("int8", originals="keep"))
    expected = generate(model, new=20)
    unpatch(model)
    patch(model, quantize=Quantize("int8", originals="keep"), speculative="self")
    assert torch.equal(generate(model, new=20), expected)
    copied = vars(model)[SPECULATING].copy
    schemes = {spec.scheme for each in copied.modules() for spec in getattr(each, "specs", {}).values()}
    assert schemes == {"int4"}
    schemes = {spec.scheme for each in model.modules() for spec in getattr(each, "specs", {}).values()}
    assert schemes == {"int8"}, "the model itself has been changed"


def test_a_copy_shares_what_it_does_not_quantize():
    model = patch(tiny("llama"), speculative="self")
    generate(model)
    copied = vars(model)[SPECULATING].copy
    shared = {id(p) for p in model.parameters()} & {id(p) for p in copied.parameters()}
    assert id(model.model.embed_tokens.weight) in shared and id(model.model.layers[0].mlp.up_proj.weight) not in shared
    assert not set(model.modules()) & set(copied.modules())
    assert sum(p.numel() for p in tiny("llama").parameters()) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("change", ["trained", "loaded", "replaced", "another dtype"])
def test_a_copy_follows_the_weights(change, modelled):
    model, other = patch(tiny("llama"), speculative="self"), tiny("llama")
    generate(model)
    before = vars(model)[SPECULATING].copy
    generate(model)
    assert vars(model)[SPECULATING].copy is before, "nothing has changed"
    for each in (model, other):
        if change == "another dtype":
            each.to(torch.bfloat16)
        elif change == "replaced":
            each.lm_head.weight = torch.nn.Parameter(each.lm_head.weight.flip(0))
        elif change == "loaded":
            each.load_state_dict({name: value.flip(0) for name, value in each.state_dict().items()})
        else:
            each.train()
            each(input_ids=prompt(), labels=prompt()).loss.backward()
            torch.optim.SGD(each.parameters(), lr=0.5).step()
            each.eval()
    if change == "another dtype":
        patch(other)
    assert torch.equal(generate(model), generate(other))
    assert vars(model)[SPECULATING].copy is not before


@pytest.mark.parametrize(
    "family", ["llama", "mistral", *(pytest.param(name, marks=SLOW) for name in ("gemma2", "gpt2", "bloom"))]
)
def test_another_model_drafts(family, modelled):
    check_drafting_by_models(tiny("llama"), Speculative(draft=tiny(family)), new=40)


def test_the_same_model_as_its_draft_is_always_right(modelled):
    model = patch(tiny("llama"), speculative=Speculative(draft=tiny("llama")))
    for inputs in (prompt(), left_padded()):
        generate(model, inputs, new=31)
    said = entry(report(model).to_dict(), "speculative")
    assert said["acceptance"] == 1 and said["tokens_per_pass"] == 5


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_models_draft_beside_a_quantized_cache(kind, modelled):
    for speculative in (Speculative("self"), Speculative(draft=tiny("llama"))):
        model = patch(tiny("llama"), cache=kind, speculative=speculative)
        found = generate(model, prompt(150), 30, return_dict_in_generate=True)
        assert found.past_key_values.get_seq_length() == 179


def test_a_draft_model_with_a_short_context_stops_drafting(modelled):
    model = tiny("llama")
    expected = generate(model, new=40)
    patch(model, speculative=Speculative(draft=build("gpt2", n_positions=60)))
    assert torch.equal(generate(model, new=40), expected)
    assert entry(report(model).to_dict(), "speculative")["tokens"] > 30


def with_images():
    """A model whose positions are those of the text and of three axes, [4, B, T]."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    config = configuration(transformers.Qwen2VLConfig)
    config.text_config = configuration(type(config.text_config), rope_parameters=rope)
    return randomise(transformers.Qwen2VLForConditionalGeneration(config))


def shifted(by):
    return lambda model: generate(model, prompt(), 24, position_ids=torch.arange(40)[None] + by)


def two_turns(model):
    """The second gives the tokens that the cache has not, and a mask of all."""
    inputs, cache = left_padded(40, 33), DynamicCache(config=model.config)
    said = generate(model, inputs, 10, past_key_values=cache)
    ids = torch.cat([said[:, cache.get_seq_length() :], prompt(6, 2, seed=3)], 1)
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 16).long()], 1)
    return generate(model, {"input_ids": ids, "attention_mask": mask}, 24, past_key_values=cache)


ELSEWHERE = {  # what decodes, a draft model, the call, and whether all drafts are right
    "positions of images": (with_images, lambda: tiny("gpt2"), lambda model: generate(model, left_padded(), 24), False),
    "positions across its table": (lambda: tiny("llama"), lambda: build("gpt2", n_positions=64), shifted(7), False),
    "positions beyond its table": (
        lambda: tiny("llama"), lambda: build("llama", max_position_embeddings=64), shifted(100), True,
    ),
    "positions before its table": (lambda: tiny("llama"), lambda: tiny("gpt2"), shifted(-5), False),
    "positions that it has": (lambda: tiny("gpt2"), lambda: tiny("gpt2"), shifted(100), True),
    "a text behind a cache": (lambda: tiny("llama"), lambda: build("gpt2", n_positions=60), two_turns, False),
}  # fmt: skip


@pytest.mark.parametrize("where", ELSEWHERE)
def test_a_draft_model_has_its_own_positions(where, modelled):
    make, draft, call, right = ELSEWHERE[where]
    model = make()
    expected = call(model)
    patch(model, speculative=Speculative(draft=draft()))
    assert torch.equal(call(model), expected)
    tally = vars(model)[SPECULATING].tally
    assert tally.drafted > 10 and not tally.fallbacks and (not right or tally.accepted == tally.drafted)


@pytest.mark.parametrize("length", [50, 62, 64, 70])
@pytest.mark.parametrize("window", [None, 16, 300])
def test_a_draft_model_that_reads_its_text_anew(window, length, modelled):
    """Phi-3 makes another cache beyond the length of its short frequencies, with drafts in it if they lead there."""
    right, wrong = longrope(sliding_window=window), tiny("llama")
    for model, inputs in ((right, prompt(length)), (wrong, left_padded(length, length - 7))):
        expected = generate(model, inputs, 40)
        patch(model, speculative=Speculative(draft=longrope(sliding_window=window)))
        assert torch.equal(generate(model, inputs, 40), expected)
        tally = vars(model)[SPECULATING].tally
        assert tally.drafted > 20 and not tally.fallbacks and (model is wrong or tally.accepted == tally.drafted)


@pytest.mark.parametrize("who", ["the copy", "the draft model"])
def test_what_drafts_draws_no_random_numbers(who, modelled):
    """Patched, or given, in training mode with dropout; what is sampled stays what stock samples."""
    options, model = {"do_sample": True, "top_k": 0}, tiny("gpt2")
    expected = generate(model, **options)
    draft = build("gpt2", resid_pdrop=0.5).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    model.train()
    patch(model, speculative="self" if who == "the copy" else Speculative(draft=draft))
    model.eval()
    assert torch.equal(generate(model, **options), expected)
    tally = vars(model)[SPECULATING].tally
    assert tally.tokens == 15 and not tally.fallbacks and (tally.drafted > 20) == (who == "the copy")
    assert draft.training


# The patch


def test_a_deep_copy_has_its_own(modelled):
    model = patch(tiny("llama"), speculative=Speculative("self", history="1MB"))
    expected = generate(model)
    clone = copy.deepcopy(model)
    mine, other = vars(model)[SPECULATING], vars(clone)[SPECULATING]
    assert other is not mine and other.tally is not mine.tally and other.options == mine.options
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    held = mine.copy
    assert torch.equal(generate(clone), expected)
    assert other.copy is not held and mine.copy is held
    assert not {id(p) for p in other.copy.parameters()} & {id(p) for p in model.parameters()}
    unpatch(model)
    assert torch.equal(generate(clone), expected)
    unpatch(clone)
    assert torch.equal(generate(clone), expected) and SPECULATING not in vars(clone)


def test_a_deep_copy_shares_the_draft_model():
    draft = tiny("gpt2")
    clone = copy.deepcopy(patch(tiny("llama"), speculative=Speculative(draft=draft)))
    assert vars(clone)[SPECULATING].options.draft is draft


@pytest.mark.parametrize("speculative", ["ngram", "self"])
def test_unpatch_leaves_nothing(speculative, modelled):
    model = tiny("llama")
    before = fingerprint(model)
    patch(model, speculative=speculative)
    assert changes(before, fingerprint(model))
    generate(model)
    held = vars(model)[SPECULATING].copy
    copied = None if held is None else weakref.ref(held)
    del held
    unpatch(model)
    assert not changes(before, fingerprint(model))
    gc.collect()
    assert copied is None or copied() is None, "something holds the copy"


def test_what_the_report_says(always):
    model = tiny("llama")
    planned = entry(plan(model, speculative="ngram").to_dict(), "speculative")
    patch(model, speculative="ngram")
    said = entry(report(model).to_dict(), "speculative")
    assert planned["exact"] and planned["method"] == "ngram" and said["tokens"] == 0
    assert {key: said[key] for key in planned} == planned
    generate(model, repeating(), 30)
    said = entry(report(model).to_dict(), "speculative")
    assert 0 <= said["acceptance"] <= 1 and 28 <= said["tokens"] <= 30 and said["tokens_per_pass"] >= 1
    assert "tokens_per_pass" in str(report(model))
    assert "not asked for" in entry(report(patch(tiny("llama"))).to_dict(), "speculative")["reason"]


def test_the_report_counts_the_bytes_of_the_copy():
    planned = entry(plan(tiny("llama"), speculative="self").to_dict(), "speculative")
    memory = [plan(tiny("llama"), context=64, **more).to_dict()["memory"] for more in ({}, {"speculative": "self"})]
    model = patch(tiny("llama"), speculative="self")
    said = entry(report(model).to_dict(), "speculative")
    copied = said["bytes_after"] - said["bytes_before"]
    assert planned["bytes_after"] - planned["bytes_before"] == copied == memory[1]["weights"] - memory[0]["weights"]
    copied = vars(model)[SPECULATING].copy
    mine = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    own = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in (*copied.parameters(), *copied.buffers())}
    assert said["bytes_after"] - said["bytes_before"] == sum(s.nbytes() for p, s in own.items() if p not in mine)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"method": "lookup"}, "unknown method 'lookup'; allowed: 'ngram'"),
        ({"most": 0}, "at most 0 drafted tokens"),
        ({"most": 32}, "give 1 to 31"),
        ({"history": -1}, "a size of -1 bytes"),
        ({"history": "many"}, "a size of 'many'"),
        ({"method": "model"}, "method 'model' needs draft"),
        ({"method": "self", "draft": object()}, "'self' takes no draft"),
        ({"method": "self", "scheme": None}, "give scheme or skip_layers"),
        ({"method": "self", "scheme": "int8"}, "unknown scheme 'int8'"),
        ({"method": "ngram", "skip_layers": (1,)}, "skip_layers=.* is for method 'self'"),
    ],
)
def test_impossible_options(options, message):
    with pytest.raises(ValueError, match=message):
        Speculative(**options)


@pytest.mark.parametrize("value", [True, 5, "lookup", {"method": "self"}])
def test_impossible_values(value):
    model = tiny("llama")
    before = fingerprint(model)
    with pytest.raises(ValueError, match="speculative"):
        patch(model, speculative=value)
    assert not changes(before, fingerprint(model))


REFUSED = {
    "a recurrent state": (lambda: build("mamba"), lambda: "ngram", "recurrent state"),
    "no cache": (lambda: build("blt"), lambda: "ngram", "transformers makes no cache from its configuration"),
    "hybrid layers": (lambda: build("jamba"), lambda: "ngram", "taken back"),
    "another vocabulary": (
        lambda: tiny("llama"), lambda: Speculative(draft=build("llama", vocab_size=99)), "99 tokens",
    ),
    "a draft with a state": (lambda: tiny("llama"), lambda: Speculative(draft=build("mamba")), "MambaForCausalLM"),
    "a layer too many": (lambda: tiny("llama"), lambda: Speculative("self", skip_layers=(4,)), "of its 4 layers"),
    "all layers": (lambda: tiny("llama"), lambda: Speculative("self", skip_layers=(0, 1, 2, 3)), "any of .1, 2, 3."),
    "one token at a time": (lambda: build("prophetnet"), lambda: "ngram", "one token at a time"),
    "positions of a pass": (lambda: build("cpmant"), lambda: "ngram", "relative to the whole pass"),
    "both directions": (
        lambda: build("gemma3_text", use_bidirectional_attention=True), lambda: "ngram", "see those behind them",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_cannot_have_it(name):
    make, speculative, message = REFUSED[name]
    model = make()
    before = fingerprint(model)
    with pytest.raises(UnsupportedModel, match=message):
        patch(model, speculative=speculative())
    assert not changes(before, fingerprint(model))


def test_a_history_of_earlier_calls_drafts(monkeypatch, always):
    """Two prompts without a common token: what the first answered is drafted for the same question asked anew."""
    model = tiny("llama")
    truth = generate(model, new=24)
    patch(model, speculative=Speculative(history="4MB"))
    first, count = passes(model, lambda: generate(model, new=24))
    again, fewer = passes(model, lambda: generate(model, new=24))
    assert torch.equal(first, truth) and torch.equal(again, truth)
    assert fewer < count / 2 and vars(model)[SPECULATING].history.bytes <= 4_000_000


def test_it_notices_that_nothing_can_be_guessed():
    """Sampled at a high temperature: after a while almost no drafts are made."""
    model = patch(tiny("llama"), speculative="ngram")
    for seed in range(4):
        generate(model, new=100, do_sample=True, temperature=5.0, top_k=0, seed=seed)
    speculating = vars(model)[SPECULATING]
    drafted = speculating.tally.drafted
    generate(model, new=100, do_sample=True, temperature=5.0, top_k=0, seed=9)
    assert speculating.tally.drafted - drafted < 100


def test_nothing_is_said_that_stock_does_not_say(always):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = patch(tiny("llama"), speculative="ngram")
        generate(model, {"input_ids": repeating(), "attention_mask": torch.ones(1, 40).long()})
