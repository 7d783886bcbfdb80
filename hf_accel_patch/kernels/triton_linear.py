# mypy: disable-error-code="import-not-found, import-untyped, no-untyped-call, no-untyped-def, untyped-decorator"
"""Products y = x W^T with quantized weights on NVIDIA GPUs, in Triton. Needs triton; imported only when used.

Codes of four bits are contiguous uint8 [N / 2, K, 1]: byte [n, k, 0] holds the code of row 2 n in its low half and
that of row 2 n + 1 in its high half. There is a scale per row and group of G = 32, 64 or 128 input features. Sums are
float32 and always in the same order. Nothing waits for the device or depends on the data, so CUDA graphs can record it.

What multiplies depends on the rows M of x:

* Up to MATMUL_ROWS, tensor cores multiply the codes themselves, exact in 16 bits, and the float32 product of a group is
  scaled. Bytes come ahead of time to shared memory and lie there as the tensor cores want them, so that a warp has them
  with one instruction per 8 weights; a weight takes 2.2 to 3.1 instructions with 4 bits, 3.4 with 8, 5.1 with a table,
  of which an H200 has 29e12 a second. Up to eight rows, or S, that would be padding cost little.
* float32 activations up to EXACT_ROWS are multiplied number by number: tensor cores would round them.
* Beyond, and for 16 bits on GPUs before compute capability 8.0, weights are dequantized for cuBLAS.

A small product is over in microseconds, most of which are its start. So K is split inside of a program
(kernels/triton_products.py), and between programs only where many rows meet few outputs: a second kernel adds their
float32 sums [S, M, N]. That programs start while the kernel before them ends ("programmatic dependent launch") made
small products slower: they take registers and shared memory, and wait.

An H200 takes for all linear layers of an 8B model and one row 4.57 ms with bfloat16 weights, 2.11 with int4, 2.62 with
int8, 2.84 with nf4, most of it in small products: the head alone is read at 3.6e12 of 4.1e12 bytes a second with int4.
"""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from hf_accel_patch.kernels.triton_codes import lookup
from hf_accel_patch.kernels.triton_products import (
    _add,
    _dense4,
    _exact4,
    _exact8,
    _product4,
    _product8,
    _three4,
    _three8,
)

INTERPRETED = bool(triton.knobs.runtime.interpret)  # as it was when the kernels were decorated
PROCESSORS = 132  # of an H100 or H200; not asked of the device, so that every GPU adds in the same order
EXACT_ROWS = 16
MATMUL_ROWS = 128
DENSE_WEIGHTS = 1 << 26  # dequantized at a time: 128 MB in 16 bits, enough for a layer of an 8B model
BLOCK = 2  # rows that share the bytes of 4-bit codes
HALVES = (torch.bfloat16, torch.float16)
ANY = 1 << 62  # outputs
# Which tile up to how many rows of x, and below how many outputs: up to 16 rows those that were the fastest on an H200,
# for more those with the fewest instructions. Few outputs need many parts of K for all processors to read.
TILES4 = (  # pairs of outputs, parts of K, steps at a time, stages, warps
    (1, 8192, (4, 8, 2, 4, 2)),
    (1, 65536, (8, 8, 1, 3, 4)),
    (1, ANY, (16, 8, 2, 3, 4)),
    (2, ANY, (8, 4, 2, 4, 2)),
    (4, 8192, (8, 4, 2, 4, 2)),
    (4, ANY, (16, 2, 2, 4, 2)),
    (8, 8192, (8, 4, 2, 3, 2)),
    (8, ANY, (16, 2, 2, 3, 2)),
    (16, 8192, (16, 2, 2, 3, 2)),
    (16, ANY, (32, 1, 2, 3, 2)),
    (MATMUL_ROWS, ANY, (64, 1, 1, 3, 4)),
)
TILES8 = (  # outputs, parts of K, input features per step, stages, warps
    (1, 4096, (4, 8, 128, 4, 2)),
    (2, ANY, (8, 4, 256, 3, 2)),
    (4, 8192, (8, 4, 128, 4, 2)),
    (4, ANY, (16, 2, 128, 4, 2)),
    (8, 4096, (8, 4, 128, 4, 2)),
    (16, 8192, (16, 2, 128, 4, 2)),
    (16, ANY, (32, 1, 128, 4, 2)),
    (MATMUL_ROWS, ANY, (64, 1, 128, 3, 4)),
)


