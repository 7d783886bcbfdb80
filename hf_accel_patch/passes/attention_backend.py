"""The backend of a model's attention: asked for, refused, chosen and reported."""

from __future__ import annotations

from typing import Any

from torch import nn

from hf_accel_patch.errors import UnsupportedModel
from hf_accel_patch.families import dtype_of
from hf_accel_patch.ops.backends import Asked, Backend, Case, choose, missing

BACKEND = "attention_backend"  # where an attention module keeps which one was asked for
AUTO = Asked()


def asked_by(module: nn.Module) -> Asked:
    """The backend that was asked for where this attention module is."""
    asked: Asked = getattr(module, BACKEND, AUTO)
    return asked


def chosen(backend: Backend, model: nn.Module) -> dict[str, str]:
    """The backend for a plain prompt of a model that is where it is now, and why. One that is on no device yet counts
    as on a GPU."""
    device = _device(model)
    choice = choose(backend, Case("cuda" if device == "meta" else device, dtype_of(model)))
    return {"backend": choice.backend, "why": choice.why}


def used(model: nn.Module) -> dict[str, Any]:
    """Which backends have computed so far, and why, where there was something to choose."""
    asked = next((vars(module)[BACKEND] for module in model.modules() if BACKEND in vars(module)), AUTO)
    return {"used": list(asked.used)} if asked.used else {}


def refuse(backend: Backend) -> None:
    """Raises UnsupportedModel for a backend that is not installed. One that cannot do its work where the model is
    leaves it to another, and the report says so."""
    if found := missing(backend):
        raise UnsupportedModel(f"attention: backend={backend!r} was asked for, but {found[0]}", found[1])


def _device(model: nn.Module) -> str:
    return next((each.device.type for each in model.parameters()), "cpu")
