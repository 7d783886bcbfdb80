"""Hand-written attention on our function: exact where stock is, right where stock is not, and everything around it."""

import copy
import pickle

import pytest
import torch
from cases import NEWER_GPTJ, build, entry, greedy, left_padded, logits, prompt, relative_error
from torch import nn
from transformers import ContinuousBatchingConfig, DynamicCache, GenerationConfig, StaticCache
from transformers.models.rembert import modeling_rembert

from hf_accel_patch import UnsupportedModel, patch, report, unpatch
from hf_accel_patch.compat import RECORDS_PAST
from hf_accel_patch.families.handwritten import CLASSES, bloom_slopes, mpt_slopes
from hf_accel_patch.ops import attention as ops
from hf_accel_patch.passes import attention, handwritten
from hf_accel_patch.passes import described as described_masks

TOLERANCE = 1e-4  # of the logits' standard deviation; float32 rounding gives about 5e-6, of BLOOM's positions 3e-5
FALCON = {"alibi": False}
MODELS = {
    "bloom": ("bloom", {}),
    "mpt": ("mpt", {}),
    "falcon_alibi": ("falcon", {"alibi": True, "multi_query": False, "num_kv_heads": 4}),
    "falcon_mqa": ("falcon", FALCON | {"multi_query": True}),
    "falcon_new": ("falcon", FALCON | {"new_decoder_architecture": True}),
    "gptj": ("gptj", {}),
    "codegen": ("codegen", {}),
    "gpt_neo": ("gpt_neo", {}),
    "gpt_neox_japanese": ("gpt_neox_japanese", {}),
    "openai-gpt": ("openai-gpt", {}),
    "xglm": ("xglm", {}),
    "trocr": ("trocr", {}),
    "mvp": ("mvp", {}),
    "megatron-bert": ("megatron-bert", {}),
    "rembert": ("rembert", {}),
    "roformer": ("roformer", {"rotary_value": True}),
}
if not hasattr(modeling_rembert, "create_causal_mask"):  # older transformers, where those three are not causal
    MODELS = dict(list(MODELS.items())[:-3])
if NEWER_GPTJ:
    del MODELS["gptj"], MODELS["codegen"]
CACHED = [name for name in MODELS if name != "openai-gpt"]
ALIBI = ("bloom", "mpt", "falcon_alibi")
every_model = pytest.mark.parametrize("name", MODELS)


def tiny(name, **overrides):
    if name not in MODELS:
        pytest.skip("its attention is not hand-written in this version of transformers")
    model_type, options = MODELS[name]
    return build(model_type, **options | overrides)


@pytest.fixture
def described(monkeypatch):
    """Describe every mask, however small, and attend in small blocks; returns the sizes of the dense blocks built."""
    monkeypatch.setattr(described_masks, "DENSE_ELEMENTS", 0)
    monkeypatch.setattr(attention, "SCORE_ELEMENTS", 0)
    monkeypatch.setattr(ops, "ROWS", 7)
    sizes, real = [], described_masks.sdpa_mask

    def counted(**kwargs):
        mask = real(**kwargs)
        sizes.append(0 if mask is None else mask.shape[-1] * mask.shape[-2])
        return mask

    monkeypatch.setattr(described_masks, "sdpa_mask", counted)
    return sizes


