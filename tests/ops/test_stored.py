"""Stored tensors are dense ones to whoever computes with them."""

import copy

import pytest
import torch

from hf_accel_patch.ops.kv import BLOCK, pack, unpack
from hf_accel_patch.ops.stored import Content, Stored, fetched

B, K, D, V = 2, 2, 16, 24


def content(bits=8, blocks=3, latest=10, skip=0, room=2, dtype=torch.float32, value_size=V):
    """Random packed tokens, with room behind them, and the latest ones."""
    generator = torch.Generator().manual_seed(0)
    keys, values = (
        torch.randn(B, K, blocks * BLOCK + latest + 3, size, generator=generator).to(dtype)[:, :, :-3]
        for size in (D, value_size)
    )  # views of a longer buffer
    packed = None
    if blocks:
        old = [
            torch.cat((x[:, :, : blocks * BLOCK], torch.zeros_like(x[:, :, : room * BLOCK])), 2) for x in (keys, values)
        ]
        packed = pack(*old, bits)
    return Content(bits, packed, blocks, skip, keys[:, :, blocks * BLOCK :], values[:, :, blocks * BLOCK :])


def dense(each: Content) -> tuple[torch.Tensor, torch.Tensor]:
    if each.packed is None:
        return each.keys, each.values
    old = unpack(each.packed, each.bits, each.keys.shape[-1], each.values.shape[-1], each.keys.dtype)
    kept = slice(each.skip, each.blocks * BLOCK)
    return tuple(torch.cat((x[:, :, kept], y), 2) for x, y in zip(old, (each.keys, each.values), strict=True))


CONTENTS = {
    "int8": {},
    "int4": {"bits": 4},
    "skip": {"skip": 13},
    "no blocks": {"blocks": 0},
    "no latest": {"latest": 0},
    "many blocks": {"blocks": 35, "skip": 63, "bits": 4},
    "bfloat16": {"dtype": torch.bfloat16},
}


@pytest.fixture(params=CONTENTS)
def each(request):
    return content(**CONTENTS[request.param])


def test_parts_and_dense_are_what_was_packed(each):
    expected = dense(each)
    assert each.length == expected[0].shape[2]
    assert all(torch.equal(*pair) for pair in zip(map(each.dense, (0, 1)), expected, strict=True))
    end = 0
    for first, last, keys, values in each.parts():
        assert first == end and last - first == keys.shape[2] == values.shape[2] > 0
        assert torch.equal(keys, expected[0][:, :, first:last]) and torch.equal(values, expected[1][:, :, first:last])
        end = last
    assert end == each.length


OPERATIONS = {
    "slice": lambda x: x[:, :, 3:-2],
    "transposed": lambda x: x.transpose(2, 3),
    "matmul": lambda x: (
        torch.randn(B, K, 5, x.shape[-1], dtype=x.dtype, generator=torch.Generator().manual_seed(1))
        @ x.transpose(-1, -2)
    ),
    "repeat_kv": lambda x: x[:, :, None].expand(B, K, 3, *x.shape[2:]).reshape(B, 3 * K, *x.shape[2:]),
    "cat": lambda x: torch.cat([x, x], dim=2),
    "float": lambda x: x.double(),
    "contiguous": lambda x: x.contiguous() + 0,
    "view": lambda x: x.view(B * K, *x.shape[2:]),
    "reshape": lambda x: x.reshape(-1, x.shape[-1]),
    "linear": lambda x: torch.nn.functional.linear(x, torch.eye(x.shape[-1])),
    "index": lambda x: x[torch.tensor([1, 0])],
    "out of place": lambda x: x * 2 + x.sum(-1, keepdim=True),
    "einsum": lambda x: torch.einsum("bkse,bkte->bkst", x, x),
    "sdpa": lambda x: torch.nn.functional.scaled_dot_product_attention(x[:, :, :1] * 1, x, x),
    "repeat_interleave": lambda x: x.repeat_interleave(2, dim=1),
    "split": lambda x: torch.cat(x.split(50, dim=2), dim=1) if x.shape[2] % 50 == 0 else x.chunk(1)[0] * 1,
    "nonzero": lambda x: (x > 0).nonzero(),
}


