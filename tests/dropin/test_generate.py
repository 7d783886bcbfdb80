"""`model.generate` in the ways in which programs call it."""

import copy
import threading

import pytest
import torch
import transformers
from programs import LAYERS, bundled
from transformers import (
    DynamicCache,
    LogitsProcessor,
    LogitsProcessorList,
    StaticCache,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
    TextStreamer,
)

TOKENS = 12
PROMPT = "def read_lines(path):\n"


@pytest.fixture
def inputs(tokenizer):
    return tokenizer(PROMPT, return_tensors="pt")


@pytest.fixture
def batch(tokenizer):
    return tokenizer([PROMPT, "import os\n"], return_tensors="pt", padding=True, padding_side="left")


class NoNewlines(LogitsProcessor):
    """A program's own rule."""

    def __init__(self, tokens):
        self.tokens, self.calls = tokens, 0

    def __call__(self, input_ids, scores):
        self.calls += 1
        scores[:, self.tokens] = -torch.inf
        return scores


class AfterTokens(StoppingCriteria):
    def __init__(self, count):
        self.count = count

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.count)


def test_text_streamer(stock, ours, inputs, tokenizer, at_work, capsys):
    said = []
    for model in (stock, ours):
        model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False, streamer=TextStreamer(tokenizer))
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] and said[1].startswith(PROMPT) and len(said[1]) > len(PROMPT) + TOKENS
    at_work(ours, calls=LAYERS * TOKENS)


def test_text_iterator_streamer_in_a_thread(stock, ours, inputs, tokenizer, at_work):
    """Pieces arrive while the model works."""
    answers = []
    for model in (stock, ours):
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
        arguments = dict(inputs, max_new_tokens=TOKENS, do_sample=False, streamer=streamer)
        thread = threading.Thread(target=model.generate, kwargs=arguments)
        thread.start()
        answers.append(list(streamer))
        thread.join(timeout=60)
        assert not thread.is_alive()
    assert answers[0] == answers[1] and len([piece for piece in answers[1] if piece]) > 2
    at_work(ours, calls=LAYERS * TOKENS)


def processors(tokenizer):
    return LogitsProcessorList([NoNewlines(tokenizer("\n")["input_ids"][-1:])])


WAYS = {
    "greedy": lambda tokenizer: dict(do_sample=False),
    "beams": lambda tokenizer: dict(do_sample=False, num_beams=3, num_return_sequences=2, length_penalty=0.8),
    "sampling": lambda tokenizer: dict(do_sample=True, temperature=0.8, top_p=0.9, top_k=40, num_return_sequences=2),
    "penalties": lambda tokenizer: dict(do_sample=False, repetition_penalty=1.3, no_repeat_ngram_size=3),
    "own processors": lambda tokenizer: dict(do_sample=False, logits_processor=processors(tokenizer)),
    "stopping": lambda tokenizer: dict(do_sample=False, stopping_criteria=StoppingCriteriaList([AfterTokens(12)])),
    "stop strings": lambda tokenizer: dict(do_sample=False, stop_strings=["("], tokenizer=tokenizer),
    "prompt lookup": lambda tokenizer: dict(do_sample=False, prompt_lookup_num_tokens=3),
    "no cache": lambda tokenizer: dict(do_sample=False, use_cache=False),
    "scores": lambda tokenizer: dict(do_sample=False, output_scores=True, return_dict_in_generate=True),
    "attentions": lambda tokenizer: dict(do_sample=False, output_attentions=True, return_dict_in_generate=True),
}


@pytest.mark.parametrize("way", WAYS)
def test_tokens_are_those_of_stock(stock, ours, inputs, batch, tokenizer, at_work, way):
    given = inputs if way == "prompt lookup" else batch  # which takes one sequence
    found = []
    for model in (stock, ours):
        asked = WAYS[way](tokenizer)
        torch.manual_seed(5)
        answer = model.generate(**given, max_new_tokens=TOKENS, **asked)
        found.append(answer if isinstance(answer, torch.Tensor) else answer.sequences)
        for processor in asked.get("logits_processor", ()):
            assert processor.calls == TOKENS
    assert torch.equal(*found)
    new = found[1].shape[1] - given["input_ids"].shape[1]
    assert 0 < new <= TOKENS
    at_work(ours, calls=LAYERS)


