"""What an import does when HF_ACCEL_PATCH is true: from then on, models are patched as they are made.

Imports neither torch nor transformers. The methods that make models are wrapped when transformers has them; what the
wrapper does is in automatic.py, which is loaded with the first model.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from hf_accel_patch import environment
from hf_accel_patch.registering import when_executed

MODELS = "transformers.modeling_utils"
METHODS = ("from_pretrained", "_from_config")  # of PreTrainedModel
WRAPPED = "_hf_accel_patch_wraps"  # on a wrapper: the method that it wraps
COMMAND = "hf-accel-patch"
HOOK = "HfAccelPatchHook"  # the class that a .pth file puts on sys.meta_path; see hook.py


def start_at_import() -> None:
    """Unless one of the package's own commands is being started: those take options of their own, and `run` starts it
    itself. Raises ValueError for a bad variable."""
    if not _is_command():
        start(thorough=not any(type(finder).__name__ == HOOK for finder in sys.meta_path))


def start(*, thorough: bool = True) -> None:
    """Patch every causal LM that is made from now on, if HF_ACCEL_PATCH is true. A second call does nothing more.

    Raises ValueError for a bad variable. `thorough`: also for values that exclude each other, which takes importing
    torch and transformers where there are any; without it, the first model does.
    """
    if not environment.is_on():
        return
    if environment.may_conflict(environment.given()) and thorough:
        from hf_accel_patch.automatic import passes

        passes()
    if MODELS in sys.modules:
        _wrap(sys.modules[MODELS])
    else:
        when_executed(MODELS, _wrap)


def _wrap(module: ModuleType) -> None:
    kind = module.PreTrainedModel
    for name in METHODS:
        method = vars(kind)[name].__func__
        if not hasattr(method, WRAPPED):
            setattr(kind, name, classmethod(_patching(method)))


def _patching(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def make(cls: type, *args: Any, **kwargs: Any) -> Any:
        from hf_accel_patch import automatic

        return automatic.make(cls, functools.partial(method, cls), *args, **kwargs)

    setattr(make, WRAPPED, method)
    return make


def _is_command() -> bool:
    """Whether this process was started as `python -m hf_accel_patch` or by its installed name."""
    given = sys.orig_argv
    package = __name__.partition(".")[0]
    by_module = package in given and given[given.index(package) - 1] == "-m"
    started = os.path.basename(getattr(sys, "argv", [""])[0])
    return (by_module and started in ("-m", "__main__.py")) or started in (COMMAND, f"{COMMAND}.exe")
