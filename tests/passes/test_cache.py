"""The k/v cache: its layers against stock's, operation by operation, and on whole models."""

import contextlib
import copy
import inspect
import pickle

import pytest
import torch
from cases import FAMILIES, build, entry, greedy, left_padded, logits, prompt, randomise, relative_error, tiny
from fingerprint import changes, fingerprint
from transformers import DynamicCache, QuantizedCache, StaticCache, cache_utils
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from hf_accel_patch import KVCache, UnsupportedModel, patch, plan, report, unpatch
from hf_accel_patch.compat import (
    RECORDS_PAST,
    DynamicIndexedLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
)
from hf_accel_patch.ops.kv import BLOCK
from hf_accel_patch.ops.stored import Content, Stored
from hf_accel_patch.passes.cache import Converting
from hf_accel_patch.passes.hybrid_layers import QUANTIZED
from hf_accel_patch.passes.layers import IN_PLACE, InPlaceLayer

EXACT = 1e-4  # of the logits' standard deviation
K, D, V = 2, 8, 12
WINDOW = 9
MOST = "get_max_length" if hasattr(DynamicLayer, "get_max_length") else "get_max_cache_shape"  # before 5.13
# transformers before 5.18 hands out more of a recorded past than its masks say
WINDOWS_RECORD = "num_visible" in inspect.getsource(DynamicSlidingWindowLayer.update)
FORGETS = "reset" in vars(DynamicLayer)  # transformers before 5.23 keeps as many zeros

STOCK = {
    "full": DynamicLayer,
    "window": lambda: DynamicSlidingWindowLayer(sliding_window=WINDOW),
    "long window": lambda: DynamicSlidingWindowLayer(sliding_window=100),
    "indexed": DynamicIndexedLayer,
    "hybrid": LinearAttentionAndFullAttentionLayer,
    "hybrid window": lambda: LinearAttentionAndSlidingWindowAttentionLayer(sliding_window=WINDOW),
}
NEWER = {
    "indexed": "DynamicIndexedLayer",
    "hybrid": "LinearAttentionAndFullAttentionLayer",
    "hybrid window": "LinearAttentionAndSlidingWindowAttentionLayer",
}
for _kind, _needed in NEWER.items():
    if not hasattr(cache_utils, _needed):
        del STOCK[_kind]


def ours(layer, **options):
    """What a patched model makes of the layer."""
    Converting(KVCache(**options)).convert(cache := DynamicCache())
    cache.layers, vars(cache)["_hf_accel_patch"] = [layer], None
    Converting(KVCache(**options)).convert(cache)
    return layer


def state(layer):
    """All that a layer shows."""
    tensors = [getattr(layer, name) for name in ("keys", "values")]
    sizes = [layer.get_mask_sizes(n) for n in (1, 5)]
    return tensors, [layer.get_seq_length(), sizes, getattr(layer, MOST)(), layer.is_initialized, layer.is_sliding]


def equal(a, b):
    if a is None or b is None:
        return a is b
    return a.shape == b.shape and torch.equal(a, b)


def attempt(layer, name, *args):
    """Its answer, or what it raised."""
    try:
        return getattr(layer, name)(*args), None
    except Exception as error:
        return None, type(error)


