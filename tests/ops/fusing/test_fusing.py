"""What is noted of a function and launched as few kernels gives what the function gives, on other numbers too."""

import ctypes
import json
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from interpreter import DEVICE, INTERPRETED, interpreted, load, memory_watched

from hf_accel_patch.ops.fusing.planning import planned
from hf_accel_patch.ops.fusing.running import Runner, runner
from hf_accel_patch.ops.fusing.tracing import Node, Unfusable, noted, traced
from hf_accel_patch.ops.fusing.writing import Launch
from hf_accel_patch.ops.packing import CUDA_BLOCK, pack
from hf_accel_patch.ops.refusing import Refused
from hf_accel_patch.ops.together import linear_together

ON = torch.device(DEVICE)
ROUNDING = {torch.float32: 3e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}  # of other orders of sums


@pytest.fixture(autouse=True)
def _no_grad():
    load("triton_fused")
    torch.manual_seed(0)
    with torch.no_grad(), interpreted(), memory_watched():
        yield


class Given:
    """Tensors that a function reads."""

    def __init__(self, dtype):
        make = lambda *sizes: torch.randn(*sizes, device=ON).to(dtype)  # noqa: E731
        self.dtype = dtype
        self.x, self.y, self.weight, self.bias = make(2, 3, 64), make(2, 3, 64), make(64), make(64)
        self.heads, self.cos, self.sin = make(2, 4, 3, 16), make(2, 3, 16), make(2, 3, 16)
        self.matrix, self.table, self.wide = make(64, 64), make(50, 64), make(2, 1, 700)
        self.ids = torch.randint(50, (2, 3), device=ON)
        self.places, self.rows = torch.tensor([[1, 2, 3], [4, 5, 6]], device=ON), torch.arange(2, device=ON)[:, None]
        self.columns, self.seen = torch.arange(40, device=ON), torch.rand(2, 40, device=ON) > 0.3
        self.buffer = torch.zeros(2, 4, 40, 16, device=ON, dtype=dtype)
        self.flat = torch.zeros(2, 3, 128, device=ON, dtype=dtype)

    def change(self):
        """Other numbers in the same memory."""
        for each in vars(self).values():
            if isinstance(each, torch.Tensor) and each.is_floating_point():
                each.copy_(each.flip(-1) * 0.9 + 0.05)
        self.ids.copy_((self.ids + 7) % 50)
        self.places.add_(2)


def norm(g, x):
    y = x.float()
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-5)
    return g.weight * y.to(x.dtype)


def rotate(x, cos, sin):
    half = x.shape[-1] // 2
    return x * cos[:, None] + torch.cat((-x[..., half:], x[..., :half]), -1) * sin[:, None]


def interleaved(x, cos, sin):
    turned = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
    return x * cos[:, None] + turned * sin[:, None]


def projected(g):
    return (g.x @ g.matrix).view(2, 3, 4, 16)


def into_cache(g):
    g.buffer[g.rows, :, g.places] = rotate(g.heads, g.cos, g.sin).transpose(1, 2)
    return g.buffer.narrow(2, 0, 20) @ g.heads.transpose(2, 3)[..., :1]


def into_memory(g):
    x = F.layer_norm(torch.cat((g.x, g.y), -1), (128,))
    g.flat.copy_(x)
    return x.view(2, 3, 8, 16).transpose(1, 2) * 2


def from_the_end(g):
    return g.buffer.index_put_((g.rows, g.rows.T - 3), g.rows[..., None, None].to(g.dtype)) * 1


def not_a_number(g):
    x, y = g.x.masked_fill(g.x > 1, torch.nan), g.y.masked_fill(g.y > 2, torch.nan)
    return torch.relu(x).clamp(-1, torch.inf) + torch.maximum(g.y, x) + y.amax(-1, True)


def residual(g):
    x = g.x + g.y
    y = norm(g, x) @ g.matrix
    return norm(g, x + y)


def written(g):
    g.flat[..., 32:96] = g.x * 2
    g.flat[..., :32].copy_(g.y[..., :32])
    return g.flat.sum(-1)


def normed_heads(g):
    x = F.layer_norm(projected(g).float(), (16,), g.weight[:16].float(), None, 1e-5).to(g.dtype).transpose(1, 2)
    return rotate(x, g.cos, g.sin)


