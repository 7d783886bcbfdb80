"""Fewer key/value heads: what is found of a layer, what is written, what is refused, and what goes on working after it.

That every architecture is converted without loss where there is none to have is in test_converted_architectures.py; the
math is in tests/ops/test_heads.py.
"""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from cases import FAMILIES, build, entry, greedy, left_padded, logits, prompt, relative_error, tiny
from fingerprint import changes, describe, fingerprint
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

import hf_accel_patch.families.freedom as trying
from hf_accel_patch import (
    GQA,
    HfAccelConfig,
    HfAccelError,
    NotReversible,
    Quantize,
    UnsupportedModel,
    load,
    patch,
    patched,
    plan,
    report,
    unpatch,
)
from hf_accel_patch.families import bind
from hf_accel_patch.families.equivalent import export
from hf_accel_patch.families.freedom import freedom
from hf_accel_patch.families.heads import layouts, shared_heads

OFF: dict[str, Any] = {"attention": False, "cache": False}
WITHOUT = ("gpt2", "gpt_neox", "bloom", "mpt", "opt", "gptj", "gpt_neo", "falcon_alibi")  # classes without such heads
EXACT = 1e-4


def multi_head(kind: str = "llama", heads: int = 4) -> PreTrainedModel:
    return build(kind, num_key_value_heads=heads)


def said(model: PreTrainedModel) -> dict[str, Any]:
    return entry(report(model).to_dict(), "gqa")


def texts(count: int = 8) -> list[Tensor]:
    return [prompt(60, seed=seed)[0] for seed in range(count)]


# ------------------------------------------------------------------------------------------------ what is found


def test_how_keys_are_rotated_is_found() -> None:
    def of(kind: str) -> tuple[list[list[int]], list[int]]:
        view = bind(build(kind))
        keys, _ = freedom(view, layouts(view, shared_heads(view.config)))[0]
        return keys.pairs.tolist(), keys.free.tolist()

    assert of("llama") == ([[i, i + 8] for i in range(8)], [])
    assert of("cohere") == ([[i, i + 1] for i in range(0, 16, 2)], [])
    assert of("gptj") == ([[i, i + 1] for i in range(0, 8, 2)], [*range(8, 16)])
    assert of("glm")[0] == [[i, i + 1] for i in range(0, 8, 2)] and of("glm")[1] == [*range(8, 16)]
    assert of("gpt_neox")[0][0] == [0, len(of("gpt_neox")[0])] and len(of("gpt_neox")[1]) > 0
    for kind in ("gpt2", "bloom", "opt"):
        assert of(kind) == ([], [*range(16)]), kind
    for kind in ("qwen3", "olmo2", "gemma3_text"):  # norms
        assert of(kind) == ([], []), kind


def test_layers_are_tried_one_by_one() -> None:
    view = bind(build("smollm3", no_rope_layers=[1, 0, 1, 0], num_key_value_heads=4))
    found = freedom(view, layouts(view, 4))
    assert [len(keys.pairs) for keys, _ in found] == [8, 0, 8, 0] and [len(keys.free) for keys, _ in found] == [
        0,
        16,
        0,
        16,
    ]


@pytest.mark.parametrize(
    "kind, free", [("llama", 16), ("gpt_oss", 16), ("bitnet", 0), ("gemma3n_text", 0), ("olmo2", 16)]
)
def test_values_that_do_not_arrive_as_they_are_stay(kind: str, free: int) -> None:
    """BitNet has a norm before its output projection, Gemma 3n one of values; sinks only make them smaller."""
    view = bind(build(kind))
    assert {len(values.free) for _, values in freedom(view, layouts(view, shared_heads(view.config)))} == {free}


@torch.no_grad()
def test_a_clamp_forbids_mixing() -> None:
    view = bind(build("olmo", clip_qkv=8.0))
    assert not any(len(keys.pairs) or len(values.free) for keys, values in freedom(view, layouts(view, 2)))


