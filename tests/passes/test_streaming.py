"""Attention sinks against an independent reference: with one layer, what is cached of a token does not depend on what
came before it, so a step must answer what stock answers for the sinks, the tokens kept, and the new ones."""

import copy

import pytest
import torch
from cases import FAMILIES, build, greedy, left_padded, logits, prompt, relative_error, tiny

from hf_accel_patch import KVCache, UnsupportedModel, patch, plan
from hf_accel_patch.passes.cache import BITS
from hf_accel_patch.passes.streaming import STREAM, MovingSlidingWindowLayer, SinksLayer

EXACT = 1e-4  # of the logits' standard deviation
COUNT, WINDOW = 4, 32
slow = lambda name: pytest.param(name, marks=pytest.mark.slow)  # noqa: E731

ONE_LAYER = {
    "llama": {},
    "qwen3": {},
    "gpt_neox": {},  # a part of the channels is rotated
    "phi3": {"sliding_window": None},
    "gemma2": {"layer_types": ["full_attention"]},
    "gpt_oss": {"layer_types": ["full_attention"]},
    "deepseek_v3": {},  # latents: what is rotated is the second tensor
    "mixtral": {"sliding_window": None},
    "cohere": {},  # interleaved channels
    "glm": {},
    "falcon": {"alibi": False, "new_decoder_architecture": True},
}
LONG_ROPE = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}


def one_layer(name, **overrides):
    return build(name, num_hidden_layers=1, **{**ONE_LAYER[name], **overrides})


def pair(name="llama", window=WINDOW, sinks=COUNT, **overrides):
    """An unpatched model of one layer, and a streaming one."""
    stock, model = (one_layer(name, **overrides) for _ in range(2))
    return stock, patch(model, cache=KVCache("sinks", window=window, sinks=sinks))


def layer_of(cache):
    return next(layer for layer in cache.layers if isinstance(layer, SinksLayer))


@torch.no_grad()
def read(model, ids, cache, **kwargs):
    output = model(ids, past_key_values=cache, use_cache=True, **kwargs)
    return output.logits, output.past_key_values


def window_of(cache, ids, sinks=COUNT):
    """The tokens that a cache still holds, sinks first, and whether some are gone."""
    layer = layer_of(cache)
    assert layer.seen == ids.shape[1]
    gone = layer.seen - layer.held()
    return (torch.cat([ids[:, :sinks], ids[:, gone + sinks :]], 1), True) if gone else (ids, False)


def check(stock, model, parts, window=WINDOW, sinks=COUNT, cache=None):
    """Read the parts one after another; each must answer what stock says of the window. Returns the cache."""
    ids, evicted = parts[0][:, :0], False
    for part in parts:
        found, cache = read(model, part, cache)
        ids, T = torch.cat([ids, part], 1), part.shape[1]
        kept, gone = window_of(cache, ids, sinks)
        assert relative_error(found, logits(stock, kept)[:, -T:]) < EXACT
        if gone and T + sinks <= window:
            assert window - max(1, min(16, window // 16)) < kept.shape[1] <= window
        evicted = evicted or gone
    assert evicted, "the window never moved, so this proves nothing"
    return cache


def ones(start, count, batch=1):
    return list(prompt(count, batch, seed=start).split(1, dim=1))


@pytest.mark.parametrize("name", ONE_LAYER)
def test_single_tokens(name):
    check(*pair(name), [prompt(10), *ones(1, 60)])


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "deepseek_v3"])
@pytest.mark.parametrize("length", [5, 31, 32, 33, 100])
def test_prompts_shorter_and_longer_than_the_window(name, length):
    check(*pair(name), [prompt(length), *ones(1, 40)])


@pytest.mark.parametrize("name", ["llama", "gemma2", "deepseek_v3"])
def test_chat_turns(name):
    turns = [prompt(n, seed=n) for n in (9, 1, 7, 12, 1, 1, 25, 3, 1, 28, 1, 40, 1, 2)]
    check(*pair(name), turns)