def whole_norm_then_heads(g):
    """The sums are of rows that several rows of the next shape share."""
    return rotate(norm(g, g.x @ g.matrix).view(2, 3, 4, 16).transpose(1, 2), g.cos, g.sin)


FUNCTIONS = {  # how many kernels and how many operators of PyTorch are left
    "norm": (lambda g: norm(g, g.x), 1, 0),
    "residual": (residual, 2, 1),
    "layer norm": (lambda g: F.layer_norm(g.x + g.y, (64,), g.weight, g.bias, 1e-5) * 2, 1, 0),
    "bare layer norm": (lambda g: F.layer_norm(g.x, (64,)), 1, 0),
    "rms norm": (lambda g: F.rms_norm(g.x, (64,), g.weight, 1e-6) + g.y, 1, 0),
    "softmax": (lambda g: torch.softmax(g.wide, -1), 1, 0),
    "softmax in float32": (lambda g: torch.softmax(g.wide, -1, dtype=torch.float32).to(g.dtype), 1, 0),
    "largest": (lambda g: g.wide - g.wide.amax(-1, keepdim=True), 1, 0),
    "sum without its dimension": (lambda g: (g.x * 2).sum(-1) + 1, 2, 0),
    "silu": (lambda g: F.silu(g.x) * g.y, 1, 0),
    "wide": (lambda g: F.silu(g.wide) * 3, 1, 0),
    "gelu": (lambda g: F.gelu(g.x) + F.gelu(g.y, approximate="tanh"), 1, 0),
    "new gelu": (lambda g: 0.5 * g.x * (1 + torch.tanh(0.8 * (g.x + 0.04 * torch.pow(g.x, 3)))), 1, 0),
    "cap": (lambda g: 30 * torch.tanh(g.x * 0.001 / 30), 1, 0),
    "cap of all": (lambda g: 30 * torch.tanh(g.x * 20 / 30), 1, 0),
    "elementary": (lambda g: g.x.abs().sqrt().reciprocal().clamp(0.1, 2) - torch.exp(-g.y.abs()), 1, 0),
    "squared relu": (lambda g: torch.relu(g.x).square().clamp_max(3.0).neg(), 1, 0),
    "angles": (lambda g: torch.cat((g.cos.float(),) * 2, -1).cos() * 1.1, 1, 0),
    "rotation": (lambda g: rotate(g.heads, g.cos, g.sin), 1, 0),
    "rotation of pairs": (lambda g: interleaved(g.heads, g.cos, g.sin), 1, 0),
    "rotation of projected heads": (lambda g: rotate(projected(g).transpose(1, 2), g.cos, g.sin), 1, 1),
    "normed heads": (normed_heads, 1, 1),
    "whole norm, then heads": (whole_norm_then_heads, 2, 1),
    "joined rows": (lambda g: torch.cat((g.x * 2, norm(g, g.y)), 1), 2, 0),
    "in place": (lambda g: (g.x * 2).add_(g.y).mul_(0.5).masked_fill_(g.x > 0, 1.0), 1, 0),
    "in place, seen before": (lambda g: [y := g.x * 2, z := y + 1, y.add_(3), y + z][-1], 1, 0),
    "in place, and its rows seen before": (
        lambda g: [y := g.x.narrow(1, 0, 2) * 2, z := y.view(4, 64) * 3, y.add_(1), z.sum() + y][-1], None, None),
    "in place through a view": (lambda g: [y := g.x * 2, y[..., 1:].add_(3), y + 1][-1], 2, 1),
    "joined dimensions": (lambda g: (g.x * 2).view(6, 64) + (g.y - 1).reshape(6, 64), 1, 0),
    "transposed": (lambda g: (g.x * 2).transpose(0, 1) + g.y.transpose(0, 1).contiguous(), 1, 0),
    "embedding": (lambda g: norm(g, F.embedding(g.ids, g.table) * 8), 1, 0),
    "rows of a table": (lambda g: g.table[g.ids] + g.x, 1, 0),
    "mask": (lambda g: ((g.columns <= g.places[:, :, None]) & g.seen[:, None])[:, None], 1, 0),
    "mask to be added": (
        lambda g: torch.zeros(2, 3, 40, dtype=g.dtype, device=ON).masked_fill(
            ~(g.columns[None] <= g.places[:, :, None]), torch.finfo(g.dtype).min), 1, 0),
    "choice": (lambda g: torch.where((g.places > 2)[..., None] | (g.places == 1)[..., None], g.x, 0.5), 1, 0),
    "numbers": (lambda g: (torch.arange(3, device=ON) * 2 + g.places - 1).to(g.dtype), 1, 0),
    "into a cache": (into_cache, 1, None),
    "into memory, and seen in other rows": (into_memory, 2, 0),
    "a sum into a cache": (lambda g: (h := (g.x * 2).sum(-1), g.flat[..., 0].copy_(h), h + 1)[-1], None, 0),
    "into rows from the end": (from_the_end, None, None),
    "sums of what is the same in all columns": (
        lambda g: torch.ones(2, 64, device=ON).sum(-1) + g.x.float()[:, 0, :1].expand(2, 64).sum(-1), None, 0),
    "softmax of what is the same in all columns": (
        lambda g: (torch.zeros(2, 64, device=ON) + g.x.float()[:, 0, :1]).softmax(-1), 1, 0),
    "compared with a rounded number": (
        lambda g: (torch.full_like(g.x, 0.3) == 0.3) | (g.x > torch.full((), 0.3, device=ON)), 1, 0),
    "rounded tensors": (lambda g: g.x + torch.full((), 0.3, device=ON) + torch.arange(1000, 1064, device=ON), 1, None),
    "subtracted from": (lambda g: torch.rsub(g.x, g.y, alpha=2), 1, 0),
    "signs of zero": (lambda g: 1 / -torch.zeros_like(g.x), 1, 0),
    "quotients": (lambda g: g.x / g.y.abs().clamp_min(0.5) / 3, 1, 0),
    "not a number": (not_a_number, 1, 0),
    "a short table": (lambda g: torch.cat((g.cos[0, 0, :5][torch.arange(5, device=ON)] * 2, g.x[0, 0, :3])), 1, 0),
    "tables side by side": (lambda g: torch.cat((g.weight[g.ids[0]] * 2, g.bias[g.ids[1].flip(0)])), None, None),
    "bools and integers": (lambda g: (g.seen == g.columns * (1 << 32)) | (g.seen & (g.columns > 3)), 1, 0),
    "narrower sums": (lambda g: g.wide.float().mean(-1, dtype=g.dtype), None, None),
    "into slices": (written, None, None),
    "dead": (lambda g: (torch.exp(g.x), g.y + 1)[1], 1, 0),
    "scalars of the host": (lambda g: g.x * torch.tensor(3.0) + torch.tensor(2), 1, None),
}  # fmt: skip


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_fused_functions_give_the_same(name, dtype):
    function, kernels, operators = FUNCTIONS[name]
    given = Given(dtype)
    plan = planned(traced(lambda: function(given), ON), ON)
    run = Runner(plan)
    for _ in range(2):
        buffers = given.buffer.clone(), given.flat.clone()
        expected = function(given)
        after = given.buffer.clone(), given.flat.clone()
        given.buffer.copy_(buffers[0]), given.flat.copy_(buffers[1])
        found = run()
        assert found.dtype == expected.dtype and found.shape == expected.shape and found.stride() == expected.stride()
        for x, y in zip((found, given.buffer, given.flat), (expected, *after), strict=True):
            torch.testing.assert_close(x, y, rtol=ROUNDING[dtype], atol=ROUNDING[dtype], equal_nan=True)
        given.change()
    left = [step for step in plan.steps if isinstance(step, Node)]
    assert kernels is None or len(plan.steps) - len(left) == kernels
    assert operators is None or len(left) == operators, [str(each.func) for each in left]


