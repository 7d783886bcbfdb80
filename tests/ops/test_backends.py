"""The choice of a backend for attention, and what each computes, against the definition in float64."""

import importlib
import sys
from dataclasses import replace
from types import ModuleType
from unittest.mock import Mock

import pytest
import torch
from interpreter import INTERPRETED, interpreted, load

from hf_accel_patch.ops import backends, flash, launching
from hf_accel_patch.ops.attention import reference
from hf_accel_patch.ops.backends import Asked, Case, Choice, attend_by, cannot, choose, missing
from hf_accel_patch.ops.case import Causal, Dense, Everything, Variant
from hf_accel_patch.ops.mask import DescribedMask, contiguous_runs
from hf_accel_patch.ops.seen import Run, Seen, seen

T, D = 25, 16
CPU = torch.device("cpu")
TOLERANCE = 2e-5  # float32 against float64, outputs of order one


def inputs(B=2, H=4, K=2, T=T, S=T, V=D):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=generator) for shape in ((B, H, T, D), (B, K, S, D), (B, K, S, V))]


def described(dense, **options):
    def build(start, stop, first, last):
        return dense[:, None, start:stop, first:last]

    shape = (len(dense), 1, *dense.shape[1:])
    return DescribedMask(shape, CPU, build, causal=True, offset=dense.shape[2] - dense.shape[1], **options)


def causal(T=T, S=T):
    return torch.arange(S) <= torch.arange(S - T, S)[:, None]


def near(window, T=T, S=T):
    return causal(T, S) & (torch.arange(S) > torch.arange(S - T, S)[:, None] - window)


PADDING = torch.stack([torch.arange(T) >= 9, torch.arange(T) < 20])
HOLES = torch.arange(T).expand(2, T) % 7 != 3
SEQUENCES = torch.arange(T) // 10
DENSE = {
    "causal": causal()[None],
    "window": near(6)[None],
    "padded": causal() & PADDING[:, None],
    "padded window": near(6) & PADDING[:, None],
    "packed": (causal() & (SEQUENCES[:, None] == SEQUENCES))[None],
    "continued": causal(T, T + 7)[None],
    "continued window": near(6, T, T + 7)[None],
}
RUNS = {
    "causal": ([Run(0, 0, T, 0, T)], T),
    "window": ([Run(0, 0, T, 0, T)], 6),
    "padded": ([Run(0, 9, T, 9, T), Run(1, 0, 20, 0, 20), *(Run(1, t, t + 1, 0, 20) for t in range(20, T))], 20),
    "packed": ([Run(0, 0, 10, 0, 10), Run(0, 10, 20, 10, 20), Run(0, 20, T, 20, T)], 10),
    "continued": ([Run(0, 0, T, 0, T + 7)], T + 7),
    "continued window": ([Run(0, 0, T, 2, T + 7)], 6),
}


def dense_of(found, S):
    first, last = found.intervals[..., :1], found.intervals[..., 1:]
    return (torch.arange(S) >= first) & (torch.arange(S) < last)


@pytest.mark.parametrize("name", DENSE)
def test_intervals_say_what_the_mask_says(name, monkeypatch):
    monkeypatch.setattr("hf_accel_patch.ops.seen.SCORE_BYTES", 32 * 32 * 5)  # several blocks
    dense = DENSE[name]
    mask = described(dense, window=6 if "window" in name else None)
    found = seen(mask, T, dense.shape[-1], CPU)
    assert torch.equal(dense_of(found, dense.shape[-1]), dense) and found.intervals.dtype == torch.int32
    assert seen(mask, T, dense.shape[-1], CPU) is found
    assert torch.equal(seen(Dense(dense[:, None]), T, dense.shape[-1], CPU).intervals, found.intervals)
    if name in RUNS:
        assert found.runs == RUNS[name]


