"""The attention pass on whole models: where masks are described instead of stored, and what else asks for them."""

import pytest
import torch
from cases import build, entry, greedy, left_padded, logits, prompt, relative_error, tiny
from transformers import ContinuousBatchingConfig, GenerationConfig, StaticCache

from hf_accel_patch import patch, report, unpatch
from hf_accel_patch.ops import attention as ops
from hf_accel_patch.ops.mask import DescribedMask
from hf_accel_patch.passes import attention
from hf_accel_patch.passes import described as described_masks

TOLERANCE = 1e-4  # of the logits' standard deviation; float32 rounding gives about 5e-6
TYPES = ("llama", "mistral", "gemma2", "gpt_oss", "qwen3", "gpt2", "deepseek_v3")


@pytest.fixture
def described(monkeypatch):
    """Describe every mask, however small, and attend in small blocks; returns the sizes of the dense blocks built."""
    monkeypatch.setattr(described_masks, "DENSE_ELEMENTS", 0)
    monkeypatch.setattr(attention, "SCORE_ELEMENTS", 0)
    monkeypatch.setattr(ops, "ROWS", 7)
    sizes, real = [], described_masks.sdpa_mask

    def counted(**kwargs):
        mask = real(**kwargs)
        sizes.append(0 if mask is None else mask.shape[-1] * mask.shape[-2])
        return mask

    monkeypatch.setattr(described_masks, "sdpa_mask", counted)
    return sizes


@pytest.mark.parametrize("name", TYPES)
def test_described_masks_agree_with_stock(name, described):
    model = tiny(name)
    padded, alone = left_padded(), prompt()
    stock = [logits(model, **padded), logits(model, alone), greedy(model, alone, 8)]
    tokens = greedy(model, tokens=8, **padded)
    patch(model)
    assert relative_error(logits(model, **padded), stock[0]) < TOLERANCE
    assert relative_error(logits(model, alone), stock[1]) < TOLERANCE
    assert torch.equal(greedy(model, alone, 8), stock[2])
    assert torch.equal(greedy(model, tokens=8, **padded), tokens)
    assert max([0, *described]) <= 8 * 48, "a mask of length x length was stored"


@pytest.mark.parametrize("name", ("llama", "mistral", "gemma2"))
def test_continuing_a_cache_agrees_with_stock(name, described):
    model, ids = tiny(name), prompt(length=60)
    stock = logits(model, ids)

    def in_parts():
        cache, parts = None, []
        for part in ids.split(17, dim=1):
            out = model(part, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            parts.append(out.logits.detach())
        return torch.cat(parts, 1)

    assert relative_error(in_parts(), stock) < TOLERANCE
    patch(model)
    assert relative_error(in_parts(), stock) < TOLERANCE


def test_packed_sequences_agree_with_stock(described):
    model, ids = tiny("llama"), prompt(length=30)
    positions = torch.cat([torch.arange(12), torch.arange(18)])[None]
    stock = logits(model, ids, position_ids=positions, use_cache=False)
    apart = torch.cat([logits(model, ids[:, :12]), logits(model, ids[:, 12:])], 1)
    patch(model)
    ours = logits(model, ids, position_ids=positions, use_cache=False)
    assert relative_error(ours, stock) < TOLERANCE and relative_error(ours, apart) < TOLERANCE


@pytest.mark.parametrize("name", ("llama", "mistral", "gemma2"))
def test_static_caches(name):
    model, ids = tiny(name), prompt()
    stock = greedy(model, ids, 8)
    patch(model)
    assert torch.equal(greedy(model, ids, 8, cache_implementation="static", disable_compile=True), stock)
    cache = StaticCache(model.config, max_cache_len=64)
    with torch.no_grad():
        ours = model(ids, past_key_values=cache).logits
    unpatch(model)
    assert relative_error(ours, logits(model, ids)) < TOLERANCE


@pytest.mark.parametrize("name", ("llama", "gemma2", "gpt_oss", "gpt2", "opt"))
def test_attention_weights_are_answered(name):
    """Also where the model does not hand the wish on (GPT-2, OPT)."""
    model = tiny(name)
    model.set_attn_implementation("eager")
    stock = model(**left_padded(), output_attentions=True).attentions
    model.set_attn_implementation("sdpa" if name == "llama" else "eager")
    patch(model)
    ours = model(**left_padded(), output_attentions=True).attentions
    assert len(ours) == len(stock) == model.config.num_hidden_layers
    real = left_padded()["attention_mask"][:, None, :, None].bool()
    assert all(((a - b) * real).abs().max() < 1e-5 for a, b in zip(ours, stock, strict=True))


@pytest.mark.parametrize("name", ("trocr", "roformer"))
def test_long_attention_to_an_encoder(name):
    more = {} if name == "trocr" else {"add_cross_attention": True}
    states = torch.randn(2, 600, 64, generator=torch.Generator().manual_seed(0))
    seen = torch.ones(2, 600, dtype=torch.long)
    for shown in (600, 450):
        seen[1, shown:] = 0
        model, options = build(name, **more), {"encoder_hidden_states": states, "encoder_attention_mask": seen}
        stock = logits(model, prompt(500, 2), **options, use_cache=False)
        assert relative_error(logits(patch(model), prompt(500, 2), **options, use_cache=False), stock) < TOLERANCE


@pytest.mark.parametrize("name", ("llama", "mistral", "gemma2"))
def test_attention_in_both_directions(name, described):
    model = build(name)
    model.config.is_causal = False
    for inputs in ({"input_ids": prompt(600)}, left_padded(300, 180)):
        stock = logits(model, **inputs, use_cache=False)
        patch(model)
        ours = logits(model, **inputs, use_cache=False)
        unpatch(model)
        assert relative_error(ours, stock) < TOLERANCE


@pytest.mark.parametrize(
    "name, options, reason",
    [
        ("codegen", {"is_causal": False}, "asks for both"),
        ("bloom", {"slow_but_exact": True, "pretraining_tp": 2}, "leaves out biases"),
    ],
)
def test_hand_written_attention_stays_where_its_configuration_makes_it_another(name, options, reason):
    model = build(name, **({} if name == "codegen" else options))
    vars(model.config).update(options)
    stock = logits(model, prompt(40), use_cache=False)
    assert reason in entry(report(patch(model)).to_dict(), "attention")["reason"]
    assert relative_error(logits(model, prompt(40), use_cache=False), stock) < TOLERANCE


@pytest.mark.parametrize("name", ("llama", "gpt2"))
def test_continuous_batching_goes_on_working(name):
    model = tiny(name)
    inputs = [prompt()[0].tolist(), prompt(length=17)[0].tolist()]
    config = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=0)
    small = ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=64)  # else it takes most of the free memory
    expected = [greedy(model, torch.tensor([ids]), 6)[0].tolist() for ids in inputs]
    patch(model)
    for _ in range(2):
        found = model.generate_batch(inputs, generation_config=config, continuous_batching_config=small)
        assert [result.generated_tokens for result in found.values()] == expected
        assert model.config._attn_implementation == attention.KEY
    unpatch(model)
    assert model.config._attn_implementation == "sdpa"