@torch.no_grad()
def in_parts(model, ids, sizes, cache=None):
    parts = []
    for part in ids.split(sizes, dim=1):
        out = model(part, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        parts.append(out.logits)
    return torch.cat(parts, 1)


@every_model
def test_described_masks_agree_with_stock(name, described):
    model = tiny(name)
    padded, right = left_padded(), {key: value.flip(1) for key, value in left_padded().items()}
    stock = [logits(model, **padded), logits(model, **right), logits(model, prompt())]
    tokens = greedy(model, prompt(), 8), greedy(model, tokens=8, **padded)
    patch(model)
    said = entry(report(model).to_dict(), "attention")
    assert said["was"] == "hand-written" and said["modules"] >= 4
    assert "linear in memory" in entry(report(model).to_dict(), "prefill")["reason"]
    ours = [logits(model, **padded), logits(model, **right), logits(model, prompt())]
    assert max(map(relative_error, ours, stock)) < TOLERANCE
    assert torch.equal(greedy(model, prompt(), 8), tokens[0])
    assert torch.equal(greedy(model, tokens=8, **padded), tokens[1])
    assert max([0, *described]) <= 8 * 48, "a mask of length x length was stored"


@pytest.mark.parametrize("name", CACHED)
@pytest.mark.parametrize("small", [True, False], ids=["dense", "described"])
def test_a_cache_that_is_continued(name, small, request):
    if not small:
        request.getfixturevalue("described")
    model, ids = tiny(name), prompt(length=60, batch=2)
    whole = logits(model, ids)
    patch(model)
    for sizes in ([17, 17, 17, 9], [20, *[1] * 40], [40, 8, 8, 4]):
        for cache in (None, DynamicCache()):
            assert relative_error(in_parts(model, ids, sizes, cache), whole) < TOLERANCE, sizes


@pytest.mark.parametrize("name", CACHED)
def test_static_caches_are_right(name):
    """Also where stock is not: GPT-Neo's windows are wrong there, and Falcon's ALiBi raises."""
    if name in ("xglm", "trocr", "mvp") and not RECORDS_PAST:
        pytest.skip("their positions take no static cache in older transformers")
    model, ids = tiny(name), prompt(length=50)
    whole, tokens = logits(model, ids), greedy(model, ids, 8, use_cache=True)
    patch(model)
    cache = StaticCache(model.config, max_cache_len=64)
    assert relative_error(in_parts(model, ids, [30, *[1] * 20], cache), whole) < TOLERANCE
    options = {"cache_implementation": "static", "disable_compile": True, "use_cache": True}
    assert torch.equal(greedy(model, ids, 8, **options), tokens)
    padded = left_padded()
    unpatch(model)
    expected = greedy(model, tokens=8, use_cache=True, **padded)
    patch(model)
    assert torch.equal(greedy(model, tokens=8, **padded, **options), expected)


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("name", ["bloom", "falcon_new", "gpt_neo", "gptj"])
def test_quantized_caches(name, kind):
    model, ids = tiny(name), prompt(length=300)
    whole = logits(model, ids)
    patch(model, cache=kind)
    ours = in_parts(model, ids, [260, *[1] * 20, 20], DynamicCache(config=model.config))
    assert relative_error(ours[:, :260], whole[:, :260]) < TOLERANCE
    cosine = nn.functional.cosine_similarity(ours[0, 260:], whole[0, 260:], dim=-1)
    assert cosine.mean() > (0.99 if kind == "int8" else 0.85) and not torch.equal(ours[:, 260:], whole[:, 260:])


@every_model
def test_attention_weights_are_answered(name):
    model, inputs = tiny(name), left_padded()
    wrong = name.startswith("falcon")  # stock adds ALiBi twice, and its other models see the future
    stock = None if wrong else model(**inputs, output_attentions=True).attentions
    patch(model)
    out = model(**inputs, output_attentions=True)
    rows = torch.stack([weights.tril().sum(-1) for weights in out.attentions])
    real = inputs["attention_mask"][:, None, :, None].bool()
    assert len(out.attentions) == 4 and ((rows - 1).abs() * real[..., 0]).max() < 1e-5
    assert relative_error(out.logits * real[:, 0], logits(model, **inputs)) < TOLERANCE
    if stock is not None:
        assert all(((a - b) * real).abs().max() < 1e-5 for a, b in zip(out.attentions, stock, strict=True))
    assert not any(part is not None for part in model(**inputs).attentions or ())


@every_model
@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["plain", "checkpoints", "reentrant"])
def test_gradients_agree_with_stock(name, checkpointing, described):
    inputs, gradients = left_padded(), []
    for patched in (False, True):
        model = tiny(name)
        if checkpointing is not None:
            if not model.supports_gradient_checkpointing:
                pytest.skip("it has no gradient checkpointing")
            model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
            model.enable_input_require_grads()
        patch(model) if patched else None
        if name in ("trocr", "mvp", "xglm"):
            model.config.dropout = 0.0
        model.train()
        for module in model.modules():
            if isinstance(getattr(module, "layerdrop", None), float):
                module.layerdrop = 0.0
            for kind in ("dropout", "attention_dropout", "activation_dropout", "hidden_dropout", "attn_dropout_p"):
                if isinstance(getattr(module, kind, None), float):
                    setattr(module, kind, 0.0)
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        real = inputs["attention_mask"].bool()
        labels = inputs["input_ids"].masked_fill(~(real & real.roll(1, -1)), -100)  # nothing is said of padding
        model(**inputs, labels=labels, use_cache=False).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    stock, ours = gradients
    assert (ours - stock).abs().max() < TOLERANCE * stock.abs().max()


