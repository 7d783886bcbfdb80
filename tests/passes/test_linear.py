"""Products of float weights: exact, for the rows that were found to pay, and out of the way of everything else."""

import copy
import pickle

import pytest
import torch
from cases import entry, greedy, left_padded, logits, prompt, relative_error, tiny
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

from hf_accel_patch import patch, plan, report, unpatch
from hf_accel_patch.kernels import cpu, cpu_prefill
from hf_accel_patch.ops import dense
from hf_accel_patch.ops.modules import FastLinear
from hf_accel_patch.ops.packing import int4_block
from hf_accel_patch.ops.wide import WIDENED
from hf_accel_patch.passes import linear
from hf_accel_patch.passes.linear import FastConv1D

pytestmark = pytest.mark.skipif(bool(cpu.why_not(int4_block())), reason=cpu.why_not(int4_block()))
DTYPES = pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)


@pytest.fixture(autouse=True)
def few_rows(monkeypatch):
    """The kernel up to 4 rows, whatever a measurement on this machine would say."""
    monkeypatch.setattr(linear, "float_backend", lambda dtype, *_, **__: dense.FloatBackend(dtype, 4, 0))


@pytest.fixture
def calls(monkeypatch):
    """The shapes of the activations that the kernel met."""
    seen, kernel = [], cpu.linear_float

    def counted(kernels, x, weight, bias):
        seen.append(tuple(x.shape))
        return kernel(kernels, x, weight, bias)

    monkeypatch.setattr(cpu, "linear_float", counted)
    return seen


def fast(N=96, K=72, dtype=torch.float32, bias=True, rows=4, widened=0):
    torch.manual_seed(0)
    module = nn.Linear(K, N, bias=bias).to(dtype)
    stock = copy.deepcopy(module)
    module.backend = dense.FloatBackend(dtype, rows, widened)
    module.__class__ = FastLinear
    return module, stock


@DTYPES
def test_a_decode_takes_the_kernel_and_a_prefill_does_not(dtype, calls):
    model = tiny("llama").to(dtype)
    exact = logits(tiny("llama").double(), prompt())
    stock = relative_error(logits(model, prompt()), exact)
    patch(model)
    assert "reason" not in entry(report(model).to_dict(), "linear")
    logits(model, prompt())
    assert not calls
    assert relative_error(logits(model, prompt()[:, :3]), exact[:, :3]) < 1.5 * stock + 1e-5
    assert len(calls) == 4 * 7 + 1


def test_tokens_are_those_of_stock(calls):
    model = tiny("llama")
    expected = greedy(model, **left_padded()), greedy(model, prompt())
    patch(model)
    assert torch.equal(greedy(model, **left_padded()), expected[0]) and torch.equal(
        greedy(model, prompt()), expected[1]
    )
    assert calls and all(shape[-2] == 1 for shape in calls)


@DTYPES
@pytest.mark.parametrize("shape", ((72,), (1, 72), (2, 2, 72), (3, 1, 72), (0, 72), (5, 72)), ids=str)
@pytest.mark.parametrize("bias", (False, True))
@torch.no_grad()
def test_shapes(dtype, shape, bias):
    module, stock = fast(dtype=dtype, bias=bias)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    ours, exact = module(x), stock.double()(x.double())
    assert ours.dtype == dtype and ours.shape == exact.shape
    assert torch.allclose(ours.double(), exact, atol=3e-6 if dtype == torch.float32 else 1e-2, rtol=1e-2)


@torch.no_grad()
def test_activations_in_any_order_of_memory():
    module, stock = fast()
    x = torch.randn(72, 3).T
    assert torch.allclose(module(x), stock(x), atol=1e-5)
    module.weight.data = module.weight.data.T.contiguous().T
    assert torch.allclose(module(x), stock(x), atol=1e-5)


@torch.no_grad()
def test_activations_of_another_width_are_refused():
    module, _ = fast()
    for width in (71, 36, 144):
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            module(torch.randn(1, width))


@torch.no_grad()
def test_many_rows_of_float16_go_through_float32():
    module, stock = fast(N=300, dtype=torch.float16, rows=0, widened=8)
    for rows in (7, 8, 20):
        x = torch.randn(2, rows, 72).half()
        exact = copy.deepcopy(stock).double()(x.double())
        assert (module(x) - exact).abs().max() <= 1.1 * (exact.half() - exact).abs().max()


