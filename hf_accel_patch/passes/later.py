"""The passes that this version does not have: it says so, in every plan and report."""

from __future__ import annotations

from dataclasses import dataclass

from hf_accel_patch.families import View
from hf_accel_patch.journal import Journal
from hf_accel_patch.plan import Skip, Step


@dataclass(frozen=True)
class Later:
    """A pass whose keyword is known and whose work is not in this version."""

    name: str
    reason: str

    def inspect(self, view: View) -> Step | Skip:
        return Skip(self, self.reason, view.weight_bytes())

    def apply(self, step: Step, journal: Journal) -> None:
        raise NotImplementedError(f"{self.name} never plans a step")
