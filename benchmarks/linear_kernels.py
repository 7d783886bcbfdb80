"""How fast are all linear layers of a decode step, launches taken out? Products alone, recorded in one CUDA graph.

    python -m benchmarks.linear_kernels --device cuda                    # llama-3.1-8b, up to 32 rows of activations
    python -m benchmarks.linear_kernels --device cuda --by-product --rows 1 8
    python -m benchmarks.linear_kernels --shape tiny --single 512 256 --rotate 1e6 --rounds 2    # on a CPU, in a row

Systems that end in `-together` take the products of queries, keys and values as one kernel, and those before the
activation of an MLP, as steps do that are recorded on a GPU.

Every layer has weights of its own, as a model does, so that none is found in a cache: random codes and scales, drawn on
the device in the layout of each system, without float weights behind them. Their products follow one another with
inputs that are there; attention, norms and what a host does between layers are left out. On a GPU the products are
recorded once and the recording is replayed; on a CPU they are called. The single product goes through as many copies of
its weight as take --rotate bytes together. Rounds are interleaved. `ms` are those of all
`products` of a row, `weight_bytes` those of their weights and scales. Rows of JSON, one per system and number of rows
of activations, are added to --out.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.attention_kernels import repetitions, timed
from benchmarks.baselines import missing
from benchmarks.decode import RESULTS, record, start
from benchmarks.gpu_table import linear_table
from benchmarks.measure import read_bandwidth, versions
from benchmarks.shapes import SHAPES, build
from hf_accel_patch.ops.linear import Backend, backend_for, linear
from hf_accel_patch.ops.packing import block_on
from hf_accel_patch.ops.together import MOST, linear_together

GROUP = 64  # input features with a scale of their own, in 4 bits
Row = dict[str, Any]
Shape = tuple[int, int]  # outputs, input features
Made = tuple[Callable[[Tensor], Tensor], list[Tensor]]  # a product, and what it reads


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.1-8b")
    parser.add_argument("--layers", type=int, help="cut the shape to this many layers")
    parser.add_argument("--systems", nargs="+", choices=NAMES, default=list(NAMES), help="default: all")
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 2, 4, 8, 16, 32], help="of activations (1 to 32)")
    parser.add_argument("--by-product", action="store_true", help="each product of the shape alone, not all of a step")
    parser.add_argument(
        "--single", nargs=2, type=int, default=[14336, 4096], metavar=("N", "K"), help="outputs and inputs (14336 4096)"
    )
    parser.add_argument("--rotate", type=float, default=2**29, help="bytes of its copies, beyond any cache (512 MB)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--limit", type=float, default=300, help="seconds, after which no number of rows is begun")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=RESULTS / "linear_kernels.jsonl")
    return parser.parse_args()


@dataclass
class Products:
    """One after the other, and what they read."""

    calls: list[Callable[[Tensor], Tensor]] = field(default_factory=list)
    features: list[int] = field(default_factory=list)
    weight_bytes: int = 0
    count: int = 0  # of weights

    def add(self, system: str, shapes: list[Shape], device: str) -> None:
        """Those of one x."""
        name = system.removesuffix(TOGETHER)
        made = [SYSTEMS[name](*shape, device) for shape in shapes]
        self.count += len(made)
        self.weight_bytes += sum(each.nbytes for _, held in made for each in held)
        if name == system or len(made) == 1:
            self.calls += [call for call, _ in made]
            self.features += [K for _, K in shapes]
        else:
            self.calls.append(together(name, [held for _, held in made]))
            self.features.append(shapes[0][1])

    def run(self, inputs: dict[int, Tensor]) -> Tensor:
        for call, K in zip(self.calls, self.features, strict=True):
            y = call(inputs[K])
        return y


def bf16(N: int, K: int, device: str) -> Made:
    weight = torch.empty(N, K, dtype=torch.bfloat16, device=device).normal_(std=0.02)
    return partial(F.linear, weight=weight), [weight]


def ours(scheme: str, N: int, K: int, device: str) -> Made:
    block = block_on(torch.device(device))
    padded = -(-N // block) * block
    if scheme == "int8":
        codes, scales = _bytes((1, N, K), device).view(torch.int8), _scales((N,), device)
    elif scheme == "int4":
        codes = _bytes((padded // block, K, block // 2), device)
        scales = _scales((_groups(K), padded, 2), device)
    else:
        codes = _bytes((padded // block, K, block // 2), device)
        scales = _scales((_groups(K), padded), device).float()
    backend = backend_for(scheme, True) if device == "cpu" else Backend(False, 0)
    return partial(linear, codes=codes, scales=scales, scheme=scheme, backend=backend), [codes, scales]


def together(scheme: str, held: list[list[Tensor]]) -> Callable[[Tensor], Tensor]:
    codes, scales = ([each[i] for each in held] for i in (0, 1))

    def call(x: Tensor) -> Tensor:
        return linear_together(x, codes, scales, scheme, False, 0, False)[-1]

    return call


def tinygemm(N: int, K: int, device: str) -> Made:
    """PyTorch's kernel, which torchao's int4 calls."""
    codes = torch.ops.aten._convert_weight_to_int4pack(_bytes((N, K // 2), device), 8)
    scales = _scales((_groups(K), N, 2), device)

    def call(x: Tensor) -> Tensor:
        y: Tensor = torch.ops.aten._weight_int4pack_mm(x, codes, GROUP, scales)
        return y

    return call, [codes, scales]


def bitsandbytes(N: int, K: int, device: str) -> Made:
    import bitsandbytes as theirs

    table = theirs.functional.get_4bit_type("nf4", device=device)
    codes, absmax = _bytes((N * K // 2, 1), device), _scales((N * K // GROUP,), device).float()
    state = theirs.functional.QuantState(
        absmax, torch.Size((N, K)), table, blocksize=GROUP, quant_type="nf4", dtype=torch.bfloat16
    )

    def call(x: Tensor) -> Tensor:
        y: Tensor = theirs.matmul_4bit(x, codes.t(), quant_state=state)
        return y

    return call, [codes, absmax]


def _bytes(shape: tuple[int, ...], device: str) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, device=device)


def _scales(shape: tuple[int, ...], device: str) -> Tensor:
    return torch.rand(shape, device=device).mul_(0.01).bfloat16()


def _groups(K: int) -> int:
    if K % GROUP:
        raise ValueError(f"{K} input features are not whole groups of {GROUP}")
    return K // GROUP


SYSTEMS: dict[str, Callable[[int, int, str], Made]] = {
    "bf16": bf16,
    "int8": partial(ours, "int8"),
    "int4": partial(ours, "int4"),
    "nf4": partial(ours, "nf4"),
    "tinygemm-int4": tinygemm,
    "bitsandbytes-nf4": bitsandbytes,
}
TOGETHER = "-together"
NAMES = (*SYSTEMS, *(name + TOGETHER for name in ("int8", "int4", "nf4")))


def unavailable(system: str, device: str) -> str | None:
    if system.endswith(TOGETHER) and not device.startswith("cuda"):
        return "on a CPU there is nothing to be won by one kernel"
    if system == "tinygemm-int4" and not device.startswith("cuda"):
        return "the kernel is for CUDA"
    return missing("bitsandbytes") if system == "bitsandbytes-nf4" else None


def layers(shape: str, count: int | None) -> list[list[Shape]]:
    """Of every linear layer, the head's too: together those that one x goes through."""
    model = build(shape, dtype="bfloat16", device="meta", layers=count)
    found: list[list[Shape]] = []
    for parent in model.modules():
        some: list[Shape] = []  # q, k and v, but not what follows attention; gate and up
        for each in parent.children():
            if isinstance(each, nn.Linear):
                shape_ = each.out_features, each.in_features
                if not some or some[-1][1] != shape_[1] or len(some) == MOST:
                    some = []
                    found.append(some)
                some.append(shape_)
    return found


