"""Triton kernels that cannot start, against what computes instead."""

import importlib
import subprocess

import pytest
import torch
from interpreter import INTERPRETED, interpreted, load

from hf_accel_patch.ops import launching, linear, packing
from hf_accel_patch.ops.launching import launch, unsuitable

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def forgotten(monkeypatch):
    monkeypatch.setattr(launching, "_refused", {})


def failing(*errors):
    def run():
        calls.append(1)
        raise errors[0]

    calls = []
    return run, calls


def test_what_starts_is_what_it_gives():
    assert launch("kernel", CPU, lambda: torch.ones(2)).tolist() == [1, 1]


def test_a_kernel_that_cannot_start_is_tried_once():
    load("triton_linear")
    run, calls = failing(importlib.import_module("triton").OutOfResources(300, 200, "shared memory"))
    with pytest.warns(UserWarning, match=r"a Triton kernel cannot start on cpu, so PyTorch computes instead \(OutOf"):
        reason = launch("kernel", CPU, run)
    assert reason.startswith("OutOfResources: out of resource: shared memory, Required: 300") and len(calls) == 1
    assert launch("kernel", CPU, run) == reason and len(calls) == 1
    assert launch("another", CPU, lambda: torch.ones(1)).item() == 1


def test_what_ends_a_capture_is_no_fault_of_the_kernel(monkeypatch):
    load("triton_linear")
    run, calls = failing(importlib.import_module("triton").OutOfResources(300, 200, "shared memory"))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(Exception, match="out of resource"):
        launch("kernel", torch.device("cuda"), run)
    assert launch("kernel", torch.device("cuda"), lambda: torch.ones(2)).tolist() == [1, 1] and len(calls) == 1


def test_a_machine_without_a_compiler(monkeypatch, tmp_path):
    """What Triton raises then is no error of its own."""
    pytest.importorskip("triton")
    build = importlib.import_module("triton.runtime.build")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    with pytest.warns(UserWarning, match="Failed to find C compiler"):
        reason = launch("kernel", CPU, lambda: build.compile_module_from_src("int x;", "x"))
    assert reason.startswith("RuntimeError: Failed to find C compiler")
    monkeypatch.setenv("CC", "/bin/false")  # as where the headers of Python are missing
    with pytest.warns(UserWarning, match="CalledProcessError"):
        launch("other", CPU, lambda: build.compile_module_from_src("int x;", "x"))


def test_without_triton():
    run, calls = failing(ModuleNotFoundError("No module named 'triton'"))
    with pytest.warns(UserWarning, match="No module named 'triton'"):
        assert launch("kernel", CPU, run) == launch("kernel", CPU, run)
    assert len(calls) == 1


def test_on_other_gpus_they_are_not_tried(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    run, calls = failing(AssertionError())
    assert launch("kernel", CPU, run) == "the kernels are for NVIDIA GPUs" and not calls


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), ValueError("ours"), subprocess.SubprocessError()])
def test_other_errors_are_raised(error):
    load("triton_linear")
    run, calls = failing(error)
    for _ in range(2):
        with pytest.raises(type(error)):
            launch("kernel", CPU, run)
    assert len(calls) == 2


def test_gpus_that_cannot_run_the_kernels(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert unsuitable.__wrapped__() == "the kernels are for NVIDIA GPUs"
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5) if index == 1 else (9, 0))
    assert unsuitable.__wrapped__(1) == "the kernels need a GPU of compute capability 8.0 or more"
    assert unsuitable.__wrapped__(0) == unsuitable.__wrapped__() == ""


class OnGPU:
    """A tensor that says it is on a GPU."""

    is_cuda = True

    def __init__(self, tensor):
        self.tensor = tensor

    def __getattr__(self, name):
        return getattr(self.tensor, name)


@pytest.mark.parametrize("scheme", ("int8", "llm.int8", "int4", "nf4"))
def test_products_without_kernels_unpack(scheme, monkeypatch):
    load("triton_linear")
    run, calls = failing(importlib.import_module("triton").OutOfResources(300, 200, "shared memory"))
    monkeypatch.setattr(linear, "linear_triton", lambda *_: run())
    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(n, 128, generator=generator) for n in (96, 3))
    codes, bits = packing.pack(weight, scheme, 64, 32)
    scales = bits.view(torch.float32 if bits.dtype == torch.int32 else torch.bfloat16)
    right = linear.linear(x, codes, scales, scheme, linear.Backend(False, 0))
    with pytest.warns(UserWarning, match="so PyTorch computes instead"):
        ours = linear.linear(OnGPU(x), codes, scales, scheme, linear.Backend(True, 8))
    assert torch.equal(ours, right) and calls
    assert (ours - x @ weight.T).norm() < 0.2 * (x @ weight.T).norm()


@pytest.mark.skipif(not INTERPRETED, reason="tests/kernels does this on a GPU")
@pytest.mark.parametrize("scheme", ("int4", "nf4"))
def test_dense_weights_are_those_of_the_kernel(scheme):
    """Interpreted, and whole blocks more than the weight has rows."""
    load("triton_linear")
    weight = torch.randn(70, 128, generator=torch.Generator().manual_seed(0))
    codes, bits = packing.pack(weight, scheme, 64, 32)
    scales = bits.view(torch.float32 if bits.dtype == torch.int32 else torch.bfloat16)
    with interpreted():
        ours = linear.dense_triton(codes, scales, scheme, 70, torch.float32)
    theirs = packing.unpack_int4(codes, scales, linear.TABLES.get(scheme), 0, len(codes)).transpose(1, 2)
    assert ours.shape == (70, 128)
    assert (ours - theirs.reshape(-1, 128)[:70].float()).abs().max() < 2**-7 * weight.abs().max()
