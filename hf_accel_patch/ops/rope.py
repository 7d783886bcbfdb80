"""Rotary frequencies that depend on the length of the text: dynamic NTK and longrope."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def stretched_base(base: float, factor: float, length: float, limit: int, channels: int) -> float:
    """The base of dynamic NTK for a text of `length` tokens, beyond the `limit`, of `channels` rotated channels."""
    stretch = (factor * length / limit) - (factor - 1)
    return float(base * stretch ** (channels / (channels - 2)))


@dataclass(frozen=True, eq=False)
class Lengths:
    """The frequencies [D / 2] of each length. Up to `limit` tokens they are `reference`, beyond it `longer` (longrope)
    or, where there is none, those of a base that grows with the length (dynamic NTK)."""

    reference: Tensor
    limit: int  # tokens
    longer: Tensor | None = None
    base: float = 1.0
    factor: float = 1.0

    def at(self, lengths: Tensor) -> Tensor:
        """Of texts of `lengths` [R] tokens: [R, D / 2]. Nobody waits for the device."""
        reference = self.reference.to(lengths.device)
        if self.longer is not None:
            longer = self.longer.to(lengths.device)
        else:
            size = 2 * reference.numel()
            seen = lengths.clamp(min=self.limit)
            base = self.base * ((self.factor * seen / self.limit) - (self.factor - 1)) ** (size / (size - 2))
            powers = torch.arange(0, size, 2, dtype=torch.int64).to(device=lengths.device, dtype=torch.float) / size
            longer = 1.0 / (base[:, None] ** powers)
        return torch.where((lengths > self.limit)[:, None], longer, reference)
