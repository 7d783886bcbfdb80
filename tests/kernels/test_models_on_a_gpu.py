"""Whole models on a GPU, against stock there: what the kernels are for. Without one the same on the CPU, in small."""

import copy

import pytest
import torch
from cases import greedy, left_padded, logits, prompt, relative_error, tiny
from interpreter import DEVICE, INTERPRETED
from transformers import DynamicCache

from hf_accel_patch import Attention, KVCache, patch, report, unpatch
from hf_accel_patch.ops.modules import HasWeight
from hf_accel_patch.passes import described as described_masks

FAMILIES = ("llama", "mistral", "gemma2", "gpt_oss", "bloom", "mpt", "deepseek_v3", "gpt2", "falcon_mqa")
FEW = FAMILIES[:4] if INTERPRETED else FAMILIES
EXACT = 2e-3  # of the logits' standard deviation, float32; PyTorch multiplies it as three products of tf32
PRODUCTS = 0.3 if INTERPRETED else 0.1  # activations and what codes stand for in bfloat16; a wrong code gives more


def here(name, dtype=torch.float32):
    return tiny(name).to(DEVICE, dtype)


def moved(inputs):
    return {name: each.to(DEVICE) for name, each in inputs.items()}


@pytest.fixture(params=[False, True], ids=["stored", "described"])
def masks(request, monkeypatch):
    """As small as they are, masks are stored; described ones go to the kernels for prompts."""
    if request.param:
        monkeypatch.setattr(described_masks, "DENSE_ELEMENTS", 0)


@pytest.mark.parametrize("name", FEW)
def test_exact_passes_agree_with_stock(name, masks):
    model, alone, padded = here(name), prompt().to(DEVICE), moved(left_padded())
    stock = logits(model, alone), logits(model, **padded)
    tokens = greedy(model, alone, 6), greedy(model, tokens=6, **padded)
    patch(model)
    assert relative_error(logits(model, alone), stock[0]) < EXACT
    assert relative_error(logits(model, **padded), stock[1]) < EXACT
    assert torch.equal(greedy(model, alone, 6), tokens[0])
    assert torch.equal(greedy(model, tokens=6, **padded), tokens[1])
    unpatch(model)
    assert torch.equal(logits(model, alone), stock[0])


@pytest.mark.parametrize("name", FEW[:3])  # no experts, which rounding may choose anew
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_in_16_bits(name, dtype, masks):
    if INTERPRETED and dtype is torch.float16:
        pytest.skip("slow on a CPU")
    """As near to float32 as stock is."""
    model, padded = here(name, dtype), moved(left_padded())
    right, stock = logits(here(name), **padded), logits(model, **padded)
    patch(model)
    assert relative_error(logits(model, **padded), right) < 2 * relative_error(stock, right)
    greedy(model, tokens=4, **padded)


@pytest.mark.skipif(INTERPRETED, reason="needs a GPU")
@pytest.mark.parametrize("name", ("mistral", "gemma2", "gpt_oss", "bloom", "deepseek_v3"))
def test_prompts_take_the_kernel(name, monkeypatch):
    monkeypatch.setattr(described_masks, "DENSE_ELEMENTS", 0)
    model = patch(here(name))
    logits(model, **moved(left_padded()))
    row = next(each for each in report(model).to_dict()["passes"] if each["pass"] == "attention")
    assert row["used"] == ["triton: computes what is seen only, with soft caps, sinks and biases, in one pass"]


@pytest.mark.skipif(INTERPRETED, reason="needs a GPU")
@pytest.mark.parametrize("name", ("mistral", "gemma2", "gpt_oss"))
def test_training_with_the_kernels(name, monkeypatch):
    monkeypatch.setattr(described_masks, "DENSE_ELEMENTS", 0)
    ids, gradients = prompt().to(DEVICE), []
    for model in (here(name), patch(here(name), attention=Attention("triton"))):
        model.train()
        model(ids, labels=ids).loss.backward()
        gradients.append({name: each.grad for name, each in model.named_parameters() if each.grad is not None})
    for name, right in gradients[0].items():
        assert (gradients[1][name] - right).abs().max() < 1e-3 * right.abs().max() + 1e-7, name