@pytest.mark.parametrize("mode", ["no_grad", "inference", "both", "grad", "convert later"])
@pytest.mark.parametrize("kind", STOCK)
@pytest.mark.parametrize("seed", range(3))
def test_layers_do_what_stock_does(kind, seed, mode):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda high: int(torch.randint(high, (), generator=generator))  # noqa: E731
    stock = STOCK[kind]()
    mine = STOCK[kind]() if mode == "convert later" else ours(STOCK[kind]())
    batch = 2
    if seed == 2 and "window" in kind and WINDOWS_RECORD:
        for each in (stock, mine):
            each.activate_past_recording()
    for step in range(60):
        if type(mine) is type(stock) and step > 7 and stock.get_seq_length():
            mine = ours(mine)
        inference = mode == "inference" or (mode == "both" and bool(draw(2)))
        with torch.inference_mode(inference), torch.set_grad_enabled(mode == "grad"):
            action = draw(12)
            if action < 6:
                T = (1, 1, 1, 2, 5, 40)[action]
                new = [torch.randn(batch, K, T, size, generator=generator) for size in (D, V)]
                # before they become [B, K, T, D], projections are [B, T, K, D]
                args = [x.transpose(1, 2).contiguous().transpose(1, 2) if draw(2) else x for x in new]
                answers = [each.update(*[x.clone() for x in args]) for each in (stock, mine)]
                assert all(equal(*pair) for pair in zip(*answers, strict=True))
            elif action == 6 and stock.get_seq_length():
                count = -draw(4) if RECORDS_PAST else -1 - draw(3)  # what 0 says has changed
                results = [attempt(each, "crop", count) for each in (stock, mine)]
                assert results[0] == results[1]
            elif action == 7:
                order = torch.randperm(batch, generator=generator) if draw(2) else torch.arange(batch)
                for each in (stock, mine):
                    each.reorder_cache(order)
            elif action == 8 and batch < 8:
                stock.batch_repeat_interleave(2), mine.batch_repeat_interleave(2)
                batch = batch * 2 if stock.get_seq_length() else batch
            elif action == 9 and stock.get_seq_length():
                rows = torch.randperm(batch, generator=generator)[: max(1, batch - 1)]
                stock.batch_select_indices(rows), mine.batch_select_indices(rows)
                batch = len(rows)
            elif action == 10 and not draw(4) and FORGETS:
                stock.reset(), mine.reset()
            elif action == 11:
                mine = copy.deepcopy(mine) if draw(2) else copy.copy(mine)
                stock.offload(), mine.offload(), stock.prefetch(), mine.prefetch()
            (tensors, facts), (expected, others) = state(mine), state(stock)
            assert facts == others
            assert all(equal(*pair) for pair in zip(tensors, expected, strict=True)), f"step {step}, action {action}"


@pytest.mark.parametrize("layer", ["exact", "int8"])
def test_a_selection_of_beams_is_not_mistaken_for_all_of_them(layer):
    mine, stock = ours(DynamicLayer(), kind=layer), DynamicLayer()
    new = torch.randn(4, K, 3, D), torch.randn(4, K, 3, V)
    for each in (mine, stock):
        each.update(*new)
        each.reorder_cache(torch.tensor([0, 1]))
        each.reorder_cache(torch.tensor([0, 1], dtype=torch.int32))
    assert torch.equal(mine.keys, stock.keys) and torch.equal(mine.values, stock.values)


@pytest.mark.parametrize("kind", ["exact", "int8", "int4"])
def test_shallow_copies_of_layers_go_their_own_ways(kind):
    with torch.no_grad():
        mine = ours(DynamicLayer(), kind=kind)
        mine.update(torch.randn(1, K, 150, D), torch.randn(1, K, 150, V))
        mine.update(torch.randn(1, K, 1, D), torch.randn(1, K, 1, V))
        other, before = copy.copy(mine), mine.keys
        for _ in range(80):
            for each, number in ((mine, 1.0), (other, -1.0)):
                each.update(torch.full((1, K, 1, D), number), torch.full((1, K, 1, V), number))
        for each, number in ((mine, 1.0), (other, -1.0)):
            assert all((x[:, :, 151:] - number).abs().max() < 0.3 for x in (each.keys, each.values))
            assert (each.keys[:, :, :151] - before).abs().max() < (0.1 if kind != "int4" else 1.0)


def test_what_an_unpatched_model_left_is_not_written_to():
    model = tiny("llama")
    with torch.no_grad():
        cache = model(prompt(), use_cache=True).past_key_values
        held = [(layer.keys, layer.values) for layer in cache.layers]
        before = copy.deepcopy(held)
        patch(model)
        model(prompt()[:, :3], past_key_values=cache)
        cache.crop(-20)
        model(prompt()[:, :9], past_key_values=cache)
    assert all(torch.equal(*pair) for a, b in zip(held, before, strict=True) for pair in zip(a, b, strict=True))


def quantized_pair(kind, bits, recent=None):
    stock = STOCK[kind]()
    if bits == 16:
        return ours(STOCK[kind](), offload=recent), stock
    return ours(STOCK[kind](), kind=f"int{bits}", recent=recent), stock


PACKED = [
    (kind, *how)
    for kind in ("full", "window", "long window", "hybrid", "hybrid window")
    for how in ((8, None), (4, None), (8, 100), (4, 0))
    if kind in STOCK
]