def test_what_a_kernel_must_not_see_goes_to_pytorch(calls):
    module, stock = fast()
    x = torch.randn(2, 72)
    y = module(x)  # gradients are on
    y.sum().backward()
    assert torch.equal(y, stock(x)) and module.weight.grad is not None
    with torch.no_grad():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(module(x), stock(x))
        assert torch.equal(torch.func.vmap(module)(x), torch.func.vmap(stock)(x))
        assert torch.equal(torch.jit.trace(module, x, check_trace=False)(x + 1), stock(x + 1))
        assert torch.equal(torch.compile(module, backend="eager")(x), stock(x))
        assert module.to("meta")(torch.empty(2, 72, device="meta")).device.type == "meta"
    assert not calls


@torch.no_grad()
def test_dispatch_modes_see_the_operator():
    seen = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    module, _ = fast()
    with Recorder():
        module(torch.randn(1, 72))
    assert any("addmm" in name for name in seen)


@torch.no_grad()
def test_another_dtype_after_the_patch_is_stocks(calls):
    module, stock = fast()
    x = torch.randn(1, 72).bfloat16()
    assert torch.equal(module.bfloat16()(x), stock.bfloat16()(x)) and not calls


def test_quantized_weights_are_left_to_their_pass():
    model = patch(tiny("llama"), quantize="int4")
    assert entry(report(model).to_dict(), "linear")["reason"] == "its nn.Linear are quantized"
    from hf_accel_patch import Quantize

    model = patch(tiny("llama"), quantize=Quantize("int4", skip=("lm_head",)))
    assert entry(report(model).to_dict(), "linear")["weights"] == 1 and type(model.lm_head) is FastLinear


def test_small_layers_are_left_alone(monkeypatch):
    monkeypatch.setattr(linear, "LEAST_WEIGHTS", 1 << 30)
    assert "weights or more" in entry(plan(tiny("llama")).to_dict(), "linear")["reason"]


def test_where_pytorch_is_as_fast_nothing_changes(monkeypatch):
    monkeypatch.setattr(linear, "float_backend", lambda dtype, *_, **__: dense.FloatBackend(dtype, 0, 0))
    model = patch(tiny("llama"))
    assert "nothing faster" in entry(report(model).to_dict(), "linear")["reason"]
    assert type(model.lm_head) is nn.Linear


def test_switched_off():
    model = patch(tiny("llama"), linear=False)
    assert entry(report(model).to_dict(), "linear")["reason"] == "switched off: linear=False"
    assert type(model.lm_head) is nn.Linear
    with pytest.raises(ValueError, match="linear='fast'"):
        patch(tiny("llama"), linear="fast")


@torch.no_grad()
def test_copies_pickles_and_state_dicts():
    model = patch(tiny("llama"))
    other = pickle.loads(pickle.dumps(model.lm_head))
    x = torch.randn(1, 64)
    assert type(other) is FastLinear and torch.equal(other(x), model.lm_head(x))
    copied = copy.deepcopy(model)
    unpatch(model)
    assert type(copied.lm_head) is FastLinear and type(model.lm_head) is nn.Linear
    assert list(copied.state_dict()) == list(model.state_dict())
    unpatch(copied)
    assert type(copied.lm_head) is nn.Linear and "backend" not in vars(copied.lm_head)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16, torch.float64), ids=str)
def test_the_measurement(dtype):
    for K in (64, 8192):
        backend = dense.float_backend(dtype, K)
        assert backend.dtype == dtype and backend.rows in (0, 1, 2, 4, 8, 16, 32)
        assert dtype != torch.float64 or not backend.faster
        assert backend.widened == 0 or dtype is torch.float16 or dtype in WIDENED
        assert not (backend.widened and backend.many)
        assert all(each == 0 or each > backend.rows for each in (backend.widened, backend.many))


DIVISIONS = {
    "few, then many": ([2, 2, 1, 1, 1, 5, 0, 0], [9, 9, 5, 4, 3, 2, 1, 1], [8] * 8, [16, 0, 17]),
    "nothing is gained": ([1] * 8, [1] * 8, [1.02] * 8, [0, 0, 0]),
    "few where PyTorch is slow in between": ([1, 1, 1, 1, 9, 9, 0, 0], [9] * 8, [1, 1, 2, 2, 1, 1, 1, 1], [8, 0, 0]),
    "PyTorch in between": ([1, 1, 9, 9, 9, 9, 0, 0], [9, 9, 9, 9, 9, 9, 1, 1], [2] * 8, [2, 0, 64]),
    "many of any number": ([9] * 8, [1] * 8, [9] * 8, [0, 0, 1]),
    "held up": ([1, 1, 1, 1, 2, 2, 0, 0], [3, 3, 3, 3, 9, 1, 1, 4], [4, 2, 4, 4, 4, 4, 4, 3], [16, 0, 17]),
}


