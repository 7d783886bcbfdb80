"""Frequencies that depend on the length: with the cache as without it, in one layer; no call sees another's."""

import copy
import dataclasses
import pickle
import threading

import pytest
import torch
from cases import build, entry, greedy, left_padded, logits, prompt, relative_error
from fingerprint import changes, fingerprint
from lengths import EXACT, LONGROPE, ONE_LAYER, TRAINED, check, dynamic, longrope, ones, read, short, uncached
from transformers import DynamicCache

from hf_accel_patch import KVCache, PrefixCache, RopeScaling, UnsupportedModel, patch, report, unpatch
from hf_accel_patch.families import rotary
from hf_accel_patch.passes.scaling_cache import TurningLayer, TurningSlidingWindowLayer


@pytest.mark.parametrize("name", ONE_LAYER)
def test_step_by_step_is_all_at_once(name):
    model = dynamic(name)
    cache, _ = check(model, [prompt(TRAINED - 6), *ones(1, 40)])
    kind = TurningSlidingWindowLayer if name == "mistral" else TurningLayer
    assert type(cache.layers[0]) is kind
    assert entry(report(model).to_dict(), "rope")["cached_keys"] == "1 layers follow"


def test_stock_is_wrong():
    """Or this file proves nothing."""
    stock = short(rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0})
    _, cache = read(stock, prompt(TRAINED))
    for token in ones(1, 20):
        found, cache = read(stock, token, cache)
    ids = torch.cat([prompt(TRAINED), *ones(1, 20)], 1)
    assert relative_error(found[:, -1], uncached(short(rope_parameters=stock.config.rope_parameters), ids)) > 0.1
    check(patch(stock), [prompt(TRAINED), *ones(1, 20)])


def test_longrope_over_its_switch():
    model = longrope()
    cache, _ = check(model, [prompt(TRAINED - 3), *ones(1, 30)])
    assert cache.layers[0].longer is not None, "keys are rotated at every step"


@pytest.mark.parametrize("make", [dynamic, longrope])
@pytest.mark.parametrize("lengths", [(20, 40, 30, 1, 1), (60, 5, 1, 20), (10, 100, 1, 1)])
def test_turns(make, lengths):
    check(make(), [prompt(length, seed=i) for i, length in enumerate(lengths)])


@pytest.mark.parametrize("make", [dynamic, longrope])
def test_crop(make):
    model = make()
    cache, ids = check(model, [prompt(TRAINED - 4), *ones(1, 10)])
    for count in (1, 3, 12, 2):
        cache.crop(-count)
        ids = ids[:, :-count]
        cache, ids = check(model, [prompt(2, seed=count), *ones(count, 4)], cache, ids)
    cache.reset()
    if cache.get_seq_length() == 0:
        check(model, [prompt(TRAINED - 2), *ones(1, 8)], cache)
    else:  # older transformers only writes zeros
        read(model, prompt(8), cache)


@pytest.mark.parametrize("make", [dynamic, longrope])
def test_left_padding(make):
    """Each row is as it is alone, though some are short when others are long."""
    model = make()
    batch = left_padded(TRAINED - 4, TRAINED - 20, 9)
    ids, mask, cache = batch["input_ids"], batch["attention_mask"], None
    part = ids
    for step in range(60):
        if step:
            part = prompt(2 if step % 20 == 0 else 1, 3, seed=step)
            ids, mask = torch.cat([ids, part], 1), torch.cat([mask, torch.ones_like(part)], 1)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -part.shape[1] :]
        found, cache = read(model, part, cache, attention_mask=mask, position_ids=positions)
        if step % 6 == 0:
            for row, seen, answer in zip(ids, mask, found, strict=True):
                assert relative_error(answer[-1:], uncached(model, row[seen.bool()][None])) < EXACT


