"""What a checkpoint of a quantized model says of itself, and `save_pretrained` for one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.quantizers.auto import AutoHfQuantizer

from hf_accel_patch.errors import HfAccelError
from hf_accel_patch.journal import Journal
from hf_accel_patch.ops.modules import QuantizedModule
from hf_accel_patch.ops.packing import INT8
from hf_accel_patch.passes.dequantizing import Dequantizing
from hf_accel_patch.passes.grouped import is_grouped, shared_of

METHOD = __name__.partition(".")[0]  # the value of `quant_method`, under which transformers finds our quantizer


def described(model: PreTrainedModel) -> dict[str, Any]:
    """The `quantization_config` of this model: every quantized module, by group size, tied ones together; and how many
    key/value heads it has, where its class knows none."""
    grouped = {} if (shared := shared_of(model)) is None else {"kv_heads": shared}
    by_size: dict[str, list[list[str]]] = {}
    tied: dict[int, list[str]] = {}
    schemes, blocks, ordered = set(), {0}, []
    for name, module in model.named_modules():
        if not isinstance(module, QuantizedModule):
            continue
        codes, scales, spec = module.held(next(iter(module.specs)))
        schemes.add(spec.scheme)
        ordered += [name] if "weight_order" in module._buffers else []
        if id(module.specs) in tied:
            tied[id(module.specs)].append(name)
            continue
        size = 0
        if spec.scheme not in INT8:
            size = spec.shape[1] // scales.shape[0 if codes.ndim == 3 else 1]
            blocks.add(codes.shape[-1] * 2)
        tied[id(module.specs)] = [name]
        by_size.setdefault(str(size), []).append(tied[id(module.specs)])
    if grouped and not schemes:
        return {"quant_method": METHOD, **grouped}
    if len(schemes) != 1 or len(blocks) > 2:
        raise HfAccelError(f"a checkpoint holds one scheme in one layout, and this model {sorted(schemes)}, {blocks}")
    weights = {size: [each[0] if len(each) == 1 else each for each in names] for size, names in by_size.items()}
    found = {"quant_method": METHOD, "scheme": schemes.pop(), "block": max(blocks)}
    return found | {"weights": weights, "ordered": ordered} | grouped


class Saving:
    """`save_pretrained` of a quantized model, or of one with fewer key/value heads than its class knows: the weights,
    and a `quantization_config` that says how to read them. An instance, because copies and pickles of the model have to
    take one of their own along."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def __call__(
        self,
        save_directory: Any,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        model = self.model
        quantized = any(isinstance(module, QuantizedModule) or is_grouped(module) for module in model.modules())
        save = type(model).save_pretrained
        if not quantized or getattr(model, "_hf_peft_config_loaded", False):  # then it saves the adapter alone
            save(model, save_directory, is_main_process, state_dict, **kwargs)
            return
        with _as_quantized(model, state_dict):  # the original format may cut experts apart, which codes cannot be
            save(model, save_directory, is_main_process, **kwargs | {"save_original_format": False})


class Resizing:
    """`resize_token_embeddings` of a model whose table or head is quantized."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def __call__(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> Any:
        model = self.model
        tables = (model.get_input_embeddings(), model.get_output_embeddings())
        same = new_num_tokens in (None, tables[0].weight.shape[0]) and not kwargs.get("pad_to_multiple_of")
        if not same and any(isinstance(table, QuantizedModule) for table in tables):
            raise HfAccelError(
                "quantized embeddings and heads cannot be resized", "unpatch, resize, patch; or quantize all but them"
            )
        return type(model).resize_token_embeddings(model, new_num_tokens, *args, **kwargs)


def make_savable(model: PreTrainedModel, journal: Journal) -> None:
    """Give a model that is going to have quantized weights the methods that it needs then."""
    for name, kind in (("save_pretrained", Saving), ("resize_token_embeddings", Resizing)):
        if not isinstance(vars(model).get(name), kind):
            journal.set_attribute(model, name, kind(model))
    if not isinstance(vars(model).get("dequantize"), Dequantizing):
        journal.set_attribute(model, "dequantize", Dequantizing(model, journal))


@contextmanager
def _as_quantized(model: PreTrainedModel, state_dict: dict[str, Tensor] | None) -> Iterator[None]:
    """Inside, transformers finds a quantizer and a configuration on the model."""
    quantizer = AutoHfQuantizer.from_config(described(model))
    quantizer.given = state_dict
    places = (vars(model), "hf_quantizer"), (vars(model.config), "quantization_config")
    before = [(place, key, place[key]) for place, key in places if key in place]
    for config in (place[key] for place, key in places[1:] if key in place):
        quantizer.quantization_config.take_options(config)
    vars(model)["hf_quantizer"], model.config.quantization_config = quantizer, quantizer.quantization_config
    try:
        yield
    finally:
        for place, key in places:
            place.pop(key, None)
        for place, key, value in before:
            place[key] = value
