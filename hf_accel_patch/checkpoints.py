"""load: a quantized model from a float checkpoint, or from one of GPTQ, AWQ, bitsandbytes or our own."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file, logging
from transformers.utils.hub import get_checkpoint_shard_files

from hf_accel_patch.api import adopt
from hf_accel_patch.errors import HfAccelError
from hf_accel_patch.families import weight_bytes
from hf_accel_patch.foreign_layers import joined, weights_of
from hf_accel_patch.loading import HfAccelConfig
from hf_accel_patch.logs import get_logger
from hf_accel_patch.ops import foreign
from hf_accel_patch.ops.packing import INT8, int4_block, lay_out, pack, pack_codes
from hf_accel_patch.ops.quantize import TABLES
from hf_accel_patch.options import KEYWORDS, parse
from hf_accel_patch.passes import Quantize
from hf_accel_patch.passes.saving import METHOD
from hf_accel_patch.plan import Pass
from hf_accel_patch.planning.budget import Budget, fitted
from hf_accel_patch.planning.memory import Estimates
from hf_accel_patch.planning.stored import FIRST, opened
from hf_accel_patch.reading import Recording, recording

HUB = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder", "trust_remote_code")
PARTS = {  # the tensors that a layer has in a checkpoint of another method, by their names after that of the layer
    "gptq": ("qweight", "qzeros", "scales", "g_idx"),
    "awq": ("qweight", "qzeros", "scales"),
    "bitsandbytes": ("weight", "weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map"),
}


def load(path: str | os.PathLike[str], **options: Any) -> PreTrainedModel:
    """A causal LM from the checkpoint at `path`, a folder or an id on the hub, patched.

    `options`: the keywords of `patch`; whatever else is handed to `AutoModelForCausalLM.from_pretrained`. With
    `quantize=` weights are quantized one by one while they are read: the float model never exists whole. Without it, a
    checkpoint that GPTQ (4 and 8 bits), AWQ, bitsandbytes (4 and 8 bits) or this package has quantized is read as it
    is, onto our kernels. `budget=` decides before anything is read. Only safetensors are read.

    Raises ValueError or TypeError for impossible options, HfAccelError for a checkpoint that is damaged, of an unknown
    method, or quantized already where `quantize=` asks for more.
    """
    return read(path, options)


def read(
    path: str | os.PathLike[str],
    options: dict[str, Any],
    reader: Callable[..., PreTrainedModel] = AutoModelForCausalLM.from_pretrained,
    *,
    lenient: bool = False,
) -> PreTrainedModel:
    """`load`, with another function that reads the checkpoint. `lenient`: passes that the model cannot have are left
    out, with a warning."""
    options = dict(options)
    asked = parse({key: options.pop(key) for key in KEYWORDS if key in options})
    quantize = next((each for each in asked if isinstance(each, Quantize)), None)
    if quantize is not None and quantize.originals == "keep":
        raise ValueError("load() reads no float weights that it could keep; leave out originals='keep'")
    if quantize is not None and quantize.calibrate is not None:
        raise ValueError("calibration runs the float model; load it with from_pretrained and then patch it")
    if quantize is not None and quantize.foreign:
        raise ValueError(
            "load() quantizes onto our kernels; for the modules of bitsandbytes, from_pretrained with "
            "quantization_config=BitsAndBytesConfig(...), or patch a loaded model"
        )
    if options.pop("output_loading_info", False):
        raise ValueError("load() returns the model alone; leave out output_loading_info")
    hub = {key: options[key] for key in HUB if key in options}
    given = options.pop("config", None)
    config = given
    if not isinstance(config, PreTrainedConfig):  # none, or where to read it
        config = AutoConfig.from_pretrained(path if given is None else given, **hub)
    found = getattr(config, "quantization_config", None)
    found = found if isinstance(found, dict) or found is None else found.to_dict()
    method = str((found or {}).get("quant_method", ""))
    if quantize is not None and found is not None:
        hint = "leave out quantize=" if found.get("weights") else "load it, and patch the model with quantize="
        raise HfAccelError(f"the checkpoint at {path} is quantized by {method} already", hint)
    passes = _fitted(path, config, asked, options.get("dtype"))
    quantize = next((each for each in passes if isinstance(each, Quantize)), None)
    if method in PARTS:
        if given is None:
            config, options = AutoConfig.from_pretrained(path, return_unused_kwargs=True, **options)
        model = _foreign(path, copy.deepcopy(config), found or {}, method, options, hub)
        return adopt(model, passes, as_it_is, asked=asked, lenient=lenient)
    if found is not None and method not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        raise HfAccelError(
            f"the checkpoint at {path} is quantized by {method or 'an unknown method'}, which is not read"
        )
    options |= {} if given is None else {"config": given}
    options.setdefault("use_safetensors", True)
    kept = Recording()
    if quantize is not None:
        options["quantization_config"] = HfAccelConfig(
            quantize.scheme, quantize.group_size, quantize.skip, quantize.backend
        )
    with _recorded(kept):
        model = reader(path, **options)
    if quantize is not None:
        return adopt(model, passes, lambda _: kept.facts, kept.journal, hub, asked, lenient=lenient)
    quantized = method == METHOD and (found or {}).get("weights")
    return adopt(model, passes, as_it_is if quantized else None, source=hub, asked=asked, lenient=lenient)


def _fitted(path: str | os.PathLike[str], config: Any, asked: tuple[Pass, ...], dtype: Any) -> tuple[Pass, ...]:
    """What a budget decides, from the configuration alone."""
    if not isinstance(asked[0], Budget):
        return asked
    here = opened(path, config, dtype)
    estimates = Estimates(here.view, asked[0].counted(here.view), asked[0].batch, here.skeleton)
    return fitted(here.view, asked, estimates)


@contextmanager
def _recorded(kept: Recording) -> Iterator[None]:
    token = recording.set(kept)
    try:
        yield
    finally:
        recording.reset(token)


def as_it_is(model: PreTrainedModel) -> dict[str, Any]:
    """What a report says of weights that came quantized."""
    config: HfAccelConfig = model.hf_quantizer.quantization_config
    size = weight_bytes(model)
    weights = sum(len(names) for names in (config.weights or {}).values())
    method = getattr(model, "_hf_accel_source", METHOD)
    exact = method == METHOD or config.scheme in TABLES
    facts = {"exact": exact, "bytes_before": size, "bytes_after": size, "scheme": config.scheme, "weights": weights}
    rounded = {"int8": "rows are quantized anew", "int4": "scales and zeros are rounded to bfloat16"}
    facts |= {} if exact else {"read": rounded.get(config.scheme, "scales are rounded to bfloat16")}
    return facts | {"checkpoint": method}


def _foreign(
    path: str | os.PathLike[str],
    config: Any,
    found: dict[str, Any],
    method: str,
    options: dict[str, Any],
    hub: dict[str, Any],
) -> PreTrainedModel:
    """A checkpoint of another method, its layers laid out anew one by one."""
    files = _files(path, hub, options.pop("variant", None))
    del config.quantization_config
    trust = {"trust_remote_code": True} if hub.get("trust_remote_code") else {}
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config, **trust)
    with ExitStack() as stack:
        opened = [stack.enter_context(safe_open(file, framework="pt")) for file in files]
        where = {name: file for file in opened for name in file.keys()}  # noqa: SIM118
        layers = [name.removesuffix(FIRST[method]) for name in where if name.endswith(FIRST[method])]
        if method == "bitsandbytes":
            layers += [name.removesuffix(".SCB") for name in where if name.endswith(".SCB")]
        if not layers:
            raise HfAccelError(f"the checkpoint at {path} says that it is quantized by {method}, and has no such layer")
        state, described = _converted(skeleton, where, layers, method, found)
    config.quantization_config = described.to_dict()
    options = {key: value for key, value in options.items() if key not in HUB}
    model = type(skeleton).from_pretrained(None, config=config, state_dict=state, **options)
    model.name_or_path = model.config.name_or_path = os.fspath(path)
    vars(model)["_hf_accel_source"] = method
    if model.can_generate():
        try:
            model.generation_config = GenerationConfig.from_pretrained(path, **hub)
        except OSError:
            get_logger(__name__).info("the checkpoint has no generation_config.json")
    return model


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
    read = _reader(method, found)
    state: dict[str, Tensor] = {}
    taken: set[str] = set()
    weights: dict[str, list[str]] = {}
    sizes: dict[str, int] = {}
    ordered: list[str] = []
    schemes: set[str] = set()
    block = int4_block() or 64
    made = weights_of(skeleton, layers)
    for each in logging.tqdm(made, desc=f"read {method}", disable=len(layers) < 100):
        pairs = []
        for parts in each.layers:
            name = " and ".join(parts)
            try:
                tensors = [_tensors(layer, where, method, taken) for layer in parts]
                layer = joined([read(each_part, each.part_shape) for each_part in tensors])
                scheme, codes, scales, order = _packed(layer, each.weight.shape, block)
                if order is not None and each.of_experts:
                    raise ValueError("act-order is not supported for experts")
            except ValueError as error:
                raise HfAccelError(f"{name}: {error}") from error
            schemes.add(scheme)
            pairs.append((codes, scales))
        size = 0 if scheme in INT8 else each.weight.shape[1] // len(pairs[0][1])
        if sizes.setdefault(each.module, size) != size:
            raise HfAccelError(f"{each.module}: its weights have groups of {sizes[each.module]} and of {size}")
        key = f"{each.module}.{each.weight.name}"
        state |= dict(
            zip((key, f"{key}_scales"), _stacked(pairs, scheme) if each.of_experts else pairs[0], strict=True)
        )
        if order is not None:
            state[f"{key}_order"] = order
            ordered.append(each.module)
    for module, size in sizes.items():
        weights.setdefault(str(size), []).append(module)
    if len(schemes) > 1:
        raise HfAccelError(f"the checkpoint mixes {', '.join(sorted(schemes))}, which one model cannot hold")
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


def _reader(method: str, found: dict[str, Any]) -> Callable[[dict[str, Tensor], tuple[int, int]], Any]:
    """How to read one layer."""
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


def _packed(layer: Any, shape: tuple[int, int], block: int) -> tuple[str, Tensor, Tensor, Tensor | None]:
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
