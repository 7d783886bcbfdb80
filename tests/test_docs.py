"""The pages: their blocks run, their links lead somewhere, their tables are those of the rows, and what they quote is
in the source."""

import ast
import dataclasses
import doctest
import inspect
import itertools
import json
import re
import shutil
import subprocess
import sys

import api_page
import pytest
import torch
import yaml
from pages import PAGES, ROOT, anchors, blocks, execute, links
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_accel_patch
from benchmarks import table
from hf_accel_patch import GQA, Attention, KVCache, Quantize, RopeScaling, Speculative, environment, uptrain
from hf_accel_patch.texts import held_out_text

DOCS = ROOT / "docs"
DOCUMENTED = {  # page: whose options it lists
    "attention.md": (Attention,),
    "quantize.md": (Quantize,),
    "positions.md": (RopeScaling,),
    "cache.md": (KVCache,),
    "speculative.md": (Speculative,),
    "gqa.md": (GQA, uptrain),
}
RUN = [page for page in PAGES if page.parent == DOCS and blocks(page)]
by_name = {"argvalues": PAGES, "ids": lambda page: page.name}


@pytest.mark.parametrize("page", RUN, ids=lambda page: page.name)
def test_blocks_run(page, monkeypatch, tmp_path):
    (tmp_path / "hf_accel_patch").symlink_to(ROOT / "hf_accel_patch")
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__main__"}
    for code in blocks(page):
        execute(code, names, page)


@pytest.mark.parametrize("page", **by_name)
def test_links_lead_somewhere(page):
    for link in links(page):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {link}"
        assert target.is_relative_to(ROOT), f"{page.name}: {link} is outside of the repository"
        for renderer in ("github", "mkdocs") if anchor else ():
            assert anchor in anchors(target, renderer), f"{page.name}: {link} on {renderer}"


def test_pages_of_docs_refer_to_figures_and_one_another_only():
    """Anything else is not on the site."""
    for page in DOCS.glob("*.md"):
        for link in (each for each in links(page) if not re.match(r"[a-z]+:|#", each)):
            assert re.fullmatch(r"[a-z_]+\.md(#.*)?|\.\./benchmarks/results/\w+\.png", link), f"{page.name}: {link}"


def test_every_page_is_in_the_navigation():
    def files(entries):
        for entry in entries:
            for value in entry.values():
                yield from files(value) if isinstance(value, list) else [value]

    found = list(files(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
    assert sorted(found) == sorted(page.name for page in DOCS.glob("*.md"))


def test_the_site_is_built(tmp_path):
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "quantize" / "index.html").exists() and (tmp_path / "figures" / "quantize.png").exists()


def test_tables_are_those_of_the_rows(tmp_path):
    files = sorted(table.RESULTS.glob("*.jsonl"))
    made = table.tables([json.loads(line) for file in files for line in file.read_text().splitlines()])
    assert all(made.values())
    written = set()
    for page in PAGES:
        copy = shutil.copy(page, tmp_path / page.name)
        written |= table.write(copy, made)
        assert copy.read_text() == page.read_text(), f"python -m benchmarks.table --write {page.relative_to(ROOT)}"
    assert written == made.keys()


@pytest.mark.parametrize("page", DOCUMENTED)
def test_every_option_is_listed_with_its_default(page):
    listed = re.findall(r"^\| `(\w+)` \| (?:`([^`]*)`)? *\|", (DOCS / page).read_text(), re.M)
    expected = []
    for documented in DOCUMENTED[page]:
        if dataclasses.is_dataclass(documented):
            options = {each.name: each.default for each in dataclasses.fields(documented)}
            missing = dataclasses.MISSING
        else:
            given = inspect.signature(documented).parameters
            options = {name: each.default for name, each in given.items() if name not in ("model", "texts")}
            missing = inspect.Parameter.empty
        expected += [(name, "" if default is missing else repr(default)) for name, default in options.items()]
    assert [(name, default.replace('"', "'")) for name, default in listed] == expected


def test_commands_of_benchmarks_are_there():
    found = 0
    for page in [*PAGES, ROOT / "benchmarks" / "README.md"]:
        for name, options in re.findall(r"python -m benchmarks\.(\w+)([^`#\n]*)", page.read_text()):
            source = (ROOT / "benchmarks" / f"{name}.py").read_text() + (ROOT / "benchmarks" / "decode.py").read_text()
            for option in re.findall(r"--[\w-]+", options):
                assert f'"{option}"' in source, f"{page.name}: {name} {option}"
                found += 1
    assert found > 10


def test_the_page_of_public_names_is_that_of_the_docstrings():
    assert sorted(hf_accel_patch.__all__) == sorted(itertools.chain(*api_page.SECTIONS.values()))
    assert api_page.page() == api_page.PAGE.read_text(), "python tests/api_page.py --write"


@pytest.mark.parametrize("name", hf_accel_patch.__all__)
def test_examples_of_docstrings(name, monkeypatch):
    path, text = str(ROOT / "hf_accel_patch" / "models" / "code-llama-8m"), held_out_text()[:20_000]
    names = {each: getattr(hf_accel_patch, each) for each in hf_accel_patch.__all__}
    names |= {"AutoModelForCausalLM": AutoModelForCausalLM, "torch": torch, "path": path, "texts": [text]}
    names["model"] = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    names["ids"] = AutoTokenizer.from_pretrained(path)(text[:500], return_tensors="pt")["input_ids"]
    documented = inspect.getdoc(getattr(hf_accel_patch, name))
    example = doctest.DocTestParser().get_doctest(documented, names, name, None, 0)
    assert example.examples
    monkeypatch.chdir(ROOT)
    told = []
    result = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(example, out=told.append)
    assert result.attempted and not result.failed, "".join(told)


def test_every_public_name_is_explained():
    text = "".join(page.read_text() for page in DOCS.glob("*.md"))
    assert [name for name in hf_accel_patch.__all__ if not re.search(rf"`{name}\b", text)] == []


def test_the_declared_versions_are_those_of_the_package():
    page, package = (DOCS / "compatibility.md").read_text(), (ROOT / "pyproject.toml").read_text()
    declared, python = (re.search(f'{name}[^"]*', package)[0] for name in ("transformers>=", r"(?<=python = \">=)"))
    assert f"`{declared}`" in page and f"| Python | {python} and later |" in page
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split())
    for name in ("torch", "accelerate", "safetensors"):
        least, tested = re.search(rf'"{name}>=([^"]*)"', package)[1], ".".join(pinned[name].split(".")[:2])
        assert f"| {name} | {least} and later | {tested} |" in page


