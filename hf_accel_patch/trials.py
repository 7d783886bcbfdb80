"""What the demo and bench begin with: a device that is there, room for the model, and a warm start."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import pipeline

from hf_accel_patch import patch
from hf_accel_patch.errors import HfAccelError
from hf_accel_patch.measure import token_ms
from hf_accel_patch.planning.machine import available_bytes
from hf_accel_patch.shapes import SHAPES

BUNDLED = Path(__file__).parent / "models" / "code-llama-8m"
WARMING_TOKENS = 128  # of a prompt: enough for the kernels of a prefill


def begin(device: str, threads: int | None) -> torch.device:
    """The device to measure on, with so many threads of PyTorch; None: as many as there are. Raises ValueError for a
    CUDA device where there is none."""
    found = torch.device(device)
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {device!r}: PyTorch finds no CUDA device here")
    if threads:
        torch.set_num_threads(threads)
    return found


def refuse_too_large(name: str, needed: int, device: torch.device) -> None:
    """Raise HfAccelError for a model, or the shape of one, that needs more bytes than the device has left."""
    available = available_bytes(device)
    if available is not None and needed > available:
        hint = f"take a smaller shape: {', '.join(SHAPES)}" if name in SHAPES else "take a smaller model"
        raise HfAccelError(
            f"{name} needs {needed / 1e9:.1f} GB of memory, {available / 1e9:.1f} GB are available", hint
        )


def warm_up(device: torch.device, quantize: str | None) -> None:
    """Load and compile what PyTorch, transformers and the passes load once, so that it counts for neither side."""
    pipe = pipeline("text-generation", model=str(BUNDLED), dtype=torch.bfloat16, device=device)
    ids = torch.arange(WARMING_TOKENS).unsqueeze(0).to(device)
    for number in range(2):
        if number:
            patch(pipe, quantize=quantize)
        token_ms(pipe.model, ids, 2)
        pipe("def main():", max_new_tokens=2, do_sample=False)