def test_intervals_of_masks_that_say_what_they_are():
    assert torch.equal(dense_of(seen(Causal(T, CPU), T, T, CPU), T), DENSE["causal"])
    everything = seen(Everything(9), T, 9, CPU)
    assert dense_of(everything, 9).all() and everything.everything and not seen(Causal(T, CPU), T, T, CPU).everything
    padded = described(DENSE["padded"], square=True, padding=PADDING, runs=lambda: contiguous_runs(PADDING))
    found = dense_of(seen(padded, T, T, CPU), T)
    assert torch.equal(found & PADDING[:, :, None], DENSE["padded"] & PADDING[:, :, None])
    with torch.inference_mode():
        first = seen(Causal(77, CPU), 77, 77, CPU)
    assert not first.intervals.is_inference() and seen(Causal(77, CPU), 77, 77, CPU) is first


def test_a_mask_on_another_device_is_none_of_all_elements(monkeypatch):
    """As accelerate moves it to each layer there; what was found out is found out once."""
    monkeypatch.setattr(DescribedMask, "dense", Mock(side_effect=AssertionError))
    mask = described(DENSE["padded"], square=True, padding=PADDING, runs=Mock(return_value=[(9, T), (0, 20)]))
    moved = [mask.to("meta"), mask.to("meta", non_blocking=True)]
    assert [type(each) for each in moved] == [DescribedMask] * 2 and moved[0].is_meta
    assert moved[0].block(3, 5, 0, 7).is_meta and moved[0].padding.is_meta and moved[0].square
    assert moved[0].keys(3, 5) == mask.keys(3, 5) and moved[0].spans() == mask.spans() == moved[1].spans()
    found = [seen(each, T, T, CPU) for each in (*moved, mask)]
    assert found[0] is found[1] is found[2] and mask.runs.call_count == 1
    monkeypatch.undo()
    assert mask.to(torch.float32).dtype == torch.float32


def test_what_is_no_interval():
    assert seen(described(causal() & HOLES[:, None]), T, T, CPU) is None
    assert seen(Dense(causal()[None, None].float()), T, T, CPU) is None
    by_head = torch.stack([causal(), near(3)])[None]
    assert seen(Dense(by_head), T, T, CPU) is None
    assert Seen(torch.tensor([[[0, 5], [0, 5], [0, 3]]])).runs is not None  # three runs
    assert Seen(torch.tensor([[[0, 5], [3, 6], [0, 7]]])).runs is None


@pytest.fixture
def triton(monkeypatch):
    if not INTERPRETED:
        pytest.skip("tests/kernels does this on a GPU")
    monkeypatch.setattr(backends, "_triton", lambda: load("triton_prefill"))
    load("triton_prefill_backward")
    load("triton_decode")
    with interpreted():
        yield


def row(H=4, S=T):
    return (2.0 ** -torch.arange(1, H + 1)).view(1, H, 1, 1) * torch.arange(1.0 - S, 1)


VARIANTS = {
    "plain": {},
    "softcap": {"softcap": 2.0},
    "sinks": {"sinks": torch.tensor([0.5, -1.0, 2.0, 0.0]).view(1, 4, 1, 1)},
    "ALiBi": {"bias": 1},
}


def compare(backend, name, options, V=D):
    dense = DENSE[name]
    S = dense.shape[-1]
    query, key, value = inputs(S=S, V=V)
    variant = Variant(0.3, **(options | ({"bias": row(S=S)} if "bias" in options else {})))
    asked = Asked(backend)
    ours = attend_by(asked, query, key, value, described(dense), variant)
    assert asked.used == [f"{backend}: asked for"] and ours.shape == (2, T, 4, V) and ours.is_contiguous()
    exact = reference(query, key, value, dense[:, None].expand(2, 4, T, S), variant).transpose(1, 2)
    assert (ours - exact).abs().max() < TOLERANCE


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["padded window", "continued"])
def test_triton(triton, name, variant):
    compare("triton", name, VARIANTS[variant], V=24)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["padded window", "packed", "continued"])
def test_flex(name, variant):
    with torch.no_grad():
        compare("flex", name, VARIANTS[variant], V=24 if variant == "plain" else D)


