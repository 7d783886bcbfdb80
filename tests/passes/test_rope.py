"""Frequencies that a cast has rounded come back, and go again; scaled models are as built with the scaling."""

import copy

import pytest
import torch
from cases import FAMILIES, Family, build, entry, greedy, logits, prompt, relative_error, tiny
from fingerprint import changes, fingerprint
from transformers import AutoModelForCausalLM

from hf_accel_patch import AlreadyPatched, RopeScaling, UnsupportedModel, patch, patched, plan, report, unpatch


@pytest.mark.parametrize("name", ("llama", "gemma2", "gpt_neox", "gpt_oss"))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_rounded_frequencies_are_restored(name, dtype):
    exact = {key: buffer.clone() for key, buffer in tiny(name).named_buffers() if key.endswith("inv_freq")}
    model = tiny(name).to(dtype)
    rounded = dict(model.named_buffers())
    assert exact and all(rounded[key].dtype == dtype for key in exact)
    patch(model)
    restored = dict(model.named_buffers())
    assert all(torch.equal(restored[key], exact[key]) for key in exact)
    row = {row["pass"]: row for row in report(model).to_dict()["passes"]}["frequencies"]
    assert row["exact"] and row["repaired"] == len(exact)
    unpatch(model)
    assert all(buffer is rounded[key] for key, buffer in model.named_buffers())


def test_frequencies_of_somebody_else_are_left_alone():
    model = tiny("llama").to(torch.bfloat16)
    model.model.rotary_emb.inv_freq *= 0.5
    before = model.model.rotary_emb.inv_freq
    patch(model)
    row = {row["pass"]: row for row in report(model).to_dict()["passes"]}["frequencies"]
    assert row["repaired"] == 1  # the untouched copy beside it
    assert model.model.rotary_emb.inv_freq is before


# ------------------------------------------------------------------------------------------------------- scaling

TRAINED = 64
LONG = prompt(4 * TRAINED - 20, 2)
HALF = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
FULL = {"layer_types": ["sliding_attention", "full_attention"] * 2}
MODELS = {
    "llama": {},
    "gpt_neox": {"rope_parameters": HALF},
    "gemma3_text": FULL,
    "cohere": {},
    "glm": {},
    "falcon_new": {},
    "deepseek_v3": {},
    "olmo3": FULL,
}
FACTORS = {"short_factor": tuple([1.0] * 8), "long_factor": tuple(1.0 + i / 2 for i in range(8))}
METHODS = {
    "linear": "linear:4",
    "dynamic": "dynamic:4",
    "yarn": "yarn:4",
    "llama3": "llama3:4",
    "own yarn": RopeScaling("yarn", 4.0, attention_factor=1.2, beta_fast=16.0, beta_slow=2.0),
    "trained on less": RopeScaling("yarn", 8.0, original=32),
    "dynamic on less": RopeScaling("dynamic", 8.0, original=32),
}


def short(name, **overrides):
    row = FAMILIES.get(name, Family(name))
    return build(row.model_type, **{"max_position_embeddings": TRAINED, **row.overrides, **MODELS[name], **overrides})


def as_built(model):
    """A stock model built from the configuration that a patched one has, with the same weights."""
    config = copy.deepcopy(model.config)
    config._attn_implementation = "sdpa"
    fresh = type(model)(config).eval()
    fresh.load_state_dict(model.state_dict())
    return fresh


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", MODELS)
def test_scaled_is_as_built(name, method):
    stock, model = short(name), short(name)
    patch(model, rope=METHODS[method])
    expected = logits(as_built(model), LONG)
    assert relative_error(logits(model, LONG), expected) <= 1e-5
    assert relative_error(logits(stock, LONG), expected) > 1e-2, "it is not scaled, so this proves nothing"
    row = entry(report(model).to_dict(), "rope")
    assert not row["exact"] and row["factor"] >= 4 and row["context"] == 4 * TRAINED


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["llama", "gpt_neox", "gemma3_text"])
def test_a_saved_checkpoint_is_stocks(name, method, tmp_path):
    model = patch(short(name), rope=METHODS[method])
    model.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert relative_error(logits(reloaded, LONG), logits(model, LONG)) <= 1e-5
    context = reloaded.config.max_position_embeddings
    assert context == {"dynamic": TRAINED, "dynamic on less": 32}.get(method, 4 * TRAINED)


