"""Operators that no recording takes: they give the host numbers, or copy from elsewhere."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.modules import module
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

aten = torch.ops.aten
OWN = {"aten", "prims", "prim"}  # namespaces of operators that say what they do
WAITS = frozenset(  # what gives the host a number, or a size that follows from numbers
    {
        aten._local_scalar_dense, aten.nonzero, aten.is_nonzero, aten.masked_select, aten.equal, aten.bincount,
        aten._unique, aten._unique2, aten.unique_dim, aten.unique_consecutive, aten.unique_dim_consecutive,
        aten.allclose,
    }
)  # fmt: skip


def overheard() -> str:
    """Who looks on in this thread, or on all modules, and would not see a replay; or nothing."""
    modes = _get_current_function_mode_stack()  # type: ignore[no-untyped-call]
    if torch._C._len_torch_dispatch_stack() or not all(isinstance(each, DeviceContext) for each in modes):
        return "a mode of PyTorch's looks at operators or replaces them"
    if module._global_forward_hooks or module._global_forward_pre_hooks:
        return "there are hooks on all modules, which a replay would not call"
    return ""


class Refused(Exception):
    """Why a function cannot be recorded."""


def address(tensor: Tensor) -> int:
    """Of the memory that a tensor shares with its views."""
    return tensor.untyped_storage().data_ptr()


def tensors_in(*given: Any) -> list[Tensor]:
    """The tensors among the arguments of an operator, or among what it returns."""
    found: list[Tensor] = []
    for each in given:
        if isinstance(each, Tensor):
            found.append(each)
        elif isinstance(each, list | tuple):
            found += tensors_in(*each)
        elif isinstance(each, dict):
            found += tensors_in(*each.values())
    return found


def check(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], device: torch.device) -> None:
    """Raise Refused for an operator that no capture on this device takes."""
    packet = func.overloadpacket
    tensors = tensors_in(args, kwargs)
    why = ""
    if packet in WAITS and any(each.device.type == device.type for each in tensors):
        why = "waits for its numbers"
    elif packet in (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_):
        indices = [each for each in args[1] if each is not None]
        if any(each.dtype in (torch.bool, torch.uint8) for each in indices):
            why = "with a mask waits for its numbers"
        elif any(each.device != args[0].device for each in indices):
            why = "with indices elsewhere copies them"
    elif packet is aten.repeat_interleave and func is not aten.repeat_interleave.self_int:
        if kwargs.get("output_size") is None:
            why = "waits for its numbers"
    elif (
        packet is aten.lift_fresh
        and tensors[0].device.type == device.type
        and (tensors[0].ndim or device.type != "cpu")
    ):
        why = "of a new constant copies from the host's memory"
    elif packet in (aten._to_copy, aten.copy_):
        if _from_elsewhere(packet, args, kwargs):
            why = "copies from or to other memory"
    if why:
        raise Refused(f"{packet} {why}")


def _from_elsewhere(packet: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    source = args[1] if packet is aten.copy_ else args[0]
    if not isinstance(source, Tensor):
        return False
    target = args[0].device if packet is aten.copy_ else kwargs.get("device")
    return target is not None and torch.device(target).type != source.device.type