def test_blocks_of_flex():
    from hf_accel_patch.ops.flex import block_mask

    found = Seen((torch.arange(300)[:, None] + torch.tensor([-149, 1])).clamp(min=0).int()[None])
    mask = block_mask(found.intervals, 300)
    assert mask.kv_num_blocks[0, 0].tolist() == [1, 2, 3] and mask.full_kv_num_blocks[0, 0].tolist() == [0, 0, 0]
    whole = block_mask(torch.tensor([0, 300]).int().expand(1, 300, 2), 300)
    assert whole.full_kv_num_blocks[0, 0].tolist() == [3, 3, 3] and whole.kv_num_blocks.sum() == 0
    assert block_mask(seen(Causal(300, CPU), 300, 300, CPU).intervals, 300).full_kv_num_blocks.tolist() == [[[0, 1, 2]]]


@pytest.mark.parametrize("variant", ["plain", "softcap"])
def test_few_queries_take_the_kernel_that_splits(triton, variant, monkeypatch):
    from hf_accel_patch.kernels import triton_decode

    calls, real = [], triton_decode.attend
    monkeypatch.setattr(triton_decode, "attend", lambda *args: calls.append(1) or real(*args))
    query, key, value = inputs(T=1, S=40)
    mask, exact = torch.arange(40) > 5, Variant(0.3, **VARIANTS[variant])
    with torch.no_grad():
        ours = attend_by(Asked("triton"), query, key, value, Dense(mask.expand(2, 1, 1, 40)), exact)
    expected = reference(query, key, value, mask.expand(2, 4, 1, 40), exact).transpose(1, 2)
    assert calls and (ours - expected).abs().max() < TOLERANCE


def test_gradients_go_through_triton(triton):
    ours, theirs = ([each.requires_grad_() for each in inputs()] for _ in range(2))
    sinks = [torch.zeros(1, 4, 1, 1, requires_grad=True) for _ in range(2)]
    mask = described(DENSE["window"], window=6)
    output = attend_by(Asked("triton"), *ours, mask, Variant(0.3, sinks=sinks[0]))
    output.square().sum().backward()
    dense = DENSE["window"].expand(2, 4, T, T)
    reference(*theirs, dense, Variant(0.3, sinks=sinks[1])).square().sum().backward()
    for mine, other in zip((*ours, sinks[0]), (*theirs, sinks[1]), strict=True):
        assert (mine.grad - other.grad).abs().max() < 1e-4


class FlashAttention:
    """The interface of flash-attn 2.8, by the definition; keeps the arguments of its calls."""

    def __init__(self):
        self.calls = []

    def flash_attn_func(
        self, q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
        alibi_slopes=None,
    ):  # fmt: skip
        self.calls.append((tuple(q.shape), causal, window_size))
        T, S = q.shape[1], k.shape[1]
        distance = torch.arange(S) - torch.arange(S - T, S)[:, None]  # aligned at the last query and key
        mask = distance <= 0 if causal else torch.ones(T, S, dtype=torch.bool)
        if window_size[0] >= 0:
            mask = mask & (distance >= -window_size[0])
        bias = None if alibi_slopes is None else -alibi_slopes[..., None, None] * distance.abs()
        bias = bias if bias is None or bias.ndim == 4 else bias[None]
        variant = Variant(softmax_scale, softcap=softcap or None, bias=bias)
        q, k, v = (each.transpose(1, 2) for each in (q, k, v))
        return reference(q, k, v, mask.expand(*q.shape[:2], T, S), variant).transpose(1, 2).float().contiguous()

    def flash_attn_varlen_func(
        self, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, alibi_slopes=None, **options
    ):
        assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
        assert max_seqlen_q == cu_seqlens_q.diff().max() and max_seqlen_k == cu_seqlens_k.diff().max()
        parts = []
        for i in range(len(cu_seqlens_q) - 1):
            a, b, c, d = *cu_seqlens_q[i : i + 2], *cu_seqlens_k[i : i + 2]
            own = None if alibi_slopes is None else alibi_slopes[i][None]
            parts.append(self.flash_attn_func(q[None, a:b], k[None, c:d], v[None, c:d], alibi_slopes=own, **options)[0])
        return torch.cat(parts)