def test_longrope():
    scaling = RopeScaling("longrope", 4.0, **FACTORS)
    model = patch(short("llama"), rope=scaling)
    expected = as_built(model)
    for length in (TRAINED, TRAINED + 1, 3 * TRAINED):
        ids = prompt(length)
        assert relative_error(logits(model, ids), logits(expected, ids)) <= 1e-5
    assert model.config.rope_parameters["long_factor"] == list(FACTORS["long_factor"])


def test_phi3_takes_longrope_and_nothing_else(tmp_path):
    def phi3():
        return build("phi3", max_position_embeddings=TRAINED, original_max_position_embeddings=TRAINED)

    with pytest.raises(UnsupportedModel, match="longrope"):
        patch(phi3(), rope="yarn:4")
    model = patch(phi3(), rope=RopeScaling("longrope", 4.0, **FACTORS))
    expected = logits(as_built(model), LONG)
    assert relative_error(logits(model, LONG), expected) <= 1e-5
    model.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert relative_error(logits(reloaded, LONG), expected) <= 1e-5


def test_a_fixed_length_is_exact_at_any_depth(tmp_path):
    """The base for N tokens is another base: stock can express it."""
    N = LONG.shape[1]
    model = patch(short("llama"), rope=RopeScaling("dynamic", 4.0, length=N))
    dynamic = patch(short("llama"), rope="dynamic:4")
    expected = logits(dynamic, LONG)
    assert relative_error(logits(model, LONG), expected) <= 1e-4
    out = model(LONG[:, :50], use_cache=True)
    steps = [out.logits]
    for token in LONG[:, 50:].split(1, dim=1):
        out = model(token, past_key_values=out.past_key_values, use_cache=True)
        steps.append(out.logits)
    assert relative_error(torch.cat(steps, 1), expected) <= 1e-4
    assert model.config.rope_parameters["rope_type"] == "default" and model.config.max_position_embeddings == N
    model.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert relative_error(logits(reloaded, LONG), expected) <= 1e-4


def test_windows_of_gemma_are_left_alone():
    model = short("gemma3_text")
    before = copy.deepcopy(model.config.rope_parameters["sliding_attention"])
    patch(model, rope="yarn:4")
    assert model.config.rope_parameters["sliding_attention"] == before
    assert model.config.rope_parameters["full_attention"]["rope_type"] == "yarn"


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt_neox"])
@pytest.mark.parametrize("rope", ["yarn:4", "dynamic:4"])
def test_it_comes_off(name, rope):
    model = short(name)
    expected = logits(model, prompt())
    before = fingerprint(model)
    with patched(model, rope=rope):
        logits(model, LONG)
        greedy(model, prompt(), 40)
        assert changes(before, fingerprint(model))
    assert not changes(before, fingerprint(model))
    assert torch.equal(logits(model, prompt()), expected)


def test_it_composes_with_the_other_passes(attention_calls):
    plain = patch(short("llama"), rope="yarn:4", attention=False, cache=False)
    model = patch(short("llama"), rope="yarn:4")
    assert relative_error(logits(model, LONG), logits(plain, LONG)) <= 1e-4
    assert len(attention_calls) == 4, "the attention is not ours"
    quantized = patch(short("llama"), rope="yarn:4", quantize="int8", cache="int8")
    assert quantized.config.rope_parameters["rope_type"] == "yarn"
    assert greedy(quantized, LONG[:1], 5).shape == (1, 5)


def test_models_that_share_a_configuration():
    first = short("llama")
    second = type(first)(first.config).eval()
    before = fingerprint(second)
    patch(first, rope="yarn:4")
    assert first.config is not second.config and not changes(before, fingerprint(second))


def test_the_text_part_of_a_multimodal_model(tmp_path):
    model = build("gemma3")
    text, whole = model.config.text_config, model.config
    text.layer_types = ["sliding_attention", "full_attention"] * 2
    model = type(model)(model.config).eval()
    patch(model, rope="linear:4")
    assert model.config is not whole and whole.text_config is text
    assert model.config.text_config.rope_parameters["full_attention"]["factor"] == 4
    assert text.rope_parameters["full_attention"]["rope_type"] == "default"
    model.save_pretrained(tmp_path)
    reloaded = type(model).from_pretrained(tmp_path).eval()
    assert relative_error(logits(reloaded, prompt(300)), logits(model, prompt(300))) <= 1e-4
    unpatch(model)
    assert model.config is whole


