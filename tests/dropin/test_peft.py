"""LoRA adapters of PEFT, trained by Trainer on a patched model, saved, loaded and merged."""

import pytest
import torch
from programs import LAYERS, bundled, trained

from hf_accel_patch import patch, report

peft = pytest.importorskip("peft")
LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}


def adapted(model):
    torch.manual_seed(3)
    return peft.get_peft_model(model, peft.LoraConfig(**LORA))


def answers(model, tokenizer):
    inputs = tokenizer("def read_lines(path):\n", return_tensors="pt")
    with torch.no_grad():
        return model.generate(**inputs, max_new_tokens=12, do_sample=False), model(**inputs).logits


@pytest.mark.parametrize("order", ("patched, then adapted", "adapted, then patched"))
def test_exact(windows, tokenizer, tmp_path, at_work, order):
    """Losses, adapters and what they answer are those of stock."""
    stock = adapted(bundled())
    ours = adapted(patch(bundled())) if order == "patched, then adapted" else patch(adapted(bundled()))
    asked = dict(learning_rate=5e-3, gradient_checkpointing=True, optim="sgd")
    _, expected = trained(stock, windows, tmp_path, **asked)
    _, found = trained(ours, windows, tmp_path, **asked)
    assert found == pytest.approx(expected, rel=1e-4) and len(found) == 3
    at_work(ours, calls=LAYERS * 3)
    theirs = {name: p for name, p in stock.named_parameters() if "lora_B" in name}
    assert len(theirs) == 3 * LAYERS and all(p.abs().max() > 0 for p in theirs.values())
    for name, parameter in theirs.items():
        assert (ours.get_parameter(name) - parameter).norm() < 1e-3 * parameter.norm(), name
    (tokens, logits), (same, near) = answers(stock.eval(), tokenizer), answers(ours.eval(), tokenizer)
    assert torch.equal(tokens, same) and (logits - near).abs().max() < 1e-3 * logits.std()


@pytest.mark.parametrize("quantize", (None, "int4"))
def test_an_adapter_is_saved_and_loaded(windows, tokenizer, tmp_path, at_work, quantize):
    """As in QLoRA: the weights below stay what they are. What was trained on a patched model is a stock adapter."""
    ours = adapted(patch(bundled(), quantize=quantize))
    codes = {name: tensor.clone() for name, tensor in ours.named_buffers()}
    _, losses = trained(ours, windows, tmp_path, learning_rate=1e-2, max_steps=6)
    assert losses[-1] < losses[0]
    at_work(ours, *(("quantize",) if quantize else ()), calls=LAYERS * 6)
    assert all(torch.equal(tensor, codes[name]) for name, tensor in ours.named_buffers())
    expected = answers(ours.eval(), tokenizer)
    ours.save_pretrained(tmp_path / "adapter")

    again = peft.PeftModel.from_pretrained(patch(bundled(), quantize=quantize), tmp_path / "adapter")
    found = answers(again, tokenizer)
    assert torch.equal(found[0], expected[0]) and torch.allclose(found[1], expected[1], atol=1e-4)
    with again.disable_adapter():
        assert not torch.allclose(answers(again, tokenizer)[1], expected[1], atol=1e-2)

    stock = peft.PeftModel.from_pretrained(bundled(), tmp_path / "adapter")
    near = (answers(stock, tokenizer)[1] - expected[1]).std() / expected[1].std()
    assert near < (0.2 if quantize else 1e-4)


def test_merging(windows, tokenizer, tmp_path):
    """Into float weights, with exact passes on: the merged model is still patched, and answers as the adapter did."""
    ours = adapted(patch(bundled()))
    trained(ours, windows, tmp_path, learning_rate=1e-2)
    tokens, logits = answers(ours.eval(), tokenizer)
    merged = ours.merge_and_unload()
    assert report(merged).to_dict()["patched"]
    found, near = answers(merged, tokenizer)
    assert torch.equal(found, tokens) and torch.allclose(near, logits, atol=1e-3)
