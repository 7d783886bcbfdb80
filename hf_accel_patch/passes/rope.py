"""Inverse frequencies as the method means them, where a cast has rounded them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_accel_patch.families import View
from hf_accel_patch.journal import Journal
from hf_accel_patch.plan import Skip, Step


@dataclass(frozen=True)
class Frequencies:
    """Put back float32 inverse frequencies that `.to(bfloat16)` or `.half()` on a loaded model has rounded.

    In bfloat16 their relative error of 0.4 % becomes a phase error of radians after some thousand tokens.
    `from_pretrained(dtype=...)` keeps them in float32, so what stock itself means is restored. Only frequencies that
    are exactly the rounding of what the configuration gives are touched.
    """

    name = "rope"

    def inspect(self, view: View) -> Step | Skip:
        size, rotary = view.weight_bytes(), view.rotary_modules()
        if not rotary:
            return Skip(self, "no rotary positions with frequencies of their own", size)
        work = [(module, name, exact) for _, module in rotary for name, exact in _rounded(module)]
        if not work:
            return Skip(self, "its frequencies are in full precision, and no scaling was asked for", size)
        grown = sum(exact.numel() * exact.element_size() // 2 for _, _, exact in work)  # from 16 bits to 32
        facts = {"exact": True, "bytes_before": size, "bytes_after": size + grown, "repaired": len(work)}
        return Step(self, facts, work)

    def apply(self, step: Step, journal: Journal) -> None:
        for module, name, exact in step.work:
            journal.set_buffer(module, name, exact)


def _rounded(module: nn.Module) -> list[tuple[str, Tensor]]:
    """The buffers of a rotary module that are roundings of float32 frequencies, with the exact ones."""
    low = {n: b for n, b in module._buffers.items() if n.endswith("inv_freq") and b is not None and _is_half(b)}
    if not low or not hasattr(module, "config"):
        return []
    try:
        fresh = type(module)(module.config)
    except (TypeError, KeyError, AttributeError, ValueError):  # a rotary module that is built from something else
        return []
    exact = {name: fresh._buffers.get(name) for name in low}
    return [
        (name, value.to(low[name].device))
        for name, value in exact.items()
        if value is not None
        and value.shape == low[name].shape
        and torch.equal(value.to(low[name].dtype), low[name].cpu())
    ]


def _is_half(buffer: Tensor) -> bool:
    return buffer.dtype in (torch.bfloat16, torch.float16) and not buffer.is_meta
