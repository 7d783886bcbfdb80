# mypy: disable-error-code="import-not-found, import-untyped, no-untyped-call, untyped-decorator"
"""Kernels whose text is written at run time (fusing/writing.py). Needs triton; imported only when used."""

from __future__ import annotations

import hashlib
import linecache
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_accel_patch.fusing.writing import Launch


def launch(step: Launch, tensors: Sequence[Tensor]) -> None:
    """On the current stream. `tensors`: whose memory the kernel is given."""
    given = [each.view(torch.uint8) if each.dtype is torch.bool else each for each in tensors]
    numbers = (*step.strides, *step.sizes)
    with torch.cuda.device_of(given[0]):
        # products and sums are rounded one after the other, as PyTorch's operators do
        compiled(step.source, len(step.sizes))[(step.programs,)](
            *given, *numbers, num_warps=step.warps, enable_fp_fusion=False
        )


@cache
def compiled(source: str, sizes: int) -> Any:
    """The kernel of this text, which Triton reads where Python keeps the lines of a file. It is the same for all sizes,
    but not for all strides, which tell how memory may be read."""
    name = f"<fused {hashlib.sha256(source.encode()).hexdigest()[:16]}>"
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    scope: dict[str, Any] = {"tl": tl, "__name__": __name__}
    exec(compile(source, name, "exec"), scope)
    return triton.jit(scope["fused"], do_not_specialize=[f"n{i}" for i in range(sizes)])
