"""Entries in transformers' table of quantization methods, made before transformers has loaded its models.

Loading those takes a second, which an import of this package should not cost. So what stands in the table is light, and
loads the rest when a quantized checkpoint is read; where the table itself is not there yet, it is entered when it is.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

METHOD = __name__.partition(".")[0]  # the value of `quant_method`
TABLE = "transformers.quantizers.auto"


class _Config:
    """Stands for HfAccelConfig in the table."""

    @staticmethod
    def from_dict(described: dict[str, Any], **kwargs: Any) -> Any:
        from hf_accel_patch.loading import HfAccelConfig

        return HfAccelConfig.from_dict(described, **kwargs)


def _quantizer(config: Any, **kwargs: Any) -> Any:
    """Stands for HfAccelQuantizer in the table."""
    from hf_accel_patch.loading import HfAccelQuantizer

    return HfAccelQuantizer(config, **kwargs)


def register() -> None:
    """Now, or as soon as the table is there."""
    if TABLE in sys.modules:
        _enter(sys.modules[TABLE])
    else:
        when_executed(TABLE, _enter)


def _enter(table: ModuleType) -> None:
    table.AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(METHOD, _Config)
    table.AUTO_QUANTIZER_MAPPING.setdefault(METHOD, _quantizer)


def when_executed(name: str, then: Callable[[ModuleType], None]) -> None:
    """Call `then` with the module of this name as soon as it has been imported."""
    if not any(isinstance(each, _Waiting) and (each.name, each.then) == (name, then) for each in sys.meta_path):
        sys.meta_path.insert(0, _Waiting(name, then))


class _Waiting(importlib.abc.MetaPathFinder):
    """Finds nothing itself: lets the others find a module, and acts when it has been executed."""

    def __init__(self, name: str, then: Callable[[ModuleType], None]) -> None:
        self.name, self.then = name, then

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if name != self.name:
            return None
        sys.meta_path = [
            each for each in sys.meta_path if each is not self
        ]  # another thread may go through the old one
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_act(module: ModuleType) -> None:
                execute(module)
                self.then(module)

            spec.loader.exec_module = execute_and_act  # type: ignore[method-assign]
        return spec
