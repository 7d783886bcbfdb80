"""torchao, eager: int8 weights with a scale per row, int4 in groups of 64 in the packing of the device."""

from __future__ import annotations

from typing import Any

from benchmarks.baselines import Loaded, hugging_face, missing

distributions = ("torchao",)


def available(variant: str, device: str) -> str | None:
    return missing("torchao", "torchao.quantization")


def load(model: Any, variant: str) -> Loaded:
    from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

    if variant == "int8":
        quantize_(model, Int8WeightOnlyConfig())
    else:
        packing = "opaque" if model.device.type == "cpu" else "tile_packed_to_4d"
        quantize_(model, Int4WeightOnlyConfig(group_size=64, int4_packing_format=packing))
    return hugging_face(model)
