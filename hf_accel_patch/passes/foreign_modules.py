"""The modules of bitsandbytes in the place of `nn.Linear`: `Quantize("nf4" | "llm.int8", backend="bitsandbytes")`.

What PEFT and `save_pretrained` know about such models then holds for a model that was loaded as floats.
"""

from __future__ import annotations

import copy
import dataclasses
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AutoHfQuantizer

from hf_accel_patch.errors import UnsupportedModel
from hf_accel_patch.families import View
from hf_accel_patch.journal import Journal
from hf_accel_patch.passes.targets import Target

NAME = "bitsandbytes"
SCHEMES = ("nf4", "llm.int8")
BLOCK = 64  # weights that share a scale in nf4
Skipped = list[tuple[str, str]]


def check_installed() -> None:
    """Raises UnsupportedModel."""
    if find_spec(NAME) is None:
        raise UnsupportedModel(
            'quantize: backend="bitsandbytes" needs bitsandbytes, which is not installed', "pip install bitsandbytes"
        )


def described() -> str:
    return f"{NAME} {version(NAME)}"


def suitable(targets: list[Target], skipped: Skipped, scheme: str) -> tuple[list[Target], Skipped]:
    """What it has modules for, with the bytes that they keep; the others join those that are left alone."""
    kept = []
    for target in targets:
        (name, module), *others = target.modules
        reason = _why_not(module, bool(others), target.role)
        if reason:
            skipped = [*skipped, (name, reason)]
            continue
        N, K = target.weights[0].shape
        size = N * K // 2 + 4 * -(-N * K // BLOCK) if scheme == "nf4" else N * K + 4 * N
        kept.append(dataclasses.replace(target, packed_bytes=size))
    return kept, skipped


def install(model: PreTrainedModel, target: Target, scheme: str, keep: bool, journal: Journal) -> None:
    """Put a module in the place of one `nn.Linear`."""
    name, module = target.modules[0]
    linear: Any = module
    new = _module(linear, scheme)
    journal.remove_parameter(linear, "weight", keep=keep, label=f"{name}.weight")
    parent, _, leaf = name.rpartition(".")
    journal.swap_module(model.get_submodule(parent), leaf, new)


def describe(view: View, scheme: str, journal: Journal) -> None:
    """What transformers and PEFT look for on a model that was loaded quantized."""
    model = view.model
    left = [name for name, module in model.named_modules() if type(module) is nn.Linear or isinstance(module, Conv1D)]
    dtype = model.dtype if scheme == "nf4" else None
    options: Any = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}
    config = BitsAndBytesConfig(
        **(options if scheme == "nf4" else {"load_in_8bit": True}), llm_int8_skip_modules=left or None
    )
    quantizer = AutoHfQuantizer.from_config(config)
    marks = {
        "hf_quantizer": quantizer,
        "is_quantized": True,
        "quantization_method": config.quant_method,
        "is_loaded_in_4bit" if scheme == "nf4" else "is_loaded_in_8bit": True,
    }
    for key, value in marks.items():
        journal.set_attribute(model, key, value)
    own = copy.copy(model.config)  # another model may share it
    own.quantization_config = config
    for module in model.modules():
        if vars(module).get("config") is model.config and module is not model:
            journal.set_attribute(module, "config", own)
    if view.config is model.config:
        view.follow(own)
    journal.set_attribute(model, "config", own)


def held_bytes(model: PreTrainedModel) -> int:
    """Of scales, which are neither parameters nor buffers."""
    size = 0
    for module in model.modules():
        weight: Any = module._parameters.get("weight")
        for scales in (getattr(getattr(weight, "quant_state", None), "absmax", None), getattr(weight, "SCB", None)):
            size += scales.nbytes if isinstance(scales, torch.Tensor) else 0
    return size


def _why_not(module: nn.Module, shared: bool, role: str) -> str:
    if shared:
        return f"{NAME} has no modules that share a weight"
    if role != "linear" or type(module) is not nn.Linear:
        return f"{NAME} has no module for {type(module).__name__}"
    hooks = module._forward_hooks or module._forward_pre_hooks or hasattr(module, "_hf_hook")
    return "it has hooks, which a module in its place would lack" if hooks else ""


def _module(linear: nn.Linear, scheme: str) -> nn.Module:
    """A module with this one's weight, quantized where it lies, and its very bias."""
    from bitsandbytes import nn as theirs

    weight = linear.weight.detach()
    sides = (linear.in_features, linear.out_features, linear.bias is not None)
    new: Any
    if scheme == "nf4":
        options = {"quant_type": "nf4", "compress_statistics": False}
        new = theirs.Linear4bit(*sides, compute_dtype=weight.dtype, device="meta", **options)
        held = theirs.Params4bit(weight, requires_grad=False, blocksize=BLOCK, module=new, **options)
    else:
        new = theirs.Linear8bitLt(*sides, has_fp16_weights=False, threshold=6.0, device="meta")
        held = theirs.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    new.weight = held.to(weight.device)
    new.bias = linear.bias
    new.training = linear.training
    found: nn.Module = new
    return found
