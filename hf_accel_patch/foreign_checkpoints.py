"""Checkpoints of GPTQ, AWQ and bitsandbytes, read onto our kernels: their layers are laid out anew one by one."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.utils import (
    CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    cached_file,
    find_adapter_config_file,
    is_peft_available,
    logging,
)
from transformers.utils.hub import get_checkpoint_shard_files

from hf_accel_patch.errors import HfAccelError
from hf_accel_patch.foreign_layers import Layer, joined, weights_of
from hf_accel_patch.loading import HfAccelConfig
from hf_accel_patch.logs import get_logger
from hf_accel_patch.ops import foreign
from hf_accel_patch.ops.packing import INT8, int4_block, lay_out, pack, pack_codes
from hf_accel_patch.ops.quantize import TABLES
from hf_accel_patch.planning.stored import FIRST

PARTS = {  # the tensors that a layer has in a checkpoint of another method, by their names after that of the layer
    "gptq": ("qweight", "qzeros", "scales", "g_idx"),
    "awq": ("qweight", "qzeros", "scales"),
    "bitsandbytes": ("weight", "weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map"),
}


def read_foreign(
    path: str | os.PathLike[str],
    config: Any,
    found: dict[str, Any],
    method: str,
    options: dict[str, Any],
    hub: dict[str, Any],
    kind: type[PreTrainedModel] | None,
) -> PreTrainedModel:
    """A checkpoint of another method, its layers laid out anew one by one.

    `config`: the model's; `found`: what it says of the `method`. `options`: of `from_pretrained`; `hub`: those of them
    that say where the checkpoint is. `kind`: the class to make; None: as the configuration says. Raises HfAccelError
    for what is damaged, mixed, or of a format that is not read.
    """
    adapter = _adapter(path, options, hub)
    files = _files(path, hub, options.pop("variant", None))
    del config.quantization_config
    trust = {"trust_remote_code": True} if hub.get("trust_remote_code") else {}
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config, **trust) if kind is None else kind._from_config(config)
    with ExitStack() as stack:
        opened = [stack.enter_context(safe_open(file, framework="pt")) for file in files]
        where = {name: file for file in opened for name in file.keys()}  # noqa: SIM118
        layers = [name.removesuffix(FIRST[method]) for name in where if name.endswith(FIRST[method])]
        if method == "bitsandbytes":
            layers += [name.removesuffix(".SCB") for name in where if name.endswith(".SCB")]
        if not layers:
            raise HfAccelError(f"the checkpoint at {path} says that it is quantized by {method}, and has no such layer")
        state, ours = _converted(skeleton, where, layers, method, found)
    config.quantization_config = ours.to_dict()
    options = {key: value for key, value in options.items() if key not in hub}
    model = type(skeleton).from_pretrained(None, config=config, state_dict=state, **options)
    model.name_or_path = model.config.name_or_path = os.fspath(path)
    vars(model)["_hf_accel_source"] = method
    if model.can_generate():
        try:
            model.generation_config = GenerationConfig.from_pretrained(path, **hub)
        except OSError:
            get_logger(__name__).info("the checkpoint has no generation_config.json")
    if adapter is not None:
        model.load_adapter(**adapter)
    return model


def _adapter(path: str | os.PathLike[str], options: dict[str, Any], hub: dict[str, Any]) -> dict[str, Any] | None:
    """How `load_adapter` reads the adapter that belongs to a checkpoint, None if there is none. What `from_pretrained`
    takes for it is taken off `options`."""
    name, keywords = options.pop("adapter_name", None), dict(options.pop("adapter_kwargs", None) or {})
    where = keywords.pop("_adapter_model_path", None)
    if where is None and is_peft_available():
        keywords = {key: value for key, value in hub.items() if key != "trust_remote_code"} | keywords
        if find_adapter_config_file(path, **keywords) is None:
            return None
        if not Path(path, CONFIG_NAME).is_file():  # whose base is another checkpoint, for transformers
            raise HfAccelError(f"{path} has an adapter", "load its base model, and then model.load_adapter(...)")
        where = path
    return None if where is None else {"peft_model_id": where, "adapter_name": name, "adapter_kwargs": keywords}


def _files(path: str | os.PathLike[str], hub: dict[str, Any], variant: str | None) -> list[str]:
    """The safetensors files of a checkpoint."""
    single_name, index_name = (
        name if variant is None else name.replace(".safetensors", f".{variant}.safetensors", 1)
        for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)
    )
    hub = {key: value for key, value in hub.items() if key != "trust_remote_code"}
    found = {
        name: cached_file(path, name, _raise_exceptions_for_missing_entries=False, **hub)
        for name in (single_name, index_name)
    }
    if index := found[index_name]:
        names = sorted(set(json.loads(Path(index).read_text())["weight_map"].values()))
        files, _ = get_checkpoint_shard_files(path, index, **hub)
        if len(files) < len(names):
            raise HfAccelError(f"the checkpoint at {path} lacks some of {', '.join(names)}")
        return list(files)
    if single := found[single_name]:
        return [single]
    raise HfAccelError(f"there are no safetensors files at {path}; pickled checkpoints are not read")


def _converted(
    skeleton: PreTrainedModel, where: Mapping[str, Any], layers: list[str], method: str, found: dict[str, Any]
) -> tuple[dict[str, Tensor], HfAccelConfig]:
    """The state dict in our format, and its description."""
    read, block = _reader(method, found), int4_block() or 64
    state: dict[str, Tensor] = {}
    taken: set[str] = set()
    sizes: dict[str, int] = {}  # of the groups, by the name of the module
    ordered: list[str] = []
    schemes: set[str] = set()
    for made in logging.tqdm(weights_of(skeleton, layers), desc=f"read {method}", disable=len(layers) < 100):
        pairs, order = [], None
        for parts in made.layers:
            try:
                tensors = [_tensors(layer, where, method, taken) for layer in parts]
                layer = joined([read(each, made.part_shape) for each in tensors])
                scheme, codes, scales, order = _packed(layer, made.weight.shape, block)
                if order is not None and made.of_experts:
                    raise ValueError("act-order is not supported for experts")
            except ValueError as error:
                raise HfAccelError(f"{' and '.join(parts)}: {error}") from error
            schemes.add(scheme)
            pairs.append((codes, scales))
        size = 0 if scheme in INT8 else made.weight.shape[1] // len(pairs[0][1])
        if sizes.setdefault(made.module, size) != size:
            raise HfAccelError(f"{made.module}: its weights have groups of {sizes[made.module]} and of {size}")
        key = f"{made.module}.{made.weight.name}"
        state[key], state[f"{key}_scales"] = _stacked(pairs, scheme) if made.of_experts else pairs[0]
        if order is not None:
            state[f"{key}_order"] = order
            ordered.append(made.module)
    for name in [name for name in where if method == "awq" and name.endswith(".scales") and name not in taken]:
        if bool((where[name].get_tensor(name) != 1).any()):
            raise HfAccelError(
                f"{name}: the checkpoint divides activations by scales, which is not read",
                "quantize the float checkpoint: load(path, quantize='int4')",
            )
        taken.add(name)
    if len(schemes) > 1:
        raise HfAccelError(f"the checkpoint mixes {', '.join(sorted(schemes))}, which one model cannot hold")
    weights: dict[str, list[str]] = {}
    for module, size in sizes.items():
        weights.setdefault(str(size), []).append(module)
    state |= {name: file.get_tensor(name) for name, file in where.items() if name not in taken}
    return state, HfAccelConfig(schemes.pop(), block=block, weights=weights, ordered=ordered)


def _tensors(layer: str, where: Mapping[str, Any], method: str, taken: set[str]) -> dict[str, Tensor]:
    """The tensors of one layer, by their names after its own."""
    names = [f"{layer}.{part}" for part in (*PARTS[method], "SCB", "weight_format") if f"{layer}.{part}" in where]
    names += [name for name in where if name.startswith(f"{layer}.weight.quant_state.")]
    taken.update(names)
    return {name.removeprefix(f"{layer}."): where[name].get_tensor(name) for name in names}


def _stacked(pairs: list[tuple[Tensor, Tensor]], scheme: str) -> tuple[Tensor, Tensor]:
    """Codes and scales of all experts, as a module holds them."""
    codes, scales = (torch.stack(each) for each in zip(*pairs, strict=True))
    return (codes.transpose(0, 1) if scheme in INT8 else codes), scales


def _reader(method: str, found: dict[str, Any]) -> Callable[[dict[str, Tensor], tuple[int, int]], Layer]:
    """How to read one layer, from its tensors and its shape [N, K]."""
    bits = int(found.get("bits", found.get("w_bit", 4)))
    size = int(found.get("group_size", found.get("q_group_size", 128)))
    if method == "gptq":
        kind = str(found.get("checkpoint_format", "gptq"))
        if kind not in ("gptq", "gptq_v2"):
            raise HfAccelError(f"GPTQ checkpoints are read in the formats gptq and gptq_v2, not {kind!r}")
        read = foreign.gptq if bits == 4 else foreign.dense_gptq
        return lambda parts, _: read(parts, bits, size, v1=kind == "gptq")
    if method == "awq":
        return lambda parts, _: foreign.awq(parts, bits, size, str(found.get("version", "gemm")))
    return lambda parts, shape: (
        foreign.bitsandbytes_8bit(parts) if "SCB" in parts else foreign.bitsandbytes_4bit(parts, shape)
    )


def _packed(layer: Layer, shape: tuple[int, int], block: int) -> tuple[str, Tensor, Tensor, Tensor | None]:
    """Scheme, codes, scales and order of a layer in our layout. Raises ValueError."""
    codes = layer if isinstance(layer, Tensor) else layer.codes
    if codes.shape != shape:
        raise ValueError(f"the layer should be {list(shape)}, found {list(codes.shape)}")
    if isinstance(layer, Tensor):  # 8 bits in groups: the rows are quantized anew
        return ("int8", *pack(layer, "int8", 0, block), None)
    if isinstance(layer, foreign.Rows):
        return "llm.int8", codes[None], layer.scale.bfloat16().view(torch.int16), None
    if isinstance(layer, foreign.Grouped):
        return "int4", *lay_out(codes, layer.scale, layer.zero, block), layer.order
    scheme = next((name for name, table in TABLES.items() if torch.allclose(table, layer.table, atol=1e-6)), "")
    if not scheme:
        raise ValueError("quant_map holds other values than those of nf4 and fp4")
    short = -shape[0] % block
    scales = F.pad(layer.absmax.T, (0, short)).contiguous()
    return scheme, pack_codes(F.pad(codes, (0, 0, 0, short)), block), scales.view(torch.int32), None
