"""Which layers of a checkpoint of another quantizer make which weight of a model.

Checkpoints hold experts one by one, and a model of today holds those of a layer in one parameter, the two weights to
the hidden features on top of one another. How they come together is taken from transformers' own conversions.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)

from hf_accel_patch.errors import UnsupportedModel
from hf_accel_patch.families.weights import Weight, linear_weights
from hf_accel_patch.ops import foreign

Layer = Tensor | foreign.Rows | foreign.Grouped | foreign.Table  # what one layer of a checkpoint is read as


@dataclass
class Made:
    """One weight of a model, and the layers of the checkpoint that it is made of."""

    module: str  # its name
    weight: Weight
    layers: list[list[str]] = field(default_factory=list)  # names: [expert][part], [0][0] for what is no expert

    @property
    def of_experts(self) -> bool:
        return self.weight.experts > 0

    @property
    def part_shape(self) -> tuple[int, int]:
        """[N, K] of a layer in the checkpoint."""
        N, K = self.weight.shape
        return N // len(self.layers[0]), K


def weights_of(skeleton: PreTrainedModel, layers: Sequence[str]) -> list[Made]:
    """What these layers make, module by module.

    Raises UnsupportedModel for a layer that the model lacks or holds in another way, and where experts are missing.
    """
    conversions = get_model_conversion_mapping(skeleton, add_legacy=False)
    renamings = [each for each in conversions if isinstance(each, WeightRenaming)]
    converters = [each for each in conversions if isinstance(each, WeightConverter)]
    names: Any = {**dict(skeleton.named_parameters(remove_duplicate=False)), **dict(skeleton.named_buffers())}
    found: dict[str, Made] = {}
    placed: dict[str, dict[tuple[int, int], str]] = {}
    for layer in layers:
        key, pattern = rename_source_key(f"{layer}.weight", renamings, converters, skeleton.base_model_prefix, names)
        module, _, leaf = key.rpartition(".")
        weight = _weight(skeleton, layer, module, leaf)
        made = found.setdefault(key, Made(module, weight))
        if not weight.experts and pattern is None:
            made.layers = [[layer]]
            continue
        converter = next((each for each in converters if pattern in each.source_patterns), None)
        place = _place(f"{layer}.weight", pattern, converter)
        if converter is None or place is None or not weight.experts:
            raise UnsupportedModel(f"the checkpoint has quantized {layer}, and how it becomes part of {key} is unknown")
        made.layers = [[""] * len(converter.source_patterns) for _ in range(weight.experts)]
        placed.setdefault(key, {})[place] = layer
    for key, each in placed.items():
        made = found[key]
        for (expert, part), layer in each.items():
            if expert >= len(made.layers):
                raise UnsupportedModel(f"the checkpoint has quantized {layer}, and {key} {len(made.layers)} experts")
            made.layers[expert][part] = layer
        if missing := [number for number, parts in enumerate(made.layers) if not all(parts)]:
            raise UnsupportedModel(
                f"{key}: of its {len(made.layers)} experts {len(missing)} are not quantized in the checkpoint "
                f"(the first is {missing[0]}), which a model that holds them in one tensor cannot have"
            )
    return sorted(found.values(), key=lambda made: (made.module, made.weight.name))


def joined(parts: Sequence[Any]) -> Layer:
    """Layers with the same inputs as one: their outputs after one another. Raises ValueError for those that differ in
    more, as in their order of inputs."""
    first: Layer = parts[0]
    if len(parts) == 1:
        return first
    if isinstance(first, Tensor):
        return torch.cat(list(parts))
    if len({each.codes.shape[1] for each in parts}) > 1:
        raise ValueError("its parts have different numbers of input features")
    if isinstance(first, foreign.Rows):
        return foreign.Rows(*(torch.cat([getattr(each, name) for each in parts]) for name in ("codes", "scale")))
    if isinstance(first, foreign.Table):
        codes, absmax = (torch.cat([getattr(each, name) for each in parts]) for name in ("codes", "absmax"))
        return foreign.Table(codes, absmax, first.table)
    if any(each.order is not None for each in parts):
        raise ValueError("act-order is not supported for experts")
    codes, scale, zero = (torch.cat([getattr(each, name) for each in parts]) for name in ("codes", "scale", "zero"))
    return foreign.Grouped(codes, scale, zero, None)


def _weight(skeleton: PreTrainedModel, layer: str, module: str, leaf: str) -> Weight:
    try:
        found = linear_weights(skeleton.get_submodule(module))
    except AttributeError:
        raise UnsupportedModel(f"the checkpoint has a quantized layer {layer}, which this model lacks") from None
    if isinstance(found, str) or found[0] not in ("linear", "transposed", "experts"):
        raise UnsupportedModel(f"the checkpoint has quantized {layer}, which is no nn.Linear here")
    weight = next((each for each in found[1] if each.name == leaf), None)
    if weight is None or (weight.transposed and weight.experts):  # a Conv1D's is quantized as an nn.Linear's, [N, K]
        raise UnsupportedModel(f"the checkpoint has quantized {layer}, which {module} holds in another way")
    return weight


def _place(key: str, pattern: str | None, converter: WeightConverter | None) -> tuple[int, int] | None:
    """The expert and the part that a layer is; None for conversions that do more than put experts together."""
    if pattern is None or converter is None:
        return None
    kinds = [type(operation) for operation in converter.operations]
    dims = [operation.dim for operation in converter.operations if isinstance(operation, MergeModulelist | Concatenate)]
    if (kinds, dims) not in (([MergeModulelist], [0]), ([MergeModulelist, Concatenate], [0, 1])):
        return None
    if kinds == [MergeModulelist] and len(converter.source_patterns) > 1:
        return None
    numbers = re.findall(r"\.(\d+)\.", key)
    return (int(numbers[-1]), converter.source_patterns.index(pattern)) if numbers else None
