"""Where elements of views lie, against PyTorch's own strides."""

import itertools
import random

import pytest
import torch

from hf_accel_patch.ops.fusing.affine import Affine, through_view


def number(index, at):
    """Of an affine index at some values of its variables."""
    return index.constant + sum(at[name] * factor for name, factor in index.terms)


def views(x, draw):
    """A few views of x, one of the other."""
    for _ in range(draw.randrange(1, 4)):
        kind, dim = draw.randrange(6), draw.randrange(x.dim())
        if kind == 0:
            x = x.transpose(dim, draw.randrange(x.dim()))
        elif kind == 1 and x.shape[dim] > 2:
            x = x.narrow(dim, 1, x.shape[dim] - 1)
        elif kind == 2 and x.is_contiguous():
            x = x.flatten(0, 1) if x.dim() > 1 else x
        elif kind == 3 and x.shape[dim] % 2 == 0:
            x = x.unflatten(dim, (2, -1))
        elif kind == 4 and x.shape[dim] > 1:
            x = x[(slice(None),) * dim + (slice(None, None, 2),)]
        elif kind == 5:
            x = x.unsqueeze(dim).expand(*x.shape[:dim], 2, *x.shape[dim:])
    return x


def test_elements_of_views():
    assert sum(map(elements_agree, range(300))) > 150, "most need no memory in between"


def elements_agree(seed):
    """False for a view that goes through memory."""
    draw = random.Random(seed)
    sizes = [draw.choice((1, 2, 3, 4, 6)) for _ in range(draw.randrange(1, 4))]
    whole = torch.arange(torch.tensor(sizes).prod()).view(sizes)
    if draw.random() < 0.5:
        whole = whole.transpose(0, -1)
    view = views(whole, draw)
    names, quotients = [f"r{i}" for i in range(view.dim())], {}

    def divided(index, by):
        pair = f"q{len(quotients)}", f"m{len(quotients)}"
        quotients[pair] = index, by
        return Affine.of(pair[0]), Affine.of(pair[1])

    at = tuple(Affine.of(name) if n > 1 else Affine() for name, n in zip(names, view.shape, strict=True))
    inside = through_view(whole.shape, whole.stride(), whole.storage_offset(), view, at, divided)
    if inside is None:
        return False
    for element in itertools.product(*map(range, view.shape)):
        values = dict(zip(names, element, strict=True))
        for (quotient, remainder), (index, by) in quotients.items():
            values[quotient], values[remainder] = divmod(number(index, values), by)
        assert whole[tuple(number(each, values) for each in inside)] == view[element]
    return True


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x, lambda x: x.transpose(0, 1), lambda x: x[:, 1:], lambda x: x[..., ::2], lambda x: x.flatten(0, 1),
        lambda x: x.flatten(), lambda x: x.view(4, 3, 2, 4), lambda x: x[1:, None].expand(-1, 2, -1, -1),
    ],
)  # fmt: skip
def test_what_models_do_to_tensors_needs_no_memory(view):
    x = torch.arange(96).view(4, 3, 8)
    found = view(x)
    at = tuple(Affine.of(f"r{i}") for i in range(found.dim()))
    assert (
        through_view(x.shape, x.stride(), 0, found, at, lambda index, by: (Affine.of("q"), Affine.of("m"))) is not None
    )
