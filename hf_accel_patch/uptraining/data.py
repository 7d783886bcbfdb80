"""Texts as windows of tokens: some to train on, the last ones to measure on. Which windows a step reads follows from
its number alone, so that a run can go on anywhere and in any number of processes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_accel_patch.families import context_tokens
from hf_accel_patch.passes.calibrate import tokenized

WINDOW = 512  # tokens, or what the model was made for if that is less
HELD_OUT = 20, 16  # one window of so many is measured on and not trained on; so many windows at most


@dataclass(frozen=True)
class Windows:
    """Token ids [windows, W], on the CPU."""

    training: Tensor
    held_out: Tensor

    def batch(self, step: int, size: int, seed: int) -> Tensor:
        """The windows [size, W] of one step. Every window is read once before any is read again."""
        count = len(self.training)
        places = range(step * size, (step + 1) * size)
        return self.training[[_order(count, seed + place // count)[place % count] for place in places]]

    def digest(self) -> str:
        """Equal for equal windows only."""
        data = torch.cat([self.training, self.held_out]).contiguous()
        return hashlib.sha256(data.numpy().tobytes()).hexdigest()[:16]


@lru_cache(maxsize=4)
def _order(count: int, seed: int) -> list[int]:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()


def cut(texts: Sequence[Any] | str | Tensor, model: PreTrainedModel, tokenizer: Any, window: int | None) -> Windows:
    """The texts, an end token behind each, cut into windows; what is left over at the end is dropped.

    Raises ValueError for a window longer than what the model was made for, and for less text than two windows.
    """
    if window is not None and window < 2:
        raise ValueError(f"window={window}; give 2 tokens or more")
    config = model.config.get_text_config(decoder=True)
    context = context_tokens(config)
    if window is not None and context is not None and window > context:
        raise ValueError(f"window={window} tokens, but the model was made for {context}")
    size = window or min(WINDOW, context or WINDOW)
    texts = [texts] if isinstance(texts, str | Tensor) else list(texts)
    rows = tokenized(texts, model, tokenizer, "texts", "give tokenizer= beside the texts")
    end = _end_token(config)
    ids = [token for row in rows for token in (row if row[-1:] == end else row + end)]
    count = len(ids) // size
    if count < 2:
        raise ValueError(
            f"the texts hold {len(ids)} tokens; two windows of {size} are needed, one to train on and one to measure on"
        )
    windows = torch.tensor(ids[: count * size]).view(count, size)
    apart = min(max(count // HELD_OUT[0], 1), HELD_OUT[1])
    return Windows(windows[:-apart], windows[-apart:])


def _end_token(config: Any) -> list[int]:
    """The token that ends a text, in a list; an empty one where the model has none."""
    found = getattr(config, "eos_token_id", None)
    found = found[0] if isinstance(found, list | tuple) and found else found
    return [found] if isinstance(found, int) else []
