"""What does each way to keep keys and values cost, and what does it give? Decode, bytes and perplexity by context.

    python -m benchmarks.kvcache --shape llama-3.2-1b --plot
    python -m benchmarks.kvcache --shape tiny --contexts 256 512 --rounds 2 --windows 2 --stream 600 --places 8
    python -m benchmarks.kvcache --device cuda --parts decode --contexts 2048 32768 --caches exact int8 int4

Decode: caches are filled with random tokens through their `update`, without a prefill; then steps are timed through the
model. Every cache sits in a process of its own with its own model; in each round each takes a few steps, in turn.
Perplexity is that of the bundled model on text that it was not trained on, fed through the cache in pieces; that of
sinks is over one long stream, against a forward over the window for every token. Rows of JSON are added to --out as
soon as a context or a part is done.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

from tqdm import tqdm
from transformers import AutoTokenizer

from benchmarks.cache_table import cache_markdown
from benchmarks.caches import CACHES, SPAN, WARM, CacheJob
from benchmarks.decode import add_common_options, check_common_options, dropped, load, recorded
from benchmarks.measure import read_bandwidth
from benchmarks.plot import plot_caches
from benchmarks.shapes import BUNDLED, SHAPES
from benchmarks.worker import Failed, Worker
from hf_accel_patch.measure import spread_windows
from hf_accel_patch.texts import held_out_text

PARTS = ("decode", "perplexity", "stream")
WINDOW_TOKENS = 512  # the context of the bundled model
Rows = list[dict[str, Any]]
Save = Callable[[Rows], None]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--caches", nargs="+", choices=CACHES, default=list(CACHES), help="default: all")
    parser.add_argument("--shape", action="append", choices=SHAPES, help="repeatable (default: llama-3.2-1b)")
    parser.add_argument("--layers", type=int, help="cut each shape to this many layers")
    default = (512, 2048, 8192, 32768)
    parser.add_argument("--contexts", nargs="+", type=int, default=default, help="tokens (512 2048 8192 32768)")
    parser.add_argument("--rounds", type=int, default=7, help="turns timed per cache and context (default: 7)")
    parser.add_argument("--steps", type=int, default=4, help="decode steps in a turn (default: 4)")
    parser.add_argument("--together", type=int, default=3, help="caches in memory at once beside stock (default: 3)")
    parser.add_argument("--windows", type=int, default=64, help=f"of {WINDOW_TOKENS} tokens, scored (default: 64)")
    parser.add_argument("--piece", type=int, default=32, help="tokens that go in at once there (default: 32)")
    parser.add_argument("--window", type=int, default=256, help="tokens that sinks keep of the stream (default: 256)")
    parser.add_argument("--stream", type=int, default=4096, help="tokens of the stream (default: 4096)")
    parser.add_argument("--places", type=int, default=512, help="of it, compared with recomputation (default: 512)")
    parser.add_argument(
        "--limit", type=float, default=90, help="seconds to fill a cache, and to pack one (default: 90)"
    )
    parser.add_argument("--load-limit", type=float, default=180, help="seconds to load, or to score (default: 180)")
    parser.add_argument("--run-limit", type=float, default=40, help="for all rounds of a cache and context (40)")
    add_common_options(parser, "kvcache")
    options = parser.parse_args()
    if min(options.rounds, options.steps, options.windows, options.together) < 1:
        parser.error("--rounds, --steps, --windows and --together must be at least 1")
    if any(context % SPAN or context < WARM for context in options.contexts):
        parser.error(f"--contexts must be multiples of {SPAN} and at least {WARM}")
    if not 0 < options.piece < WINDOW_TOKENS or not 8 <= options.window < options.stream:
        parser.error(f"--piece must be less than {WINDOW_TOKENS}, and --window at least 8 and less than --stream")
    options.shape = options.shape or ["llama-3.2-1b"]
    for shape in options.shape if "decode" in options.parts else ():
        most = SHAPES[shape]["max_position_embeddings"] - SPAN
        if max(options.contexts) > most:
            parser.error(f"--contexts: {max(options.contexts)} is too long for {shape}, which has at most {most}")
    check_common_options(parser, options)
    options.contexts = sorted(set(options.contexts))
    options.caches = [name for name in options.caches if name != "stock"]  # it is always there: ratios need it
    return options


def described(options: argparse.Namespace, part: str, shape: str, **more: Any) -> dict[str, Any]:
    common = {name: getattr(options, name) for name in ("dtype", "device", "threads")}
    return {"part": f"cache-{part}", "shape": shape, **common, **more}


def job(options: argparse.Namespace, system: str, shape: str, layers: int | None = None) -> CacheJob:
    return CacheJob(system, shape, layers, options.dtype, options.device, options.threads)


def decode(options: argparse.Namespace, shape: str, systems: Sequence[str], save: Save) -> None:
    """Times and bytes of these caches at every context, a row of each saved after each."""
    workers: dict[str, Worker] = {}
    reasons: dict[str, str] = {}
    fill_s: dict[str, float] = {}  # by token, at the last context
    try:
        jobs = {system: job(options, system, shape, options.layers) for system in systems}
        limits = options.load_limit, options.load_limit
        load(jobs, limits, options.device, shape, workers, reasons)
        for system, worker in list(workers.items()):
            with dropped(system, workers, reasons):
                worker.ask("warm")
        for context in options.contexts:
            rows = {system: {"system": system} for system in systems}
            why = dict(reasons)
            try:
                _at(options, context, workers, rows, why, reasons, fill_s, f"{shape}, {context} tokens")
            finally:
                common = described(options, "decode", shape, layers=options.layers, context=context)
                common |= {"steps": options.steps, "rounds": options.rounds}
                common["bandwidth_bytes_per_s"] = round(read_bandwidth(options.device))
                for system, row in rows.items():
                    if not row.get("decode_ms"):
                        row["reason"] = why.get(system) or reasons.get(system) or "stopped before its turn"
                save([common | row for row in rows.values()])
    finally:
        for worker in workers.values():
            worker.close(at_once=True)


def _at(
    options: argparse.Namespace,
    context: int,
    workers: dict[str, Worker],
    rows: dict[str, dict[str, Any]],
    why: dict[str, str],
    reasons: dict[str, str],
    fill_s: dict[str, float],
    title: str,
) -> None:
    """Fill the caches one after the other, time all of them in turn, then let each pack."""
    filled = []
    for system in tqdm(list(workers), desc=f"{title}: fill", leave=False, disable=None):
        expected = context * fill_s.get(system, 0.0)
        if expected > options.limit:
            why[system] = f"to fill it with {context} tokens would take about {expected:.0f} s"
            continue
        with dropped(system, workers, reasons):
            workers[system].left_s = options.limit
            rows[system] |= workers[system].facts | workers[system].ask("fill", context)
            rows[system] |= {"decode_ms": [], "step_ms": []}
            fill_s[system] = rows[system]["fill_s"] / context
            workers[system].left_s = options.run_limit
            filled.append(system)
    for number in tqdm(range(options.rounds), desc=f"{title}: rounds", disable=None):
        for system in filled[:: 1 if number % 2 == 0 else -1]:
            if system in workers and workers[system].left_s > 0:
                with dropped(system, workers, reasons):
                    step_ms = workers[system].ask("steps", options.steps)["step_ms"]
                    rows[system]["step_ms"].append(step_ms)
                    rows[system]["decode_ms"].append(round(median(step_ms), 3))
    for system in filled:
        if system in workers:
            workers[system].left_s = options.limit
            try:
                rows[system] |= workers[system].ask("pack")
            except Failed as error:
                rows[system]["note"] = f"packing at {context} tokens: {error}"
                reasons[system] = str(error)
                workers.pop(system).close(at_once=True)


def scored(
    options: argparse.Namespace,
    systems: Sequence[str],
    common: dict[str, Any],
    message: Callable[[str], Any],
    save: Save,
) -> None:
    """One row per cache with what the bundled model answers to `message(system)`, each in a process of its own."""
    rows: dict[str, dict[str, Any]] = {system: {"system": system, "reason": "stopped"} for system in systems}
    try:
        for system in tqdm(systems, desc=common["part"], disable=None):
            workers: dict[str, Worker] = {}
            reasons: dict[str, str] = {}
            try:
                with dropped(system, workers, reasons):
                    name = "stock" if system.startswith("recompute") else system
                    workers[system] = Worker(job(options, name, BUNDLED.name), options.load_limit, options.load_limit)
                    answer = workers[system].ask(*message(system))
                    rows[system] = {"system": system, **workers[system].facts, **answer}
            finally:
                for worker in workers.values():
                    worker.close(at_once=True)
            if system in reasons:
                rows[system]["reason"] = reasons[system]
    finally:
        save([common | row for row in rows.values()])


def perplexity(options: argparse.Namespace, save: Save) -> None:
    """Perplexity of every cache in the same windows."""
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED)
    windows = [ids[0].tolist() for ids in spread_windows(tokenizer, held_out_text(), options.windows, WINDOW_TOKENS)]
    common = described(options, "perplexity", BUNDLED.name, windows=len(windows), piece=options.piece)
    scored(options, ["stock", *options.caches], common, lambda system: ("score", windows, options.piece), save)


def stream(options: argparse.Namespace, save: Save) -> None:
    """Perplexity of sinks in a stream beyond the model's context, and of stock there, against recomputation."""
    ids = AutoTokenizer.from_pretrained(BUNDLED)(held_out_text(), add_special_tokens=False, verbose=False)["input_ids"]
    ids = ids[: options.stream + 1]
    count, first, last = options.places, options.window, len(ids) - 2
    places = sorted({first + (last - first) * number // max(1, count - 1) for number in range(count)})
    names = {"recompute": f"recompute:{options.window}", "sinks": f"sinks:{options.window}"}
    common = described(options, "stream", BUNDLED.name, tokens=len(ids) - 1, places=len(places), window=options.window)

    def message(system: str) -> tuple[Any, ...]:
        return ("recompute", ids, places, options.window) if system == names["recompute"] else ("stream", ids, places)

    scored(options, [names["recompute"], names["sinks"], "stock"], common, message, save)


def main() -> None:
    options = arguments()
    with recorded(options, cache_markdown, plot_caches) as recorder:
        if "perplexity" in options.parts:
            perplexity(options, recorder.save)
        if "stream" in options.parts:
            stream(options, recorder.save)
        for shape in options.shape if "decode" in options.parts else ():
            for at in range(0, max(len(options.caches), 1), options.together):
                recorder.begin()
                decode(options, shape, ["stock", *options.caches[at : at + options.together]], recorder.save)


if __name__ == "__main__":
    main()
