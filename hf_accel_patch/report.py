"""What was done to a model, in measured numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hf_accel_patch.plan import table


@dataclass(frozen=True)
class Report:
    """The facts of one patched model, pass by pass. Prints as a table; `to_dict` is plain data for programs."""

    subject: str
    rows: tuple[dict[str, Any], ...]
    incomplete: str = ""  # what an exception left half done, where the originals were already discarded

    def to_dict(self) -> dict[str, Any]:
        """`{"model": ..., "patched": ..., "passes": [{"pass": ..., "exact": ..., "bytes_before": ...}, ...]}`."""
        described: dict[str, Any] = {"model": self.subject, "patched": bool(self.rows), "passes": list(self.rows)}
        return described | ({"incomplete": self.incomplete} if self.incomplete else {})

    def __str__(self) -> str:
        if not self.rows:
            return f"{self.subject} is not patched"
        return table(self.subject, self.rows) + (f"\nincomplete: {self.incomplete}" if self.incomplete else "")