def test_sampling_follows_its_seed(ours, inputs):
    answers = []
    for seed in (1, 1, 2):
        transformers.set_seed(seed)
        answers.append(ours.generate(**inputs, max_new_tokens=TOKENS, do_sample=True).tolist())
    assert answers[0] == answers[1] != answers[2]


CACHES = {
    "dynamic": lambda model: DynamicCache(config=model.config),
    "dynamic without a configuration": lambda model: DynamicCache(),
    "static": lambda model: StaticCache(config=model.config, max_cache_len=64),
}


@pytest.mark.parametrize("kind", CACHES)
def test_caches_of_the_program(stock, ours, inputs, at_work, kind):
    """A cache that the program made, and goes on with in a second call."""
    found = []
    for model in (stock, ours):
        cache = CACHES[kind](model)
        first = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False, past_key_values=cache)
        assert cache.get_seq_length() == first.shape[1] - 1
        found.append(model.generate(first, max_new_tokens=TOKENS, do_sample=False, past_key_values=cache))
    assert torch.equal(*found) and found[1].shape[1] == inputs["input_ids"].shape[1] + 2 * TOKENS
    at_work(ours, calls=2 * LAYERS * TOKENS)


@pytest.mark.parametrize("implementation", ("dynamic", "static"))
def test_caches_by_name(stock, ours, inputs, at_work, implementation):
    asked = dict(max_new_tokens=TOKENS, do_sample=False, cache_implementation=implementation, disable_compile=True)
    assert torch.equal(stock.generate(**inputs, **asked), ours.generate(**inputs, **asked))
    at_work(ours, calls=LAYERS * TOKENS)


def test_a_prompt_that_many_continue(stock, ours, tokenizer, at_work):
    """The recipe of transformers' documentation: the cache of a common beginning is copied for every continuation."""
    answers = []
    beginning = tokenizer('"""Small helpers around files."""\n\nimport os\n\n\n', return_tensors="pt")
    for model in (stock, ours):
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            cache = model(**beginning, past_key_values=cache).past_key_values
        for question in ("def read(path):\n", "def write(path, text):\n"):
            asked = tokenizer(tokenizer.decode(beginning["input_ids"][0]) + question, return_tensors="pt")
            given = dict(asked, past_key_values=copy.deepcopy(cache), max_new_tokens=TOKENS, do_sample=False)
            answers.append(model.generate(**given).tolist())
    assert answers[:2] == answers[2:] and answers[0] != answers[1]
    at_work(ours, calls=2 * LAYERS * TOKENS)


def assistant():
    """A stock model that agrees with the bundled one in much: itself, in bfloat16's precision."""
    return bundled(torch.bfloat16).float()


def test_an_assistant_of_stock_drafts(stock, ours, inputs, at_work):
    calls, helper = [], assistant()
    helper.register_forward_hook(lambda *_: calls.append(1))
    asked = dict(max_new_tokens=2 * TOKENS, do_sample=False, assistant_model=helper)
    expected = stock.generate(**inputs, **asked)
    calls.clear()
    found = ours.generate(**inputs, **asked)
    assert torch.equal(found, expected) and len(calls) > 4
    assert torch.equal(found, ours.generate(**inputs, max_new_tokens=2 * TOKENS, do_sample=False))
    at_work(ours)


def test_a_patched_model_assists_stock(stock, ours, inputs, at_work):
    asked = dict(max_new_tokens=2 * TOKENS, do_sample=False)
    assert torch.equal(stock.generate(**inputs, **asked, assistant_model=ours), stock.generate(**inputs, **asked))
    at_work(ours, calls=LAYERS * 4)
