"""How quantized weights lie in memory, for PyTorch's kernels, the compiled ones and those of a GPU.

int8 codes are [N, K], with scales bfloat16 [N]. 4-bit codes are uint8 [N' / block, K, block / 2], N' being N rounded up
to whole blocks of rows: the low half-byte is a row of the block's first half, the high half-byte the same row of its
second half. int4 has scales and zeros bfloat16 [K / G, N', 2], nf4 and fp4 have scales float32 [K / G, N'].
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_accel_patch.ops.quantize import TABLES, quantize_int4, quantize_int8, quantize_table, row_blocks

INT8 = ("int8", "llm.int8")  # schemes with codes in 8 bits
HEAD_REFINEMENTS = 6
CUDA_BLOCK = 2  # rows per block of 4-bit codes: codes of a row lie one after the other, as tensor cores read them
BLOCKS = (CUDA_BLOCK, 32, 64)
REBLOCKED = 1 << 22  # codes that are laid out anew at a time


def pack_int4(weight: Tensor, group_size: int, block: int, refinements: int | None = None) -> tuple[Tensor, Tensor]:
    """Quantize [N, K] to int4, row block by row block: codes, and scales and zeros."""

    def scaled(rows: Tensor) -> tuple[Tensor, Tensor]:
        codes, scale, zero = quantize_int4(rows, group_size, refinements)
        return codes, torch.stack((scale, zero), -1)

    N, K = weight.shape
    scales = torch.empty(K // group_size, -(-N // block) * block, 2, dtype=torch.bfloat16, device=weight.device)
    return _packed(weight, block, scaled, scales), scales


def pack_table(weight: Tensor, group_size: int, block: int, scheme: str) -> tuple[Tensor, Tensor]:
    """Quantize [N, K] to nf4 or fp4: codes and scales."""
    N, K = weight.shape
    shape = (K // group_size, -(-N // block) * block)
    scales = torch.empty(shape, dtype=torch.float32, device=weight.device)
    return _packed(weight, block, lambda rows: quantize_table(rows, group_size, TABLES[scheme]), scales), scales


def pack(weight: Tensor, scheme: str, group_size: int, block: int, head: bool = False) -> tuple[Tensor, Tensor]:
    """Quantize [N, K], or experts [E, N, K], as a module holds it: codes, and scales as bit patterns.

    int8: codes [1, N, K] or [1, E, N, K], scales [N] or [E, N]; in 4 bits as above, experts first. `head`: rounding
    errors go straight into the logits, so more work is spent on them.
    """
    if weight.ndim == 3:
        parts = [pack(each, scheme, group_size, block) for each in weight]
        codes, scales = (torch.stack(each) for each in zip(*parts, strict=True))
        return (codes.transpose(0, 1) if scheme in INT8 else codes), scales
    if scheme in INT8:
        codes, scales = quantize_int8(weight)
        return codes[None], scales.view(torch.int16)
    if scheme in TABLES:
        codes, scales = pack_table(weight, group_size, block, scheme)
        return codes, scales.view(torch.int32)
    codes, scales = pack_int4(weight, group_size, block, HEAD_REFINEMENTS if head else None)
    return codes, scales.view(torch.int16)


def lay_out(codes: Tensor, scale: Tensor, zero: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """int4 codes uint8 [N, K], scales and zeros [N, K / G] as a module holds them."""
    short = -len(codes) % block
    pairs = F.pad(torch.stack((scale, zero), -1).to(torch.bfloat16), (0, 0, 0, 0, 0, short))
    return pack_codes(F.pad(codes, (0, 0, 0, short)), block), pairs.transpose(0, 1).contiguous().view(torch.int16)


def packed_bytes(shape: tuple[int, int], scheme: str, group_size: int, block: int) -> int:
    """Of the codes and scales of one weight [N, K]."""
    N, K = shape
    if scheme in INT8:
        return N * K + 2 * N
    padded = -(-N // block) * block
    return padded * K // 2 + 4 * padded * K // group_size


def pack_codes(codes: Tensor, block: int) -> Tensor:
    """uint8 codes [N', K] in 0..15, N' whole blocks, as they lie in memory: [N' / block, K, block / 2]."""
    halves = codes.view(-1, 2, block // 2, codes.shape[1])
    return halves[:, 1].bitwise_left_shift(4).bitwise_or_(halves[:, 0]).transpose(1, 2).contiguous()


def block_on(device: torch.device) -> int:
    """Rows per block of 4-bit codes that suit the kernels there."""
    return CUDA_BLOCK if device.type == "cuda" else int4_block() or 64


def unpack_codes(packed: Tensor) -> Tensor:
    """The inverse of `pack_codes`."""
    blocks, K, half = packed.shape
    return torch.stack((packed & 15, packed >> 4), 1).transpose(2, 3).reshape(blocks * half * 2, K)


def in_blocks(codes: Tensor, N: int, block: int) -> Tensor:
    """The first N rows of codes, with zeros where there are fewer, in blocks of another size, of which N are some."""
    found, K = codes.shape[2] * 2, codes.shape[1]
    step = max(REBLOCKED // (K * found), 1) * max(found, block)
    laid = codes.new_empty(N // block, K, block // 2)
    for start in range(0, N, step):
        stop = min(start + step, N)
        rows = unpack_codes(codes[start // found : -(-stop // found)])
        laid[start // block : stop // block] = pack_codes(first_rows(rows, stop - start, 0), block)
    return laid


def first_rows(x: Tensor, N: int, dim: int) -> Tensor:
    """The first N rows, with zeros where there are fewer."""
    if x.shape[dim] == N:
        return x
    short = x.new_zeros(*x.shape[:dim], max(0, N - x.shape[dim]), *x.shape[dim + 1 :])
    return torch.cat((x.narrow(dim, 0, min(N, x.shape[dim])), short), dim)


def _packed(weight: Tensor, block: int, quantize: Callable[[Tensor], tuple[Tensor, Tensor]], scales: Tensor) -> Tensor:
    """Codes; fills `scales` [K / G, N', ...]."""
    N, K = weight.shape
    packed = torch.empty(-(-N // block), K, block // 2, dtype=torch.uint8, device=weight.device)
    for rows in row_blocks(weight, block):
        codes, scale = quantize(weight[rows])
        if short := -len(codes) % block:
            codes = F.pad(codes, (0, 0, 0, short))
            scale = torch.cat((scale, scale.new_zeros(short, *scale.shape[1:])))
        stop = rows.start + len(codes)
        packed[rows.start // block : stop // block] = pack_codes(codes, block)
        scales[:, rows.start : stop] = scale.transpose(0, 1)
    return packed


def unpack_int4(codes: Tensor, scales: Tensor, table: Tensor | None, start: int, stop: int) -> Tensor:
    """Blocks start..stop as bfloat16 [stop - start, K, block], transposed as the codes lie in memory."""
    bytes_ = codes[start:stop]
    blocks, K, half = bytes_.shape
    groups, block = len(scales), 2 * half
    q = torch.stack((bytes_ & 15, bytes_ >> 4), 2).view(blocks, groups, K // groups, block)
    s = scales[:, start * block : stop * block]
    s = s.view(groups, blocks, block, *s.shape[2:]).transpose(0, 1).unsqueeze(2)
    if table is not None:
        dense = (table.to(codes.device)[q.int()] * s).bfloat16()
    else:
        dense = torch.addcmul(s[..., 1], q.to(torch.bfloat16).sub_(8), s[..., 0])
    return dense.reshape(blocks, K, block)


def rows_int4(codes: Tensor, scales: Tensor, table: Tensor | None, index: Tensor) -> Tensor:
    """Rows `index` [n] of the weights, bfloat16 [n, K]."""
    half = codes.shape[2]
    lane = index % (2 * half)
    bytes_ = codes[index // (2 * half), :, lane % half]
    q = bytes_.bitwise_right_shift((lane // half * 4).to(torch.uint8)[:, None]).bitwise_and_(15)
    q, s = q.view(len(index), len(scales), -1), scales[:, index].transpose(0, 1).unsqueeze(2)
    if table is not None:
        return (_on(table, codes.device)[q.int()] * s).view(len(index), -1).bfloat16()
    return ((q.float() - 8) * s[..., 0] + s[..., 1]).view(len(index), -1).bfloat16()


@cache
def _on(table: Tensor, device: torch.device) -> Tensor:
    """Copied once: a GPU would wait for each copy, and no CUDA graph records one."""
    with torch.inference_mode(False):
        return table.to(device)


def on_cpu(measure: Callable[..., Any]) -> Callable[..., Any]:
    """Cached, and on the CPU even where it is first asked inside `with torch.device("meta")`, as models are built."""

    @wraps(measure)
    def measured(*args: Any) -> Any:
        with torch.device("cpu"), torch.no_grad():
            return measure(*args)

    return cache(measured)


@on_cpu
def int4_block() -> int:
    """Rows per block in the layout of PyTorch's kernel on this processor: 64 with AVX512, 32 with AVX2; 0 where it has
    another layout, and with it no fast kernel."""
    codes = torch.randint(0, 16, (128, 64), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    expected = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    for block in (64, 32):
        if torch.equal(pack_codes(codes.to(torch.uint8), block).view(expected.shape), expected):
            return block
    return 0