@pytest.mark.parametrize("window, sinks", [(8, 4), (2, 1), (16, 1), (64, 8), (33, 5)])
def test_windows(window, sinks):
    check(*pair(window=window, sinks=sinks), [prompt(3), *ones(1, 90)], window, sinks)


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "deepseek_v3", *map(slow, ("gemma2", "gpt_oss", "cohere"))])
def test_positions_begin_anew(name):
    """The model's context is short, so positions move back again and again."""
    stock, model = pair(name, max_position_embeddings=40)
    cache = check(stock, model, [prompt(10), *ones(1, 130), prompt(9), *ones(2, 5)])
    assert vars(cache)[STREAM].offset > 60


def test_methods_that_scale_rotations():
    stock, model = pair("llama", rope_parameters=LONG_ROPE)
    check(stock, model, [prompt(10), *ones(1, 60)])


def test_methods_that_change_their_frequencies():
    factors = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "original_max_position_embeddings": 64}
    stock, model = pair(
        "llama", rope_parameters={"rope_type": "longrope", "rope_theta": 10000.0, "factor": 4.0, **factors}
    )
    check(stock, model, [prompt(10), *ones(1, 120)])


def rows_of(layer, ids, mask, sinks=COUNT):
    """Per row, the real tokens that a cache still holds."""
    gone = layer.seen - layer.held()
    first = gone + sinks if gone else 0
    kept = []
    for row, seen in zip(ids, mask, strict=True):
        start = int(seen.argmax())
        places = [place for place in range(start, start + sinks) if place < first]
        kept.append(row[[*places, *range(max(first, start), ids.shape[1])]][None])
    return kept


