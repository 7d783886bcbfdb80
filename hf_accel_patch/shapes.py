"""Models of well-known shapes with random weights: they are as fast and as large as the real ones, and say nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.initialization import no_init_weights

SHAPES: dict[str, dict[str, Any]] = json.loads(
    (Path(__file__).parent / "models" / "shapes.json").read_text(encoding="utf-8")
)


def empty_model(shape: str) -> Any:
    """A model of this shape in bfloat16 on the meta device, for its size and for plans."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**SHAPES[shape]), dtype=torch.bfloat16)


@torch.no_grad()
def random_model(shape: str) -> Any:
    """A model of this shape in bfloat16, the same at every call. Its weights repeat one block of normal numbers, which
    takes a tenth of the time of drawing them all; norms are ones and biases zeros."""
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**SHAPES[shape]), dtype=torch.bfloat16).eval()
    model.tie_weights()
    model.generation_config.pad_token_id = 0
    block = torch.randn(2**20, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            for part in parameter.view(-1).split(len(block)):
                part.copy_(block[: len(part)])
        elif name.endswith("bias"):
            parameter.zero_()
    return model
