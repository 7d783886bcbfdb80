"""How fast does each backend compute the attention of a prompt? TFLOP/s by kind of attention, forward and backward.

    python -m benchmarks.attention_kernels --device cuda                 # 16k tokens, 32 heads of 128, bfloat16
    python -m benchmarks.attention_kernels --device cuda --head-size 256 --kinds plain softcap --backward
    python -m benchmarks.attention_kernels --device cuda --tiles 128,64,8,3 128,128,8,3 64,64,4,3
    TRITON_INTERPRET=1 python -m benchmarks.attention_kernels --length 64 --heads 2 --shared 1 --head-size 16 \\
        --dtype float32 --rounds 1           # tries the benchmark itself on a CPU

Every backend is called as a patched model calls it. Rounds are interleaved; a call is repeated until the clock can tell
it from a launch. What counts as work are the scores that queries see, 2 * (D + V) operations each, 2.5 times as many in
a backward, so a window is not credited with what it leaves out. `difference` is the largest one from the first backend,
relative to its largest value. Rows of JSON are added to --out.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import causal_mask_function, sliding_window_causal_mask_function

from benchmarks.decode import RESULTS, record, start
from benchmarks.measure import synchronize
from hf_accel_patch.errors import HfAccelError
from hf_accel_patch.ops.backends import BACKENDS, Asked, missing
from hf_accel_patch.passes.attention import attention_forward
from hf_accel_patch.passes.attention_backend import BACKEND
from hf_accel_patch.passes.described import describe_mask

KINDS = ("plain", "window", "padded", "alibi", "softcap", "sinks")
WINDOW = 8  # times which a window fits into the prompt
LEAST_SECONDS = 0.05  # of a timed repetition
Row = dict[str, Any]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    every = [name for name in BACKENDS if name != "auto"]
    parser.add_argument("--backends", nargs="+", choices=every, default=every)
    parser.add_argument("--tiles", nargs="+", metavar="M,N,W,S", help="of Triton alone: queries, keys, warps, stages")
    parser.add_argument("--length", type=int, default=16384, help="tokens (default: 16384)")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument(
        "--shared", type=int, default=8, help="key/value heads; alibi has as many as heads (default: 8)"
    )
    parser.add_argument("--head-size", type=int, default=128)
    parser.add_argument("--value-size", type=int, help="default: the head size")
    parser.add_argument("--backward", action="store_true", help="time the backward with the forward")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--limit", type=float, default=300, help="seconds, after which no other kind is begun")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=RESULTS / "attention_kernels.jsonl")
    options = parser.parse_args()
    options.tiles = [tuple(map(int, tile.split(","))) for tile in options.tiles or ()]
    if any(len(tile) != 4 for tile in options.tiles):
        parser.error("--tiles are four numbers each, as in 128,64,8,3")
    return options


class Case:
    """Inputs of one kind of attention."""

    def __init__(self, kind: str, options: argparse.Namespace) -> None:
        B, H, T, D = options.batch, options.heads, options.length, options.head_size
        K = H if kind == "alibi" else options.shared
        self.options, dtype = options, getattr(torch, options.dtype)
        generator = torch.Generator(options.device).manual_seed(0)

        def normal(*shape: int) -> Tensor:
            x = torch.randn(shape, generator=generator, device=options.device, dtype=dtype).transpose(1, 2)
            return x.requires_grad_(options.backward)

        self.inputs = normal(B, T, H, D), normal(B, T, K, D), normal(B, T, K, options.value_size or D)
        self.gradient = torch.ones(B, T, H, options.value_size or D, device=options.device, dtype=dtype)
        window = max(1, T // WINDOW)
        padding = torch.ones(B, T, dtype=torch.bool, device=options.device)
        if kind == "padded":
            padding[:, : T // 4] = False
        function = sliding_window_causal_mask_function(window) if kind == "window" else causal_mask_function
        size = window if kind == "window" else None
        self.mask = describe_mask(B, T, T, 0, 0, padding, size, device=options.device, mask_function=function)
        self.extra: Row = {"softcap": 50.0} if kind == "softcap" else {}
        if kind == "sinks":
            self.extra["s_aux"] = torch.zeros(H, device=options.device, dtype=dtype)
        if kind == "alibi":
            slopes = 2.0 ** (-8 * torch.arange(1, H + 1, device=options.device) / H)
            self.extra["position_bias"] = slopes[None, :, None, None] * torch.arange(1.0 - T, 1, device=options.device)
        whole = T * (T + 1) // 2
        seen = {"window": whole - (T - window) * (T - window + 1) // 2, "padded": (T - T // 4) * (T - T // 4 + 1) // 2}
        passes = 3.5 if options.backward else 1
        self.operations = passes * 2 * (D + (options.value_size or D)) * B * H * seen.get(kind, whole)

    def call(self, module: nn.Module) -> Tensor:
        output, _ = attention_forward(module, *self.inputs, self.mask, is_causal=True, **self.extra)
        if self.options.backward:
            output.backward(self.gradient)
        return output.detach()


def measured(case: Case, options: argparse.Namespace) -> list[Row]:
    """One row per backend: its speed, or why it has none."""
    rows: dict[str, Row] = {}
    calls: dict[str, Callable[[], Tensor]] = {}
    reference: Tensor | None = None
    for name in options.backends:
        if found := missing(name):
            rows[name] = {"reason": found[0]}
            continue
        module, asked = nn.Module(), Asked(name)
        setattr(module, BACKEND, asked)
        try:
            output = case.call(module).float()
        except (RuntimeError, NotImplementedError, HfAccelError) as error:  # out of memory, among others
            rows[name] = {"reason": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}
            continue
        if elsewhere := [used for used in asked.used if not used.startswith(f"{name}:")]:
            rows[name] = {"reason": elsewhere[0].partition(": ")[2]}
            continue
        reference = output if reference is None else reference
        difference = (output - reference).abs().max() / reference.abs().max()
        rows[name] = {"difference": float(difference)}
        calls[name] = lambda module=module: case.call(module)  # type: ignore[misc]
    repeats = {name: repetitions(call, options.device) for name, call in calls.items()}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(options.rounds):
        for name in list(calls)[:: 1 if round_ % 2 == 0 else -1]:
            seconds[name].append(timed(calls[name], repeats[name], options.device))
    for name, times in seconds.items():
        rows[name] |= {"ms": 1e3 * median(times), "tflops": case.operations / median(times) / 1e12}
        if options.device.startswith("cuda"):
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            calls[name]()
            rows[name]["peak_bytes"] = torch.cuda.max_memory_allocated() - before
    return [{"backend": name} | row for name, row in rows.items()]


def tiled(options: argparse.Namespace) -> list[Row]:
    """One row per kind and tile, all in turns: the speed of the Triton kernel."""
    from hf_accel_patch.kernels import triton_prefill

    module, chosen = nn.Module(), triton_prefill.tiling
    setattr(module, BACKEND, Asked("triton"))
    cases = {kind: Case(kind, options) for kind in options.kinds}

    def call(kind: str, tile: tuple[int, ...]) -> Tensor:
        triton_prefill.tiling = lambda *args, **more: triton_prefill.Tiling(*tile)  # type: ignore[assignment]
        return cases[kind].call(module)

    calls = {(kind, tile): partial(call, kind, tile) for kind in options.kinds for tile in options.tiles}
    seconds: dict[tuple[str, tuple[int, ...]], list[float]] = {key: [] for key in calls}
    try:
        for number in range(options.rounds + 1):  # the first compiles
            for key in list(calls)[:: 1 if number % 2 == 0 else -1]:
                seconds[key].append(timed(calls[key], 5, options.device))
    finally:
        triton_prefill.tiling = chosen
    rows = []
    for (kind, tile), times in seconds.items():
        found = median(times[1:])
        rows.append({"kind": kind, "tile": tile, "ms": 1e3 * found, "tflops": cases[kind].operations / found / 1e12})
    return rows


def timed(call: Callable[[], Tensor], repeats: int, device: str) -> float:
    """Seconds of one call."""
    synchronize(device)
    begin = time.perf_counter()
    for _ in range(repeats):
        call()
    synchronize(device)
    return (time.perf_counter() - begin) / repeats


def repetitions(call: Callable[[], Tensor], device: str) -> int:
    timed(call, 1, device)
    return max(1, min(100, int(LEAST_SECONDS / timed(call, 1, device))))


def main() -> None:
    options = arguments()
    run, begin = start(options.device), time.perf_counter()
    names = ("length", "batch", "heads", "shared", "head_size", "value_size", "backward", "dtype", "device")
    same = {"part": "attention-kernels"} | {name: getattr(options, name) for name in names}
    if options.tiles:
        with torch.set_grad_enabled(options.backward):
            rows = tiled(options)
        for row in record(run, [same | {"part": "attention-tilings"} | row for row in rows], options.out):
            print(f"{row['kind']:8} {row['tile']} {row['ms']:9.3f} {row['tflops']:9.4f}", flush=True)
        return
    print(f"{'kind':8} {'backend':11} {'ms':>9} {'TFLOP/s':>9} {'difference':>11}")
    for kind in options.kinds:
        if time.perf_counter() - begin > options.limit:
            print(f"{kind:8} not begun after {options.limit:.0f} s")
            continue
        with torch.set_grad_enabled(options.backward):
            rows = measured(Case(kind, options), options)
        for row in record(run, [same | {"kind": kind} | row for row in rows], options.out):
            facts = row.get("reason") or f"{row['ms']:9.3f} {row['tflops']:9.4f} {row['difference']:11.1e}"
            print(f"{kind:8} {row['backend']:11} {facts}", flush=True)


if __name__ == "__main__":
    main()
