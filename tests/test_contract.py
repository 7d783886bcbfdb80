"""Every pass x every family: the plan is pure, the pass runs, it is exact where it says so, it comes off.

Exact passes must agree with stock up to rounding. Quantized models must be smaller, and as near to stock as random
errors of the scheme's size.
"""

from __future__ import annotations

import copy
import subprocess
import sys
import types
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import FAMILIES, PASSES, REFUSED, entry, logits, options, prompt, relative_error, tiny
from conftest import Outputs, outputs
from fingerprint import changes, describe, fingerprint, shared_state
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_accel_patch import AlreadyPatched, NotReversible, patch, plan, report, unpatch
from hf_accel_patch.journal import Journal

Stock = Callable[[str], Outputs]

EXACT = 1e-4  # of the logits' standard deviation: float32 rounding alone is about 1e-5 on these models
ROUNDING = {"int8": 0.01, "int4": 0.1, "nf4": 0.1}  # of a weight's deviation: steps of 6 / 254, 5 / 15, by sqrt(12)
AMPLIFIED = 2.0  # times what random errors of that size do: activations are rounded to bfloat16 as well
FARTHEST = 0.7  # one minus the cosine of the logits with stock; unrelated logits are at 1
LAYERS = 4

every_family = pytest.mark.parametrize("family", FAMILIES)
every_pair = pytest.mark.parametrize(
    "family, label",
    [(family, label) for family in FAMILIES for label in PASSES if family not in REFUSED.get(label, ())],
)
quantized = pytest.mark.parametrize("label", [label for label in PASSES if "quantize" in PASSES[label]])


class Interrupted(Exception):
    """Raised in the middle of a patch by a test."""


def untouched(before: dict[str, object], model: PreTrainedModel) -> None:
    found = changes(before, fingerprint(model))
    assert not found, describe(found)


def distance(ours: Outputs, stock: Outputs, name: str) -> float:
    """One minus the cosine similarity of each position's logits, taken around their mean; the mean over positions."""
    a, b = (getattr(each, name).double().flatten(0, 1) for each in (ours, stock))
    real = b.abs().sum(-1) > 0  # padded positions are zero
    a, b = (x[real] - x[real].mean(-1, keepdim=True) for x in (a, b))
    return 1 - nn.functional.cosine_similarity(a, b, dim=-1).mean().item()


@cache
def noisy(family: str, label: str) -> Outputs:
    """What stock answers when its linear weights have random errors as large as this scheme's. Random weights and
    routers amplify errors, by a factor that differs from family to family."""
    model, generator = tiny(family), torch.Generator().manual_seed(1)
    weights = {module.weight for module in model.modules() if isinstance(module, nn.Linear | Conv1D)}
    weights |= {parameter for parameter in model.parameters() if parameter.ndim == 3}  # stacked experts
    with torch.no_grad():
        for weight in weights:
            error = torch.empty(weight.shape).normal_(generator=generator)
            weight += ROUNDING[label] * weight.std() * error
    return outputs(model)


def assert_quantized(model: PreTrainedModel, family: str, label: str, stock: Outputs) -> None:
    """Near stock, as near as the rounding of the scheme lets it be, and not equal to it."""
    ours = outputs(model)
    for name in ("alone", "padded", "long"):
        found, allowed = distance(ours, stock, name), AMPLIFIED * distance(noisy(family, label), stock, name)
        assert 0 < found <= min(allowed, FARTHEST), f"{name}: {found:.2g} of {allowed:.2g}"


