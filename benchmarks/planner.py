"""What plans estimate of memory, against measured bytes; and what budgets decide for OctoCoder's shape.

    PYTHONPATH=.:tests python benchmarks/planner.py  # rows to benchmarks/results/planner.jsonl

Models of eight families, 3 layers of width 256 in float32, read a prompt of 768 tokens in a process whose malloc gives
back what is freed; then, under a budget, one of 2048 tokens in pieces of 256. For OctoCoder (15.5 billion weights,
multi-query) nothing is read: its configuration is enough, as is that of a Llama of 8 billion weights.
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
from benchmarks.shapes import SHAPES
from hf_accel_patch import HfAccelError, plan

OCTOCODER = SHAPES["octocoder"] | {"dtype": "bfloat16"}
BUDGETS = ("40GiB", "24GiB", "16GiB", "12GiB", "8GiB")
CONTEXT = 8192
LLAMA = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "dtype": "bfloat16",
}
LLAMA |= {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8}
LLAMA |= {"max_position_embeddings": 131072, "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}
LLAMA_BUDGETS = ("20GiB", "18GiB", "12GiB", "8GiB", "6GiB")
LLAMA_CONTEXT = 16384


def measured() -> list[dict[str, Any]]:
    """A row per family and way, and one where prompts are read in pieces."""
    script = Path(__file__).parent.parent / "tests" / "planned_sizes.py"
    malloc = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    rows: list[dict[str, Any]] = []
    for part, options in (("planner-measured", []), ("planner-pieces", ["--pieces"])):
        command = [sys.executable, str(script), *options, *FAMILIES]
        done = subprocess.run(command, env=os.environ | malloc, capture_output=True, text=True, check=True)
        rows += [{"part": part} | json.loads(line) for line in done.stdout.splitlines()]
    return rows


def decided() -> list[dict[str, Any]]:
    """A row per budget, and one with all sizes of OctoCoder."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(OCTOCODER))
        for scheme in plan(folder, context=CONTEXT).to_dict()["memory"]["schemes"]:
            scheme.pop("fits", None)
            rows.append({"part": "planner-octocoder", "context": CONTEXT} | scheme)
        rows += [{"part": "planner-budget"} | row for row in _chosen(folder, CONTEXT, BUDGETS)]
        (Path(folder) / "config.json").write_text(json.dumps(LLAMA))
        rows += [{"part": "planner-llama"} | row for row in _chosen(folder, LLAMA_CONTEXT, LLAMA_BUDGETS)]
    return rows


def _chosen(folder: str, context: int, budgets: tuple[str, ...]) -> list[dict[str, Any]]:
    rows = []
    for budget in budgets:
        try:
            chosen = plan(folder, context=context, budget=budget).to_dict()["passes"][0]
        except HfAccelError as error:
            chosen = {"error": str(error).partition("\n")[0]}
        rows.append({"asked": budget, **chosen})
    return rows


def main() -> None:
    run = start("cpu")
    for row in record(run, [*decided(), *measured()], RESULTS / "planner.jsonl"):
        print(json.dumps({name: value for name, value in row.items() if name not in run}))


if __name__ == "__main__":
    main()
