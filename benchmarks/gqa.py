"""What do fewer key/value heads cost, and what do they give? Perplexity by way to merge, before and after uptraining;
the bytes of the cache, a decode step and its attention by context.

    python -m benchmarks.gqa --plot
    python -m benchmarks.gqa --parts quality uptrain --windows 2 --heads 2 --steps 2     # tries the benchmark itself
    python -m benchmarks.gqa --parts decode --shape tiny --contexts 256 512 --rounds 2

`quality`: the bundled model on text that it was not trained on, converted to each number of heads in each way.
`uptrain`: the same after some steps of `uptrain()` on text that it was trained on, from another part of the standard
library. `decode`: a shape with random weights, converted to each number of heads; caches are filled with random tokens,
then all take turns of a few steps, and of attention alone, over the caches of all layers. Rows of JSON are added to
--out as soon as a number of heads, an uptraining or a context is done.
"""

from __future__ import annotations

import argparse
import math
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import AutoTokenizer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from benchmarks.baselines import missing
from benchmarks.caches import SPAN, WARM, CacheJob, Held, Kind
from benchmarks.decode import RESULTS, record, start, stop
from benchmarks.gqa_plot import plot_heads
from benchmarks.gqa_table import BASE, FEWER_QUERIES, SYSTEMS, heads_markdown
from benchmarks.measure import read_bandwidth, synchronize
from benchmarks.quantize import pieces
from benchmarks.shapes import BUNDLED, SHAPES, build
from hf_accel_patch import GQA, patch, uptrain
from hf_accel_patch.kernels import cpu_decode
from hf_accel_patch.measure import spread_windows
from hf_accel_patch.texts import CALIBRATION, calibration_texts, held_out_text

PARTS = ("quality", "uptrain", "decode")
CALIBRATED = "aligned-calibrated"
UPTRAINED = ("mean", CALIBRATED)  # unless others are asked for: what is published, and the best
ATTENTIONS = 4  # alone, for each step of a turn
WINDOW_TOKENS = 512  # the context of the bundled model
Rows = list[dict[str, Any]]
Save = Callable[[Rows], None]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--heads", nargs="+", type=int, help="key/value heads (4 2 1; uptrain: 2; decode: 8 4 2 1)")
    every = [system for system in SYSTEMS if system != BASE]
    parser.add_argument("--merges", nargs="+", choices=every, help="default: all; uptrain: mean and aligned-calibrated")
    parser.add_argument("--windows", type=int, default=64, help=f"of {WINDOW_TOKENS} tokens, scored (default: 64)")
    parser.add_argument("--steps", type=int, default=150, help="of uptrain() (default: 150)")
    parser.add_argument("--learning-rate", type=float, help="of uptrain() (default: its own)")
    parser.add_argument("--shape", choices=SHAPES, default="multi-head", help="of `decode` (default: multi-head)")
    parser.add_argument("--layers", type=int, help="cut the shape to this many layers")
    default = (1024, 4096, 16384)
    parser.add_argument("--contexts", nargs="+", type=int, default=default, help="tokens (1024 4096 16384)")
    parser.add_argument("--rounds", type=int, default=7, help="turns timed at each context (default: 7)")
    parser.add_argument("--turn", type=int, default=4, help="decode steps in a turn (default: 4)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads (default: all cores)")
    choices = ("bfloat16", "float16", "float32")
    parser.add_argument("--dtype", choices=choices, help="default: float32; decode: bfloat16")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 (default: cpu)")
    parser.add_argument("--out", type=Path, help="file of rows (gqa.jsonl in $OUT or in benchmarks/results)")
    parser.add_argument("--plot", action="store_true", help="draw all rows of --out, with matplotlib, beside it")
    options = parser.parse_args()
    if min(options.rounds, options.turn, options.windows, options.steps) < 1:
        parser.error("--rounds, --turn, --windows and --steps must be at least 1")
    if any(context % SPAN or context < WARM for context in options.contexts):
        parser.error(f"--contexts must be multiples of {SPAN}, and at least {WARM}")
    for part, shape in (("quality", BUNDLED.name), ("uptrain", BUNDLED.name), ("decode", options.shape)):
        most = SHAPES[shape].get("num_key_value_heads", SHAPES[shape]["num_attention_heads"])
        if part in options.parts and any(heads < 1 or most % heads for heads in options.heads or ()):
            parser.error(f"--heads must be divisors of the {most} key/value heads of {shape}")
    if options.plot and (reason := missing("matplotlib.figure")):
        parser.error(f"--plot needs matplotlib: {reason}")
    options.out = options.out or Path(os.environ.get("OUT", RESULTS)) / "gqa.jsonl"
    return options


