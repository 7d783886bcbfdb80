"""The hook: a .pth file in site-packages, with which every program of an environment finds HF_ACCEL_PATCH.

The interpreter executes its one line at every start. Unless the variable is set, that line looks for it and does
nothing else. If it is, an object waits for transformers to be imported, and imports this package first.
"""

from __future__ import annotations

import os
import site
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from hf_accel_patch.environment import PATCH
from hf_accel_patch.errors import HfAccelError
from hf_accel_patch.starting import HOOK

NAME = "hf_accel_patch_hook.pth"
PACKAGE = __name__.partition(".")[0]
CODE = f"""import sys
class {HOOK}:
    def find_spec(self, name, path=None, target=None):
        if name == 'transformers' and self in sys.meta_path:
            try:
                import {PACKAGE}
            except ImportError as error:
                sys.stderr.write('{PACKAGE}: {PATCH} is set and has no effect: %s\\n' % error)
            finally:
                sys.meta_path = [each for each in sys.meta_path if each is not self]
sys.meta_path.insert(0, {HOOK}())
"""
LINE = f"import os; os.environ.get({PATCH!r}) and exec({CODE!r})\n"


@dataclass(frozen=True)
class Hook:
    """Where it is, or would be. `installed`: "yes", "no", or "other", by another version of the package."""

    path: Path
    installed: str

    def to_dict(self) -> dict[str, str]:
        return {"path": str(self.path), "installed": self.installed}


def status(folder: Path | None = None) -> Hook:
    """Of this environment. `folder`: of the site-packages there, instead of where this python looks."""
    path = (folder or Path(sysconfig.get_path("purelib"))) / NAME
    if not path.exists():
        return Hook(path, "no")
    return Hook(path, "yes" if path.read_text() == LINE else "other")


def install(folder: Path | None = None) -> Hook:
    """Write it. Raises HfAccelError where that cannot be done, or would have no effect."""
    found = status(folder)
    home = found.path.parent
    if not home.is_dir():
        raise HfAccelError(f"{home} is no folder, so there is no place for the hook")
    if folder is None and not any(_same(home, each) for each in _processed()):
        raise HfAccelError(
            f"python does not read .pth files in {home}", "use a virtual environment, and python without -S and -I"
        )
    part = found.path.with_suffix(f".{os.getpid()}")
    try:
        part.write_text(LINE)
        part.replace(found.path)
    except OSError as error:
        raise HfAccelError(
            f"{home} cannot be written: {error.strerror}", "use a virtual environment of your own"
        ) from error
    return status(folder)


def remove(folder: Path | None = None) -> Hook:
    """Take it away; where there is none, nothing is done. Returns what was there."""
    found = status(folder)
    try:
        found.path.unlink(missing_ok=True)
    except OSError as error:
        raise HfAccelError(f"{found.path} cannot be removed: {error.strerror}") from error
    return found


def _processed() -> list[str]:
    """The folders whose .pth files are read at the start."""
    return [*site.getsitepackages(), *([site.getusersitepackages()] if site.ENABLE_USER_SITE else [])]


def _same(one: Path, other: str) -> bool:
    return os.path.realpath(one) == os.path.realpath(other)