@pytest.mark.parametrize("kind, bits, recent", [*PACKED, ("full", 16, 64), ("full", 16, 100)])
@pytest.mark.parametrize("seed", range(2))
def test_quantized_layers_do_nearly_what_stock_does(kind, bits, recent, seed):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda high: int(torch.randint(high, (), generator=generator))  # noqa: E731
    mine, stock = quantized_pair(kind, bits, recent)
    batch, step = 2, {16: 1e-9, 8: 0.06, 4: 0.6}[bits]  # a little more than the range of numbers by the levels
    recording = seed == 1 and kind != "full" and WINDOWS_RECORD
    if recording:
        mine.activate_past_recording(), stock.activate_past_recording()
    torch.set_grad_enabled(False)
    since = 0  # tokens that a recorded past can take back
    for _ in range(150):
        action = draw(12)
        if action < 7:
            T = (1, 1, 2, 5, 40, 64, 130)[action]
            new = [torch.randn(batch, K, T, size, generator=generator) for size in (D, V)]
            answers = [each.update(*[x.clone() for x in new]) for each in (mine, stock)]
            since += T
            for found, expected in zip(*answers, strict=True):
                assert found.shape == expected.shape
                assert (found - expected).abs().max() < step
                assert torch.equal((found + 0)[:, :, -T:], expected[:, :, -T:]), "what is new is exact"
        elif action == 7 and stock.is_initialized:
            count = draw(100) if kind == "full" or not recording else draw(since + 1)
            count = count if RECORDS_PAST else 1 + count
            results = [attempt(each, "crop", -count) for each in (mine, stock)]
            assert results[0] == results[1]
            since = 0
        elif action == 8:
            order = torch.randperm(batch, generator=generator)
            mine.reorder_cache(order), stock.reorder_cache(order)
        elif action == 9 and batch < 8 and stock.get_seq_length():
            mine.batch_repeat_interleave(2), stock.batch_repeat_interleave(2)
            batch *= 2
        elif action == 10 and stock.get_seq_length():
            rows = torch.randperm(batch, generator=generator)[: max(1, batch - 1)]
            mine.batch_select_indices(rows), stock.batch_select_indices(rows)
            batch = len(rows)
        elif action == 11:
            if draw(6) == 0 and FORGETS:
                mine.reset(), stock.reset()
            mine = copy.deepcopy(mine) if draw(2) else copy.copy(mine)
            mine.offload(), mine.prefetch()
        assert state(mine)[1] == state(stock)[1]
        if kind == "full" and mine.keys is not None:
            assert (mine.keys - stock.keys).abs().max() < step if mine.get_seq_length() else True


@pytest.fixture(autouse=True)
def _gradients_as_before():
    yield
    torch.set_grad_enabled(True)


@pytest.mark.parametrize("bits, recent", [(8, 0), (4, 64), (8, 100)])
def test_the_latest_tokens_stay_as_they_are(bits, recent):
    mine = ours(DynamicLayer(), kind=f"int{bits}", recent=recent)
    keys, values = torch.randn(1, K, 700, D), torch.randn(1, K, 700, V)
    with torch.no_grad():
        mine.update(keys[:, :, :301], values[:, :, :301])
        for i in range(301, 700):
            found = [x + 0 for x in mine.update(keys[:, :, i : i + 1], values[:, :, i : i + 1])]
            for x, exact in zip(found, (keys, values), strict=True):
                same = (x == exact[:, :, : i + 1]).all(-1).all(1)[0].nonzero()
                latest = recent + 1
                assert set(range(max(0, i + 1 - latest), i + 1)) <= set(same.flatten().tolist())
    assert mine._blocks() == (700 - 1 - recent) // BLOCK


@pytest.mark.skipif(not RECORDS_PAST, reason="transformers before 5.15 records no past")
def test_a_recorded_past_is_trimmed():
    mine = ours(DynamicSlidingWindowLayer(WINDOW), kind="int8")
    mine.activate_past_recording()
    for _ in range(300):
        mine.update(torch.randn(1, K, 2, D), torch.randn(1, K, 2, V))
        mine.crop(-1)
    assert mine._held() <= WINDOW + 2 * BLOCK


# Whole models

TYPES = ("llama", "mistral", "gemma2", "gpt_oss", "deepseek_v3", "gptj", "falcon_mqa", "bloom")


def test_memory_is_little_more_than_the_tokens():
    model = patch(tiny("llama"))
    with torch.no_grad():
        cache = model(prompt(400), use_cache=True).past_key_values
        for _ in range(300):
            model(prompt(1), past_key_values=cache)
    for layer in cache.layers:
        assert layer._keys.buffer.shape[2] <= 700 * 9 / 8 + 64


