"""Positions in groups beyond a window of neighbours, against both score matrices in float64."""

import copy
import math
import threading

import pytest
import torch
from cases import FAMILIES, Family, build, entry, greedy, left_padded, logits, prompt, relative_error, tiny
from fingerprint import changes, fingerprint
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from hf_accel_patch import KVCache, PrefixCache, RopeScaling, UnsupportedModel, patch, patched, plan, report, unpatch
from hf_accel_patch.passes.self_extend_cache import ExtendedLayer

EXACT = 1e-4  # of the logits' standard deviation: float32 in another order
TRAINED, WINDOW, GROUP = 64, 8, 5  # the group that four times the trained length needs
SCALING = RopeScaling("self-extend", 4.0, window=WINDOW)
HALF = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
FULL = {"layer_types": ["sliding_attention", "full_attention"] * 2}
# name: further fields; the channels of a head that are rotated; whether neighbours are pairs, or the two halves
MODELS = {
    "llama": ({}, 16, False),
    "qwen2": ({}, 16, False),
    "qwen3": ({}, 16, False),
    "gpt_neox": ({"rope_parameters": HALF}, 8, False),
    "phi3": ({"sliding_window": None, "original_max_position_embeddings": TRAINED}, 16, False),
    "cohere": ({}, 16, True),
    "gemma2": ({}, 16, False),
    "gemma3_text": (FULL, 16, False),
    "mixtral": ({"sliding_window": None}, 16, False),
}
LONG = prompt(100, 2)


