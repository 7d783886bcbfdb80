"""What plans estimate of memory, against measured bytes; and what budgets decide for OctoCoder's shape.

    PYTHONPATH=.:tests python benchmarks/planner.py  # rows to benchmarks/results/planner.jsonl

Models of eight families, 3 layers of width 256 in float32, read a prompt of 768 tokens in a process whose malloc gives
back what is freed. For OctoCoder (15.5 billion weights, multi-query) nothing is read: its configuration is enough.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from planned_sizes import FAMILIES

from benchmarks.decode import RESULTS, record, start
from hf_accel_patch import HfAccelError, plan

OCTOCODER = {"model_type": "gpt_bigcode", "vocab_size": 49152, "n_embd": 6144, "n_inner": 24576, "n_layer": 40}
OCTOCODER |= {"n_head": 48, "n_positions": 8192, "multi_query": True, "dtype": "bfloat16"}
BUDGETS = ("40GiB", "24GiB", "16GiB", "12GiB", "8GiB")
CONTEXT = 8192


def measured() -> list[dict[str, Any]]:
    """A row per family and way."""
    script = Path(__file__).parent.parent / "tests" / "planned_sizes.py"
    malloc = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, str(script), *FAMILIES], env=os.environ | malloc, capture_output=True, text=True, check=True
    )
    return [{"part": "planner-measured"} | json.loads(line) for line in done.stdout.splitlines()]


def decided() -> list[dict[str, Any]]:
    """A row per budget, and one with all sizes."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(OCTOCODER))
        for scheme in plan(folder, context=CONTEXT).to_dict()["memory"]["schemes"]:
            scheme.pop("fits", None)
            rows.append({"part": "planner-octocoder", "context": CONTEXT} | scheme)
        for budget in BUDGETS:
            try:
                chosen = plan(folder, context=CONTEXT, budget=budget).to_dict()["passes"][0]
            except HfAccelError as error:
                chosen = {"error": str(error).partition("\n")[0]}
            rows.append({"part": "planner-budget", "asked": budget, **chosen})
    return rows


def main() -> None:
    run = start("cpu")
    for row in record(run, [*decided(), *measured()], RESULTS / "planner.jsonl"):
        print(json.dumps({name: value for name, value in row.items() if name not in run}))


if __name__ == "__main__":
    main()
