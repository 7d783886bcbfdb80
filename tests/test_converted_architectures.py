"""Every causal LM type of transformers with fewer key/value heads: converted without loss where the heads of a group
are transformed copies of one, or refused with a reason; and back, bit for bit.

The copies are planted by what is known of a layer: where its heads lie, and what may be done to their channels. If any
of that were wrong, the copies would not be what alignment takes back, and stock would answer something else.
"""

from __future__ import annotations

import dataclasses
import gc

import pytest
import torch
from cases import TYPES, build, entry, greedy, logits, prompt, relative_error
from fingerprint import changes, describe, fingerprint
from torch import Tensor
from transformers import CONFIG_MAPPING, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_accel_patch import GQA, UnsupportedModel, patch, report, unpatch
from hf_accel_patch.families import bind
from hf_accel_patch.families.freedom import freedom
from hf_accel_patch.families.heads import Layout, heads_move, layouts, shared_heads
from hf_accel_patch.ops.heads import Freedom

EXACT = 1e-3  # of the logits' standard deviation, after the heads of a group were merged
KEPT = 1e-4  # the same without alignment, where they are equal
SAMPLE = {*TYPES[::9], "llama", "gpt2", "qwen3", "glm", "cohere", "gpt_oss", "olmo2", "phi3", "gpt_neo", "smollm3"}
LEAST_CONVERTED = 0.55  # of the types that can be built
KNOWN = ("MLA", "no attention with heads", "not known", "no attention of ours", "no rule is known", "share their")

found: dict[str, str] = {}


@pytest.fixture(autouse=True)
def freed():
    yield
    gc.collect()


@pytest.mark.parametrize("model_type", [pytest.param(t, marks=() if t in SAMPLE else pytest.mark.slow) for t in TYPES])
@torch.no_grad()
def test_type(model_type: str) -> None:
    found[model_type] = "skipped"
    model, ids = _stock(model_type)
    heads = shared_heads(bind(model).config)
    kv_heads = max(1, heads // 2)
    if heads > 1:
        _plant(model, heads, kv_heads)
    stock, tokens = logits(model, ids), _tokens(model, ids)
    earlier, _, before = fingerprint(model), logits(model, ids), fingerprint(model)
    moving = set(changes(earlier, before))  # recurrent states that stock itself keeps in its modules
    try:
        patch(model, gqa=kv_heads, attention=False, cache=False)
    except UnsupportedModel as error:
        found[model_type] = str(error)
        assert any(reason in str(error) for reason in KNOWN), error
        assert not [place for place in changes(before, fingerprint(model)) if place not in moving]
        return
    said = entry(report(model).to_dict(), "gqa")
    found[model_type] = said.get("reason", "converted")
    if "reason" not in said:
        assert shared_heads(bind(model).config) == kv_heads and said["bytes_after"] < said["bytes_before"]
        assert relative_error(logits(model, ids), stock) <= EXACT
        if tokens is not None:
            assert torch.equal(greedy(model, ids, len(tokens[0])), tokens)
    unpatch(model)
    remaining = [place for place in changes(before, fingerprint(model)) if place not in moving]
    assert not remaining, describe(remaining)


def test_coverage() -> None:
    if not found.keys() >= SAMPLE:
        pytest.skip("not all of these types were tested in this process")
    built = [found[model_type] for model_type in SAMPLE if found[model_type] != "skipped"]
    converted = [said for said in built if said == "converted"]
    assert len(converted) >= LEAST_CONVERTED * len(built), f"{len(converted)} of {len(built)}"


def _stock(model_type: str) -> tuple[PreTrainedModel, Tensor]:
    ids = prompt(24)
    try:
        fields = {each.name for each in dataclasses.fields(CONFIG_MAPPING[model_type])}
        wanted = {name: 4 for name in ("num_key_value_heads", "num_kv_heads") if name in fields}
        try:
            model = build(model_type, **wanted)
        except Exception:
            model = build(model_type)
        if torch.equal(logits(model, ids), logits(model, ids)):
            return model, ids
        reason = "the stock logits are not finite, or not the same twice"
    except Exception as error:  # whatever a type raises that needs more than a configuration
        reason = " ".join(str(error).split())[:160]
    pytest.skip(f"{model_type}: {reason}")


def _tokens(model: PreTrainedModel, ids: Tensor) -> Tensor | None:
    try:
        return greedy(model, ids, 4)
    except Exception:
        return None


def _plant(model: PreTrainedModel, heads: int, kv_heads: int) -> None:
    """Heads that are copies of `kv_heads` of them, each transformed at random by what the layer allows; in a random
    order where heads may move, else equal ones side by side."""
    view = bind(model)
    known = layouts(view, heads)
    for index, (layout, (keys, values)) in enumerate(zip(known, freedom(view, known), strict=True)):
        generator = torch.Generator().manual_seed(index)
        moves = heads_move(view) and layout.movable()
        source = torch.arange(heads) // (heads // kv_heads) * (heads // kv_heads)
        if moves:
            source = torch.randperm(heads, generator=generator) % kv_heads
        for role, free in (("key", keys), ("value", values)):
            if layout.output is None:
                free = Freedom.none()
            _copy(layout, role, source, free, generator)
        norms = layout.norms()
        weight = None if norms is None else norms[1]._parameters.get("weight")
        if weight is not None and weight.numel() == heads * layout.key_size:
            by_head = weight.view(heads, layout.key_size)
            by_head.copy_(by_head[source].clone())


def _copy(layout: Layout, role: str, source: Tensor, free: Freedom, generator: torch.Generator) -> None:
    part, rows = getattr(layout, role), layout.rows(role)
    maps = torch.stack([_map(rows.shape[1], free, generator) for _ in source])
    for parameter in part.parameters(recurse=False):
        flat = parameter.T if isinstance(part, Conv1D) and parameter.ndim == 2 else parameter
        original = flat[rows].clone().view(*rows.shape, -1)[source]
        flat[rows] = (maps @ original).view(*rows.shape, *flat.shape[1:])


def _map(channels: int, free: Freedom, generator: torch.Generator) -> Tensor:
    """A random map of the channels of a head that this freedom allows."""
    found = torch.eye(channels)
    if len(free.free):
        R = len(free.free)
        turn = torch.linalg.qr(torch.randn(R, R, generator=generator)).Q
        found[free.free[:, None], free.free] = turn * (0.5 + torch.rand(R, 1, generator=generator))
    for x, y in free.pairs.tolist():
        a, b = torch.randn(2, generator=generator).tolist()
        found[x, x], found[x, y], found[y, x], found[y, y] = a, -b, b, a
    return found


@torch.no_grad()
def test_planted_copies_need_alignment() -> None:
    """What is planted is far from equal heads: the mean loses it."""
    model, ids = build("llama", num_key_value_heads=4), prompt(24)
    _plant(model, 4, 2)
    stock = logits(model, ids)
    patch(model, gqa=GQA(2, merge="mean"), attention=False, cache=False)
    assert relative_error(logits(model, ids), stock) > 0.1
