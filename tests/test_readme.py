"""What the README shows runs, and does what it says."""

import re

from pages import ROOT, blocks, execute

README = ROOT / "README.md"
TEXT = README.read_text()


def test_the_first_example_prints_what_is_shown(monkeypatch, tmp_path, capsys):
    (tmp_path / "hf_accel_patch").symlink_to(ROOT / "hf_accel_patch")
    monkeypatch.chdir(tmp_path)
    [code] = blocks(README)
    names = execute(code, {"__name__": "__main__"}, README)
    printed = capsys.readouterr().out
    shown = re.search(r"<!-- report -->\n```text\n(.*?)```", TEXT, re.S)[1]
    assert without_numbers(printed[: printed.index("def read_lines")]) == without_numbers(shown)
    assert not names["report"](names["pipe"]).rows


def without_numbers(text):
    """Lines with one space between words, without what differs between machines: numbers, and kernels."""
    text = re.sub(r"backend .*?, (weights|why)", r"backend, \1", text).replace(", graphs on", "")
    return [" ".join(re.sub(r"\d+(\.\d+)?", "#", line).split()) for line in text.splitlines()]


def test_the_first_screen_has_everything():
    first = "\n".join(TEXT.splitlines()[:40])
    for expected in ("pip install", "```python", "print(report(pipe))", "<!-- report -->", "unpatch("):
        assert expected in first
    passes = "attention linear prefill rope context quantize cache speculative gqa uptrain"
    assert all(f"`{name}`" in first for name in passes.split())
    assert len(blocks(README)[0].replace("\n\n", "\n").splitlines()) <= 8
    assert re.search(r"^\| pass \|.*output.*paper", first, re.M)


def test_commands_stand_between_their_markers():
    for name in ("demo-command", "test-command"):
        inside = re.search(rf"<!-- {name} -->\n```bash\n(.*?)\n```\n<!-- /{name} -->", TEXT, re.S)
        assert inside and "pip install -c constraints.txt" in inside[1] and "\n" not in inside[1]
