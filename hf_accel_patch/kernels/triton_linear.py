# mypy: disable-error-code="import-not-found, import-untyped, no-untyped-call, no-untyped-def, untyped-decorator"
"""Products y = x W^T with quantized weights on NVIDIA GPUs, in Triton. Needs triton; imported only when used.

Codes of four bits are contiguous uint8 [N / B, K, B / 2], B being 32 or 64: byte [b, k, i] holds the code of row b * B
+ i in its low half and that of row b * B + B / 2 + i in its high half. B = 32 occupies a GPU at fewer outputs. There is
a scale per row and group of G = 32, 64 or 128 input features. Sums are float32 and always in the same order. Nothing
waits for the device or depends on the data, so CUDA graphs can record it.

What multiplies depends on the rows M of x:

* A matrix-vector kernel up to MATVEC_ROWS reads every weight once (of float32 activations, once for two rows). It is
  limited by instructions as much as by memory: an H100 can read 6.7e12 half-byte weights a second and issue 29e12
  instructions. So codes become floats by setting bits, and what the floats are too large by is taken off once per
  group, with the scale. As Triton 3.7 compiles it for sm_90, that is 4.6 instructions per weight for B = 32 and G = 64,
  3.6 for 64 and 128, about 6 for tables and 5.4 for int8.
* A kernel with tensor cores up to MATMUL_ROWS multiplies the codes themselves, exact in 16 bits, and scales the float32
  product of a group: 5 instructions per weight for up to 16 rows. It has no float32 activations: tensor cores would
  round them, and other cores are slower than the matrix-vector kernel for few rows and than cuBLAS for many.
* Beyond, and on GPUs before compute capability 8.0, weights are dequantized for cuBLAS. To write and read them costs 4
  bytes per weight once; the kernel above unpacks them again for every 64 rows.

Where the outputs alone would leave processors idle, K is split between programs; a second kernel adds their float32
sums [S, M, N]. As its launch takes as long as reading some megabytes, a matrix-vector product splits K between the
warps of a program first.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

PROCESSORS = 132  # of an H100 or H200; not asked of the device, so that every GPU adds in the same order
WARPS = 32  # per processor, for which the matrix-vector kernels' registers suffice
MATVEC_ROWS = {torch.float32: 16, torch.bfloat16: 2, torch.float16: 2}
MATMUL_ROWS = 128
DENSE_WEIGHTS = 1 << 26  # dequantized at a time: 128 MB in 16 bits, enough for a layer of an 8B model
SIXTEENS = 0x41804180  # bfloat16 16.0, twice. An argument: an instruction has room for one constant, the mask
LOW = tl.constexpr(2.0**-16)  # of two bfloat16 read as one float32, what the low one counts relative to the high one
TABLE_BYTES = 64


@triton.jit
def _scale_and_zero(word, OFFSET: tl.constexpr):
    """Of the two bfloat16 in a word, for codes that are OFFSET too large."""
    scale = (word << 16).to(tl.float32, bitcast=True)
    return scale, (word & -65536).to(tl.float32, bitcast=True) - OFFSET * scale


@triton.jit
def _entry(table, at):
    """The entry `at` bytes into the table. The table is aligned, so its address needs no 64-bit addition. It stays in
    the L1 cache, where lanes that read one line do not wait for each other; to select would take 15 instructions."""
    return tl.load((table.to(tl.int64) | at.to(tl.int64)).to(tl.pointer_type(tl.float32)))


@triton.jit(do_not_specialize=["M", "groups"])  # what changes with the rows of x compiles once
def _matvec4(
    x, codes, scales, table, out, M, N, K, groups, sixteens,
    ROWS: tl.constexpr, B: tl.constexpr, G: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """A block of B outputs. A warp takes a whole group, 128 bytes at a time, of which a lane takes one word: so a lane
    meets G / LANES input features with the same eight rows and scales. All tiles of the loop lie alike on the lanes, or
    Triton would give them different layouts and move them through shared memory."""
    W: tl.constexpr = B // 8  # words per input feature
    LANES: tl.constexpr = 32 // W
    block = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    p = tl.arange(0, 4)[:, None, None, None, None]
    row = tl.program_id(2) * ROWS + tl.arange(0, ROWS)[None, :, None, None, None]
    warp = tl.arange(0, WARPS)[None, None, :, None, None]
    lane = tl.arange(0, LANES)[None, None, None, :, None]
    word = tl.arange(0, W)[None, None, None, None, :]
    codes += block * K * W
    scales += block * B + (p % 2) * (B // 2) + word * 4 + p // 2
    total_low = tl.zeros([4, ROWS, WARPS, LANES, W], tl.float32)
    total_high = tl.zeros([4, ROWS, WARPS, LANES, W], tl.float32)
    for start in range(split * WARPS, groups, tl.num_programs(1) * WARPS):
        group = start + warp
        live = group < groups
        k = group * G + lane
        low = tl.zeros([4, ROWS, WARPS, LANES, W], tl.float32)
        high = tl.zeros([4, ROWS, WARPS, LANES, W], tl.float32)
        x_sum = tl.zeros([1, ROWS, WARPS, LANES, 1], tl.float32)
        for step in tl.static_range(0, G, LANES):
            w = tl.load(codes + (k + step) * W + word, mask=live, other=0).to(tl.uint32, bitcast=True) >> (4 * p)
            x_k = tl.load(x + row * K + k + step, mask=live & (row < M), other=0).to(tl.float32)
            if table is not None:
                low += _entry(table, (w << 2) & 60) * x_k
                high += _entry(table, (w >> 14) & 60) * x_k
            else:
                # Two half-bytes become bfloat16 16 + q. As a float32, the pair is the high one plus LOW times the low.
                pair = (w << 3) & 0x00780078 | sixteens
                low += (pair << 16).to(tl.float32, bitcast=True) * x_k
                high += pair.to(tl.float32, bitcast=True) * x_k
                x_sum += x_k
        at = tl.broadcast_to(scales + group * N, [4, 1, WARPS, LANES, W])
        scale_low = tl.load(at, mask=live, other=0)
        scale_high = tl.load(at + 2, mask=live, other=0)
        if table is not None:
            total_low += low * scale_low
            total_high += high * scale_high
        else:
            scale, zero = _scale_and_zero(scale_low, 24.0)
            total_low += low * scale
            total_low += x_sum * zero
            scale, zero = _scale_and_zero(scale_high, 24.0 + 0x4100 * 2.0**-19)
            total_high += (high - low * LOW) * scale
            total_high += x_sum * zero
    p = tl.arange(0, 4)[:, None, None]
    row = tl.program_id(2) * ROWS + tl.arange(0, ROWS)[None, :, None]
    word = tl.arange(0, W)[None, None, :]
    out += (split * M + row) * N + block * B + (p % 2) * (B // 2) + word * 4 + p // 2
    y_low = tl.sum(tl.reshape(total_low, [4, ROWS, WARPS * LANES, W]), axis=2)
    y_high = tl.sum(tl.reshape(total_high, [4, ROWS, WARPS * LANES, W]), axis=2)
    tl.store(out, y_low.to(out.dtype.element_ty), mask=row < M)
    tl.store(out + 2, y_high.to(out.dtype.element_ty), mask=row < M)


@triton.jit(do_not_specialize=["M"])
def _matvec8(x, codes, scales, out, M, N, K, ROWS: tl.constexpr, OUTPUTS: tl.constexpr, WARPS: tl.constexpr):
    """OUTPUTS outputs. The warps split K, and a lane takes 8 input features at a time: then a tile of activations has
    the layout of a tile of codes, and its conversion to float32 is shared by all outputs."""
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None, None, None, None]
    n = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)[None, :, None, None, None]
    lane = tl.arange(0, WARPS)[None, None, :, None, None] * 32 + tl.arange(0, 32)[None, None, None, :, None]
    k = lane * 8 + tl.arange(0, 8)[None, None, None, None, :]
    total = tl.zeros([ROWS, OUTPUTS, WARPS, 32], tl.float32)
    for start in range(0, K, WARPS * 32 * 8):
        live = start + k < K
        w = tl.load(codes + n.to(tl.int64) * K + start + k, mask=live & (n < N), other=0)
        x_k = tl.load(x + row * K + start + k, mask=live & (row < M), other=0).to(tl.float32)
        # The bits of 384.0 plus the code, in units of 2^-15. Conversion instructions run at a fraction of the rate.
        w = (w.to(tl.int32) * 32768 + 0x43C00000).to(tl.float32, bitcast=True) - 384
        total += tl.sum(w * x_k, axis=4)
    y = tl.sum(tl.reshape(total, [ROWS, OUTPUTS, WARPS * 32]), axis=2)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None]
    n = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)[None, :]
    y *= tl.load(scales + n, mask=n < N, other=0).to(tl.float32)
    tl.store(out + row * N + n, y.to(out.dtype.element_ty), mask=(row < M) & (n < N))


@triton.jit(do_not_specialize=["M", "groups", "blocks"])
def _matmul4(
    x, codes, scales, table, out, M, N, K, groups, blocks,
    ROWS: tl.constexpr, BLOCKS: tl.constexpr, B: tl.constexpr, G: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """ROWS rows by the outputs of BLOCKS blocks, a group per step: the low and the high halves are two products."""
    H: tl.constexpr = B // 2
    dtype: tl.constexpr = x.dtype.element_ty
    # 128 + q in bfloat16, which needs no shift; 16 + q in float16, for 1024 + q would cost eight bits of the sum.
    BITS: tl.constexpr = 0x4C00 if dtype == tl.float16 else 0x4300
    SHIFT: tl.constexpr = 6 if dtype == tl.float16 else 0
    OFFSET: tl.constexpr = 24.0 if dtype == tl.float16 else 136.0
    split = tl.program_id(1)
    row = tl.program_id(2) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCKS * H)
    block = tl.program_id(0) * BLOCKS + column // H
    readable = tl.minimum(block, blocks - 1)
    k = tl.arange(0, G)
    x += row * K + k[None, :]
    codes += (readable[None, :].to(tl.int64) * K + k[:, None]) * H + (column % H)[None, :]
    scales += readable * B + column % H
    low = tl.zeros([ROWS, BLOCKS * H], tl.float32)
    high = tl.zeros([ROWS, BLOCKS * H], tl.float32)
    for group in tl.range(split, groups, tl.num_programs(1), num_stages=STAGES):
        x_k = tl.load(x + group * G, mask=row < M, other=0)
        w = tl.load(codes + group * G * H)
        scale_low = tl.load(scales + group * N)
        scale_high = tl.load(scales + group * N + H)
        if table is not None:
            low += tl.dot(x_k, _entry(table, (w & 15) << 2).to(dtype)) * scale_low[None, :]
            high += tl.dot(x_k, _entry(table, (w >> 4) << 2).to(dtype)) * scale_high[None, :]
        else:
            q_low = ((w & 15).to(tl.int16) << SHIFT | BITS).to(dtype, bitcast=True)
            q_high = ((w >> 4).to(tl.int16) << SHIFT | BITS).to(dtype, bitcast=True)
            x_sum = tl.sum(x_k.to(tl.float32), axis=1)[:, None]
            scale, zero = _scale_and_zero(scale_low, OFFSET)
            low += tl.dot(x_k, q_low) * scale[None, :]
            low += x_sum * zero[None, :]
            scale, zero = _scale_and_zero(scale_high, OFFSET)
            high += tl.dot(x_k, q_high) * scale[None, :]
            high += x_sum * zero[None, :]
    mask = (row < M) & (block < blocks)[None, :]
    out += (split * M + row) * N + (block * B + column % H)[None, :]
    tl.store(out, low.to(out.dtype.element_ty), mask=mask)
    tl.store(out + H, high.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M"])
def _matmul8(
    x, codes, scales, out, M, N, K,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, STEP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """ROWS rows by OUTPUTS outputs; int8 codes are exact in both 16-bit types."""
    dtype: tl.constexpr = x.dtype.element_ty
    split = tl.program_id(1)
    row = tl.program_id(2) * ROWS + tl.arange(0, ROWS)[:, None]
    n = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)[None, :]
    k = tl.arange(0, STEP)
    x += row * K + k[None, :]
    codes += n.to(tl.int64) * K + k[:, None]
    y = tl.zeros([ROWS, OUTPUTS], tl.float32)
    for start in tl.range(split * STEP, K, tl.num_programs(1) * STEP, num_stages=STAGES):
        x_k = tl.load(x + start, mask=(row < M) & (start + k < K)[None, :], other=0)
        w = tl.load(codes + start, mask=(n < N) & (start + k < K)[:, None], other=0)
        y = tl.dot(x_k, w.to(tl.float32).to(dtype), y)  # compiled as one conversion; the interpreter knows no other way
    y *= tl.load(scales + n, mask=n < N, other=0).to(tl.float32)
    tl.store(out + (split * M + row) * N + n, y.to(out.dtype.element_ty), mask=(row < M) & (n < N))


@triton.jit
def _add(parts, out, size, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """parts [SPLITS, size] to out [size], in order."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    y = tl.load(parts + at, mask=at < size)
    for split in tl.static_range(1, SPLITS):
        y += tl.load(parts + split * size + at, mask=at < size)
    tl.store(out + at, y.to(out.dtype.element_ty), mask=at < size)


