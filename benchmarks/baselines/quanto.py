"""optimum-quanto: weights of every linear layer, the head included; frozen, so that only the codes stay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.baselines import Loaded, hugging_face, missing

distributions = ("optimum-quanto",)


def available(variant: str, device: str) -> str | None:
    return missing("optimum.quanto")


def load(model: Any, variant: str, texts: Sequence[str]) -> Loaded:
    from optimum.quanto import freeze, qint4, qint8, quantize

    quantize(model, weights=qint8 if variant == "int8" else qint4)
    freeze(model)
    return hugging_face(model)
