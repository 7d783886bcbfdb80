"""What all keys share is held apart, and comes back exactly."""

import pytest
import torch

from hf_accel_patch.kernels import cpu_decode
from hf_accel_patch.ops import decode, kv
from hf_accel_patch.ops.attention import reference
from hf_accel_patch.ops.case import Everything, Variant
from hf_accel_patch.ops.constant import Constant, constant_of
from hf_accel_patch.ops.stored import Content

D = 16
FREQUENCIES = 10000.0 ** (-torch.arange(D // 2) / (D // 2))


def rotate(keys, places):
    """Of [B, K, S, D], channel i with channel i + D / 2."""
    angles = places.view(len(places), 1, -1, 1) * FREQUENCIES
    a, b = keys.float().chunk(2, dim=-1)
    return torch.cat((a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()), dim=-1)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def base():
    """Large in a channel that rotates fast and in one that rotates slowly."""
    base = torch.zeros(2, 2, D)
    base[:, :, 0], base[:, :, D // 2 - 1] = 100.0, -50.0
    return base


def keys_with(base, first, tokens):
    places = torch.arange(first, first + tokens)[None]
    return normal(2, 2, tokens, D) + rotate(base[:, :, None].expand(2, 2, tokens, D), places)


def test_it_is_found_and_small_ones_are_left(base):
    found = constant_of(keys_with(base, 300, 500), 300, rotate)
    assert (found.base - base).abs().max() < 0.5
    assert constant_of(normal(2, 2, 500, D), 0, rotate) is None


def test_at_and_scores_agree(base):
    constant, query = Constant(base, rotate), normal(2, 4, 3, D, seed=1)
    expected = query @ constant.at(128, 192).repeat_interleave(2, dim=1).mT
    assert torch.allclose(constant.scores(query, 128, 3), expected, rtol=1e-4, atol=1e-2)
    assert torch.allclose(constant.at(0, 1)[:, :, 0], base)


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("bits", [8, 4])
def test_attention_to_keys_without_it(base, bits, compiled, monkeypatch):
    """Nearer to the exact result than packing the keys with it, and by much."""
    if not compiled:
        monkeypatch.setattr(cpu_decode, "library", lambda width=None: None)
    first, blocks, latest = 640, 5, 7
    keys, values = keys_with(base, first, 64 * blocks + latest), normal(2, 2, 64 * blocks + latest, D, seed=2)
    query, variant = normal(2, 4, 2, D, seed=3), Variant(D**-0.5)
    old, new = slice(None, 64 * blocks), slice(64 * blocks, None)
    exact = reference(query, keys, values, None, variant).transpose(1, 2)
    errors = []
    for constant in (Constant(base, rotate), None):
        rest = keys[:, :, old] - (0 if constant is None else constant.at(first, 64 * blocks))
        packed = kv.pack(rest, values[:, :, old], bits)
        content = Content(bits, packed, blocks, 0, keys[:, :, new], values[:, :, new], constant, first)
        ours = decode.attend_stored(query, content, Everything(content.length), variant)
        errors.append((ours - exact).abs().max().item())
        dense = content.dense(0)
        assert (dense - keys).abs().max() < (0.5 if constant is not None else 30)
    assert errors[0] < (0.06 if bits == 8 else 0.6) and errors[0] < errors[1] / 4


@pytest.mark.parametrize("bits", [8, 4])
def test_other_sequences_and_devices(base, bits):
    constant = Constant(base * torch.tensor([1.0, 2.0])[:, None, None], rotate)
    assert torch.equal(constant.changed(lambda x: x[[1, 1]]).base[0], constant.base[1])
