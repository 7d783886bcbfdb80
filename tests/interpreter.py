"""Triton kernels on the CPU, interpreted, where there is no GPU."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import pytest
import torch

INTERPRETED = not torch.cuda.is_available()
DEVICE = "cpu" if INTERPRETED else "cuda:0"  # as tensors that are there say


def load(name: str) -> ModuleType:
    """A module of kernels, which reads where it decorates whether they will be interpreted."""
    pytest.importorskip("triton")
    with pytest.MonkeyPatch.context() as patch:
        if INTERPRETED:
            patch.setenv("TRITON_INTERPRET", "1")
        return importlib.import_module(f"hf_accel_patch.kernels.{name}")


@contextmanager
def memory_watched() -> Iterator[None]:
    """Inside, no fused kernel reads or writes anything but what it is given: on a GPU it would go unseen."""
    fused = load("triton_fused")
    if not INTERPRETED:
        yield
        return
    builder = importlib.import_module("triton.runtime.interpreter").InterpreterBuilder
    inside: list[tuple[int, int]] = []
    launch = fused.launch

    def launched(source, tensors, *rest):
        storages = [each.untyped_storage() for each in tensors]
        inside[:] = [(each.data_ptr(), each.data_ptr() + each.nbytes()) for each in storages]
        try:
            launch(source, tensors, *rest)
        finally:
            inside.clear()

    def checked(inner, place):
        def call(self, pointers, *args):
            at = pointers.data.astype("int64")
            if place is not None:
                at = at[args[place].data.astype(bool)]
            size = max(1, pointers.dtype.scalar.element_ty.primitive_bitwidth // 8)
            if inside:
                known = [(start <= at) & (at + size <= stop) for start, stop in inside]
                assert sum(known, known[0] * 0).all(), "a kernel goes beyond the tensors that it is given"
            return inner(self, pointers, *args)

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "launch", launched)
        # of what these are given after the pointers, the mask comes first, or second after what is written
        for name, place in {"load": None, "masked_load": 0, "store": None, "masked_store": 1}.items():
            patch.setattr(builder, f"create_{name}", checked(getattr(builder, f"create_{name}"), place))
        yield


@contextmanager
def interpreted() -> Iterator[None]:
    """Without a GPU: transformers has imported triton already, so Triton's own functions are there to be compiled; and
    the interpreter multiplies matrices of bfloat16 as if their bits were integers, cuts off what it should round to it,
    and does not take its own comparisons of numbers as masks."""
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

            def masked(inner, place):
                def call(self, *args):
                    mask = args[place]
                    mask = interpreter.TensorHandle(mask.data.astype(bool), mask.dtype)
                    return inner(self, *args[:place], mask, *args[place + 1 :])

                return call

            for name, place in {"create_masked_load": 1, "create_masked_store": 2}.items():
                patch.setattr(
                    interpreter.InterpreterBuilder, name, masked(getattr(interpreter.InterpreterBuilder, name), place)
                )
            patch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)
            patch.setattr(interpreter.InterpreterBuilder, "cast_impl", cast)
        yield
