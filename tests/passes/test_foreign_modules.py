"""bitsandbytes' modules in a loaded model are what `BitsAndBytesConfig` would have loaded."""

import copy

import pytest
import torch
from cases import entry, greedy, logits, prompt, tiny
from fingerprint import fingerprint
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from hf_accel_patch import NotReversible, Quantize, UnsupportedModel, load, patch, plan, report, unpatch
from hf_accel_patch.passes import foreign_modules

THEIRS = {"nf4": "Linear4bit", "llm.int8": "Linear8bitLt"}


def asked(scheme, **options):
    return {"quantize": Quantize(scheme, backend="bitsandbytes", **options), "attention": False, "cache": False}


def names(model, scheme):
    return [name for name, module in model.named_modules() if type(module).__name__ == THEIRS[scheme]]


def config_of(scheme, model):
    if scheme == "llm.int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=model.dtype)


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_it_has_two_schemes(scheme):
    with pytest.raises(ValueError, match=r"nf4 in groups of 64, and llm\.int8"):
        Quantize(scheme, backend="bitsandbytes")


def test_without_the_package_nothing_is_touched(monkeypatch):
    monkeypatch.setattr(foreign_modules, "find_spec", lambda _: None)
    model = tiny("llama")
    before = fingerprint(model)
    with pytest.raises(UnsupportedModel, match="needs bitsandbytes, which is not installed\n\nhint: pip install"):
        patch(model, **asked("nf4"))
    assert fingerprint(model) == before


def test_loading_with_it_is_refused(tmp_path):
    tiny("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="BitsAndBytesConfig"):
        load(tmp_path, quantize=Quantize("nf4", backend="bitsandbytes"))


@pytest.mark.parametrize("scheme", THEIRS)
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "mixtral"])
def test_a_model_is_as_they_load_it(family, scheme, tmp_path):
    """All but the head, which they leave as it is."""
    pytest.importorskip("bitsandbytes")
    model = tiny(family).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "float")
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "float", dtype=torch.bfloat16, quantization_config=config_of(scheme, model)
    )
    planned = entry(plan(model, **asked(scheme, skip=("lm_head", "gate"))).to_dict(), "quantize")
    patch(model, **asked(scheme, skip=("lm_head", "gate")), linear=False)
    row = entry(report(model).to_dict(), "quantize")
    repaired = row["bytes_before"] - planned["bytes_before"]  # frequencies, in float32 again
    assert row["bytes_after"] - repaired == planned["bytes_after"] < planned["bytes_before"]
    assert row["backend"].startswith("bitsandbytes 0.")
    assert set(names(model, scheme)) <= set(names(theirs, scheme)) and len(names(model, scheme)) > 4
    if names(model, scheme) == names(theirs, scheme):
        assert torch.equal(logits(model, prompt()), logits(theirs, prompt()))
        assert torch.equal(greedy(model, prompt()), greedy(theirs, prompt()))
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert names(again, scheme) == names(model, scheme)
    assert torch.equal(logits(again, prompt()), logits(model, prompt()))


@pytest.mark.parametrize("scheme", THEIRS)
def test_it_comes_off(scheme, tmp_path):
    pytest.importorskip("bitsandbytes")
    model = tiny("qwen2")
    before = fingerprint(model)
    patch(model, **asked(scheme, originals="keep"))
    assert names(model, scheme)
    assert fingerprint(unpatch(model)) == before
    model.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    held = {name: value.clone() for name, value in model.state_dict().items()}
    patch(model, **asked(scheme))
    with pytest.raises(NotReversible):
        unpatch(model)
    after = unpatch(model, reload=True).state_dict()
    assert list(after) == list(held) and all(torch.equal(after[name], held[name]) for name in held)
    assert not names(model, scheme) and not hasattr(model, "hf_quantizer")


def test_a_copy_is_a_model_of_its_own():
    pytest.importorskip("bitsandbytes")
    model = patch(tiny("llama"), **asked("nf4", originals="keep"))
    other = copy.deepcopy(model)
    expected = logits(other, prompt())
    unpatch(model)
    assert not names(model, "nf4") and torch.equal(logits(other, prompt()), expected)
    unpatch(other)
    assert torch.equal(logits(other, prompt()), logits(model, prompt()))


def test_adapters_train_on_it():
    pytest.importorskip("bitsandbytes")
    peft = pytest.importorskip("peft")
    model = patch(tiny("llama"), **asked("nf4", skip=("lm_head",)))
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    assert any("bnb" in type(module).__module__ for module in wrapped.modules())
    wrapped(input_ids=prompt(), labels=prompt()).loss.backward()
    gradients = [parameter.grad for name, parameter in wrapped.named_parameters() if "lora" in name]
    assert gradients and all(gradient.abs().sum() > 0 for gradient in gradients)


def test_what_it_has_no_module_for_is_named():
    pytest.importorskip("bitsandbytes")
    skipped = entry(plan(tiny("mixtral"), **asked("nf4")).to_dict(), "quantize")["skipped"]
    assert any("no module for MixtralExperts" in each["reason"] for each in skipped)
    skipped = entry(plan(tiny("gemma2"), **asked("nf4")).to_dict(), "quantize")["skipped"]
    assert any("share a weight" in each["reason"] for each in skipped)
