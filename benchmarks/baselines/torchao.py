"""torchao, eager: int8 weights with a scale per row; int4 in groups of 64, in the packing that the device has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.baselines import Loaded, hugging_face, missing

distributions = ("torchao",)


def available(variant: str, device: str) -> str | None:
    return missing("torchao", "torchao.quantization")


def load(model: Any, variant: str, texts: Sequence[str]) -> Loaded:
    from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

    if variant == "int8":
        quantize_(model, Int8WeightOnlyConfig())
    elif model.device.type == "cpu":
        from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig

        quantize_(model, PrototypeInt4WeightOnlyConfig(group_size=64))
    else:
        quantize_(model, Int4WeightOnlyConfig(group_size=64, int4_packing_format="tile_packed_to_4d"))
    return hugging_face(model)
