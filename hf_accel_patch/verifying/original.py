"""The model that a patched one is compared with.

Where nothing was discarded it is a copy of the patched model that shares all tensors with it, kept originals among
them, and from which the patch is taken off: the patched model itself is not touched, so damage to it stays to be seen.
Where originals are gone it comes from the checkpoint, as a whole if memory has room for it beside the patched model,
else through accelerate's hooks, which read each module's weights when it runs and free them after it.
"""

from __future__ import annotations

import copy
import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from hf_accel_patch.api import STATE, State, unpatch
from hf_accel_patch.errors import HfAccelError
from hf_accel_patch.families import ADAPTERS, dtype_of, find_model, weight_bytes
from hf_accel_patch.ops.modules import QuantizedModule
from hf_accel_patch.planning.machine import available_bytes
from hf_accel_patch.verifying.untouched import untouched

ROOM = 1.25  # times its weights: the whole original beside the patched model, and what running it needs
HINT = "give original=, the unpatched model or the path of its checkpoint"


@dataclass(frozen=True)
class Original:
    """The unpatched model, and where it is from."""

    model: PreTrainedModel
    source: str
    weight_bytes: int
    streamed: bool = False  # whether its weights are read anew for every call


@contextmanager
def original_of(model: PreTrainedModel, given: Any, stream: bool | None) -> Iterator[Original]:
    """The original of a patched model, inside the block. `given`: a model, or the path or id of a checkpoint; None:
    what the patch kept, or the checkpoint at `model.name_or_path`. `stream`: whether a checkpoint's weights are never
    in memory as a whole; None: only if they do not fit.

    Raises HfAccelError where there is none.
    """
    state: State | None = vars(model).get(STATE)
    if given is not None and not isinstance(given, str | os.PathLike):
        found = find_model(given)
        if found is model:
            raise ValueError("original= is the very model that is verified; give one that is not patched")
        with untouched(found):
            yield Original(found, "the model that was given", weight_bytes(found))
        return
    if given is None and state is not None and not state.journal.discarded:
        copied = _taken_back(model, state)
        yield Original(copied, "its own weights, with the patch taken off", weight_bytes(copied))
        return
    path, source = (given, {}) if given is not None else (_checkpoint(model, state), state.source if state else {})
    with _read(os.fspath(path), source, model, stream) as read:
        yield read


def _taken_back(model: PreTrainedModel, state: State) -> PreTrainedModel:
    """A copy without the patch. No tensor is copied."""
    shared: list[Any] = [state.passes, *state.journal.shared()]
    for module in model.modules():
        shared += [*module._parameters.values(), *module._buffers.values()]
        shared += [value for value in vars(module).values() if isinstance(value, Tensor)]
        offloaded = getattr(vars(module).get("_hf_hook"), "weights_map", None)  # of accelerate's hooks
        shared += [] if offloaded is None else [offloaded]
    memo = {id(each): each for each in shared if each is not None}
    try:
        copied = copy.deepcopy(model, memo)
    except (TypeError, AttributeError, RuntimeError) as error:
        raise HfAccelError(f"{type(model).__name__} cannot be copied: {error}", HINT) from error
    return unpatch(copied).eval()


def _checkpoint(model: PreTrainedModel, state: State | None) -> str:
    """Where the originals are that the model does not have. Raises HfAccelError."""
    kind = type(model).__name__
    if state is None and not any(isinstance(module, QuantizedModule) for module in model.modules()):
        raise HfAccelError(f"{kind} is not patched, so there is nothing to compare", "patch it first, or " + HINT)
    if any(part in name for name, _ in model.named_modules() for part in ADAPTERS):
        raise HfAccelError(f"{kind} has adapters, which its checkpoint has not, and its float weights are gone", HINT)
    if not model.name_or_path:
        raise HfAccelError(f"the float weights of {kind} were discarded, and it does not know its checkpoint", HINT)
    return str(model.name_or_path)


@contextmanager
def _read(path: str, source: dict[str, Any], model: PreTrainedModel, stream: bool | None) -> Iterator[Original]:
    with tempfile.TemporaryDirectory() as folder:  # for weights that a checkpoint holds in other pieces
        try:
            read = _loaded(path, source, model, stream, folder)
        except (OSError, ValueError) as error:
            raise HfAccelError(f"the checkpoint at {path} cannot be read: {error}", HINT) from error
        yield read


def _loaded(path: str, source: dict[str, Any], model: PreTrainedModel, stream: bool | None, folder: str) -> Original:
    kind, dtype = type(model), dtype_of(model)
    device = next((each.device for each in model.parameters() if not each.is_meta), torch.device("cpu"))
    config = AutoConfig.from_pretrained(path, **source)
    if getattr(config, "quantization_config", None) is not None:
        raise HfAccelError(f"the checkpoint at {path} is quantized itself, so it is no original", HINT)
    kind = kind if isinstance(config, kind.config_class) else AutoModelForCausalLM
    size, available = _size(kind, config, dtype), available_bytes(device)
    if stream is None:
        stream = available is not None and ROOM * size > available
    if not stream:
        whole = kind.from_pretrained(path, **source, dtype=dtype).to(device)
        return Original(whole.eval(), f"the checkpoint at {path}", size)
    placed = {"": "disk"} | ({} if device.type == "cpu" else _smallest(model, device))
    with _quiet():
        streamed = kind.from_pretrained(path, **source, dtype=dtype, device_map=placed, offload_folder=folder)
    return Original(streamed.eval(), f"the checkpoint at {path}, streamed", size, streamed=True)


def _size(kind: Any, config: Any, dtype: torch.dtype) -> int:
    """Bytes of such a model."""
    build = kind.from_config if kind is AutoModelForCausalLM else kind._from_config
    with torch.device("meta"):
        return weight_bytes(build(copy.deepcopy(config), dtype=dtype))


def _smallest(model: PreTrainedModel, device: torch.device) -> dict[str, Any]:
    """A module to stay on this device, which tells accelerate where the others are to run."""
    sizes = {}
    for name, part in model.named_modules():
        held = [parameter.numel() for parameter in part._parameters.values() if parameter is not None]
        if held and not part._modules:
            sizes[name] = sum(held)
    return {min(sizes, key=lambda name: sizes[name]): device}


@contextmanager
def _quiet() -> Iterator[None]:
    """Without accelerate's warning that weights are where they were asked to be."""
    logger = logging.getLogger("accelerate.big_modeling")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
