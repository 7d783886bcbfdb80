"""How much faster is a patched model than stock, and than what peers make of it? Prefill and decode, batch 1 or more.

    python -m benchmarks.decode --shape llama-3.2-1b
    python -m benchmarks.decode --shape tiny --systems stock exact int4 --rounds 3
    python -m benchmarks.decode --device cuda --batch 8 --prompt 2048 --padded --systems stock exact
    python -m benchmarks.decode --busy 1 --systems stock exact int4

Every system sits in a process of its own; in each round each generates once, in turn, so that whatever else the machine
does falls on all of them. One row of JSON per shape and system is added to --out as soon as a shape is done.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.baselines import EAGER, FORMATS, SYSTEMS, missing
from benchmarks.measure import Workload, git_commit, hardware, read_bandwidth, versions
from benchmarks.shapes import SHAPES
from benchmarks.table import markdown
from benchmarks.worker import Failed, Job, Serving, Worker

RESULTS = Path(__file__).parent / "results"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shape", action="append", choices=SHAPES, help="repeatable (default: llama-3.2-1b)")
    every = [name for name in SYSTEMS if name not in FORMATS]
    usual = [name for name in every if name not in EAGER]
    parser.add_argument("--systems", nargs="+", choices=every, default=usual, help="default: all but the eager ones")
    parser.add_argument("--layers", type=int, help="cut each shape to this many layers")
    parser.add_argument("--rounds", type=int, default=9, help="generations timed per system (default: 9)")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of the prompt (default: 128)")
    parser.add_argument("--tokens", type=int, default=33, help="new tokens, at least 2 (default: 33)")
    parser.add_argument("--batch", type=int, default=1, help="prompts generated at once (default: 1)")
    parser.add_argument("--padded", action="store_true", help="pad the prompts of a batch on the left, to half at most")
    parser.add_argument("--busy", type=int, default=0, help="other processes that compute meanwhile (default: 0)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads (default: all cores)")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 (default: cpu)")
    parser.add_argument("--limit", type=float, default=300, help="seconds for a system to load, and again to run (300)")
    parser.add_argument("--out", type=Path, help="file of rows (decode.jsonl in $OUT or in benchmarks/results)")
    options = parser.parse_args()
    if options.tokens < 2 or options.rounds < 1:
        parser.error("--tokens must be at least 2 and --rounds at least 1")
    options.run_limit, options.interrupted = options.limit, False
    options.shape = options.shape or ["llama-3.2-1b"]
    options.out = options.out or Path(os.environ.get("OUT", RESULTS)) / "decode.jsonl"
    return options


@contextmanager
def beside(count: int) -> Iterator[None]:
    """So many processes each keep a core busy meanwhile, without much memory."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


@contextmanager
def dropped(system: str, workers: dict[str, Worker], reasons: dict[str, str]) -> Iterator[None]:
    """A system that fails inside leaves the comparison, its reason noted."""
    try:
        yield
    except Failed as error:
        reasons[system] = str(error)
        if system in workers:
            workers.pop(system).close(at_once=True)


def load(
    jobs: Mapping[str, Serving],
    limits: tuple[float, float],
    device: str,
    title: str,
    workers: dict[str, Worker],
    reasons: dict[str, str],
) -> None:
    """Start a worker for each system, or note why it has none. A CPU loads one after the other; beside a GPU, which a
    process takes a while to come to, all begin at once."""

    def begin(system: str) -> None:
        with dropped(system, {}, reasons):
            workers[system] = Worker(jobs[system], *limits)

    if jobs and device.startswith("cuda"):
        with ThreadPoolExecutor(len(jobs)) as pool:
            list(pool.map(begin, jobs))
        for system in jobs:  # in their order, not in that of their coming
            if system in workers:
                workers[system] = workers.pop(system)
        return
    for system in tqdm(jobs, desc=f"{title}: load", leave=False, disable=None):
        begin(system)