class Reference:
    """An attention function as transformers takes it: every score of every pair, twice, in float64."""

    positions: torch.Tensor
    window: int | None  # of the layer

    def __init__(self, base, channels, pairs, grouping, attention_factor):
        self.base, self.channels, self.pairs, self.attention_factor = base, channels, pairs, attention_factor
        self.neighbours, self.group = grouping

    def rotated(self, states, distance):
        size = self.channels
        frequencies = self.base ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)
        turn = torch.polar(torch.ones(1, dtype=torch.float64), distance[:, None, :, None] * frequencies)
        some = states[..., :size].double()
        first, second = (some[..., ::2], some[..., 1::2]) if self.pairs else some.chunk(2, dim=-1)
        moved = torch.complex(first, second) * turn
        parts = moved.real, moved.imag
        whole = torch.stack(parts, -1).flatten(-2) if self.pairs else torch.cat(parts, -1)
        return torch.cat([whole, states[..., size:].double()], -1)

    def __call__(self, module, query, key, value, mask, scaling=None, softcap=None, **kwargs):
        positions, groups = self.positions, query.shape[1] // key.shape[1]
        key, value = (each.double().repeat_interleave(groups, 1) for each in (key, value))
        near = query.double() @ key.mT
        grouped = positions // self.group
        queries = self.rotated(query, grouped + self.neighbours - self.neighbours // self.group - positions)
        far = queries @ self.rotated(key, grouped - positions).mT
        distance = positions[:, None, :, None] - positions[:, None, None]
        extended = not kwargs.get("sliding_window")  # other layers see no distance that is too long
        scores = (torch.where(distance >= self.neighbours, far, near) if extended else near) * scaling
        if extended:
            factor = self.attention_factor
            grows = ((positions + 1).clamp(min=TRAINED).double().log() / math.log(TRAINED))[:, None, :, None]
            scores = scores * (grows if factor is None else factor**2)
        scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
        seen = torch.ones_like(scores, dtype=torch.bool).tril() if mask is None else mask
        weights = scores.masked_fill(~seen, -1e30).softmax(-1)
        return (weights @ value).to(query.dtype).transpose(1, 2).contiguous(), None


@pytest.fixture
def reference():
    """Makes a model's attention the reference; `reference(model, ...)` gives logits."""
    name = "both_score_matrices"
    AttentionMaskInterface.register(name, sdpa_mask)

    def run(model, channels=16, pairs=False, grouping=(WINDOW, GROUP), factor=None, **inputs):
        rope = model.config.rope_parameters
        function = Reference(rope.get("full_attention", rope)["rope_theta"], channels, pairs, grouping, factor)
        AttentionInterface.register(name, function)
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        ones = torch.ones_like(ids) if mask is None else mask
        function.positions = (ones.cumsum(-1) - 1).clamp(min=0)
        other = copy.deepcopy(model)
        other.set_attn_implementation(name)
        return logits(other, **inputs, position_ids=function.positions, use_cache=False)

    yield run
    AttentionInterface._global_mapping.pop(name, None)
    AttentionMaskInterface._global_mapping.pop(name, None)


def short(name="llama", **overrides):
    row = FAMILIES.get(name, Family(name))
    own = MODELS[name][0] if name in MODELS else {}
    return build(row.model_type, **{"max_position_embeddings": TRAINED, **row.overrides, **own, **overrides})


def extended(name="llama", **overrides):
    return patch(short(name, **overrides), rope=SCALING)


@torch.no_grad()
def read(model, ids, lengths, cache=None, **kwargs):
    """The logits of a text that comes in parts of these lengths, the last one as often as it takes."""
    found, at = [], 0
    for length in lengths + [lengths[-1]] * ids.shape[1]:
        if at >= ids.shape[1]:
            break
        output = model(ids[:, at : at + length], past_key_values=cache, use_cache=True, **kwargs)
        cache, at = output.past_key_values, at + length
        found.append(output.logits)
    return torch.cat(found, 1), cache


@pytest.mark.parametrize("name", MODELS)
def test_it_is_both_score_matrices(name, reference):
    stock, model = short(name), extended(name)
    _, channels, pairs = MODELS[name]
    expected = reference(stock, channels, pairs, input_ids=LONG)
    assert relative_error(logits(model, LONG, use_cache=False), expected) < EXACT
    found, cache = read(model, LONG, [50, 1])
    assert relative_error(found, expected) < EXACT
    assert any(type(layer) is ExtendedLayer and layer.settled > 80 for layer in cache.layers)
    assert relative_error(logits(stock, LONG), expected) > 0.1, "nothing is changed, so this proves nothing"


@pytest.mark.parametrize("lengths", [[1], [5, 1, 1, 70, 3, 1], [30, 40, 10], [9, 2], [100]])
def test_in_any_parts(lengths, reference):
    model = extended()
    assert relative_error(read(model, LONG, lengths)[0], reference(short(), input_ids=LONG)) < EXACT


@pytest.mark.parametrize(
    "window, group, factor, attention_factor",
    [(1, 4, 4.0, None), (16, 3, 3.0, 1.0), (7, 5, 4.0, 1.1), (20, 1, 4.0, 1.0), (None, None, 2.5, None)],
)
def test_windows_and_groups(window, group, factor, attention_factor, reference):
    scaling = RopeScaling("self-extend", factor, None, None, attention_factor, window=window, group=group)
    model, chosen = patch(short(), rope=scaling), scaling.grouping(TRAINED)
    options = {"grouping": (chosen.window, chosen.group), "factor": attention_factor}
    expected = reference(short(), **options, input_ids=LONG)
    assert relative_error(read(model, LONG, [40, 1])[0], expected) < EXACT
    row = entry(report(model).to_dict(), "rope")
    assert (row["window"], row["group"]) == (chosen.window, chosen.group)
    if group == 1:
        assert relative_error(expected, logits(short(), LONG)) < EXACT, "groups of one are plain positions"


def test_left_padding(reference):
    """Each row is as it is alone."""
    model, batch = extended(), left_padded(60, 33, 18)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    expected = reference(short(), **batch)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        found = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits * mask[..., None]
        assert relative_error(found, expected) < EXACT
        cache, answers = None, []
        for first, last in [(0, 40), (40, 41), (41, 50), *((at, at + 1) for at in range(50, 60))]:
            inputs = {"attention_mask": mask[:, :last], "position_ids": positions[:, first:last]}
            output = model(ids[:, first:last], past_key_values=cache, use_cache=True, **inputs)
            cache = output.past_key_values
            answers.append(output.logits)
    assert relative_error(torch.cat(answers, 1) * mask[..., None], expected) < EXACT
    alone = [reference(short(), input_ids=row[seen.bool()][None])[0] for row, seen in zip(ids, mask, strict=True)]
    for row, other in zip(expected, alone, strict=True):
        assert relative_error(row[-len(other) :], other) < EXACT


def test_right_padding(reference):
    model, mask = extended(), torch.ones(2, 60).long()
    mask[1, 40:] = 0
    ids = prompt(60, 2) * mask
    expected = reference(short(), input_ids=ids, attention_mask=mask)
    assert relative_error(logits(model, ids, mask), expected) < EXACT


def test_changing_caches():
    """Rows are chosen, copied and reordered, tokens taken back."""
    model, ids = extended(), prompt(90, 3)
    for first in (30, 60):
        expected = logits(model, ids, use_cache=False)
        for rows, change in (
            ([0, 1, 2], lambda cache: None),
            ([2, 0, 0], lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0]))),
            ([0, 0, 1, 1, 2, 2], lambda cache: cache.batch_repeat_interleave(2)),
            ([1, 2], lambda cache: cache.batch_select_indices(torch.tensor([1, 2]))),
        ):
            _, cache = read(model, ids[:, :first], [first - 6, 1])
            change(cache)
            found, cache = read(model, ids[rows, first:], [1], cache)
            assert relative_error(found, expected[rows, first:]) < EXACT
            for back in (1, 12, 40):
                cache.crop(-back)
                again, cache = read(model, ids[rows, 90 - back :], [3, 1], cache)
                assert relative_error(again, expected[rows, 90 - back :]) < EXACT
    cache.reset()
    if cache.get_seq_length() == 0:
        assert relative_error(read(model, ids, [40, 1], cache)[0], expected) < EXACT


