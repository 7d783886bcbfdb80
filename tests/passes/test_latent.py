"""Attention to cached latents without expanding them: the products themselves, and whole models."""

import copy
import pickle

import pytest
import torch
from cases import build, entry, greedy, left_padded, logits, prompt, relative_error
from transformers import DynamicCache
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention

from hf_accel_patch import patch, plan, report, unpatch
from hf_accel_patch.kernels import cpu_decode
from hf_accel_patch.ops import latent
from hf_accel_patch.ops.attention import reference
from hf_accel_patch.ops.case import Dense, Everything, Variant
from hf_accel_patch.ops.latent import Latent, Latents, attend_latents
from hf_accel_patch.passes.latent import latent_class, latent_modules

TOLERANCE = 1e-4  # of the logits' standard deviation; float32 rounding gives about 5e-6
DTYPES = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}  # of the largest output; one rounding of
# the absorbed query and one of the weighted latents
SIZES = dict(kv_lora_rank=128, qk_rope_head_dim=16, qk_nope_head_dim=32, v_head_dim=24)
TYPES = (
    "deepseek_v3",
    "deepseek_v2",
    "minicpm3",
    "longcat_flash",
    "kimi_linear",
    "glm4_moe_lite",
    "youtu",
    "axk1",
    "bailing_hybrid",
)


def deepseek(**overrides):
    """A tiny model in which a few tokens pay off; four layers, of which half are dense."""
    if not hasattr(DeepseekV3Attention, "expand_kv"):
        pytest.skip("transformers before 5.15 caches what latents expand to")
    return build("deepseek_v3", **SIZES | overrides)


@pytest.fixture
def stays(monkeypatch):
    """How many tokens each call had that was attended in the space of latents."""
    from hf_accel_patch.passes import attention

    calls, real = [], attention.attend_latents

    def counted(query, *rest):
        calls.append(query.shape[2])
        return real(query, *rest)

    monkeypatch.setattr(attention, "attend_latents", counted)
    return calls


# ---------------------------------------------------------------------------------------------------------- products


