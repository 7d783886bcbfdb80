"""Calibration: inputs are observed as they are, and GPTQ loses less than rounding to nearest."""

from pathlib import Path

import pytest
import torch
import transformers
from cases import logits, prompt, tiny
from fingerprint import fingerprint
from torch import nn

import hf_accel_patch
from hf_accel_patch import HfAccelError, Quantize, patch, patched, report, unpatch
from hf_accel_patch.ops.gptq import quantize_gptq
from hf_accel_patch.ops.modules import QuantizedModule
from hf_accel_patch.ops.packing import unpack_codes
from hf_accel_patch.passes import calibrate
from hf_accel_patch.texts import held_out_text

MODEL = Path(hf_accel_patch.__file__).parent / "models" / "code-llama-8m"
OFF = {"attention": False, "linear": False}


def token_ids(count=6, length=40):
    return torch.randint(0, 256, (count, length), generator=torch.Generator().manual_seed(7))


def inputs_of(model, name, ids):
    seen = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        for row in ids:
            model(row[None])
    hook.remove()
    return torch.cat(seen)


@pytest.mark.parametrize("family", ("llama", "gpt2", "falcon_mqa"))
@pytest.mark.parametrize("moments_bytes", (1 << 30, 1))
def test_layers_are_rounded_for_the_inputs_that_they_see(family, moments_bytes, monkeypatch):
    """With all layers observed at once these are those of the float model; one by one, those of the quantized layers
    before it."""
    monkeypatch.setattr(calibrate, "MOMENTS_BYTES", moments_bytes)
    ids, model, reference = token_ids(), tiny(family), tiny(family)
    patch(model, quantize=Quantize("int4", calibrate=[ids], skip=("lm_head",)), **OFF)
    names = [name for name, module in model.named_modules() if isinstance(module, QuantizedModule)]
    for name in (names[0], names[-1]):
        seen = inputs_of(model if moments_bytes == 1 else reference, name, ids).float()
        module, weight = model.get_submodule(name), reference.get_submodule(name).weight.detach()
        dense = weight.T if module.transposed else weight
        codes, *_ = quantize_gptq(dense, seen.T @ seen, 64)
        ours = unpack_codes(module._buffers["weight"])[: len(dense)]
        assert (ours == codes).double().mean() > (0.999 if moments_bytes > 1 or name == names[0] else 0.9)


def test_it_loses_less_on_a_trained_model():
    text = held_out_text()
    half = len(text) // 2
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    ids = torch.tensor(tokenizer(text[half:], verbose=False)["input_ids"][: 16 * 256]).view(16, 256)
    model = transformers.AutoModelForCausalLM.from_pretrained(MODEL)

    @torch.no_grad()
    def predictions():
        return torch.cat([model(row[None]).logits.log_softmax(-1) for row in ids])

    stock, losses = predictions(), {}
    texts = [text[start : start + 1500] for start in range(0, half, half // 24)]
    for label, options in {"fitted": {}, "calibrated": {"calibrate": texts}}.items():
        with patched(model, quantize=Quantize("int4", skip=("lm_head",), **options), **OFF):
            losses[label] = (stock.exp() * (stock - predictions())).sum(-1).mean().item()
    assert 0 < losses["calibrated"] < 0.6 * losses["fitted"]


def test_what_cannot_be_calibrated_is_fitted_and_the_model_is_left_as_it_was():
    """Experts; their moments would be larger than they are."""
    model = tiny("mixtral")
    model.train()
    ids = token_ids(2)
    patch(model, quantize=Quantize("int4", calibrate=[ids], originals="keep"))
    plain = patch(tiny("mixtral"), quantize="int4")
    assert all(module.training for module in model.modules())
    experts = "model.layers.0.mlp.experts"
    ours, fitted = (each.get_submodule(experts).held("down_proj")[0] for each in (model, plain))
    assert torch.equal(ours, fitted)
    row = next(row for row in report(model).to_dict()["passes"] if row["pass"] == "quantize")
    assert row["calibrated"] == "GPTQ, but for experts"
    unpatch(model)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_tied_table_is_rounded_for_the_head():
    ids, model, reference = token_ids(), tiny("gemma2"), tiny("gemma2")
    patch(model, quantize=Quantize("int4", calibrate=[ids]), **OFF)
    seen = inputs_of(reference, "lm_head", ids).float()
    codes, *_ = quantize_gptq(reference.lm_head.weight.detach(), seen.T @ seen, 32)
    held = model.lm_head._buffers["weight"]
    assert (unpack_codes(held)[: len(codes)] == codes).double().mean() > 0.999
    assert model.get_input_embeddings()._buffers["weight"] is held


def test_an_exception_while_texts_are_read_leaves_no_trace(monkeypatch):
    model = tiny("llama")
    before = fingerprint(model)
    monkeypatch.setattr(calibrate, "quantize_gptq", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        patch(model, quantize=Quantize("int4", calibrate=[token_ids()], originals="keep"))
    assert fingerprint(model) == before


def test_texts_need_a_tokenizer():
    with pytest.raises(HfAccelError, match="does not know its tokenizer"):
        patch(tiny("llama"), quantize=Quantize("int4", calibrate=["some text"]))
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(MODEL))
    patch(model, quantize=Quantize("int4", calibrate=["def f(x):\n    return x\n" * 20], tokenizer=tokenizer))
    assert isinstance(model.model.layers[0].mlp.up_proj, QuantizedModule)


@pytest.mark.parametrize("ids", (torch.tensor([[3, 256]]), torch.tensor([-1, 2])))
def test_token_ids_beyond_the_vocabulary_are_refused(ids):
    model = tiny("llama")
    with pytest.raises(ValueError, match=r"not in 0\.\.255"):
        patch(model, quantize=Quantize("int4", calibrate=[ids]))
    assert type(model.lm_head) is nn.Linear


def test_the_same_texts_are_the_same_options():
    ids = token_ids()
    assert Quantize("int4", calibrate=[ids]) == Quantize("int4", calibrate=[ids.clone()])
    assert Quantize("int4", calibrate=[ids]) != Quantize("int4", calibrate=[ids[:1]])
    model = patch(tiny("llama"), quantize=Quantize("int4", calibrate=[ids]))
    expected = logits(model, prompt())
    assert torch.equal(logits(patch(model, quantize=Quantize("int4", calibrate=[ids])), prompt()), expected)
