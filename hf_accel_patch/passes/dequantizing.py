"""`model.dequantize()`: the rounded weights as floats again, in modules of their original classes."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_accel_patch.families import ADAPTERS
from hf_accel_patch.journal import Journal
from hf_accel_patch.ops.modules import HasWeight, QuantizedExperts, QuantizedModule, original_class

MARKS = ("hf_quantizer", "is_quantized", "quantization_method")  # what loading a quantized checkpoint leaves on a model
MARKS_OF_CONFIG = ("quantization_config", "_is_quantized")


class Dequantizing:
    """As transformers' method of this name: for training, merging adapters, or saving as an ordinary checkpoint. The
    weights are those that the codes stand for, so outputs stay what they are, up to floating-point rounding; the
    originals come with `unpatch`, where they were kept or can be read again. One weight at a time, so the peak is the
    float model and the codes of one. They are trainable, unless all others beside adapters are frozen.

    `dtype`: of the weights; None: that which they had. Raises ValueError where nothing is quantized.
    """

    def __init__(self, model: PreTrainedModel, journal: Journal) -> None:
        self.model, self.journal = model, journal

    @torch.no_grad()
    def __call__(self, dtype: torch.dtype | None = None) -> PreTrainedModel:
        shared: dict[int, nn.Parameter] = {}
        modules = [each for each in self.model.modules() if isinstance(each, QuantizedModule)]
        if not modules:
            raise ValueError("dequantize(): the model holds no quantized weights")
        others = [
            parameter.requires_grad
            for name, parameter in self.model.named_parameters()
            if not any(part.startswith(ADAPTERS) for part in name.split("."))
        ]
        trained = any(others) or not others
        for module in modules:
            specs, like = module.specs, dtype or module.like.dtype
            parameters = {}
            for name in specs:
                held = shared.get(id(specs)) if isinstance(module, HasWeight) else None
                parameters[name] = held if held is not None else nn.Parameter(_dense(module, name, like), trained)
            if isinstance(module, HasWeight):
                shared[id(specs)] = parameters["weight"]
            gone = [key for name in specs for key in (name, f"{name}_scales", f"{name}_order")]
            self.journal.put_back(module, original_class(module), parameters, [*gone, "like"], ["specs", "into", "out"])
        for place, names in ((self.model, MARKS), (self.model.config, MARKS_OF_CONFIG)):
            for name in names:
                vars(place).pop(name, None)
        return self.model


def _dense(module: QuantizedModule, name: str, dtype: torch.dtype) -> Tensor:
    """In the shape of the parameter."""
    if isinstance(module, HasWeight):
        return module.dequantize(dtype).contiguous()
    experts = cast(QuantizedExperts, module)
    count = len(module.held(name)[1])
    weights = torch.stack([experts.dequantize_expert(name, expert, dtype) for expert in range(count)])
    transposed: Any = experts.is_transposed
    return weights.transpose(1, 2).contiguous() if transposed else weights
