"""C sources of this package, compiled with the machine's own compiler at first use.

A compiled library is kept in the user's cache directory, named by all that it depends on. It runs on the OpenMP threads
of PyTorch, for it is linked to none of its own.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path

from hf_accel_patch.kernels.folder import cache_folder

FOLDER = Path(__file__).parent
FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-fopenmp")
FEATURES = {64: {"avx512f", "avx512bw", "f16c"}, 32: {"avx2", "fma", "f16c"}}  # by rows per block of int4 codes
SECONDS = 120  # to compile, which takes one


def load(source: Path, block: int, *flags: str) -> tuple[ctypes.CDLL | None, str]:
    """The compiled source, or None and why there is none."""
    if block not in FEATURES:
        return None, "there are none for this processor"
    if missing := FEATURES[block] - features():
        return None, f"the processor has no {', '.join(sorted(missing))}"
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("cc")
    if not compiler:
        return None, "there is no C compiler"
    try:
        return ctypes.CDLL(str(_build(compiler.split(), source, block, flags))), ""
    except (OSError, subprocess.SubprocessError) as error:
        output = getattr(error, "stderr", None) or str(error)
        return None, f"{compiler} failed: {output.strip().splitlines()[-1] if output.strip() else type(error).__name__}"


def sources(files: Iterable[Path]) -> bytes:
    """What these consist of, with the headers that they share."""
    return b"".join(path.read_bytes() for path in sorted([*files, *FOLDER.glob("*.h")]))


def features() -> set[str]:
    """The instruction sets of this processor, as Linux names them; empty where that is not known."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return set()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return next((set(line.partition(":")[2].split()) for line in lines if line.startswith("flags")), set())


def _build(compiler: list[str], source: Path, block: int, flags: tuple[str, ...]) -> Path:
    """The compiled library, from the cache where it is there."""
    flags = (*FLAGS, *flags)
    version = subprocess.run([*compiler, "--version"], capture_output=True, check=True, text=True, timeout=SECONDS)
    made_of = repr((compiler, flags, block, version.stdout, sorted(features()))).encode()
    path = cache_folder() / f"{source.stem}-{hashlib.sha256(sources([source]) + made_of).hexdigest()[:24]}.so"
    if path.exists():
        return path
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:  # renamed when whole: others may be building it too
        run = {"capture_output": True, "check": True, "text": True, "timeout": SECONDS}
        made = [str(Path(folder) / name) for name in ("made.o", "made.so")]
        subprocess.run([*compiler, *flags, f"-DBLOCK={block}", "-c", str(source), "-o", made[0]], **run)  # type: ignore[call-overload]
        subprocess.run([*compiler, "-shared", made[0], "-o", made[1], "-lm"], **run)  # type: ignore[call-overload]
        os.replace(made[1], path)
    return path