def interrupt(monkeypatch: pytest.MonkeyPatch, verbs: list[str], at: int | None) -> list[str]:
    """Let the `at`-th call of any of the journal's verbs raise, every second time after it has written. Returns the
    calls so far, as they come."""
    calls: list[str] = []

    def wrapped(name: str, verb: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Journal, *args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            number = len(calls) - 1
            if number == at and number % 2 == 0:
                raise Interrupted(name)
            answer = verb(self, *args, **kwargs)
            if number == at:
                raise Interrupted(name)
            return answer

        return call

    for name in verbs:
        monkeypatch.setattr(Journal, name, wrapped(name, vars(Journal)[name]))
    return calls


def verbs() -> list[str]:
    """The journal's public ways of writing."""
    return [name for name, value in vars(Journal).items() if callable(value) and name[0] != "_" and name != "undo"]


@every_pair
def test_plan_is_pure(family: str, label: str) -> None:
    model = tiny(family)
    before, shared = fingerprint(model), shared_state(model)
    planned = plan(model, **options(label)).to_dict()
    untouched(before, model)
    assert not changes(shared, shared_state(model))
    ran = report(patch(model, **options(label))).to_dict()
    states = [[(row["pass"], row.get("reason")) for row in each["passes"]] for each in (planned, ran)]
    assert states[0] == states[1], "the plan is not what was done"


@every_family
def test_exact_passes_run_and_agree_with_stock(family: str, stock: Stock, attention_calls: list[type]) -> None:
    model, expected = tiny(family), stock(family)
    logits(model, prompt())
    assert not attention_calls, "an unpatched model calls our attention"
    kind, shared = type(model), shared_state(model)

    assert patch(model) is model and type(model) is kind
    assert all(row["exact"] for row in report(model).to_dict()["passes"])
    assert "reason" not in entry(report(model).to_dict(), "attention")
    logits(model, prompt())
    assert len(attention_calls) == LAYERS, "not every layer calls our attention"

    ours = outputs(model)
    errors = {
        name: relative_error(getattr(ours, name), getattr(expected, name)) for name in ("alone", "padded", "long")
    }
    assert max(errors.values()) <= EXACT, errors
    assert torch.equal(ours.tokens, expected.tokens)
    assert torch.equal(ours.padded_tokens, expected.padded_tokens)
    assert not changes(shared, shared_state(model)), "a patch wrote to what models share"


@every_family
@quantized
def test_quantize_runs(family: str, label: str, stock: Stock) -> None:
    model = tiny(family)
    kind, parameters = type(model), sum(p.numel() for p in model.parameters())
    assert patch(model, **options(label, originals="discard")) is model and type(model) is kind
    said = entry(report(model).to_dict(), "quantize")
    assert "reason" not in said and not said["exact"] and said["scheme"] == label
    assert said["bytes_after"] < said["bytes_before"]
    assert sum(p.numel() for p in model.parameters()) < parameters, "the float weights are still there"
    stored = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in [*model.parameters(), *model.buffers()]}
    assert sum(storage.nbytes() for storage in stored.values()) == said["bytes_after"], "the report counts other bytes"
    assert_quantized(model, family, label, stock(family))


@every_family
@quantized
def test_discarded_originals_refuse_undo(family: str, label: str) -> None:
    model = patch(tiny(family), **options(label, originals="discard"))
    before = fingerprint(model)
    with pytest.raises(NotReversible, match=r"originals='keep'"):
        unpatch(model)
    untouched(before, model)


@every_pair
def test_undo_restores_every_bit(family: str, label: str, stock: Stock) -> None:
    model, expected = tiny(family), stock(family)
    outputs(model)  # whatever stock itself keeps after its first call is there
    before, shared = fingerprint(model), shared_state(model)
    patch(model, **options(label))
    assert changes(before, fingerprint(model)), "the patch changed nothing, so this test proves nothing"
    outputs(model)
    assert unpatch(model) is model
    untouched(before, model)
    assert not changes(shared, shared_state(model))
    after = outputs(model)
    for name in ("alone", "padded", "long", "tokens", "padded_tokens"):
        assert torch.equal(getattr(after, name), getattr(expected, name)), name
    assert unpatch(model) is model  # a second time does nothing
    untouched(before, model)