def test_every_quoted_error_is_one_of_the_package():
    texts = [text for file in source_files() for text in texts_of(file.read_text())]
    page = (DOCS / "troubleshooting.md").read_text()
    quoted = [" ".join(text.split()) for text in re.findall(r"\*\*`([^`]*)`\*\*", page)]
    assert len(quoted) > 60
    for text in quoted:
        assert any(text in each for each in texts), text


def source_files():
    return [file for file in (ROOT / "hf_accel_patch").rglob("*.py")]


def texts_of(source):
    """Every text of a file; what is put into it stands as three dots."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        if isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else "..." for part in node.values)


def test_texts_of_a_source():
    found = list(texts_of('raise ValueError(f"a {x!r} of " f"{y}; " "allowed: 1", "a hint")'))
    assert "a ... of ...; allowed: 1" in found and "a hint" in found


def test_the_errors_that_users_meet_are_there(capsys):
    """Those that many meet, raised."""
    from cases import tiny

    page, model = (DOCS / "troubleshooting.md").read_text(), hf_accel_patch.patch(tiny("llama"), quantize="int8")
    for call, quote in (
        (lambda: hf_accel_patch.patch(model), "is patched with other options"),
        (lambda: hf_accel_patch.unpatch(model), "weights were discarded"),
        (lambda: hf_accel_patch.patch(torch_module()), "is no causal LM of transformers"),
        (lambda: hf_accel_patch.patch(tiny("llama"), quantise="int8"), "patch() has no keyword"),
        (lambda: hf_accel_patch.patch(tiny("gpt2"), rope="yarn:2"), "it has no rotary positions"),
        (lambda: hf_accel_patch.patch(tiny("llama"), gqa=3), "key/value heads; allowed are its divisors"),
        (lambda: hf_accel_patch.patch(tiny("llama"), budget=1000), "is too small for"),
        (
            lambda: hf_accel_patch.verify(tiny("llama"), [torch.arange(9)]),
            "is not patched, so there is nothing to compare",
        ),
        (lambda: hf_accel_patch.verify(model, [torch.arange(9)]), "discarded, and it does not know its checkpoint"),
        (lambda: [model.dequantize(), model.dequantize()], "dequantize(): the model holds no quantized weights"),
        (lambda: environment.given({"HF_ACCEL_QUANTISE": "int4"}), "is no variable of hf_accel_patch"),
    ):
        with pytest.raises(Exception) as raised:
            call()
        assert quote in str(raised.value) and quote in page


def torch_module():
    from torch import nn

    return nn.Linear(2, 2)