@pytest.fixture
def flash_attn(monkeypatch):
    fake, module = FlashAttention(), ModuleType("flash_attn")
    module.flash_attn_func, module.flash_attn_varlen_func = fake.flash_attn_func, fake.flash_attn_varlen_func
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    return fake


@pytest.mark.parametrize("variant", ["plain", "softcap", "ALiBi"])
@pytest.mark.parametrize("name", DENSE)
def test_arguments_of_flash_attn(flash_attn, monkeypatch, name, variant):
    monkeypatch.setattr(backends, "cannot", lambda backend, case: "")
    compare("flash-attn", name, VARIANTS[variant])
    apart = {"padded": 7, "padded window": 7, "packed": 6}.get(name, 1)  # padding sees the keys before it
    assert len(flash_attn.calls) == apart and all(causal for _, causal, _ in flash_attn.calls)
    expected = (5, 0) if "window" in name else (-1, -1)
    assert {window for _, _, window in flash_attn.calls} == {expected}


def test_places_of_runs_are_found_once(flash_attn, monkeypatch):
    query, key, value = inputs()
    found = seen(Dense(DENSE["padded"][:, None]), T, T, CPU)
    first = flash.attend(query, key, value, found, Variant(0.3))
    monkeypatch.setattr(flash, "_ends", None)
    assert torch.equal(flash.attend(query, key, value, found, Variant(0.3)), first)


def test_what_flash_attn_cannot_say(flash_attn):
    query, key, value = inputs(S=30)
    everything = seen(Everything(30), T, 30, CPU)
    ours = flash.attend(query, key, value, everything, Variant(0.3))
    assert (ours - reference(query, key, value, None, Variant(0.3)).transpose(1, 2)).abs().max() < TOLERANCE
    assert flash.attend(query, key, value, everything, Variant(0.3, bias=row(S=30))).startswith("a bias without")
    bent = row().square()
    whole = seen(Causal(T, CPU), T, T, CPU)
    assert flash.attend(*inputs(), whole, Variant(0.3, bias=bent)) == "the bias is not a slope times the position"
    odd = Seen(torch.tensor([[[0, 5], [3, 6], [0, 7]]]))
    assert flash.attend(query[:, :, :3], key, value, odd, Variant(0.3)).startswith("what queries see is not causal")


GPU = Case()
WINDOW = replace(GPU, mask="described")


@pytest.mark.parametrize(
    "case, there, expected",
    [
        (replace(WINDOW, device="cpu"), ("triton",), "torch"),
        (GPU, ("triton", "flash-attn"), "torch"),
        (WINDOW, ("triton", "flash-attn"), "triton"),
        (WINDOW, ("flash-attn",), "flash-attn"),
        (WINDOW, (), "torch"),
        (replace(WINDOW, head_size=256, value_size=256), ("triton", "flash-attn"), "flash-attn"),
        (replace(WINDOW, head_size=256, value_size=256), ("triton",), "triton"),
        (replace(WINDOW, head_size=288, value_size=288), ("triton", "flash-attn"), "torch"),
        (replace(GPU, sinks=True), ("flash-attn",), "torch"),
        (replace(GPU, sinks=True), ("triton",), "triton"),
        (replace(GPU, softcap=True, dtype=torch.float64), ("triton",), "torch"),
        (replace(GPU, head_size=192), ("triton", "flash-attn"), "triton"),
        (replace(GPU, bias=True, mask="stored"), ("triton",), "torch"),
        (replace(GPU, bias=True, few_tokens=True), ("triton",), "torch"),
        (replace(GPU, softcap=True, otherwise="dropout"), ("triton",), "torch"),
    ],
)
def test_the_rule(case, there, expected, monkeypatch):
    monkeypatch.setattr(backends, "missing", lambda backend: None if backend in there else ("not there", "install"))
    assert choose("auto", case).backend == expected and choose("auto", case).why


