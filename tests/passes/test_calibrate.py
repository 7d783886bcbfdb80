"""Calibration: inputs are observed as they are, and GPTQ loses less than rounding to nearest."""

from pathlib import Path

import pytest
import torch
import transformers
from cases import entry, logits, prompt, tiny
from fingerprint import fingerprint
from torch import nn

import hf_accel_patch
from hf_accel_patch import HfAccelError, Quantize, patch, patched, report, unpatch
from hf_accel_patch.ops.gptq import quantize_gptq
from hf_accel_patch.ops.modules import QuantizedModule
from hf_accel_patch.ops.packing import unpack_codes
from hf_accel_patch.passes import calibrate, calibrate_experts
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

    stock, losses = predictions(model, ids), {}
    texts = [text[start : start + 1500] for start in range(0, half, half // 24)]
    for label, options in {"fitted": {}, "calibrated": {"calibrate": texts}}.items():
        with patched(model, quantize=Quantize("int4", skip=("lm_head",), **options), **OFF):
            losses[label] = (stock.exp() * (stock - predictions(model, ids))).sum(-1).mean().item()
    assert 0 < losses["calibrated"] < 0.6 * losses["fitted"]


def experts_of(model):
    return next(module for name, module in model.named_modules() if name.endswith("experts"))


@pytest.mark.parametrize("family", ("mixtral", "gpt_oss"))
def test_experts_are_rounded_for_the_tokens_that_reach_them(family):
    """Of both layouts; those of the first layer see the same tokens in the float model."""
    model, reference, ids = tiny(family), tiny(family), token_ids(12)
    seen = []
    module = experts_of(reference)
    hook = module.register_forward_pre_hook(lambda _, args: seen.append((args[0].flatten(0, -2), args[1])))
    with torch.no_grad():
        for row in ids:
            reference(row[None])
    hook.remove()
    x, chosen = (torch.cat(each) for each in zip(*seen, strict=True))
    patch(model, quantize=Quantize("int4", calibrate=[ids]), **OFF)
    held, into = experts_of(model).held(experts_of(model).into), getattr(module, experts_of(model).into).detach()
    shared = x.T @ x * (calibrate_experts.SHARED * x.shape[1] / len(x))
    for expert in range(len(into)):
        routed = x[(chosen == expert).any(-1)]
        assert len(routed) > 8
        dense = into[expert].T if module.is_transposed else into[expert]
        codes, *_ = quantize_gptq(dense, routed.T @ routed + shared, dense.shape[1] // len(held[1][expert]))
        ours = unpack_codes(held[0][expert])[: len(dense)]
        assert (ours == codes).double().mean() > 0.999
    assert entry(report(model).to_dict(), "quantize")["calibrated"] == "GPTQ"


def test_an_expert_that_no_token_reaches_is_fitted():
    model, plain, ids = tiny("mixtral"), tiny("mixtral"), token_ids(1, 1)
    patch(model, quantize=Quantize("int4", calibrate=[ids]), **OFF)
    patch(plain, quantize="int4", **OFF)
    ours, fitted = (experts_of(each).held("down_proj")[0] for each in (model, plain))
    same = [torch.equal(a, b) for a, b in zip(ours, fitted, strict=True)]
    assert any(same) and not all(same)


def upcycled(experts):
    """The bundled model with its MLPs copied to experts: it computes what it did, whatever the router chooses."""
    dense = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    kept = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    kept += ("num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "rope_parameters")
    shape = {key: getattr(dense.config, key) for key in (*kept, "tie_word_embeddings")}
    config = transformers.MixtralConfig(**shape, num_local_experts=experts, num_experts_per_tok=2)
    model = transformers.MixtralForCausalLM(config).eval()
    model.load_state_dict(dense.state_dict(), strict=False)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for ours, theirs in zip(model.model.layers, dense.model.layers, strict=True):
            into = torch.cat([theirs.mlp.gate_proj.weight, theirs.mlp.up_proj.weight])
            ours.mlp.experts.gate_up_proj.copy_(into.expand(experts, -1, -1))
            ours.mlp.experts.down_proj.copy_(theirs.mlp.down_proj.weight.expand(experts, -1, -1))
            ours.mlp.gate.weight.normal_(generator=generator)
    return model, dense


@torch.no_grad()
def predictions(model, ids):
    return torch.cat([model(row[None]).logits.log_softmax(-1) for row in ids])


def test_experts_lose_less_on_a_trained_model():
    text = held_out_text()
    half = len(text) // 2
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    ids = torch.tensor(tokenizer(text[half:], verbose=False)["input_ids"][: 8 * 256]).view(8, 256)
    model, dense = upcycled(4)
    stock, losses = predictions(model, ids), {}
    torch.testing.assert_close(stock, predictions(dense, ids), rtol=0, atol=1e-3)
    texts = [text[start : start + 1500] for start in range(0, half, half // 16)]
    only_experts = ("lm_head", "[qkvo]_proj")
    for label, options in {"fitted": {}, "calibrated": {"calibrate": texts, "tokenizer": tokenizer}}.items():
        with patched(model, quantize=Quantize("int4", skip=only_experts, **options), **OFF):
            losses[label] = (stock.exp() * (stock - predictions(model, ids))).sum(-1).mean().item()
    assert 0 < losses["calibrated"] < 0.7 * losses["fitted"]


def test_the_model_is_left_as_it_was():
    model = tiny("mixtral")
    model.train()
    patch(model, quantize=Quantize("int4", calibrate=[token_ids(2)], originals="keep"))
    assert all(module.training for module in model.modules())
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
