"""`patch(model)` with options: the same model object, patched in place; calibrated, or on a GPU without CUDA graphs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.baselines import Loaded, hugging_face, missing

distributions: tuple[str, ...] = ()


def available(variant: str, device: str) -> str | None:
    return missing("hf_accel_patch")


def load(model: Any, variant: str, texts: Sequence[str]) -> Loaded:
    from hf_accel_patch import KVCache, Quantize, patch, report

    if variant == "exact":
        return hugging_face(patch(model))
    if variant.endswith("eager"):
        scheme = variant.rpartition("-")[0] or None
        return hugging_face(patch(model, quantize=scheme, cache=KVCache(graphs=False)))
    scheme, _, calibrated = variant.partition("-")
    if calibrated and not texts:
        raise ValueError("it needs texts to calibrate with")
    patch(model, quantize=Quantize(scheme, calibrate=list(texts)) if calibrated else scheme)
    row = next(row for row in report(model).to_dict()["passes"] if row["pass"] == "quantize")
    if row.get("reason"):
        raise RuntimeError(f"skipped: {row['reason']}")
    return hugging_face(model)