@pytest.mark.parametrize(
    "mode", [torch.no_grad, torch.enable_grad, torch.inference_mode], ids=lambda mode: mode.__name__
)
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("blocks", [3, 0])
def test_any_operation_is_that_on_the_dense_tensor(blocks, operation, mode):
    each = content(blocks=blocks, skip=5 if blocks else 0)
    with mode():
        for part, tensor in enumerate(dense(each)):
            stored = Stored(each, part)
            found, expected = OPERATIONS[operation](stored), OPERATIONS[operation](tensor.contiguous())
            assert torch.equal(found, expected) and found.stride() == expected.stride()
            assert type(found) is torch.Tensor


def test_what_it_says_of_itself(each):
    for part, tensor in enumerate(dense(each)):
        stored = Stored(each, part)
        assert stored.shape == tensor.shape and stored.dtype == tensor.dtype and stored.device == tensor.device
        assert stored.size(2) == each.length and stored.ndim == 4 and not stored.requires_grad
        assert "Stored" in repr(stored)


def test_it_takes_no_memory_until_somebody_computes(each, monkeypatch):
    monkeypatch.setattr(Content, "dense", lambda self: pytest.fail("unpacked"))
    stored = Stored(each, 0)
    assert stored.shape[2] == each.length and stored.stride(-1) == 1 and stored.is_contiguous()
    assert stored.contiguous() is stored and stored.to(stored.dtype) is stored


@pytest.mark.parametrize(
    "change",
    [lambda x: x.mul_(2), lambda x: x.zero_(), lambda x: x.__setitem__((0, 0, 0), 1.0), lambda x: x[:, :, 0].fill_(1)],
)
def test_a_change_in_place_is_refused_or_one_of_a_copy(change):
    each = content()
    before = [x.clone() for x in map(each.dense, (0, 1))]
    try:
        change(Stored(each, 0))
    except RuntimeError as error:
        assert "cannot be changed in place" in str(error)
    assert all(torch.equal(*pair) for pair in zip(map(each.dense, (0, 1)), before, strict=True))


def test_it_can_be_written_elsewhere():
    each = content()
    out = torch.zeros_like(each.dense(0))
    out.copy_(Stored(each, 0))
    out[:, :, :5] += Stored(each, 0)[:, :, :5]
    assert torch.equal(out[:, :, 5:], each.dense(0)[:, :, 5:])


def test_gradients_reach_what_is_computed_with_it():
    each, query = content(), torch.randn(B, K, 1, D, requires_grad=True)
    (query @ Stored(each, 0).transpose(-1, -2)).sum().backward()
    expected = dense(each)[0].sum(2, keepdim=True)
    assert torch.allclose(query.grad, expected, atol=1e-4)


def test_deep_copies():
    each = content()
    other = copy.deepcopy(each)
    assert all(torch.equal(*pair) for pair in zip(map(each.dense, (0, 1)), map(other.dense, (0, 1)), strict=True))
    other.keys.zero_()
    assert each.keys.abs().max() > 0


def test_blocks_from_elsewhere_are_copied_head_by_head(monkeypatch):
    held = torch.arange(2 * 3 * 5 * 4).view(2, 3, 5, 4)[:, :, 1:3]
    copied, real = [], torch.Tensor.copy_

    def copy(self, other, **options):
        copied.append((self.is_contiguous() and other.is_contiguous(), options))
        return real(self, other, **options)

    monkeypatch.setattr(torch.Tensor, "copy_", copy)
    here = fetched(held, torch.device("cpu:0"))  # which counts as another device
    assert torch.equal(here, held) and here.is_contiguous()
    assert copied == [(True, {"non_blocking": True})] * 6
    assert fetched(held, held.device) is held