def random_latents(B=2, H=5, S=150, R=40, P=8, N=12, V=20, dtype=torch.float32):
    """Latents in the middle of larger buffers, as a cache has them, and a weight."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    cached, rotated, weight = drawn(B, 1, S + 9, R)[:, :, 4 : S + 4], drawn(B, 1, S, P), drawn(H * (N + V), R) * R**-0.5

    def expand():
        heads = (cached @ weight.T).view(B, S, H, N + V).transpose(1, 2)
        return torch.cat((heads[..., :N], rotated.expand(-1, H, -1, -1)), dim=-1), heads[..., N:]

    return Latents(cached, rotated, N, V, H, False, lambda: weight, expand), drawn(B, H, 3, N + P)


def exact(query, latents, mask, variant):
    """In float64, with the keys and values of every head."""
    double = Latents(
        latents.latent.double(), latents.rotated.double(), latents.key_size, latents.value_size, latents.heads, False,
        latents.weight, latents.expand,
    )  # fmt: skip
    weight, (B, _, S, _) = latents.weight().double(), double.latent.shape
    heads = (double.latent @ weight.T).view(B, S, latents.heads, -1).transpose(1, 2)
    keys = torch.cat((heads[..., : latents.key_size], double.rotated.expand(-1, latents.heads, -1, -1)), dim=-1)
    return reference(query.double(), keys, heads[..., latents.key_size :], mask, variant).transpose(1, 2)


@pytest.mark.parametrize("way", ("kernel", "parts"))
@pytest.mark.parametrize("dtype", DTYPES)
def test_products_agree_with_float64(way, dtype, monkeypatch):
    if way == "kernel" and cpu_decode.library() is None:
        pytest.skip(cpu_decode.why_not())
    monkeypatch.setattr(latent, "MOST_TOKENS", 16 if way == "kernel" else 0)
    monkeypatch.setattr(latent, "PART_TOKENS", 64)
    latents, query = random_latents(dtype=dtype)
    T, S = query.shape[2], latents.latent.shape[2]
    mask = torch.ones(2, 1, T, S, dtype=torch.bool).tril(S - T)
    mask[1, :, :, :7] = False  # padded on the left
    sinks = torch.randn(1, query.shape[1], 1, 1, generator=torch.Generator().manual_seed(1))
    for variant in (Variant(0.3), Variant(0.3, softcap=2.0, sinks=sinks)):
        ours = attend_latents(query, latents, Dense(mask), variant)
        want = exact(query, latents, mask.expand(-1, query.shape[1], -1, -1), variant)
        assert ours.shape == want.shape and ours.dtype is dtype
        assert (ours - want).abs().max() <= DTYPES[dtype] * want.abs().max()


def test_bfloat16_is_as_good_as_expanding():
    latents, query = random_latents(S=700, R=128, dtype=torch.bfloat16)
    variant, mask = Variant(0.3), Everything(700)
    want = exact(query, latents, None, variant)
    keys, values = latents.expanded
    stock = torch.nn.functional.scaled_dot_product_attention(query, keys, values, scale=0.3).transpose(1, 2)
    ours, theirs = ((x - want).square().mean().sqrt() for x in (attend_latents(query, latents, mask, variant), stock))
    assert ours <= 1.2 * theirs


def test_the_way_without_kernels_of_the_cpu(monkeypatch):
    """What other devices do: it is plain PyTorch."""
    latents, query = random_latents()
    monkeypatch.setattr(latent, "MOST_TOKENS", 0)
    monkeypatch.setattr(torch.Tensor, "is_cpu", property(lambda self: False))
    ours = attend_latents(query, latents, Everything(150), Variant(0.3))
    monkeypatch.undo()
    assert (ours - exact(query, latents, None, Variant(0.3))).abs().max() < 1e-5


@pytest.mark.parametrize("width", (64, 32))
@pytest.mark.parametrize("dtype", DTYPES)
def test_keys_in_two_parts(dtype, width):
    kernels = cpu_decode.library(width)
    if kernels is None:
        pytest.skip(cpu_decode.why_not(width))
    generator, what = torch.Generator().manual_seed(0), (0.1, None, None, None)
    for first, rest in ((512, 64), (40, 24), (33, 7), (5, 3)):
        sizes = ((6, 5), (2, 700), (2, 700))
        q, k, v = (torch.randn(2, n, t, first + rest, generator=generator).to(dtype) for n, t in sizes)
        parts = k[..., :first].contiguous(), k[..., first:].contiguous()
        whole = cpu_decode.attend(kernels, q, None, 8, 0, k, v, None, *what)
        parted = cpu_decode.attend(kernels, q, None, 8, 0, parts[0], v, None, *what, parts[1])
        assert (whole.float() - parted.float()).abs().max() <= DTYPES[dtype]


def test_described_tensors_compute_like_dense_ones():
    latents, _ = random_latents()
    keys, values = Latent(latents, 0), Latent(latents, 1)
    assert keys.shape == latents.expanded[0].shape and values.shape == latents.expanded[1].shape
    assert torch.equal(keys + 1, latents.expanded[0] + 1)
    assert torch.equal(values.reshape(-1), latents.expanded[1].reshape(-1))
    assert torch.equal(torch.cat((values, values)), torch.cat((latents.expanded[1],) * 2))
    with pytest.raises(RuntimeError, match="cannot be changed in place"):
        keys.add_(1)


def test_few_operations_are_chosen():
    latents, _ = random_latents(B=1, H=2, S=4096, R=512, P=64, N=128, V=128)
    assert latents.stay(1) and latents.stay(64) and not latents.stay(512)
    short, _ = random_latents(B=1, H=2, S=64, R=512, P=64, N=128, V=128)
    assert short.stay(1) and not short.stay(64)


# ------------------------------------------------------------------------------------------------------------ models


@torch.no_grad()
def in_pieces(model, ids, *sizes):
    cache = DynamicCache(config=model.config)
    pieces = [model(piece, past_key_values=cache, use_cache=True).logits for piece in ids.split(list(sizes), dim=1)]
    return torch.cat(pieces, dim=1)


def test_models_agree_with_stock(stays):
    model, ids, padded = deepseek(), prompt(60, 2), left_padded()
    whole = logits(model, ids)
    tokens = [greedy(model, tokens=8, **padded), greedy(model, tokens=8, num_beams=3, **padded)]
    static = greedy(model, ids, 8, cache_implementation="static", disable_compile=True)
    patch(model)
    row = entry(report(model).to_dict(), "attention")
    assert row["latent"] == row["modules"] == model.config.num_hidden_layers and row["exact"]
    assert relative_error(logits(model, ids), whole) < TOLERANCE and not stays, "a prefill was not expanded"
    for sizes in ([40, 20], [20] + [1] * 40, [45] + [5] * 3, [50, 2, 8]):
        assert relative_error(in_pieces(model, ids, *sizes), whole) < TOLERANCE
    assert {1, 2, 5} <= set(stays)
    stays.clear()
    assert torch.equal(greedy(model, tokens=8, **padded), tokens[0]) and stays
    assert torch.equal(greedy(model, tokens=8, num_beams=3, **padded), tokens[1])
    stays.clear()
    assert torch.equal(greedy(model, ids, 8, cache_implementation="static", disable_compile=True), static) and stays


@pytest.mark.parametrize("name", TYPES)
def test_types(name, stays):
    try:
        deepseek()
        model = build(name, kv_lora_rank=128, **{"v_head_dim": 16} if name == "kimi_linear" else {})
    except (KeyError, TypeError) as error:
        pytest.skip(f"not in this transformers: {error}")
    ids, padded = prompt(40), left_padded()
    stock, tokens = logits(model, ids), greedy(model, tokens=8, **padded)
    patch(model)
    assert entry(report(model).to_dict(), "attention")["latent"] == len(latent_modules_of(model))
    assert relative_error(in_pieces(model, ids, 30, *[1] * 10), stock) < TOLERANCE and stays
    assert torch.equal(greedy(model, tokens=8, **padded), tokens)
    unpatch(model)
    assert torch.equal(logits(model, ids), stock)


def latent_modules_of(model):
    return [module for module in model.modules() if hasattr(type(module), "expand_kv")]


def test_models_without_latents_say_nothing():
    assert "latent" not in entry(plan(build("llama")).to_dict(), "attention")


def test_assisted_decoding(stays):
    model, ids = deepseek(), prompt(30)
    stock = greedy(model, ids, 16)
    patch(model)
    drafts = deepseek(num_hidden_layers=2)
    assert torch.equal(greedy(model, ids, 16, assistant_model=drafts), stock)
    assert max(stays) > 1


def test_attentions_are_answered(stays):
    model, ids = deepseek(), prompt(30)
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    patch(model)
    options = dict(return_dict_in_generate=True, output_attentions=True, max_new_tokens=3, do_sample=False)
    mine, theirs = (each.generate(ids, **options).attentions for each in (model, eager))
    assert not stays
    for ours, stock in zip(mine, theirs, strict=True):
        assert all((a - b).abs().max() < TOLERANCE for a, b in zip(ours, stock, strict=True))


def test_gradients_flow_as_in_stock(stays):
    stock, ids = deepseek(), prompt(40)
    ours = patch(copy.deepcopy(stock))
    for model in (stock, ours):
        cache = DynamicCache(config=model.config)
        model(ids[:, :30], past_key_values=cache, use_cache=True)
        model(ids[:, 30:33], past_key_values=cache, use_cache=True).logits.sum().backward()
    assert not stays
    largest = max(parameter.grad.abs().max() for parameter in stock.parameters() if parameter.grad is not None)
    for mine, theirs in zip(ours.parameters(), stock.parameters(), strict=True):
        if theirs.grad is not None:
            assert (mine.grad - theirs.grad).abs().max() <= TOLERANCE * largest


def test_it_comes_off_and_copies_and_pickles(stays):
    model, ids = deepseek(), prompt(40)
    stock, kinds = logits(model, ids), [type(module) for module in model.modules()]
    patch(model)
    module = latent_modules_of(model)[0]
    own = type(module).__mro__[2]
    assert type(module) is not own and isinstance(module, own)
    assert (type(module).__name__, type(module).__module__) == (own.__name__, own.__module__)
    twin, again = copy.deepcopy(model), pickle.loads(pickle.dumps(module))
    assert type(again) is type(module) is latent_class(own, "hf_accel_patch")
    unpatch(model)
    assert [type(module) for module in model.modules()] == kinds and torch.equal(logits(model, ids), stock)
    stays.clear()
    assert relative_error(in_pieces(twin, ids, 30, *[1] * 10), stock) < TOLERANCE and stays
    unpatch(twin)
    assert [type(module) for module in twin.modules()] == kinds and torch.equal(logits(twin, ids), stock)


@pytest.mark.parametrize("scheme", ("int8", "int4", "nf4"))
def test_quantized_weights_are_unpacked(scheme, stays):
    model = patch(deepseek(num_hidden_layers=2), quantize=scheme)
    module, generator = latent_modules_of(model)[0], torch.Generator().manual_seed(0)
    shapes = (1, 1, 300, SIZES["kv_lora_rank"]), (1, 1, 300, SIZES["qk_rope_head_dim"])
    with torch.no_grad():
        keys, values = module.expand_kv(*(torch.randn(shape, generator=generator) for shape in shapes))
        query = torch.randn(1, keys.shape[1], 1, keys.shape[3], generator=generator)
        assert isinstance(keys, Latent) and keys.latents.unpacks and keys.latents.stay(1)
        ours = attend_latents(query, keys.latents, Everything(300), Variant(0.2))
        stock = torch.nn.functional.scaled_dot_product_attention(query, keys + 0, values + 0, scale=0.2)
    # stock's products round activations as well
    assert (ours - stock.transpose(1, 2)).abs().max() < 0.03 * stock.abs().max()
    in_pieces(model, prompt(340), 330, *[1] * 10)
    assert 1 in stays


def test_quantized_caches(stays):
    """The same cache, attended to in the space of latents and expanded."""
    model, ids = deepseek(), prompt(150)
    with_latents, without = patch(copy.deepcopy(model), cache="int8"), patch(copy.deepcopy(model), cache="int8")
    for module in latent_modules_of(without):
        module.__class__ = type(module).__mro__[2]
    ours = greedy(with_latents, ids, 1), in_cache(with_latents, ids)
    assert stays
    stays.clear()
    theirs = greedy(without, ids, 1), in_cache(without, ids)
    assert not stays
    assert torch.equal(ours[0], theirs[0]) and relative_error(ours[1], theirs[1]) < TOLERANCE


@torch.no_grad()
def in_cache(model, ids):
    """Logits of the last steps over a cache that the model makes."""
    out = model(ids[:, :140], use_cache=True)
    parts = []
    for token in ids[:, 140:].split(1, dim=1):
        out = model(token, past_key_values=out.past_key_values, use_cache=True)
        parts.append(out.logits)
    return torch.cat(parts, dim=1)


def test_what_is_no_plain_product_is_left_alone(stays):
    """Adapters, hooks and stock's implementations are heeded when they come later."""
    model, ids = deepseek(), prompt(40)
    stock = logits(model, ids)
    patch(model)
    layer = latent_modules_of(model)[0]._modules["kv_b_proj"]
    handle = layer.register_forward_hook(lambda module, args, output: output * 2)
    changed = logits(model, ids)
    assert relative_error(changed, stock) > 1e-2
    assert relative_error(in_pieces(model, ids, 30, *[1] * 10), changed) < TOLERANCE
    handle.remove()
    stays.clear()
    model.set_attn_implementation("sdpa")
    assert relative_error(in_pieces(model, ids, 30, *[1] * 10), stock) < TOLERANCE and not stays
    model.set_attn_implementation("hf_accel_patch")
    assert relative_error(in_pieces(model, ids, 30, *[1] * 10), stock) < TOLERANCE and stays


def test_a_module_that_expands_otherwise_is_left_alone():
    from hf_accel_patch.families import bind

    model = deepseek()
    own = type(latent_modules_of(model)[0])
    assert len(latent_modules(bind(model))) == model.config.num_hidden_layers

    def swapped(self, kv_nope, k_rot):
        keys, values = own.expand_kv(self, kv_nope, k_rot)
        return keys, -values

    other = type("Other", (own,), {"expand_kv": swapped, "__module__": own.__module__})
    for each in latent_modules_of(model):
        each.__class__ = other
    assert latent_modules(bind(model)) == []