def single(N: int, K: int) -> Row:
    return {"shape": f"{N} x {K}", "layers": None, "copies": True}


def recorded(products: Products, rows: int, device: str) -> Callable[[], Tensor]:
    """What runs them once on inputs of so many rows."""
    inputs = {K: torch.randn(rows, K, device=device).bfloat16() for K in products.features}
    return replayed([partial(products.run, inputs)], device)


def replayed(calls: Sequence[Callable[[], Tensor]], device: str) -> Callable[[], Tensor]:
    """What does the same once more as one CUDA graph, or on a CPU calls them in a row, and returns what the last one
    returned."""

    def run() -> Tensor:
        return [call() for call in calls][-1]

    if not device.startswith("cuda"):
        run()
        return run
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):  # compiles, and takes what workspaces there are
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = run()

    def replay(held: Sequence[object] = (calls, run)) -> Tensor:  # their inputs lie where the graph reads them
        graph.replay()
        return output

    return replay


def measured(made: dict[str, Products], reasons: dict[str, str], rows: int, options: argparse.Namespace) -> list[Row]:
    """One row per system: its times, a list over the rounds, or why it has none."""
    found: dict[str, Row] = {name: {"reason": reason} for name, reason in reasons.items()}
    calls: dict[str, Callable[[], Tensor]] = {}
    for name, products in made.items():
        try:
            calls[name] = recorded(products, rows, options.device)
            output = calls[name]()
            if not output.isfinite().all():
                raise RuntimeError("the last product is not finite")
        except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
            calls.pop(name, None)
            found[name] = {"reason": _said(error)}
            continue
        found[name] = {"weight_bytes": products.weight_bytes, "products": products.count, "ms": []}
    repeats = {name: repetitions(call, options.device) for name, call in calls.items()}
    for round_ in range(options.rounds):
        for name in list(calls)[:: 1 if round_ % 2 == 0 else -1]:
            found[name]["ms"].append(round(1e3 * timed(calls[name], repeats[name], options.device), 5))
    bandwidth = round(read_bandwidth(options.device))
    peer = {"bitsandbytes-nf4": versions("bitsandbytes")}
    return [
        {"rows": rows, "system": name, "bandwidth_bytes_per_s": bandwidth, "peer": peer.get(name, {})} | found[name]
        for name in options.systems
    ]


