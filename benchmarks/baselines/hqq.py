"""hqq: int4 in groups of 64, its PyTorch backend; the head stays as it is, as transformers leaves it.

Its fit does about 3 million weights per second on two cores, so large models, of random weights, go without it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from benchmarks.baselines import Loaded, hugging_face, missing

distributions = ("hqq",)
MOST_FITTED = 50_000_000  # weights; with more, rounding: the same format, bytes and speed


def available(variant: str, device: str) -> str | None:
    return missing("hqq.core.quantize")


def load(model: Any, variant: str, texts: Sequence[str]) -> Loaded:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    head, settings = model.get_output_embeddings(), BaseQuantizeConfig(nbits=4, group_size=64, axis=1)
    fitted = model.num_parameters() <= MOST_FITTED
    settings["weight_quant_params"]["optimize"] = fitted
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and child is not head:
                made = HQQLinear(child, settings, compute_dtype=child.weight.dtype, device=str(model.device))
                setattr(parent, name, made)
    return hugging_face(model, "" if fitted else "codes by rounding, for its fit takes minutes; the same format")
