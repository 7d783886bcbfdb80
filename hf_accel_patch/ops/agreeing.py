"""Whether two ways to the same logits differ by rounding only."""

from __future__ import annotations

import torch
from torch import Tensor

LEAST_TOLERANCE = 1e-2  # of the spread of the logits


def agree(found: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    """Whether logits differ by rounding only, in what a model in this dtype computes. Waits for the device."""
    found, expected = found.float(), expected.float()
    spread = (expected - expected.mean(-1, keepdim=True)).norm()
    most = max(LEAST_TOLERANCE, torch.finfo(dtype).eps ** 0.5)
    return found.shape == expected.shape and bool((found - expected).norm() <= most * spread)
