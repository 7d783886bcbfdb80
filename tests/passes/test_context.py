"""`context=`: the scaling that a model needs for so many tokens, or the reason why it needs none or has none."""

import pytest
import torch
from cases import FAMILIES, Family, build, entry, logits, prompt, relative_error, tiny
from fingerprint import changes, fingerprint

from hf_accel_patch import RopeScaling, UnsupportedModel, patch, plan, report, unpatch

TRAINED = 64
LONG = prompt(150, 2)


def short(name="llama", **overrides):
    row = FAMILIES.get(name, Family(name))
    return build(row.model_type, **{"max_position_embeddings": TRAINED, **row.overrides, **overrides})


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "qwen3"])
@pytest.mark.parametrize("tokens, factor", [(65, 2), (128, 2), (200, 4)])
def test_rotary_positions_are_scaled(name, tokens, factor):
    model, same = patch(short(name), context=tokens), patch(short(name), rope=f"yarn:{factor}")
    assert torch.equal(logits(model, LONG), logits(same, LONG))
    row = entry(report(model).to_dict(), "rope")
    assert (row["type"], row["factor"], row["context"]) == ("yarn", factor, factor * TRAINED)
    assert row["chosen"] == f"for context={tokens}"
    assert entry(report(model).to_dict(), "frequencies")["reason"] == "they are those of rope"
    assert row == entry(plan(short(name), context=tokens).to_dict(), "rope")


@pytest.mark.parametrize("tokens", [1, 63, 64])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_oss"])
def test_what_it_was_trained_on_needs_nothing(name, tokens):
    model = short(name) if name == "llama" else tiny(name)
    expected = logits(model, prompt())
    row = entry(report(patch(model, context=tokens)).to_dict(), "rope")
    assert "is trained on" in row["reason"]
    assert relative_error(logits(model, prompt()), expected) < 1e-4


def test_frequencies_are_repaired_in_any_case():
    model = patch(short().to(torch.bfloat16), context=TRAINED)
    rows = report(model).to_dict()
    assert entry(rows, "frequencies")["repaired"]
    assert entry(rows, "rope")["reason"].startswith(f"it is trained on {TRAINED} tokens")
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32


def test_models_without_a_limit():
    reason = entry(report(patch(tiny("bloom"), context=4096)).to_dict(), "rope")["reason"]
    assert "ALiBi" in reason and "no scaling is needed" in reason
    assert "limits" in entry(plan(build("mamba"), context=4096).to_dict(), "rope")["reason"]


@pytest.mark.parametrize("attention", [True, False])
def test_the_limit_of_alibi_is_lifted(attention, tmp_path):
    model, built = (build("mpt", max_seq_len=length) for length in (TRAINED, 256))
    before = fingerprint(model)
    if not attention:
        with pytest.raises((RuntimeError, ValueError, IndexError)):
            logits(model, LONG)
    patch(model, context=200, attention=attention)
    row = entry(report(model).to_dict(), "rope")
    assert row["exact"] and row["context"] == 200 and "no scaling is needed" in row["length"]
    assert relative_error(logits(model, LONG), logits(built, LONG)) < 1e-4
    model.save_pretrained(tmp_path)
    reloaded = type(model).from_pretrained(tmp_path).eval()
    assert relative_error(logits(reloaded, LONG), logits(built, LONG)) < 1e-4
    unpatch(model)
    assert not changes(before, fingerprint(model))


@pytest.mark.parametrize("name", ["gpt2", "opt", "gpt_neo", "gpt_bigcode"])
def test_learned_positions_end(name):
    model = tiny(name)
    before = fingerprint(model)
    with pytest.raises(UnsupportedModel, match=r"context=4096: it has learned a vector for each of 512 positions"):
        patch(model, context=4096)
    assert not changes(before, fingerprint(model))


def test_what_is_scaled_already():
    with pytest.raises(UnsupportedModel, match=r"context=4096: .*scaled already, by 'yarn'"):
        patch(tiny("gpt_oss"), context=4096)


def test_where_a_configuration_takes_no_yarn():
    """Phi-3's knows longrope only, whose factors nobody can guess."""

    def phi3():
        return short("phi3", original_max_position_embeddings=TRAINED, sliding_window=None)

    row = entry(report(patch(phi3(), context=200)).to_dict(), "rope")
    assert row["type"] == "self-extend" and row["context"] >= 200
    for options in ({"cache": "int8"}, {"attention": False}):
        with pytest.raises(UnsupportedModel, match=r"context=200: .*longrope"):
            patch(phi3(), context=200, **options)


@pytest.mark.parametrize("rope", ["linear:4", "dynamic:4", "self-extend:4", RopeScaling("dynamic", 4.0, length=250)])
def test_a_method_that_is_given_wins(rope):
    row = entry(report(patch(short(), rope=rope, context=200)).to_dict(), "rope")
    assert row["type"] == (rope.type if isinstance(rope, RopeScaling) else rope.partition(":")[0])


@pytest.mark.parametrize(
    "rope, factor", [("linear:2", 4), ("self-extend:2", 4), (RopeScaling("yarn", 2.0, original=32), 7)]
)
def test_a_method_that_does_not_reach(rope, factor):
    model = short()
    before = fingerprint(model)
    with pytest.raises(ValueError, match=rf"reaches \d+ tokens of context=200; it takes a factor of {factor}"):
        patch(model, rope=rope, context=200)
    assert not changes(before, fingerprint(model))


@pytest.mark.parametrize("tokens", [0, -1, 2.5, "16k", True])
def test_bad_values(tokens):
    with pytest.raises(ValueError, match=r"context=.*a number of tokens"):
        patch(short(), context=tokens)


def test_a_plan_says_what_the_cache_takes():
    row = entry(plan(short(), context=1000).to_dict(), "cache")
    heads, layers = 2, 4
    assert row["context"] == 1000 and row["bytes_before"] == layers * 1000 * heads * 2 * 16 * 4
    with torch.device("meta"):
        model = type(short())(short().config)
    assert entry(plan(model, context=200).to_dict(), "rope")["context"] == 256


def test_the_tokenizer_of_a_pipeline_follows():
    class Tokenizer:
        model_max_length = TRAINED

    class Pipeline:
        def __init__(self, model):
            self.model, self.tokenizer = model, Tokenizer()

    for model, length in ((short(), 256), (tiny("bloom"), 200), (build("mpt", max_seq_len=TRAINED), 200)):
        pipeline = patch(Pipeline(model), context=200)
        assert pipeline.tokenizer.model_max_length == length
        unpatch(pipeline)
        assert not vars(pipeline.tokenizer)
