"""Tables of positions that end at the trained length: with the patch on, as in a model built with a longer one."""

import copy
import pickle

import pytest
import torch
from cases import build, entry, greedy, left_padded, logits, prompt, relative_error
from fingerprint import changes, fingerprint
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from hf_accel_patch import RopeScaling, UnsupportedModel, patch, report, unpatch
from hf_accel_patch.families import tables

TRAINED, LONGER = 64, 300
FIELDS = {"gptj": "n_positions", "codegen": "n_positions", "roformer": "max_position_embeddings"}
LONG = prompt(150, 2)


def short(name="gptj", length=TRAINED):
    model = build(name, **{FIELDS[name]: length})
    for module in model.modules():
        if hasattr(module, "create_weight"):
            module.weight.data.copy_(module.create_weight())  # `build` has drawn it
    return model


def longer(name, model):
    """Stock, built for more positions, with the same weights."""
    made = short(name, LONGER)
    own = made.state_dict()
    made.load_state_dict(
        {key: own[key] if "embed_positions" in key else each for key, each in model.state_dict().items()}
    )
    return made


@pytest.mark.parametrize("attention", [True, False])
@pytest.mark.parametrize("name", FIELDS)
def test_as_built_with_more_positions(name, attention):
    stock = short(name)
    with pytest.raises((IndexError, RuntimeError)):
        logits(stock, LONG)
    model = patch(copy.deepcopy(stock), attention=attention)
    expected = longer(name, stock)
    if attention:
        patch(expected)
    assert torch.equal(logits(model, LONG), logits(expected, LONG))
    assert torch.equal(greedy(model, LONG[:, :50], 40), greedy(expected, LONG[:, :50], 40))
    rows = report(model).to_dict()
    row = next(row for row in (entry(rows, "frequencies"), entry(rows, "rope")) if "tables" in row)
    buffers = sum("embed_positions" in each._buffers for each in stock.modules())  # 4; since transformers 5.24 one
    assert row["exact"] and row["tables"] == (buffers or 1)


@pytest.mark.parametrize("name", ["gptj", "codegen"])
def test_the_rows_are_the_same_to_the_bit(name):
    made = short(name, LONGER)
    table = next(buffer for key, buffer in made.named_buffers() if key.endswith("embed_positions"))
    model = patch(short(name))
    module = next(each for each in model.modules() if "embed_positions" in each._buffers)
    token = tables._needed.set(LONGER)
    assert torch.equal(module.embed_positions[:LONGER], table) and len(module._buffers["embed_positions"]) == TRAINED
    tables._needed.reset(token)
    assert module.embed_positions is module._buffers["embed_positions"]


@pytest.mark.parametrize("name", FIELDS)
def test_in_16_bits_as_stock_casts_it(name):
    stock = short(name)
    model = patch(copy.deepcopy(stock).to(torch.bfloat16))
    expected = patch(longer(name, stock).to(torch.bfloat16))
    assert torch.equal(logits(model, LONG), logits(expected, LONG))


@pytest.mark.parametrize("name", ["gptj", "codegen"])
def test_padded_rows(name):
    batch = left_padded(100, 70, 20)
    model, expected = patch(short(name)), patch(longer(name, short(name)))
    assert torch.equal(greedy(model, tokens=10, **batch), greedy(expected, tokens=10, **batch))


@pytest.mark.parametrize("name", FIELDS)
def test_it_comes_off_and_leaves_nothing(name):
    model = short(name)
    expected, before = logits(model, prompt()), fingerprint(model)
    patch(model)
    on = fingerprint(model)
    logits(model, LONG)
    assert not changes(on, fingerprint(model)), "a long text has written into the model"
    assert {key: each.shape for key, each in model.state_dict().items()} == {
        key: each.shape for key, each in short(name).state_dict().items()
    }
    unpatch(model)
    assert not changes(before, fingerprint(model)) and torch.equal(logits(model, prompt()), expected)


