"""Steps of models as few kernels: the tokens, and the logits, of the ordinary ones."""

import pytest
import torch
from cases import FAMILIES, build, entry, left_padded, prompt, tiny
from interpreter import INTERPRETED, load
from simulated_graphs import FusedRecorder

from hf_accel_patch import KVCache, patch, report
from hf_accel_patch.kernels import cpu, cpu_decode
from hf_accel_patch.ops import backends
from hf_accel_patch.ops.fusing.writing import Launch
from hf_accel_patch.passes import graphs, replaying, rooms

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="on a GPU, tests/kernels/test_graphs_on_a_gpu.py does the same")
QUICK = {"llama", "gemma2", "gpt2"}
MORE = ("cohere", "gemma3_text", "glm4", "granite", "nemotron", "olmo2", "persimmon", "phi", "stablelm", "starcoder2")
NEVER = {"gptj", "codegen", "gpt_neo", "bloom", "mpt", "falcon_alibi", "falcon_mqa", "falcon_new", "deepseek_v3"}
ALL = [*(name for name in FAMILIES if name not in NEVER), *MORE]
LAUNCHES = 7  # per layer at most, experts aside: 4, and more where attention with soft caps is operators here


@pytest.fixture(autouse=True)
def made(monkeypatch):
    """The recorders; compiled kernels, which no trace on a CPU sees, are not there."""
    load("triton_fused")
    recorders = []
    monkeypatch.setattr(graphs, "recorder_for", lambda device: recorders.append(FusedRecorder(device)) or recorders[-1])
    for module in (cpu, cpu_decode):
        monkeypatch.setattr(module, "library", lambda width=None: None)
    monkeypatch.setattr(backends, "_triton", lambda: None)
    monkeypatch.setattr(rooms, "LEAST_VISIBLE", 16)
    monkeypatch.setattr(replaying, "AHEAD", 8)
    return recorders


def cases(names):
    return [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in names]


def generate(model, inputs, new=14):
    return model.generate(**inputs, do_sample=False, max_new_tokens=new, min_new_tokens=new)


@pytest.mark.parametrize("name", cases(ALL))
def test_tokens_and_launches(name, made):
    """Alone and as a padded batch."""
    runs = [{"input_ids": prompt(8)}, left_padded(20, 11)]
    make = (lambda: tiny(name)) if name in FAMILIES else lambda: build(name)
    truths = [generate(make(), inputs) for inputs in runs]
    model = make()
    patch(model, cache=KVCache(graphs=True), linear=False)
    for inputs, truth in zip(runs, truths, strict=True):
        assert torch.equal(generate(model, inputs), truth)
    assert entry(report(model).to_dict(), "cache")["graphs"] == "on" and sum(each.replays for each in made) >= 8
    layers = model.config.get_text_config().num_hidden_layers
    for fused in (fused for each in made for fused in each.made):
        plan = fused.runner.plan
        starts = sum(isinstance(step, Launch) for step in plan.steps)
        assert plan.fused > 8 * layers and (
            starts <= LAUNCHES * layers + 2 or "num_local_experts" in vars(model.config)
        )
        torch.testing.assert_close(fused.first, fused.expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", cases(["llama", "qwen3", "gemma2", "cohere"]))
def test_logits_in_16_bits(name, dtype, made):
    """Operators round where PyTorch's do; sums in another order are lost in that."""
    model = (tiny(name) if name in FAMILIES else build(name)).to(dtype)
    patch(model, cache=KVCache(graphs=True), linear=False)
    generate(model, {"input_ids": prompt(8)}, 12)
    (fused,) = [fused for each in made for fused in each.made]
    difference = (fused.first.float() - fused.expected.float()).norm() / fused.expected.float().norm()
    assert difference < 1e-3


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_a_layer_is_four_kernels(name, made):
    """And one more computes the angles and the first norm."""
    model = tiny(name)
    patch(model, cache=KVCache(graphs=True), linear=False)
    generate(model, {"input_ids": prompt(8)}, 12)
    (fused,) = [fused for each in made for fused in each.made]
    starts = sum(isinstance(step, Launch) for step in fused.runner.plan.steps)
    assert starts == 4 * model.config.num_hidden_layers + 1


@pytest.mark.parametrize("tokens", [2, 8])
def test_several_tokens(tokens, made, monkeypatch):
    """Of a verification pass."""
    model = tiny("llama")
    inputs = {"input_ids": torch.cat([prompt(6)] * 4, 1)}
    truth = generate(model, inputs, 24)
    patch(model, cache=KVCache(graphs=True), speculative="ngram", linear=False)
    monkeypatch.setattr(FusedRecorder, "passes", 0)
    monkeypatch.setattr(replaying, "WIDTHS", (tokens,))
    assert torch.equal(generate(model, inputs, 24), truth)
    assert sum(each.replays for each in made) > 2
