"""Random programs, with views, changes in place and memory that is shared, give what they give without kernels."""

import random

import pytest
import torch
import torch.nn.functional as F
from interpreter import DEVICE, interpreted, load, memory_watched

from hf_accel_patch.ops.fusing.planning import planned
from hf_accel_patch.ops.fusing.running import Runner
from hf_accel_patch.ops.fusing.tracing import Unfusable, traced

ON = torch.device(DEVICE)
LARGEST = 1e3  # of numbers that still say something


class Program:
    """A function of memory, drawn from a seed: each step takes what others have left."""

    def __init__(self, seed, steps):
        self.draw = random.Random(seed)
        self.shape = self.draw.choice((1, 2, 3)), self.draw.choice((1, 2, 5)), self.draw.choice((4, 6, 8))
        self.seed, self.steps = seed, steps

    def memory(self):
        B, T, C = self.shape
        generator = torch.Generator().manual_seed(self.seed)
        sizes = [self.shape] * 3 + [(B, T + 2, C + 3), (T, B, C)]
        return [torch.randn(size, generator=generator).to(ON) for size in sizes]

    def __call__(self, memory):
        self.draw.seed(self.seed + 1)
        self.memory_, self.pool = memory, list(memory[:3])
        for _ in range(self.steps):
            made = self.draw.choice(STEPS)(self, self.draw.choice(self.pool[-6:]), self.draw.choice(self.pool))
            if made is not None:
                assert made.shape == self.shape
                self.pool.append(made)
        return self.pool[-1] + self.pool[-2] * 0.5

    def seen(self, x):
        """The same numbers, or some of them, by another way to the same shape."""
        (B, T, C), half = self.shape, self.shape[2] // 2
        return self.draw.choice(
            (
                lambda: x,
                lambda: x.transpose(0, 1).contiguous().transpose(0, 1),
                lambda: x.reshape(B * T, C).reshape(B, T, C),
                lambda: x[:, :, :1].expand(B, T, C),
                lambda: x[:, -1:].expand(B, T, C),
                lambda: torch.cat((-x[..., half:], x[..., :half]), -1),
                lambda: torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2),
                lambda: x.unflatten(-1, (2, half)).transpose(-1, -2).reshape(B, T, C),
                lambda: torch.cat((x[:, :1], x[:, 1:] * 2), 1),
            )
        )()

    def part(self, x):
        ways = (lambda: x, lambda: x[..., 1:], lambda: x[:, :1], lambda: x[..., ::2], lambda: x[-1])
        return self.draw.choice(ways)()

    def window(self):
        """A part of larger memory."""
        _, T, C = self.shape
        at = self.draw.randrange(3)
        return self.memory_[3][:, at : at + T, at : at + C]


def apart(x, y):
    """Whether they share no memory, and x may be written to."""
    return x.untyped_storage().data_ptr() != y.untyped_storage().data_ptr() and 0 not in x.stride()


STEPS = (
    lambda p, x, y: p.seen(x) * 0.7 - y,
    lambda p, x, y: torch.tanh(p.seen(x)) + y,
    lambda p, x, y: F.silu(x) + F.gelu(p.seen(y)),
    lambda p, x, y: torch.where(x > 0, y, p.seen(x)),
    lambda p, x, y: x.masked_fill(p.seen(y) > 0.1, 0.5),
    lambda p, x, y: p.seen(x),
    lambda p, x, y: (x.to(torch.bfloat16) * 0.3).to(torch.float32),
    lambda p, x, y: F.layer_norm(x, x.shape[-1:]),
    lambda p, x, y: torch.softmax(p.seen(x), -1),
    lambda p, x, y: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-3),
    lambda p, x, y: p.seen(x) - y.sum(-1)[..., None] * 0.1,
    lambda p, x, y: x + p.seen(y).amax(-1, keepdim=True),
    lambda p, x, y: (x.flatten(0, 1) @ (y.flatten(0, 1).T @ y.flatten(0, 1))).reshape(x.shape).tanh(),
    lambda p, x, y: p.window() + 0,
    lambda p, x, y: p.window(),
    lambda p, x, y: p.memory_[4].transpose(0, 1) * 1.0,
    lambda p, x, y: x.view(torch.int32).view(torch.float32) * 1 if x.is_contiguous() else None,
    lambda p, x, y: [p.part(x).add_(0.3), None][1] if 0 not in x.stride() else None,
    lambda p, x, y: [p.part(x).mul_(0.5), None][1] if 0 not in x.stride() else None,
    lambda p, x, y: [x.add_(y), None][1] if apart(x, y) else None,
    lambda p, x, y: [x.copy_(p.seen(y)), None][1] if apart(x, y) else None,
    lambda p, x, y: [w := p.window(), w.copy_(y) if apart(w, y) else None, None][-1],
    lambda p, x, y: [z := torch.zeros(p.shape, device=ON), z.copy_(x), p.part(z).mul_(0.5), z][-1],
)


@pytest.fixture(autouse=True)
def _watched():
    load("triton_fused")
    with torch.no_grad(), interpreted(), memory_watched():
        yield


def agrees(seed, steps):
    """Whether there was anything to compare; asserts that it is the same."""
    program = Program(seed, steps)
    expected, given = program.memory(), program.memory()
    truth = program(expected).clone()
    try:
        plan = planned(traced(lambda: program(given), ON), ON)
    except Unfusable:  # windows of one memory that overlap
        return False
    for each, before in zip(given, program.memory(), strict=True):
        each.copy_(before)
    found = Runner(plan)()
    pairs = [(found, truth), *zip(given, expected, strict=True)]
    if any(not y.isfinite().all() or y.abs().max() > LARGEST for _, y in pairs):
        return False
    for x, y in pairs:
        torch.testing.assert_close(x, y, rtol=1e-2, atol=1e-2 * float(y.abs().max().clamp(min=1)))
    return plan.fused > 0


@pytest.mark.parametrize("block", [0, *(pytest.param(i, marks=pytest.mark.slow) for i in range(1, 8))])
@pytest.mark.parametrize("steps", [6, 16])
def test_random_programs(steps, block):
    assert sum(agrees(seed, steps) for seed in range(40 * block, 40 * block + 40)) >= 20
