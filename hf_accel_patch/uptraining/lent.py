"""What a run changes of the models that it is lent, while it lasts: devices, modes, gradients, random numbers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_accel_patch.families import find_model
from hf_accel_patch.uptraining.run import device_of, modes_kept

if TYPE_CHECKING:
    from accelerate import Accelerator


@contextmanager
def as_before(model: PreTrainedModel, parameters: dict[str, nn.Parameter], accelerator: Accelerator) -> Iterator[None]:
    """Inside the block the model is on the accelerator's device, and only `parameters` require gradients and have none;
    modes, gradients, device and the state of random numbers are as before behind it."""
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    taken = {id(parameter) for parameter in parameters.values()}
    several = accelerator.num_processes > 1
    devices = [accelerator.device] if accelerator.device.type == "cuda" else []
    with modes_kept(model), torch.random.fork_rng(devices=devices), torch.enable_grad():
        try:
            for parameter, _, _ in before:
                parameter.grad = None
                parameter.requires_grad = id(parameter) in taken
            with on_device(model, accelerator.device, exactly=several):
                yield
        finally:
            for parameter, required, gradient in before:
                parameter.requires_grad = required
                parameter.grad = gradient


@contextmanager
def on_device(model: PreTrainedModel, device: torch.device, *, exactly: bool = False) -> Iterator[None]:
    """On such a device inside the block, and on its own behind it. One accelerator of several is as good as another,
    unless it is to be `exactly` this one."""
    home = device_of(model)
    moved = home != device if exactly else home.type != device.type
    if moved:
        model.to(device)
    try:
        yield
    finally:
        if moved:
            model.to(home)


@contextmanager
def teacher_of(original: PreTrainedModel | str | os.PathLike[str], model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """The original in eval mode, where the model is; one that was given is as before behind the block."""
    if isinstance(original, str | os.PathLike):
        original = AutoModelForCausalLM.from_pretrained(original, dtype=model.dtype)
    found = find_model(original)
    with modes_kept(found), on_device(found, device_of(model), exactly=True):
        yield found.eval()
