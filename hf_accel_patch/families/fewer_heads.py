"""What a model with fewer key/value heads looks like: its configuration, and how its class builds it.

Whether a class knows key/value heads is found: it is built from a configuration with fewer, on the meta device, and
compared with the live model. So are the attributes and shapes that follow.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.pytorch_utils import Conv1D

from hf_accel_patch.families import SHARED_HEADS, View
from hf_accel_patch.families.heads import Layout


@dataclass(frozen=True)
class Stock:
    """How the class itself is with fewer key/value heads: the layers that change, and attributes that follow."""

    layouts: list[Layout]
    attributes: list[tuple[nn.Module, str, Any]]
    problem: str = ""  # why it cannot be converted so


def grouped_config(config: PreTrainedConfig, shared: int, *, own: bool = False) -> PreTrainedConfig:
    """A copy with this many key/value heads; `own`: of a model that our attention runs with them."""
    new = copy.deepcopy(config)
    known = [name for name in SHARED_HEADS if hasattr(new, name)]
    for name in known or SHARED_HEADS[:1]:
        setattr(new, name, shared)
    inner: Any = getattr(new, "attn_config", None)
    if hasattr(inner, "kv_n_heads"):
        inner.kv_n_heads = shared
    if shared == 1 and hasattr(new, "multi_query") and not own:
        new.multi_query = True
    return new


def _built(model: PreTrainedModel, config: PreTrainedConfig) -> PreTrainedModel:
    """A model of the same class from this text configuration, without memory. Raises whatever the class raises."""
    whole = copy.deepcopy(model.config)
    text = whole.get_text_config(decoder=True)
    if text is whole:
        whole = copy.deepcopy(config)
    else:
        vars(whole).update({n: copy.deepcopy(config) for n, part in vars(whole).items() if part is text})
    kind: Any = type(model)
    with torch.device("meta"), no_init_weights():
        return kind(whole)


def compared(view: View, found: list[Layout], config: PreTrainedConfig, shared: int) -> Stock:
    """The live model beside one that was built with fewer key/value heads. What else differs from one that is built as
    it is, as gradient checkpointing, is its user's. Raises whatever the class raises that is built."""
    theirs, same = (dict(_built(view.model, each).named_modules()) for each in (config, view.config))
    expected: dict[int, dict[str, torch.Size]] = {}
    for layout in found:
        after = layout.with_heads(shared)
        for role in ("query", "key", "value"):
            part = getattr(layout, role)
            size = after.features(role)
            shapes = {"bias": torch.Size([size])}
            shapes["weight"] = _shape(part, size)
            expected[id(part)] = shapes
        if (norms := layout.norms()) is not None:
            weight: Any = norms[1]._parameters.get("weight")
            if weight is not None and weight.numel() == layout.shared * layout.key_size:
                size = weight.shape[0] * shared // layout.shared
                expected[id(norms[1])] = {"weight": torch.Size([size, *weight.shape[1:]])}
    attributes, changed = [], set()
    for name, module in view.named_modules():
        other = theirs.get(name)
        if other is None:
            return Stock(
                [], [], f"{name} is not of the model's own class, as with adapters: convert first, then add them"
            )
        for key, parameter in module._parameters.items():
            fresh_parameter = other._parameters.get(key)
            if parameter is None or fresh_parameter is None or parameter.shape == fresh_parameter.shape:
                continue
            if expected.get(id(module), {}).get(key) != fresh_parameter.shape:
                return Stock(
                    [], [], f"{name}.{key} would be {tuple(fresh_parameter.shape)}, for which no rule is known"
                )
            changed.add(id(module))
        for key, value in vars(same[name]).items():
            new = vars(other).get(key)
            if key != "config" and _plain(value) and _plain(new) and new != value:
                attributes.append((module, key, new))
    kept = [each for each in found if id(each.key) in changed and id(each.value) in changed]
    return Stock(kept, attributes)


def _plain(value: object) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_plain, value))
    return isinstance(value, bool | int | float | str)


def _shape(module: Any, features: int) -> torch.Size:
    other = module._parameters["weight"].shape
    return torch.Size([other[0], features] if isinstance(module, Conv1D) else [features, other[1]])
