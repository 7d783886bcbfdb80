"""transformers.Trainer on a patched model: the steps that stock takes."""

import pytest
import torch
from programs import LAYERS, bundled, trained
from transformers import AutoModelForCausalLM

from hf_accel_patch import report, unpatch

STEPS = 3


@pytest.mark.parametrize("checkpointing", (False, True))
def test_a_step_is_that_of_stock(stock, ours, windows, tmp_path, at_work, checkpointing):
    """Loss and update of one step of gradient descent, which is linear in the gradients."""
    before = {name: parameter.detach().clone() for name, parameter in stock.named_parameters()}
    asked = dict(max_steps=1, optim="sgd", learning_rate=0.5, gradient_checkpointing=checkpointing)
    _, expected = trained(stock, windows, tmp_path, **asked)
    _, found = trained(ours, windows, tmp_path, **asked)
    assert found == pytest.approx(expected, rel=1e-4) and len(found) == 1
    at_work(ours, calls=(2 if checkpointing else 1) * LAYERS)
    for (name, theirs), (same, parameter) in zip(stock.named_parameters(), ours.named_parameters(), strict=True):
        assert name == same
        update = (theirs - before[name]).detach()
        assert update.norm() > 0, name
        assert (parameter - theirs).norm() < 1e-4 * update.norm(), name


def test_steps_of_adamw(stock, ours, windows, tmp_path, at_work):
    asked = dict(learning_rate=1e-3, gradient_checkpointing=True)
    _, expected = trained(stock, windows, tmp_path, **asked)
    _, found = trained(ours, windows, tmp_path, **asked)
    assert found == pytest.approx(expected, rel=1e-3) and len(found) == STEPS
    at_work(ours, calls=2 * LAYERS * STEPS)


def test_a_trained_model_is_saved_evaluated_and_unpatched(ours, windows, tmp_path):
    """Parameters that were trained keep their values when the patch comes off."""
    trainer, _ = trained(ours, windows, tmp_path, learning_rate=1e-3)
    measured = trainer.evaluate(windows)["eval_loss"]
    trainer.save_model(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    assert not report(again).to_dict()["patched"]
    unpatch(ours)
    ids = torch.tensor([each["input_ids"] for each in windows])
    for model in (again, ours.eval()):
        with torch.no_grad():
            assert model(ids, labels=ids).loss.item() == pytest.approx(measured, rel=1e-3)
    before = dict(bundled().named_parameters())
    assert not [name for name, parameter in ours.named_parameters() if torch.equal(parameter, before[name])]