def continued(model, cache=None, **kwargs):
    """Logits of a prompt in four parts, through a cache."""
    ids, found = prompt(90), []
    for part in ids.split([60, 1, 1, 28], dim=1):
        output = model(part, past_key_values=cache, use_cache=True, **kwargs)
        cache = output.past_key_values
        found.append(output.logits)
    return torch.cat(found, 1), cache


MADE = {
    "by the model": lambda model: None,
    "without a configuration": lambda model: DynamicCache(),
    "with one": lambda model: DynamicCache(config=model.config),
    "by a patched one's config": lambda model: DynamicCache(config=copy.deepcopy(model.config)),
}


@pytest.mark.parametrize("made", MADE)
@pytest.mark.parametrize("name", TYPES)
def test_caches_made_in_all_ways(name, made):
    model = tiny(name)
    with torch.no_grad():
        expected, stock = continued(model, MADE[made](model))
        patch(model)
        found, cache = continued(model, MADE[made](model))
    assert relative_error(found, expected) < EXACT
    assert {type(layer) for layer in cache.layers} <= set(IN_PLACE.values())
    for mine, other in zip(cache.layers, stock.layers, strict=True):
        assert state(mine)[1] == state(other)[1]


@pytest.mark.parametrize("kind", ["exact", "int8"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gptj"])
def test_caches_handed_over(name, kind):
    """From an unpatched model to a patched one and back, each with its part of the tokens."""
    stock, model = tiny(name), patch(tiny(name), cache=kind)
    ids = prompt(60)
    expected = logits(stock, ids)
    with torch.no_grad():
        cache, found = DynamicCache(config=stock.config), []
        for part, reader in zip(ids.split(15, dim=1), (stock, model, stock, model), strict=True):
            found.append(reader(part, past_key_values=cache).logits)
    assert relative_error(torch.cat(found, 1), expected) < (EXACT if kind == "exact" else 0.3)
    assert cache.get_seq_length() == 60


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gptj", "bloom"])
def test_generation_equals_stock(name):
    model = tiny(name)
    calls = {
        "beams": lambda: greedy(model, prompt(), 8, num_beams=3),
        "beams of a batch": lambda: greedy(model, tokens=8, num_beams=2, **left_padded()),
        "lookup": lambda: greedy(model, torch.cat([prompt(12)] * 3, 1), 14, prompt_lookup_num_tokens=3),
        "assisted": lambda: greedy(model, prompt(), 10, assistant_model=tiny(name)),
        "returned sequences": lambda: greedy(model, prompt(), 6, num_beams=4, num_return_sequences=2),
        "in chunks": lambda: greedy(model, prompt(), 6, prefill_chunk_size=7),
    }
    expected = {label: attempt_call(call) for label, call in calls.items()}
    patch(model)
    for label, call in calls.items():
        found = attempt_call(call)
        same = torch.equal(found, expected[label]) if isinstance(found, torch.Tensor) else found == expected[label]
        assert same, label


def attempt_call(call):
    try:
        return call()
    except (ValueError, RuntimeError, TypeError, AttributeError, IndexError) as error:
        return type(error)


def test_a_chat_goes_on_with_its_cache():
    model, turns = tiny("llama"), []
    for _ in range(2):
        cache, ids, said = DynamicCache(), prompt(20), []
        for _ in range(3):
            ids = model.generate(ids, past_key_values=cache, max_new_tokens=6, do_sample=False)
            said.append(ids)
            ids = torch.cat([ids, prompt(9, seed=1)], 1)
        turns.append(said)
        patch(model)
    assert all(torch.equal(*pair) for pair in zip(*turns, strict=True))


@pytest.mark.parametrize("kind", ["exact", "int8", "int4", "sinks:64"])
def test_inference_mode_and_normal_mode_after_each_other(kind):
    model = patch(tiny("llama"), cache=kind)
    with torch.no_grad():
        expected = continued(model)[0]
    modes = (torch.inference_mode, torch.no_grad, torch.inference_mode, torch.enable_grad)
    cache, found = None, []
    for part, mode in zip(prompt(90).split([60, 1, 1, 28], dim=1), modes, strict=True):
        with mode():
            output = model(part, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            found.append(output.logits.detach().clone())
    assert relative_error(torch.cat(found, 1), expected) < (EXACT if kind in ("exact", "sinks:64") else 0.05)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gptj"])
def test_gradients_through_a_cache(name):
    gradients = []
    for model in (tiny(name), patch(tiny(name))):
        scores, _ = continued(model)
        scores.square().mean().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 10
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("trained", ["q_proj", "o_proj"])
def test_gradients_of_what_meets_a_cache_without_any(trained):
    """The first layer's keys then need no gradients, but what was computed with them does."""
    gradients = []
    for model in (tiny("llama"), patch(tiny("llama"))):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trained in name)
        continued(model)[0].square().mean().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_training_with_a_quantized_cache_does_not_break(kind):
    model = patch(tiny("llama"), cache=kind)
    continued(model)[0].square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("kind", ["exact", "int8", "int4", "sinks:256"])
@pytest.mark.parametrize("way", ["bfloat16", "autocast"])
def test_half_precision(way, kind):
    """As far from float32 as stock is, and a little further where the cache is quantized."""
    ids = prompt(180)

    def read(model):
        cache, found = None, []
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=way == "autocast"):
            for part in ids.split([140, *[1] * 40], dim=1):
                output = model(part, past_key_values=cache, use_cache=True)
                cache = output.past_key_values
                found.append(output.logits.float())
        return torch.cat(found, 1)

    model, exact = tiny("llama"), logits(tiny("llama"), ids)
    model = model.to(torch.bfloat16) if way == "bfloat16" else model
    stock = relative_error(read(model), exact)
    patch(model, cache=kind)
    assert relative_error(read(model), exact) < (8 if kind == "int4" else 1.5) * stock


@pytest.mark.parametrize("kind", ["exact", "int8", "int4"])
def test_compiled_models_read_caches(kind):
    model = patch(tiny("llama"), cache=kind)
    compiled = torch.compile(model, backend="eager")
    ids = prompt(44)
    with torch.no_grad():
        expected = logits(model, ids)
        cache = model(ids[:, :40], use_cache=True).past_key_values
        parts = [
            compiled(ids[:, 40:43], past_key_values=cache).logits,
            model(ids[:, 43:], past_key_values=cache).logits,
        ]
    assert relative_error(torch.cat(parts, 1), expected[:, 40:]) < EXACT


@pytest.mark.parametrize("make", [lambda m: StaticCache(m.config, max_cache_len=64)], ids=["static"])
@pytest.mark.parametrize("kind", ["exact", "int8", "sinks:64"])
def test_caches_of_other_kinds_are_left_alone(make, kind):
    model = tiny("llama")
    expected = logits(model, prompt())
    patch(model, cache=kind)
    cache = make(model)
    kinds = [type(layer) for layer in cache.layers]
    assert relative_error(logits(model, prompt(), past_key_values=cache), expected) < EXACT
    assert [type(layer) for layer in cache.layers] == kinds


def test_transformers_own_quantized_cache_is_left_alone():
    model = tiny("llama")
    with contextlib.suppress(ImportError):
        cache = QuantizedCache("quanto", model.config)
        patch(model)
        logits(model, prompt(), past_key_values=cache)
        assert not any(isinstance(layer, InPlaceLayer) for layer in cache.layers)


def test_unpatch_leaves_no_hook():
    model = tiny("llama")
    before = fingerprint(model)
    for kind in ("exact", "int8", "sinks:64"):
        patch(model, cache=kind)
        assert changes(before, fingerprint(model))
        greedy(model, prompt(), 3)
        unpatch(model)
        assert not changes(before, fingerprint(model))
    with torch.no_grad():
        cache = model(prompt(), use_cache=True).past_key_values
    assert {type(layer) for layer in cache.layers} == {DynamicLayer}


def test_a_hook_of_the_user_survives():
    model, calls = patch(tiny("llama")), []
    module = model.model.layers[0]
    model.model.layers[0].register_forward_pre_hook(lambda *args: calls.append(1))
    module.register_forward_pre_hook(lambda m, args, kwargs: calls.append(2), with_kwargs=True)
    unpatch(model)
    logits(model, prompt())
    assert calls == [1, 2] and len(module._forward_pre_hooks) == 2


def test_deep_copies_of_a_patched_model_have_their_own_hooks():
    model = patch(tiny("llama"), cache="int8")
    clone = copy.deepcopy(model)
    unpatch(model)
    with torch.no_grad():
        for each, kinds in ((model, {DynamicLayer}), (clone, set(QUANTIZED.values()))):
            kept = {type(layer) for layer in each(prompt(), use_cache=True).past_key_values.layers}
            assert kept <= kinds
    unpatch(clone)
    with torch.no_grad():
        assert type(clone(prompt(), use_cache=True).past_key_values.layers[0]) is DynamicLayer


@pytest.mark.parametrize("kind", ["exact", "int8", "int4", "sinks:64"])
def test_deep_copies_and_pickles_of_caches(kind):
    model = patch(tiny("gemma2"), cache=kind)
    with torch.no_grad():
        cache = model(prompt(100), use_cache=True).past_key_values
        model(prompt(1), past_key_values=cache)
        copies = [copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))]
        expected = model(prompt(1, seed=3), past_key_values=cache).logits
        for each in copies:
            assert torch.equal(model(prompt(1, seed=3), past_key_values=each).logits, expected)
            assert type(each.layers[0]) is type(cache.layers[0])


