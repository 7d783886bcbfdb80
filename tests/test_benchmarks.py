"""benchmarks.attention: what is measured is what the rows say. Tables are made from the rows that they should be."""

import argparse
import importlib.metadata
import json
import sys

import pytest
import torch

from benchmarks import attention, compatibility, table
from benchmarks.attention import FAMILIES, AttentionJob, expected_bytes
from benchmarks.attention_table import NAMES, attention_markdown, latest
from benchmarks.caches import find
from benchmarks.planner_table import estimates_markdown, planner_markdown
from benchmarks.shapes import LAYERS, build
from benchmarks.speculative_table import speculative_markdown
from benchmarks.startup_table import startup_markdown
from benchmarks.summary_table import summary_markdown

WHERE = {"dtype": "float32", "device": "cpu", "threads": 1}
MACHINE = {"hardware": {"cpu": "a processor", "cpu_capability": "AVX2"}, "commit": "abc"}
MACHINE |= {"versions": {"python": "3.11", "torch": "2.13.0", "transformers": "5.23.0"}}


def row(family, length, system, ms, peak, run="2026-01-01", **more):
    described = {"part": "attention-prefill", "family": family, "length": length, "system": system, "run": run}
    return MACHINE | WHERE | described | {"prefill_ms": ms, "prefill_peak_bytes": peak, "most_bytes": 3e9} | more


def test_every_family_has_a_shape_and_a_name():
    assert {family.shape for family in FAMILIES.values()} == set(LAYERS) and set(FAMILIES) == set(NAMES)


@pytest.mark.parametrize("name", FAMILIES)
def test_stock_and_patched_models_take_prompts(name):
    family, kinds = FAMILIES[name], []
    for system in attention.SYSTEMS:
        held = AttentionJob(system, family.shape, None, **WHERE).hold(find(system))
        assert held.prefill(16, family.padded)["prefill_ms"] > 0
        kinds.append(hasattr(held.model, "_hf_accel_patch"))
    assert kinds == [False, True]
    assert held.peak(16, family.padded)["prefill_peak_bytes"] is not None
    ids = torch.arange(4, 36)[None]
    stock = build(family.shape, dtype="float32", device="cpu")
    with torch.no_grad():
        difference = stock(ids).logits - held.model(ids).logits
    assert difference.abs().max() < 1e-4 * stock(ids).logits.std(), "the models compared are not the same"


def test_what_is_expected_of_a_longer_prompt():
    assert expected_bytes({}, 512) == expected_bytes({512: 10}, 1024) == 0
    assert expected_bytes({512: 100, 1024: 400}, 2048) == 1600
    assert expected_bytes({512: 100, 1024: 100}, 8192) == 100


def test_tables_are_made_from_the_latest_rows():
    rows = [
        row("bloom", 512, "stock", [9.0, 9.0, 9.0], 1e6, run="2025-01-01"),
        row("bloom", 512, "stock", [10.0, 20.0, 40.0], 80e6),
        row("bloom", 512, "exact", [10.0, 5.0, 20.0], 20e6),
        row("bloom", 1024, "stock", [], None, reason="1024 tokens would take about 4 GB"),
        row("bloom", 1024, "exact", [7.0], 40e6),
        row("mpt", 512, "exact", [3.0], 1e6, threads=2, run="2025-01-01"),
    ]
    text = attention_markdown(rows)
    assert "| BLOOM: ALiBi | 20 | 10 | 2.00 |  | 7 |  |" in text
    assert "| BLOOM: ALiBi | 80 | 20 |  | 40 |" in text
    assert "would take more than 3 GB" in text and "MPT" not in text
    assert list(latest(rows, "attention-prefill")["bloom"]) == [512, 1024]


def test_tables_go_where_their_places_are(tmp_path, monkeypatch, capsys):
    rows, docs, page = tmp_path / "rows.jsonl", tmp_path / "docs", tmp_path / "page.md"
    docs.mkdir()
    found = [row("bloom", 512, name, [ms], 1e6) for name, ms in (("stock", 8.0), ("exact", 2.0))]
    rows.write_text("\n".join(map(json.dumps, found)))
    page.write_text("before\n<!-- summary-table -->\nold\n<!-- /summary-table -->\nafter\n")
    (docs / "one.md").write_text("<!-- attention-table -->\n<!-- /attention-table -->\n")
    (docs / "other.md").write_text("nothing\n")
    monkeypatch.setattr(sys, "argv", ["table", str(rows), "--write", str(page), str(docs)])
    table.main()
    assert "| BLOOM: ALiBi | 8 | 2 | 4.00 |" in (docs / "one.md").read_text()
    assert (docs / "other.md").read_text() == "nothing\n" and page.read_text().startswith("before\n<!-- summary")
    monkeypatch.setattr(sys, "argv", ["table", str(rows), "--write", str(docs / "other.md")])
    with pytest.raises(SystemExit, match="no place for a table"):
        table.main()


