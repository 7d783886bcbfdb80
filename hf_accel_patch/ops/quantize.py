"""Weight-only quantization of a matrix [N, K]: N output features, K input features.

int8: one scale per row, w = q * scale. int4: asymmetric, per row and group of G input features,
w = (q - 8) * scale + zero with q in 0..15. Scales and zeros are bfloat16, and the codes are chosen for the rounded
ones. nf4 (QLoRA, arXiv 2305.14314) and fp4: w = table[q] * absmax, absmax in float32, as bitsandbytes has them.
"""

from __future__ import annotations

import torch
from torch import Tensor

REFINEMENTS = 3  # least-squares fits of scale and zero to the codes; a fourth changes the error by less than 1 %
SHRINK = 0.95  # of the range of a group at the start: clipping its ends a little costs less than a coarser grid
NF4 = (  # quantiles of the normal distribution
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
FP4_POSITIVE = (0.0, 0.0052083334885537624, 2 / 3, 1.0, 1 / 3, 0.5, 1 / 6, 0.25)  # codes 8 to 15 are the negatives
FP4 = (*FP4_POSITIVE, *(-value for value in FP4_POSITIVE))
TABLES = {
    "nf4": torch.tensor(NF4, dtype=torch.float32, device="cpu"),
    "fp4": torch.tensor(FP4, dtype=torch.float32, device="cpu"),
}
LAUNCH = 32  # times as many on a GPU: 64 MB for a float32 temporary
BLOCK_ELEMENTS = 1 << 19  # weights quantized at a time: a few float32 temporaries of 2 MB, which stay in the cache


def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes int8 [N, K] and scales bfloat16 [N], rounding to nearest."""
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scales = torch.empty(len(weight), dtype=torch.bfloat16, device=weight.device)
    for rows in row_blocks(weight, 1):
        block = weight[rows].float()
        scale = (block.abs().amax(1) / 127).clamp_min(1e-20).bfloat16()
        scales[rows] = scale
        codes[rows] = torch.round(block / scale[:, None].float()).clamp_(-127, 127).to(torch.int8)
    return codes, scales


def dequantize_int8(codes: Tensor, scales: Tensor) -> Tensor:
    """The weights [N, K] in float32 (float64 for float64 scales)."""
    return codes.to(torch.promote_types(scales.dtype, torch.float32)) * scales[:, None]


def quantize_int4(
    weight: Tensor, group_size: int, refinements: int | None = None, importance: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes uint8 [N, K] in 0..15, scales and zeros bfloat16 [N, K / G].

    Starts from the slightly shrunk range of each group; then scale and zero are fitted to the codes by least squares
    and the codes chosen anew, which lowers the squared error of rounding to nearest by about a tenth without data.
    `importance` [K], not negative: how much the squared error of each input feature counts.
    """
    N, K = weight.shape
    w = weight.float().reshape(N, K // group_size, group_size)
    shares = w.new_full((group_size,), 1 / group_size) if importance is None else _shares(importance, w)
    low, high = torch.aminmax(w, dim=-1)
    middle, half = (high + low) / 2, (high - low) / 2 * SHRINK
    scale, start = (2 * half / 15).clamp_min(1e-20), middle - half  # start: the weight of code 0
    mean = torch.linalg.vecdot(w, shares)
    for _ in range(REFINEMENTS if refinements is None else refinements):
        q = _codes(w, scale, start)
        shared = q * shares
        q_mean = shared.sum(-1)
        covariance = torch.linalg.vecdot(shared, w) - q_mean * mean
        variance = torch.linalg.vecdot(shared, q) - q_mean * q_mean
        fitted = torch.where(variance > 1e-6, covariance / variance.clamp_min(1e-6), scale)
        scale = torch.where(fitted > 0, fitted, scale)
        start = mean - scale * q_mean
    scale = scale.bfloat16()
    zero = (start + 8 * scale.float()).bfloat16()
    codes = _codes(w, scale.float(), zero.float() - 8 * scale.float())
    return codes.to(torch.uint8).view(N, K), scale, zero


def _shares(importance: Tensor, w: Tensor) -> Tensor:
    """[K / G, G], of sum 1 in each group; alike where none counts."""
    p = importance.to(w).view(w.shape[1:])
    total = p.sum(-1, keepdim=True)
    return torch.where(total > 0, p / total.clamp_min(1e-38), 1 / w.shape[-1])


def dequantize_int4(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """The weights [N, K] in float32 (float64 for float64 scales) from codes [N, K], scales and zeros [N, K / G]."""
    N, K = codes.shape
    q = codes.view(N, scale.shape[1], -1).to(torch.promote_types(scale.dtype, torch.float32)) - 8
    return (q * scale[..., None] + zero[..., None]).view(N, K)


def quantize_table(weight: Tensor, group_size: int, table: Tensor) -> tuple[Tensor, Tensor]:
    """Codes uint8 [N, K] of the nearest of the 16 values in `table`, and absmax float32 [N, K / G]."""
    N, K = weight.shape
    w = weight.float().contiguous().view(N, K // group_size, group_size)
    absmax = w.abs().amax(-1)
    values, order = table.to(w.device).sort()
    nearest = torch.bucketize(w / absmax.clamp_min(1e-38)[..., None], (values[1:] + values[:-1]) / 2)
    return order[nearest].to(torch.uint8).view(N, K), absmax


def dequantize_table(codes: Tensor, absmax: Tensor, table: Tensor) -> Tensor:
    """The weights [N, K], in the dtype of absmax [N, K / G]."""
    N, K = codes.shape
    values = table.to(absmax)[codes.long()].view(N, absmax.shape[1], -1)
    return (values * absmax[..., None]).view(N, K)


def row_blocks(weight: Tensor, multiple: int) -> list[slice]:
    """Slices over the rows, each a multiple of `multiple` rows and about BLOCK_ELEMENTS weights; on a GPU, where every
    operation is a launch, of more."""
    N, K = weight.shape
    elements = BLOCK_ELEMENTS * (LAUNCH if weight.is_cuda else 1)
    rows = max(1, elements // max(K, 1) // multiple) * multiple
    return [slice(start, min(start + rows, N)) for start in range(0, N, rows)]


def _codes(w: Tensor, scale: Tensor, start: Tensor) -> Tensor:
    inverse = scale.reciprocal()
    return torch.addcmul((-start * inverse)[..., None], w, inverse[..., None]).round_().clamp_(0, 15)