@torch.no_grad()
def test_keys_under_a_norm_are_only_grouped() -> None:
    model = multi_head("qwen3")
    attention = model.model.layers[0].self_attn
    query, key = attention.q_proj.weight.view(4, 16, -1).clone(), attention.k_proj.weight.view(4, 16, -1).clone()
    patch(model, gqa=2, **OFF)
    order = [
        int(((query - moved).abs().amax((1, 2)) < 1e-5).nonzero()) for moved in attention.q_proj.weight.view(4, 16, -1)
    ]
    assert sorted(order) == [0, 1, 2, 3]
    mean = key[order].view(2, 2, 16, -1).mean(1)
    torch.testing.assert_close(attention.k_proj.weight.view(2, 16, -1), mean, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_slopes_keep_their_heads() -> None:
    """BLOOM's third head must stay the third: what it attends to depends on its place."""
    model = tiny("bloom")
    fused = model.transformer.h[0].self_attention.query_key_value
    for merge in ("mean", "aligned"):
        before = fused.weight.view(4, 3, 16, -1)[:, 0].clone()
        patch(model, gqa=GQA(2, merge=merge))
        after = fused.weight.view(2, 4, 16, -1)[:, :2].reshape(4, 16, -1)
        same = [torch.allclose(a, b) for a, b in zip(before, after, strict=True)]
        near = nn.functional.cosine_similarity(before.norm(dim=-2).view(4, -1), after.norm(dim=-2).view(4, -1))
        assert all(same) if merge == "mean" else not any(same) and (near > 0.5).all()
        unpatch(model)


# ---------------------------------------------------------------------------------------------- what is written


def test_the_model_is_one_of_its_class_with_fewer_heads() -> None:
    model = multi_head()
    config, parameters = model.config, sum(p.numel() for p in model.parameters())
    patch(model, gqa=1, **OFF)
    assert type(model) is LlamaForCausalLM and config.num_key_value_heads == 4
    assert model.config.num_key_value_heads == model.model.layers[3].self_attn.config.num_key_value_heads == 1
    fresh = LlamaForCausalLM(model.config)
    shapes = {name: p.shape for name, p in fresh.named_parameters()}
    assert {name: p.shape for name, p in model.named_parameters()} == shapes
    for mine, theirs in zip(model.modules(), fresh.modules(), strict=True):
        plain = {k: v for k, v in vars(theirs).items() if isinstance(v, int | float) and k != "training"}
        assert {k: vars(mine)[k] for k in plain} == plain
    row = said(model)
    assert (row["was"], row["kv_heads"], row["merge"], row["layers"], row["exact"]) == (4, 1, "aligned", 4, False)
    assert (row["cache_bytes_per_token_before"], row["cache_bytes_per_token_after"]) == (4 * 4 * 32 * 4, 4 * 32 * 4)
    saved = 4 * 2 * 3 * 16 * 64
    assert sum(p.numel() for p in model.parameters()) == parameters - saved
    assert row["bytes_before"] - row["bytes_after"] == 4 * saved


@pytest.mark.parametrize("family", ["llama", "phi3", "mistral", "gpt_oss", *WITHOUT])
def test_cache_and_plan(family: str) -> None:
    model = tiny(family) if family in WITHOUT else multi_head(family)
    expected = plan(model, gqa=2).to_dict()
    before = _cached(patch(model))
    unpatch(model)
    patch(model, gqa=2)
    row = said(model)
    assert 2 * _cached(model) == before and entry(expected, "gqa") == row
    assert row["bytes_before"] - row["bytes_after"] > 0
    alone = logits(model, prompt())
    padded = left_padded(40, 20)
    ids = torch.cat((padded["input_ids"][:1], prompt(40)), 0)
    assert alone.isfinite().all() and logits(model, ids).isfinite().all()
    steps = greedy(model, prompt(), 6)
    whole = logits(model, torch.cat((prompt(), steps), 1))[:, 39:-1].argmax(-1)
    assert torch.equal(steps, whole), "with the cache it computes something else than without"


def _cached(model: PreTrainedModel) -> int:
    with torch.no_grad():
        layers = model(input_ids=prompt(), use_cache=True).past_key_values.layers
    return sum(layer.keys[:, :, :30].numel() * 4 + layer.values[:, :, :30].numel() * 4 for layer in layers)


@pytest.mark.parametrize("calibrate", [None, texts(2)], ids=["random tokens", "texts"])
@pytest.mark.parametrize("originals", ["keep", "discard"])
def test_originals(originals: Any, calibrate: Any) -> None:
    model = multi_head()
    before, stock = fingerprint(model), logits(model, prompt())
    weights = [p for name, p in model.named_parameters() if "self_attn" in name]
    patch(model, gqa=GQA(2, originals=originals, calibrate=calibrate), **OFF)
    assert not {id(p) for p in weights} & {id(p) for p in model.parameters()}
    if originals == "discard":
        with pytest.raises(NotReversible, match="originals='keep'"):
            unpatch(model)
        return
    unpatch(model)
    assert not changes(before, fingerprint(model)) and torch.equal(logits(model, prompt()), stock)


def test_discarded_originals_are_read_again(tmp_path: Any) -> None:
    multi_head().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    stock = logits(model, prompt())
    patch(model, gqa=GQA(2, originals="discard"), **OFF)
    assert torch.equal(logits(unpatch(model, reload=True), prompt()), stock)


def test_patched_refuses_to_discard() -> None:
    model = multi_head()
    with pytest.raises(ValueError, match="cannot discard"), patched(model, gqa=GQA(2, originals="discard")):
        pass
    with patched(model, gqa=2):
        assert model.config.num_key_value_heads == 2
    assert model.config.num_key_value_heads == 4


@pytest.mark.parametrize("calibrate", [None, texts(2)], ids=["random tokens", "texts"])
def test_discarding_frees_layer_by_layer(calibrate: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """When a layer is written, the weights of those before it are gone."""
    import weakref

    import hf_accel_patch.passes.converting as converting

    model = multi_head()
    weights = [weakref.ref(layer.self_attn.k_proj.weight) for layer in model.model.layers]
    alive, write = [], converting._write

    def watched(*args: Any) -> None:
        alive.append(sum(each() is not None for each in weights))
        write(*args)

    monkeypatch.setattr(converting, "_write", watched)
    patch(model, gqa=GQA(2, originals="discard", calibrate=calibrate), **OFF)
    assert alive == [4, 3, 2, 1]


# ---------------------------------------------------------------------------------------------- quality and texts


@pytest.fixture(scope="module")
def wide() -> PreTrainedModel:
    """One layer of heads that are unlike each other, whose inputs have a few strong directions as trained ones have."""
    model = build("llama", num_attention_heads=8, num_key_value_heads=8, head_dim=8, num_hidden_layers=1)
    with torch.no_grad():
        table = model.get_input_embeddings().weight
        generator = torch.Generator().manual_seed(0)
        table.copy_(torch.randn(256, 6, generator=generator) @ torch.randn(6, 64, generator=generator) / 10)
    return model


def test_aligned_loses_less_than_the_mean(wide: PreTrainedModel) -> None:
    stock = logits(wide, prompt())
    error = {}
    for merge in ("aligned", "mean", "first", "random"):
        model = patch(copy.deepcopy(wide), gqa=GQA(4, merge=merge), **OFF)
        error[merge] = (logits(model, prompt()) - stock).norm().item()
    assert error["aligned"] < 0.6 * error["mean"]
    assert len(set(error.values())) == 4


def test_calibration_looks_at_the_texts(wide: PreTrainedModel) -> None:
    """Texts of a few tokens only: what matters for these is kept."""
    few = torch.arange(10, 14).repeat(15)[None, :50]
    stock = logits(wide, few)
    error = {}
    for calibrate in (None, [few[0]]):
        model = patch(copy.deepcopy(wide), gqa=GQA(2, calibrate=calibrate), **OFF)
        error[calibrate is None] = (logits(model, few) - stock).norm().item()
        assert (said(model).get("calibrated") == "on texts") == (calibrate is not None)
    assert error[False] < 0.7 * error[True]


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom"])
def test_outputs_are_fitted_to_the_texts(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the least-squares fit of the first layer's output projection, by a solver of its own in float64."""
    import hf_accel_patch.passes.correcting as correcting

    seen: dict[str, Any] = {}
    finish = correcting.Fit.finish

    def watched(self: correcting.Fit) -> None:
        if self.layout.index == 0:
            weight = self.layout.output.weight
            before = (weight if isinstance(self.layout.output, Conv1D) else weight.T).detach().double().clone()
            finish(self)
            after = (weight if isinstance(self.layout.output, Conv1D) else weight.T).detach().double()
            seen.update(before=before, after=after, fit=self)
        else:
            finish(self)

    monkeypatch.setattr(correcting.Fit, "finish", watched)
    model = tiny(family) if family in WITHOUT else multi_head(family)
    projection, inputs, outputs = seen, [], []
    layout = layouts(bind(model), 4)[0]
    hook = layout.output.register_forward_hook(lambda module, args, out: outputs.append(out.detach()))
    for ids in texts():
        logits(model, ids[None])
    hook.remove()
    patch(model, gqa=GQA(2, calibrate=texts()))
    hook = layout.output.register_forward_pre_hook(lambda module, args: inputs.append(args[0].detach()))
    for ids in texts():
        logits(model, ids[None])
    hook.remove()
    bias = 0 if layout.output.bias is None else layout.output.bias.detach()
    x, y = torch.cat(inputs, 1)[0].double(), (torch.cat(outputs, 1)[0] - bias).double()
    ridge = (correcting.RIDGE * x.square().sum(0).mean()) ** 0.5
    tall = torch.cat((x, ridge * torch.eye(x.shape[1]).double()))
    wanted = torch.cat((y, ridge * projection["before"]))
    expected = torch.linalg.lstsq(tall, wanted).solution
    torch.testing.assert_close(projection["after"], expected, rtol=1e-3, atol=1e-4)
    lost = {when: (x @ projection[when] - y).square().sum() for when in ("before", "after")}
    assert lost["after"] < 0.9 * lost["before"]


def test_moments_in_parts_are_those_of_the_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """With room for one layer at a time, later layers see what the converted ones before them give."""
    import hf_accel_patch.passes.converting as converting

    model, stock = multi_head(), logits(multi_head(), prompt())
    monkeypatch.setattr(converting, "MOMENTS_BYTES", 1)
    seen, taken = [], converting._moments

    def counted(work: Any, part: Any, rotary: Any) -> Any:
        seen.append([each.index for each in part])
        return taken(work, part, rotary)

    monkeypatch.setattr(converting, "_moments", counted)
    patch(model, gqa=2, **OFF)
    assert seen == [[0], [1], [2], [3]] and not torch.equal(logits(model, prompt()), stock)


def test_what_cannot_be_tried_out_is_not_mixed(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any) -> Any:
        raise RuntimeError("no")

    monkeypatch.setattr(trying, "_tried", broken)
    view = bind(multi_head())
    assert all(not len(k.pairs) and not len(k.free) and not len(v.free) for k, v in freedom(view, layouts(view, 4)))
    assert logits(patch(multi_head(), gqa=2, **OFF), prompt()).isfinite().all()


# ------------------------------------------------------------------------------------------------------- refusals

REFUSED: dict[str, tuple[type[Exception], dict[str, Any], str]] = {
    "merge": (
        ValueError,
        {"kv_heads": 2, "merge": "median"},
        "unknown merge 'median'; allowed: aligned, mean, first, random",
    ),
    "heads": (TypeError, {"kv_heads": 2.0}, "kv_heads=2.0 is not a number"),
    "bool": (TypeError, {"kv_heads": True}, "kv_heads=True is not a number"),
    "originals": (ValueError, {"kv_heads": 2, "originals": "burn"}, "originals='burn'; allowed: 'keep', 'discard'"),
    "calibrate": (ValueError, {"kv_heads": 2, "merge": "mean", "calibrate": ["x"]}, "applies to merge='aligned'"),
    "texts": (TypeError, {"kv_heads": 2, "calibrate": "text"}, "takes a list of texts"),
}


@pytest.mark.parametrize("kind, options, text", REFUSED.values(), ids=REFUSED)
def test_impossible_options(kind: type[Exception], options: dict[str, Any], text: str) -> None:
    with pytest.raises(kind, match=text):
        GQA(**options)


@pytest.mark.parametrize("kv_heads", [3, 0, -1, 8])
def test_a_number_that_does_not_divide_names_those_that_do(kv_heads: int) -> None:
    model = multi_head()
    before = fingerprint(model)
    with pytest.raises(
        ValueError, match=rf"gqa={kv_heads}: .* has 4 key/value heads; allowed are its divisors: 1, 2, 4$"
    ):
        patch(model, gqa=kv_heads)
    assert not changes(before, fingerprint(model))


@pytest.mark.parametrize("family", FAMILIES)
def test_as_many_as_there_are_is_a_skip(family: str) -> None:
    if family in ("codegen", "deepseek_v3"):
        with pytest.raises(UnsupportedModel, match=r"not known|MLA"):
            patch(tiny(family), gqa=1)
        return
    model = tiny(family)
    now = shared_heads(model.config)
    patch(model, gqa=now, **OFF)
    assert f"it has {now} key/value head" in said(model)["reason"]


def test_models_that_cannot_have_it() -> None:
    for kind, text in (("mamba", "no attention with heads"), ("roberta", "no attention of ours"), ("zamba", "share")):
        with pytest.raises(UnsupportedModel, match=text):
            patch(build(kind), gqa=1)
    with pytest.raises(UnsupportedModel, match="convert the float model first"):
        patch(patch_and_forget(multi_head()), gqa=2)
    model = multi_head()
    model.model.layers[0].self_attn.k_proj.add_module("lora_A", nn.Linear(2, 2))
    with pytest.raises(UnsupportedModel, match="adapters"):
        patch(model, gqa=2)


def patch_and_forget(model: PreTrainedModel) -> PreTrainedModel:
    """Quantized, as if it came so from elsewhere."""
    patch(model, quantize="int8")
    del vars(model)["_hf_accel_patch"]
    return model


def test_planned_from_a_path(tmp_path: Any) -> None:
    multi_head().save_pretrained(tmp_path)
    row = entry(plan(tmp_path, gqa=2).to_dict(), "gqa")
    assert row["bytes_before"] > row["bytes_after"] and row["layers"] == 4


# ---------------------------------------------------------------------------------------------- saved and exported


@pytest.mark.parametrize("family", ["llama", "phi3", "qwen3", "gemma2", "gpt_oss"])
def test_saved_for_stock(family: str, tmp_path: Any) -> None:
    model = patch(multi_head(family), gqa=2, **OFF)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=model.config._attn_implementation).eval()
    assert again.config.num_key_value_heads == 2 and not hasattr(again.config, "quantization_config")
    assert torch.equal(logits(again, prompt()), logits(model, prompt()))


@pytest.mark.parametrize("family", WITHOUT)
def test_saved_for_this_package(family: str, tmp_path: Any) -> None:
    """Where the class has no key/value heads the checkpoint says so, and is read by `from_pretrained` and `load`."""
    model = patch(tiny(family), gqa=2)
    model.save_pretrained(tmp_path / "grouped")
    expected = logits(model, prompt())
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "grouped").eval()
    assert relative_error(logits(again, prompt()), expected) < EXACT
    assert getattr(again, "hf_quantizer", None) is None and not hasattr(again.config, "quantization_config")
    assert torch.equal(logits(load(tmp_path / "grouped"), prompt()), expected)
    before = fingerprint(again)
    patch(again, gqa=1, quantize=Quantize("int8", originals="keep"))
    once = logits(again, prompt())
    again.save_pretrained(tmp_path / "both")
    both = load(tmp_path / "both")
    assert relative_error(logits(both, prompt()), once) < EXACT and shared_heads(both.config) == 1
    unpatch(again)
    remaining = changes(before, fingerprint(again))
    assert not remaining, describe(remaining)


def test_a_damaged_number_of_heads(tmp_path: Any) -> None:
    with pytest.raises(ValueError, match="kv_heads='2' is not a number"):
        HfAccelConfig(kv_heads="2")  # type: ignore[arg-type]
    patch(tiny("gpt2"), gqa=2).save_pretrained(tmp_path)
    with pytest.raises(HfAccelError, match="load it, and patch the model"):
        load(tmp_path, quantize="int8")
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace('"kv_heads": 2', '"kv_heads": 3'))
    with pytest.raises(HfAccelError, match="3 key/value heads, which GPT2LMHeadModel cannot have"):
        load(tmp_path)


