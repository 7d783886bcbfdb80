"""Frequencies that a cast has rounded come back, and go again."""

import pytest
import torch
from cases import tiny

from hf_accel_patch import patch, report, unpatch


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
    row = {row["pass"]: row for row in report(model).to_dict()["passes"]}["rope"]
    assert row["exact"] and row["repaired"] == len(exact)
    unpatch(model)
    assert all(buffer is rounded[key] for key, buffer in model.named_buffers())


def test_frequencies_of_somebody_else_are_left_alone():
    model = tiny("llama").to(torch.bfloat16)
    model.model.rotary_emb.inv_freq *= 0.5
    before = model.model.rotary_emb.inv_freq
    patch(model)
    row = {row["pass"]: row for row in report(model).to_dict()["passes"]}["rope"]
    assert row["repaired"] == 1  # the untouched copy beside it
    assert model.model.rotary_emb.inv_freq is before
