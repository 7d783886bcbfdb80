"""`run` against plain python: the same output, errors and exit codes, and models that are patched."""

import compileall
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import hf_accel_patch
from hf_accel_patch.running import names_program

ROOT = Path(hf_accel_patch.__file__).parent.parent
MODEL = ROOT / "hf_accel_patch" / "models" / "code-llama-8m"
RUN = ("-m", "hf_accel_patch", "run")

PROGRAMS = {
    "names.py": '''
"""What it is about."""
import pickle, sys
import sibling
class Thing: pass
names = {key: str(value).partition(" at ")[0] for key, value in globals().items() if key.startswith("__")}
print(names, sys.argv, sys.path[0], sibling.NAME, sorted({"torch", "transformers"} & set(sys.modules)))
print(type(pickle.loads(pickle.dumps(Thing()))), sys.modules["__main__"].Thing is Thing, input(), input())
print(__import__("inspect").getsource(Thing), end="")
''',
    "sibling.py": "NAME = 'sibling'\ndef fail():\n    raise ValueError('an error of the script')\n",
    "exit_number.py": "import sys; sys.exit(3)",
    "exit_text.py": "import sys; sys.exit('a message')",
    "exit_none.py": "import sys; print('done'); sys.exit()",
    "exit_at_once.py": "import os; os._exit(7)",
    "error.py": "import sibling\nsibling.fail()\n",
    "chained.py": """
import sibling
try:
    try:
        sibling.fail()
    except ValueError as error:
        raise KeyError("second") from error
except KeyError:
    raise RuntimeError("third")
""",
    "syntax.py": "def broken(:\n",
    "encoding.py": b"# coding: latin-1\nprint(ascii('\xe9'))\n",
    "long_chain.py": """
error = None
for _ in range(3000):
    following = ValueError()
    following.__context__, error = error, following
error.__context__.__suppress_context__ = True
raise error
""",
    "interrupt.py": "import os, signal; os.kill(os.getpid(), signal.SIGINT)",
    "terminated.py": "import os, signal; os.kill(os.getpid(), signal.SIGTERM)",
    "own_hook.py": """
import sys, traceback
def hook(kind, error, trace):
    print(kind.__name__, [frame.filename for frame in traceback.extract_tb(trace)], trace is error.__traceback__)
sys.excepthook = hook
raise ValueError
""",
    "at_exit.py": """
import atexit, threading, time
atexit.register(print, "at exit")
def late():
    time.sleep(0.2)
    print("thread", threading.main_thread().is_alive())
threading.Thread(target=late).start()
print("main")
""",
    "thread_error.py": """
import threading
import sibling
thread = threading.Thread(target=sibling.fail)
thread.start(); thread.join()
""",
    "children.py": """
import multiprocessing, os, sys
class Thing:
    def __init__(self, value): self.value = value
def double(thing): return Thing(2 * thing.value)
print("imported as", __name__, flush=True)
if __name__ == "__main__":
    for method in ("fork", "spawn"):
        with multiprocessing.get_context(method).Pool(1) as pool:
            print(method, pool.map(double, [Thing(21)])[0].value, flush=True)
""",
    "folder/__main__.py": """
import sys, beside
print(__name__, __file__, sys.argv, sys.path[0], beside.HERE, __package__)
""",
    "folder/beside.py": "HERE = True\n",
    "empty/nothing.txt": "",
    "package/__init__.py": "",
    "package/__main__.py": "import sys; print(__package__, __spec__.name, sys.argv)\n",
    "package/fails.py": "import sys; print(sys.argv, sys.path[0]); from sibling import fail; fail()\n",
}
if sys.version_info >= (3, 11):
    PROGRAMS["group.py"] = """
import sibling
found = []
for _ in range(2):
    try: sibling.fail()
    except ValueError as error: found.append(error)
raise ExceptionGroup("several", found)
"""

CASES = [[name] for name in PROGRAMS if "/" not in name and name != "sibling.py"] + [
    ["names.py", "--flag", "-h", "--json", "two words", "-m", "--"],
    ["../programs/names.py"],
    ["./names.py"],
    ["link/names.py"],
    ["deep/linked.py"],
    ["compiled.pyc"],
    ["folder", "a"],
    ["packed.zip", "b"],
    ["empty"],
    ["nowhere.py"],
    ["-m", "error"],
    ["-m", "names", "-m", "x"],
    ["-m", "package", "--help"],
    ["-m", "package.fails", "y"],
    ["-m", "nowhere"],
    ["-m", "package.nowhere"],
]


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "programs"
    for name, content in PROGRAMS.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with zipfile.ZipFile(folder / "packed.zip", "w") as packed:
        for name in ("__main__.py", "beside.py"):
            packed.write(folder / "folder" / name, name)
    (folder / "link").symlink_to(folder)
    (folder / "deep").mkdir()
    (folder / "deep" / "linked.py").symlink_to(folder / "names.py")
    compileall.compile_file(folder / "exit_number.py", legacy=True, quiet=1)
    (folder / "exit_number.pyc").rename(folder / "compiled.pyc")
    return folder