def test_a_prompt_that_many_start_from():
    """One cache, read once, deep-copied for each of its continuations."""
    model = tiny("llama")
    expected = [logits(model, torch.cat([prompt(30), prompt(8, seed=s)], 1))[:, 30:] for s in (1, 2)]
    patch(model)
    with torch.no_grad():
        start = model(prompt(30), use_cache=True).past_key_values
        found = [model(prompt(8, seed=s), past_key_values=copy.deepcopy(start)).logits for s in (1, 2)]
    assert all(relative_error(*pair) < EXACT for pair in zip(found, expected, strict=True))


def test_a_cache_that_was_emptied_can_be_handed_over():
    model = tiny("llama")
    with torch.no_grad():
        cache = model(prompt(5), use_cache=True).past_key_values
        cache.crop(-5)
        patch(model)
        Converting(KVCache()).convert(cache)
        cache.crop(-1)


def test_a_decoder_with_cross_attention():
    model, states = build("bert", add_cross_attention=True), torch.randn(1, 5, 64)
    expected = logits(model, prompt(), encoder_hidden_states=states, use_cache=True)
    patch(model)
    assert relative_error(logits(model, prompt(), encoder_hidden_states=states, use_cache=True), expected) < EXACT


# Quantized caches on whole models

ALIBI = ("bloom", "mpt", "falcon_alibi")  # read part by part, by PyTorch
NEAR = {8: 0.05, 4: 0.35}  # one minus the cosine of logits at positions that are read through the cache


