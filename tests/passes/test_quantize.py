"""Quantized models as torch modules and as transformers models."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from cases import build, greedy, left_padded, logits, prompt, tiny
from torch import nn

import hf_accel_patch
from hf_accel_patch import HfAccelConfig, Quantize, UnsupportedModel, patch, report, unpatch
from hf_accel_patch.kernels import cpu
from hf_accel_patch.ops import linear, packing
from hf_accel_patch.ops.modules import QuantizedExperts, QuantizedModule

BFLOAT16 = 0.04  # what rounding the activations of every product to bfloat16 does to the logits of random weights
MODEL = Path(hf_accel_patch.__file__).parent / "models" / "code-llama-8m"


def rounded(model, quantized):
    """A stock model whose weights are those that the codes of a quantized one stand for."""
    for name, module in quantized.named_modules():
        if isinstance(module, QuantizedExperts):
            held = model.get_submodule(name)._parameters
            for key, spec in module.specs.items():
                dense = [module.dequantize_expert(key, e, torch.float32) for e in range(len(held[key]))]
                held[key] = nn.Parameter(torch.stack([d.T if held[key].shape[1:] != spec.shape else d for d in dense]))
        elif isinstance(module, QuantizedModule):
            model.get_submodule(name)._parameters["weight"] = nn.Parameter(module.dequantize(torch.float32))
    return model


SCHEMES = ("int8", "int4", "nf4", "llm.int8")


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", ("llama", "gemma2", "qwen2", "phi3", "opt", "gpt_neox", "gpt2", "falcon_mqa"))
@pytest.mark.parametrize("backend", ("compiled", "many", "torch", "unpacked"))
def test_a_quantized_model_is_stock_with_rounded_weights(name, scheme, backend, monkeypatch):
    block = packing.int4_block()
    if backend in ("compiled", "many") and (reason := cpu.why_not(block)):
        pytest.skip(reason)
    if backend == "torch" and not block:
        pytest.skip("no int4 kernel on this processor")
    rows = linear.ALWAYS if backend in ("compiled", "torch") else 0
    chosen = linear.Backend(backend in ("compiled", "many"), rows, many=backend == "many")
    monkeypatch.setattr("hf_accel_patch.passes.quantize.backend_for", lambda *_: chosen)
    model = patch(tiny(name), quantize=scheme)
    stock = rounded(tiny(name), model)
    for inputs in ({"input_ids": prompt()}, left_padded()):
        ours, expected = logits(model, **inputs), logits(stock, **inputs)
        assert (ours - expected).std() < BFLOAT16 * expected.std()


@pytest.mark.parametrize("scheme, bound", (("int8", 1.005), ("int4", 1.03)))
def test_perplexity_of_the_bundled_model(scheme, bound):
    from hf_accel_patch.texts import held_out_text

    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    ids = torch.tensor(tokenizer(held_out_text(), verbose=False)["input_ids"])[: 512 * 24].view(24, 512)
    model = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.bfloat16)

    @torch.no_grad()
    def loss():
        return sum(model(row[None], labels=row[None], use_cache=False).loss.double() for row in ids) / len(ids)

    before = loss()
    patch(model, quantize=scheme)
    assert (loss() - before).exp() * 1.002 > 1.0 and (loss() - before).exp() < bound


def test_a_tied_table_stays_one_table():
    model = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.bfloat16)
    table = model.model.embed_tokens.weight.detach().clone()
    patch(model, quantize="int4")
    head, embedding = model.lm_head, model.model.embed_tokens
    assert (
        head._buffers["weight"] is embedding._buffers["weight"] and "int4" in repr(head) and "int4" in repr(embedding)
    )
    rows = embedding(torch.tensor([[0, 5, 4095]]))
    assert rows.shape == (1, 3, 256) and rows.dtype == torch.bfloat16
    assert ((rows - table[[0, 5, 4095]]).norm() / rows.norm()).item() < 0.1


def test_an_embedding_with_a_forward_of_its_own_keeps_it():
    torch.manual_seed(0)
    config = transformers.Gemma3TextConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.Gemma3ForCausalLM(config).eval()
    expected, kind = model.model.embed_tokens(prompt()), type(model.model.embed_tokens)
    patch(model, quantize=Quantize("int8", originals="keep"))
    ours = model.model.embed_tokens(prompt())
    assert isinstance(model.model.embed_tokens, kind) and isinstance(model.model.embed_tokens, QuantizedModule)
    assert 0 < ((ours - expected).norm() / expected.norm()).item() < 0.02
    copy.deepcopy(model)
    unpatch(model)
    assert type(model.model.embed_tokens) is kind and torch.equal(model.model.embed_tokens(prompt()), expected)


@pytest.mark.parametrize("scheme", ("int8", "int4"))
def test_the_weight_reads_as_a_tensor(scheme):
    model = tiny("llama")
    before = model.model.layers[0].mlp.up_proj.weight.detach().clone()
    patch(model, quantize=scheme)
    module = model.model.layers[0].mlp.up_proj
    weight = module.weight
    assert weight.shape == before.shape and weight.dtype == before.dtype and weight.device == before.device
    assert torch.equal(weight + 0, module.dequantize(torch.float32))
    assert ((weight - before).norm() / before.norm()).item() < 0.15
    assert "QuantizedWeight" in repr(weight) and scheme in repr(module)


@pytest.mark.parametrize("scheme", ("int8", "int4"))
def test_a_hook_that_moves_what_the_weight_reads_as_moves_the_codes(scheme):
    """As accelerate's does: buffer by buffer, by reading it, moving what was read, and writing it back."""
    model = patch(tiny("llama"), quantize=scheme)
    module = model.model.layers[0].mlp.up_proj
    x, codes = torch.randn(1, 64), module._buffers["weight"]
    expected = module(x)
    for device in ("cpu", "meta"):
        for name in [name for name, _ in module.named_buffers()]:
            module._buffers[name] = getattr(module, name).to(device)
        module.hook = None
        now = module._buffers["weight"]
        assert now.device.type == device and now.shape == codes.shape and now.dtype == codes.dtype
        assert module.weight.device.type == device and module.weight.shape == (128, 64)
        if device == "cpu":
            assert now is codes and torch.equal(module(x), expected)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float64))
