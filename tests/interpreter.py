"""Triton kernels on the CPU, interpreted, where there is no GPU."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import pytest
import torch

INTERPRETED = not torch.cuda.is_available()
DEVICE = "cpu" if INTERPRETED else "cuda"


def load(name: str) -> ModuleType:
    """A module of kernels, which reads where it decorates whether they will be interpreted."""
    pytest.importorskip("triton")
    with pytest.MonkeyPatch.context() as patch:
        if INTERPRETED:
            patch.setenv("TRITON_INTERPRET", "1")
        return importlib.import_module(f"hf_accel_patch.kernels.{name}")


@contextmanager
def interpreted() -> Iterator[None]:
    """Without a GPU: transformers has imported triton already, so Triton's own functions are there to be compiled; and
    the interpreter multiplies matrices of bfloat16 as if their bits were integers, and cuts off what it should round to
    it."""
    triton, tl = importlib.import_module("triton"), importlib.import_module("triton.language")
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

            inner = interpreter.InterpreterBuilder.cast_impl

            def cast(self, source, dtype):
                if source.dtype.scalar != tl.float32 or dtype.scalar != tl.bfloat16:
                    return inner(self, source, dtype)
                values = torch.from_numpy(source.data.copy()).bfloat16()  # copied: what is broadcast may not be written
                return interpreter.TensorHandle(values.view(torch.int16).numpy().view("uint16"), dtype.scalar)

            patch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)
            patch.setattr(interpreter.InterpreterBuilder, "cast_impl", cast)
        yield
