"""Frequencies that depend on the length, with static caches, compiled and not: as without a cache, in one layer."""

import copy

import pytest
import torch
from cases import greedy, left_padded, prompt, relative_error
from fingerprint import changes, fingerprint
from lengths import EXACT, ONE_LAYER, TRAINED, check, dynamic, longrope, ones, read, short, uncached
from torch._dynamo.utils import counters
from transformers import CompileConfig, StaticCache
from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer

from hf_accel_patch import patch, unpatch
from hf_accel_patch.families import rotary
from hf_accel_patch.ops.rope import Lengths
from hf_accel_patch.passes.static_cache import TurningStaticLayer, TurningStaticSlidingWindowLayer

DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
ROOM = 3 * TRAINED


def static(model, room=ROOM):
    return StaticCache(config=model.config, max_cache_len=room)


@pytest.fixture(autouse=True)
def compiled_anew():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def compiling(backend="eager", fullgraph=True):
    """As `generate` does it by itself on a GPU."""
    config = CompileConfig(backend=backend, fullgraph=fullgraph, mode=None)
    config._compile_all_devices = True
    return {"cache_implementation": "static", "compile_config": config}


EAGER = {"cache_implementation": "static", "disable_compile": True}


@pytest.mark.parametrize("name", ONE_LAYER)
def test_step_by_step_is_all_at_once(name):
    model = dynamic(name)
    cache, _ = check(model, [prompt(TRAINED - 6), *ones(1, 40)], static(model))
    kind = TurningStaticSlidingWindowLayer if name == "mistral" else TurningStaticLayer
    assert type(cache.layers[0]) is kind


@pytest.mark.parametrize("name", ["granitemoe", "cohere2"])
def test_layers_that_take_positions_among_other_keywords(name):
    model, options = dynamic(name), ({}, EAGER)
    plain, found = (greedy(model, prompt(TRAINED - 6), 20, **each) for each in options)
    assert torch.equal(plain, found)


def test_stock_is_wrong():
    """Or this file proves nothing."""
    stock = short(rope_parameters=DYNAMIC)
    ids, cache = torch.cat([prompt(TRAINED), *ones(1, 20)], 1), static(stock)
    for part in ids.split([TRAINED] + [1] * 20, dim=1):
        found, _ = read(stock, part, cache)
    assert relative_error(found[:, -1], uncached(short(rope_parameters=DYNAMIC), ids)) > 0.1


@pytest.mark.parametrize("make", [dynamic, longrope, lambda: dynamic("mistral")])
@pytest.mark.parametrize("lengths", [(20, 40, 30, 1, 1), (60, 5, 1, 20), (10, 100, 1, 1), (45, 1, 1, 1, 1, 1, 1)])
def test_turns_and_reuse(make, lengths):
    """Prompts, chunks and steps; then another text in the same buffers."""
    model = make()
    cache, _ = check(model, [prompt(length, seed=i) for i, length in enumerate(lengths)], static(model))
    layer = cache.layers[0]
    before = [each.data_ptr() for each in (layer.keys, layer.values, layer.positions)]
    for seed in (7, 8):
        cache.reset()
        check(
            model, [prompt(9, seed=seed), *(prompt(length, seed=i + seed) for i, length in enumerate(lengths))], cache
        )
    assert before == [each.data_ptr() for each in (layer.keys, layer.values, layer.positions)]


def test_up_to_the_trained_length_it_is_stock():
    model, stock = dynamic(), patch(short())
    ids = prompt(TRAINED)
    cache, other = static(model), static(stock)
    for part in ids.split([TRAINED - 4, 1, 1, 1, 1], dim=1):
        assert torch.equal(read(model, part, cache)[0], read(stock, part, other)[0])
    assert torch.equal(cache.layers[0].keys, other.layers[0].keys)


@torch.no_grad()
def padded(model, cache, steps=60, call=None):
    """Each row is as it is alone, though some are short when others are long."""
    batch = left_padded(TRAINED - 4, TRAINED - 20, 9)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    part, call = ids, model if call is None else call
    for step in range(steps):
        if step:
            part = prompt(2 if step % 20 == 0 else 1, 3, seed=step)
            ids, mask = torch.cat([ids, part], 1), torch.cat([mask, torch.ones_like(part)], 1)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -part.shape[1] :]
        used = call if part.shape[1] == 1 else model  # prompts are not compiled
        found = used(part, past_key_values=cache, attention_mask=mask, position_ids=positions).logits
        if step % 6 == 0:
            for row, seen, answer in zip(ids, mask, found, strict=True):
                assert relative_error(answer[-1:], uncached(model, row[seen.bool()][None])) < EXACT, step


@pytest.mark.parametrize("make", [dynamic, longrope])
def test_left_padding(make):
    model = make()
    cache = static(model)
    padded(model, cache)
    cache.reset()
    padded(model, cache, 30)


