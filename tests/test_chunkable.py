"""Every causal LM type of transformers: whether a prompt read in chunks gives what the whole prompt gives, and whether
`CHUNKABLE` says so. `pytest -m slow` sweeps over all of them; every twelfth is in the normal run."""

from __future__ import annotations

import pytest
import torch
from cases import TYPES, build, left_padded, prompt, relative_error
from torch import Tensor
from transformers import PreTrainedModel

from hf_accel_patch.families.chunkable import CHUNKABLE

EXACT = 3e-4  # of the logits' standard deviation: recurrent layers and routers amplify the rounding of float32
TOKENS = 3  # that are generated
SIZES = (13, 90)  # tokens of a chunk, below and above the windows and blocks of tiny models
SAMPLE = {*TYPES[::12], "llama", "gemma2", "qwen3_next"}

# Types that are not named though chunks were exact where it was tried: older transformers cut what they see
NOT_NAMED = frozenset({"big_bird", "megatron-bert", "rembert", "roformer"})


@pytest.mark.parametrize(
    "model_type", [pytest.param(each, marks=() if each in SAMPLE else pytest.mark.slow) for each in TYPES]
)
def test_type(model_type: str) -> None:
    try:
        model = build(model_type)
        inputs = {"input_ids": prompt(200)}, left_padded(200, 141, 13)
        stock = [_logits(model, each) for each in inputs]
    except Exception as error:  # whatever a type raises that needs more than a configuration
        pytest.skip(" ".join(str(error).split())[:160])
    named = {model.config.model_type, model.config.get_text_config(decoder=True).model_type} <= CHUNKABLE
    if not all(bool(scores.isfinite().all()) for scores in stock) or model.config.model_type in NOT_NAMED:
        pytest.skip("it is not the same twice, or differs between versions")
    calls = [(size, each, scores) for size in SIZES for each, scores in zip(inputs, stock, strict=True)]
    differ = next(filter(None, (_differ(model, *call) for call in calls)), "")
    assert named is not bool(differ), differ or f"{model.config.model_type} can be named"


def _differ(model: PreTrainedModel, size: int, inputs: dict[str, Tensor], stock: Tensor) -> str:
    """How a prompt in chunks differs, or why it cannot be read so; or nothing."""
    try:
        error = relative_error(_logits(model, inputs, prefill_chunk_size=size), stock)
    except Exception as raised:  # it has no cache for that
        return f"{type(raised).__name__}: {raised}"
    return "" if error < EXACT else f"chunks of {size} differ by {error:.1e}"


@torch.no_grad()
def _logits(model: PreTrainedModel, inputs: dict[str, Tensor], **options: int) -> Tensor:
    """Of the token after the prompt, and of those after it [B, TOKENS, V]."""
    torch.manual_seed(0)
    many = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False, "use_cache": True}
    what = {"return_dict_in_generate": True, "output_logits": True}
    return torch.stack(model.generate(**inputs, **many, **what, **options).logits, dim=1)
