"""GPTQ (arXiv 2210.17323): int4 codes that round each input feature so as to repair the errors of those before it.

For inputs x of a layer with H = sum of x x^T, it lessens the error of W x rather than that of W. Scales and zeros of
all groups are fixed beforehand, so features can be taken in the order of their importance without being permuted.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_accel_patch.ops.quantize import quantize_int4

DAMPING = 0.01  # of the mean of H's diagonal, added to it
COLUMNS = 128  # between updates of the columns to come


def quantize_gptq(weight: Tensor, hessian: Tensor, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes uint8 [N, K] in 0..15, scales and zeros bfloat16 [N, K / G], as `quantize_int4` gives them.

    `hessian` [K, K] is the sum of x x^T over inputs; features that are always zero are rounded to nearest.
    """
    N, K = weight.shape
    codes, scale, zero = quantize_int4(weight, group_size, importance=hessian.diagonal())
    order = hessian.diagonal().argsort(descending=True)
    inverse = _inverse_root(hessian[order][:, order])
    group = order // group_size
    w, scales = weight.float()[:, order], scale.float()[:, group]
    starts = zero.float()[:, group] - 8 * scales  # the weight of code 0
    out = torch.empty(K, N, dtype=torch.uint8, device=weight.device)
    for first in range(0, K, COLUMNS):
        last = min(first + COLUMNS, K)
        block, errors = w[:, first:last].T.contiguous(), w.new_empty(last - first, N)
        for i, k in enumerate(range(first, last)):
            code = ((block[i] - starts[:, k]) / scales[:, k]).round_().clamp_(0, 15)
            out[k] = code.to(torch.uint8)
            torch.sub(block[i], torch.addcmul(starts[:, k], code, scales[:, k]), out=errors[i])
            errors[i] /= inverse[k, k]
            block[i + 1 :].addr_(inverse[k, k + 1 : last], errors[i], alpha=-1)
        w[:, last:].addmm_(errors.T, inverse[first:last, last:], alpha=-1)
    codes[:, order] = out.T
    return codes, scale, zero


def _inverse_root(hessian: Tensor) -> Tensor:
    """The upper triangular U with U^T U = H^-1, of H damped until it has one."""
    H = hessian.double()
    diagonal = H.diagonal()
    diagonal[diagonal == 0] = 1
    damping = DAMPING * diagonal.mean()
    for _ in range(4):
        diagonal += damping
        root, failed = torch.linalg.cholesky_ex(H)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(root), upper=True)
            if not failed:
                return upper.float()
        damping *= 10
    raise ValueError("the inputs of a layer have no finite second moments")