@pytest.mark.parametrize("make", [dynamic, longrope])
@pytest.mark.parametrize("steps", [2, 30])
def test_rows_change_places(make, steps):
    model = make()
    batch = left_padded(TRAINED - 4, 20, 9)
    mask = batch["attention_mask"]

    def go_on(cache, mask, rows, count, seed):
        answers = []
        for step in range(count):
            mask = torch.cat([mask, torch.ones(len(mask), 1).long()], 1)
            token, positions = prompt(1, 3, seed=seed + step)[rows], (mask.sum(-1) - 1)[:, None]
            answers.append(read(model, token, cache, attention_mask=mask, position_ids=positions)[0])
        return torch.cat(answers, 1), mask

    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    _, cache = read(model, batch["input_ids"], None, attention_mask=mask, position_ids=positions)
    _, mask = go_on(cache, mask, [0, 1, 2], steps, 0)
    plain = go_on(copy.deepcopy(cache), mask, [0, 1, 2], 30, 100)[0]
    for rows, change in (
        ([2, 0, 0], lambda c: c.reorder_cache(torch.tensor([2, 0, 0]))),
        ([0, 1, 2], lambda c: c.reorder_cache(torch.tensor([0, 1, 2]))),
        ([0, 0, 1, 1, 2, 2], lambda c: c.batch_repeat_interleave(2)),
        ([1, 2], lambda c: c.batch_select_indices(torch.tensor([1, 2]))),
    ):
        other = copy.deepcopy(cache)
        change(other)
        assert relative_error(go_on(other, mask[rows], rows, 30, 100)[0], plain[rows]) < EXACT


@pytest.mark.parametrize("layers", [1, 3])
def test_up_to_the_trained_length_it_is_stock(layers):
    stock, model = short(layers=layers), dynamic(layers=layers)
    ids = prompt(TRAINED, 2)
    assert torch.equal(logits(model, ids, use_cache=False), logits(patch(stock), ids, use_cache=False))
    assert torch.equal(greedy(model, ids[:, :20], 28), greedy(stock, ids[:, :20], 28))


def test_layers_share_what_they_know_of_positions():
    model = dynamic(layers=3)
    _, cache = read(model, prompt(TRAINED))
    for token in ones(1, 5):
        _, cache = read(model, token, cache)
    places = [layer.places for layer in cache.layers]
    assert places[0] is places[1] is places[2] and places[0].length == TRAINED + 5


def test_positions_that_do_not_begin_at_zero():
    model = dynamic()
    ids, positions = prompt(80), torch.arange(30, 110)[None]
    expected = uncached(model, ids, position_ids=positions)
    cache = None
    for i in range(80):
        found, cache = read(model, ids[:, i : i + 1], cache, position_ids=positions[:, i : i + 1])
    assert relative_error(found[:, -1], expected) < EXACT


@pytest.mark.parametrize("make", [dynamic, longrope])
def test_everything_that_generates_goes_on(make):
    model = make()
    ids = prompt(TRAINED - 8)
    expected = ids
    for _ in range(40):
        expected = torch.cat([expected, uncached(model, expected).argmax(-1, keepdim=True)], 1)
    expected = expected[:, ids.shape[1] :]
    assert torch.equal(greedy(model, ids, 40), expected)
    assert torch.equal(greedy(model, ids, 40, prefill_chunk_size=16), expected)
    plain = greedy(model, ids, 40, num_beams=3, use_cache=False)
    assert torch.equal(greedy(model, ids, 40, num_beams=3), plain)
    assert greedy(model, tokens=60, **left_padded()).shape == (3, 60)
    # drafts are checked under the frequencies of the length with all of them, so answers may differ from single steps
    assert greedy(model, torch.cat([ids[:, :12]] * 3, 1), 40, prompt_lookup_num_tokens=3).shape == (1, 40)


