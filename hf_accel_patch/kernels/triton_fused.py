# mypy: disable-error-code="import-not-found, import-untyped, no-untyped-call, untyped-decorator"
"""Kernels whose text is written at run time (ops/fusing/writing.py). Needs triton; imported only when used."""

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


def launch(
    source: str, tensors: Sequence[Tensor], strides: Sequence[int], sizes: Sequence[int], programs: int, warps: int
) -> None:
    """On the current stream: the kernel of this text, with the memory of these tensors."""
    given = [each.view(torch.uint8) if each.dtype is torch.bool else each for each in tensors]
    with torch.cuda.device_of(given[0]):
        # products and sums are rounded one after the other, as PyTorch's operators do
        compiled(source, len(sizes))[(programs,)](*given, *strides, *sizes, num_warps=warps, enable_fp_fusion=False)


@cache
def compiled(source: str, sizes: int) -> Any:
    """The kernel of this text, which Triton reads where Python keeps the lines of a file. It is the same for all sizes,
    but not for all strides, which tell how memory may be read."""
    name = f"<fused {hashlib.sha256(source.encode()).hexdigest()[:16]}>"
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    scope: dict[str, Any] = {"tl": tl, "__name__": __name__}
    exec(compile(source, name, "exec"), scope)
    return triton.jit(scope["fused"], do_not_specialize=[f"n{i}" for i in range(sizes)])