def wide(name):
    """The family's model with windows longer than a block."""
    row = FAMILIES[name]
    windowed = getattr(tiny(name).config, "sliding_window", None) is not None
    return build(row.model_type, **row.overrides, **({"sliding_window": 120} if windowed else {}))


def similarity(model, width=150, **kwargs):
    """Logits of a padded batch read in parts, so that most of it comes from the cache."""
    batch = left_padded(width, width - 70, width - 20)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    cache, found, end = None, [], 0
    for part in ids.split([100, 1, 1, 30, width - 132], dim=1):
        end += part.shape[1]
        with torch.no_grad():
            output = model(part, attention_mask=mask[:, :end], past_key_values=cache, use_cache=True, **kwargs)
        cache = output.past_key_values
        found.append(output.logits)
    return torch.cat(found, 1)[:, 100:].double(), cache


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", FAMILIES)
def test_quantized_caches_are_near_stock(name, bits):
    model = wide(name)
    expected, _ = similarity(model)
    patch(model, cache=KVCache(f"int{bits}", recent=0))
    found, cache = similarity(model)
    a, b = (x - x.mean(-1, keepdim=True) for x in (found, expected))
    distance = 1 - torch.nn.functional.cosine_similarity(a, b, dim=-1).mean().item()
    assert 0 < distance < NEAR[bits], distance
    assert {type(layer) for layer in cache.layers} <= {*QUANTIZED.values(), *IN_PLACE.values()}
    assert any(getattr(layer, "_packed", None) for layer in cache.layers)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in ("deepseek_v3", *ALIBI)])
def test_decoding_unpacks_no_whole_cache(name, bits, monkeypatch):
    """Latents are expanded by the model itself, and hand-written attention computes itself."""
    model = patch(wide(name), cache=f"int{bits}")
    with torch.no_grad():
        cache = model(prompt(300), use_cache=True).past_key_values
    monkeypatch.setattr(Content, "dense", lambda self: pytest.fail("a whole cache was unpacked"))
    with torch.no_grad():
        model(prompt(1), past_key_values=cache)
        model(prompt(5), past_key_values=cache)
        model(prompt(20), past_key_values=cache)
    monkeypatch.undo()
    assert greedy(model, prompt(80), 3).shape[1] == 3


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gptj"])
def test_generation_with_quantized_caches(name, bits):
    """As long as all is in full precision, tokens are stock's; and everything that generates goes on working."""
    model = tiny(name)
    expected = greedy(model, prompt(), 8)
    patch(model, cache=f"int{bits}")
    assert torch.equal(greedy(model, prompt(), 8), expected)
    assert torch.equal(greedy(model, prompt(), 8, num_beams=1, prompt_lookup_num_tokens=3), expected)
    ids = prompt(140)
    assert greedy(model, ids, 8, num_beams=3).shape == (1, 8)
    assert greedy(model, tokens=8, num_beams=2, **left_padded(140, 100, 9)).shape == (3, 8)
    plain = greedy(model, ids, 8)
    assert torch.equal(greedy(model, ids, 8, prefill_chunk_size=200), plain)
    assert greedy(model, torch.cat([ids, ids], 1), 8, prompt_lookup_num_tokens=3).shape == (1, 8)