class Bundled:
    """The bundled model with fewer heads, and how well it foresees what it never saw."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.dtype = options, options.dtype or "float32"
        self.heads: int = SHAPES[BUNDLED.name]["num_key_value_heads"]
        self.windows = spread_windows(
            AutoTokenizer.from_pretrained(BUNDLED), held_out_text(), options.windows, WINDOW_TOKENS
        )
        self.texts = calibration_texts()

    def build(self) -> Any:
        return build(BUNDLED.name, dtype=self.dtype, device=self.options.device)

    def converted(self, system: str, heads: int) -> Any:
        calibrate = pieces("\n".join(self.texts)) if system == CALIBRATED else None
        merge: Any = "aligned" if system == CALIBRATED else system
        return patch(self.build(), gqa=GQA(heads, merge, calibrate))

    @torch.no_grad()
    def nats(self, model: Any) -> list[float]:
        """Of each window, the mean cross-entropy of its tokens but the first."""
        windows = [window.to(self.options.device) for window in self.windows]
        scored = ((model(ids, use_cache=False).logits[0, :-1].float(), ids[0, 1:]) for ids in windows)
        return [round(cross_entropy(logits, expected).item(), 6) for logits, expected in scored]

    def row(self, part: str, system: str, heads: int, **more: Any) -> dict[str, Any]:
        options = self.options
        common = {"shape": BUNDLED.name, "dtype": self.dtype, "device": options.device, "threads": options.threads}
        return {
            "part": f"gqa-{part}",
            **common,
            "windows": len(self.windows),
            "system": system,
            "kv_heads": heads,
        } | more

    def base(self) -> dict[str, Any]:
        """What every loss of a run is counted from."""
        return self.row("quality", BASE, self.heads, nats=self.nats(patch(self.build())))


def quality(bundled: Bundled, save: Save) -> None:
    """A row of each way to merge, for each number of heads."""
    calibrated_on = ", ".join(CALIBRATION)
    for heads in bundled.options.heads or (4, 2, 1):
        rows = []
        systems = bundled.options.merges or [system for system in SYSTEMS if system != BASE]
        for system in tqdm(systems, desc=f"quality: {heads} heads", disable=None):
            begin = time.perf_counter()
            model = bundled.converted(system, heads)
            facts = {"convert_s": round(time.perf_counter() - begin, 3), "nats": bundled.nats(model)}
            facts |= {"calibrated_on": calibrated_on} if system == CALIBRATED else {}
            rows.append(bundled.row("quality", system, heads, **facts))
        save(rows)


def uptraining(bundled: Bundled, save: Save) -> None:
    """A row of each way to merge, for each number of heads, before and after some steps of training."""
    options = bundled.options
    for heads in options.heads or (2,):
        for system in options.merges or UPTRAINED:
            model, original = bundled.converted(system, heads), bundled.build()
            before = bundled.nats(model)
            print(f"{system}, {heads} heads: perplexity {math.exp(mean(before)):.3f}", file=sys.stderr)
            rate = options.learning_rate
            done = uptrain(model, bundled.texts, options.steps, learning_rate=rate, original=original)
            facts = {"steps": options.steps, "learning_rate": rate, "trained_on": ", ".join(CALIBRATION)}
            facts |= {"nats_before": before, "nats": bundled.nats(model), "uptrained": done.to_dict()}
            save([bundled.row("uptrain", system, heads, **facts)])


class Filled(Held):
    """A model with fewer heads, its cache, and attention to that alone."""

    def __init__(self, job: CacheJob, heads: int) -> None:
        super().__init__(job, Kind({"gqa": GQA(heads, "mean", originals="discard")}))
        if self.row_shape[0] != heads:
            raise ValueError(f"the model has {self.row_shape[0]} key/value heads; {heads} were to be measured")
        self.heads: int = self.model.config.num_attention_heads

    @torch.no_grad()
    def attention(self, heads: int, count: int) -> list[float]:
        """Milliseconds, so many times, of the attention of a token's query heads to the caches of all layers, one
        layer after the other as in a step, by the function that transformers calls for this model."""
        attend = ALL_ATTENTION_FUNCTIONS[self.model.config._attn_implementation]
        query = torch.randn(1, heads, 1, self.row_shape[1], dtype=self.model.dtype, device=self.device)
        layers: list[tuple[Tensor, Tensor]] = [(layer.keys, layer.values) for layer in self.cache.layers]
        found = []
        for _ in range(count):
            synchronize(self.device)
            begin = time.perf_counter()
            for keys, values in layers:
                attend(self.model, query, keys, values, None, scaling=query.shape[-1] ** -0.5)
            synchronize(self.device)
            found.append(round(1000 * (time.perf_counter() - begin), 4))
        return found


def decode(options: argparse.Namespace, save: Save) -> None:
    """Times and bytes for every number of heads, a row of each saved after each context."""
    shape, dtype = options.shape, options.dtype or "bfloat16"
    sizes = SHAPES[shape]
    most = sizes.get("num_key_value_heads", sizes["num_attention_heads"])
    numbers = [most, *(heads for heads in options.heads or (8, 4, 2, 1) if heads < most and most % heads == 0)]
    models = {}
    for heads in tqdm(numbers, desc=f"{shape}: load", leave=False, disable=None):
        job = CacheJob(str(heads), shape, options.layers, dtype, options.device, options.threads)
        models[heads] = Filled(job, heads)
        models[heads].warm()
    for context in options.contexts:
        common = {"part": "gqa-decode", "shape": shape, "layers": options.layers, "dtype": dtype}
        common |= {"device": options.device, "threads": options.threads, "context": context, "rounds": options.rounds}
        common |= {"turn": options.turn, "bandwidth_bytes_per_s": round(read_bandwidth(options.device))}
        common["kernel"] = options.device == "cpu" and cpu_decode.library() is not None  # or PyTorch's attention
        rows = _at(options, context, models)
        save([common | row for row in rows])


def _at(options: argparse.Namespace, context: int, models: dict[int, Filled]) -> Rows:
    """Fill all caches, then time all of them in turn."""
    title, rows = f"{options.shape}, {context} tokens", {}
    for heads, model in tqdm(models.items(), desc=f"{title}: fill", leave=False, disable=None):
        rows[heads] = {"kv_heads": heads, "heads": model.heads, "head_size": model.row_shape[1]} | model.fill(context)
        rows[heads] |= {"decode_ms": [], "attention_ms": []}
        rows[heads] |= {"attention_of_8_ms": []} if _fewer(model, heads) else {}
    for number in tqdm(range(options.rounds), desc=f"{title}: rounds", disable=None):
        for heads in list(models)[:: 1 if number % 2 == 0 else -1]:
            model, row = models[heads], rows[heads]
            row["decode_ms"].append(round(median(model.steps(options.turn)["step_ms"]), 3))
            count = ATTENTIONS * options.turn
            row["attention_ms"].append(round(median(model.attention(model.heads, count)), 4))
            if "attention_of_8_ms" in row:
                row["attention_of_8_ms"].append(round(median(model.attention(FEWER_QUERIES, count)), 4))
    return list(rows.values())


def _fewer(model: Filled, heads: int) -> bool:
    """Whether so few query heads can be asked of this cache beside those that the model has."""
    return model.heads > FEWER_QUERIES >= heads and FEWER_QUERIES % heads == 0


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    disable_progress_bar()
    set_verbosity_error()  # the text is longer than the model's context: it is cut into windows
    signal.signal(signal.SIGTERM, stop)
    rows: Rows = []
    run = start(options.device)

    def save(found: Rows) -> None:
        rows.extend(record(run, found, options.out))

    interrupted = False
    try:
        if {"quality", "uptrain"} & set(options.parts):
            bundled = Bundled(options)
            save([bundled.base()])
            if "quality" in options.parts:
                quality(bundled, save)
            if "uptrain" in options.parts:
                uptraining(bundled, save)
        if "decode" in options.parts:
            decode(options, save)
    except KeyboardInterrupt:
        interrupted = True
    print(heads_markdown(rows))
    if options.plot:
        plot_heads(options.out)
    sys.exit(130 if interrupted else 0)


if __name__ == "__main__":
    main()
