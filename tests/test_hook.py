"""The .pth hook: in force in programs that never import the package, and inert without the variable."""

import json
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

import hf_accel_patch
from benchmarks import startup
from hf_accel_patch import HfAccelError, cli, hook
from hf_accel_patch.starting import HOOK

ROOT = Path(hf_accel_patch.__file__).parent.parent
MODEL = ROOT / "hf_accel_patch" / "models" / "code-llama-8m"
SITE = "import site, sys; site.addsitedir(sys.argv.pop(1))\n"  # reads the .pth files of a folder, as the start does
PROGRAM = """
import json, sys
waiting = [type(each).__name__ for each in sys.meta_path].count("HfAccelPatchHook")
early = sorted(name for name in ("torch", "transformers", "hf_accel_patch") if name in sys.modules)
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
ours = "hf_accel_patch.api" in sys.modules and sys.modules["hf_accel_patch.api"].report(model).to_dict()["patched"]
print(json.dumps([waiting, early, ours]))
"""


@pytest.fixture
def folder(tmp_path):
    """A folder of .pth files with the hook in it."""
    assert hook.install(tmp_path).installed == "yes"
    return tmp_path


def python(code, *arguments, package=ROOT, **variables):
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_ACCEL")}
    command = [sys.executable, "-c", SITE + code, *map(str, arguments)]
    environment = kept | {"PYTHONPATH": str(package)} | variables
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def test_installed_and_removed(tmp_path):
    assert hook.status(tmp_path).installed == "no"
    assert hook.remove(tmp_path).installed == "no"
    done = hook.install(tmp_path)
    assert done == hook.install(tmp_path) == hook.status(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [hook.NAME] and hook.LINE.count("\n") == 1
    done.path.write_text("import os\n")
    assert hook.status(tmp_path).installed == "other" and hook.install(tmp_path).installed == "yes"
    assert hook.remove(tmp_path).installed == "yes" and not list(tmp_path.iterdir())


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path))
    monkeypatch.setattr(hook, "_processed", lambda: [str(tmp_path)])
    said = {}
    for action in ("install", "status", "remove", "remove"):
        assert cli.main(["hook", action]) == 0
        said[action] = capsys.readouterr().out
    assert str(tmp_path) in said["install"] and said["install"] == said["status"] and "no hook" in said["remove"]
    assert cli.main(["hook", "status", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"path": str(tmp_path / hook.NAME), "installed": "no"}


def test_where_it_cannot_be_installed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path))
    assert cli.main(["hook", "install"]) == 2
    assert f"python does not read .pth files in {tmp_path}" in capsys.readouterr().err and not list(tmp_path.iterdir())
    with pytest.raises(HfAccelError, match="is no folder"):
        hook.install(tmp_path / "nowhere")
    monkeypatch.setattr(Path, "write_text", lambda *_: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    with pytest.raises(HfAccelError, match="cannot be written: Permission denied"):
        hook.install(tmp_path)


def test_without_the_variable_nothing_is_there(folder):
    code = f"print([type(each).__name__ for each in sys.meta_path].count({HOOK!r}), 'hf_accel_patch' in sys.modules)"
    for off in ({}, {"HF_ACCEL_PATCH": ""}, {"HF_ACCEL_QUANTIZE": "nonsense"}):
        done = python(code, folder, **off)
        assert (done.stdout, done.stderr) == ("0 False\n", "")


def test_when_python_starts(tmp_path):
    """Of an environment of its own, which reads the file by itself."""
    venv.create(tmp_path, with_pip=False)
    python = next(tmp_path.glob("*/python"))
    hook.install(next(tmp_path.glob("lib/python*/site-packages")))
    code = f"import sys; print(*[type(each).__name__ == {HOOK!r} for each in sys.meta_path][:1], len(sys.modules))"
    done = {
        text: subprocess.run(
            [python, "-c", code], env=os.environ | {"HF_ACCEL_PATCH": text}, capture_output=True, text=True, check=True
        ).stdout.split()
        for text in ("", "1")
    }
    assert [found for found, _ in done.values()] == ["False", "True"]
    assert done[""][1] == done["1"][1]  # nothing is imported at the start, either way


def test_a_program_that_knows_nothing_of_it(folder):
    done = python(PROGRAM, folder, MODEL, HF_ACCEL_PATCH="1", HF_ACCEL_QUANTIZE="int8")
    assert json.loads(done.stdout) == [1, [], True], done.stderr


def test_a_bad_variable_stops_when_transformers_is_imported(folder):
    done = python("print('started'); import transformers; print('on')", folder, HF_ACCEL_PATCH="maybe")
    assert done.returncode == 1 and done.stdout == "started\n" and "HF_ACCEL_PATCH='maybe'; allowed" in done.stderr


def test_what_the_benchmark_of_it_says():
    without, with_hook = startup.starts(1)
    assert (without["hook"], with_hook["hook"]) == (False, True) and with_hook["line_ms"] > 0
    assert len(without["start_ms"]) == len(with_hook["start_cpu_ms"]) == startup.STARTS


def test_the_package_is_gone(folder, tmp_path):
    """A stand-in for transformers, and no package."""
    (tmp_path / "transformers.py").write_text("print('imported')")
    code = "sys.modules['hf_accel_patch'] = None\nimport transformers"
    done = python(code, folder, package=tmp_path, HF_ACCEL_PATCH="1")
    assert done.returncode == 0 and done.stdout == "imported\n"
    assert done.stderr.count("\n") == 1 and "HF_ACCEL_PATCH is set and has no effect" in done.stderr
