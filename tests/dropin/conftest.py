"""Models for programs that know nothing of the package, and the proof that a patch was at work in them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import transformers
from programs import BUNDLED, bundled

from hf_accel_patch import patch, report
from hf_accel_patch.texts import calibration_texts

WINDOW, WINDOWS = 64, 6


@pytest.fixture
def stock() -> Any:
    return bundled()


@pytest.fixture
def ours() -> Any:
    """The same model, patched with what is on by default."""
    return patch(bundled())


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return transformers.AutoTokenizer.from_pretrained(BUNDLED)


@pytest.fixture(scope="session")
def windows(tokenizer: Any) -> list[dict[str, Any]]:
    """Windows of text to train on."""
    ids = tokenizer(calibration_texts()[0])["input_ids"]
    parts = [ids[index * WINDOW : (index + 1) * WINDOW] for index in range(WINDOWS)]
    return [{"input_ids": part, "labels": part} for part in parts]


@pytest.fixture
def at_work(attention_calls: list[type]) -> Callable[..., None]:
    """Called after a program: it fails unless the report has these passes besides the attention and the cache, none of
    them skipped, and our attention was called `calls` times or more since it was asked last, in replayed steps too."""
    before: dict[int, int] = {}

    def asked(model: Any, *passes: str, calls: int = 1) -> None:
        applied = {row["pass"]: row for row in report(model).to_dict()["passes"] if "reason" not in row}
        assert {"attention", "cache", *passes} <= applied.keys()
        replayed = applied["cache"].get("graphs_replayed", 0)
        found = len(attention_calls) + (replayed - before.get(id(model), 0)) * applied["attention"]["modules"]
        assert found >= calls, f"{found} calls of our attention"
        before[id(model)] = replayed
        attention_calls.clear()

    return asked
