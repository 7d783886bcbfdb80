"""The weights of a checkpoint that is quantized already, without reading them: by its configuration, and by the names
in its files where these are here."""

from __future__ import annotations

import copy
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from hf_accel_patch.errors import HfAccelError, UnsupportedModel
from hf_accel_patch.families import View, bind, layer_list
from hf_accel_patch.families.weights import linear_weights
from hf_accel_patch.foreign_layers import weights_of
from hf_accel_patch.journal import Journal
from hf_accel_patch.loading import HfAccelConfig
from hf_accel_patch.ops.packing import int4_block
from hf_accel_patch.passes import Quantize
from hf_accel_patch.passes.grouped import shrink
from hf_accel_patch.passes.saving import METHOD
from hf_accel_patch.plan import Pass, Plan, Skip
from hf_accel_patch.reading import Found, Prepared

FIRST = {"gptq": ".qweight", "awq": ".qweight", "bitsandbytes": ".weight.absmax"}  # what only a quantized layer has
BITSANDBYTES_BLOCK = 64  # weights that share a scale, where nothing else was said


@dataclass(frozen=True)
class Opened:
    """A model to be planned. Of a checkpoint: on the meta device, with the codes that it holds, and `skeleton`, the
    same in float weights; `quantized`: by which method, and in which scheme `load` would hold it."""

    view: View
    skeleton: View | None = None
    quantized: str = ""
    path: str = ""

    @property
    def comes_quantized(self) -> bool:
        """Whether the checkpoint says that it is quantized, by whatever method: then its weights stay as they are."""
        return self.skeleton is not None and self.skeleton is not self.view

    def check(self, passes: Sequence[Pass]) -> None:
        """Raise HfAccelError for what `load` would refuse."""
        if self.quantized and any(isinstance(each, Quantize) for each in passes):
            method = self.quantized.partition(" ")[0]
            raise HfAccelError(f"the checkpoint at {self.path} is quantized by {method} already", "leave out quantize=")

    def told(self, plan: Plan) -> Plan:
        """The plan, with what the checkpoint brings."""
        if not self.quantized:
            return plan
        reason, size = f"the checkpoint is quantized by {self.quantized} already", self.view.weight_bytes()
        decisions = tuple(
            Skip(each.by, reason, size) if each.by.name == "quantize" else each for each in plan.decisions
        )
        return replace(plan, decisions=decisions)


def opened(path: str | os.PathLike[str], config: Any, dtype: Any = None) -> Opened:
    """The model that `load(path)` would return, without values. Raises UnsupportedModel for what is no causal LM."""
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise UnsupportedModel(f"{os.fspath(path)} is no causal LM: its model_type is {config.model_type!r}")
    found = described(config)
    view = _empty(config, dtype)
    if found is None:
        return Opened(view, view)
    method, skeleton = str(found.get("quant_method", "an unknown method")), view
    view = _empty(config, dtype)
    scheme = install(view.model, found, path)
    said = f"{method} ({scheme})" if scheme else method
    return Opened(view, skeleton, said if scheme or method != METHOD else "", os.fspath(path))


def _empty(config: Any, dtype: Any) -> View:
    config = copy.deepcopy(config)
    for name in ("quantization_config", "_is_quantized"):
        vars(config).pop(name, None)
    chosen = {} if dtype in (None, "auto") else {"dtype": dtype}
    with torch.device("meta"), no_init_weights():
        model = AutoModelForCausalLM.from_config(config, **chosen)
    model.tie_weights()  # which goes with the initialization that is left out
    return bind(model)