def compare(options: argparse.Namespace, shape: str, batched: Workload | None = None) -> list[dict[str, Any]]:
    """One row per system: facts, and a list over the rounds of each time. Stopped, it has what was measured so far.

    `batched`: a second generation in each round; its times are named `batched_prefill_ms` and `batched_decode_ms`.
    """
    common = ("layers", "dtype", "device", "threads", "batch", "prompt", "tokens", "padded")
    parameters = {name: getattr(options, name) for name in common}
    workers: dict[str, Worker] = {}
    reasons: dict[str, str] = {}
    rows: dict[str, dict[str, Any]] = {}
    bandwidths, busy = [read_bandwidth(options.device)], getattr(options, "busy", 0)
    try:
        jobs = {system: Job(system, shape, **parameters) for system in options.systems}
        load(jobs, (options.limit, options.run_limit), options.device, shape, workers, reasons)
        for system, worker in workers.items():
            rows[system] = {"system": system, **worker.facts, "run_peak_bytes": None}
            rows[system] |= {"prefill_ms": [], "decode_ms": []}
        with beside(busy):
            for number in tqdm(range(options.rounds), desc=f"{shape}: rounds", disable=None):
                bandwidths.append(read_bandwidth(options.device))
                for system in list(workers)[:: 1 if number % 2 == 0 else -1]:
                    with dropped(system, workers, reasons):
                        _note(rows[system], workers[system].turn())
                        if batched and "batched_refused" not in rows[system]:
                            _note(rows[system], workers[system].turn(batched), "batched_")
        for system, worker in list(workers.items()):
            with dropped(system, workers, reasons):
                rows[system]["run_peak_bytes"] = worker.peak_bytes()
    except KeyboardInterrupt:
        options.interrupted = True
        reasons |= {system: "stopped before its turn" for system in options.systems if system not in rows}
    for worker in workers.values():
        worker.close(at_once=options.interrupted)
    described = {"shape": shape, **parameters, "rounds": options.rounds, "busy": busy}
    described["bandwidth_bytes_per_s"] = round(median(bandwidths))
    return [
        described | ({"system": system, "reason": reasons[system]} if system in reasons else rows[system])
        for system in options.systems
    ]


def _note(row: dict[str, Any], turn: dict[str, Any] | None, prefix: str = "") -> None:
    """Add the times of a turn to a row, or why it was refused."""
    for name, value in (turn or {}).items():
        if name == "refused":
            row[prefix + name] = value
        else:
            row.setdefault(prefix + name, []).append(round(value, 3))


def start(device: str) -> dict[str, Any]:
    """What every row of a run begins with: when, which commit, where, and the versions."""
    return {
        "run": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": git_commit(),
        "hardware": hardware(device),
        "versions": versions("torch", "transformers", "hf_accel_patch"),
    }


def record(run: dict[str, Any], rows: list[dict[str, Any]], out: Path) -> list[dict[str, Any]]:
    """Add rows to a file; returns them whole."""
    whole = [run | row for row in rows]
    for row in whole:
        row["versions"] = row["versions"] | row.pop("peer", {})
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in whole)
    return whole


def stop(number: int, frame: object) -> None:
    """Ends a run at SIGTERM as Ctrl-C does, and lets it write its rows: `timeout` sends the signal twice."""
    signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


class Recorder:
    """The rows of a run, each written to --out as soon as it is there."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.rows: list[dict[str, Any]] = []
        self.begin()

    def begin(self) -> None:
        """Rows from here on are a run of their own, with a stock of its own."""
        self.run = start(self.options.device)

    def save(self, found: list[dict[str, Any]]) -> None:
        self.rows += record(self.run, found, self.options.out)


@contextmanager
def recorded(
    options: argparse.Namespace, markdown: Callable[[list[dict[str, Any]]], str], plot: Callable[[Path], None]
) -> Iterator[Recorder]:
    """Runs the body, which may be stopped; then prints the table of its rows, draws them for --plot, and exits."""
    torch.set_num_threads(options.threads)
    signal.signal(signal.SIGTERM, stop)
    recorder, status = Recorder(options), 0
    try:
        yield recorder
    except KeyboardInterrupt:
        status = 130
    print(markdown(recorder.rows))
    if options.plot:
        plot(options.out)
    sys.exit(status)


def add_common_options(parser: argparse.ArgumentParser, name: str) -> None:
    """Where and in what precision to run, and where rows and plots of the benchmark of this name go."""
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads (default: all cores)")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 (default: cpu)")
    out = Path(os.environ.get("OUT", RESULTS)) / f"{name}.jsonl"
    parser.add_argument(
        "--out", type=Path, default=out, help=f"file of rows ({name}.jsonl in $OUT or in benchmarks/results)"
    )
    parser.add_argument("--plot", action="store_true", help="draw all rows of --out, with matplotlib, beside it")


def check_common_options(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    if options.plot and (reason := missing("matplotlib.figure")):
        parser.error(f"--plot needs matplotlib: {reason}")


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    signal.signal(signal.SIGTERM, stop)
    run = start(options.device)
    everything = []
    for shape in options.shape:
        everything += record(run, compare(options, shape), options.out)
        if options.interrupted:
            break
    print(markdown(everything))
    sys.exit(130 if options.interrupted else 0)


if __name__ == "__main__":
    main()
