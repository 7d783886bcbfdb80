"""Masks as intervals: the keys that a query sees are mostly one run of them, which is two numbers instead of a row.

That holds for causal masks, sliding windows, chunks, left and right padding and packed sequences; kernels that take
intervals compute any of these in memory and time that follow what is seen.
"""

from __future__ import annotations

from collections.abc import Hashable
from functools import cached_property, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from hf_accel_patch.ops.attention import GPU_SCORE_BYTES, SCORE_BYTES
from hf_accel_patch.ops.case import Causal, Everything, Mask
from hf_accel_patch.ops.mask import DescribedMask


class Run(NamedTuple):
    """Queries start..stop of a sequence that see keys first..last causally, the last of them all."""

    sequence: int
    start: int
    stop: int
    first: int
    last: int


class Seen:
    """`intervals`, int32 [B or 1, T, 2]: the first key that a query sees, and the one after the last."""

    def __init__(self, intervals: Tensor) -> None:
        self.intervals = intervals
        self.places: dict[Hashable, tuple[Tensor, ...]] = {}  # of its runs in memory (ops.flash)

    @cached_property
    def runs(self) -> tuple[list[Run], int] | None:
        """The runs of queries that see keys causally within a window, and the window, if this is all that the intervals
        say. On a GPU it waits for the device."""
        seen, found = self.intervals.cpu(), []
        first, last = seen.unbind(-1)
        window = int((last - first).max())
        for sequence in range(len(seen)):
            lo, hi = first[sequence], last[sequence]
            some = hi > lo
            begins = some & ((hi - lo == 1) | ~some.roll(1) | (hi.roll(1) + 1 != hi))
            begins[0] = some[0]
            ends = some & (~some.roll(-1) | begins.roll(-1))
            ends[-1] = some[-1]
            for start, end in zip(begins.nonzero()[:, 0].tolist(), ends.nonzero()[:, 0].tolist(), strict=True):
                run = Run(sequence, start, end + 1, int(lo[start]), int(hi[end]))
                expected = (hi[start : end + 1] - window).clamp(min=run.first)
                if not torch.equal(lo[start : end + 1], expected):
                    return None
                found.append(run)
        return found, window

    @cached_property
    def last(self) -> int:
        """The key after the last one that the first query sees."""
        return int(self.intervals[0, 0, 1])

    @cached_property
    def everything(self) -> bool:
        """Whether all queries see the same keys, from the first on."""
        return bool((self.intervals[..., 0] == 0).all() & (self.intervals[..., 1] == self.intervals[:1, :1, 1]).all())


def seen(mask: Mask, T: int, S: int, device: torch.device) -> Seen | None:
    """The intervals of a mask for T queries and S keys; None where a query sees keys that are not one run, where heads
    differ, and for masks that are added to the scores. Found once per described mask, however many layers ask."""
    if isinstance(mask, Causal | Everything):
        return _plain(T, S, isinstance(mask, Causal), device)
    if not isinstance(mask, DescribedMask):
        return _found(mask, T, S, device)
    mask = mask if mask.origin is None else mask.origin
    if not hasattr(mask, "seen"):
        mask.seen = _found(mask, T, S, device)
    return mask.seen


@lru_cache(maxsize=16)
def _plain(T: int, S: int, causal: bool, device: torch.device) -> Seen:
    with torch.inference_mode(False):  # for a later call may need gradients
        last = torch.arange(1, T + 1, device=device) if causal else torch.full((T,), S, device=device)
        return Seen(torch.stack([torch.zeros_like(last), last.clamp(max=S)], -1).int()[None])


def _found(mask: Mask, T: int, S: int, device: torch.device) -> Seen | None:
    spans = mask.spans() if mask.square else None
    if spans is not None:
        return _of_spans(spans, T, device)
    parts, whole = [], []
    width = 1 if mask.padding is None else len(mask.padding)
    room = SCORE_BYTES if device.type == "cpu" else GPU_SCORE_BYTES
    rows = max(1, room // (32 * S * width))
    for start in range(0, T, rows):
        stop = min(start + rows, T)
        left, right = mask.keys(start, stop)
        block = mask.block(start, stop, left, right)
        if block is None:
            block = torch.ones(1, 1, 1, right - left, dtype=torch.bool, device=device)
        if block.dtype != torch.bool or block.shape[1] != 1:
            return None
        block = block[:, 0].expand(-1, stop - start, -1).to(torch.uint8)
        count = block.sum(-1)
        first = block.argmax(-1)
        last = right - left - block.flip(-1).argmax(-1)
        whole.append(((last - first == count) | (count == 0)).all())
        first = torch.where(count == 0, 0, first + left)
        parts.append(torch.stack([first, first + count], -1).int())
    return Seen(torch.cat(parts, 1)) if bool(torch.stack(whole).all()) else None


def _of_spans(spans: list[tuple[int, int]], T: int, device: torch.device) -> Seen:
    start, stop = torch.tensor(spans, device=device).unbind(-1)
    last = torch.minimum(torch.arange(1, T + 1, device=device), stop[:, None])
    first = torch.where(torch.arange(T, device=device) < stop[:, None], start[:, None], last)
    return Seen(torch.stack([torch.minimum(first, last), last], -1).int())
