"""What does a replayed CUDA graph save? Passes of 1, 2, 4, 8 and 16 tokens, ordinary and replayed, and the recording.

    python -m benchmarks.graphs --device cuda                                 # llama-3.2-1b, 128 tokens cached
    python -m benchmarks.graphs --device cuda --shape llama-3.1-8b --prompt 2048 --batch 4 --quantize int4
    python -m benchmarks.graphs --device cuda --apart                         # each operator a kernel, none fused

Passes over one token are decode steps, the others verification passes of speculative decoding. Ordinary and replayed
passes take turns, over the same tokens, and what they write is taken back. `difference` is that of the logits, in
standard deviations of the ordinary ones. One row of JSON per width is added to --out.
"""

from __future__ import annotations

import argparse
import copy
import cProfile
import pstats
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import DynamicCache

from benchmarks.decode import RESULTS, record, start
from benchmarks.measure import time_call
from benchmarks.shapes import SHAPES, build
from hf_accel_patch import KVCache, patch
from hf_accel_patch.compat import CACHE, take_back
from hf_accel_patch.errors import HfAccelError
from hf_accel_patch.ops.graphs import CudaRecorder
from hf_accel_patch.passes.graphs import GRAPHS, begin, recorder_for
from hf_accel_patch.passes.replaying import WIDTHS

Row = dict[str, Any]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.2-1b")
    parser.add_argument("--layers", type=int, help="cut the shape to this many layers")
    parser.add_argument("--quantize", choices=("int8", "int4", "nf4"))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=128, help="tokens in the cache (default: 128)")
    parser.add_argument("--apart", action="store_true", help="record each operator as a kernel of its own")
    parser.add_argument("--widths", nargs="+", type=int, choices=WIDTHS, default=list(WIDTHS), help="of a pass")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--profile", action="store_true", help="print what the recordings spent their time on")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=RESULTS / "graphs.jsonl")
    return parser.parse_args()


def measured(options: argparse.Namespace) -> list[Row]:
    """One row per width, or one that says why there is nothing."""
    if recorder_for(torch.device(options.device)) is None:
        return [{"reason": "CUDA graphs need an NVIDIA GPU"}]
    model = build(options.shape, dtype=options.dtype, device=options.device, layers=options.layers)
    CudaRecorder.fuses = not options.apart
    try:
        patch(model, quantize=options.quantize, cache=KVCache(graphs=True))
    except HfAccelError as error:
        return [{"reason": str(error).partition("\n")[0]}]
    B, T = options.batch, options.prompt
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(1, model.config.vocab_size, (B, T + WIDTHS[-1]), generator=draw).to(options.device)
    cache, config = DynamicCache(config=model.config), copy.deepcopy(model.generation_config)
    config.max_length = T + 2048
    model(ids[:, :T], **{CACHE: cache}, logits_to_keep=1)
    before = torch.cuda.memory_allocated() if options.device.startswith("cuda") else 0
    rows = []
    for width in options.widths:
        decoding = begin(model, config)
        if decoding is None:
            graphs = vars(model)[GRAPHS]
            return [{"reason": graphs.off or ", ".join(graphs.eager)}]
        inputs = {
            "input_ids": ids[:, T : T + width],
            "attention_mask": torch.ones_like(ids[:, : T + width]),
            "position_ids": torch.arange(T, T + width, device=options.device).expand(B, -1),
            CACHE: cache,
        }
        found: dict[str, Any] = {}

        def once(call: Any, name: str, inputs: Row = inputs, width: int = width, found: Row = found) -> float:
            def run() -> None:
                found[name] = call(**inputs, use_cache=True, return_dict=True).logits

            taken = time_call(run, options.device)
            take_back(cache, width)
            return round(taken, 3)

        once(model, "plain")
        with profiled(options.profile):
            row: Row = {"width": width, "record_ms": once(decoding, "replayed")}
        row["try_ms"] = once(decoding, "replayed")
        row |= {"plain_ms": [], "replayed_ms": []}
        counts = vars(model)[GRAPHS].counts
        begun = counts["replayed"]
        for _ in range(options.rounds):
            row["plain_ms"].append(once(model, "plain"))
            row["replayed_ms"].append(once(decoding, "replayed"))
        plain, replayed = found["plain"].float(), found["replayed"].float()
        row["difference"] = float((plain - replayed).abs().max() / plain.std())
        row |= {"replays": counts["replayed"] - begun, "fused": counts["fused"]}
        if options.device.startswith("cuda"):
            row["bytes"] = torch.cuda.memory_allocated() - before
        if vars(model)[GRAPHS].off:
            row["reason"] = vars(model)[GRAPHS].off
        rows.append(row)
    return rows


@contextmanager
def profiled(wanted: bool) -> Iterator[None]:
    """Prints the functions that took the longest in themselves."""
    if not wanted:
        yield
        return
    with cProfile.Profile() as profile:
        yield
    pstats.Stats(profile).strip_dirs().sort_stats("tottime").print_stats(15)


@torch.no_grad()
def main() -> None:
    options = arguments()
    described = {"part": "graphs", **{name: value for name, value in vars(options).items() if name != "out"}}
    described |= {"device": options.device, "threads": torch.get_num_threads()}
    rows = record(start(options.device), [described | row for row in measured(options)], options.out)
    for row in rows:
        if "width" not in row or "reason" in row:
            print(f"not measured: {row['reason']}")
            continue
        plain, replayed = median(row["plain_ms"]), median(row["replayed_ms"])
        text = f"{row['width']:3d} tokens: {plain:8.3f} ms, replayed {replayed:8.3f} ms ({plain / replayed:.2f} x), "
        text += (
            f"recorded in {row['record_ms']:.0f} ms, {row['fused']} operators fused, difference {row['difference']:.4f}"
        )
        print(text if row["replays"] == options.rounds else f"{text}; replayed {row['replays']} times only")


if __name__ == "__main__":
    main()
