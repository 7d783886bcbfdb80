"""A copy of a model that drafts for it: the same parameters, its linear weights in 4 bits, or without some layers."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from hf_accel_patch.families import bind, layer_list
from hf_accel_patch.journal import Journal
from hf_accel_patch.ops.linear import backend_for
from hf_accel_patch.ops.modules import QuantizedLinear, Specs
from hf_accel_patch.ops.packing import block_on, pack
from hf_accel_patch.ops.products import Spec
from hf_accel_patch.passes.quantize import Quantize


def own_copy(model: PreTrainedModel, scheme: str | None, skip_layers: Sequence[int]) -> PreTrainedModel:
    """The model once more, with the same parameters; its linear weights in 4 bits, and without some layers."""
    copied: dict[nn.Module, nn.Module] = {}
    copy: Any = _mirror(model, copied)
    copy.eval()  # dropout would draw random numbers
    if skip_layers:
        layers = layer_list(bind(copy))
        kept = [layer for index, layer in enumerate(layers) if index not in set(skip_layers)]
        vars(layers)["_modules"] = {str(index): layer for index, layer in enumerate(kept)}
    if scheme is None:
        return copy
    view = bind(copy)
    for module in copied.values():
        if isinstance(module, QuantizedLinear):
            _requantize(module, scheme)
    quantize = Quantize(scheme, originals="keep")  # type: ignore[arg-type]
    targets, _ = quantize.choose(view)
    journal = Journal()
    for target in targets:
        quantize.install(target, quantize.packed(target), journal)
    return copy


def _mirror(module: nn.Module, copied: dict[nn.Module, nn.Module]) -> nn.Module:
    """Modules of their own, without hooks, over the same parameters and buffers."""
    if module in copied:
        return copied[module]
    new = copied[module] = object.__new__(type(module))
    own = {key: OrderedDict() if key.endswith("_hooks") else value for key, value in vars(module).items()}
    vars(new).update(own)
    for store in ("_parameters", "_buffers"):
        vars(new)[store] = dict(vars(module)[store])
    children = {name: None if child is None else _mirror(child, copied) for name, child in module._modules.items()}
    vars(new)["_modules"] = children
    return new


def _requantize(module: QuantizedLinear, scheme: str) -> None:
    """The weights of an 8-bit layer in 4 bits."""
    spec = module.specs["weight"]
    if spec.scheme == scheme or module.in_features % 32 or "weight_order" in module._buffers:
        return
    dense = module.dequantize(module.like.dtype)
    size = next(size for size in (64, 32) if module.in_features % size == 0)
    codes, scales = pack(dense, scheme, size, block_on(dense.device))
    module._buffers.update(weight=codes, weight_scales=scales)
    vars(module)["specs"] = Specs({"weight": Spec(scheme, spec.shape, backend_for(scheme, True))})