def held(
    shapes: list[list[Shape]], options: argparse.Namespace, rotate: float = 0
) -> tuple[dict[str, Products], dict[str, str]]:
    """The products of each system, and why some have none. rotate: bytes that copies of the first one fill."""
    made: dict[str, Products] = {}
    reasons: dict[str, str] = {}
    for name in options.systems:
        if reason := unavailable(name, options.device):
            reasons[name] = reason
            continue
        products = Products()
        try:
            for some in shapes:
                products.add(name, some, options.device)
            while products.weight_bytes < rotate:
                products.add(name, shapes[0], options.device)
        except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:  # out of memory, among others
            reasons[name] = _said(error)
            continue
        made[name] = products
    return made, reasons


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


@torch.no_grad()
def main() -> None:
    options = arguments()
    torch.manual_seed(0)
    run, begin, everything = start(options.device), time.perf_counter(), []
    same = {"part": "linear-kernels", "dtype": "bfloat16", "device": options.device, "rounds": options.rounds}
    same |= {"threads": torch.get_num_threads()}
    N, K = options.single
    every = layers(options.shape, options.layers)
    whole: Row = {"shape": options.shape, "layers": options.layers, "copies": False}
    turns: list[tuple[Row, list[list[Shape]], list[int], float]]
    turns = [(single(N, K), [[(N, K)]], [1], options.rotate), (whole, every, options.rows, 0)]
    if options.by_product:
        alone = dict.fromkeys(shape for some in every for shape in some)
        turns = [(single(N, K), [[(N, K)]], options.rows, options.rotate) for N, K in alone]
    for named, shapes, numbers, rotate in turns:
        made, reasons = held(shapes, options, rotate)
        for rows in numbers:
            if time.perf_counter() - begin > options.limit:
                print(f"{named['shape']}: {rows} rows were not begun after {options.limit:.0f} s")
                continue
            found = measured(made, reasons, rows, options)
            everything += record(run, [same | named | each for each in found], options.out)
            for each in found:
                said = each.get("reason") or f"{median(each['ms']):.3f} ms, {each['products']} products"
                print(f"{named['shape']}, {rows} rows, {each['system']}: {said}", flush=True)
        del made
    print(linear_table(everything))


if __name__ == "__main__":
    main()