@pytest.mark.parametrize("bits", [8, 4])
def test_crop_and_read_again(bits):
    """What is read again after a crop is what was there: only the blocks that lost a part have been unpacked."""
    model = patch(tiny("llama"), cache=KVCache(f"int{bits}", recent=0))
    ids = prompt(200)
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        expected = model(prompt(3, seed=2), past_key_values=cache).logits
        cache.crop(-3)
        again = model(prompt(3, seed=2), past_key_values=cache).logits
        cache.crop(-103)
        assert cache.get_seq_length() == 100
        model(ids[:, 100:], past_key_values=cache)
        later = model(prompt(3, seed=2), past_key_values=cache).logits
    assert torch.equal(again, expected)
    assert relative_error(later, expected) < (0.2 if bits == 8 else 2.0)


def test_stored_tensors_are_what_a_layer_returns():
    mine = ours(DynamicLayer(), kind="int8")
    with torch.no_grad():
        first = mine.update(torch.randn(1, K, 100, D), torch.randn(1, K, 100, V))
        second = mine.update(torch.randn(1, K, 1, D), torch.randn(1, K, 1, V))
    assert not any(isinstance(each, Stored) for each in first) and all(isinstance(each, Stored) for each in second)


# What the report and the errors say


@pytest.mark.parametrize("kind", ["exact", "int8", "int4", "sinks:64"])
@pytest.mark.parametrize(
    "name", ["llama", "mistral", "gemma2", "gpt2", "gptj", "gpt_bigcode", "falcon_mqa", "deepseek_v3"]
)
def test_the_reported_bytes_are_those_of_a_cache(name, kind):
    model = wide(name)
    try:
        patch(model, cache=kind)
    except UnsupportedModel:
        assert kind == "sinks:64"
        return
    said = entry(report(model).to_dict(), "cache")
    context = said["context"]
    unpatch(model)
    with torch.no_grad():
        stock = model(prompt(context - 1), use_cache=True).past_key_values
        model(prompt(1), past_key_values=stock)
        before = sum(x.nbytes for layer in stock.layers for x in (layer.keys, layer.values))
        patch(model, cache=kind)
        cache = model(prompt(context - 1), use_cache=True).past_key_values
        model(prompt(1), past_key_values=cache)
    assert said["bytes_before"] == before
    if kind == "exact":
        assert said["bytes_after"] == before
    elif kind in ("int8", "int4"):
        held = sum(x.buffer.nbytes for layer in cache.layers for x in (*(layer._packed or ()), *layer._latest))
        assert 0.85 * held <= said["bytes_after"] <= 1.15 * held


def test_plan_says_what_the_report_says():
    for kind in ("exact", "int8", "int4"):
        model = tiny("llama")
        planned = entry(plan(model, cache=kind).to_dict(), "cache")
        assert planned == entry(report(patch(model, cache=kind)).to_dict(), "cache")
        assert planned["exact"] == (kind == "exact")


@pytest.mark.parametrize(
    "value, message",
    [
        ("int3", "unknown kind 'int3'"),
        ("sinks", "allowed: True, False, 'int8'"),
        ("sinks:", "allowed: True"),
        ("sinks:many", "allowed: True"),
        ("sinks:-5", "allowed: True"),
        ("int8:5", "allowed: True"),
        ("sinks:7", "4 sinks in a window of 7"),
        (4, "cache=4; allowed"),
    ],
)
def test_impossible_values(value, message):
    model = tiny("llama")
    before = fingerprint(model)
    with pytest.raises(ValueError, match=message):
        patch(model, cache=value)
    assert not changes(before, fingerprint(model))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"kind": "int2"}, "unknown kind"),
        ({"recent": 5}, "recent=5"),
        ({"kind": "int8", "recent": -1}, "recent=-1"),
        ({"kind": "int8", "window": 100}, "window=100 for 'int8'"),
        ({"kind": "sinks"}, "window=None for 'sinks'"),
        ({"kind": "sinks", "window": 100, "sinks": 0}, "0 sinks"),
        ({"kind": "sinks", "window": 100, "recent": 3}, "recent=3"),
        ({"offload": "cpu"}, "offload='cpu' with 'exact'; a number of tokens"),
        ({"offload": 63}, "offload=63 with 'exact'; a number of tokens from 64 on"),
        ({"kind": "sinks", "window": 100, "offload": 64}, "offload=64 with 'sinks'"),
    ],
)
def test_impossible_options(options, message):
    with pytest.raises(ValueError, match=message):
        KVCache(**options)