def test_elementwise_is_exact_in_16_bits():
    """Rounded where PyTorch's operators round."""
    given = Given(torch.float16)
    for function in (lambda: rotate(given.heads, given.cos, given.sin), lambda: (given.x * given.y + given.x) * 0.3):
        assert torch.equal(runner(function, ON)(), function())


def test_layers_share_a_kernel():
    """And batches, and numbers of tokens."""

    def layers(tokens, batch):
        given = torch.randn(batch, tokens, 64, device=ON)
        weights = [torch.randn(64, device=ON) for _ in range(3)]

        def function():
            x = given
            for each in weights:
                x = (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * each) @ each.diag()
            return x

        return function

    sources = set()
    for tokens, batch in ((2, 2), (4, 3), (16, 5)):
        steps = planned(traced(layers(tokens, batch), ON), ON).steps
        sources |= {step.source for step in steps if isinstance(step, Launch) and "rsqrt" in step.source}
    assert len(sources) == 1


def test_what_is_put_off_reads_memory_before_it_changes():
    x = torch.ones(4, device=ON)

    def function():
        before = x * 2  # nobody needs it yet
        x.add_(1)
        return before + x

    run = Runner(planned(traced(function, ON), ON))
    run()
    assert x[0] == 3 and torch.equal(run(), torch.full((4,), 10.0, device=ON)) and x[0] == 4