def test_compiling_after_a_patch():
    model = tiny("llama")
    stock = logits(model, **left_padded())
    patch(model)
    compiled = torch.compile(model, backend="aot_eager", dynamic=False)
    assert relative_error(logits(compiled, **left_padded()), stock) < TOLERANCE


def test_half_precision():
    model = tiny("llama").to(torch.bfloat16)
    exact = logits(tiny("llama"), prompt())
    stock = relative_error(logits(model, prompt()), exact)
    assert relative_error(logits(patch(model), prompt()), exact) < 1.5 * stock


def test_training_gradients_agree_with_stock():
    grads = []
    for model in (tiny("gemma2"), patch(tiny("gemma2"))):
        model.train()
        model(prompt(), labels=prompt()).loss.backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*grads, strict=True))


def test_a_chosen_implementation_stays():
    model = tiny("llama")
    model.set_attn_implementation("flex_attention")
    row = {row["pass"]: row for row in report(patch(model)).to_dict()["passes"]}["attention"]
    assert "flex_attention" in row["reason"]


def test_beams_and_sampling():
    model = tiny("mistral")
    stock = greedy(model, prompt(), 8, num_beams=3)
    patch(model)
    assert torch.equal(greedy(model, prompt(), 8, num_beams=3), stock)


@pytest.mark.parametrize("tokens", [1, 16])
def test_few_tokens_get_the_mask_itself_however_long_their_cache(tokens):
    """It is small beside the keys that it is for, every layer wants it, and kernels for few tokens take it."""
    S = described_masks.DENSE_ELEMENTS
    options = {"batch_size": 2, "q_length": tokens, "kv_length": S, "q_offset": S - tokens}
    padding = torch.ones(2, S, dtype=torch.bool)
    assert tokens > 1 or described_masks.describe_mask(**options, attention_mask=padding) is None
    padding[1, :5] = False
    mask = described_masks.describe_mask(**options, attention_mask=padding)
    assert type(mask) is torch.Tensor and mask.shape == (2, 1, tokens, S)
    assert not mask[1, 0, 0, :5].any() and mask[0, 0, -1].all()
    options |= {"q_length": 17, "q_offset": S - 17}
    assert type(described_masks.describe_mask(**options, attention_mask=padding)) is DescribedMask
