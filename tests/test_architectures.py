"""Every causal LM type of transformers: `patch(model)` is exact or leaves the model alone, and comes off bit for bit.

A type that cannot be built from its configuration alone, or whose stock forward fails or is not the same twice, is a
skip with its reason. `pytest -m slow` sweeps over all of them; every twelfth is in the normal run.
"""

from __future__ import annotations

import gc

import pytest
import torch
from cases import TYPES, build, entry, greedy, logits, prompt, relative_error
from fingerprint import changes, describe, fingerprint
from torch import Tensor
from transformers import PreTrainedModel

from hf_accel_patch import patch, report, unpatch

EXACT = 1e-4  # of the logits' standard deviation: float32 rounding alone is below 1e-5 on most types
AMPLIFIED = 3.0  # where it is more, times what one rounding error in every weight does to the logits
TOKENS = 8
SAMPLE = set(TYPES[::12])
LEAST_BUILT, LEAST_PATCHED = 0.93, 0.75  # shares of the types: fewer means that the builder or the pass is broken

found: dict[str, str] = {}  # model type -> "skipped", or whether our attention is on


@pytest.fixture(autouse=True)
def freed():
    yield
    gc.collect()


@pytest.mark.parametrize(
    "model_type", [pytest.param(each, marks=() if each in SAMPLE else pytest.mark.slow) for each in TYPES]
)
def test_type(model_type: str) -> None:
    ids = prompt(24)
    found[model_type] = "skipped"
    model, stock = _stock(model_type, ids)
    tokens = _tokens(model, ids)
    tolerance = max(EXACT, AMPLIFIED * _rounding(model_type, ids, stock))
    earlier, _, before = fingerprint(model), logits(model, ids), fingerprint(model)
    moving = set(changes(earlier, before))  # recurrent states that stock itself keeps in its modules

    assert patch(model) is model
    attention = entry(report(model).to_dict(), "attention")
    found[model_type] = attention.get("reason", "on")
    error = relative_error(logits(model, ids), stock)
    assert error <= tolerance, f"logits differ by {error:.1e} of {tolerance:.1e}"
    if tokens is not None:
        assert torch.equal(greedy(model, ids, TOKENS), tokens)

    unpatch(model)
    remaining = [place for place in changes(before, fingerprint(model)) if place not in moving]
    assert not remaining, describe(remaining)
    assert torch.equal(logits(model, ids), stock)


def test_coverage() -> None:
    """Of the types tested in this process, nearly all are built, and most have our attention."""
    if len(found) < len(SAMPLE):
        pytest.skip("the types were not tested in this process")
    built = [said for said in found.values() if said != "skipped"]
    patched = [said for said in built if said == "on"]
    assert len(built) >= LEAST_BUILT * len(found), f"{len(built)} of {len(found)}"
    assert len(patched) >= LEAST_PATCHED * len(found), f"{len(patched)} of {len(found)}"


def _stock(model_type: str, ids: Tensor) -> tuple[PreTrainedModel, Tensor]:
    """The model and its logits; a skip where stock has none."""
    try:
        model = build(model_type)
        first, second = logits(model, ids), logits(model, ids)
    except Exception as error:  # whatever a type raises that needs more than a configuration
        reason = " ".join(str(error).split())[:160]
    else:
        if torch.equal(first, second):  # false for NaN
            return model, first
        reason = "the stock logits are not finite, or not the same twice"
    pytest.skip(f"{model_type}: {reason}")


def _tokens(model: PreTrainedModel, ids: Tensor) -> Tensor | None:
    """What stock generates; None where it cannot."""
    try:
        return greedy(model, ids, TOKENS)
    except Exception:
        return None


@torch.no_grad()
def _rounding(model_type: str, ids: Tensor, stock: Tensor) -> float:
    """What one rounding error in every weight does to the logits. Recurrent layers and routers amplify it a lot."""
    model, generator = build(model_type), torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        noise = torch.empty(parameter.shape).normal_(generator=generator)
        parameter *= 1 + torch.finfo(parameter.dtype).eps * noise
    return relative_error(logits(model, ids), stock)
