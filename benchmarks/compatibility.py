"""Which versions of transformers and torch the tests pass at: a row of each run of a suite in noxfile.py.

`nox -s contract` runs one in each environment, which ends with `python -m benchmarks.compatibility SUITE RESULTS.xml`;
`python -m benchmarks.table --write docs/compatibility.md` makes the table.
"""

from __future__ import annotations

import argparse
import json
import sys
import xml.etree.ElementTree as ElementTree
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from benchmarks.table import RESULTS, Row, line

PACKAGES = ("torch", "transformers", "accelerate", "peft", "huggingface_hub", "tokenizers", "hf_accel_patch")
COLUMNS = ("transformers", "torch", "Python", "accelerate", "peft", "suite")
COUNTS = ("passed", "skipped", "failed")
MOST_NAMES = 20  # of failed tests, in a row


def counted(results: Path) -> dict[str, Any]:
    """What pytest's --junit-xml says. Tests that are expected to fail count as skipped, and errors as failed."""
    cases = list(ElementTree.parse(results).getroot().iter("testcase"))
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = [case for case in cases if case.find("skipped") is not None]
    names = sorted(f"{case.get('classname')}::{case.get('name')}" for case in failed)[:MOST_NAMES]
    found = {"passed": len(cases) - len(failed) - len(skipped), "skipped": len(skipped), "failed": len(failed)}
    return found | ({"failures": names} if names else {})


def compatibility_markdown(rows: list[Row]) -> str:
    """The latest row of each suite with each transformers, torch and Python, the newest first."""
    if not rows:
        return ""
    latest = {_order(row): row for row in sorted(rows, key=lambda row: str(row["run"]))}
    lines = [line(*COLUMNS, *COUNTS, "date", "commit"), line(*(["---"] * 6 + ["---:"] * 3 + ["---"] * 2))]
    for _, row in sorted(latest.items(), reverse=True):
        names = [row["versions"].get(name, "") for name in ("transformers", "torch", "python", "accelerate", "peft")]
        counts = [str(row[name]) for name in COUNTS]
        lines.append(line(*names, row["suite"], *counts, row["run"][:10], row["commit"] or ""))
    return "\n".join(lines)


def _order(row: Row) -> tuple[Any, ...]:
    names = (row["versions"][name].partition("+")[0].split(".") for name in ("transformers", "torch", "python"))
    return (*(tuple(int(part) for part in name if part.isdigit()) for name in names), row["suite"])


def main() -> None:
    from benchmarks.measure import git_commit, versions

    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("suite", help="the name of what was run")
    parser.add_argument("results", type=Path, help="what pytest's --junit-xml wrote in this environment")
    parser.add_argument("--out", type=Path, default=RESULTS / "compatibility.jsonl", help="the file of rows")
    options = parser.parse_args()
    run = datetime.now(timezone.utc).isoformat(timespec="seconds")
    row = {"run": run, "commit": git_commit(), "part": "compatibility", "suite": options.suite}
    row |= {"versions": versions(*PACKAGES)} | counted(options.results)
    with options.out.open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(compatibility_markdown([row]))
    sys.exit(row["failed"] > 0 or not row["passed"])


if __name__ == "__main__":
    main()
