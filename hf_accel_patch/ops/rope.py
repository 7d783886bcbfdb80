"""Rotary frequencies that depend on the length of the text: dynamic NTK and longrope."""

from __future__ import annotations

from dataclasses import dataclass, field

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
    _copies: dict[torch.device, tuple[Tensor, Tensor | None]] = field(default_factory=dict, repr=False)

    def on(self, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """`reference` and `longer` on a device. They are copied there once: not at each step, and not inside of a
        compiled call, which could then be no CUDA graph."""
        if device == self.reference.device:
            return self.reference, self.longer
        if device in self._copies:
            return self._copies[device]
        if torch.compiler.is_compiling():
            return self._copied(device)
        with torch.inference_mode(False):
            self._copies[device] = self._copied(device)
        return self._copies[device]

    def _copied(self, device: torch.device) -> tuple[Tensor, Tensor | None]:
        return self.reference.to(device), None if self.longer is None else self.longer.to(device)

    def at(self, lengths: Tensor) -> Tensor:
        """Of texts of `lengths` [R] tokens: [R, D / 2]. Nobody waits for the device."""
        reference, longer = self.on(lengths.device)
        if longer is None:
            size = 2 * reference.numel()
            seen = lengths.clamp(min=self.limit)
            base = self.base * ((self.factor * seen / self.limit) - (self.factor - 1)) ** (size / (size - 2))
            powers = torch.arange(0, size, 2, device=lengths.device, dtype=torch.float) / size
            longer = 1.0 / (base[:, None] ** powers)
        return torch.where((lengths > self.limit)[:, None], longer, reference)
