"""A growing tensor against concatenation, and what it must not write to."""

import copy

import pytest
import torch
from torch import Tensor

from hf_accel_patch.ops.growing import Growing

SHAPE = (2, 3, 4)  # B, K, D


def tokens(count: int, start: int = 0, batch: int = SHAPE[0]) -> Tensor:
    """Entries whose numbers say which they are."""
    places = torch.arange(start, start + count, dtype=torch.float32)[None, None, :, None]
    return (places + torch.rand(batch, SHAPE[1], 1, SHAPE[2])).contiguous()


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("slack, least", [(1 / 8, 64), (1 / 32, 16), (0.0, 16), (1 / 64, 1), (0.0, 0)])
@pytest.mark.parametrize("seed", range(4))
def test_random_sequences_equal_concatenation(slack, least, seed):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda high: int(torch.randint(high, (), generator=generator))  # noqa: E731
    expected = tokens(draw(40))
    held = Growing(expected.clone(), slack, least)
    for step in range(120):
        action = draw(8)
        if action < 4:
            new = tokens(draw(3) if action else draw(50), step * 100, expected.shape[0])
            expected = torch.cat((expected, new), dim=2)
            assert torch.equal(held.append(new), expected)
        elif action == 4:
            count = draw(9)
            held.drop(front=count)
            expected = expected[:, :, count:]
        elif action == 5:
            count = draw(9)
            held.drop(back=count)
            expected = expected[:, :, : max(0, expected.shape[2] - count)]
        elif action == 6:  # what crop and a window assign
            first, last = sorted((draw(expected.shape[2] + 1), draw(expected.shape[2] + 1)))
            first = max(first, last - 60)
            held.adopt(held.view()[:, :, first:last])
            expected = expected[:, :, first:last]
        else:
            order = torch.randint(expected.shape[0], (1 + draw(3),), generator=generator)
            held.adopt(held.view()[order])
            expected = expected[order]
        assert torch.equal(held.view(), expected) and len(held) == expected.shape[2]


def test_appending_copies_little():
    held, buffers = Growing(tokens(0), 1 / 8, 64), set()
    for i in range(2000):
        held.append(tokens(1, i))
        buffers.add(held.buffer.data_ptr())
    assert len(buffers) < 40
    assert held.buffer.shape[2] <= 2000 * 9 / 8 + 64


def test_a_window_stays_in_its_buffer():
    held = Growing.with_room(tokens(100), 140, 1 / 32, 16)
    place = held.buffer.data_ptr()
    for i in range(500):
        held.append(tokens(1, i))
        held.drop(front=1)
    assert held.buffer.data_ptr() == place and len(held) == 100


def test_what_was_returned_stays_while_it_grows():
    held = Growing(tokens(5), 1 / 8, 4)
    views = [held.append(tokens(1, i)) for i in range(60)]
    assert all(torch.equal(view, held.view()[:, :, : view.shape[2]]) for view in views)


@pytest.mark.parametrize("change", ["crop", "front", "write"])
def test_a_tensor_from_elsewhere_is_not_written_to(change):
    mine = tokens(50)
    before = mine.clone()
    held = Growing(mine, 1 / 8, 4)
    if change == "crop":
        held.adopt(held.view()[:, :, :-10])
        held.append(tokens(3, 100))
    elif change == "front":
        held.drop(front=30)
        for i in range(20):
            held.append(tokens(1, i))
            held.drop(front=1)
    else:
        held.writable().zero_()
    assert torch.equal(mine, before)


def test_a_shallow_copy_goes_its_own_way():
    held = Growing.with_room(tokens(10), 30, 1 / 8, 4)
    other = copy.copy(held)
    first, second = tokens(2, 100), tokens(3, 200)
    common = held.view().clone()
    assert torch.equal(held.append(first), torch.cat((common, first), dim=2))
    assert torch.equal(other.append(second), torch.cat((common, second), dim=2))
    assert torch.equal(held.view(), torch.cat((common, first), dim=2))
    assert held.buffer.data_ptr() != other.buffer.data_ptr()