def test_it_can_be_switched_off():
    model = patch(tiny("llama"), cache=False)
    assert "switched off" in entry(report(model).to_dict(), "cache")["reason"]
    with torch.no_grad():
        assert type(model(prompt(), use_cache=True).past_key_values.layers[0]) is DynamicLayer


@pytest.mark.parametrize("model_type", ["mamba", "rwkv", "xlstm"])
def test_models_without_keys_and_values(model_type):
    try:
        model = build(model_type)
    except Exception as error:
        pytest.skip(str(error)[:100])
    before = fingerprint(model)
    for kind in ("int8", "int4", "sinks:64"):
        with pytest.raises(UnsupportedModel, match=f"cache='{kind.split(':')[0]}'"):
            patch(model, cache=kind)
        assert not changes(before, fingerprint(model))
    assert "reason" in entry(report(patch(model)).to_dict(), "cache")


# The constant part of keys


@pytest.mark.parametrize("channel", [0, 3, 7])
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_large_bias_of_the_keys(kind, channel):
    """Fast or slow in its rotation: logits are near to stock's, and nearer than with it packed."""
    model, ids = build("qwen2", max_position_embeddings=1024), prompt(400)
    half = model.config.head_dim // 2 if getattr(model.config, "head_dim", None) else 8
    with torch.no_grad():
        for layer in model.model.layers:
            bias = layer.self_attn.k_proj.bias.view(-1, 2 * half)
            bias[:, channel % half], bias[:, channel % half + half] = 60.0, -60.0
        stock, errors = model(ids).logits[:, 200:], []
        for rotations in (True, False):
            patch(model, cache=kind)
            if not rotations:
                hook = next(h for h in _hooks(model) if isinstance(h, Converting))
                object.__setattr__(hook, "rotations", ())
            cache = model(ids[:, :200], use_cache=True).past_key_values
            layer = cache.layers[0]
            ours = torch.cat([model(p, past_key_values=cache).logits for p in ids[:, 200:].split(1, dim=1)], dim=1)
            assert (layer._constant is not None) == rotations
            error = 1 - torch.cosine_similarity(ours, stock, dim=-1).mean().item()
            errors.append(error)
            unpatch(model)
    assert errors[0] < {"int8": 0.01, "int4": 0.2}[kind]
    assert channel == 7 or errors[1] > 2 * errors[0]  # slow ones fit the minimum of a block as well


def _hooks(model):
    return [hook for module in model.modules() for hook in module._forward_pre_hooks.values()]


@pytest.mark.skipif("hybrid" not in STOCK, reason="transformers has no such layers yet")
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("model_type", ["falcon_h1", "zamba2"])
def test_layers_with_a_recurrent_state_are_packed_too(model_type, bits):
    model = randomise(build(model_type)).eval()
    ids, more = prompt(150), prompt(1, seed=1)

    def read():
        with torch.no_grad():
            cache = model(ids, use_cache=True).past_key_values
            return [model(more, past_key_values=cache).logits for _ in range(3)], cache

    expected, cache = read()
    hybrid = sum(type(layer) is LinearAttentionAndFullAttentionLayer for layer in cache.layers)
    patch(model, cache=KVCache(f"int{bits}", recent=0))
    found, cache = read()
    packed = [layer for layer in cache.layers if type(layer) is QUANTIZED[LinearAttentionAndFullAttentionLayer]]
    assert len(packed) == hybrid > 0 and all(layer._packed for layer in packed)
    error = max((a - b).std() / b.std() for a, b in zip(found, expected, strict=True))
    assert 0 < error < {8: 0.05, 4: 0.6}[bits]  # random weights make the most of rounding
    assert greedy(model, ids, 6, num_beams=2).shape == (1, 6)
