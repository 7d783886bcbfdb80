"""Everything observable of a model, and of what models share: equal before and after means untouched.

Both are flat dictionaries from a readable place to what was there. Objects are held, not only their addresses, so an
equal address always is the same object.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import sys
import types

import torch
import transformers
from torch import Tensor, nn
from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
    cache_utils,
    masking_utils,
    modeling_rope_utils,
    modeling_utils,
)
from transformers.models.gemma2 import modeling_gemma2
from transformers.models.llama import modeling_llama

Facts = dict[str, object]
DEEPEST = 4  # levels of containers and plain objects that are looked into
HOOKS = [name for name in vars(nn.modules.module) if name.startswith("_global_")]


class Same:
    """Equal to another `Same` of the same object, and to nothing else."""

    def __init__(self, value: object) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and other.value is self.value

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"{type(self.value).__qualname__} at {id(self.value):#x}"


def fingerprint(model: PreTrainedModel) -> Facts:
    """Per module: which object it is, its class, all it has of its own (hooks and children among it). Per parameter and
    buffer: which object it is, dtype, shape, strides, content, gradient, what it shares memory with. The
    configurations, with the attention name that they keep apart."""
    facts: Facts = {}
    first_users: dict[int, str] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        facts[f"{path}"] = Same(module)
        facts[f"{path} class"] = Same(type(module))
        facts[f"{path} training"] = module.training
        for name, value in vars(module).items():
            facts[f"{path}.{name}"] = _content(value)
        facts[f"{path} order"] = tuple(vars(module))
        for store in (module._parameters, module._buffers):
            for name, tensor in store.items():
                if tensor is not None:
                    facts[f"{path}.{name} tensor"] = _tensor(tensor, f"{path}.{name}", first_users)
    for name in ("config", "generation_config"):
        if (config := getattr(model, name, None)) is not None:
            facts[f"{name} written"] = json.dumps(config.to_dict(), sort_keys=True, default=str)
            facts[f"{name} own"] = _content(config)
            facts[f"{name} attention"] = getattr(config, "_attn_implementation", None)
    facts["state dict"] = tuple(model.state_dict())
    return facts


CACHES = ("__warningregistry__", "__annotations_cache__", "__annotate_cache__", "__slotnames__")  # Python's own
OURS = "hf_accel_patch"  # whose own classes are not shared with stock models


def shared_state(*models: nn.Module) -> Facts:
    """What is in the places that all models share: transformers' registries and caches, the modules and classes of
    torch and transformers (those of `models` among them), process-wide settings."""
    modules: list[types.ModuleType] = [torch, nn.functional, nn.modules.module, modeling_utils, masking_utils]
    modules += [modeling_rope_utils, cache_utils, modeling_llama, modeling_gemma2]
    classes: dict[type, None] = dict.fromkeys([Tensor, nn.Parameter, nn.Module, nn.Linear, nn.Embedding])
    classes |= dict.fromkeys([PreTrainedModel, PreTrainedConfig, transformers.GenerationMixin])
    for place in modules[3:]:
        classes |= dict.fromkeys(kind for kind in vars(place).values() if isinstance(kind, type))
    for model in models:
        for module in model.modules():
            classes |= dict.fromkeys(kind for kind in type(module).__mro__[:-1] if _is_shared(kind))
    facts: Facts = {}
    for place in [*modules, *classes]:
        label = place.__name__ if isinstance(place, types.ModuleType) else f"{place.__module__}.{place.__qualname__}"
        for name, value in vars(place).items():
            if name not in CACHES:
                facts[f"{label}.{name}"] = _scalar(value)
    registries = {
        "attention": modeling_utils.ALL_ATTENTION_FUNCTIONS,
        "mask": masking_utils.ALL_MASK_ATTENTION_FUNCTIONS,
        "rope": modeling_rope_utils.ROPE_INIT_FUNCTIONS,
        "environment": os.environ,
    }
    for label, entries in registries.items():
        facts |= {f"{label} registry[{name}]": _scalar(entries[name]) for name in entries}
    for name in HOOKS:
        facts[f"global {name}"] = _content(getattr(nn.modules.module, name))
    for setting in ("get_num_threads", "get_default_dtype", "get_float32_matmul_precision", "is_grad_enabled"):
        facts[f"torch.{setting}()"] = getattr(torch, setting)()
    return facts


def _is_shared(kind: type) -> bool:
    """Whether stock models can have modules of this class: not of our own, and not of one that was made at run time,
    under the name of the class that it was made from."""
    home = vars(sys.modules[kind.__module__])
    return kind.__module__.split(".")[0] != OURS and home.get(kind.__qualname__) is kind


def changes(before: Facts, after: Facts, *, additions: bool = True) -> list[str]:
    """The places where the two differ; without `additions`, only what was there before counts."""
    absent = object()
    places = before | after if additions else before
    return [place for place in places if before.get(place, absent) != after.get(place, absent)]


def _scalar(value: object) -> object:
    """Plain values as text, because equal ones may be made anew and NaN is not even equal to itself; everything else
    by identity."""
    return repr(value) if _is_plain(value) else Same(value)


def _is_plain(value: object) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return isinstance(value, bool | int | float | str | bytes | None)


def _content(value: object, depth: int = DEEPEST) -> object:
    """What a value is and what is in it. Modules and tensors have facts of their own and are only identified here."""
    if isinstance(value, Tensor):
        return Same(value), _digest(value)
    if depth == 0 or isinstance(value, type | nn.Module | types.FunctionType | types.BuiltinFunctionType):
        return _scalar(value)
    if isinstance(value, types.MethodType):
        return Same(value.__func__), Same(value.__self__)
    if isinstance(value, functools.partial):
        return Same(value), _content(value.args, depth - 1), _content(value.keywords, depth - 1)
    if isinstance(value, dict):
        items = tuple((str(key), _content(item, depth - 1)) for key, item in value.items())
        return Same(value), items
    if isinstance(value, list):
        return Same(value), tuple(_content(item, depth - 1) for item in value)
    if isinstance(value, tuple):
        return tuple(_content(item, depth - 1) for item in value)
    if isinstance(value, set | frozenset):
        return Same(value), frozenset(map(str, value))
    if isinstance(value, torch.dtype | torch.device) or _is_plain(value):
        return repr(value)
    own = getattr(value, "__dict__", {})
    return Same(value), tuple((name, _content(item, depth - 1)) for name, item in own.items())


def _tensor(tensor: Tensor, place: str, first_users: dict[int, str]) -> object:
    storage = tensor.untyped_storage()
    shares_with = first_users.setdefault(storage.data_ptr() or id(storage), place)
    layout = tensor.dtype, tuple(tensor.shape), tensor.stride(), tensor.storage_offset(), tensor.device
    gradient = None if tensor.grad is None else _digest(tensor.grad)
    return Same(tensor), type(tensor), layout, tensor.requires_grad, gradient, shares_with, _digest(tensor)


def _digest(tensor: Tensor) -> str:
    raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.blake2b(raw.numpy().tobytes(), digest_size=16).hexdigest()


def describe(places: list[str]) -> str:
    """For the message of a failing test."""
    return f"{len(places)} changes: {', '.join(places[:6])}"