@pytest.mark.parametrize("few, many, stock, expected", DIVISIONS.values(), ids=DIVISIONS)
def test_what_follows_from_a_measurement(few, many, stock, expected):
    seconds = [
        {"PyTorch": each, "many": other} | ({"few": one} if one else {})
        for one, other, each in zip(few, many, stock, strict=True)
    ]
    assert dense._division(seconds) == expected


@DTYPES
@pytest.mark.parametrize("many", (1, 3))
def test_weights_that_lie_the_other_way(many, dtype, monkeypatch):
    """Of GPT-2: those rows that the kernel is for go to it, and others to PyTorch, as does training."""
    if reason := cpu_prefill.why_not():
        pytest.skip(reason)
    torch.manual_seed(0)
    module = Conv1D(96, 72).to(dtype)
    stock = copy.deepcopy(module)
    module.backend, module.__class__ = dense.FloatBackend(dtype, 0, many=many), FastConv1D
    taken, kernel = [], cpu.linear_float
    monkeypatch.setattr(cpu, "linear_float", lambda *given: taken.append(len(given[1])) or kernel(*given))
    for rows in (0, 1, 2, 3, 70):
        x = torch.randn(rows, 72).to(dtype)
        with torch.no_grad():
            exact = x.double() @ stock.weight.double() + stock.bias.double()
            ours = module(x)
        assert ours.shape == exact.shape and ours.dtype == dtype
        assert not rows or relative_error(ours, exact) < 1e-5 + 2 * torch.finfo(dtype).eps
    assert taken == [rows for rows in (1, 2, 3, 70) if rows >= many]
    assert torch.equal(module(x), stock(x)) and module(x).requires_grad
    assert len(taken) == 5 - many


def test_graphs_of_weights_that_lie_the_other_way():
    """They have PyTorch's product, for any number of rows."""
    module = Conv1D(96, 72)
    module.backend, module.__class__ = dense.FloatBackend(torch.float32, 0, many=8), FastConv1D
    graphs = CompileCounter()
    compiled = torch.compile(module, backend=graphs, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for rows in (3, 5, 9, 70):
            assert compiled(torch.randn(rows, 72)).shape == (rows, 96)
        assert graphs.frame_count == 1
        exported = torch.export.export(module, (torch.randn(9, 72),), dynamic_shapes=({0: torch.export.Dim("rows")},))
        assert exported.module()(torch.randn(3, 72)).shape == (3, 96)


@DTYPES
def test_gpt2_takes_its_own_products(dtype, monkeypatch):
    monkeypatch.setattr(linear, "float_backend", lambda dtype, *_, **__: dense.FloatBackend(dtype, 0, many=1))
    monkeypatch.setattr(linear, "LEAST_WEIGHTS", 0)
    model = tiny("gpt2").to(dtype)
    exact = logits(tiny("gpt2").double(), prompt())
    stock, expected = relative_error(logits(model, prompt()), exact), greedy(model, prompt())
    patch(model)
    kinds = {type(module) for module in model.transformer.h.modules() if isinstance(module, Conv1D)}
    assert kinds == {FastConv1D}
    assert relative_error(logits(model, prompt()), exact) < 1.5 * stock + 1e-5
    assert dtype != torch.float32 or torch.equal(greedy(model, prompt()), expected)
    unpatch(model)
    assert {type(module) for module in model.transformer.h.modules() if isinstance(module, Conv1D)} == {Conv1D}


@DTYPES
def test_rows_divide_what_multiplies(dtype, monkeypatch):
    """Few and many rows give what PyTorch gives, whichever kernel they go to."""
    module, stock = fast(dtype=dtype, rows=2)
    module.backend = dense.FloatBackend(dtype, 2, many=5)
    taken, libraries = [], {cpu_prefill.library(): "many", cpu.library(int4_block()): "few"}
    kernel = cpu.linear_float
    monkeypatch.setattr(cpu, "linear_float", lambda *given: taken.append(libraries[given[0]]) or kernel(*given))
    for rows in (1, 2, 3, 4, 5, 70):
        x = torch.randn(rows, 72).to(dtype)
        with torch.no_grad():
            exact = F.linear(x.double(), stock.weight.double(), stock.bias.double())
            assert relative_error(module(x), exact) < 1e-5 + 2 * torch.finfo(dtype).eps
    if None not in libraries:
        assert taken == ["few", "few", "many", "many"]
