"""`run`: a script or a module in this process, as plain python runs it, with HF_ACCEL_PATCH in force.

Neither torch nor transformers is loaded before the program, so what it sets for them still takes effect.
"""

from __future__ import annotations

import builtins
import importlib.machinery
import io
import os
import pkgutil
import runpy
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import CodeType, ModuleType, TracebackType

from hf_accel_patch import environment, starting

BAD_INPUT = 2  # the exit code, of python's own for a script that is not there too
HERE = Path(__file__).parent
BELOW = {
    str(HERE / name) for name in ("automatic.py", "starting.py", "checkpoints.py")
}  # stand between program and model


def names_program(arguments: Sequence[str]) -> bool:
    """Whether these are `run` with a script or a module; what follows is the program's own."""
    if arguments[:1] != ["run"]:
        return False
    module = arguments[1:2] == ["-m"]
    return len(arguments) > 2 if module else len(arguments) > 1 and not arguments[1].startswith("-")


def run(arguments: Sequence[str]) -> int:
    """Run `SCRIPT ARGUMENTS` or `-m MODULE ARGUMENTS`. Returns the exit code, where the program lets it come to that;
    its exceptions, SystemExit among them, go through to the interpreter, which prints them without our frames."""
    os.environ.setdefault(environment.PATCH, "1")
    try:
        starting.start()
    except ValueError as error:
        sys.stderr.write(f"{starting.COMMAND}: {' '.join(str(error).split())}\n")
        return BAD_INPUT
    try:
        if arguments[0] == "-m":
            _run_module(arguments[1], list(arguments[2:]))
        else:
            return _run_script(arguments[0], list(arguments[1:]))
    except SystemExit:
        raise
    except BaseException:
        _hide_frames()
        raise
    return 0


def _run_module(name: str, arguments: list[str]) -> None:
    _take_over(os.getcwd(), ["-m", *arguments])
    runpy._run_module_as_main(name)  # type: ignore[attr-defined]  # what the interpreter itself calls for -m


def _run_script(given: str, arguments: list[str]) -> int:
    path = os.path.join(os.getcwd(), given)  # not made shorter: python does not do that either
    if pkgutil.get_importer(path) is not None:  # a folder or a zip file with a __main__.py
        _take_over(path, [given, *arguments])
        runpy._run_module_as_main("__main__", alter_argv=False)  # type: ignore[attr-defined]
        return 0
    try:
        with io.open_code(path) as file:
            content = file.read()
    except OSError as error:
        sys.stderr.write(f"{sys.executable}: can't open file {path!r}: [Errno {error.errno}] {error.strerror}\n")
        return BAD_INPUT
    main = _take_over(os.path.dirname(os.path.realpath(path)), [given, *arguments])
    code = pkgutil.read_code(io.BytesIO(content))  # None, if it is not compiled already
    loader = importlib.machinery.SourceFileLoader if code is None else importlib.machinery.SourcelessFileLoader
    names = vars(main)
    names |= {"__loader__": loader("__main__", path), "__file__": path}
    if sys.version_info < (3, 15):
        names["__cached__"] = None
    program: CodeType = code or compile(content, path, "exec", dont_inherit=True)
    exec(program, names)
    return 0


def _take_over(folder: str, arguments: list[str]) -> ModuleType:
    """Let this process look as if it had been started with these arguments: `folder` is where it imports from. Returns
    a `__main__` as fresh as the interpreter's."""
    main = ModuleType("__main__")
    if sys.version_info < (3, 14):
        main.__annotations__ = {}
    vars(main)["__builtins__"] = builtins
    sys.modules["__main__"] = main
    sys.argv = arguments
    if not getattr(sys.flags, "safe_path", sys.flags.isolated):
        sys.path[0] = folder
    return main


def _hide_frames() -> None:
    """Have the exception that is on its way printed as if the program had been started by python."""
    shown = sys.excepthook

    def show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        for each in _chain(error):
            each.__traceback__ = _without_ours(each.__traceback__)
        shown(kind, error, error.__traceback__)

    sys.excepthook = show


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The exception, what it came from, and the parts of a group."""
    left: list[BaseException | None] = [error]
    seen: set[int] = set()
    while left:
        each = left.pop()
        if each is not None and id(each) not in seen:
            seen.add(id(each))
            yield each
            left += [each.__cause__, each.__context__, *getattr(each, "exceptions", ())]


def _without_ours(trace: TracebackType | None) -> TracebackType | None:
    """Without the frames above the program, and without those that hand a model's making on, unless it was there that
    it went wrong."""
    frames = []
    while trace is not None:
        frames.append(trace)
        trace = trace.tb_next
    files = [each.tb_frame.f_code.co_filename for each in frames]
    if __file__ in files:
        frames = frames[len(files) - files[::-1].index(__file__) :]
    if frames and not frames[-1].tb_frame.f_code.co_filename.startswith(str(HERE)):
        frames = [each for each in frames if each.tb_frame.f_code.co_filename not in BELOW]
    if not frames:
        return None
    for each, following in zip(frames, [*frames[1:], None], strict=True):
        each.tb_next = following
    return frames[0]
