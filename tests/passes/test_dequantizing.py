"""`model.dequantize()` gives a model of ordinary classes that computes what the quantized one does."""

import pytest
import torch
import transformers
from cases import entry, logits, prompt, tiny
from fingerprint import fingerprint
from torch import nn

from hf_accel_patch import HfAccelConfig, NotReversible, Quantize, load, patch, report, unpatch
from hf_accel_patch.ops.modules import QuantizedExperts, QuantizedModule

FAMILIES = ("llama", "gpt2", "gemma2", "mixtral", "falcon_mqa", "gpt_oss")
BARE = {"attention": False, "linear": False, "cache": False}


BFLOAT16 = 0.15  # of the standard deviation: activations of the quantized model are rounded to it, layer by layer


def with_weights_of(stock, quantized):
    """A stock model with the weights that a quantized one stands for, one by one."""
    for name, module in quantized.named_modules():
        if isinstance(module, QuantizedExperts):
            held = stock.get_submodule(name)._parameters
            for key in module.specs:
                dense = [module.dequantize_expert(key, e, torch.float32) for e in range(len(held[key]))]
                held[key] = nn.Parameter(torch.stack([d.T if module.is_transposed else d for d in dense]))
        elif isinstance(module, QuantizedModule):
            stock.get_submodule(name)._parameters["weight"] = nn.Parameter(module.dequantize(torch.float32))
    return stock


def reloaded(model, folder):
    model.save_pretrained(folder)
    return transformers.AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("scheme", ("int8", "int4", "nf4"))
@pytest.mark.parametrize("family", FAMILIES)
def test_it_computes_the_same_in_ordinary_classes(family, scheme, tmp_path):
    model, stock = tiny(family), tiny(family)
    patch(model, quantize=scheme, **BARE)
    expected, rounded = logits(model, prompt()), logits(with_weights_of(tiny(family), model), prompt())
    assert model.dequantize() is model
    assert not any(isinstance(module, QuantizedModule) for module in model.modules())
    assert [type(module) for module in model.modules()] == [type(module) for module in stock.modules()]
    theirs = {name: (value.shape, value.dtype) for name, value in stock.state_dict().items()}
    assert {name: (value.shape, value.dtype) for name, value in model.state_dict().items()} == theirs
    shared = lambda each: len({id(parameter) for parameter in each.parameters()})  # noqa: E731
    assert shared(model) == shared(stock)
    found = logits(model, prompt())
    assert torch.equal(found, rounded) and not torch.equal(found, logits(stock, prompt()))
    assert (found - expected).std() < BFLOAT16 * expected.std()
    again = reloaded(model, tmp_path / "dense")
    assert torch.equal(logits(again, prompt()), found)
    assert "quantization_config" not in (tmp_path / "dense" / "config.json").read_text()


def test_the_weights_are_those_of_the_codes():
    model = patch(tiny("llama"), quantize="int4", **BARE)
    name, module = next((n, m) for n, m in model.named_modules() if isinstance(m, QuantizedModule))
    expected = module.dequantize(torch.float32)
    model.dequantize()
    module = model.get_submodule(name)
    assert type(module) is nn.Linear and torch.equal(module.weight, expected) and module.weight.requires_grad


def test_another_dtype():
    model = patch(tiny("llama"), quantize="int8", **BARE)
    model.dequantize(torch.bfloat16)
    assert model.lm_head.weight.dtype is torch.bfloat16


def test_the_report_says_so():
    model = patch(tiny("llama"), quantize="int4")
    held = entry(report(model).to_dict(), "quantize")
    model.dequantize()
    row = entry(report(model).to_dict(), "quantize")
    assert "now" not in held and row["now"] == "dequantized"
    assert row["bytes_after"] == row["bytes_before"] > held["bytes_after"]


def test_undo_brings_back_originals_that_were_kept():
    model = tiny("gemma2")
    before = fingerprint(model)
    patch(model, quantize=Quantize("int4", originals="keep"))
    model.dequantize()
    assert fingerprint(model) != before
    assert fingerprint(unpatch(model)) == before


def test_undo_of_discarded_originals_reads_them_again(tmp_path):
    tiny("llama").save_pretrained(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    patch(model, quantize="int4")
    model.dequantize()
    with pytest.raises(NotReversible):
        unpatch(model)
    after = unpatch(model, reload=True).state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("how", ("load", "from_pretrained", "checkpoint"))
def test_models_that_came_quantized(how, tmp_path):
    tiny("llama").save_pretrained(tmp_path / "float")
    if how == "load":
        model = load(tmp_path / "float", quantize="int4", **BARE)
    else:
        read = transformers.AutoModelForCausalLM.from_pretrained
        model = read(tmp_path / "float", quantization_config=HfAccelConfig("int4"))
        if how == "checkpoint":
            model = reloaded(model, tmp_path / "codes")
    expected = logits(model, prompt())
    model.dequantize()
    assert not hasattr(model.config, "quantization_config") and not hasattr(model, "hf_quantizer")
    assert (logits(model, prompt()) - expected).std() < BFLOAT16 * expected.std()
    again = reloaded(model, tmp_path / "dense")
    assert torch.equal(logits(again, prompt()), logits(model, prompt()))


def test_a_float_model_is_refused():
    model = patch(tiny("llama"), quantize="int4")
    model.dequantize()
    with pytest.raises(ValueError, match="holds no quantized weights"):
        model.dequantize()


def test_it_trains():
    model = patch(tiny("llama"), quantize="int4", **BARE).dequantize()
    model(input_ids=prompt(), labels=prompt()).loss.backward()
    assert model.model.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0
    frozen = patch(tiny("llama").requires_grad_(False), quantize="int4", **BARE).dequantize()
    assert not any(parameter.requires_grad for parameter in frozen.parameters())


@pytest.mark.parametrize("before", [True, False])
def test_hooks_of_accelerate_that_came_and_went(before):
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_submodules

    def come_and_go(model):
        for module in model.modules():
            if isinstance(module, nn.Linear):
                add_hook_to_module(module, AlignDevicesHook(execution_device="cpu"))
        remove_hook_from_submodules(model)

    model = tiny("llama")
    if before:
        come_and_go(model)
    patch(model, quantize="int8", **BARE)
    if not before:
        come_and_go(model)
    expected = logits(model, prompt())
    model.dequantize()
    assert (logits(model, prompt()) - expected).std() < BFLOAT16 * expected.std()


def test_a_model_that_load_has_read_says_so_too(tmp_path):
    tiny("llama").save_pretrained(tmp_path)
    model = load(tmp_path, quantize="int4")
    model.dequantize()
    row = entry(report(model).to_dict(), "quantize")
    assert row["now"] == "dequantized" and row["bytes_after"] == row["bytes_before"]


def test_it_can_be_uptrained():
    from hf_accel_patch import uptrain

    model = patch(tiny("llama"), quantize="int8", **BARE).dequantize()
    ids = torch.randint(0, 256, (4, 64))
    assert uptrain(model, [ids], steps=1, window=32, progress=False).loss_after