@pytest.mark.parametrize("scheme", ("int8", "int4", "nf4"))
@pytest.mark.parametrize("name", ("llama", "gpt_oss"))
def test_quantized_products(name, scheme):
    """Against stock with the weights that the codes stand for."""
    model, dense = patch(here(name), quantize=scheme), here(name)
    if name == "llama":
        for path, module in model.named_modules():
            if isinstance(module, HasWeight):
                dense.get_submodule(path).weight.data.copy_(module.weight)
        for ids in (prompt(1), prompt(7), prompt(40), prompt(150)):
            ids = ids.to(DEVICE)
            assert relative_error(logits(model, ids), logits(dense, ids)) < PRODUCTS
    assert greedy(model, prompt().to(DEVICE), 4).shape == (1, 4)


@pytest.mark.skipif(INTERPRETED, reason="needs a GPU")
@pytest.mark.parametrize("scheme", ("int8", "int4"))
def test_a_patched_model_that_is_moved(scheme):
    """Packed on a CPU, in blocks for its kernels."""
    model = patch(tiny("llama"), quantize=scheme)
    stock = logits(model, prompt())
    assert relative_error(logits(model.to(DEVICE), prompt().to(DEVICE)).cpu(), stock) < 0.3
    assert relative_error(logits(model.to("cpu"), prompt()), stock) < 1e-5


def stepped(model, ids, first):
    """Logits of a prompt and of the tokens that follow it, one by one or some at a time."""
    cache, parts = DynamicCache(config=model.config), [ids[:, :first], *ids[:, first:].split([1, 1, 5, 1, 20], 1)]
    with torch.no_grad():
        return torch.cat([model(part, past_key_values=cache).logits for part in parts], 1)


@pytest.mark.parametrize("kind", ("exact", "int8", "int4"))
@pytest.mark.parametrize("name", ("llama", "mistral", "gemma2", "qwen2"))
def test_caches(name, kind):
    """Against the same on the CPU, where other kernels read it."""
    if INTERPRETED and name != "llama":
        pytest.skip("tests/passes does this on a CPU")
    model, ids = tiny(name), prompt(228)
    theirs = stepped(patch(copy.deepcopy(model), cache=kind), ids, 200)
    ours = stepped(patch(model.to(DEVICE), cache=kind), ids.to(DEVICE), 200).cpu()
    if kind == "exact":
        assert relative_error(ours, theirs) < EXACT
    else:  # keys that are rounded otherwise give other codes, of some elements
        assert (ours - theirs).norm() / theirs.norm() < 5e-2


@pytest.mark.skipif(INTERPRETED, reason="needs a GPU")
@pytest.mark.parametrize("kind", ("exact", "int8", "int4"))
def test_caches_in_the_memory_of_the_host(kind):
    model, ids = here("llama"), prompt(428).to(DEVICE)
    theirs = stepped(patch(model, cache=kind if kind == "exact" else KVCache(kind, recent=64)), ids, 400)
    unpatch(model)
    ours = stepped(patch(model, cache=KVCache(kind, offload=64)), ids, 400)
    assert relative_error(ours, theirs) < 2e-2


@pytest.mark.skipif(INTERPRETED, reason="needs a GPU")
@pytest.mark.parametrize("options", ({}, {"quantize": "int4"}), ids=str)
def test_compiled(options):
    model, ids = patch(here("llama"), **options), prompt().to(DEVICE)
    stock = logits(model, ids)
    compiled = torch.compile(model, dynamic=False)
    with torch.no_grad():
        assert relative_error(compiled(ids).logits, stock) < EXACT


def test_speculation():
    model, ids = here("llama"), prompt(20).repeat(1, 3).to(DEVICE)
    stock = greedy(model, ids, 12)
    assert torch.equal(greedy(patch(model, speculative="ngram"), ids, 12), stock)


@pytest.mark.skipif(INTERPRETED, reason="needs a GPU")
@pytest.mark.parametrize("scheme", ("int4", "nf4"))
def test_codes_are_laid_out_for_the_device(scheme):
    model, ids = patch(tiny("llama"), quantize=scheme), prompt()
    modules = [module for module in model.modules() if isinstance(module, HasWeight)]
    before, expected = [module.held("weight")[0].clone() for module in modules], logits(model, ids)
    model.to(DEVICE)
    assert all(module.held("weight")[0].shape[-1] == 1 for module in modules)
    assert relative_error(logits(model, ids.to(DEVICE)).cpu(), expected) < PRODUCTS
    model.cpu()
    assert all(torch.equal(module.held("weight")[0], old) for module, old in zip(modules, before, strict=True))
    assert torch.equal(logits(model, ids), expected)