def test_in_half_precision_frequencies_stay_exact():
    model = patch(short("llama").to(torch.bfloat16), rope="yarn:4")
    exact = patch(short("llama"), rope="yarn:4")
    for (name, ours), (_, theirs) in zip(model.named_buffers(), exact.named_buffers(), strict=True):
        assert torch.equal(ours, theirs), name


REFUSED = {
    "gpt2": "rotary",
    "opt": "rotary",
    "bloom": "ALiBi.*no scaling is needed",
    "mpt": "ALiBi",
    "falcon_alibi": "ALiBi",
    "gpt_oss": "scaled already, by 'yarn'",
}


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_cannot_be_scaled(name):
    model = tiny(name)
    before = fingerprint(model)
    with pytest.raises(UnsupportedModel, match=REFUSED[name]):
        patch(model, rope="linear:4")
    assert not changes(before, fingerprint(model)) and not report(model).to_dict()["patched"]


@pytest.mark.parametrize("name", ["qwen3_5_text", "gemma3_text"])
def test_more_that_cannot_be_scaled(name):
    """Several axes; layers that have nothing but windows."""
    with pytest.raises(UnsupportedModel, match={"qwen3_5_text": "several axes", "gemma3_text": "a window"}[name]):
        patch(build(name), rope="linear:4")


def test_scaling_twice():
    with pytest.raises(AlreadyPatched):
        patch(patch(short("llama"), rope="linear:4"), rope="linear:2")
    scaled = as_built(patch(short("llama"), rope="linear:4"))
    with pytest.raises(UnsupportedModel, match=r"scaled already, by 'linear' with factor 4\.0"):
        patch(scaled, rope="yarn:2")


@pytest.mark.parametrize(
    "value, words",
    [
        ("yarn:0.5", "factor 0.5"),
        ("yarn:nan", "factor nan"),
        ("yarn", "'yarn:F'"),
        ("yarn:four", "'yarn:F'"),
        ("ntk:4", "'ntk'.*'dynamic'"),
        (4, "RopeScaling"),
        ("longrope:4", "lists"),
    ],
)
def test_bad_values(value, words):
    model = short("llama")
    before = fingerprint(model)
    with pytest.raises(ValueError, match=words):
        patch(model, rope=value)
    assert not changes(before, fingerprint(model))


@pytest.mark.parametrize(
    "options, words",
    [
        (("linear", 4.0, None, 100), "length.*'dynamic'"),
        (("dynamic", 4.0, 0), "original=0"),
        (("dynamic", 4.0, None, None, 1.5), "attention_factor.*'yarn'"),
    ],
)
def test_bad_options(options, words):
    with pytest.raises(ValueError, match=words):
        RopeScaling(*options)


@pytest.mark.parametrize("kind", ["int8", "int4", "sinks:32"])
def test_keys_that_cannot_follow(kind):
    with pytest.raises(ValueError, match="rotated anew"):
        patch(short("llama"), rope="dynamic:4", cache=kind)
    fixed = RopeScaling("dynamic", 4.0, length=200)
    assert greedy(patch(short("llama"), rope=fixed, cache=kind), prompt(), 5).shape == (1, 5)


def test_a_plan_needs_no_weights():
    with torch.device("meta"):
        model = type(short("llama"))(short("llama").config)
    assert entry(plan(model, rope="dynamic:4").to_dict(), "rope")["context"] == 4 * TRAINED


class Tokenizer:
    model_max_length = TRAINED


class Pipeline:
    """What `patch` sees of a pipeline."""

    def __init__(self, model):
        self.model, self.tokenizer = model, Tokenizer()


def test_the_tokenizer_of_a_pipeline_follows():
    pipeline = Pipeline(short("llama"))
    patch(pipeline, rope="yarn:4")
    assert pipeline.tokenizer.model_max_length == 4 * TRAINED and Tokenizer.model_max_length == TRAINED
    unpatch(pipeline)
    assert pipeline.tokenizer.model_max_length == TRAINED and not vars(pipeline.tokenizer)
    patch(pipeline)
    assert not vars(pipeline.tokenizer)