Weights = list[tuple[Tensor, Tensor]]  # codes and scales of each


class Table(NamedTuple):
    """Sixteen values that half-bytes stand for: float32 on a device, and the instructions that look them up, rounded to
    both 16-bit types."""

    values: Tensor
    bfloat16: str
    float16: str

    @classmethod
    def of(cls, values: Tensor, device: torch.device | str) -> Table:
        """values: on the CPU."""
        patterns = ((values.to(dtype).view(torch.int16).int() & 0xFFFF).tolist() for dtype in HALVES)
        return cls(values.float().to(device), *map(lookup, patterns))


class Tile(NamedTuple):
    """What a program has: rows and columns of x, outputs or pairs of outputs, parts of K, input features per step,
    steps at a time, stages of the pipeline, warps."""

    rows: int
    columns: int
    outputs: int
    parts: int
    step: int
    unroll: int
    stages: int
    warps: int


def linear_int4(x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    """x [M, K] times the transpose of int4 weights: [M, N] in the dtype of x. Scales are bfloat16 [K / G, N, 2], a
    scale and a zero: w = (code - 8) * scale + zero."""
    return _linear4(x, codes, _pairs(scales), None)


def linear_table(x: Tensor, codes: Tensor, absmax: Tensor, table: Table) -> Tensor:
    """x [M, K] times the transpose of weights from a table: [M, N] in the dtype of x. w = table[code] * absmax, with
    float32 absmax [K / G, N]. Of x in 16 bits, table[code] is rounded to its dtype, and beyond MATMUL_ROWS w is, as in
    bitsandbytes."""
    return _linear4(x, codes, _pairs(absmax), table)


def linear_int8(x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    """x [M, K] times the transpose of int8 codes [N, K] with bfloat16 scales [N]: [M, N] in the dtype of x. Fast where
    K is a multiple of 16."""
    N, K = codes.shape
    x = _activations(x, K)
    M, out = len(x), x.new_empty(len(x), N)
    if not M:
        return out
    with torch.cuda.device_of(x):
        if _few(x):
            if x.dtype is torch.float32:
                rows = min(M, 2)
                _exact8[(triton.cdiv(N, 4), triton.cdiv(M, rows))](
                    x, codes, scales, out, M, N, K, rows, 4, 512, num_warps=4
                )
                return out
            t = tile8(M, N)
            tiles = triton.cdiv(N, t.outputs), triton.cdiv(M, t.rows)
            steps = triton.cdiv(K, t.step * t.parts)
            parts = _parts(out, splits(tiles[0] * tiles[1], steps, M))
            _product8[(tiles[0], len(parts), tiles[1])](
                x, codes, scales, parts, M, N, K, triton.cdiv(steps, len(parts)), t.rows, t.columns, t.outputs,
                t.parts, t.step, t.stages, not INTERPRETED, num_warps=t.warps,
            )  # fmt: skip
            _add_parts(parts, out)
        else:
            step = max(1, DENSE_WEIGHTS // K)
            for start in range(0, N, step):
                n = slice(start, start + step)
                torch.mm(x, dequantize_int8(codes[n], scales[n], x.dtype).T, out=out[:, n])
    return out


def linear_together(x: Tensor, weights: Weights, table: Table | None) -> list[Tensor] | None:
    """`linear_int4`, or with a table `linear_table`, or of codes [N, K] `linear_int8`, of one x with two or three
    weights, in one kernel: a small product is over in microseconds, most of which are its start. None where they are
    better apart: with float32 activations, more than MATMUL_ROWS rows, or where programs share K."""
    codes = [codes for codes, _ in weights]
    x = _activations(x, codes[0].shape[1])
    if x.dtype is torch.float32 or not _few(x) or not len(x):
        return None
    N = [len(each) * (2 if each.dim() == 3 else 1) for each in codes]
    outs = [x.new_empty(len(x), n) for n in N]
    run = _together8 if codes[0].dim() == 2 else _together4
    with torch.cuda.device_of(x):
        return outs if run(x, weights, N, outs, table) else None


def dequantize_int4(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The weights [N, K], computed in float32 and rounded once."""
    return _dequantized(codes, _pairs(scales), None, dtype)


def dequantize_table(codes: Tensor, absmax: Tensor, table: Table, dtype: torch.dtype) -> Tensor:
    """The weights [N, K], computed in float32 and rounded once."""
    return _dequantized(codes, _pairs(absmax), table, dtype)


def dequantize_int8(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The weights [N, K], computed in float32 and rounded once: PyTorch has a kernel for that."""
    return torch.mul(codes, scales.float()[:, None], out=torch.empty_like(codes, dtype=dtype))


def _together4(x: Tensor, weights: Weights, N: list[int], outs: list[Tensor], table: Table | None) -> bool:
    codes, scales = [each for each, _ in weights], [_pairs(each) for _, each in weights]
    for each in codes:
        _check_pairs(each)
    (M, K), groups = x.shape, len(scales[0])
    t = tile4(M, sum(N), K // groups)
    tiles, second, third = _tiles([n // 2 for n in N], t.outputs)
    rows, steps = triton.cdiv(M, t.rows), triton.cdiv(groups, t.parts)
    if splits(tiles * rows, steps, M) > 1:
        return False
    values, found = _lookup(table, x.dtype)
    _three4[(tiles, 1, rows)](
        x, *_three(codes), *_three(scales), values, *_three(outs), M, K,
        *_three([n // 2 for n in N]), groups, steps, second, third, found, t.rows, t.columns, t.outputs, t.parts,
        K // groups, t.unroll, t.stages, not INTERPRETED, num_warps=t.warps,
    )  # fmt: skip
    return True


def _together8(x: Tensor, weights: Weights, N: list[int], outs: list[Tensor], table: Table | None) -> bool:
    (M, K), t = x.shape, tile8(len(x), sum(N))
    tiles, second, third = _tiles(N, t.outputs)
    rows, steps = triton.cdiv(M, t.rows), triton.cdiv(K, t.step * t.parts)
    if splits(tiles * rows, steps, M) > 1:
        return False
    codes, scales = ([each[i] for each in weights] for i in (0, 1))
    _three8[(tiles, 1, rows)](
        x, *_three(codes), *_three(scales), *_three(outs), M, K, *_three(N), steps, second, third, t.rows, t.columns,
        t.outputs, t.parts, t.step, t.stages, not INTERPRETED, num_warps=t.warps,
    )  # fmt: skip
    return True


def _tiles(outputs: list[int], size: int) -> tuple[int, int, int]:
    """Of two or three weights: how many tiles there are, and the first of the second and of the third."""
    counts = [triton.cdiv(n, size) for n in outputs]
    return sum(counts), counts[0], counts[0] + counts[1]


def _three(of: list[Any]) -> list[Any]:
    """What is given of two or three weights; of a third that is not there no tile is computed."""
    return [*of, *of[-1:]][:3]


@lru_cache(maxsize=1024)
def tile4(M: int, N: int, group: int) -> Tile:
    outputs, parts, unroll, stages, warps = next(tile for rows, most, tile in TILES4 if rows >= M and most > N)
    if group > 64:
        unroll, stages = 1, 3
    return _tile(M, outputs, parts, group, unroll, stages, warps)


@lru_cache(maxsize=1024)
def tile8(M: int, N: int) -> Tile:
    outputs, parts, step, stages, warps = next(tile for rows, most, tile in TILES8 if rows >= M and most > N)
    return _tile(M, outputs, parts, step, 1, stages, warps)


def _tile(M: int, outputs: int, parts: int, step: int, unroll: int, stages: int, warps: int) -> Tile:
    rows = min(64, _power_of_2_from(M))
    return Tile(rows, max(8, rows * parts), outputs, parts, step, unroll, stages, warps)


def splits(tiles: int, steps: int, M: int) -> int:
    """Programs per tile of the result that split K: five for every processor, but no more than leave each so many steps
    that they save more than to add them takes, and than eight, for their sums to stay small beside the weights."""
    return max(1, min(5 * PROCESSORS // tiles, steps // (16 if M <= 8 else 8), 8))


def _linear4(x: Tensor, codes: Tensor, scales: Tensor, table: Table | None) -> Tensor:
    pairs, K = _check_pairs(codes)
    groups, N = len(scales), 2 * pairs
    x, G = _activations(x, K), K // groups
    M, out = len(x), x.new_empty(len(x), N)
    values, found = _lookup(table, x.dtype)
    if not M:
        return out
    with torch.cuda.device_of(x):
        if _few(x):
            if x.dtype is torch.float32:
                rows = min(M, 2)
                _exact4[(triton.cdiv(pairs, 4), triton.cdiv(M, rows))](
                    x, codes, scales, values, out, M, N, K, pairs, rows, 4, 512, G, num_warps=4
                )
                return out
            t = tile4(M, N, G)
            tiles = triton.cdiv(pairs, t.outputs), triton.cdiv(M, t.rows)
            steps = triton.cdiv(groups, t.parts)
            parts = _parts(out, splits(tiles[0] * tiles[1], steps, M))
            _product4[(tiles[0], len(parts), tiles[1])](
                x, codes, scales, values, parts, M, N, K, pairs, groups, triton.cdiv(steps, len(parts)), found, t.rows,
                t.columns, t.outputs, t.parts, G, t.unroll, t.stages, not INTERPRETED, num_warps=t.warps,
            )  # fmt: skip
            _add_parts(parts, out)
        else:
            step = max(1, DENSE_WEIGHTS // (2 * K))
            for start in range(0, pairs, step):
                n = slice(start, start + step)
                dense = _dequantized(codes[n], scales[:, n], table, x.dtype)
                torch.mm(x, dense.T, out=out[:, 2 * start : 2 * (start + step)])
    return out


def _dequantized(codes: Tensor, scales: Tensor, table: Table | None, dtype: torch.dtype) -> Tensor:
    pairs, K = _check_pairs(codes)
    out = torch.empty(2 * pairs, K, dtype=dtype, device=codes.device)
    values = None if table is None else table.values
    with torch.cuda.device_of(codes):
        _dense4[(triton.cdiv(pairs, 4), triton.cdiv(K, 1024))](
            codes, scales, values, out, pairs, scales.stride(0), K, 4, 1024, K // len(scales), num_warps=4
        )
    return out


def _few(x: Tensor) -> bool:
    """Whether the products are these kernels', and not cuBLAS's with dense weights."""
    if x.dtype is torch.float32:
        return len(x) <= EXACT_ROWS
    return len(x) <= MATMUL_ROWS and _tensor_cores(x.device)


def _parts(out: Tensor, count: int) -> Tensor:
    """Where the programs that split K leave their sums, [S, M, N]: the result itself if it is not split."""
    return out[None] if count == 1 else torch.empty(count, *out.shape, dtype=torch.float32, device=out.device)


def _add_parts(parts: Tensor, out: Tensor) -> None:
    if len(parts) > 1:
        _add[(triton.cdiv(out.numel(), 512),)](parts, out, out.numel(), len(parts), 512, num_warps=4)


@cache
def _tensor_cores(device: torch.device) -> bool:
    """Whether Triton has products for them: on older GPUs it multiplies number by number, and spills registers."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)


def _activations(x: Tensor, K: int) -> Tensor:
    """The kernels trust what they are given."""
    if x.dtype not in (torch.float32, *HALVES):
        raise TypeError(f"activations are {x.dtype}; the kernels take float32, bfloat16 or float16")
    if x.dim() != 2 or x.shape[1] != K:
        raise RuntimeError(f"activations of shape {tuple(x.shape)} meet weights with {K} features")
    return x.contiguous()


def _check_pairs(codes: Tensor) -> tuple[int, int]:
    pairs, K, half = codes.shape
    if half != BLOCK // 2:
        raise RuntimeError(f"codes lie in blocks of {2 * half} rows; the kernels take those of {BLOCK}")
    return pairs, K


def _lookup(table: Table | None, dtype: torch.dtype) -> tuple[Tensor | None, str]:
    """The values of a table, and the instructions that look them up."""
    if table is None:
        return None, ""
    return table.values, table.float16 if dtype is torch.float16 else table.bfloat16


def _pairs(scales: Tensor) -> Tensor:
    """What is said of two rows, two words, as one int64: [K / G, N / 2]."""
    scales = scales.contiguous()
    if scales.storage_offset() * scales.element_size() % 8 or scales.data_ptr() % 8:
        scales = scales.clone()
    return scales.view(torch.int32).view(len(scales), -1).view(torch.int64)


def _power_of_2_from(n: int) -> int:
    """The smallest that is not less than n."""
    return 1 << (n - 1).bit_length()