def test_a_store_is_seen_by_who_reads_the_memory():
    buffer, x = torch.zeros(4, device=ON), torch.ones(4, device=ON)

    def function():
        buffer.copy_(x * 3)
        first = buffer + 1
        buffer.copy_(x * 5)
        return first * 10 + buffer

    assert torch.equal(runner(function, ON)(), torch.full((4,), 45.0, device=ON))


def test_kernels_that_no_dispatcher_sees_are_called_again():
    x, calls = torch.ones(2, 3, device=ON), []

    def kernel(a, factor):
        calls.append(factor)
        return a.clone().mul_(factor)

    run = runner(lambda: noted(kernel, x + 1, 3) - 1, ON)
    x.fill_(4)
    assert torch.equal(run(), torch.full((2, 3), 14.0, device=ON)) and calls == [3, 3, 3]
    assert torch.equal(noted(kernel, x, 2), x * 2), "outside of a trace it is a call"


@pytest.mark.skipif(not INTERPRETED, reason="the host writes to it")
def test_memory_that_nobody_is_seen_to_fill_is_refused():
    hidden = torch.ones(3, device=ON)

    def function():
        made = torch.empty(3, device=ON)
        ctypes.memmove(made.data_ptr(), hidden.data_ptr(), 12)
        return made + 1

    with pytest.raises(Unfusable, match="nothing it does is seen to write"):
        runner(function, ON)


def hides(x):
    """Writes where nobody sees it."""
    made = torch.zeros(3, device=ON)
    ctypes.memmove(made.data_ptr(), x.data_ptr(), 12)
    return made + x


@pytest.mark.skipif(not INTERPRETED, reason="the host writes to it")
@pytest.mark.parametrize(
    "function, why",
    [
        (hides, "something else"),
        (lambda x: (x * 2).view(1, 3).t_() + 1, "what a tensor says of itself"),
        (lambda x: torch.from_dlpack(x[1:]) + x[:2], "without being views"),
    ],
)
def test_what_would_be_wrong_is_refused(function, why):
    x = torch.arange(1.0, 4.0)
    with pytest.raises(Unfusable, match=why):
        runner(lambda: function(x), ON)


def test_what_no_kernel_can_do_stays_as_it_was():
    """Too many operators for one, here."""
    x = torch.rand(3, device=ON)

    def function():
        y = x
        for _ in range(700):
            y = y * 1.001
        return y

    plan = planned(traced(function, ON), ON)
    assert len(plan.steps) == 700 and plan.fused == 0
    assert torch.equal(Runner(plan)(), function())


def test_rows_that_are_not_there_are_not_touched():
    """PyTorch stops the device; here nothing is written, and zeros are read."""
    table, rows, buffer = torch.ones(4, 3, device=ON), torch.tensor([1, 3], device=ON), torch.zeros(4, 3, device=ON)

    def function():
        buffer.index_put_((rows,), table[rows] * 2)
        return table[rows] + 1

    run = runner(function, ON)
    buffer.zero_(), rows.copy_(torch.tensor([2, 7]))
    assert run().tolist() == [[2.0] * 3, [1.0] * 3] and buffer.tolist() == [[0.0] * 3] * 2 + [[2.0] * 3, [0.0] * 3]