@triton.jit
def _dequantize4(codes, scales, table, out, N, K, B: tl.constexpr, G: tl.constexpr, FEATURES: tl.constexpr):
    """FEATURES input features of a block of outputs. N is that of the scales, which may be more than the codes'."""
    H: tl.constexpr = B // 2
    block = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES)[:, None]
    i = tl.arange(0, H)[None, :]
    w = tl.load(codes + (block * K + k) * H + i, mask=k < K, other=0)
    for half in tl.static_range(2):
        q = (w >> (4 * half)) & 15
        row = block * B + half * H + i
        scale = tl.load(scales + (k // G) * N + row, mask=k < K, other=0)
        if table is not None:
            y = tl.load(table + q) * scale
        else:
            scale, zero = _scale_and_zero(scale, 8.0)
            y = q.to(tl.float32) * scale + zero
        tl.store(out + row * K + k, y.to(out.dtype.element_ty), mask=k < K)


def linear_int4(x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    """x [M, K] times the transpose of int4 weights: [M, N] in the dtype of x. Scales are bfloat16 [K / G, N, 2], a
    scale and a zero: w = (code - 8) * scale + zero."""
    return _linear4(x, codes, _words(scales), None)


def linear_table(x: Tensor, codes: Tensor, absmax: Tensor, table: Tensor) -> Tensor:
    """x [M, K] times the transpose of weights from a table: [M, N] in the dtype of x. w = table[code] * absmax, with
    float32 absmax [K / G, N] and table [16]. From 3 rows of 16 bits on, table[code] is rounded to the dtype of x, and
    beyond MATMUL_ROWS w is, as in bitsandbytes."""
    return _linear4(x, codes, absmax, _aligned(table))


def linear_int8(x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    """x [M, K] times the transpose of int8 codes [N, K] with bfloat16 scales [N]: [M, N] in the dtype of x. Fast where
    K is a multiple of 16."""
    N, K = codes.shape
    x = _activations(x, K)
    M, out = len(x), x.new_empty(len(x), N)
    if not M:
        return out
    with torch.cuda.device_of(x):
        if len(x) <= MATVEC_ROWS[x.dtype]:
            rows, outputs = min(M, 2), min(4, _power_of_2(N // 1024))  # 4,096 warps at 4,096 outputs
            grid: tuple[int, ...] = (triton.cdiv(N, outputs), triton.cdiv(M, rows))
            _matvec8[grid](x, codes, scales, out, M, N, K, rows, outputs, 4, num_warps=4)
        elif M <= MATMUL_ROWS and x.dtype is not torch.float32 and _tensor_cores(x.device):
            rows, outputs, step, warps = matmul_tile8(M)
            tiles = triton.cdiv(N, outputs), triton.cdiv(M, rows)
            parts = _parts(out, matmul_splits(tiles[0] * tiles[1], triton.cdiv(K, step)))
            grid = (tiles[0], len(parts), tiles[1])
            _matmul8[grid](x, codes, scales, parts, M, N, K, rows, outputs, step, 3, num_warps=warps)
            _add_parts(parts, out)
        else:
            step = max(1, DENSE_WEIGHTS // K)
            for start in range(0, N, step):
                n = slice(start, start + step)
                torch.mm(x, dequantize_int8(codes[n], scales[n], x.dtype).T, out=out[:, n])
    return out


def dequantize_int4(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The weights [N, K], computed in float32 and rounded once."""
    return _dequantized(codes, _words(scales), None, dtype)


def dequantize_table(codes: Tensor, absmax: Tensor, table: Tensor, dtype: torch.dtype) -> Tensor:
    """The weights [N, K], computed in float32 and rounded once."""
    return _dequantized(codes, absmax, _aligned(table), dtype)


def dequantize_int8(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The weights [N, K], computed in float32 and rounded once: PyTorch has a kernel for that."""
    return torch.mul(codes, scales.float()[:, None], out=torch.empty_like(codes, dtype=dtype))


def matvec_shape(blocks: int, block_bytes: int, groups: int, rows: int, wide: bool = False) -> tuple[int, int]:
    """Warps per program, and programs per block of outputs that split K.

    4,096 outputs are 128 blocks of 32: a program of 32 warps for nearly every processor. Where there are fewer than two
    blocks for three processors, K is split, but not below 64 KB, which are read before a second kernel would start.
    `wide`: groups of 64 and more entries of a table, which 64 registers do not hold.
    """
    most = 32 if rows == 1 and not wide else 16  # two rows take twice the registers
    warps = min(most, _power_of_2(groups), max(4, _power_of_2(WARPS * PROCESSORS // blocks)))
    return warps, 1 if 3 * blocks > 2 * PROCESSORS else max(1, min(PROCESSORS // blocks, block_bytes // 65536))


def matmul_tile4(M: int, wide: bool) -> tuple[int, int, int]:
    """Rows, bytes of codes per input feature, and warps of a program. Entries of a table pass through shared memory, of
    which most GPUs have 99 KB: `wide` groups of them leave room for half the bytes."""
    rows, columns, warps = (16, 128, 4) if M <= 16 else (32, 128, 8) if M <= 32 else (64, 64, 4)
    return rows, columns // 2 if wide else columns, warps


def matmul_tile8(M: int) -> tuple[int, int, int, int]:
    """Rows, outputs, input features per step, and warps of a program."""
    return (16, 64, 128, 4) if M <= 16 else (32, 64, 128, 4) if M <= 32 else (64, 128, 64, 8)


def matmul_splits(tiles: int, steps: int) -> int:
    """Programs per tile of the result that split K: two for every processor, but no more than leave each four steps,
    for the pipeline to pay, and than eight, for their sums to stay small beside the weights."""
    return max(1, min(2 * PROCESSORS // tiles, steps // 4, 8))


def _linear4(x: Tensor, codes: Tensor, scales: Tensor, table: Tensor | None) -> Tensor:
    blocks, K, H = codes.shape
    B, groups, N = 2 * H, len(scales), blocks * 2 * H
    x, G = _activations(x, K), K // groups
    M, out = len(x), x.new_empty(len(x), N)
    if not M:
        return out
    with torch.cuda.device_of(x):
        if len(x) <= MATVEC_ROWS[x.dtype]:
            rows = min(M, 2)
            warps, splits = matvec_shape(blocks, K * H, groups, rows, wide=table is not None and G >= 64)
            parts, words = _parts(out, splits), codes.view(torch.int32)
            _matvec4[(blocks, splits, triton.cdiv(M, rows))](
                x, words, scales, table, parts, M, N, K, groups, SIXTEENS, rows, B, G, warps, num_warps=warps
            )
            _add_parts(parts, out)
        elif M <= MATMUL_ROWS and x.dtype is not torch.float32 and _tensor_cores(x.device):
            rows, columns, warps = matmul_tile4(M, wide=table is not None and G == 128)
            tiles = triton.cdiv(blocks * H, columns), triton.cdiv(M, rows)
            parts = _parts(out, matmul_splits(tiles[0] * tiles[1], groups))
            _matmul4[(tiles[0], len(parts), tiles[1])](
                x, codes, scales, table, parts, M, N, K, groups, blocks, rows, columns // H, B, G, 3, num_warps=warps
            )
            _add_parts(parts, out)
        else:
            step = max(1, DENSE_WEIGHTS // (B * K))
            for start in range(0, blocks, step):
                n = slice(start * B, (start + step) * B)
                dense = _dequantized(codes[start : start + step], scales[:, n], table, x.dtype)
                torch.mm(x, dense.T, out=out[:, n])
    return out


def _dequantized(codes: Tensor, scales: Tensor, table: Tensor | None, dtype: torch.dtype) -> Tensor:
    blocks, K, H = codes.shape
    out = torch.empty(blocks * 2 * H, K, dtype=dtype, device=codes.device)
    features = 4096 // H
    with torch.cuda.device_of(codes):
        _dequantize4[(blocks, triton.cdiv(K, features))](
            codes, scales, table, out, scales.stride(0), K, 2 * H, K // len(scales), features, num_warps=4
        )
    return out


def _parts(out: Tensor, splits: int) -> Tensor:
    """Where the programs that split K leave their sums, [S, M, N]: the result itself if it is not split."""
    return out[None] if splits == 1 else torch.empty(splits, *out.shape, dtype=torch.float32, device=out.device)


def _add_parts(parts: Tensor, out: Tensor) -> None:
    if len(parts) > 1:
        _add[(triton.cdiv(out.numel(), 512),)](parts, out, out.numel(), len(parts), 512, num_warps=4)


@cache
def _tensor_cores(device: torch.device) -> bool:
    """Whether Triton has products for them: on older GPUs it multiplies number by number, and spills registers."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)


def _activations(x: Tensor, K: int) -> Tensor:
    """The kernels trust what they are given."""
    if x.dtype not in MATVEC_ROWS:
        raise TypeError(f"activations are {x.dtype}; the kernels take float32, bfloat16 or float16")
    if x.dim() != 2 or x.shape[1] != K:
        raise RuntimeError(f"activations of shape {tuple(x.shape)} meet weights with {K} features")
    return x.contiguous()


def _words(scales: Tensor) -> Tensor:
    """A bfloat16 scale and zero as one int32, [K / G, N]."""
    return scales.contiguous().view(torch.int32).squeeze(-1)


def _aligned(table: Tensor) -> Tensor:
    table = table.contiguous()
    return table.clone() if table.data_ptr() % TABLE_BYTES else table


def _power_of_2(n: int) -> int:
    """The largest that is not more than n; 1 where there is none."""
    return 1 << max(n, 1).bit_length() - 1