def test_the_summary_has_ratios_of_one_run():
    rows = [
        row("gpt_oss", 512, "stock", [9.0], 40e6),
        row("gpt_oss", 512, "exact", [3.0], 10e6),
        row("gpt_oss", 1024, "exact", [7.0], 20e6),
        row("gpt_oss", 1024, "stock", [70.0], 80e6, run="2025-01-01"),  # of another run
    ]
    assert "| no options | layers of gpt-oss's shape, a prompt of 512 tokens | 3.00 | 0.25 |  |" in summary_markdown(
        rows
    )
    assert summary_markdown([]) == ""


def test_the_summary_has_one_shape_and_says_what_is_against_the_patched_model():
    def decoded(shape, system, ms, size, run):
        settings = {"layers": None, "batch": 1, "prompt": 128, "tokens": 9, "padded": False}
        return MACHINE | WHERE | settings | {"shape": shape, "system": system, "decode_ms": ms, "weight_bytes": size,
                                             "prefill_ms": [6.0], "run": run}  # fmt: skip

    def heads(part, count, **more):
        return MACHINE | WHERE | {"part": part, "kv_heads": count, "run": "2026", "shape": "a-shape"} | more

    small = [decoded("small", "stock", [4.0], 10, "2026-02"), decoded("small", "exact", [2.0], 10, "2026-02")]
    large = [decoded("large", "stock", [9.0], 90, "2026-01"), decoded("large", "exact", [3.0], 90, "2026-01")]
    made = summary_markdown(small + large)
    capability = MACHINE["hardware"]["cpu_capability"]
    assert f"| no options | a token of large after it, {capability} | 3.00 | 1.00 |  |" in made
    assert f"| no options | a prompt of 128 tokens of large, {capability} | 1.00 | 1.00 |  |" in made
    assert "small" not in made and "against" not in made
    times = [heads("gqa-decode", 16, context=64, decode_ms=[6.0], cache_bytes=8)]
    times += [heads("gqa-decode", 4, context=64, decode_ms=[2.0], cache_bytes=2)]
    quality = [heads("gqa-quality", 8, system="unconverted", nats=[1.0, 1.0])]
    quality += [heads("gqa-quality", 2, system="aligned-calibrated", nats=[1.0, 1.2])]
    made = summary_markdown(times + quality)
    assert "| `gqa=4` | a token of a multi-head shape, 64 cached, 16 key/value heads to 4 | 3.00 | 0.25 |  |" in made
    assert "| text by a-shape, 8 key/value heads to 2 |  |  | 1.105 |" in made
    assert "are against `patch(model)` without that option" in made.splitlines()[-1]


def test_drafts_that_were_timed_again_are_shown_once():
    def timed(system, ms, prompts, run, **more):
        given = {"part": "speculative-generate", "shape": "a-shape", "batch": 1, "tokens": 10, "task": "editing"}
        given |= {"passes": [10], "drafted": 0, "same_as_stock": [1, 1], "same_as_exact": [1, 1], "system": system}
        return MACHINE | WHERE | given | {"prompts": prompts, "run": run, "seconds": [[ms / 100] * prompts]} | more

    first = [timed("stock", 8.0, 12, "2026-01"), timed("ngram", 4.0, 12, "2026-01")]
    first.append(timed("stock-early-exit", 16.0, 12, "2026-01"))
    again = [timed("stock", 9.0, 8, "2026-02"), timed("ngram", 3.0, 8, "2026-02")]
    made = speculative_markdown(first + again)
    assert [line.split(" | ")[2:4] for line in made.splitlines() if line.startswith("| editing")] == [
        ["16.00", "0.50"],  # not timed again; against stock of its own run
        ["9.00", "1.00"],
        ["3.00", "3.00"],
    ]
    failed = [timed("ngram", 0.0, 8, "2026-02", reason="it stopped")]
    assert "| 4.00 |" in speculative_markdown(first + failed)


def test_tables_of_plans():
    sizes = {"weights": 4e9, "cache": 1e9, "activations": 5e8, "peak": 5.5e9}
    common = MACHINE | {"run": "2026-02"}
    rows = [MACHINE | {"run": "2026-01", "part": "planner-octocoder", "context": 64, "scheme": "int8 cache"} | sizes]
    rows.append(common | {"part": "planner-octocoder", "context": 64, "scheme": "as asked"} | sizes)
    rows.append(common | {"part": "planner-budget", "asked": "9GiB", "chosen": "exact", "why": "exact needs 5 GiB"})
    rows.append(
        common | {"part": "planner-budget", "asked": "1GiB", "error": "budget=1 is too small for X: it needs 2"}
    )
    made = planner_markdown(rows)
    assert "| exact | 4.00 | 1.00 | 0.50 | 5.50 |" in made and "| int8 cache" not in made, "rows of an earlier run"
    assert "| 9GiB | exact | exact needs 5 GiB |" in made and "| 1GiB | `HfAccelError` | it needs 2 |" in made
    measured = {"weights": 4e9, "cache": 8e8, "peak": 6e9}
    rows = [common | {"family": name, "way": "stock", "said": sizes, "measured": found} for name, found in
            (("llama", measured), ("bloom", sizes))]  # fmt: skip
    made = estimates_markdown(rows)
    assert "2 families (llama, bloom)" in made and "| transformers | 0.0% | 25.0% | 8.3% |" in made
    assert planner_markdown([]) == estimates_markdown([]) == ""


