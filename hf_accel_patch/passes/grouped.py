"""Fewer key/value heads in models whose class knows none: our attention forward in the place of theirs."""

from __future__ import annotations

from typing import Any

from torch import nn

from hf_accel_patch.journal import Journal
from hf_accel_patch.passes.handwritten import SHARED, Replaced, replacement


def group(module: nn.Module, shared: int, journal: Journal) -> None:
    """Let a module whose projections have been converted attend with this many key/value heads."""
    kind: Any = type(module)
    if not (issubclass(kind, Replaced) and kind.fewer):
        journal.change_class(module, replacement(kind, True))
    how = type(module).made[1]  # type: ignore[attr-defined]
    journal.set_attribute(module, how.shared or SHARED, shared)