def test_export_to_gpt_bigcode() -> None:
    model = patch(tiny("gpt2"), gqa=1)
    other = export(model)
    assert other.config.model_type == "gpt_bigcode" and other.config.multi_query
    assert relative_error(logits(other, prompt()), logits(model, prompt())) < EXACT
    assert torch.equal(greedy(other, prompt()), greedy(model, prompt()))
    unpatch(model)
    with pytest.raises(UnsupportedModel, match="gpt2 with one as gpt_bigcode"):
        export(model)


# ------------------------------------------------------------------------------------------- what goes on working


@pytest.mark.parametrize(
    "options",
    [{"quantize": "int8"}, {"cache": "int8"}, {"cache": "sinks:32"}, {"rope": "yarn:4"}, {"speculative": "self"}],
    ids=str,
)
def test_with_other_passes(options: dict[str, Any]) -> None:
    alone = patch(multi_head(), gqa=2)
    model = multi_head()
    before = fingerprint(model)
    if "quantize" in options:
        options = {"quantize": Quantize(options["quantize"], originals="keep")}
    patch(model, gqa=2, **options)
    name = next(iter(options))
    assert "reason" not in entry(report(model).to_dict(), name) and said(model)["kv_heads"] == 2
    tokens = greedy(model, prompt(20), 8)
    if name == "speculative":
        assert torch.equal(tokens, greedy(alone, prompt(20), 8))
    if name != "rope":
        error = relative_error(logits(model, prompt(20)), logits(alone, prompt(20)))
        assert error < (0.3 if name == "quantize" else EXACT)
    unpatch(model)
    assert not changes(before, fingerprint(model))


