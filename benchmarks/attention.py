"""What does attention to a long prompt take, in memory and in time, by the length of the prompt?

    python -m benchmarks.attention --plot
    python -m benchmarks.attention --families llama bloom --lengths 64 128 --contexts 256 --rounds 2    # tries it
    python -m benchmarks.attention --device cuda --dtype bfloat16 --most-bytes 30e9

Models are attention almost alone: one layer, or one of each kind, of 8 heads with the head size of published models,
and random weights (`LAYERS` in shapes.py). So ratios are those of attention, farther from 1 than those of whole models.
Stock and the patched model each sit in a process of their own and take turns. Rows of JSON are added to --out as soon
as a length is done.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from benchmarks.attention_plot import plot_attention
from benchmarks.attention_table import attention_markdown
from benchmarks.caches import SPAN, WARM, CacheJob, Held, Kind
from benchmarks.decode import add_common_options, check_common_options, dropped, recorded
from benchmarks.kvcache import decode
from benchmarks.measure import PeakMemory, Workload, return_freed_memory, time_call
from benchmarks.worker import Worker

PARTS = ("prefill", "decode")
SYSTEMS = ("stock", "exact")
WARM_TOKENS = 64
LEAST_TURNS = 3  # of every length, however slow
Rows = list[dict[str, Any]]
Save = Callable[[Rows], None]


@dataclass(frozen=True)
class Family:
    """A row of the table: a shape of LAYERS; `padded`: two prompts, one of half the length, padded on the left."""

    shape: str
    padded: bool = False
    decodes: bool = False  # whether it is timed token by token too


FAMILIES = {
    "llama": Family("llama-layer", decodes=True),
    "llama-padded": Family("llama-layer", padded=True),
    "mistral": Family("mistral-layer"),
    "gemma2": Family("gemma2-layers"),
    "gpt_oss": Family("gpt-oss-layers"),
    "bloom": Family("bloom-layer", decodes=True),
    "mpt": Family("mpt-layer"),
    "falcon-alibi": Family("falcon-alibi-layer"),
    "falcon-multi-query": Family("falcon-multi-query-layer"),
    "gptj": Family("gptj-layer"),
    "gpt_neo": Family("gpt-neo-layers"),
    "deepseek_v3": Family("deepseek-v3-layer"),
}


@dataclass(frozen=True)
class AttentionJob(CacheJob):
    """A model whose prompts are measured as well as its steps."""

    def hold(self, kind: Kind) -> Held:
        return Prompted(self, kind)


class Prompted(Held):
    """The model, in the worker. A prompt goes through `model(...)` with a new cache, as `generate` has it, and only the
    logits of its last token are asked for."""

    def peak(self, tokens: int, padded: bool) -> dict[str, Any]:
        """Resident memory, or allocations on a GPU, that a prompt adds at most: keys and values among it."""
        self._prompt(WARM_TOKENS, padded)()
        prompt = self._prompt(tokens, padded)
        return_freed_memory()
        memory = PeakMemory(self.device)
        prompt()
        return {"prefill_peak_bytes": memory.bytes}

    def prefill(self, tokens: int, padded: bool) -> dict[str, Any]:
        """Milliseconds of one prompt."""
        return {"prefill_ms": round(time_call(self._prompt(tokens, padded), self.device), 3)}

    def _prompt(self, tokens: int, padded: bool) -> Callable[[], Any]:
        import torch

        ids, mask = Workload(1 + padded, tokens, 1, padded).inputs(self.model.config.vocab_size, self.device)

        @torch.no_grad()
        def run() -> None:
            self.model(input_ids=ids, attention_mask=mask, logits_to_keep=1)

        return run


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES), help="default: all")
    lengths = (512, 1024, 2048, 4096, 8192)
    parser.add_argument("--lengths", nargs="+", type=int, default=lengths, help=f"of prompts, in tokens {lengths}")
    contexts = (4096, 16384)
    parser.add_argument("--contexts", nargs="+", type=int, default=contexts, help=f"of decode steps {contexts}")
    parser.add_argument("--rounds", type=int, default=9, help="turns timed per system and length (default: 9)")
    parser.add_argument("--steps", type=int, default=8, help="decode steps in a turn (default: 8)")
    parser.add_argument(
        "--most-bytes", type=float, default=3e9, help="that a prompt may take: stock's longer ones are left out (3e9)"
    )
    parser.add_argument("--load-limit", type=float, default=120, help="seconds to load a model (default: 120)")
    parser.add_argument("--limit", type=float, default=60, help="seconds for a prompt, or to fill a cache (60)")
    parser.add_argument("--run-limit", type=float, default=4, help="for all rounds of a prompt beyond three (4)")
    add_common_options(parser, "attention")
    options = parser.parse_args()
    if min(options.rounds, options.steps, *options.lengths) < 1:
        parser.error("--rounds, --steps and --lengths must be at least 1")
    if any(context % SPAN or context < WARM for context in options.contexts):
        parser.error(f"--contexts must be multiples of {SPAN}, at least {WARM}")
    check_common_options(parser, options)
    options.lengths, options.contexts = sorted(set(options.lengths)), sorted(set(options.contexts))
    options.layers = None  # of shapes that have one or two
    return options


def prefill(options: argparse.Namespace, name: str, save: Save) -> None:
    """Peak and times of prompts of every length, a row of each system saved after each."""
    family, workers, reasons = FAMILIES[name], dict[str, Worker](), dict[str, str]()
    where = {each: getattr(options, each) for each in ("dtype", "device", "threads")}
    peaks: dict[str, dict[int, int]] = {system: {} for system in SYSTEMS}
    try:
        for system in SYSTEMS:
            with dropped(system, workers, reasons):
                job = AttentionJob(system, family.shape, None, **where)
                workers[system] = Worker(job, options.load_limit, options.load_limit)
        for length in tqdm(options.lengths, desc=name, leave=False, disable=None):
            rows: dict[str, dict[str, Any]] = {system: {"system": system, "prefill_ms": []} for system in SYSTEMS}
            why = dict(reasons)
            for system in list(workers):
                expected = expected_bytes(peaks[system], length)
                if expected > options.most_bytes:
                    why[system] = f"{length} tokens would take about {expected / 1e9:.0f} GB"
                    continue
                with dropped(system, workers, reasons):
                    workers[system].left_s = options.limit
                    rows[system] |= workers[system].ask("peak", length, family.padded)
                    peaks[system][length] = rows[system]["prefill_peak_bytes"] or 0
            for number in range(options.rounds):
                for system in SYSTEMS[:: 1 if number % 2 == 0 else -1]:
                    taken = rows[system]["prefill_ms"]
                    due = number < LEAST_TURNS or sum(taken) < 1000 * options.run_limit
                    if system in workers and system not in why and due:
                        with dropped(system, workers, reasons):
                            workers[system].left_s = options.limit
                            taken.append(workers[system].ask("prefill", length, family.padded)["prefill_ms"])
            for system, row in rows.items():
                if not row["prefill_ms"]:
                    row["reason"] = why.get(system) or reasons.get(system) or "stopped before its turn"
            common = {"part": "attention-prefill", "family": name, "shape": family.shape, "padded": family.padded}
            common |= {**where, "length": length, "rounds": options.rounds, "most_bytes": options.most_bytes}
            save([common | row for row in rows.values()])
    finally:
        for worker in workers.values():
            worker.close(at_once=True)


def expected_bytes(peaks: dict[int, int], length: int) -> float:
    """What a prompt is to take where it grows as it grew last, by the two longest ones so far; with one, 0."""
    if len(peaks) < 2:
        return 0.0
    (short, before), (long, last) = sorted(peaks.items())[-2:]
    return last + max(0, last - before) / (long**2 - short**2) * (length**2 - long**2)


def steps(options: argparse.Namespace, name: str, save: Save) -> None:
    """Times of one token after every context, as `benchmarks.kvcache` takes them."""
    more = {"part": "attention-decode", "family": name, "padded": False}
    decode(options, FAMILIES[name].shape, list(SYSTEMS), lambda rows: save([row | more for row in rows]))


def main() -> None:
    options = arguments()
    with recorded(options, attention_markdown, plot_attention) as recorder:
        for name in options.families if "prefill" in options.parts else ():
            recorder.begin()
            prefill(options, name, recorder.save)
        for name in options.families if "decode" in options.parts else ():
            if FAMILIES[name].decodes:
                recorder.begin()
                steps(options, name, recorder.save)


if __name__ == "__main__":
    main()