def test_a_cache_of_somebody_else(reference):
    expected, ids = reference(short(), input_ids=LONG), LONG
    model = extended()
    for cache in (DynamicCache(config=model.config), DynamicCache()):
        assert relative_error(read(model, ids, [40, 1], cache)[0], expected) < EXACT
    assert relative_error(read(patch(short(), rope=SCALING, cache=False), ids, [40, 1])[0], expected) < EXACT
    with torch.no_grad():
        held = short()(ids[:, :8], use_cache=True).past_key_values  # within the window, states are the same
    assert relative_error(read(model, ids[:, 8:], [30, 1], held)[0], expected[:, 8:]) < EXACT


def test_within_the_window_it_is_as_unscaled():
    scaling = RopeScaling("self-extend", 2.0, window=40)
    model, stock = patch(short(), rope=scaling), patch(short())
    assert torch.equal(logits(model, prompt(40, 2)), logits(stock, prompt(40, 2)))
    assert torch.equal(greedy(model, prompt(20), 20), greedy(stock, prompt(20), 20))


def test_everything_that_generates_goes_on():
    model, ids = extended(), prompt(70)
    expected = ids
    for _ in range(30):
        expected = torch.cat([expected, logits(model, expected, use_cache=False)[:, -1].argmax(-1, keepdim=True)], 1)
    expected = expected[:, 70:]
    assert torch.equal(greedy(model, ids, 30), expected)
    assert torch.equal(greedy(model, ids, 30, prefill_chunk_size=16), expected)
    assert torch.equal(greedy(model, ids, 30, prompt_lookup_num_tokens=3), expected)
    assert torch.equal(greedy(model, ids, 20, num_beams=3), greedy(model, ids, 20, num_beams=3, use_cache=False))
    assert greedy(model, tokens=30, **left_padded()).shape == (3, 30)
    assert torch.equal(greedy(patch(short(), rope=SCALING, speculative="ngram"), ids, 30), expected)