def test_casts_leave_codes_and_scales_alone(dtype):
    model = patch(tiny("llama"), quantize="int4")
    module = model.model.layers[0].mlp.up_proj
    dense = module.dequantize(torch.float32)
    model.to(dtype)
    assert torch.equal(module.dequantize(torch.float32), dense) and module.weight.dtype == dtype
    assert model(prompt()).logits.dtype == dtype


def test_state_dicts_load_into_a_model_patched_alike():
    model, other = patch(tiny("llama"), quantize="int4"), tiny("llama")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.5)
    patch(other, quantize="int4")
    assert not torch.equal(logits(other, prompt()), logits(model, prompt()))
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other, prompt()), logits(model, prompt()))


def test_gradients_pass_through_frozen_weights():
    model = patch(tiny("llama"), quantize="int4")
    stock = rounded(tiny("llama"), model)
    inputs = torch.randn(1, 5, 64)
    grads = []
    for each in (model, stock):
        x = inputs.clone().requires_grad_()
        each(inputs_embeds=x).logits.square().mean().backward()
        grads.append(x.grad)
    assert (grads[0] - grads[1]).norm() < BFLOAT16 * grads[1].norm()


@pytest.mark.parametrize("scheme", ("int8", "int4"))
def test_compiling_a_quantized_model(scheme):
    model = patch(tiny("llama"), quantize=scheme)
    expected = logits(model, prompt())
    compiled = torch.compile(model, backend="aot_eager", dynamic=False)
    assert (logits(compiled, prompt()) - expected).abs().max() < 1e-3 * expected.std()


