"""What sequences of a batch count, and when being ahead is worth nothing."""

import pytest
import torch
from cases import left_padded, tiny

from hf_accel_patch import patch
from hf_accel_patch.compat import CACHE
from hf_accel_patch.ops.pacing import Guess, Pace
from hf_accel_patch.passes import apart
from hf_accel_patch.passes.apart import Row, _falls_back, _weigh


def row(lead=0, most=4):
    made = Row(10 + lead, ahead=[1] * max(0, lead - 1), logits=[torch.zeros(2)] * lead, best=[1] * lead)
    made.guess = Guess(1, 0.5, most)
    return made


def weights(leads, rates, horizon=48):
    rows = [row(lead) for lead in leads]
    _weigh(rows, rates, horizon)
    total = sum(each.guess.weight for each in rows)
    return [each.guess.weight / total for each in rows]


def test_sequences_alike_count_alike():
    assert weights([0, 0, 0], [2.0, 2.0, 2.0]) == pytest.approx([1 / 3] * 3)


def test_the_one_that_holds_up_the_batch_counts_alone():
    assert weights([0, 0, 0, 0], [3.0, 3.0, 3.0, 1.0])[3] > 0.98
    assert weights([30, 0], [2.0, 2.0])[1] > 0.95


def test_a_lead_is_dropped_where_it_saves_less_than_it_costs():
    dear, free = Pace(1.0, ratios={1: 1.2}), Pace(1.0, ratios={1: 1.0})
    held_up = [row(3), row(0)], [3.0, 1.0], 48
    even = [row(3), row(0)], [1.5, 1.5], 48
    assert _falls_back(*held_up, dear) and not _falls_back(*held_up, free)
    assert not _falls_back(*even, dear)
    assert not _falls_back([row(0), row(0)], [1.0, 3.0], 48, dear), "nobody is ahead"
    assert not _falls_back(*held_up, Pace(1.0)), "not before it is known what it costs"


def test_a_row_that_falls_back_has_read_all_but_the_last_chosen_token():
    made = row(3)
    made.fall_back(12)
    assert made.length == 12 and not (made.ahead or made.logits or made.best)


@pytest.mark.parametrize("padded", [True, False])
def test_where_nothing_is_drafted_the_model_gets_what_it_gets_from_transformers(padded, monkeypatch):
    """One token, its position, the padding if there is any, and no mask of our own."""
    monkeypatch.setattr(Pace, "choose", lambda self, guesses, draft_cost=0.0: 0)
    model, inputs = tiny("llama"), left_padded()
    if not padded:
        inputs = {"input_ids": inputs["input_ids"], "attention_mask": torch.ones_like(inputs["input_ids"])}
    calls, ran, inner = [], [], apart.decode_apart

    def record(module, args, kwargs):
        calls.append({name: each for name, each in kwargs.items() if isinstance(each, torch.Tensor)})
        calls[-1]["placed"] = any(getattr(layer, "apart", None) for layer in kwargs[CACHE].layers)

    handle = model.register_forward_pre_hook(record, with_kwargs=True)
    options = {"max_new_tokens": 12, "do_sample": False}
    expected = model.generate(**inputs, **options)
    stock = calls.copy()
    calls.clear()
    patch(model, speculative="ngram")
    monkeypatch.setattr("hf_accel_patch.passes.drafting.decode_apart", lambda *args: (ran.append(1), inner(*args))[1])
    assert torch.equal(model.generate(**inputs, **options), expected) and ran == [1]
    handle.remove()
    assert len(calls) == len(stock) == 12
    for ours, theirs in zip(calls[1:], stock[1:], strict=True):
        assert torch.equal(ours["input_ids"], theirs["input_ids"]) and not ours["placed"]
        if padded:
            assert torch.equal(ours["position_ids"], theirs["position_ids"])
            assert torch.equal(ours["attention_mask"].bool(), theirs["attention_mask"].bool())
        else:
            assert "attention_mask" not in ours
