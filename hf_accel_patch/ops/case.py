"""What attention is asked to compute: who sees whom, and what an architecture adds to the scores.

Shapes: query [B, H, T, D], key [B, K, S, D], value [B, K, S, V].
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor


class Mask(Protocol):
    """Which keys a query may see, described instead of stored."""

    @property
    def square(self) -> bool:
        """Whether query t is key t and sees the keys up to itself, but for the `padding`, and nothing else is said."""
        ...

    @property
    def padding(self) -> Tensor | None:
        """If square: the keys that queries may see at all, bool [B, S]. None: all."""
        ...

    def keys(self, start: int, stop: int) -> tuple[int, int]:
        """A range of keys outside of which queries start..stop see nothing."""
        ...

    def block(self, start: int, stop: int, first: int, last: int) -> Tensor | None:
        """The mask [B or 1, H or 1, stop - start, last - first] of these queries and keys: bool, True where seen, or
        additive. None: all are seen."""
        ...

    def spans(self) -> list[tuple[int, int]] | None:
        """If the mask is causal within one contiguous run of tokens per sequence, and nothing else: these runs."""
        ...


@dataclass(frozen=True)
class Causal:
    """Query t sees the keys up to t. Keys beyond the queries (a static cache's free part) are never seen."""

    length: int
    device: torch.device

    square = True
    padding = None

    def keys(self, start: int, stop: int) -> tuple[int, int]:
        return 0, stop

    def block(self, start: int, stop: int, first: int, last: int) -> Tensor | None:
        rows = torch.arange(start, stop, device=self.device)[:, None]
        return (torch.arange(first, last, device=self.device) <= rows)[None, None]

    def spans(self) -> list[tuple[int, int]] | None:
        return None


@dataclass(frozen=True)
class Dense:
    """A mask that exists already, [B or 1, H or 1, T or 1, S], bool or additive."""

    mask: Tensor

    square = False
    padding = None

    def keys(self, start: int, stop: int) -> tuple[int, int]:
        return 0, self.mask.shape[-1]

    def block(self, start: int, stop: int, first: int, last: int) -> Tensor | None:
        rows = slice(None) if self.mask.shape[-2] == 1 else slice(start, stop)
        return self.mask[:, :, rows, first:last]

    def spans(self) -> list[tuple[int, int]] | None:
        return None


@dataclass(frozen=True)
class Everything:
    """Every query sees every key."""

    length: int

    square = False
    padding = None

    def keys(self, start: int, stop: int) -> tuple[int, int]:
        return 0, self.length

    def block(self, start: int, stop: int, first: int, last: int) -> Tensor | None:
        return None

    def spans(self) -> list[tuple[int, int]] | None:
        return None


@dataclass(frozen=True)
class Variant:
    """What an architecture adds to softmax(scale * q k^T) v."""

    scale: float
    dropout: float = 0.0
    softcap: float | None = None  # scores become cap * tanh(scores / cap) before masking (Gemma 2)
    sinks: Tensor | None = field(
        default=None, repr=False
    )  # [B or 1, H, T or 1, 1], one more logit without a value (gpt-oss)
    bias: Tensor | None = field(default=None, repr=False)  # float32, added to the scores, [B or 1, H or 1, T or 1, S]

    @property
    def plain(self) -> bool:
        return self.softcap is None and self.sinks is None and self.bias is None

    @property
    def factor(self) -> float:
        """Times which a product of query and key is a score, in units of the soft cap if there is one."""
        return self.scale if self.softcap is None else self.scale / self.softcap
