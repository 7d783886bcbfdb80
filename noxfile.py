"""The package at other versions than those of constraints.txt, each in an environment of its own.

    pipx run nox                       # the contract at every version below, lint, docs
    pipx run nox -s passes             # and the passes' own tests at each of them, which take longer
    pipx run nox -s "contract(transformers='5.17.0', torch='2.13.0')"
    pipx run nox -s contract -- tests/test_api.py -k plan      # pytest's arguments in place of the suite; adds no row

A run of a suite adds a row to benchmarks/results/compatibility.jsonl, also where tests fail, and
`python -m benchmarks.table --write docs/compatibility.md` makes the page's table from them. pip reads from its own
environment where PyTorch's builds for the CPU are (PIP_EXTRA_INDEX_URL).
"""

from __future__ import annotations

from pathlib import Path

import nox

ROOT = Path(__file__).parent
CONTRACT = ("contract", "api", "imports", "journal", "loading", "checkpoints")  # files of tests/
CONTRACT += ("verify", "budget", "bench_command")  # not planner: older BLOOMs look at values that a plan has not
VERSIONS = (  # transformers, torch; the first and the last are the bounds in pyproject.toml
    ("5.5.4", "2.13.0"),
    ("5.17.0", "2.13.0"),
    ("5.23.0", "2.13.0"),
    ("5.24.0", "2.13.0"),
)
FREE = ("transformers", "torch", "huggingface_hub", "tokenizers", "triton", "numpy")  # which go by those, and Python

nox.options.sessions = ["contract", "lint", "docs"]
nox.options.reuse_existing_virtualenvs = True
every_version = nox.parametrize(("transformers", "torch"), VERSIONS)


@nox.session
@every_version
def contract(session: nox.Session, transformers: str, torch: str) -> None:
    """Every pass x every family, what the functions promise, checkpoints, verification and budgets."""
    run(session, transformers, torch, "contract", [f"tests/test_{name}.py" for name in CONTRACT])


@nox.session
@every_version
def passes(session: nox.Session, transformers: str, torch: str) -> None:
    """The tests of each pass."""
    run(session, transformers, torch, "passes", ["tests/passes"])


@nox.session
def lint(session: nox.Session) -> None:
    """Style, types."""
    session.install("-c", str(constraints(session)), "-e", ".[test]")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("mypy")


@nox.session
def docs(session: nox.Session) -> None:
    """The pages, with links that lead somewhere."""
    session.install("mkdocs>=1.6")
    session.run("mkdocs", "build", "--strict", "--site-dir", str(folder(session) / "site"))


def run(session: nox.Session, transformers: str, torch: str, suite: str, files: list[str]) -> None:
    wanted = (f"transformers=={transformers}", f"torch=={torch}", "-e", ".[test]")
    session.install("-c", str(constraints(session, FREE)), *wanted)
    environment = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    options = ("-q", "-n", "auto", "-p", "no:cacheprovider")
    if session.posargs:
        session.run("python", "-m", "pytest", *options, *session.posargs, env=environment)
        return
    results = folder(session) / "results.xml"
    options += ("-m", "not slow", f"--junit-xml={results}")
    session.run("python", "-m", "pytest", *options, *files, env=environment, success_codes=[0, 1])
    session.run("python", "-m", "benchmarks.compatibility", suite, str(results))


def constraints(session: nox.Session, free: tuple[str, ...] = ()) -> Path:
    """constraints.txt without the packages that are to be of another version."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    path = folder(session) / "constraints.txt"
    path.write_text("".join(f"{line}\n" for line in lines if line.partition("==")[0] not in free))
    return path


def folder(session: nox.Session) -> Path:
    return Path(session.create_tmp()).resolve()