@pytest.mark.parametrize("make", [dynamic, longrope])
def test_deeper_models_are_as_with_a_dynamic_cache(make):
    model = make(layers=3)
    ids = torch.cat([prompt(TRAINED - 3), *ones(1, 30), prompt(10, seed=3), *ones(4, 10)], 1)
    ours, theirs = static(model), None
    for part in ids.split([TRAINED - 3, *[1] * 30, 10, *[1] * 10], dim=1):
        expected, theirs = read(model, part, theirs)
        found, _ = read(model, part, ours)
        assert relative_error(found, expected) < EXACT


@pytest.mark.parametrize("make", [dynamic, longrope, lambda layers: dynamic("mistral", layers)])
def test_everything_that_generates_goes_on(make):
    model = make(layers=2)
    ids, batch = prompt(TRAINED - 8), left_padded(TRAINED - 8, 20, 3)
    for options in ({}, {"prefill_chunk_size": 16}, {"num_beams": 3}):
        assert torch.equal(greedy(model, ids, 30, **EAGER, **options), greedy(model, ids, 30, **options)), options
        assert torch.equal(greedy(model, tokens=30, **batch, **EAGER), greedy(model, tokens=30, **batch))


def test_layers_with_a_window_and_a_rope_of_their_own():
    model = dynamic("gemma3_text", 2, sliding_window=16, layer_types=["sliding_attention", "full_attention"])
    ids, ours, theirs = torch.cat([prompt(TRAINED - 3), *ones(1, 20)], 1), static(model), None
    for part in ids.split([TRAINED - 3, *[1] * 20], dim=1):
        expected, theirs = read(model, part, theirs)
        assert relative_error(read(model, part, ours)[0], expected) < EXACT
    assert [type(layer) for layer in ours.layers] == [StaticSlidingWindowLayer, TurningStaticLayer]


def test_in_16_bits():
    model = patch(short().to(torch.bfloat16), rope="dynamic:4")
    ids, cache = torch.cat([prompt(TRAINED), *ones(1, 20)], 1), static(model)
    for part in ids.split([TRAINED] + [1] * 20, dim=1):
        found, _ = read(model, part, cache)
    assert cache.layers[0].keys.dtype == torch.bfloat16 and relative_error(found[:, -1], uncached(model, ids)) < 0.05


def test_longrope_is_turned_once():
    model = longrope()
    cache, _ = check(model, [prompt(TRAINED - 2), *ones(1, 3)], static(model))
    assert cache.layers[0].settled
    cache.reset()
    check(model, [prompt(TRAINED - 2)], cache)
    assert not cache.layers[0].settled


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_a_cache_handed_over_by_an_unpatched_model(name):
    stock, model = short(name), dynamic(name)
    cache = static(stock)
    read(stock, prompt(TRAINED - 2), cache)
    check(model, ones(1, 10), cache, prompt(TRAINED - 2))


def test_a_cache_of_positions_that_are_not_known():
    model = dynamic()
    cache = static(model)
    read(model, prompt(10), cache)
    keys = cache.layers[0].keys[:, :, :1]
    with pytest.raises(RuntimeError, match="positions the model's layers were not given"):
        cache.layers[0].update(keys, keys)


def test_unpatched_it_is_as_before():
    stock = short(layers=2, rope_parameters=DYNAMIC)
    before, ids = fingerprint(stock), prompt(TRAINED - 2)
    expected = greedy(copy.deepcopy(stock), ids, 10, **EAGER)
    patch(stock)
    assert not torch.equal(greedy(stock, ids, 10, **EAGER), ids)
    unpatch(stock)
    vars(stock).pop("_previous_max_cache_length", None)  # generate's own
    assert not changes(before, fingerprint(stock))
    assert torch.equal(greedy(stock, ids, 10, **EAGER), expected)


def test_a_copy_has_a_cache_of_its_own():
    model = dynamic(layers=2)
    expected = greedy(model, prompt(TRAINED - 3), 20, **EAGER)
    other = copy.deepcopy(model)
    unpatch(model)
    assert torch.equal(greedy(other, prompt(TRAINED - 3), 20, **EAGER), expected)


# ------------------------------------------------------------------------------------------------------------ compiled


@pytest.mark.parametrize("make", [dynamic, longrope])
def test_compiled_steps_are_all_at_once(make):
    model = make()
    call = torch.compile(model, backend="eager", fullgraph=True)
    cache, ids = static(model), prompt(TRAINED - 6)
    for seed in (0, 1):
        read(model, ids, cache)
        layer, text = cache.layers[0], ids
        before = [each.data_ptr() for each in (layer.keys, layer.values, layer.positions)]
        for token in ones(seed, 30):
            found, _ = read(call, token, cache)
            text = torch.cat([text, token], 1)
            assert relative_error(found[:, -1], uncached(model, text)) < EXACT
        assert before == [each.data_ptr() for each in (layer.keys, layer.values, layer.positions)]
        assert layer.given is None, "something is left of a call"
        cache.reset()
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


