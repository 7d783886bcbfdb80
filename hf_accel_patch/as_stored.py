"""Which weights a checkpoint has, and having them arrive in the dtype in which they are stored."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel

from hf_accel_patch.families import View
from hf_accel_patch.passes.quantize import Quantize
from hf_accel_patch.passes.targets import Target


def headers(files: Sequence[str]) -> dict[str, tuple[str, list[int]]]:
    """Dtypes and shapes of all tensors in these files."""
    found: dict[str, tuple[str, list[int]]] = {}
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                part = opened.get_slice(name)
                found[name] = part.get_dtype(), part.get_shape()
    return found


def tied_tables(view: View, options: Quantize, files: Sequence[str]) -> list[tuple[Target, str | None]]:
    """Embeddings that should be tied to a head, with the name under which the files have them. None where they have
    several: of those only equal ones are tied, which shows when all has been read."""
    with _tied(view.model):
        targets, _ = options.choose(view)
    found: list[tuple[Target, str | None]] = []
    stored = headers(files)
    for target in targets:
        if any(isinstance(module, nn.Embedding) for _, module in target.modules):
            names = [name for prefix, _ in target.modules if _is_stored(name := f"{prefix}.weight", stored)]
            found.append((target, names[0] if len(names) == 1 else None))
    return found


@contextmanager
def _tied(model: PreTrainedModel) -> Iterator[None]:
    """Inside, the model's weights are tied, which `from_pretrained` leaves for when all of them are read."""
    before: list[tuple[nn.Module, str, Any]] = []
    try:
        for names in model.all_tied_weights_keys.items():
            (module, key), (source, source_key) = (_place(model, name) for name in names)
            if key in module._parameters and source_key in source._parameters:
                before.append((module, key, module._parameters[key]))
                module._parameters[key] = source._parameters[source_key]
        yield
    finally:
        for module, key, parameter in reversed(before):
            module._parameters[key] = parameter


def _place(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, key = name.rpartition(".")
    return model.get_submodule(path), key


def _is_stored(name: str, stored: Iterable[str]) -> bool:
    """Whether a checkpoint seems to have this weight, perhaps within another model than the one it is read into."""
    end = ".".join(name.split(".")[-2:])
    return any(each == end or each.endswith(f".{end}") for each in stored)


def read_as_stored(model: PreTrainedModel, names: Iterable[str]) -> None:
    """Have these weights of a model in float32 arrive in the dtype of the checkpoint, which may take half the bytes.

    The loading of transformers casts each as its plan of dtypes says, which it asks of the model once."""
    plan = getattr(model, "_get_dtype_plan", None)
    if plan is None:
        return

    def planned(dtype: torch.dtype) -> dict[str, Any]:
        del vars(model)["_get_dtype_plan"]
        found: dict[str, Any] = plan(dtype)
        if dtype is torch.float32:
            found = dict.fromkeys(_patterns(set(names), dict(model.named_parameters(remove_duplicate=False)))) | found
        return found

    vars(model)["_get_dtype_plan"] = planned


def _patterns(names: set[str], known: Iterable[str]) -> list[str]:
    """Regular expressions that find these among the known names: one for all layers, where it finds no others."""
    alike: dict[str, list[str]] = {}
    for name in known:
        alike.setdefault(re.sub(r"\\.\d+\\.", r"\\.\\d+\\.", re.escape(name)), []).append(name)
    patterns: list[str] = []
    for pattern, found in alike.items():
        taken = [name for name in found if name in names]
        patterns += [pattern] if len(taken) == len(found) else map(re.escape, taken)
    return [f"^{pattern}$" for pattern in patterns]
