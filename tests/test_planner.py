"""Plans of memory: estimates against measured bytes, checkpoints that are quantized, the machine, the command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest
import torch
from cases import build as of_type
from cases import entry
from planned_sizes import FAMILIES, WAYS, build
from transformers import AutoConfig

import hf_accel_patch
from hf_accel_patch import GQA, KVCache, UnsupportedModel, load, patch, plan
from hf_accel_patch.cli import main
from hf_accel_patch.families import bind, weight_bytes
from hf_accel_patch.options import parse
from hf_accel_patch.planning import trace
from hf_accel_patch.planning.caches import kept
from hf_accel_patch.planning.machine import host_bytes
from hf_accel_patch.planning.memory import Estimates
from hf_accel_patch.planning.plot import _lines
from hf_accel_patch.planning.trace import twin

CLOSE = {"weights": 0.02, "cache": 0.02, "peak": 0.10}
HERE = Path(__file__).parent
QUICK = ("llama", "gemma2", "mixtral", "bloom")  # plain, windows and soft caps, experts, hand-written attention
MODEL = Path(hf_accel_patch.__file__).parent / "models" / "code-llama-8m"


def _measured(*families: str) -> list[dict]:
    """In a process of its own, whose resident memory nothing else changes; malloc gives back what is freed there."""
    environment = os.environ | {
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(HERE.parent),
    }
    command = [sys.executable, str(HERE / "planned_sizes.py"), *families]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def _compare(rows: list[dict], families: tuple[str, ...]) -> None:
    assert [(row["family"], row["way"]) for row in rows] == [(family, way) for family in families for way in WAYS]
    wrong = [
        f"{row['family']} {row['way']}: {name} {row['said'][name]} of {row['measured'][name]}"
        for row in rows
        for name, share in CLOSE.items()
        if abs(row["said"][name] / row["measured"][name] - 1) > share
    ]
    assert not wrong, wrong
    assert not any(row["problem"] for row in rows), "a trace failed, so that a rule of thumb was compared"


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process is measured on Linux only")
def test_estimates_are_what_is_measured():
    _compare(_measured(*QUICK), QUICK)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process is measured on Linux only")
def test_estimates_of_more_families():
    others = tuple(name for name in FAMILIES if name not in QUICK)
    _compare(_measured(*others), others)


def test_activations_are_found_by_running_the_model(monkeypatch):
    """Not by a formula: a layer that keeps more alive shows."""
    view = bind(build("llama"))
    before = Estimates(view, 256).of(())
    forward = type(view.model.model.layers[0].mlp).forward

    def wasteful(self, x):
        held = [torch.cat((x, x)) for _ in range(8)]
        return forward(self, x) + 0 * held[0][: len(x)]

    monkeypatch.setattr(type(view.model.model.layers[0].mlp), "forward", wasteful)
    after = Estimates(view, 256).of(())
    assert after.activations - before.activations >= 12 * 256 * view.config.hidden_size * 4
    assert after.weights == before.weights and after.cache == before.cache


def test_stock_scores_are_quadratic_and_ours_linear():
    """Of a model with hand-written attention."""
    view = bind(build("bloom"))
    stock, ours = [], []
    for tokens in (512, 1024, 2048):
        estimates = Estimates(view, tokens)
        stock.append(estimates.stock().activations)
        ours.append(estimates.of(hf_accel_patch.api.parse({})).activations)
    assert stock[2] > 3.5 * stock[1] > 3.5 * 3 * stock[0] * 0.9
    assert ours[2] < 2.1 * ours[1] < 2.1 * 2.1 * ours[0]


def test_layers_that_repeat_are_run_twice(monkeypatch):
    view, calls = bind(build("llama", num_hidden_layers=12)), []
    forward = type(view.model.model.layers[0]).forward
    monkeypatch.setattr(
        type(view.model.model.layers[0]),
        "forward",
        lambda self, *args, **kwargs: calls.append(self) or forward(self, *args, **kwargs),
    )
    skeleton = trace.twin(view)
    found = trace.traced(skeleton, 64, 1, ours=True)
    assert len(calls) == 2 and len(found.rows) == 12 and not found.problem
    assert len(skeleton.model.model.layers) == 12, "the skeleton is as it was"


def test_a_model_that_cannot_run_without_values_gets_a_rule_of_thumb(monkeypatch):
    model = build("llama")

    def looks(self, x):
        assert x.sum().item() > 0
        return x

    monkeypatch.setattr(type(model.model.layers[0].mlp), "forward", looks)
    planned = plan(model, context=128)
    assert "item" in planned.memory.problem and "rule of thumb" in str(planned)
    assert planned.to_dict()["memory"]["rule_of_thumb"]
    assert planned.memory.asked.cache > 0 and planned.memory.asked.activations > 0


def test_batches_multiply_cache_and_activations():
    one, four = (plan(build("llama"), context=256, batch=batch).memory.asked for batch in (1, 4))
    assert four.cache == 4 * one.cache and four.weights == one.weights
    assert 3.5 < four.activations / one.activations <= 4.1


def test_a_cache_with_sinks_is_as_large_as_its_window():
    model = build("llama")
    small, large = (plan(model, context=context, cache="sinks:128").memory.asked.cache for context in (512, 2048))
    assert small == large < plan(model, context=512).memory.asked.cache


def test_fewer_heads_take_less_of_weights_and_cache():
    model = build("gpt2")
    before = plan(model, context=256).memory.asked
    fewer = GQA(1, originals="discard")
    after = plan(model, context=256, gqa=fewer).memory.asked
    assert abs(after.cache / before.cache - 1 / 4) < 0.02
    weights = patch(build("gpt2"), gqa=fewer)
    measured = sum(tensor.nbytes for tensor in chain(weights.parameters(), weights.buffers()))
    assert abs(after.weights / measured - 1) < 0.02


def test_kept_counts_room_and_growth():
    rows = Estimates(bind(build("gemma2")), 512)._trace(True, None, frozenset(), None).rows
    stock, ours = kept(None, rows, 512, 1, 4), kept(KVCache(), rows, 512, 1, 4)
    assert stock.prompt < ours.prompt <= ours.grown
    assert {row.window for row in rows} == {None, 128}


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])  # the head of the latter two is the embedding table
def test_a_configuration_is_as_good_as_the_model(family, tmp_path):
    model = build(family)
    model.config.save_pretrained(tmp_path)
    by_path, by_model = (plan(each, quantize="int4", context=300).to_dict()["memory"] for each in (tmp_path, model))
    assert by_path["schemes"] == by_model["schemes"]


@pytest.mark.parametrize("scheme", ["int8", "int4", "nf4"])
def test_a_checkpoint_of_ours_is_as_large_as_it_loads(scheme, tmp_path):
    patch(build("llama"), quantize=scheme).save_pretrained(tmp_path)
    planned = plan(tmp_path, context=64)
    loaded = load(tmp_path)
    measured = sum(tensor.nbytes for tensor in chain(loaded.parameters(), loaded.buffers()))
    assert abs(planned.memory.asked.weights / measured - 1) < 0.02
    row = next(row for row in planned.to_dict()["passes"] if row["pass"] == "quantize")
    assert scheme in row["reason"] and "already" in row["reason"]
    assert all("weights" not in label for label, _ in planned.memory.sizes)
    with pytest.raises(hf_accel_patch.HfAccelError, match="quantized by"):
        plan(tmp_path, quantize="int8")


@pytest.mark.parametrize(
    ("found", "scheme", "bits"),
    [
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "int4", 4.25),
        ({"quant_method": "gptq", "bits": 8, "group_size": 128}, "int8", 8),
        ({"quant_method": "awq", "bits": 4, "group_size": 64}, "int4", 4.5),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "nf4", 4.5),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "llm.int8", 8),
    ],
    ids=lambda value: value["quant_method"] if isinstance(value, dict) else None,
)
def test_a_checkpoint_of_another_method_by_its_configuration(found, scheme, bits, tmp_path):
    config = build("llama").config
    config.save_pretrained(tmp_path)
    described = json.loads((tmp_path / "config.json").read_text()) | {"quantization_config": found}
    (tmp_path / "config.json").write_text(json.dumps(described))
    planned = plan(tmp_path, context=64)
    layers = sum(p.numel() for name, p in build("llama").named_parameters() if "_proj" in name)
    rest = sum(p.numel() for name, p in build("llama").named_parameters() if "_proj" not in name)
    assert abs(planned.memory.asked.weights / (layers * bits / 8 + rest * 4) - 1) < 0.02
    assert scheme in next(row["reason"] for row in planned.to_dict()["passes"] if row["pass"] == "quantize")


def _groups(root: Path, cgroup: str, mountinfo: str, files: dict[str, str]) -> int | None:
    written = {"proc/self/cgroup": cgroup, "proc/self/mountinfo": mountinfo} | files
    written["proc/meminfo"] = "MemTotal: 1000000 kB\nMemAvailable:    500000 kB\n"
    for name, text in written.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return host_bytes(root)


@pytest.mark.skipif(sys.platform != "linux", reason="control groups are of Linux")
def test_limits_of_control_groups(tmp_path):
    two = "25 30 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw"
    one = "26 30 0:27 {} /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory"
    v2, v1 = "sys/fs/cgroup/", "sys/fs/cgroup/memory/"
    assert _groups(tmp_path / "none", "", "", {}) == 512_000_000
    nested = {
        f"{v2}a/memory.max": "300000000",
        f"{v2}a/memory.current": "100000000",
        f"{v2}a/memory.stat": "inactive_file 40000000\nanon 5\n",
        f"{v2}a/b/memory.max": "max",
        f"{v2}a/b/memory.current": "1",
    }
    assert _groups(tmp_path / "v2", "0::/a/b\n", two, nested) == 240_000_000, "the outer group has the limit"
    old = {f"{v1}memory.limit_in_bytes": "200000000", f"{v1}memory.usage_in_bytes": "50000000"}
    old |= {f"{v1}memory.stat": "total_inactive_file 10000000\n"}
    cgroup = "4:memory:/docker/1234\n0::/\n"
    assert _groups(tmp_path / "v1", cgroup, one.format("/docker/1234"), old) == 160_000_000
    assert _groups(tmp_path / "hidden", cgroup, one.format("/"), old) == 160_000_000, "its own group cannot be seen"
    unlimited = {f"{v1}memory.limit_in_bytes": str(2**63 - 4096), f"{v1}memory.usage_in_bytes": "5"}
    assert _groups(tmp_path / "no limit", cgroup, one.format("/"), unlimited) == 512_000_000
    full = old | {f"{v1}memory.usage_in_bytes": "900000000"}
    assert _groups(tmp_path / "full", cgroup, one.format("/"), full) == 0


def test_plan_command_prints_both_tables(capsys):
    assert main(["plan", str(MODEL), "--quantize", "int4", "--context", "256", "--batch", "2"]) == 0
    said = capsys.readouterr().out
    for words in ("quantize", "256 tokens of 2 sequences", "stock", "as asked", "int4 weights and int4 cache", "peak"):
        assert words in said


def test_plan_command_in_json(capsys):
    assert main(["plan", str(MODEL), "--context", "256", "--json"]) == 0
    memory = json.loads(capsys.readouterr().out)["memory"]
    assert memory["context"] == 256 and memory["peak"] == memory["weights"] + memory["cache"] + memory["activations"]
    assert [row["scheme"] for row in memory["schemes"]][:2] == ["stock", "as asked"]
    assert memory["schemes"][2]["weights"] < memory["weights"]


@pytest.mark.parametrize("missing", ["folder", "config", "model type", "no JSON"])
def test_what_cannot_be_planned_is_one_line(missing, tmp_path, capsys):
    if missing == "model type":
        AutoConfig.for_model("t5").save_pretrained(tmp_path)
    if missing == "no JSON":
        (tmp_path / "config.json").write_text("{")
    path = tmp_path / "nothing" if missing == "folder" else tmp_path
    assert main(["plan", str(path)]) == 2
    said = capsys.readouterr()
    assert said.out == "" and len(said.err.splitlines()) == 1 and str(tmp_path) in said.err


def test_plot(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert main(["plan", str(MODEL), "--budget", "20MB", "--plot", str(tmp_path / "memory.png")]) == 0
    assert (tmp_path / "memory.png").read_bytes().startswith(b"\x89PNG")
    assert main(["plan", str(MODEL), "--plot", str(tmp_path / "memory.nothing")]) == 2
    assert "memory.nothing" in capsys.readouterr().err


def test_plot_without_matplotlib_says_how_to_get_it(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["plan", str(MODEL), "--plot", str(tmp_path / "memory.png")]) == 2
    assert "hf_accel_patch[plots]" in capsys.readouterr().err


def test_what_a_loaded_model_holds_counts_as_room(monkeypatch):
    monkeypatch.setattr("hf_accel_patch.planning.overview.available_bytes", lambda device: 900_000)
    model = build("llama")
    memory = plan(model, context=16).memory
    assert memory.held == weight_bytes(model) > 0
    stock = next(size for label, size in memory.sizes if label == "stock")
    assert 900_000 < stock.peak <= 900_000 + memory.held and memory.fits(stock)
    assert plan(model, context=16, budget=memory.asked.peak).memory.fits(memory.asked)


def test_heads_that_are_kept_are_counted():
    model = build("llama")
    planned = {kept: plan(model, gqa=GQA(1, originals=kept), context=16).memory.asked for kept in ("keep", "discard")}
    assert planned["discard"].weights < weight_bytes(model) < planned["keep"].weights
    patch(model, gqa=GQA(1), attention=False, cache=False)
    state = vars(model)["_hf_accel_patch"]
    kept = sum({id(each): each.nbytes for each in state.journal.shared() if isinstance(each, torch.Tensor)}.values())
    assert abs(planned["keep"].weights - weight_bytes(model) - kept) <= 0.02 * kept


@pytest.mark.parametrize(
    ("options", "exact"), [({"gqa": 1}, False), ({"context": 4096}, False), ({"context": 16}, True)]
)
def test_a_budget_calls_exact_what_is(options, exact):
    row = entry(plan(build("llama"), budget="1GiB", **options).to_dict(), "budget")
    assert row["exact"] is exact and ("exact" in row["chosen"]) is exact


@pytest.mark.parametrize("family", ["gpt2", "bloom"])
def test_a_configuration_is_refused_what_its_model_is(family, tmp_path):
    model = build(family)
    model.config.save_pretrained(tmp_path)
    for each in (model, tmp_path):
        with pytest.raises(UnsupportedModel, match="sinks"):
            plan(each, cache="sinks:64")


def test_adapters_are_traced():
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(build("llama"), LoraConfig(target_modules=["q_proj"], r=4))
    assert not plan(wrapped, quantize="int8").memory.problem


def test_lines_of_a_quantized_model_are_of_its_cache():
    model = patch(build("llama"), quantize="int4")
    lines = _lines([Estimates(bind(model), 4096)], parse({}))
    assert set(lines) == {"stock", "patched", "int8 cache", "int4 cache"}
    assert lines["int4 cache"] < lines["int8 cache"] < lines["patched"]


def test_long_prompts_of_recurrent_models_are_not_run_token_by_token():
    view = bind(of_type("mamba"))
    run = trace.traced(twin(view), 300, 1, ours=False)
    found = Estimates(view, 300).stock()
    assert abs(found.activations / run.activations - 1) < 0.02 and not run.problem