@pytest.mark.parametrize("make", [pytest.param(dynamic, marks=pytest.mark.slow), longrope])
def test_compiled_steps_of_a_padded_batch(make):
    model = make()
    padded(model, static(model), 40, torch.compile(model, backend="eager", fullgraph=True))
    assert not counters["graph_break"]


def windowed(layers=1):
    return dynamic("mistral", layers)


@pytest.mark.parametrize(
    ("make", "chunk"),
    [
        (longrope, 16),
        pytest.param(dynamic, None, marks=pytest.mark.slow),
        pytest.param(dynamic, 16, marks=pytest.mark.slow),
        pytest.param(windowed, None, marks=pytest.mark.slow),
        pytest.param(windowed, 16, marks=pytest.mark.slow),
    ],
)
def test_generate_compiles(make, chunk):
    model = make()
    ids = prompt(TRAINED - 8)
    found = greedy(model, ids, 30, **compiling(), prefill_chunk_size=chunk)
    assert torch.equal(found, greedy(model, ids, 30))
    assert counters["stats"]["unique_graphs"] and not counters["graph_break"]


@pytest.mark.slow
@pytest.mark.parametrize("make", [dynamic, longrope, windowed])
def test_generate_compiles_for_deeper_models_and_batches(make):
    model = make(layers=2)
    for batch in (left_padded(TRAINED - 8, 20, 3), {"input_ids": prompt(TRAINED - 8)}):
        assert torch.equal(greedy(model, tokens=30, **batch, **compiling()), greedy(model, tokens=30, **batch))
    assert not counters["graph_break"]


def operations(model, room, length):
    """How many a compiled step has, after a prompt of this length."""
    torch._dynamo.reset()
    counters.clear()
    cache, call = static(model, room), torch.compile(model, backend="eager", fullgraph=True)
    read(model, prompt(length), cache)
    found, _ = read(call, prompt(1, seed=9), cache)
    text = torch.cat([prompt(length), prompt(1, seed=9)], 1)
    assert relative_error(found[:, -1], uncached(model, text)) < EXACT
    return counters["stats"]["calls_captured"]


def test_compiled_steps_turn_only_what_they_must():
    """Nothing where the room ends at the trained length, nor after a long prompt of longrope."""
    turning, small, long = (operations(longrope(), *row) for row in ((ROOM, 20), (TRAINED, 20), (ROOM, TRAINED + 5)))
    assert small == long < turning - 10


def test_a_cache_that_a_compiled_model_meets_first():
    """Is left as in stock; nothing fails."""
    model = dynamic()
    call, cache = torch.compile(model, backend="eager", fullgraph=True), static(model)
    assert read(call, prompt(20), cache)[0].shape == (1, 20, 256)
    assert type(cache.layers[0]) is StaticLayer


@pytest.mark.slow
@pytest.mark.parametrize("make", [dynamic, longrope])
def test_inductor(make):
    model = make(layers=2)
    ids = prompt(TRAINED - 8)
    assert torch.equal(greedy(model, ids, 20, **compiling("inductor")), greedy(model, ids, 20))


@pytest.fixture
def as_on_a_device_that_nobody_waits_for(monkeypatch):
    """Where only the device knows the positions."""
    here = rotary._turn

    def turn(lengths, positions):
        found = here(lengths, positions)
        return rotary.Turn(found.positions, lengths.at(positions.amax(-1) + 1), lengths, past=None)

    monkeypatch.setattr(rotary, "_turn", turn)


@pytest.mark.parametrize("make", [dynamic, longrope, lambda: dynamic("mistral")])
@pytest.mark.usefixtures("as_on_a_device_that_nobody_waits_for")
def test_as_on_a_device(make):
    for lengths in ((TRAINED - 6, *[1] * 20, 20, 1, 1), (TRAINED + 10, 1, 1), (10, 100, 1, 1)):
        test_turns_and_reuse(make, lengths)


@pytest.mark.usefixtures("as_on_a_device_that_nobody_waits_for")
def test_positions_that_do_not_begin_at_zero():
    """Though the room is less than the trained length."""
    model = dynamic()
    ids, positions = prompt(40), torch.arange(30, 70)[None]
    cache = static(model, TRAINED - 4)
    for i in range(40):
        found, _ = read(model, ids[:, i : i + 1], cache, position_ids=positions[:, i : i + 1])
    assert relative_error(found[:, -1], uncached(model, ids, position_ids=positions)) < EXACT


def test_frequencies_are_copied_to_a_device_once():
    lengths, device = Lengths(torch.ones(4), 10, base=10.0, factor=2.0), torch.device("meta")
    assert lengths.on(device)[0] is lengths.on(device)[0] and lengths.on(device)[0].is_meta
    found = torch.compile(lambda x: lengths.at(x), backend="eager", fullgraph=True)(torch.empty(3, device="meta"))
    assert found.shape == (3, 4) and found.is_meta
