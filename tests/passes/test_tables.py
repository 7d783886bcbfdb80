"""Tables of positions that end at the trained length: with the patch on, as in a model built with a longer one."""

import copy
import pickle

import pytest
import torch
from cases import build, entry, greedy, left_padded, logits, prompt
from fingerprint import changes, fingerprint

from hf_accel_patch import UnsupportedModel, patch, report, unpatch
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
    row = entry(report(model).to_dict(), "rope")
    assert row["exact"] and row["tables"] == (1 if name == "roformer" else 4)


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
    assert "reason" in entry(report(patch(model)).to_dict(), "rope")


@pytest.mark.parametrize("name", FIELDS)
def test_positions_of_a_table_are_not_scaled(name):
    for options in ({"rope": "yarn:4"}, {"context": 4 * TRAINED}):
        with pytest.raises(UnsupportedModel, match="a table of sines"):
            patch(short(name), **options)