def test_a_prompt_kept_as_a_prefix():
    prefixes = PrefixCache("64MB")
    model = patch(short(), rope="dynamic:4", cache=KVCache(prefixes=prefixes))
    text = prompt(TRAINED + 30)
    for length in (TRAINED + 10, TRAINED + 30, TRAINED + 20):
        ids = text[:, :length]
        output = model.generate(
            ids, max_new_tokens=1, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        assert relative_error(output.logits[0], uncached(model, ids)) < EXACT
    assert prefixes.hits == 2


@pytest.mark.parametrize("make", [dynamic, longrope])
def test_no_state_is_left(make):
    model, alone = make(layers=2), make(layers=2)
    texts = [prompt(length, seed=length) for length in (TRAINED - 1, TRAINED, TRAINED + 1, 3 * TRAINED)]
    expected = [logits(copy.deepcopy(alone), text) for text in texts]
    before = fingerprint(model)
    for i in (3, 0, 3, 1, 3, 2, 0):
        assert torch.equal(logits(model, texts[i]), expected[i])
    assert not changes(before, fingerprint(model))


def test_threads():
    model, errors = dynamic(layers=2), []
    texts = [prompt(TRAINED + 10), prompt(3 * TRAINED)]
    expected = [logits(model, text) for text in texts]
    barrier = threading.Barrier(2)

    def work(i):
        barrier.wait(timeout=30)
        for _ in range(30):
            found, _ = read(model, texts[i])
            errors.append(relative_error(found, expected[i]))

    workers = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(errors) == 60 and max(errors) < EXACT


def test_what_came_before_the_patch_is_forgotten():
    """Stock's modules keep the frequencies of the longest call; planning touches none of that."""
    stock = short(layers=2, rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0})
    expected = logits(patch(copy.deepcopy(stock)), prompt(TRAINED))
    logits(stock, prompt(3 * TRAINED))
    stale = logits(stock, prompt(TRAINED))
    before = fingerprint(stock)
    patch(stock)
    assert torch.equal(logits(stock, prompt(TRAINED)), expected)
    unpatch(stock)
    assert not changes(before, fingerprint(stock))
    assert torch.equal(logits(stock, prompt(TRAINED)), stale)


def test_copies_and_pickles():
    model = dynamic(layers=2)
    ids = prompt(2 * TRAINED)
    expected = logits(model, ids)
    other, module = copy.deepcopy(model), model.model.rotary_emb
    assert torch.equal(logits(other, ids), expected) and type(other.model.rotary_emb) is type(module)
    assert torch.equal(greedy(other, ids[:, : TRAINED - 3], 20), greedy(model, ids[:, : TRAINED - 3], 20))
    unpatch(other)
    assert torch.equal(logits(model, ids), expected)
    read_again = pickle.loads(pickle.dumps(module))
    assert type(read_again) is type(module)
    x, positions = torch.empty(1), torch.arange(2 * TRAINED)[None]
    assert all(torch.equal(*pair) for pair in zip(read_again(x, positions), module(x, positions), strict=True))


def test_with_the_cache_pass_off():
    model = patch(short(), rope="dynamic:4", cache=False)
    check(model, [prompt(TRAINED - 3), *ones(1, 20)])


@pytest.mark.parametrize("config", [True, False])
def test_a_cache_of_the_users_own(config):
    model = dynamic()
    check(model, [prompt(TRAINED - 3), *ones(1, 20)], DynamicCache(config=model.config) if config else DynamicCache())


def test_a_cache_handed_over_by_an_unpatched_model():
    stock, model = short(), dynamic()
    _, cache = read(stock, prompt(TRAINED))
    held = cache.layers[0].keys.clone()
    kept = cache.layers[0].keys
    check(model, ones(1, 10), cache, prompt(TRAINED))
    assert torch.equal(kept, held), "what was handed over is written to"


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_packed_keys_of_a_checkpoint_stay_as_they_are(kind):
    model = patch(short(max_position_embeddings=4 * TRAINED, rope_parameters=LONGROPE), cache=kind)
    assert f"cache='{kind}'" in entry(report(model).to_dict(), "frequencies")["cached_keys"]
    assert greedy(model, prompt(TRAINED - 3), 20).shape == (1, 20)


