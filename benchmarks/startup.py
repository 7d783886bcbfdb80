"""What it costs to have the package around: python's start with the hook installed, and the import of the package.

    python -m benchmarks.startup                # rows to benchmarks/results/startup.jsonl, about 10 minutes

Starts with and without the hook, and imports with and without HF_ACCEL_PATCH, take turns. Times are the processor's,
which other programs disturb less, and those on the clock.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path
from typing import Any

from benchmarks.decode import RESULTS, record, start
from hf_accel_patch import hook
from hf_accel_patch.environment import PATCH, PREFIX

STARTS = 12  # in a row
ROOT = Path(__file__).parent.parent
IMPORTS = {
    "torch and transformers": "import torch, transformers",
    "and models": "import torch; from transformers import AutoModelForCausalLM, LlamaForCausalLM, pipeline",
}
TIMED = """
import sys, time
def now(): return 1e3 * time.process_time(), 1e3 * time.perf_counter()
def since(start): return [after - before for before, after in zip(start, now())]
start = now(); exec(sys.argv[1]); others = since(start)
start = now(); import hf_accel_patch; ours = since(start)
print(*others, *ours)
"""
LINE = """
import sys, time
line, times = sys.argv[1], []
for _ in range(1000):
    start = time.perf_counter()
    exec(line)
    times.append(1e3 * (time.perf_counter() - start))
print(sorted(times)[500])
"""


def environment(on: bool) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith((PREFIX, "PYTHON"))}
    return kept | {"PYTHONPATH": str(ROOT)} | ({PATCH: "1"} if on else {})


def output(command: list[str], on: bool = False) -> str:
    return subprocess.run(command, env=environment(on), capture_output=True, text=True, check=True).stdout


def started(python: str) -> tuple[float, float]:
    """Milliseconds of the processor, and on the clock, of `python -c pass`."""
    before, clock = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    output([python, "-c", "pass"])
    clock, after = time.perf_counter() - clock, resource.getrusage(resource.RUSAGE_CHILDREN)
    return 1e3 * (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime), 1e3 * clock


def starts(rounds: int) -> list[dict[str, Any]]:
    """Of a fresh virtual environment, without and with the hook, HF_ACCEL_PATCH not set."""
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=False)
        python = str(Path(folder) / "bin" / "python")
        site = Path(output([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]).strip())
        times: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
        for turn in range(rounds):
            for installed in (False, True) if turn % 2 else (True, False):
                hook.install(site) if installed else hook.remove(site)
                started(python)  # the first one after a change of the folder takes longer
                times[installed] += [started(python) for _ in range(STARTS)]
        line_ms = float(output([python, "-c", LINE, hook.LINE]))
    parts = ({"hook": installed, "start_cpu_ms": cpu, "start_ms": clock} for installed, (cpu, clock) in _turned(times))
    return [{"part": "startup-hook", **part, "line_ms": line_ms} for part in parts]


def imports(rounds: int) -> list[dict[str, Any]]:
    """Of the package after others, without and with HF_ACCEL_PATCH."""
    kinds = [(after, on) for after in IMPORTS for on in (False, True)]
    times: dict[tuple[str, bool], list[tuple[float, ...]]] = {kind: [] for kind in kinds}
    for _ in range(rounds):
        for (after, on), found in times.items():
            found.append(tuple(map(float, output([sys.executable, "-c", TIMED, IMPORTS[after]], on).split())))
    names = "others_cpu_ms", "others_ms", "import_cpu_ms", "import_ms"
    return [
        {"part": "startup-import", "after": after, "patching": on, **dict(zip(names, columns, strict=True))}
        for (after, on), columns in _turned(times)
    ]


def _turned(times: dict[Any, list[Any]]) -> list[tuple[Any, list[list[float]]]]:
    """Columns of three digits instead of rows."""
    return [(key, [[round(x, 3) for x in column] for column in zip(*rows, strict=True)]) for key, rows in times.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--starts", type=int, default=20, help=f"rounds of {STARTS} starts")
    parser.add_argument("--imports", type=int, default=7, help="rounds of imports")
    parser.add_argument("--out", type=Path, default=RESULTS / "startup.jsonl")
    options = parser.parse_args()
    rows = record(start("cpu"), [*starts(options.starts), *imports(options.imports)], options.out)
    for row in rows:
        medians = {key: round(statistics.median(value), 2) for key, value in row.items() if isinstance(value, list)}
        print({key: row[key] for key in ("hook", "line_ms", "after", "patching") if key in row}, medians)


if __name__ == "__main__":
    main()