def test_the_table_of_starts():
    rows = []
    for run, faster in (("2026-01", 9), ("2026-02", 0)):
        common = MACHINE | {"run": run, "hardware": {"cpu": "a processor", "cores": 2}}
        for hook in (False, True):
            times = {"start_cpu_ms": [9.0, 10.0 + hook - faster, 30.0], "start_ms": [1.0, 40.0, 90.0]}
            rows.append(common | times | {"part": "startup-hook", "hook": hook, "line_ms": 0.02})
        times = {"import_cpu_ms": [1.0, 3.0], "import_ms": [4.0, 4.0]}
        rows.append(common | times | {"part": "startup-import", "after": "torch and transformers", "patching": True})
    made = startup_markdown(rows)
    assert "without the hook | 10.0 | 40.0 | 3 |" in made and "with the hook | 11.0 | 40.0 | 3 |" in made
    assert "transformers, `HF_ACCEL_PATCH=1` | 2.0 | 4.0 | 2 |" in made and "alone |  | 0.020 |  |" in made
    assert startup_markdown([]) == ""


@pytest.mark.slow
def test_a_run_adds_rows_and_a_table(tmp_path, monkeypatch, capsys):
    out, page = tmp_path / "attention.jsonl", tmp_path / "page.md"
    sizes = ["--lengths", "32", "64", "--contexts", "256", "--rounds", "2", "--steps", "2", "--threads", "1"]
    monkeypatch.setattr(sys, "argv", ["attention", "--families", "bloom", *sizes, "--out", str(out)])
    with pytest.raises(SystemExit) as ended:
        attention.main()
    assert ended.value.code == 0 and "BLOOM" in capsys.readouterr().out
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(each["part"], each["system"]) for each in rows] == [
        *[("attention-prefill", "stock"), ("attention-prefill", "exact")] * 2,
        *[("attention-decode", "stock"), ("attention-decode", "exact")],
    ]
    assert all(len(each.get("prefill_ms") or each["decode_ms"]) == 2 for each in rows)
    page.write_text("<!-- attention-table -->\n<!-- /attention-table -->\n")
    monkeypatch.setattr(sys, "argv", ["table", str(out), "--write", str(page)])
    table.main()
    assert "BLOOM" in page.read_text()


RESULTS = """<testsuites><testsuite>
<testcase classname="tests.test_a" name="one"/>
<testcase classname="tests.test_a" name="two"><failure>no</failure></testcase>
<testcase classname="tests.test_a" name="three"><error>no</error></testcase>
<testcase classname="tests.test_a" name="four"><skipped/></testcase>
</testsuite></testsuites>"""


def test_what_ran_at_a_version_is_counted(tmp_path, monkeypatch, capsys):
    results, out = tmp_path / "results.xml", tmp_path / "rows.jsonl"
    results.write_text(RESULTS)
    monkeypatch.setattr(sys, "argv", ["compatibility", "contract", str(results), "--out", str(out)])
    with pytest.raises(SystemExit) as ended:
        compatibility.main()
    assert ended.value.code == 1 and "| 1 | 1 | 2 |" in capsys.readouterr().out
    found = json.loads(out.read_text())
    assert found["failures"] == ["tests.test_a::three", "tests.test_a::two"]
    assert found["versions"]["torch"] == importlib.metadata.version("torch")


def test_the_table_of_versions_has_the_latest_row_of_each_the_newest_first():
    def ran(transformers, passed, run):
        versions = MACHINE["versions"] | {"transformers": transformers}
        counts = {"passed": passed, "skipped": 0, "failed": 0}
        return {"run": run, "commit": "abc", "suite": "contract", "versions": versions} | counts

    rows = [ran("5.9.0", 1, "2026-01-02"), ran("5.23.0", 3, "2026-01-02"), ran("5.23.0", 2, "2026-01-01")]
    lines = compatibility.compatibility_markdown(rows).splitlines()[2:]
    assert [line.split(" | ")[0] for line in lines] == ["| 5.23.0", "| 5.9.0"] and "| 3 | 0 | 0 |" in lines[0]


def test_rows_are_written_when_a_run_is_stopped(tmp_path, monkeypatch, capsys):
    from benchmarks.decode import recorded

    monkeypatch.setattr("signal.signal", lambda *given: None)
    options = argparse.Namespace(**WHERE, out=tmp_path / "rows.jsonl", plot=False)
    options.threads = torch.get_num_threads()
    with pytest.raises(SystemExit) as ended, recorded(options, lambda rows: f"{len(rows)} rows", print) as recorder:
        recorder.save([{"system": "stock"}])
        raise KeyboardInterrupt
    assert ended.value.code == 130 and capsys.readouterr().out == "1 rows\n"
    assert json.loads(options.out.read_text())["system"] == "stock"