def test_quantized_weights_are_those_of_the_converted_model() -> None:
    model = patch(multi_head(), gqa=2, quantize="int8")
    float_ = patch(multi_head(), gqa=2)
    assert model.model.layers[0].self_attn.k_proj.specs["weight"].shape == (32, 64)
    assert relative_error(logits(model, prompt()), logits(float_, prompt())) < 0.3


@pytest.mark.parametrize("family", ["llama", *WITHOUT])
def test_it_trains(family: str) -> None:
    model = tiny(family) if family in WITHOUT else multi_head(family)
    for parameter in model.get_input_embeddings().parameters():
        parameter.requires_grad_(False)
    patch(model, gqa=2).train()
    ids = prompt(24, 2)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(3):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        missing = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
        assert not missing
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "bloom"])
def test_copies_and_pickles(family: str) -> None:
    model = patch(tiny(family) if family in WITHOUT else multi_head(family), gqa=2)
    expected = logits(model, prompt())
    assert torch.equal(logits(copy.deepcopy(model), prompt()), expected)
    if family in WITHOUT:
        module = next(each for each in model.modules() if type(each).__name__.endswith("Attention"))
        again = pickle.loads(pickle.dumps(module))
        assert type(again) is type(module)


def test_settings_of_its_user_stay() -> None:
    model = multi_head()
    model.model.layers[0].gradient_checkpointing = True
    model.model.layers[0].self_attn.attention_dropout = 0.25
    patch(model, gqa=2, **OFF)
    assert model.model.layers[0].gradient_checkpointing and model.model.layers[0].self_attn.attention_dropout == 0.25
    assert model.model.layers[0].self_attn.num_key_value_groups == 2


