"""bitsandbytes: nf4 in blocks of 64, or LLM.int8 with its threshold of 6; the head stays as it is, as transformers
leaves it. On a CPU its fused 4-bit product needs the `kernels` package, which downloads it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from benchmarks.baselines import Loaded, hugging_face, missing

distributions = ("bitsandbytes",)


def available(variant: str, device: str) -> str | None:
    return missing("bitsandbytes")


def load(model: Any, variant: str, texts: Sequence[str]) -> Loaded:
    head = model.get_output_embeddings()
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and child is not head:
                setattr(parent, name, _quantized(child, variant))
    return hugging_face(model)


def _quantized(linear: nn.Linear, variant: str) -> nn.Module:
    import bitsandbytes as bnb

    size, bias, weight = (linear.in_features, linear.out_features), linear.bias is not None, linear.weight
    made: Any
    if variant == "nf4":
        made = bnb.nn.Linear4bit(*size, bias=bias, compute_dtype=weight.dtype, quant_type="nf4", device="meta")
        made.weight = bnb.nn.Params4bit(weight.data, requires_grad=False, quant_type="nf4", module=made)
    else:
        made = bnb.nn.Linear8bitLt(*size, bias=bias, has_fp16_weights=False, threshold=6.0, device="meta")
        made.weight = bnb.nn.Int8Params(weight.data, requires_grad=False, has_fp16_weights=False)
    made.bias = linear.bias
    moved: nn.Module = made.to(weight.device)  # quantizes
    return moved
