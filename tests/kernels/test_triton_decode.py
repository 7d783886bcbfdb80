"""Attention over caches in Triton against float64: on the GPU, or interpreted where there is none."""

import importlib

import pytest
import torch

from hf_accel_patch.ops import kv

INTERPRETED = not torch.cuda.is_available()
DEVICE = "cpu" if INTERPRETED else "cuda"

triton = pytest.importorskip("triton")
tl = importlib.import_module("triton.language")
with pytest.MonkeyPatch.context() as patch:
    if INTERPRETED:
        patch.setenv("TRITON_INTERPRET", "1")  # is read where a function is decorated
    kernels = importlib.import_module("hf_accel_patch.kernels.triton_decode")


@pytest.fixture(autouse=True, scope="module")
def interpreter():
    """Without a GPU: transformers has imported triton already, so Triton's own functions are there to be compiled; and
    the interpreter multiplies matrices of bfloat16 as if their bits were integers."""
    with pytest.MonkeyPatch.context() as patch:
        if INTERPRETED:
            patch.setenv("TRITON_INTERPRET", "1")
            interpreter = importlib.import_module("triton.runtime.interpreter")
            for module in (tl, tl.standard):
                for name, value in list(vars(module).items()):
                    if isinstance(value, triton.JITFunction):
                        patch.setattr(module, name, interpreter.InterpretedFunction(value.fn))

            def numbers(operand):
                if operand.dtype.scalar == tl.bfloat16:
                    return (operand.data.astype("uint32") << 16).view("float32")
                return operand.data.astype("int32" if operand.dtype.scalar == tl.int8 else "float32")

            def dot(self, a, b, d, *_):
                return interpreter.TensorHandle(numbers(a) @ numbers(b) + d.data, d.dtype.scalar)

            patch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)
        yield