@pytest.mark.parametrize("name", ["bloom", "mpt", "gptj", "gpt_neox_japanese"])
def test_dropout_is_applied(name):
    """In training, to the weights: outputs differ from call to call, and are those of stock on average."""
    model = patch(tiny(name))
    expected = logits(model, prompt(length=12))
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for module in model.modules():
        if isinstance(module, handwritten.WithScores):
            getattr(module, module.made[1].dropout).p = 0.3
        elif isinstance(module, handwritten.WithForward):
            setattr(module, "attn_dropout_p", 0.3) if name == "mpt" else setattr(module.attention_dropout, "p", 0.3)
    with torch.no_grad():
        first, second = model(prompt(length=12)).logits, model(prompt(length=12)).logits
    assert not torch.equal(first, second) and not torch.equal(first, expected)


@every_model
def test_copies_and_pickles(name):
    model = patch(tiny(name))
    expected = logits(model, prompt())
    other = copy.deepcopy(model)
    assert [type(a) for a in other.modules()] == [type(a) for a in model.modules()]
    for name, module in list(other.named_modules()):
        if isinstance(module, handwritten.Replaced):
            again = pickle.loads(pickle.dumps(module))
            assert type(again) is type(module)
            other.set_submodule(name, again)
    assert torch.equal(logits(other, prompt()), expected)
    changed = [module for module in model.modules() if isinstance(module, handwritten.Replaced)]
    for module in changed:
        kind = type(module)
        assert (kind.__module__, kind.__qualname__) == (module.made[0].__module__, module.made[0].__qualname__)
        assert isinstance(module, module.made[0]) and kind is not module.made[0]
    unpatch(model)
    assert not any(isinstance(module, handwritten.Replaced) for module in changed)


@pytest.mark.parametrize("name", ["bloom", "gptj", "mpt"])
def test_under_a_hook_of_accelerate(name):
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module

    model = tiny(name)
    stock = logits(model, prompt())
    for module in model.modules():
        if type(module).__name__ in CLASSES:
            add_hook_to_module(module, AlignDevicesHook(execution_device="cpu"))
    patch(model)
    calls = []
    original = handwritten._attend
    with pytest.MonkeyPatch.context() as patching:
        patching.setattr(handwritten, "_attend", lambda *args: calls.append(1) or original(*args))
        assert relative_error(logits(model, prompt()), stock) < TOLERANCE
    assert len(calls) == 4
    unpatch(model)
    assert torch.equal(logits(model, prompt()), stock)
    remove_hook_from_module(model, recurse=True)
    assert torch.equal(logits(model, prompt()), stock)


@pytest.mark.parametrize("name", ["bloom", "mpt", "falcon_alibi", "falcon_new", "gptj", "gpt_neo", "xglm"])
def test_compiling_after_a_patch(name):
    model = tiny(name)
    stock = logits(model, **left_padded())
    compiled = torch.compile(patch(model), backend="aot_eager", dynamic=False)
    assert relative_error(logits(compiled, use_cache=False, **left_padded()), stock) < TOLERANCE


@every_model
def test_continuous_batching_is_refused(name):
    """Stock answers, wrongly."""
    model = patch(tiny(name))
    small = ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=64)
    config = GenerationConfig(max_new_tokens=2, do_sample=False, eos_token_id=-1, pad_token_id=0)
    with pytest.raises(UnsupportedModel, match=r"(?s)hand-written.*padded batch"):
        model.generate_batch([[4, 5, 6]], generation_config=config, continuous_batching_config=small)