def test_a_prompt_kept_as_a_prefix():
    prefixes = PrefixCache("64MB")
    model = patch(short(), rope=SCALING, cache=KVCache(prefixes=prefixes))
    text = prompt(90)
    for length in (60, 90, 75):
        ids = text[:, :length]
        output = model.generate(
            ids, max_new_tokens=3, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        assert relative_error(output.logits[0], logits(model, ids, use_cache=False)[:, -1]) < EXACT
    assert prefixes.hits == 2


def test_weights_of_attention():
    model = extended()
    found = model(LONG, output_attentions=True, use_cache=False)
    assert relative_error(found.logits, logits(model, LONG)) < EXACT
    assert all(torch.allclose(each.sum(-1), torch.ones(())) for each in found.attentions)


def test_memory_is_linear(monkeypatch):
    """Blocks of queries, and never all scores at once."""
    from hf_accel_patch.ops import grouped

    model, rows = extended(), []
    expected = logits(model, LONG)

    def counting(function):
        def counted(first, *rest):
            rows.append(first.shape[2])
            return function(first, *rest)

        return counted

    monkeypatch.setattr(grouped, "LEAST_ROWS", 7)
    monkeypatch.setattr("hf_accel_patch.ops.attention.SCORE_BYTES", 100 * 2 * 4 * 8 * 7)
    for name in ("_fused", "weighed"):  # without gradients and with them
        monkeypatch.setattr(grouped, name, counting(getattr(grouped, name)))
        found = logits(model, LONG) if name == "_fused" else model(LONG).logits.detach()
        assert relative_error(found, expected) < EXACT
        assert max(rows) <= WINDOW and len(rows) >= 4 * 100 // WINDOW
        rows.clear()


def test_training_goes_on(reference):
    model = extended().train()
    ids = prompt(90)
    model(ids, labels=ids).loss.backward()
    plain = copy.deepcopy(model)
    expected = model.model.layers[0].self_attn.k_proj.weight.grad
    assert expected.abs().sum() > 0
    plain.zero_grad()
    plain.gradient_checkpointing_enable()
    loss = plain(ids, labels=ids).loss
    logits(plain, prompt(90), position_ids=torch.arange(5, 95)[None])  # other positions, before the backward
    loss.backward()
    assert torch.allclose(plain.model.layers[0].self_attn.k_proj.weight.grad, expected, atol=1e-6)
    out = model(ids[:, :60], use_cache=True)
    model(ids[:, 60:], past_key_values=out.past_key_values, labels=ids[:, 60:]).loss.backward()


def test_in_16_bits():
    model, exact = patch(short().to(torch.bfloat16), rope=SCALING), extended()
    expected = logits(exact, LONG)
    roundings = relative_error(logits(short().to(torch.bfloat16), LONG[:, :60]), logits(short(), LONG[:, :60]))
    for found in (logits(model, LONG), read(model, LONG, [50, 1])[0]):
        assert found.dtype == torch.bfloat16 and relative_error(found, expected) < 3 * roundings
    frequencies = model.model.rotary_emb.inv_freq
    assert frequencies.dtype == torch.float32 and torch.equal(frequencies, exact.model.rotary_emb.inv_freq)


def test_threads():
    model, errors = extended(), []
    texts = [prompt(70), prompt(100)]
    expected = [logits(model, text) for text in texts]

    def work(i):
        for _ in range(10):
            errors.append(relative_error(read(model, texts[i], [60, 5])[0], expected[i]))

    workers = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(errors) == 20 and max(errors) < EXACT


def test_it_comes_off_and_copies_are_patched():
    model = short()
    expected, before = logits(model, LONG), fingerprint(model)
    with patched(model, rope=SCALING):
        ours = logits(model, LONG)
        other = copy.deepcopy(model)
        assert relative_error(ours, expected) > 0.1
    assert not changes(before, fingerprint(model)) and torch.equal(logits(model, LONG), expected)
    assert torch.equal(logits(other, LONG), ours)
    unpatch(other)
    assert torch.equal(logits(other, LONG), expected)


def test_a_checkpoint_is_the_model_as_it_came(tmp_path):
    extended().save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(reloaded, LONG), logits(short(), LONG))
    assert reloaded.config.max_position_embeddings == TRAINED


def test_static_caches_are_refused():
    model = extended()
    assert greedy(model, prompt(5), 2, cache_implementation="static").shape == (1, 2)
    with pytest.raises(UnsupportedModel, match="a static one"):
        greedy(model, prompt(30), 5, cache_implementation="static")
    with pytest.raises(UnsupportedModel, match="self-extend"):
        model.init_continuous_batching()


REFUSED = {
    "gpt2": "rotary",
    "bloom": "ALiBi",
    "gptj": "table",
    "gpt_oss": "scaled already",
    "falcon_new": "hand-written",
    "deepseek_v3": "layer 0 caches latents",
    "jetmoe": "layer 0 computes with cached keys",
    "falcon_h1": "layer 0 has a cache of kind",
    "mistral": "window",
}


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_cannot_have_it(name):
    model = tiny(name) if name in FAMILIES else build(name)
    before = fingerprint(model)
    with pytest.raises(UnsupportedModel, match=REFUSED[name]):
        patch(model, rope="self-extend:4")
    assert not changes(before, fingerprint(model))


def test_it_is_planned_without_weights():
    with torch.device("meta"):
        model = type(short())(short().config)
    assert entry(plan(model, rope="self-extend:4").to_dict(), "rope")["context"] == 4 * TRAINED


@pytest.mark.parametrize("options", [{"cache": "int8"}, {"cache": "sinks:32"}, {"attention": False}])
def test_what_it_does_not_go_with(options):
    with pytest.raises(ValueError, match=r"self-extend.*(cache=|attention=False)"):
        patch(short(), rope=SCALING, **options)


@pytest.mark.parametrize(
    "options, words",
    [({"window": 0}, "window=0"), ({"group": 1.5}, r"group=1\.5"), ({"window": TRAINED}, f"trained on {TRAINED}")],
)
def test_bad_values(options, words):
    with pytest.raises(ValueError, match=words):
        patch(short(), rope=RopeScaling("self-extend", 4.0, **options))
    with pytest.raises(ValueError, match="belongs to 'self-extend'"):
        RopeScaling("yarn", 4.0, window=8)
