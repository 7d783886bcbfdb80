"""What do drafts bring? Time and passes per token, and what the drafts of a copy in 4 bits can bring.

    python -m benchmarks.speculative --parts generate --tasks editing continuation
    python -m benchmarks.speculative --parts tokens
    python -m benchmarks.speculative --parts acceptance costs held --shape llama-3.2-1b --plot
    python -m benchmarks.speculative --prompts 4 --rounds 1 --new 16 --shape tiny     # tries the benchmark itself

`generate`: the bundled model goes on with text that it was not trained on, as stock, with transformers' own assisted
decoding, and patched. Every system sits in a process of its own, and each continues a prompt in turn. `tokens`: the
same once in float32, where tokens must be stock's. `costs`: of passes over several tokens and of a drafted token, in a
shape with random weights. `acceptance`: how often what the copy of the bundled model drafts is right. `held`: a real
run of a shape whose weights int4 holds exactly. Rows of JSON are added to --out as soon as a task or a part is done.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.decode import add_common_options, check_common_options, dropped, load, recorded
from benchmarks.measure import read_bandwidth
from benchmarks.plot import plot_speculation
from benchmarks.shapes import BUNDLED, SHAPES
from benchmarks.speculating import MOST, SYSTEMS, TASKS, DraftJob, prompts
from benchmarks.speculative_table import speculative_markdown
from benchmarks.worker import Worker

PARTS = ("generate", "tokens", "acceptance", "costs", "held")
WARM = 2  # batches that are continued before those that count
HELD = ("stock", "exact", "self")
HELD_PROMPT = 64  # random tokens
Rows = list[dict[str, Any]]
Save = Callable[[Rows], None]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="default: all")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS), help="default: all")
    parser.add_argument("--batches", nargs="+", type=int, default=(1, 4), help="prompts at once (1 4)")
    parser.add_argument("--prompts", type=int, default=12, help="of each task, a multiple of each batch (default: 12)")
    parser.add_argument("--new", type=int, default=96, help="tokens that each goes on by (default: 96)")
    parser.add_argument("--rounds", type=int, default=5, help="timed of each task (default: 5)")
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.2-1b", help="of `costs` and `held` (llama-3.2-1b)")
    parser.add_argument("--layers", type=int, help="cut this shape to so many layers")
    parser.add_argument("--steps", type=int, default=3, help="passes of each width in a round of `costs` (default: 3)")
    parser.add_argument("--held-prompts", type=int, default=4, help="random prompts of `held` (default: 4)")
    parser.add_argument("--limit", type=float, default=180, help="seconds to load a system, and to warm it up (180)")
    parser.add_argument("--run-limit", type=float, default=150, help="for all rounds of a system and task (150)")
    add_common_options(parser, "speculative")
    options = parser.parse_args()
    if min(options.rounds, options.prompts, options.steps, options.held_prompts, *options.batches) < 1:
        parser.error("--rounds, --prompts, --steps, --held-prompts and --batches must be at least 1")
    if any(options.prompts % batch for batch in options.batches):
        parser.error(f"--prompts must be a multiple of each batch of {', '.join(map(str, options.batches))}")
    longest = max(TASKS[task].prompt for task in options.tasks) + options.new + MOST
    if options.new < 2 or longest > SHAPES[BUNDLED.name]["max_position_embeddings"]:
        parser.error(
            f"--new must be at least 2, and not lead to {longest} tokens, beyond the context of {BUNDLED.name}"
        )
    check_common_options(parser, options)
    bases = ["stock", "exact"]  # ratios need both
    options.systems = bases + [system for system in options.systems if system not in bases]
    return options


class Group:
    """Workers of several systems, and why others are missing."""

    def __init__(self, options: argparse.Namespace, systems: Sequence[str], shape: str, dtype: str, title: str) -> None:
        self.options, self.systems, self.shape, self.dtype, self.title = options, systems, shape, dtype, title
        self.workers: dict[str, Worker] = {}
        self.reasons: dict[str, str] = {}

    def load(self, layers: int | None = None, *, held: bool = False) -> None:
        options = self.options
        common = self.shape, layers, self.dtype, options.device, options.threads, held
        jobs = {system: DraftJob(system, *common) for system in self.systems}
        limits = options.limit, options.limit
        load(jobs, limits, options.device, self.title, self.workers, self.reasons)

    def close(self) -> None:
        for worker in self.workers.values():
            worker.close(at_once=True)

    def described(self, part: str, **more: Any) -> dict[str, Any]:
        options = self.options
        common = {"dtype": self.dtype, "device": options.device, "threads": options.threads}
        return {"part": f"speculative-{part}", "shape": self.shape, **common, **more}

    def compare(self, common: dict[str, Any], batches: list[Any], temperature: float | None, rounds: int) -> Rows:
        """A row of each system: of every round the seconds of each batch, and the passes of all. In a round each system
        continues a batch before the next batch comes, every other round in reverse order."""
        rows: dict[str, dict[str, Any]] = {system: {"system": system} for system in self.systems}
        texts: dict[str, list[list[Any]]] = {system: [] for system in self.systems}
        refused: dict[str, str] = {}
        for system in tqdm(list(self.workers), desc=f"{self.title}: warm", leave=False, disable=None):
            with dropped(system, self.workers, self.reasons):
                self.workers[system].left_s = self.options.limit
                answer = self.workers[system].ask("prepare", batches, WARM, common["tokens"], temperature)
                rows[system] |= {"seconds": [], "passes": [], "drafted": 0, "accepted": 0} | answer
                if "refused" in answer:
                    refused[system] = rows[system].pop("refused")
                self.workers[system].left_s = self.options.run_limit
        for number in tqdm(range(rounds), desc=self.title, disable=None):
            order = [system for system in self.workers if system not in refused and self.workers[system].left_s > 0]
            found: dict[str, list[dict[str, Any]]] = {system: [] for system in order}
            for batch in range(WARM, len(batches)):
                for system in order[:: 1 if (number + batch) % 2 == 0 else -1]:
                    if system in self.workers:
                        with dropped(system, self.workers, self.reasons):
                            found[system].append(self.workers[system].ask("turn", batch))
            for system in (system for system in order if system in self.workers):
                row, turns = rows[system], found[system]
                row["seconds"].append([turn["seconds"] for turn in turns])
                row["passes"].append(sum(turn["passes"] for turn in turns))
                row["drafted"] += sum(turn["drafted"] for turn in turns)
                row["accepted"] += sum(turn["accepted"] for turn in turns)
                texts[system].append([text for turn in turns for text in turn["tokens"]])
        for system, row in rows.items():
            if system in refused | self.reasons or not row.get("seconds"):
                reason = refused.get(system) or self.reasons.get(system) or "no turn in time"
                rows[system] = {"system": system, "reason": reason}
        sequences = [ids for batch in batches[WARM:] for ids in batch]
        for base in ("stock", "exact"):
            for system, row in rows.items():
                if "reason" not in row:
                    row |= self._agreement(base, texts[base], texts[system], sequences, greedy=temperature is None)
        return [common | row for row in rows.values()]

    def _agreement(
        self, base: str, theirs: list[list[Any]], ours: list[list[Any]], sequences: list[list[int]], *, greedy: bool
    ) -> dict[str, Any]:
        """How many outputs are those of the base, and, where they first differ, how far its logits of the two tokens
        are from one another, over the largest logit."""
        same, differing = 0, {}
        pairs = [
            pair for one, other in zip(theirs, ours, strict=False) for pair in enumerate(zip(one, other, strict=True))
        ]
        for number, (expected, found) in pairs:
            at = next((at for at in range(len(expected)) if expected[at] != found[at]), None)
            same += at is None
            if at is not None:
                differing[number, at, expected[at], found[at]] = [*sequences[number], *expected[:at]]
        gaps = []
        for (_, _, first, second), ids in differing.items() if greedy else ():
            if base not in self.workers:  # out of time
                break
            with dropped(base, self.workers, self.reasons):
                answer = self.workers[base].ask("gap", ids, first, second)
                gaps.append(round(answer["gap"] / abs(answer["logit"]), 6))
        return {f"same_as_{base}": [same, len(pairs)], f"gaps_to_{base}": gaps}


def generate(options: argparse.Namespace, part: str, save: Save) -> None:
    """The tasks in turn, each with every batch: timed in --dtype, or once in float32."""
    dtype, rounds = (options.dtype, options.rounds) if part == "generate" else ("float32", 1)
    group = Group(options, options.systems, BUNDLED.name, dtype, part)
    try:
        group.load()
        for task in options.tasks:
            for size in options.batches:
                ids = prompts(task, options.prompts + WARM * size)
                ids = ids[options.prompts :] + ids[: options.prompts]
                batches = [ids[at : at + size] for at in range(0, len(ids), size)]
                common = group.described(part, task=task, batch=size, prompts=options.prompts, prompt=len(ids[0]))
                common |= {"tokens": options.new, "rounds": rounds}
                group.title = f"{part}: {task}, {size} at once"
                save(group.compare(common, batches, TASKS[task].temperature, rounds))
    finally:
        group.close()


def held(options: argparse.Namespace, save: Save) -> None:
    """The same, for random prompts, of a shape whose weights int4 holds exactly."""
    group = Group(options, HELD, options.shape, options.dtype, f"held: {options.shape}")
    try:
        group.load(options.layers, held=True)
        generator = torch.Generator().manual_seed(1)
        shape = (options.held_prompts + WARM, 1, HELD_PROMPT)
        batches = torch.randint(1, SHAPES[options.shape]["vocab_size"], shape, generator=generator).tolist()
        common = group.described("held", layers=options.layers, task="held", batch=1, prompts=options.held_prompts)
        common |= {"prompt": HELD_PROMPT, "tokens": options.new, "rounds": options.rounds}
        save(group.compare(common, batches, None, options.rounds))
    finally:
        group.close()


def costs(options: argparse.Namespace, save: Save) -> None:
    """Milliseconds of passes over 1 to 9 tokens and of a drafted one, patched, and of one token of stock."""
    group = Group(options, ("stock", "exact"), options.shape, options.dtype, f"costs: {options.shape}")
    common = group.described("costs", layers=options.layers, steps=options.steps, rounds=options.rounds)
    rows: dict[str, dict[str, Any]] = {system: {"system": system} for system in group.systems}
    widths = {"stock": (1,), "exact": tuple(range(1, MOST + 2))}
    bandwidths = [read_bandwidth(options.device)]
    try:
        group.load(options.layers)
        for system, worker in list(group.workers.items()):
            with dropped(system, group.workers, group.reasons):
                rows[system] |= worker.ask("start_costs") | {"pass_ms": {str(width): [] for width in widths[system]}}
                for width in widths[system]:
                    worker.ask("pass_ms", width, 1)
                if system == "exact":
                    rows[system]["draft_ms"] = []
                    worker.ask("draft_ms", 1)
                worker.left_s = options.run_limit
        for number in tqdm(range(options.rounds), desc=group.title, disable=None):
            bandwidths.append(read_bandwidth(options.device))
            for system in list(group.workers)[:: 1 if number % 2 == 0 else -1]:
                with dropped(system, group.workers, group.reasons):
                    worker, row = group.workers[system], rows[system]
                    for width in widths[system]:
                        row["pass_ms"][str(width)] += worker.ask("pass_ms", width, options.steps)["ms"]
                    if system == "exact":
                        row["draft_ms"] += worker.ask("draft_ms", options.steps)["ms"]
    finally:
        group.close()
        common["bandwidth_bytes_per_s"] = round(sorted(bandwidths)[len(bandwidths) // 2])
        for system, row in rows.items():
            if system in group.reasons or not row.get("pass_ms", {}).get("1"):
                rows[system] = {"system": system, "reason": group.reasons.get(system, "stopped before its turn")}
        save([common | row for row in rows.values()])


def acceptance(options: argparse.Namespace, save: Save) -> None:
    """Of each greedy task, how often the drafts of the bundled model's copy are right."""
    group = Group(options, ("exact",), BUNDLED.name, options.dtype, "acceptance")
    try:
        group.load()
        for task in (task for task in options.tasks if TASKS[task].temperature is None):
            common = group.described(
                "acceptance", task=task, prompts=options.prompts, tokens=options.new, system="self"
            )
            counts, places = [[0] * (MOST + 1) for _ in range(MOST + 1)], 0
            with dropped("exact", group.workers, group.reasons):
                worker = group.workers["exact"]
                worker.left_s = options.limit
                worker.ask("prepare", [[ids] for ids in prompts(task, options.prompts)], 0, options.new, None)
                for number in tqdm(range(options.prompts), desc=f"acceptance: {task}", disable=None):
                    found = worker.ask("accepted", number)
                    places += found["places"]
                    both = zip(counts, found["counts"], strict=True)
                    counts = [[a + b for a, b in zip(*rows, strict=True)] for rows in both]
            reason = group.reasons.get("exact")
            save([common | ({"reason": reason} if reason else {"counts": counts, "places": places})])
            if reason:
                break
    finally:
        group.close()


def main() -> None:
    options = arguments()
    with recorded(options, speculative_markdown, plot_speculation) as recorder:
        save = recorder.save
        parts: dict[str, Callable[[], None]] = {
            "generate": lambda: generate(options, "generate", save),
            "tokens": lambda: generate(options, "tokens", save),
            "acceptance": lambda: acceptance(options, save),
            "costs": lambda: costs(options, save),
            "held": lambda: held(options, save),
        }
        for part in (part for part in PARTS if part in options.parts):
            parts[part]()


if __name__ == "__main__":
    main()