def described(config: Any) -> dict[str, Any] | None:
    """The `quantization_config` of a configuration, as plain data."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        return None
    entries = found if isinstance(found, dict) else found.to_dict()
    return {key: getattr(value, "value", value) for key, value in entries.items()}  # methods and formats are enums


def install(model: PreTrainedModel, found: dict[str, Any], path: str | os.PathLike[str]) -> str:
    """Put the codes that `load(path)` would read, without memory, in the place of the weights of a model on the meta
    device; returns the scheme, or "" for a method that is not read."""
    method = str(found.get("quant_method", ""))
    if method == METHOD:
        config = HfAccelConfig(**found)
        if config.kv_heads is not None:
            shrink(model, config.kv_heads, Journal())
    else:
        scheme, weights = _of_others(model, found, method, path)
        if not scheme:
            return ""
        ordered = [name for names in weights.values() for name in names] if found.get("desc_act") else []
        config = HfAccelConfig(scheme, block=int4_block() or 64, weights=weights, ordered=ordered)
    if not config.weights:
        return ""
    Prepared(model, config.quantize(), Found(config.scheme, config.block, config.weights, config.ordered), Journal())
    return str(config.scheme)


def _of_others(
    model: PreTrainedModel, found: dict[str, Any], method: str, path: str | os.PathLike[str]
) -> tuple[str, dict[str, list[Any]]]:
    """The scheme in which `load` holds the weights of a checkpoint of another method, and their names by group size."""
    if method not in FIRST:
        return "", {}
    bits = int(found.get("bits", found.get("w_bit", 4)))
    if method == "bitsandbytes":
        kind = str(found.get("bnb_4bit_quant_type", "fp4"))
        scheme = kind if found.get("load_in_4bit", found.get("_load_in_4bit")) else "llm.int8"
    else:
        scheme = "int4" if bits == 4 else "int8"
    weights: dict[str, list[Any]] = {}
    names = _names(path, (FIRST[method], ".SCB") if method == "bitsandbytes" else (FIRST[method],))
    modules = {made.module: made.weight.shape[1] for made in weights_of(model, names)}
    group = int(found.get("group_size", found.get("q_group_size", 128)))
    group = BITSANDBYTES_BLOCK if method == "bitsandbytes" else group
    for name, K in (modules or _by_rule(model, found, method)).items():
        size = 0 if scheme in ("int8", "llm.int8") else _kernel_group(K if group == -1 else math.gcd(K, group))
        weights.setdefault(str(size), []).append(name)
    return scheme, weights


def _names(path: str | os.PathLike[str], suffixes: tuple[str, ...]) -> list[str]:
    """The layers that have a tensor with such a name, by an index or a header; none where the files are not here."""
    folder = Path(path)
    index, single = folder / SAFE_WEIGHTS_INDEX_NAME, folder / SAFE_WEIGHTS_NAME
    if index.is_file():
        names = list(json.loads(index.read_text())["weight_map"])
    elif single.is_file():
        with safe_open(single, framework="pt") as opened:
            names = list(opened.keys())
    else:
        return []
    return [name.removesuffix(suffix) for name in names for suffix in suffixes if name.endswith(suffix)]


def _by_rule(model: PreTrainedModel, found: dict[str, Any], method: str) -> dict[str, int]:
    """As the method chooses by default: linear layers, and experts, but for the head and those that it was told to
    leave out. By name, with the number of input features."""
    left = [*(found.get("modules_to_not_convert") or ()), *(found.get("llm_int8_skip_modules") or ())]
    head, inside = model.get_output_embeddings(), {id(module) for module in layer_list(bind(model)).modules()}
    chosen = {}
    for name, module in model.named_modules():
        weights = linear_weights(module)
        plain = isinstance(module, nn.Linear) and module is not head
        if isinstance(weights, str) or not (plain or (weights[0] == "experts" and method != "bitsandbytes")):
            continue
        if (method == "bitsandbytes" or id(module) in inside) and not any(
            part in name or fnmatchcase(name, part) for part in left
        ):
            chosen[name] = weights[1][0].shape[1]
    return chosen


def _kernel_group(multiple: int) -> int:
    return next((size for size in (128, 64, 32) if multiple % size == 0), 32)
