"""CUDA graphs where there is a GPU: what tests/passes/test_graphs.py simulates."""

import pytest
import torch
from cases import entry, left_padded, prompt, tiny

from hf_accel_patch import KVCache, patch, report, unpatch
from hf_accel_patch.ops.graphs import CudaRecorder
from hf_accel_patch.passes import replaying
from hf_accel_patch.passes.graphs import GRAPHS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
GRAPHED = KVCache(graphs=True)


@pytest.fixture(autouse=True)
def _texts_are_short(monkeypatch):
    monkeypatch.setattr(CudaRecorder, "passes", 8)
    monkeypatch.setattr(CudaRecorder, "races", False)


def generate(model, inputs, new=60, **kwargs):
    torch.manual_seed(0)
    inputs = {name: each.to("cuda") for name, each in inputs.items()}
    return model.generate(**inputs, **({"do_sample": False, "max_new_tokens": new} | kwargs))


def said(model):
    return entry(report(model).to_dict(), "cache")


@pytest.mark.parametrize("options", [{}, {"quantize": "int8"}, {"quantize": "int4"}, {"speculative": "ngram"}], ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "gpt_oss"])
def test_replayed_tokens_are_those_of_ordinary_steps(family, options):
    """Alone, padded, sampled, and a second time, when everything is recorded."""
    runs = [({"input_ids": torch.cat([prompt(12)] * 3, 1)}, {}), (left_padded(20, 11), {}), (left_padded(20, 11), {})]
    runs.append((left_padded(24, 7), {"do_sample": True, "top_k": 0}))
    model = tiny(family).to("cuda")
    patch(model, cache=KVCache(graphs=False), **options)
    truths = [generate(model, inputs, **more) for inputs, more in runs]
    model = tiny(family).to("cuda")
    patch(model, cache=GRAPHED, **options)
    for (inputs, more), truth in zip(runs, truths, strict=True):
        assert torch.equal(generate(model, inputs, **more), truth)
    if family == "gpt_oss" and "quantize" in options:  # quantized experts look at their tokens
        assert "waits for its numbers" in said(model)["graphs"]
    else:
        assert said(model)["graphs"] == "on" and said(model)["graphs_replayed"] > 50
        assert said(model)["graphs_fused"] > 20


def test_memory_comes_back():
    model = tiny("llama").to("cuda")
    generate(model, left_padded(20, 11))
    before = torch.cuda.memory_allocated()
    for _ in range(3):
        patch(model, cache=GRAPHED)
        generate(model, left_padded(20, 11))
        assert vars(model)[GRAPHS].counts["replayed"]
        unpatch(model)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() - before < 1 << 26  # a workspace of cuBLAS for the side stream stays


@pytest.mark.parametrize("fault", ["waits", "within"])
def test_a_capture_that_fails_costs_nothing(fault, monkeypatch):
    """One that is foreseen, and one that CUDA itself refuses: it goes on generating, sampling included."""
    model = tiny("llama").to("cuda")
    truth, sampled = (generate(model, left_padded(20, 11), do_sample=draws) for draws in (False, True))
    inner = type(model.model.norm).forward

    def forward(self, x):
        if fault == "waits":
            x[0, 0, 0].item()
        elif torch.cuda.is_current_stream_capturing():
            torch.cuda.synchronize()
        return inner(self, x)

    monkeypatch.setattr(type(model.model.norm), "forward", forward)
    patch(model, cache=GRAPHED, linear=False)
    assert torch.equal(generate(model, left_padded(20, 11)), truth)
    assert said(model)["graphs"].startswith("off: ") and "graphs_replayed" not in said(model)
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert torch.equal(generate(model, left_padded(20, 11), do_sample=True), sampled)
    assert torch.rand(3, device="cuda").isfinite().all()


def test_both_kinds_of_calls_without_gradients_record():
    """What CUDA keeps of random numbers is written to by either."""
    model = tiny("llama").to("cuda")
    truth = generate(model, left_padded(20, 11))
    patch(model, cache=GRAPHED)
    for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(generate(model, left_padded(20, 11)), truth)
    assert said(model)["graphs"] == "on" and said(model)["graphs_recorded"] >= 2


@pytest.mark.parametrize("options", [{}, {"quantize": "int8"}, {"quantize": "int4"}], ids=str)
def test_fused_steps_compute_what_others_do(options, monkeypatch):
    """The logits of replays of each kind."""
    found = []
    for fuses in (True, False):
        monkeypatch.setattr(CudaRecorder, "fuses", fuses)
        model = tiny("llama").to("cuda", torch.bfloat16)
        patch(model, cache=GRAPHED, **options)
        inputs = {name: each.to("cuda") for name, each in left_padded(20, 11).items()}
        asked = {"max_new_tokens": 30, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        found.append(torch.stack(model.generate(**inputs, **asked).logits[:20]).float())
        assert ("graphs_fused" in said(model)) == fuses
    same = found[0].argmax(-1) == found[1].argmax(-1)
    steps = int(same.all(-1).cumprod(0).sum())  # until a near tie falls the other way
    assert steps > 9 and (found[0][:steps] - found[1][:steps]).norm() < 0.02 * found[1][:steps].norm()


def test_a_race_changes_no_token(monkeypatch):
    """A step is recorded both ways, and either is kept."""
    monkeypatch.setattr(CudaRecorder, "races", True)
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny("llama").to("cuda", dtype)
        patch(model, cache=GRAPHED)
        found = generate(model, left_padded(20, 11))
        assert said(model)["graphs"] == "on" and said(model)["graphs_replayed"] > 20
        assert not vars(model)[GRAPHS].recorder.races
        unpatch(model)
        if dtype == torch.float32:
            assert torch.equal(found, generate(model, left_padded(20, 11)))


def test_every_width_agrees(monkeypatch):
    """Replays of all widths, each against the model's own logits, in 16 bits."""
    disagreed = []
    agree = replaying.agree
    monkeypatch.setattr(replaying, "agree", lambda *args: agree(*args) or bool(disagreed.append(args[0].shape)))
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        model = tiny("llama").to("cuda", dtype)
        patch(model, cache=GRAPHED, speculative="ngram")
        for times in (2, 4):
            generate(model, {"input_ids": torch.cat([prompt(6)] * times, 1)}, 120)
        assert not disagreed and said(model)["graphs"] == "on", (dtype, said(model))
