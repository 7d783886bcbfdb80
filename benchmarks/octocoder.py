"""A model of 15.5 billion parameters quantized in place: seconds, and the bytes before, meanwhile and after.

    python -m benchmarks.octocoder --device cuda                        # bfloat16, int8 and int4: 32 GB of GPU memory
    python -m benchmarks.octocoder --layers 1 --schemes int4 --tokens 3       # on a CPU

The shape is OctoCoder's, whose three figures an article made known: 29.0 GB in bfloat16, 15.2 and 9.5 in 8 and 4 bits,
of 1024^3 bytes. Weights are random. Each scheme begins with a model of its own, and includes what has to be
compiled. Then `tokens` tokens are generated, twice. Rows of JSON are added to --out.
"""

from __future__ import annotations

import argparse
import gc
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.decode import RESULTS, record, start
from benchmarks.measure import PeakMemory, live_bytes, storages, synchronize
from benchmarks.shapes import SHAPES, build
from hf_accel_patch import patch

SCHEMES = ("bf16", "int8", "int4", "nf4")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--schemes", nargs="+", choices=SCHEMES, default=["bf16", "int8", "int4"])
    parser.add_argument("--layers", type=int, help="cut the shape to this many layers")
    parser.add_argument("--tokens", type=int, default=33, help="generated (default: 33)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=RESULTS / "octocoder.jsonl")
    return parser.parse_args()


def measured(scheme: str, options: argparse.Namespace) -> dict[str, Any]:
    """A row."""
    device = options.device
    begin = time.perf_counter()
    model = build("octocoder", dtype="bfloat16", device=device, layers=options.layers)
    synchronize(device)
    row: dict[str, Any] = {"scheme": scheme, "parameters": sum(each.numel() for each in model.parameters())}
    row |= {"build_s": time.perf_counter() - begin, "before_bytes": sum(storages(model).values())}
    row["largest_bytes"] = max(each.nbytes for each in model.parameters())
    peak, begin = PeakMemory(device), time.perf_counter()
    patch(model, quantize=None if scheme == "bf16" else scheme)
    synchronize(device)
    row |= {"patch_s": time.perf_counter() - begin, "more_bytes": peak.bytes, "live_bytes": live_bytes(device)}
    row["after_bytes"] = sum(storages(model).values())
    ids = torch.randint(1, SHAPES["octocoder"]["vocab_size"], (1, 128), generator=torch.Generator().manual_seed(1)).to(
        device
    )
    row["generate_s"] = []
    for _ in range(2):
        begin = time.perf_counter()
        model.generate(ids, max_new_tokens=options.tokens, min_new_tokens=options.tokens, do_sample=False)
        synchronize(device)
        row["generate_s"].append(time.perf_counter() - begin)
    return row


@torch.no_grad()
def main() -> None:
    options = arguments()
    run = start(options.device)
    same = {"part": "octocoder", "layers": options.layers, "tokens": options.tokens, "dtype": "bfloat16"}
    same |= {"device": options.device, "threads": torch.get_num_threads()}
    for scheme in options.schemes:
        (row,) = record(run, [same | measured(scheme, options)], options.out)
        gc.collect()
        sizes = ", ".join(f"{name} {row[f'{name}_bytes'] / 2**30:.2f}" for name in ("before", "more", "after", "live"))
        print(f"{scheme}: {row['parameters'] / 1e9:.2f} billion in {row['patch_s']:.1f} s; GiB: {sizes}", flush=True)


if __name__ == "__main__":
    main()