def test_norms_with_a_row_for_each_head() -> None:
    model = build("cohere", use_qk_norm=True, num_key_value_heads=4)
    norm = model.model.layers[0].self_attn.k_norm
    assert norm.weight.shape == (4, 16)
    patch(model, gqa=2, **OFF)
    assert norm.weight.shape == (2, 16) and logits(model, prompt()).isfinite().all()


def test_state_dict_and_half() -> None:
    model, other = patch(multi_head(), gqa=2, **OFF), patch(multi_head(), gqa=GQA(2, merge="mean"), **OFF)
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other, prompt()), logits(model, prompt()))
    assert logits(model.bfloat16(), prompt()).isfinite().all()


@torch.no_grad()
def test_bfloat16_and_conv1d() -> None:
    model = tiny("gpt2").bfloat16()
    fused = model.transformer.h[0].attn.c_attn
    patch(model, gqa=2)
    assert (
        isinstance(fused, Conv1D) and fused.weight.shape == (64, 64 + 2 * 32) and fused.weight.dtype == torch.bfloat16
    )
    assert fused.nf == 128 and fused.bias.shape == (128,)
    assert logits(model, prompt()).isfinite().all()


def test_sinks_and_masks_by_heads() -> None:
    """Under eager attention stock reads the number of groups from the module."""
    model = build("llama", num_key_value_heads=4)
    model.set_attn_implementation("eager")
    expected = logits(model, **left_padded())
    patch(model, gqa=2, **OFF)
    eager = logits(model, **left_padded())
    assert eager.shape == expected.shape and eager.isfinite().all()
    unpatch(model)
    model.set_attn_implementation("sdpa")
    patch(model, gqa=2, **OFF)
    assert relative_error(logits(model, **left_padded()), eager) < EXACT


def test_tables_grow_after_a_conversion():
    model = tiny("gptj")
    before = fingerprint(model)
    long = prompt(model.config.n_positions + 20)
    with pytest.raises((IndexError, RuntimeError)):
        logits(model, long)
    patch(model, gqa=2)
    expected = logits(model, long)
    assert torch.equal(logits(copy.deepcopy(model), long), expected)
    attention = model.transformer.h[0].attn
    assert type(pickle.loads(pickle.dumps(attention))) is type(attention)
    unpatch(model)
    assert not changes(before, fingerprint(model))
