"""`patch(model)` and `patch(model, quantize=...)`: the same model object, patched in place."""

from __future__ import annotations

from typing import Any

from benchmarks.baselines import Loaded, hugging_face, missing

distributions: tuple[str, ...] = ()


def available(variant: str, device: str) -> str | None:
    return missing("hf_accel_patch")


def load(model: Any, variant: str) -> Loaded:
    from hf_accel_patch import patch, report

    if variant == "exact":
        return hugging_face(patch(model))
    patch(model, quantize=variant)
    row = next(row for row in report(model).to_dict()["passes"] if row["pass"] == "quantize")
    if row.get("reason"):
        raise RuntimeError(f"skipped: {row['reason']}")
    return hugging_face(model)