@pytest.mark.parametrize(
    "backend, case, reason",
    [
        ("triton", replace(GPU, dtype=torch.float64), "the kernels take no float64"),
        ("triton", replace(GPU, value_size=512), "the kernels take heads of up to 256, and these have 512"),
        ("triton", replace(GPU, device="mps"), "the kernels are for CUDA, and this is on mps"),
        ("triton", replace(GPU, otherwise="dropout"), "dropout"),
        ("flash-attn", replace(GPU, device="cpu"), "it is for CUDA, and this is on cpu"),
        ("flash-attn", replace(GPU, dtype=torch.float32), "it takes bfloat16 and float16, and this is float32"),
        (
            "flash-attn",
            replace(GPU, value_size=64),
            "it takes equal head sizes of up to 256, and these are 128 and 64",
        ),
        ("flash-attn", replace(GPU, sinks=True), "it has no sinks"),
        ("flex", replace(GPU, device="cpu", gradients=True), "on a CPU it has no gradients"),
    ],
)
def test_who_cannot_falls_back_and_says_why(backend, case, reason, monkeypatch):
    monkeypatch.setattr(backends, "missing", lambda backend: None)
    assert cannot(backend, case) == reason
    choice = choose(backend, case)
    assert choice.why == f"{backend}: {reason}" and choice.backend != backend
    assert cannot("torch", case) == "" and choose("torch", case) == Choice("torch", "asked for")


def test_gpus_that_cannot_run_the_kernels(monkeypatch):
    old = "the kernels need a GPU of compute capability 8.0 or more"
    monkeypatch.setattr(backends, "unsuitable", lambda index: old if index == 1 else "")
    second = replace(WINDOW, index=1)
    monkeypatch.setattr(backends, "missing", lambda backend: None)
    assert cannot("triton", second) == old and choose("auto", second).backend == "torch"
    assert cannot("flash-attn", second) == "it needs a GPU of compute capability 8.0 or more"
    assert cannot("triton", replace(WINDOW, index=0)) == cannot("flash-attn", WINDOW) == ""


def test_masks_that_are_for_torch_are_noted(triton):
    asked = Asked("triton")
    assert attend_by(asked, *inputs(), described(causal() & HOLES[:, None]), Variant(0.3)) is None
    assert attend_by(asked, *inputs(), Causal(T, CPU), Variant(0.3, dropout=0.5)) is None
    assert attend_by(asked, *inputs(), Causal(T, CPU), Variant(0.3, bias=torch.zeros(1, 1, T, T))) is None
    assert asked.used == [
        "torch: triton: what a query sees is not one run of keys that is the same for all heads",
        "torch: triton: dropout",
        "torch: triton: a bias that is no constant float32 row for all queries",
    ]


def test_kernels_that_a_gpu_has_no_room_for(triton, monkeypatch):
    kernels, asked = load("triton_prefill"), Asked("triton")
    error = importlib.import_module("triton").OutOfResources(300, 200, "shared memory")
    monkeypatch.setattr(kernels, "attend", Mock(side_effect=error))
    monkeypatch.setattr(launching, "_refused", {})
    with pytest.warns(UserWarning, match="a Triton kernel cannot start on cpu"):
        assert attend_by(asked, *inputs(), Causal(T, CPU), Variant(0.3)) is None
    assert asked.used[0].startswith("torch: triton: OutOfResources: out of resource: shared memory, Required: 300")


def test_who_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", None)  # its import fails
    monkeypatch.setattr(backends, "_triton", lambda: None)
    assert missing("flash-attn")[1] == "pip install flash-attn --no-build-isolation"
    assert missing("triton") == ("triton is not installed", "pip install 'hf_accel_patch[triton]'")
    assert missing("auto") is missing("torch") is missing("flex") is None
