"""Linear: float weights read at the speed of the memory, where PyTorch's own products are slower."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_accel_patch.families import View
from hf_accel_patch.journal import Journal
from hf_accel_patch.ops.dense import FloatBackend, float_backend
from hf_accel_patch.ops.modules import FastLinear, FastTransposed
from hf_accel_patch.passes.quantize import Quantize
from hf_accel_patch.plan import Skip, Step


class FastConv1D(FastTransposed, Conv1D):  # type: ignore[misc]
    """GPT-2's layers."""


FAST: dict[Any, Any] = {nn.Linear: FastLinear, Conv1D: FastConv1D}
LEAST_WEIGHTS = 1 << 16  # of a layer: below this, calling costs more than reading


@dataclass(frozen=True)
class Linear:
    """Products of `nn.Linear`, and of GPT-2's `Conv1D`, on the CPU, in bfloat16, float16 and float32, for those rows of
    activations at which a short measurement finds another way faster than PyTorch's: a decode of one or a few
    sequences, where a compiled kernel reads weights at the memory's bandwidth, and 16 bits in general on processors
    that cannot calculate in them.

    The weights stay as and where they are, and outputs equal stock's up to floating-point rounding.
    """

    besides: Quantize | None = None  # whose weights are not float any more

    name = "linear"

    def inspect(self, view: View) -> Step | Skip:
        size = view.weight_bytes()
        taken = self.besides.modules(view) if self.besides else set()
        modules = [module for _, module in view.named_modules() if module not in taken and _is_large(module)]
        if not modules:
            small = f"it has no float nn.Linear or Conv1D of {LEAST_WEIGHTS} weights or more"
            return Skip(self, "its nn.Linear are quantized" if taken else small, size)
        here = [module for module in modules if module.weight.device.type in ("cpu", "meta")]
        if not here:
            return Skip(self, "it is not on the CPU", size)
        chosen = [(module, _backend_of(module)) for module in here]
        work = [(module, backend) for module, backend in chosen if backend.faster]
        if not work:
            dtypes = sorted({_name(backend) for _, backend in chosen})
            return Skip(self, f"nothing faster than PyTorch was found for {', '.join(dtypes)}", size)
        facts: dict[str, Any] = {"exact": True, "bytes_before": size, "bytes_after": size, "weights": len(work)}
        facts["backend"] = "; ".join(sorted({f"{_name(backend)}: {backend}" for _, backend in work}))
        return Step(self, facts, work)

    def apply(self, step: Step, journal: Journal) -> None:
        for module, backend in step.work:
            journal.set_attribute(module, "backend", backend)
            journal.change_class(module, FAST[type(module)])


def _is_large(module: Any) -> bool:
    return type(module) in FAST and module.weight.numel() >= LEAST_WEIGHTS


def _backend_of(module: Any) -> FloatBackend:
    if isinstance(module, Conv1D):
        return float_backend(module.weight.dtype, module.weight.shape[0], transposed=True)
    return float_backend(module.weight.dtype, module.in_features)


def _name(backend: FloatBackend) -> str:
    return str(backend.dtype).removeprefix("torch.")