@pytest.mark.parametrize("family", ("gemma2", "mixtral", "gpt2"))
def test_a_quantized_model_is_one_graph(family):
    """A tied table that is scaled by its weight's dtype, experts, and `Conv1D`."""
    model = patch(tiny(family), quantize="int4", cache=False)
    expected = logits(model, prompt())
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(logits(compiled, prompt()), expected)


def test_skipping_by_name_and_pattern():
    model = patch(tiny("llama"), quantize=Quantize("int4", skip=("lm_head", "model.layers.0.*")))
    names = {name for name, module in model.named_modules() if isinstance(module, QuantizedModule)}
    linear = {name for name, module in tiny("llama").named_modules() if type(module) is nn.Linear}
    assert names == {name for name in linear if name != "lm_head" and not name.startswith("model.layers.0.")}
    row = {row["pass"]: row for row in report(model).to_dict()["passes"]}["quantize"]
    assert {"name": "lm_head", "reason": "asked for by skip"} in row["skipped"]


def test_generation_runs_with_beams_and_padding():
    model = patch(tiny("llama"), quantize="int4")
    assert greedy(model, tokens=6, num_beams=2, **left_padded()).shape == (3, 6)


def test_activations_elsewhere_are_refused():
    model = patch(tiny("llama"), quantize="int4")
    with pytest.raises(RuntimeError, match="activations are on meta and the quantized weight is on cpu"):
        model.lm_head(torch.empty(1, 64, device="meta"))


@pytest.mark.parametrize("scheme", ("int8", "int4"))
@torch.no_grad()
def test_activations_of_another_width_are_refused(scheme):
    model = patch(tiny("llama"), quantize=scheme)
    for width in (32, 128):
        with pytest.raises(RuntimeError, match=f"{width} features meet weights with 64"):
            model.lm_head(torch.randn(1, width))


@torch.no_grad()
def test_the_layout_of_another_machine_is_read_right(monkeypatch):
    """As on a machine whose own kernels have another layout."""
    model = patch(tiny("llama"), quantize="int4")
    expected = logits(model, prompt())
    monkeypatch.setattr(linear, "int4_block", lambda: 0)
    monkeypatch.setattr(cpu, "library", lambda block: None)
    ours = logits(model, prompt())
    assert (ours - expected).std() < BFLOAT16 * expected.std()


def test_backends_by_name():
    block = packing.int4_block()
    assert "PyTorch" in str(linear.backend_for("int4", False)) or not block
    patch(model := tiny("llama"), quantize=Quantize("int4", backend="torch"))
    assert not model.lm_head.specs["weight"].backend.compiled
    if reason := cpu.why_not(block):
        with pytest.raises(hf_accel_patch.HfAccelError, match=reason[:20]):
            patch(tiny("llama"), quantize=Quantize("int4", backend="compiled"))
    else:
        patch(model := tiny("llama"), quantize=Quantize("int4", backend="compiled"))
        assert model.lm_head.specs["weight"].backend.compiled


DEFAULTS = """
import sys
import torch
torch.set_default_dtype(getattr(torch, sys.argv[1]))
sys.path.insert(0, sys.argv[2])
from cases import logits, prompt, tiny
from hf_accel_patch import patch
for scheme in ("int8", "int4", "nf4", "llm.int8"):
    for tokens in (1, 40):
        ours = logits(patch(tiny("llama"), quantize=scheme), prompt()[:, :tokens])
        stock = logits(tiny("llama"), prompt()[:, :tokens])
        assert (ours - stock).std() < 0.7 * stock.std(), (scheme, tokens)
"""


@pytest.mark.parametrize("dtype", ("bfloat16", "float64"))
def test_the_default_dtype_of_torch_changes_nothing(dtype):
    tests = Path(__file__).parent.parent
    run = subprocess.run([sys.executable, "-c", DEFAULTS, dtype, tests], capture_output=True, text=True, timeout=300)
    assert not run.returncode, run.stderr[-800:]


