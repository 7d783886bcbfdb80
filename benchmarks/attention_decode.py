"""How fast does a token attend to what is cached? Attention of one step alone, recorded in a CUDA graph.

    python -m benchmarks.attention_decode --device cuda                  # 32 heads of 128 for 8; 8k, 32k, 128k tokens
    TRITON_INTERPRET=1 python -m benchmarks.attention_decode --contexts 96 --heads 4 --shared 2 --head-size 32 \\
        --bytes 1e5 --rounds 1               # tries the benchmark itself on a CPU

The layers of a model follow one another, each with keys and values of its own, so none is found in a cache: as many
as take --bytes together. A step that is recorded has room for more tokens than there are, and a mask that says which:
`triton` gets one, PyTorch's kernels go without. Rounds are interleaved. `ms` are those of all `layers`, `read_bytes`
those of their keys and values, with their scales. `difference` is the largest one from float64, relative to the largest
value; of int8 and int4 caches from the keys and values that they hold. Rows of JSON are added to --out.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.attention_kernels import repetitions, timed
from benchmarks.decode import RESULTS, record, start
from benchmarks.linear_kernels import replayed
from benchmarks.measure import read_bandwidth
from hf_accel_patch.ops.kv import Bits, Packed, pack, unpack

Row = dict[str, Any]
Call = Callable[[], Tensor]
BITS: dict[str, Bits] = {"int8": 8, "int4": 4}
SYSTEMS = ("torch", "torch-rows", "triton", *BITS)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS), help="default: all")
    parser.add_argument("--contexts", nargs="+", type=int, default=[8192, 32768, 131072], help="cached tokens")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--shared", type=int, default=8, help="key/value heads (default: 8)")
    parser.add_argument("--head-size", type=int, default=128)
    parser.add_argument("--queries", type=int, default=1, help="new tokens (default: 1)")
    parser.add_argument("--bytes", type=float, default=2**29, help="of all keys and values (default: 512 MB)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=RESULTS / "attention_decode.jsonl")
    options = parser.parse_args()
    if min(options.contexts) < 64 or any(tokens % 32 for tokens in options.contexts):
        parser.error("--contexts must be multiples of 32, and at least 64")
    return options


class Layer:
    """A query and its keys and values."""

    def __init__(self, tokens: int, options: argparse.Namespace) -> None:
        self.tokens, self.scale = tokens, options.head_size**-0.5
        like = {"device": options.device, "dtype": getattr(torch, options.dtype)}
        B, K, D = options.batch, options.shared, options.head_size
        self.query = torch.randn(B, options.heads, options.queries, D, **like)
        self.key, self.value = torch.randn(B, K, tokens, D, **like), torch.randn(B, K, tokens, D, **like)
        self.mask = torch.ones(B, 1, options.queries, tokens, dtype=torch.bool, device=options.device)
        self.packed: dict[int, Packed] = {}

    def call(self, system: str) -> tuple[Call, int]:
        """What computes [B, T, H, D], and the bytes of keys and values that it reads."""
        dense = self.key.nbytes + self.value.nbytes
        if system == "torch":
            grouped = partial(F.scaled_dot_product_attention, scale=self.scale, enable_gqa=True)
            return lambda: grouped(self.query, self.key, self.value).transpose(1, 2), dense
        if system == "torch-rows":  # the heads of a group as rows of one
            rows = self.query.unflatten(1, (self.key.shape[1], -1)).flatten(2, 3)
            attend = partial(F.scaled_dot_product_attention, rows, self.key, self.value, scale=self.scale)
            return lambda: attend().view(self.query.shape).transpose(1, 2), dense
        from hf_accel_patch.kernels import triton_decode

        bits = BITS.get(system, 0)
        whole = self.tokens // 64 * 64 if bits else 0
        packed = None
        if bits:
            packed = self.packed[bits] = pack(self.key[:, :, :whole], self.value[:, :, :whole], bits)
        rest = self.key[:, :, whole:], self.value[:, :, whole:]
        what = packed, bits, whole // 64, *rest, self.mask, self.scale, None, None
        size = sum(each.nbytes for each in packed or ()) + sum(each.nbytes for each in rest)
        return lambda: triton_decode.attend(self.query, *what), size

    def exactly(self, system: str) -> Tensor:
        """In float64."""
        key, value = self.key, self.value
        if system in BITS:
            bits, D = BITS[system], key.shape[-1]
            held = unpack(self.packed[bits], bits, D, D, torch.float32)
            key, value = (torch.cat((a, b[:, :, a.shape[2] :]), 2) for a, b in zip(held, (key, value), strict=True))
        rows = self.query.double().unflatten(1, (key.shape[1], -1))
        scores = rows @ key.double().unsqueeze(2).transpose(-1, -2) * self.scale
        return (scores.softmax(-1) @ value.double().unsqueeze(2)).flatten(1, 2).transpose(1, 2)


def measured(tokens: int, options: argparse.Namespace) -> list[Row]:
    """One row per system."""
    layers = [Layer(tokens, options)]
    while sum(each.key.nbytes + each.value.nbytes for each in layers) < options.bytes:
        layers.append(Layer(tokens, options))
    rows: dict[str, Row] = {}
    calls: dict[str, Call] = {}
    for system in options.systems:
        try:
            made = [layer.call(system) for layer in layers]
            calls[system] = replayed([call for call, _ in made], options.device)
            exact = layers[-1].exactly(system)
            difference = (calls[system]().double() - exact).abs().max() / exact.abs().max()
        except (RuntimeError, NotImplementedError, ImportError) as error:  # out of memory, among others
            calls.pop(system, None)
            rows[system] = {"reason": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"}
            continue
        rows[system] = {"read_bytes": sum(size for _, size in made), "difference": float(difference), "ms": []}
    repeats = {system: repetitions(call, options.device) for system, call in calls.items()}
    for number in range(options.rounds):
        for system in list(calls)[:: 1 if number % 2 == 0 else -1]:
            rows[system]["ms"].append(round(1e3 * timed(calls[system], repeats[system], options.device), 5))
    same = {"context": tokens, "layers": len(layers), "bandwidth_bytes_per_s": round(read_bandwidth(options.device))}
    return [same | {"system": system} | row for system, row in rows.items()]


@torch.no_grad()
def main() -> None:
    options = arguments()
    torch.manual_seed(0)
    run = start(options.device)
    names = ("batch", "heads", "shared", "head_size", "queries", "rounds", "dtype", "device")
    same = {"part": "attention-decode"} | {name: getattr(options, name) for name in names}
    print(f"{'tokens':>7} {'system':11} {'us a layer':>10} {'GB/s':>6} {'share':>6} {'difference':>11}")
    for tokens in options.contexts:
        for row in record(run, [same | row for row in measured(tokens, options)], options.out):
            if "reason" in row:
                print(f"{tokens:7d} {row['system']:11} {row['reason']}", flush=True)
                continue
            ms = median(row["ms"])
            speed = row["read_bytes"] / ms / 1e6
            facts = f"{1e3 * ms / row['layers']:10.2f} {speed:6.0f} {1e9 * speed / row['bandwidth_bytes_per_s']:6.0%}"
            print(f"{tokens:7d} {row['system']:11} {facts} {row['difference']:11.1e}", flush=True)


if __name__ == "__main__":
    main()
