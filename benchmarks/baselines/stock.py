"""transformers as it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.baselines import Loaded, hugging_face

distributions: tuple[str, ...] = ()


def available(variant: str, device: str) -> str | None:
    return None


def load(model: Any, variant: str, texts: Sequence[str]) -> Loaded:
    return hugging_face(model)
