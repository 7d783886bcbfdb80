"""Fewer key/value heads in models whose class knows none: our attention forward in the place of theirs."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_accel_patch.errors import HfAccelError
from hf_accel_patch.families import bind
from hf_accel_patch.families.handwritten import without_shared
from hf_accel_patch.families.heads import features_axis, layouts, query_heads
from hf_accel_patch.journal import Journal
from hf_accel_patch.passes.handwritten import SHARED, Replaced, replacement


def is_grouped(module: nn.Module) -> bool:
    """Whether it attends with fewer key/value heads than its class knows."""
    return isinstance(module, Replaced) and type(module).fewer


def shared_of(model: nn.Module) -> int | None:
    """How many key/value heads such modules have; None where there are none."""
    found = next((module for module in model.modules() if is_grouped(module)), None)
    return None if found is None else int(vars(found)[_name(found)])


def group(module: nn.Module, shared: int, journal: Journal) -> None:
    """Let a module whose projections have been converted attend with this many key/value heads."""
    kind: Any = type(module)
    if not is_grouped(module):
        journal.change_class(module, replacement(kind, fewer=True))
    journal.set_attribute(module, _name(module), shared)


def shrink(model: PreTrainedModel, shared: int, journal: Journal) -> None:
    """Make a model as its class builds it ready for the weights of a converted one. Raises HfAccelError."""
    view = bind(model)
    heads = query_heads(view.config)
    found = [each for each in layouts(view, heads) if without_shared(type(each.module)) is not None]
    if not found or shared < 1 or heads % shared:
        raise HfAccelError(f"the checkpoint has {shared} key/value heads, which {view.subject} cannot have")
    for layout in found:
        after = layout.with_heads(shared)
        for part in {id(p): p for p in (layout.key, layout.value)}.values():
            features = after.features("key" if part is layout.key else "value")
            for name, parameter in part.named_parameters(recurse=False):
                shape = list(parameter.shape)
                shape[features_axis(part, parameter)] = features
                empty = torch.empty(shape, dtype=parameter.dtype, device=parameter.device)
                journal.set_parameter(part, name, nn.Parameter(empty, requires_grad=parameter.requires_grad))
            for name in ("out_features", "nf"):
                if name in vars(part):
                    journal.set_attribute(part, name, features)
        group(layout.module, shared, journal)


def _name(module: nn.Module) -> str:
    how: Any = type(module).made[1]  # type: ignore[attr-defined]
    return how.shared or SHARED