def test_what_waits_is_refused():
    x = torch.ones(3, device=ON)
    with pytest.raises(Refused, match="waits"):
        runner(lambda: x * x.sum().item(), ON)


def test_another_layout_is_refused():
    layouts = [torch.contiguous_format, torch.channels_last]
    x = torch.ones(2, 3, 4, 5, device=ON)

    def kernel(a):
        return a.clone(memory_format=layouts.pop())

    with pytest.raises(Unfusable, match="another layout"):
        runner(lambda: noted(kernel, x) + 1, ON)


COMPILES = """
import json, sys
import triton
from triton.backends.compiler import GPUTarget
from hf_accel_patch.kernels.triton_fused import compiled

for source, types, strides, sizes, warps in json.load(sys.stdin):
    function = compiled(source, sizes)
    signature = {f"p{i}": each for i, each in enumerate(types)}
    signature |= {f"s{i}": "i32" for i in range(strides)} | {f"n{i}": "i32" for i in range(sizes)}
    attributes = {(i,): [["tt.divisibility", 16]] for i in range(len(types))}
    source = triton.compiler.ASTSource(function, signature, {}, attributes)
    triton.compile(source, GPUTarget("cuda", 90, 32), dict(num_warps=warps, enable_fp_fusion=False))
"""
POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int64: "*i64", torch.bool: "*u8"}


def test_it_compiles_for_a_gpu_that_is_not_there():
    """All of the above, which the interpreter takes more kindly."""
    given, kernels = Given(torch.bfloat16), {}
    for function, _, _ in FUNCTIONS.values():
        for step in planned(traced(lambda function=function: function(given), ON), ON).steps:
            if isinstance(step, Launch):
                types = [POINTERS[each.dtype] for each in step.tensors]
                kernels[step.source] = step.source, types, len(step.strides), len(step.sizes), step.warps
    assert len(kernels) > 30
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    asked = {"env": environment, "input": json.dumps(list(kernels.values())), "capture_output": True, "text": True}
    done = subprocess.run([sys.executable, "-c", COMPILES], **asked)
    assert done.returncode == 0, done.stderr


def test_memory_in_between_is_freed():
    """As soon as nobody needs it any more."""
    alive, most = [], []

    def kernel(a):
        import weakref

        most.append(sum(each() is not None for each in alive))
        made = a + 1
        alive.append(weakref.ref(made))
        return made

    x = torch.ones(3, device=ON)

    def function():
        y = x
        for _ in range(10):
            y = noted(kernel, y)
        return y

    run = Runner(planned(traced(function, ON), ON))
    alive.clear(), most.clear()
    assert torch.equal(run(), x + 10) and max(most) <= 2


@pytest.mark.parametrize("scheme", ["int8", "int4", "nf4"])
def test_products_of_the_same_activations_are_one_call(scheme):
    """Queries, keys and values, but no fourth, nor what is of other activations, another scheme or other groups."""

    def weight(N, group=64):
        codes, bits = pack(torch.randn(N, 128), scheme, group, CUDA_BLOCK)
        return codes.to(ON), bits.view(torch.float32 if bits.dtype == torch.int32 else torch.bfloat16).to(ON)

    x, weights, other = torch.randn(1, 3, 128, device=ON), [weight(N) for N in (64, 32, 32, 96)], weight(128, 32)

    def product(x, weight):
        return torch.ops.hf_accel_patch.linear(x, *weight, scheme, False, 0, False, False)

    def function():
        y = x * 2
        apart = product(y.flip(1), weights[0])
        last = product(y, other)
        return torch.cat([*(product(y, each) for each in weights), apart, last], -1)

    plan = planned(traced(function, ON), ON)
    sizes = [len(step.outputs) for step in plan.steps if isinstance(step, Node) and step.func is linear_together]
    singles = [step for step in plan.steps if isinstance(step, Node) and "hf_accel_patch" in str(step.func)]
    assert sizes == ([3, 2] if scheme == "int8" else [3]) and len(singles) == (1 if scheme == "int8" else 3)
    torch.testing.assert_close(Runner(plan)(), function(), rtol=1e-5, atol=1e-4)