@pytest.mark.parametrize("attention", [True, False])
@pytest.mark.parametrize("name", FIELDS)
def test_copies_and_pickles(name, attention):
    model = patch(short(name), attention=attention)
    expected = logits(model, LONG)
    assert torch.equal(logits(copy.deepcopy(model), LONG), expected)
    for module in model.modules():
        if "embed_positions" in module._buffers or "Positional" in type(module).__name__:
            assert type(pickle.loads(pickle.dumps(module))) is type(module)


def test_training_goes_on():
    model = patch(short())
    model.train()(LONG, labels=LONG).loss.backward()
    assert model.transformer.h[0].attn.k_proj.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("name", FIELDS)
def test_a_table_of_somebody_else_is_left_alone(name):
    model = short(name)
    for key, each in [*model.named_buffers(), *model.named_parameters()]:
        if "embed_positions" in key:
            each.data[1] += 1
    assert "reason" in entry(report(patch(model)).to_dict(), "frequencies")


def scaled_angles(scaling, channels):
    """Of transformers' own rotary module, with this configuration: sines and cosines [LONGER, channels / 2]."""
    rope = {"rope_type": scaling.type, "rope_theta": 10000.0, "factor": scaling.factor}
    if scaling.type != "linear":
        rope["original_max_position_embeddings"] = TRAINED
    if scaling.type == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    sizes = {"hidden_size": channels, "num_attention_heads": 1, "head_dim": channels}
    config = LlamaConfig(**sizes, max_position_embeddings=TRAINED, rope_parameters=rope)
    cos, sin = LlamaRotaryEmbedding(config)(torch.empty(1), torch.arange(LONGER)[None])
    return torch.cat((sin[0, :, : channels // 2], cos[0, :, : channels // 2]), -1)


@pytest.mark.parametrize("kind", ["linear", "yarn", "llama3"])
@pytest.mark.parametrize("name", FIELDS)
def test_tables_are_scaled(name, kind):
    """As in a model whose table has the sines of the scaled frequencies."""
    scaling = RopeScaling(kind, 4.0)
    model, expected = patch(short(name), rope=scaling), patch(longer(name, short(name)))
    unscaled = logits(expected, LONG)
    for key, each in [*expected.named_buffers(), *expected.named_parameters()]:
        if "embed_positions" in key:
            each.data.copy_(scaled_angles(scaling, each.shape[1]))
    found = logits(model, LONG)
    assert relative_error(found, logits(expected, LONG)) < 1e-4
    assert relative_error(found, unscaled) > 1e-2, "nothing is scaled, so this proves nothing"
    cached = []
    for each in (model, expected):
        with torch.no_grad():
            out = each(LONG[:, :60], use_cache=True)
            cached.append(each(LONG[:, 60:], past_key_values=out.past_key_values, use_cache=True).logits)
    assert relative_error(*cached) < 1e-4
    assert torch.equal(logits(copy.deepcopy(model), LONG), found)
    row = entry(report(model).to_dict(), "rope")
    assert not row["exact"] and row["context"] == 4 * TRAINED and row["type"] == kind
    assert torch.equal(logits(unpatch(model), prompt()), logits(short(name), prompt()))


def test_a_fixed_base_and_a_context():
    model = patch(short(), rope=RopeScaling("dynamic", 4.0, length=200))
    assert relative_error(logits(model, LONG), logits(patch(short()), LONG)) > 1e-2
    row = entry(report(patch(short(), context=200)).to_dict(), "rope")
    assert (row["type"], row["factor"], row["context"]) == ("yarn", 4.0, 256)


@pytest.mark.parametrize("name", FIELDS)
def test_what_a_table_cannot_have(name):
    for rope in ("dynamic:4", "self-extend:4"):
        with pytest.raises(UnsupportedModel, match="a table of sines"):
            patch(short(name), rope=rope)