def test_a_deep_copy_goes_its_own_way():
    held = Growing.with_room(tokens(10), 30, 1 / 8, 4)
    held.drop(front=3)
    other = copy.deepcopy(held)
    assert torch.equal(held.view(), other.view())
    held.append(tokens(2, 100))
    held.writable().zero_()
    assert other.view().abs().min() > 0 or len(other) == 7
    assert not torch.equal(held.view()[:, :, :7], other.view())


def test_slices_of_other_views_of_a_storage_are_no_slices_of_the_buffer():
    storage = tokens(30)
    held = Growing(storage[:, :, 10:20], 1 / 8, 4)
    held.adopt(storage[:, :, 2:9])  # before the buffer
    assert torch.equal(held.view(), storage[:, :, 2:9])
    held.adopt(storage[:, :, 5:25])  # around it
    assert torch.equal(held.view(), storage[:, :, 5:25])
    expanded = tokens(1).expand(-1, -1, 8, -1)
    held.adopt(expanded)
    held.adopt(held.view()[:, :, 2:])
    assert held.append(tokens(1)).shape[2] == 7


@pytest.mark.parametrize("first, second", [(True, False), (False, True), (True, True)])
def test_inference_mode_and_normal_mode(first, second):
    with torch.inference_mode(first):
        held, new = Growing(tokens(3), 1 / 8, 8), tokens(4, 10)
        held.append(new)
        expected = held.view().clone()
    with torch.inference_mode(second):
        more = tokens(2, 20)
        assert torch.equal(held.append(more), torch.cat((expected, more), dim=2))
        held.writable()[:, :, :1].zero_()
        held.drop(front=1)
        held.append(tokens(1))
        assert torch.equal(held.view()[:, :, :-1], torch.cat((expected, more), dim=2)[:, :, 1:])


@torch.enable_grad()
def test_gradients_are_those_of_concatenation():
    old, new = tokens(5).requires_grad_(), tokens(2).requires_grad_()
    held = Growing(old * 2, 1 / 8, 8)
    held.append(new * 3)
    held.append(tokens(1))
    held.view().sum().backward()
    assert torch.equal(old.grad, torch.full_like(old, 2)) and torch.equal(new.grad, torch.full_like(new, 3))


@torch.enable_grad()
def test_what_a_step_saves_for_its_backward_stays():
    query, held = tokens(1).requires_grad_(), Growing.with_room(tokens(5), 30, 1 / 8, 8)
    losses = [(query * held.append(tokens(1, i))).sum() for i in range(3)]
    sum(losses).backward()
    assert query.grad is not None


def test_other_dtypes_are_promoted_as_by_concatenation_and_other_shapes_refused():
    held = Growing.with_room(tokens(5), 30, 1 / 8, 8)
    assert held.append(tokens(1).double()).dtype == torch.float64
    with pytest.raises(RuntimeError, match="Sizes"):
        held.append(tokens(1, batch=3).double())


def test_entries_are_put_where_others_count_them():
    """`put` reads places from a tensor, and `settle` says what has become of it."""
    content, buffer = tokens(3), torch.full((*SHAPE[:2], 12, SHAPE[2]), torch.nan)
    held = Growing.within(buffer, content, 2, 1 / 8, 4)
    assert torch.equal(held.view(), content) and len(held) == 3 and held.start == 2
    assert not buffer[:, :, :2].any() and not buffer[:, :, 5:].any() and held.buffer is buffer
    new, rows, places = tokens(2), torch.arange(2)[:, None], torch.tensor([[5, 6], [7, 5]])
    assert held.put(new, rows, places, 8).shape[2] == 8 and len(held) == 3
    expected = torch.zeros_like(buffer)
    expected[:, :, 2:5] = content
    for row in range(2):
        expected[row, :, places[row]] = new[row]
    assert torch.equal(buffer, expected)
    held.settle(3, 8)
    assert torch.equal(held.view(), buffer[:, :, 3:8])
    assert torch.equal(held.append(tokens(1)), buffer[:, :, 3:9]), "and the next is written behind"