def python(*arguments, folder=None, **variables):
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_ACCEL")}
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=folder,
        env=kept | {"PYTHONPATH": str(ROOT)} | variables,
        input="a line\nanother\n",
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize("arguments", CASES, ids=" ".join)
def test_as_with_python(arguments, programs):
    plain, ours = python(*arguments, folder=programs), python(*RUN, *arguments, folder=programs)
    assert (plain.returncode, plain.stdout, plain.stderr) == (ours.returncode, ours.stdout, ours.stderr)
    assert plain.stdout or plain.stderr or plain.returncode


@pytest.mark.parametrize("arguments", [["names.py", "a"], ["error.py"], ["-m", "package.fails"], ["interrupt.py"]])
def test_by_its_installed_name(arguments, programs):
    script = programs.parent / "hf-accel-patch"
    script.write_text("import sys\nfrom hf_accel_patch.cli import main\nsys.exit(main())\n")
    plain, ours = python(*arguments, folder=programs), python(script, "run", *arguments, folder=programs)
    assert (plain.returncode, plain.stdout, plain.stderr) == (ours.returncode, ours.stdout, ours.stderr)


def test_without_the_folder_of_the_script(programs):
    """-P, or PYTHONSAFEPATH: nothing is put before the path."""
    if sys.version_info < (3, 11):
        pytest.skip("python has it from 3.11 on")
    safe = {"PYTHONSAFEPATH": "1"}
    plain, ours = python("error.py", folder=programs, **safe), python(*RUN, "error.py", folder=programs, **safe)
    assert (plain.returncode, plain.stderr) == (ours.returncode, ours.stderr) and "sibling" in plain.stderr


def test_what_is_a_program():
    assert names_program(["run", "x.py"]) and names_program(["run", "x.py", "-h"]) and names_program(["run", "-m", "x"])
    for others in ([], ["run"], ["run", "-m"], ["run", "-h"], ["run", "--json", "x.py"], ["plan", "run"]):
        assert not names_program(others)


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"HF_ACCEL_QUANTIZE": "int5"}, "HF_ACCEL_QUANTIZE='int5'; allowed: int8, int4, nf4"),
        ({"HF_ACCEL_PATCH": "maybe"}, "HF_ACCEL_PATCH='maybe'; allowed: 1, ON, YES, TRUE"),
        ({"HF_ACCEL_QUANTISE": "int4"}, "did you mean HF_ACCEL_QUANTIZE?"),
    ],
)
def test_a_bad_variable_stops_before_the_program(variables, said, programs):
    done = python(*RUN, "exit_number.py", folder=programs, **variables)
    assert done.returncode == 2 and not done.stdout
    assert said in done.stderr and done.stderr.count("\n") == 1


def test_switched_off_it_is_plain_python(programs):
    off = {"HF_ACCEL_PATCH": "0", "HF_ACCEL_QUANTIZE": "int5"}
    assert python(*RUN, "exit_number.py", folder=programs, **off).returncode == 3


MODELS = """
import json, os, sys
os.environ["HF_HUB_OFFLINE"] = "1"
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
import hf_accel_patch
rows = hf_accel_patch.report(model).to_dict()["passes"]
sys.stdout.write(json.dumps([row["pass"] for row in rows if "reason" not in row]) + "\\n")  # one write per process
if "fail" in sys.argv:
    AutoModelForCausalLM.from_pretrained("./nowhere")
"""


def test_models_are_patched_and_errors_of_theirs_are_their_own(programs):
    (programs / "models.py").write_text(MODELS)
    done = python(*RUN, "models.py", MODEL, "fail", folder=programs, HF_ACCEL_QUANTIZE="int8")
    assert {"quantize", "attention", "cache"} <= set(json.loads(done.stdout)), done.stderr
    trace = done.stderr[done.stderr.index("Traceback") :]
    assert done.returncode == 1 and "models.py" in trace and "from_pretrained" in trace and "OSError" in trace
    assert "hf_accel_patch" not in trace.replace(str(programs), "") and "runpy" not in trace


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "launcher"),
    [
        (1, "accelerate.commands.launch --cpu --num_processes=1 --num_machines=1 --mixed_precision=no"),
        (2, "accelerate.commands.launch --multi_gpu --num_processes=2 --num_machines=1 --mixed_precision=no"),
        (1, "torch.distributed.run --standalone --nproc_per_node=1"),
        (2, "torch.distributed.run --standalone --nproc_per_node=2"),
    ],
)
def test_launchers(count, launcher, programs):
    """accelerate starts several processes for GPUs only; these do not need one."""
    (programs / "models.py").write_text(MODELS)
    start = launcher.split()
    done = python(
        "-m", *start, *RUN, "models.py", MODEL, folder=programs, HF_ACCEL_QUANTIZE="int8", OMP_NUM_THREADS="1"
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("[")]
    assert len(lines) == count and all("quantize" in line for line in lines)
