"""What does each way to quantize cost, and what does it give? Perplexity and bytes; prefill and decode.

    python -m benchmarks.quantize --shape llama-3.2-1b --plot
    python -m benchmarks.quantize --shape tiny --rounds 2 --windows 4 --systems stock int8 int4 quanto-int4

Perplexity is that of the bundled model, on source of this Python's standard library that it was not trained on, for
every system in the same windows. To calibrate with there is source that it was trained on. Times are those of
`benchmarks.decode`, on a shape with random weights: systems in processes of their own, generating in turn, as many at
once as memory holds, each group with stock beside it. Rows of JSON are added to --out, those of a part as soon as it is
done.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoTokenizer

from benchmarks.baselines import EAGER, FORMATS, SYSTEMS, missing
from benchmarks.decode import RESULTS, compare, dropped, record, start, stop
from benchmarks.measure import Workload
from benchmarks.plot import plot
from benchmarks.shapes import BUNDLED, SHAPES
from benchmarks.table import quantize_markdown
from benchmarks.worker import Job, Worker
from hf_accel_patch.measure import spread_windows
from hf_accel_patch.texts import calibration_texts, held_out_text

WINDOW_TOKENS = 512  # the context of the bundled model
BATCHED = {"prompt": 32, "tokens": 5, "padded": False}
MOST_TEXTS, TEXT_CHARACTERS = 64, 1500  # to calibrate with: about a window of tokens each


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--parts", nargs="+", choices=("perplexity", "speed"), default=["perplexity", "speed"])
    every = [name for name in SYSTEMS if name not in EAGER]
    parser.add_argument("--systems", nargs="+", choices=every, default=every, help="default: all")
    parser.add_argument("--windows", type=int, default=64, help=f"of {WINDOW_TOKENS} tokens, scored (default: 64)")
    parser.add_argument("--calibrate", nargs="+", type=Path, metavar="FILE", help="texts (default: of the package)")
    parser.add_argument("--shape", action="append", choices=SHAPES, help="repeatable (default: llama-3.2-1b)")
    parser.add_argument("--layers", type=int, help="cut each shape to this many layers")
    parser.add_argument("--rounds", type=int, default=5, help="generations timed per system (default: 5)")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prompt (default: 512)")
    parser.add_argument("--tokens", type=int, default=7, help="new tokens, at least 2 (default: 7)")
    parser.add_argument("--also-batch", type=int, help="decode this many short prompts at once too, in each round")
    parser.add_argument("--together", type=int, default=5, help="systems in memory at once beside stock (default: 5)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads (default: all cores)")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 (default: cpu)")
    parser.add_argument("--limit", type=float, default=120, help="seconds for a system to load (default: 120)")
    parser.add_argument("--run-limit", type=float, default=25, help="and for its rounds: a slow one has fewer (25)")
    parser.add_argument("--out", type=Path, help="file of rows (quantize.jsonl in $OUT or in benchmarks/results)")
    parser.add_argument("--plot", action="store_true", help="draw the rows of this run, with matplotlib, beside --out")
    options = parser.parse_args()
    if options.tokens < 2 or min(options.rounds, options.windows, options.together) < 1:
        parser.error("--tokens must be at least 2, and --rounds, --windows and --together at least 1")
    if options.plot and (reason := missing("matplotlib.figure")):
        parser.error(f"--plot needs matplotlib: {reason}")
    options.batch, options.padded, options.interrupted = 1, False, False
    options.shape = options.shape or ["llama-3.2-1b"]
    options.systems = list(dict.fromkeys(["stock", *options.systems]))  # ratios need it
    options.out = options.out or Path(os.environ.get("OUT", RESULTS)) / "quantize.jsonl"
    return options


def pieces(text: str) -> tuple[str, ...]:
    """At most MOST_TEXTS pieces of whole lines, spread evenly over the text."""
    found = [""]
    for line in text.splitlines(keepends=True):
        if found[-1] and len(found[-1]) + len(line) > TEXT_CHARACTERS:
            found.append("")
        found[-1] += line
    count = min(MOST_TEXTS, len(found))
    return tuple(found[number * len(found) // count] for number in range(count))


def perplexities(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per system: what it keeps of the bundled model, and the cross-entropy of every window."""
    read = [path.read_text(encoding="utf-8") for path in options.calibrate or ()]
    texts = pieces("\n".join(read or calibration_texts()))
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED)
    windows = [ids[0].tolist() for ids in spread_windows(tokenizer, held_out_text(), options.windows, WINDOW_TOKENS)]
    common = {"dtype": options.dtype, "device": options.device, "threads": options.threads}
    described = {"part": "perplexity", "shape": BUNDLED.name, **common, "windows": len(windows)}
    described["calibrated_on"] = ", ".join(path.name for path in options.calibrate or ()) or "email, http, unittest"
    workers: dict[str, Worker] = {}
    reasons: dict[str, str] = {}
    rows: dict[str, dict[str, Any]] = {}
    try:
        for system in tqdm(options.systems, desc=f"{BUNDLED.name}: perplexity", disable=None):
            job = Job(system, BUNDLED.name, None, **common, batch=1, prompt=16, tokens=2, padded=False, texts=texts)
            with dropped(system, workers, reasons):
                workers[system] = Worker(job, options.limit, options.limit)
                rows[system] = {"nats": workers[system].score(windows), **workers[system].facts}
                workers.pop(system).close(at_once=True)
    except KeyboardInterrupt:
        options.interrupted = True
    for worker in workers.values():
        worker.close(at_once=True)
    reasons |= {system: "stopped before its turn" for system in options.systems if system not in rows | reasons}
    return [
        described | {"system": system} | ({"reason": reasons[system]} if system in reasons else rows[system])
        for system in options.systems
    ]


def speeds(options: argparse.Namespace, shape: str, systems: Sequence[str]) -> list[dict[str, Any]]:
    """One row per system and one of stock, of `benchmarks.decode`."""
    options.systems = ["stock", *systems]
    batched = Workload(options.also_batch, **BATCHED) if options.also_batch else None
    also = {"part": "speed", "batched": vars(batched) if batched else None}
    return [also | row for row in compare(options, shape, batched)]


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    signal.signal(signal.SIGTERM, stop)
    rows: list[dict[str, Any]] = []
    if "perplexity" in options.parts:
        run = start(options.device)
        rows += record(run, perplexities(options), options.out)
    timed = [system for system in options.systems if system != "stock" and system not in FORMATS]
    groups = [timed[at : at + options.together] for at in range(0, max(len(timed), 1), options.together)]
    for shape in options.shape if "speed" in options.parts else ():
        for group in groups:
            if not options.interrupted:
                run = start(options.device)
                rows += record(run, speeds(options, shape, group), options.out)
    print(quantize_markdown(rows))
    if options.plot:
        plot(rows, options.out.with_suffix(".png"))
    sys.exit(130 if options.interrupted else 0)


if __name__ == "__main__":
    main()
