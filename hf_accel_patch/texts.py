"""Real text that every Python brings along: the source of packages of its standard library.

The bundled model was trained on most of the standard library, but never saw the packages in HELD_OUT, so its perplexity
there is a measure of quality. Those in CALIBRATION it did see: a pass may look at them to choose its scales.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

from hf_accel_patch.errors import HfAccelError

HELD_OUT = ("json", "asyncio")
CALIBRATION = ("email", "http", "unittest")


def held_out_text() -> str:
    """The source of `json` and `asyncio` of the running interpreter, for measuring."""
    return "\n".join(_read(source_files(HELD_OUT)))


def calibration_texts() -> list[str]:
    """The source of `email`, `http` and `unittest` of the running interpreter, one text per file."""
    return _read(source_files(CALIBRATION))


def source_files(packages: Iterable[str]) -> tuple[Path, ...]:
    """The Python files of these packages, by name, without importing them.

    Raises HfAccelError where the interpreter brings no source, only bytecode or an archive.
    """
    files: list[Path] = []
    for package in packages:
        spec = find_spec(package)
        folders = spec.submodule_search_locations if spec else None
        found = sorted(path for folder in folders or () for path in Path(folder).rglob("*.py"))
        if not found:
            raise HfAccelError(f"this Python has no source files of {package!r}", "use one with its standard library")
        files += found
    return tuple(files)


def _read(files: Iterable[Path]) -> list[str]:
    texts = (path.read_text(encoding="utf-8", errors="replace") for path in files)
    return [text for text in texts if text.strip()]