@pytest.mark.parametrize("name", ["bloom", "falcon_mqa", "mpt", "gptj", "codegen"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_near_as_stock(name, dtype):
    model = tiny(name).to(dtype)
    exact = logits(copy.deepcopy(model).float(), **left_padded())
    stock = relative_error(logits(model, **left_padded()), exact)
    assert relative_error(logits(patch(model), **left_padded()), exact) < 1.2 * stock


@pytest.mark.parametrize("name", ALIBI)
def test_beyond_the_length_that_it_was_made_for(name):
    """ALiBi extrapolates. MPT's table ends there in stock, which raises."""
    short = {"mpt": {"max_seq_len": 32}, "falcon_alibi": {"max_position_embeddings": 32}}.get(name, {})
    model, expected = tiny(name, **short), logits(tiny(name), prompt(length=90))
    if name == "mpt":
        with pytest.raises(RuntimeError):
            logits(model, prompt(length=90))
    patch(model)
    assert relative_error(logits(model, prompt(length=90)), expected) < TOLERANCE
    assert relative_error(in_parts(model, prompt(length=90), [60, *[1] * 30]), expected) < TOLERANCE


def test_mpt_generates_with_a_cache():
    """Its configuration says use_cache=False, so stock computes the whole text again for every token."""
    model = tiny("mpt")
    stock = greedy(model, prompt(), 8)
    assert model.generation_config.use_cache is False
    patch(model)
    lengths = []
    model.register_forward_pre_hook(lambda m, args, kw: lengths.append(kw["input_ids"].shape[1]), with_kwargs=True)
    assert torch.equal(greedy(model, prompt(), 8), stock) and lengths == [40, *[1] * 7]
    lengths.clear()
    assert torch.equal(greedy(model, prompt(), 8, use_cache=False), stock) and lengths == [*range(40, 48)]
    assert model.generation_config.use_cache is False and model.config.use_cache is False


def test_falcon_caches_the_heads_that_it_has():
    model = patch(tiny("falcon_new"))
    with torch.no_grad():
        cache = model(prompt(), use_cache=True).past_key_values
    assert cache.layers[0].keys.shape == (1, 2, 40, 16) and model.config.num_attention_heads == 4


def test_bloom_counts_the_tokens_that_are_seen():
    """Holes in a mask do not count as distance, as in stock."""
    model, ids = tiny("bloom"), prompt(length=40, batch=2)
    mask = torch.ones_like(ids)
    mask[0, 5:9] = mask[0, 20:31] = mask[1, :3] = 0
    stock = logits(model, ids, mask)
    assert relative_error(logits(patch(model), ids, mask), stock) < TOLERANCE


@pytest.mark.parametrize("heads", [1, 2, 3, 4, 12, 16, 25, 32, 71, 112])
def test_slopes_are_those_of_the_models(heads):
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor
    from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

    bloom = build_alibi_tensor(torch.ones(1, 2), heads, torch.float32)[:, 0, 1]
    mpt = -build_mpt_alibi_tensor(heads, 2)[:, 0, 0]
    assert torch.allclose(torch.tensor(bloom_slopes(heads)), bloom, rtol=1e-5)
    assert torch.allclose(torch.tensor(mpt_slopes(heads)), mpt, rtol=1e-6)


@pytest.mark.parametrize("name", [name for name in MODELS if name in ("xglm", "trocr", "mvp", "roformer")])
def test_cross_attention_stays(name):
    """Only self-attention is replaced; what is asked of an encoder's output is stock's."""
    overrides = {"add_cross_attention": True} if name in ("xglm", "roformer") else {}
    model, states = tiny(name, **overrides), torch.randn(2, 9, 64, generator=torch.Generator().manual_seed(1))
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, 6:] = 0
    options = {"encoder_hidden_states": states, "encoder_attention_mask": mask, "use_cache": False}
    try:
        stock = logits(model, prompt(batch=2), **options)
    except Exception as error:
        pytest.skip(f"stock: {error}")
    assert relative_error(logits(patch(model), prompt(batch=2), **options), stock) < TOLERANCE


def test_what_is_not_causal_is_left_alone():
    model = build("rembert", is_decoder=False)
    stock = logits(model, prompt())
    assert "reason" in entry(report(patch(model)).to_dict(), "attention") and torch.equal(
        logits(model, prompt()), stock
    )


def test_classes_of_the_same_name_elsewhere_are_left_alone():
    model = tiny("bloom")
    for module in model.modules():
        if type(module).__name__ == "BloomAttention":
            module.__class__ = type("BloomAttention", (type(module),), {"__module__": "somewhere"})
    reason = entry(report(patch(model)).to_dict(), "attention")["reason"]
    assert "hand-written" in reason
