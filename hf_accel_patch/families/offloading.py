"""Weights that accelerate keeps in memory or on disk, and brings to a module for the time of its forward."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from hf_accel_patch.errors import UnsupportedModel

if TYPE_CHECKING:
    from hf_accel_patch.families import View


def is_offloaded(module: nn.Module) -> bool:
    """Whether the parameters of this module are elsewhere between two forwards."""
    hook = getattr(module, "_hf_hook", None)
    return any(getattr(each, "offload", False) for each in getattr(hook, "hooks", (hook,)))


def refuse_offloaded(view: View, asked: str) -> None:
    """Raise UnsupportedModel, on behalf of what was asked for, where weights are offloaded."""
    for name, module in view.model.named_modules():
        if is_offloaded(module):
            raise UnsupportedModel(
                f"{asked}: the weights of {name or view.subject!r} are offloaded by accelerate",
                "load the model without offloading to cpu or disk",
            )
