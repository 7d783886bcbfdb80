"""Triton kernels that may not start: on GPUs that are too old or have too little room, and on machines that cannot
compile them (no triton, no C compiler, no headers of Python). What cannot start is tried once; PyTorch does it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable
from functools import cache
from traceback import walk_tb
from typing import TypeVar

import torch

OLDEST = (8, 0)  # compute capability
NOT_NVIDIA = "the kernels are for NVIDIA GPUs"

Result = TypeVar("Result")  # tensors
_refused: dict[tuple[Hashable, torch.device], str] = {}


@cache
def unsuitable(index: int | None = None) -> str:
    """Why a GPU, by default the current one, has no use for the kernels; empty if it has."""
    if torch.version.hip is not None:
        return NOT_NVIDIA
    if torch.cuda.is_available() and torch.cuda.get_device_capability(index) < OLDEST:
        return "the kernels need a GPU of compute capability 8.0 or more"
    return ""


def launch(kernel: Hashable, device: torch.device, run: Callable[[], Result]) -> Result | str:
    """What `run` computes with a Triton kernel on this device, or why it cannot start there. `kernel`: what decides
    about that, such as its name, dtype and head sizes. Errors that are not Triton's are raised, as is a lack of memory
    for the tensors, and whatever ends a capture, which says nothing about the kernel."""
    if torch.version.hip is not None:
        return NOT_NVIDIA
    if (reason := _refused.get((kernel, device))) is not None:
        return reason
    try:
        return run()
    except Exception as error:
        if isinstance(error, torch.OutOfMemoryError) or _captures(device) or not _of_triton(error):
            raise
        lines = str(error).strip().splitlines()
        reason = f"{type(error).__name__}: {lines[0] if lines else ''}"
    _refused[kernel, device] = reason
    warnings.warn(f"a Triton kernel cannot start on {device}, so PyTorch computes instead ({reason})", stacklevel=2)
    return reason


def _captures(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _of_triton(error: Exception) -> bool:
    """Whether it was raised while Triton was imported, compiled or started. What is interpreted raises Triton's own."""
    if isinstance(error, ImportError):
        return True
    from triton.errors import TritonError  # type: ignore[import-not-found, import-untyped, unused-ignore]

    if isinstance(error, TritonError):
        return True
    frames = [frame.f_globals.get("__name__", "") for frame, _ in walk_tb(error.__traceback__)]
    return any(name.startswith("triton.") and not name.startswith("triton.runtime.interp") for name in frames)