@every_pair
def test_apply_is_atomic(family: str, label: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(family)
    before = fingerprint(model)
    with monkeypatch.context() as counting:
        calls = interrupt(counting, verbs(), None)
        unpatch(patch(model, **options(label)))
        writes = len(calls)
    assert writes, "the patch writes nothing through the journal"
    for at in sorted({0, 1, writes // 3, writes // 2, writes - 2, writes - 1} & set(range(writes))):
        with monkeypatch.context() as interrupted:
            interrupt(interrupted, verbs(), at)
            with pytest.raises(Interrupted):
                patch(model, **options(label))
        untouched(before, model)
        assert not report(model).to_dict()["patched"]
    patch(model, **options(label))  # and it can still be patched
    assert changes(before, fingerprint(model))


@pytest.mark.parametrize("family", ["llama", "gemma2", "bloom"])
@quantized
def test_interrupted_without_originals_every_weight_is_whole(
    family: str, label: str, stock: Stock, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny(family)
    untied = [
        p for module in model.modules() if isinstance(module, nn.Linear) for p in module.parameters(recurse=False)
    ]
    with monkeypatch.context() as interrupted:
        interrupt(interrupted, ["remove_parameter"], at=4)  # before the fifth weight is taken out
        with pytest.raises(Interrupted):
            patch(model, **options(label, originals="discard"))
    left = {id(parameter) for parameter in model.parameters()}
    assert 0 < sum(id(parameter) not in left for parameter in untied) < len(untied), "it is not in the middle"
    assert "weights are quantized or converted" in report(model).to_dict()["incomplete"]
    assert_quantized(model, family, label, stock(family))
    with pytest.raises(NotReversible):
        unpatch(model)


@every_pair
def test_patching_again(family: str, label: str) -> None:
    model = patch(tiny(family), **options(label))
    before, said = fingerprint(model), report(model).to_dict()
    assert patch(model, **options(label)) is model
    untouched(before, model)
    for other in PASSES:
        if other != label:
            with pytest.raises(AlreadyPatched, match="unpatch"):
                patch(model, **options(other))
    untouched(before, model)
    assert report(model).to_dict() == said


@every_pair
def test_a_deep_copy_lives_on_its_own(family: str, label: str, stock: Stock, attention_calls: list[type]) -> None:
    original = patch(tiny(family), **options(label))
    expected = logits(original, prompt())
    ours = len(attention_calls)
    clone = copy.deepcopy(original)
    shared = {id(t) for t in _tensors(original)} & {id(t) for t in _tensors(clone)}
    assert not shared, "the copy holds tensors of the original"
    assert not _bound(clone) & set(original.modules()), "a method of the copy belongs to the original"
    with torch.no_grad():
        for tensor in _tensors(original):
            tensor.zero_()
    assert not torch.equal(logits(original, prompt()), expected), "the original is not destroyed"
    attention_calls.clear()
    assert torch.equal(logits(clone, prompt()), expected)
    assert len(attention_calls) == ours, "the copy runs other attention than the original"
    assert report(clone).to_dict() == report(original).to_dict()
    assert unpatch(clone) is clone
    assert torch.equal(logits(clone, prompt()), stock(family).alone)
    assert len(attention_calls) == ours, "the copy still calls our attention"


def _bound(model: PreTrainedModel) -> set[nn.Module]:
    """The modules that the functions kept on the model's instances hold on to."""
    kept = [value for module in model.modules() for value in vars(module).values()]
    held = [value.__self__ for value in kept if isinstance(value, types.MethodType)]
    functions = [value for value in kept if isinstance(value, types.FunctionType)]
    held += [cell.cell_contents for function in functions for cell in function.__closure__ or ()]
    return {value for value in held if isinstance(value, nn.Module)}


def _tensors(model: PreTrainedModel) -> list[torch.Tensor]:
    return [*model.parameters(), *model.buffers()]


@every_pair
def test_a_model_with_the_same_configuration_is_left_alone(family: str, label: str) -> None:
    first = tiny(family)
    config = first.config
    second = type(first)(config).eval()
    assert second.config is config
    before = fingerprint(second)
    patch(first, **options(label))
    logits(first, prompt())
    untouched(before, second)
    unpatch(first)
    assert first.config is config
    untouched(before, second)


IMPORT = """
import sys
sys.path.insert(0, sys.argv[1])
from cases import FAMILIES, logits, prompt, tiny
from fingerprint import changes, fingerprint, shared_state
models = {family: tiny(family) for family in FAMILIES}
stock = {family: logits(model, prompt()) for family, model in models.items()}
before = shared_state(*models.values())
prints = {family: fingerprint(model) for family, model in models.items()}
assert "hf_accel_patch" not in sys.modules
import hf_accel_patch
hf_accel_patch.patch  # the first name that is used loads everything
import torch
added = changes(before, shared_state(*models.values()))
print(changes(before, shared_state(*models.values()), additions=False))
print([place for place in added if "hf_accel_patch" not in place])
print([family for family, model in models.items() if changes(prints[family], fingerprint(model))])
print([family for family, model in models.items() if not torch.equal(logits(model, prompt()), stock[family])])
assert added, "the import registers nothing"
"""


def test_the_import_is_additive() -> None:
    """In a process of its own: nothing that models share is replaced, only our keys are added, and unpatched models
    give bit-equal logits."""
    tests = Path(__file__).parent
    run = subprocess.run(
        [sys.executable, "-c", IMPORT, tests], cwd=tests.parent, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.split("\n")[:4] == ["[]"] * 4, run.stdout


TRACES: dict[str, Callable[[PreTrainedModel], Any]] = {
    "one weight": lambda m: m.model.layers[0].mlp.up_proj.weight.data.view(-1)[3].add_(1e-6),
    "another parameter": lambda m: setattr(m.lm_head, "weight", nn.Parameter(m.lm_head.weight.data)),
    "the same parameter, last": lambda m: m.lm_head._parameters.update(weight=m.lm_head._parameters.pop("weight")),
    "a frozen parameter": lambda m: m.lm_head.weight.requires_grad_(False),
    "a gradient": lambda m: setattr(m.lm_head.weight, "grad", torch.ones_like(m.lm_head.weight)),
    "a buffer that is saved": lambda m: m.model.rotary_emb._non_persistent_buffers_set.clear(),
    "an attribute": lambda m: setattr(m.model, "extra", 1),
    "an inherited value written back": lambda m: vars(m).update(forward=m.forward),
    "a hook": lambda m: m.model.register_forward_hook(lambda *_: None),
    "a class of the same name": lambda m: setattr(m.lm_head, "__class__", type("Linear", (nn.Linear,), {})),
    "an equal module": lambda m: setattr(m.model.layers[1], "mlp", copy.deepcopy(m.model.layers[1].mlp)),
    "an equal configuration": lambda m: setattr(m.model.layers[1].self_attn, "config", copy.copy(m.config)),
    "an attention name": lambda m: vars(m.config).update(_attn_implementation_internal="eager"),
    "a generation setting": lambda m: setattr(m.generation_config, "prefill_chunk_size", 8),
    "training mode": lambda m: m.model.layers[1].train(),
}


@pytest.mark.parametrize("trace", TRACES)
def test_a_fingerprint_notices(trace: str) -> None:
    model = tiny("llama")
    before = fingerprint(model)
    untouched(before, model)
    TRACES[trace](model)
    assert changes(before, fingerprint(model))


def test_shared_state_notices(monkeypatch: pytest.MonkeyPatch) -> None:
    before = shared_state()
    assert not changes(before, shared_state())
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: x)
    monkeypatch.setenv("HF_ACCEL_TEST", "1")
    found = changes(before, shared_state())
    assert any("Linear.forward" in place for place in found) and any("HF_ACCEL_TEST" in place for place in found)
    assert not any("HF_ACCEL_TEST" in place for place in changes(before, shared_state(), additions=False))
