"""The package at other versions than those of constraints.txt, each in an environment of its own.

    pipx run nox                                          # the contract over the supported versions, lint, docs
    pipx run nox -s "contract(transformers='5.17.0', torch='2.13.0')"
    pipx run nox -s contract -- tests/passes/test_cache.py

Each run of `contract` over the whole suite adds a row to benchmarks/results/compatibility.jsonl, and
`python -m benchmarks.table --write docs/compatibility.md` makes the page's table from them. Arguments of `pip`
for another index, as for PyTorch's builds for the CPU, are read from the environment (PIP_EXTRA_INDEX_URL).
"""

from __future__ import annotations

from pathlib import Path

import nox

ROOT = Path(__file__).parent
SUITE = (
    "tests/test_contract.py",
    "tests/test_api.py",
    "tests/test_imports.py",
    "tests/test_journal.py",
    "tests/test_loading.py",
    "tests/test_checkpoints.py",
    "tests/passes",
)
VERSIONS = (  # transformers, torch
    ("5.17.0", "2.13.0"),
    ("5.23.0", "2.13.0"),
)
FREE = ("transformers", "torch", "huggingface_hub", "tokenizers", "triton")  # which go by those two

nox.options.sessions = ["contract", "lint", "docs"]
nox.options.reuse_existing_virtualenvs = True


def constraints(session: nox.Session, free: tuple[str, ...] = ()) -> Path:
    """constraints.txt without the packages that are to be of another version."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    path = Path(session.create_tmp()).resolve() / "constraints.txt"
    path.write_text("".join(f"{line}\n" for line in lines if line.partition("==")[0] not in free))
    return path


@nox.session
@nox.parametrize(("transformers", "torch"), VERSIONS)
def contract(session: nox.Session, transformers: str, torch: str) -> None:
    """Every pass x every family, and the passes' own tests; `-- ARGUMENTS` are pytest's, in place of the suite."""
    wanted = (f"transformers=={transformers}", f"torch=={torch}", "-e", ".[test]")
    session.install("-c", str(constraints(session, FREE)), *wanted)
    environment = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": str(ROOT)}
    if session.posargs:
        session.run("python", "-m", "pytest", *session.posargs, env=environment)
        return
    found = Path(session.create_tmp()).resolve() / "results.xml"
    options = ("-q", "-n", "auto", "-m", "not slow", "-p", "no:cacheprovider", f"--junit-xml={found}")
    session.run("python", "-m", "pytest", *options, *SUITE, env=environment, success_codes=[0, 1])
    session.run("python", "-m", "benchmarks.compatibility", str(found), env=environment)


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
    session.run("mkdocs", "build", "--strict", "--site-dir", str(Path(session.create_tmp()) / "site"))