def test_rotations_that_are_not_found():
    with pytest.raises(UnsupportedModel, match="cached keys was not found"):
        patch(build("deepseek_v2"), rope="dynamic:4")


def test_training_goes_on():
    model = dynamic(layers=2).train()
    ids = prompt(2 * TRAINED)
    model(ids, labels=ids).loss.backward()
    assert model.model.layers[0].self_attn.k_proj.weight.grad.abs().sum() > 0
    out = model(ids[:, :60], use_cache=True)
    model(ids[:, 60:], past_key_values=out.past_key_values, labels=ids[:, 60:]).loss.backward()


def test_in_16_bits():
    model = patch(short().to(torch.bfloat16), rope="dynamic:4")
    _, cache = read(model, prompt(TRAINED))
    for token in ones(1, 20):
        found, cache = read(model, token, cache)
    ids = torch.cat([prompt(TRAINED), *ones(1, 20)], 1)
    assert found.dtype == torch.bfloat16 and relative_error(found[:, -1], uncached(model, ids)) < 0.05


def test_the_size_of_what_is_left_in_deeper_models():
    """The states of old tokens were made under older frequencies. docs/positions.md has the figures."""
    model = dynamic(layers=4)
    ids = torch.cat([prompt(TRAINED), *ones(1, 40)], 1)
    _, cache = read(model, ids[:, :TRAINED])
    for token in ones(1, 40):
        found, cache = read(model, token, cache)
    ours = relative_error(found[:, -1], uncached(model, ids))
    stock = short(layers=4, rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0})
    _, cache = read(stock, ids[:, :TRAINED])
    for token in ones(1, 40):
        found, cache = read(stock, token, cache)
    theirs = relative_error(found[:, -1], uncached(model, ids))
    assert 0 < ours < theirs


def test_a_fixed_length_needs_no_turning():
    model = patch(short(layers=4), rope=RopeScaling("dynamic", 4.0, length=100))
    _, cache = read(model, prompt(60))
    assert not isinstance(cache.layers[0], TurningLayer)
    found, cache = read(model, prompt(30, seed=1), cache)
    assert relative_error(found[:, -1], uncached(model, torch.cat([prompt(60), prompt(30, seed=1)], 1))) < EXACT


@pytest.fixture
def as_on_a_device_that_nobody_waits_for(monkeypatch):
    """Where only the device knows the positions, the count of tokens says when keys are turned."""
    here = rotary._turn

    def turn(lengths, positions):
        found = here(lengths, positions)
        return dataclasses.replace(found, past=None, frequencies=lengths.at(positions.amax(-1) + 1))

    monkeypatch.setattr(rotary, "_turn", turn)


@pytest.mark.parametrize("make", [dynamic, longrope])
@pytest.mark.usefixtures("as_on_a_device_that_nobody_waits_for")
def test_as_on_a_device(make):
    check(make(), [prompt(TRAINED - 6), *ones(1, 20), prompt(20, seed=3), *ones(2, 3)])
    check(make(), [prompt(TRAINED + 10), *ones(1, 3)])
    test_crop(make)
    test_left_padding(make)
    if make is dynamic:
        test_positions_that_do_not_begin_at_zero()


def test_keys_whose_positions_nobody_has_seen():
    """A step whose rotary module was not called where the cache can see it must not be guessed."""
    model = dynamic()
    _, cache = read(model, prompt(10))
    keys = cache.layers[0].keys[:, :, -10:]
    with pytest.raises(RuntimeError, match="positions are unknown"):
        cache.layers[0].update(keys, keys)
    with pytest.raises(RuntimeError, match="positions are unknown"):
        cache.layers[0].update(keys[:, :, :1], keys[:, :, :1])