@torch.no_grad()
def test_large_outliers_do_not_overflow_float16():
    w = torch.randn(256, 256, generator=torch.Generator().manual_seed(0)) * 0.02
    codes, bits = packing.pack(w, "llm.int8", 0, 64)
    x = torch.randn(70, 256, generator=torch.Generator().manual_seed(1))
    x[:, 5] = 2000
    scales = bits.view(torch.bfloat16)
    ours = linear.linear(x.half(), codes, scales, "llm.int8", linear.Backend(True, 0, decomposed=True))
    exact = x.double() @ (codes[0].double() * scales.double()[:, None]).T
    assert ours.isfinite().all() and (ours.double() - exact).norm() < 0.01 * exact.norm()


def test_weights_cannot_be_assigned_to():
    model = patch(tiny("llama"), quantize="int4")
    expected = logits(model, prompt())
    for change in (
        lambda: setattr(model.lm_head, "weight", nn.Parameter(torch.zeros(256, 64))),
        lambda: setattr(model.lm_head.weight, "data", torch.zeros(256, 64)),
        lambda: model.lm_head.weight.data.add_(1),
        lambda: nn.init.zeros_(model.lm_head.weight),
    ):
        with pytest.raises(RuntimeError, match="a quantized weight cannot be changed"):
            change()
    assert torch.equal(logits(model, prompt()), expected)


@pytest.mark.parametrize("family", ("llama", "gemma2"))
def test_quantized_tables_cannot_be_resized(family):
    model = patch(tiny(family), quantize="int4")
    expected = logits(model, prompt())
    with pytest.raises(hf_accel_patch.HfAccelError, match="cannot be resized"):
        model.resize_token_embeddings(300)
    model.resize_token_embeddings(256)
    assert torch.equal(logits(model, prompt()), expected) and model.config.vocab_size == 256
    kept = patch(tiny("llama"), quantize=Quantize("int4", skip=("lm_head",)))
    kept.resize_token_embeddings(300, mean_resizing=False)
    assert logits(kept, prompt()).shape[-1] == 300


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("token", (-1, 256))
def test_tokens_beyond_the_table_are_refused(scheme, token):
    model = patch(tiny("gemma2"), quantize=scheme)
    with pytest.raises(IndexError, match="index out of range"):
        model(torch.tensor([[3, token]]))


def test_a_memory_format_does_not_reach_codes():
    model = patch(tiny("mixtral"), quantize="int4")
    expected = logits(model, prompt())
    assert torch.equal(logits(model.to(memory_format=torch.channels_last), prompt()), expected)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_gradients_of_a_compiled_model(scheme):
    model = patch(tiny("llama"), quantize=scheme)
    x = torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(0))
    grads = []
    for each in (model, torch.compile(model, backend="aot_eager", dynamic=False)):
        inputs = x.clone().requires_grad_()
        each(inputs_embeds=inputs).logits.square().mean().backward()
        grads.append(inputs.grad)
    assert (grads[0] - grads[1]).norm() < 1e-3 * grads[0].norm()


def test_a_model_patched_in_inference_mode_trains_adapters():
    model = tiny("llama")
    with torch.inference_mode():
        patch(model, quantize="int4")
    x = torch.randn(1, 5, 64).requires_grad_()
    model(inputs_embeds=x).logits.square().mean().backward()
    assert x.grad.abs().sum() > 0


def test_a_model_that_rescales_its_weights_is_refused(tmp_path):
    model = build("rwkv")
    before = {name: held.clone() for name, held in model.state_dict().items()}
    with pytest.raises(UnsupportedModel, match="rescales weights in place"):
        patch(model, quantize="int8")
    assert all(torch.equal(before[name], held) for name, held in model.state_dict().items())
    model.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match="rescales weights in place"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=HfAccelConfig("int8"))
    still = build("rwkv", rescale_every=0)
    assert logits(patch(still, quantize="int8"), prompt()).isfinite().all()