@pytest.mark.parametrize(
    "name, lengths, positions, context",
    [
        ("llama", (40, 23, 9), True, 512),
        ("llama", (40, 23, 9), False, 40),
        ("llama", (20, 3, 1), True, 40),
        ("llama", (60, 30, 8), True, 512),
        ("llama", (60, 30, 4), False, 512),
        ("deepseek_v3", (40, 23, 9), True, 40),
        ("deepseek_v3", (20, 3, 1), False, 512),
    ],
)
def test_left_padding(name, lengths, positions, context):
    stock, model = pair(name, max_position_embeddings=context)
    batch = left_padded(*lengths)
    ids, mask, cache = batch["input_ids"], batch["attention_mask"], None
    part = ids
    for step in range(90):
        if step:
            T = 3 if step % 20 == 0 else 1
            part = prompt(T, len(ids), seed=step)
            ids, mask = torch.cat([ids, part], 1), torch.cat([mask, torch.ones(len(ids), T).long()], 1)
        options = {}
        if positions:
            options["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)[:, -part.shape[1] :]
        found, cache = read(model, part, cache, attention_mask=mask, **options)
        if step % 5 == 0:
            for b, row in enumerate(rows_of(layer_of(cache), ids, mask)):
                T = min(part.shape[1], row.shape[1])
                if step == 0:
                    T = int(mask[b].sum())
                expected = logits(stock, row)[:, -T:]
                assert relative_error(found[b : b + 1, -T:], expected) < EXACT, (step, b)
    assert layer_of(cache).held() <= WINDOW


def test_a_sequence_of_fewer_tokens_than_sinks():
    """When the window first moves, a row that has begun only now has fewer sinks, and repeats none."""
    stock, model = pair()
    batch = left_padded(60, 2)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    _, cache = read(model, ids, None, attention_mask=mask)
    for step in range(80):
        part = prompt(1, 2, seed=step)
        ids, mask = torch.cat([ids, part], 1), torch.cat([mask, torch.ones(2, 1).long()], 1)
        found, cache = read(model, part, cache, attention_mask=mask)
    layer = layer_of(cache)
    first = layer.seen - layer.held() + COUNT
    assert first > 62
    row = torch.cat([ids[1:, 58:60], ids[1:, first:]], 1)
    assert relative_error(found[1:], logits(stock, row)[:, -1:]) < EXACT
    other = torch.cat([ids[:1, :4], ids[:1, first:]], 1)
    assert relative_error(found[:1], logits(stock, other)[:, -1:]) < EXACT


def test_crop():
    stock, model = pair()
    ids = prompt(60)
    _, cache = read(model, ids[:, :20], None)
    for i in range(20, 60):
        _, cache = read(model, ids[:, i : i + 1], cache)
    for count in (1, 3, 5):
        draft = prompt(count, seed=7)
        read(model, draft, cache)
        cache.crop(-count)
        assert cache.get_seq_length() == ids.shape[1]
        new = prompt(1, seed=count)
        found, _ = read(model, new, cache)
        ids = torch.cat([ids, new], 1)
        kept, gone = window_of(cache, ids)
        assert gone and relative_error(found, logits(stock, kept)[:, -1:]) < EXACT
    with pytest.raises(RuntimeError, match="the window has the last"):
        cache.crop(-40)


def test_reset():
    stock, model = pair(max_position_embeddings=40)
    cache = check(stock, model, [prompt(10), *ones(1, 100)])
    cache.reset()
    assert cache.get_seq_length() == 0
    check(stock, model, [prompt(12), *ones(3, 40)], cache=cache)


def stream_of(model, batch, steps=60):
    cache, ids, mask = None, batch["input_ids"], batch["attention_mask"]
    _, cache = read(model, ids, None, attention_mask=mask)
    for step in range(steps):
        mask = torch.cat([mask, torch.ones(len(mask), 1).long()], 1)
        _, cache = read(model, prompt(1, len(mask), seed=step), cache, attention_mask=mask)
    return cache, mask


@pytest.mark.parametrize("when", [5, 60])
def test_rows_of_a_batch_change_places(when):
    model = patch(tiny("llama"), cache="sinks:32")
    cache, mask = stream_of(model, left_padded(), when)

    def goes_on(change, rows):
        other = copy.deepcopy(cache)
        change(other)
        seen, found = mask[rows], []
        for step in range(40):
            seen = torch.cat([seen, torch.ones(len(rows), 1).long()], 1)
            found.append(read(model, prompt(1, 3, seed=100 + step)[rows], other, attention_mask=seen)[0])
        return torch.cat(found, 1)

    plain = goes_on(lambda c: None, [0, 1, 2])
    for rows, change in (
        ([2, 0, 0], lambda c: c.reorder_cache(torch.tensor([2, 0, 0]))),
        ([0, 0, 1, 1, 2, 2], lambda c: c.batch_repeat_interleave(2)),
        ([1, 2], lambda c: c.batch_select_indices(torch.tensor([1, 2]))),
        ([0, 1], lambda c: c.reorder_cache(torch.tensor([0, 1]))),
    ):
        assert relative_error(goes_on(change, rows), plain[rows]) < EXACT


HALF_WINDOWED = {"layer_types": ["sliding_attention", "full_attention"] * 2}


@pytest.mark.parametrize("name", ["gemma2", "deepseek_v3", *map(slow, ("llama", "gpt_oss", "gemma3_text"))])
def test_moving_back_changes_nothing(name):
    """Only distances count, in layers with sinks and in windows of the model's own."""
    found, offsets = [], []
    for context in (512, 16):
        options = HALF_WINDOWED if name == "gemma3_text" else {}
        model = patch(build(name, max_position_embeddings=context, **options), cache="sinks:32")
        cache, answers = None, []
        for part in [prompt(20), *ones(1, 80), prompt(7), *ones(2, 5)]:
            answer, cache = read(model, part, cache)
            answers.append(answer)
        found.append(torch.cat(answers, 1))
        offsets.append(vars(cache)[STREAM].offset)
    assert offsets[0] == 0 and offsets[1] > 40
    assert relative_error(found[1], found[0]) < EXACT


@pytest.mark.parametrize("name", ["llama", "gemma2", slow("gemma3_text")])
def test_until_the_window_is_full_it_is_stock(name):
    model = build(name, **(HALF_WINDOWED if name == "gemma3_text" else {}))
    expected = logits(model, prompt(64)), greedy(model, prompt(), 20), greedy(model, tokens=20, **left_padded())
    patch(model, cache="sinks:64")
    cache, found = None, []
    for part in prompt(64).split(8, dim=1):
        answer, cache = read(model, part, cache)
        found.append(answer)
    assert relative_error(torch.cat(found, 1), expected[0]) < EXACT
    assert torch.equal(greedy(model, prompt(), 20), expected[1])
    assert torch.equal(greedy(model, tokens=20, **left_padded()), expected[2])


def test_a_cache_handed_over_by_an_unpatched_model():
    stock, model = pair()
    _, cache = read(stock, prompt(40), None)
    ids = prompt(40)
    for step in range(30):
        part = prompt(1, seed=step)
        found, cache = read(model, part, cache)
        ids = torch.cat([ids, part], 1)
    kept, gone = window_of(cache, ids)
    assert gone and relative_error(found, logits(stock, kept)[:, -1:]) < EXACT


def test_what_was_handed_over_is_not_written_to():
    stock, model = pair()
    _, cache = read(stock, prompt(40), None)
    held = cache.layers[0].keys, cache.layers[0].values
    before = [each.clone() for each in held]
    for step in range(30):
        _, cache = read(model, prompt(1, seed=step), cache)
    assert all(torch.equal(*each) for each in zip(held, before, strict=True))


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_everything_that_generates_goes_on(name):
    model = patch(tiny(name), cache="sinks:32")
    plain = greedy(model, prompt(), 60)
    assert plain.shape == (1, 60) and torch.equal(greedy(model, prompt(), 60), plain)
    assert greedy(model, tokens=60, **left_padded()).shape == (3, 60)
    if name == "llama":  # windows cannot be cropped beyond their size without a record
        assert greedy(model, torch.cat([prompt(12)] * 3, 1), 60, prompt_lookup_num_tokens=3).shape == (1, 60)
    assert greedy(model, prompt(), 40, num_beams=3).shape == (1, 40)
    assert greedy(model, tokens=40, num_beams=2, **left_padded()).shape == (3, 40)


@pytest.mark.parametrize("name", ["llama", "falcon"])
def test_prompts_beyond_the_context_are_read_in_chunks(name):
    stock, model = pair(name, max_position_embeddings=64)
    ids, sizes = prompt(200), []
    model.get_decoder().register_forward_pre_hook(
        lambda m, args, kwargs: sizes.append((args[0] if args else kwargs["input_ids"]).shape[1]), with_kwargs=True
    )
    output = model.generate(ids, max_new_tokens=1, do_sample=False, return_dict_in_generate=True, output_logits=True)
    assert len(sizes) > 5 and max(sizes) <= WINDOW - COUNT
    kept, gone = window_of(output.past_key_values, ids)
    assert gone and relative_error(output.logits[0], logits(stock, kept)[:, -1]) < EXACT
    batch = left_padded(200, 90)
    assert greedy(model, tokens=5, **batch).shape == (2, 5)


def test_memory_stays_constant():
    model = patch(tiny("gemma2"), cache="sinks:32")
    _, cache = read(model, prompt(20), None)
    sizes = []
    for step in range(150):
        _, cache = read(model, prompt(1, seed=step), cache)
        sizes.append(sum(x.buffer.nbytes for layer in cache.layers for x in (layer._keys, layer._values)))
    assert max(sizes[50:]) <= sizes[50] and layer_of(cache).held() <= 32
    assert {type(layer) for layer in cache.layers} == {SinksLayer, MovingSlidingWindowLayer}


@pytest.mark.parametrize("name", ["gpt2", "opt", "bloom", "mpt", "falcon_alibi"])
def test_positions_that_are_no_rotations(name):
    with pytest.raises(UnsupportedModel, match="sinks"):
        patch(tiny(name), cache="sinks:32")


def test_layers_that_cache_no_text():
    with pytest.raises(UnsupportedModel, match="sinks"):
        patch(build("mllama"), cache="sinks:32")


def test_a_plan_from_a_configuration_needs_no_weights():
    with torch.device("meta"):
        model = type(tiny("llama"))(tiny("llama").config)
    assert "sinks" in str(plan(model, cache="sinks:32").to_dict())
    assert "sinks" not in BITS and FAMILIES
