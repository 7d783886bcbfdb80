"""Adapters on quantized weights, as QLoRA trains them."""

import pytest
import torch
from cases import logits, prompt, tiny
from torch import nn

from hf_accel_patch import HfAccelConfig, Quantize, patch
from hf_accel_patch.ops.modules import QuantizedModule

peft = pytest.importorskip("peft")
LORA = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False}


def adapted(model):
    torch.manual_seed(3)
    return peft.get_peft_model(model, peft.LoraConfig(**LORA, task_type="CAUSAL_LM"))


def with_dense(model, quantized):
    """The stock model with the weights that the codes stand for."""
    for name, module in quantized.named_modules():
        if isinstance(module, QuantizedModule):
            model.get_submodule(name)._parameters["weight"] = nn.Parameter(module.dequantize(torch.float32))
    return model


@pytest.mark.parametrize("scheme", ("int8", "int4", "nf4", "llm.int8"))
@pytest.mark.parametrize("family", ("llama", "gpt2", "falcon_mqa"))
def test_gradients_are_those_of_the_weights_that_the_codes_stand_for(family, scheme):
    quantized = patch(tiny(family), quantize=scheme)
    stock = with_dense(tiny(family), quantized)
    grads = []
    for model in (adapted(quantized), adapted(stock)):
        model(input_ids=prompt(), labels=prompt()).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if "lora_" in name})
    assert grads[0] and grads[0].keys() == grads[1].keys()
    bound = 0.2 if scheme == "llm.int8" else 0.1  # embeddings are bfloat16; before the first adapter, 8-bit activations
    for name, ours in grads[0].items():
        assert (ours - grads[1][name]).norm() < bound * grads[1][name].norm(), name


@pytest.mark.parametrize("checkpointed", (False, True))
def test_an_adapter_learns_and_the_codes_stay(checkpointed):
    model = adapted(patch(tiny("llama"), quantize="int4"))
    if checkpointed:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    model.train()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    losses = []
    for _ in range(12):
        loss = model(input_ids=prompt(), labels=prompt()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


def test_the_way_back_keeps_codes_not_weights():
    """What autograd saves for one layer is smaller than its dense weight."""
    layer = patch(tiny("llama"), quantize="int4").model.layers[0].mlp.up_proj
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(torch.randn(2, 64, requires_grad=True)).sum().backward()
    assert saved and sum(t.numel() * t.element_size() for t in saved) < 0.5 * 4 * layer.weight.numel()


def test_an_adapter_comes_back_on_a_quantized_checkpoint(tmp_path):
    from transformers import AutoModelForCausalLM

    tiny("llama").save_pretrained(tmp_path / "float")
    model = adapted(AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=HfAccelConfig("int4")))
    expected = logits(model, prompt())
    model.save_pretrained(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=HfAccelConfig("int4"))
    again = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert torch.allclose(logits(again, prompt()), expected, atol=1e-5)


def test_a_trainable_copy_of_a_head_stays_what_it_is():
    model = peft.get_peft_model(
        tiny("llama"), peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    )
    patch(model, quantize="int4")
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert any("lm_head.modules_to_save.default.weight" in name for name in trained)


def test_a_trainable_copy_of_a_head_that_is_left_out():
    """Of codes it would train nothing."""
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = peft.get_peft_model(patch(tiny("llama"), quantize=Quantize("int4", skip=("lm_head",))), config)
    assert [name for name, p in model.named_parameters() if p.requires_grad and "modules_to_save" in name]


def test_what_an_adapter_froze_stays_frozen_in_floats():
    model = adapted(patch(tiny("llama"), quantize="int4"))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained and all("lora" in name for name in trained)
    model.base_model.model.dequantize()
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trained


def test_merging_into_codes_is_refused_and_changes_nothing():
    model = adapted(patch(tiny("llama"), quantize="int4"))
    expected = logits(model, prompt())
    for safe in (False, True):
        with pytest.raises(RuntimeError, match="a quantized weight cannot be changed"):
            model.merge_adapter(safe_merge=safe)
    assert torch.equal(logits(model, prompt()), expected)
