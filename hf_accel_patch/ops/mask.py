"""A mask that is a description until somebody asks for its elements."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from hf_accel_patch.ops.case import Causal, Dense, Everything, Mask
from hf_accel_patch.ops.lazy import Lazy

Build = Callable[[int, int, int, int], Tensor]


class DescribedMask(Lazy):
    """A bool mask [B, 1, T, S] that takes no memory. The package's attention asks for the blocks that it needs.

    `build(start, stop, first, last)` gives the dense block of these queries and keys. `window`: the keys that a query
    sees end with its own and are at most this many (None: it sees all earlier ones); `causal` says whether this may be
    used to leave keys out. `runs` gives, where it can, the one run of tokens per sequence that sees itself causally.
    `square` and `padding`: see ops.case.Mask.
    """

    build: Build
    offset: int  # of the first query, counted in keys
    causal: bool
    window: int | None
    runs: Callable[[], list[tuple[int, int]] | None]
    square: bool
    padding: Tensor | None
    _runs: list[tuple[int, int]] | None
    seen: Any  # its intervals (ops.seen), once somebody asked
    origin: DescribedMask | None = None  # the one on another device that knows what was computed

    @staticmethod
    def __new__(
        cls,
        shape: tuple[int, int, int, int],
        device: torch.device,
        build: Build,
        *,
        offset: int = 0,
        causal: bool = False,
        window: int | None = None,
        runs: Callable[[], list[tuple[int, int]] | None] = lambda: None,
        square: bool = False,
        padding: Tensor | None = None,
    ) -> DescribedMask:
        mask = Tensor._make_wrapper_subclass(cls, shape, dtype=torch.bool, device=device)
        mask.build, mask.offset, mask.causal, mask.window, mask.runs = build, offset, causal, window, runs
        mask.square, mask.padding = square, padding
        return mask

    def keys(self, start: int, stop: int) -> tuple[int, int]:
        last = self.shape[-1]
        if not self.causal:
            return 0, last
        first = 0 if self.window is None else max(0, start + self.offset - self.window + 1)
        return min(first, last - 1), max(1, min(last, stop + self.offset))

    def block(self, start: int, stop: int, first: int, last: int) -> Tensor | None:
        return self.build(start, stop, first, last)

    def spans(self) -> list[tuple[int, int]] | None:
        """Computed once, however many layers ask: on a GPU it waits for the device."""
        if not hasattr(self, "_runs"):
            self._runs = self.runs()
        return self._runs

    def windowed(self, window: int) -> DescribedMask:
        """The same mask where a query sees the last `window` keys up to its own only."""

        def build(start: int, stop: int, first: int, last: int) -> Tensor:
            queries = torch.arange(start, stop, device=self.device)[:, None] + self.offset
            near = torch.arange(first, last, device=self.device) > queries - window
            return self.build(start, stop, first, last) & near

        narrow = window if self.window is None else min(window, self.window)
        shape = cast(tuple[int, int, int, int], tuple(self.shape))
        return DescribedMask(shape, self.device, build, offset=self.offset, causal=self.causal, window=narrow)

    def dense(self) -> Tensor:
        return self.build(0, self.shape[-2], 0, self.shape[-1]).expand(self.shape)

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"DescribedMask(shape={tuple(self.shape)}, window={self.window})"

    def detached(self) -> DescribedMask:
        return copy.copy(self)

    def moved(self, device: torch.device) -> DescribedMask:
        """Without a mask of T x S on either device."""

        def build(start: int, stop: int, first: int, last: int) -> Tensor:
            return self.build(start, stop, first, last).to(device)

        shape = cast(tuple[int, int, int, int], tuple(self.shape))
        other = DescribedMask(shape, device, build)
        padding = None if self.padding is None else self.padding.to(device)
        origin = self if self.origin is None else self.origin
        vars(other).update(vars(self), build=build, runs=self.spans, padding=padding, origin=origin)
        return other

    def __copy__(self) -> DescribedMask:
        shape = cast(tuple[int, int, int, int], tuple(self.shape))
        other = DescribedMask(shape, self.device, self.build)
        vars(other).update(vars(self))
        return other


class Carried(Lazy):
    """A mask for code that wants a tensor and only passes it on: `content` is what our attention is to get, a mask or
    None, plain causal attention. It reads as a bool [B, T, S], which such code does not take for one of [B, 1, T, S]
    that it has to add something to."""

    content: Tensor | None

    @staticmethod
    def __new__(cls, content: Tensor | None, shape: tuple[int, int, int], device: torch.device) -> Carried:
        carried = Tensor._make_wrapper_subclass(cls, shape, dtype=torch.bool, device=device)
        carried.content = content
        return carried

    def dense(self) -> Tensor:
        B, T, S = self.shape
        if self.content is None:
            return torch.ones(T, S, dtype=torch.bool, device=self.device).tril(S - T).expand(B, T, S)
        dense = self.content.dense() if isinstance(self.content, DescribedMask) else self.content
        return dense[:, 0]

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"Carried({self.content!r})"

    def detached(self) -> Carried:
        return Carried(self.content, cast(tuple[int, int, int], tuple(self.shape)), self.device)


def last_keys(mask: Tensor, window: int) -> Tensor:
    """A bool mask [..., T, S], in which the last key that a query sees is its own, cut to the `window` ending there."""
    S = mask.shape[-1]
    last = S - 1 - mask.int().flip(-1).argmax(-1, keepdim=True)
    return mask & (torch.arange(S, device=mask.device) > last - window)


def contiguous_runs(padding: Tensor) -> list[tuple[int, int]] | None:
    """The run of True in each row of a bool [B, S], or None if a row has more than one run."""
    S = padding.shape[-1]
    counts = padding.sum(-1)
    starts = padding.int().argmax(-1)
    stops = S - padding.flip(-1).int().argmax(-1)
    whole = (stops - starts == counts) | (counts == 0)
    rows = torch.stack([starts, starts + counts, whole], dim=-1).tolist()
    return [(start, stop) for start, stop, _ in rows] if all(row[2] for row in rows) else None


def mask_of(mask: Tensor | None, keys: int, causal: bool, device: torch.device) -> Mask:
    """What an attention function was given, as our own functions take it."""
    if isinstance(mask, DescribedMask):
        return mask
    if mask is not None:
        return Dense(mask)
    return Causal(keys, device) if causal else Everything(keys)
