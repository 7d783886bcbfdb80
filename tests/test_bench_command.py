"""bench, as a user runs it."""

import json
from statistics import median

import pytest

from hf_accel_patch import benching, trials
from hf_accel_patch.benching import Settings, speed
from hf_accel_patch.cli import main
from hf_accel_patch.trials import BUNDLED

SHORT = ("--prompt", "8", "--tokens", "3", "--rounds", "3")


@pytest.fixture(autouse=True)
def _cold(monkeypatch):
    """What is loaded once has been loaded by other tests, and counts for nothing here."""
    monkeypatch.setattr(benching, "warm_up", lambda device, quantize: None)


def run(capsys, *arguments):
    try:
        code = main([str(each) for each in arguments])
    except SystemExit as stopped:
        code = stopped.code
    return code, capsys.readouterr()


def test_both_are_measured(capsys):
    asked = ("--quantize", "int4", "--speculative", "ngram", "--batch", "2", "--json")
    code, said = run(capsys, "bench", BUNDLED, *SHORT, *asked)
    assert code == 0, said.err
    found = json.loads(said.out)
    assert found["in_turn"] is True and found["asked"] == {"quantize": "int4", "speculative": "ngram"}
    assert found["patched"]["weight_bytes"] < 0.5 * found["stock"]["weight_bytes"]
    for side in (found["stock"], found["patched"]):
        for what in ("prefill", "decode"):
            times, speeds = side[f"{what}_ms"], side[f"{what}_speed"]
            assert len(times) == 3 and all(each > 0 for each in times)
            assert speeds["q1"] <= speeds["median"] <= speeds["q3"]
            assert speeds["median"] == pytest.approx(1000 / median(times))
    on = [row["pass"] for row in found["report"]["passes"] if "reason" not in row]
    assert {"quantize", "speculative"} <= set(on)


def test_one_after_the_other_where_memory_has_no_room(capsys, monkeypatch):
    monkeypatch.setattr(trials, "available_bytes", lambda device: 10**9)  # for one of them
    monkeypatch.setattr(benching, "available_bytes", lambda device: 10**7)  # and beside it
    loaded, load = [], benching._load

    def counted(*arguments):
        loaded.append(load(*arguments))
        return loaded[-1]

    monkeypatch.setattr(benching, "_load", counted)
    code, said = run(capsys, "bench", BUNDLED, *SHORT, "--quantize", "int8")
    assert code == 0, said.err
    assert len(loaded) == 1 and "one model after the other" in said.out
    assert "decode, tokens/s" in said.out and "quantize" in said.out


def test_speeds_are_those_of_the_times():
    assert speed([10.0, 20.0, 40.0]) == {"median": 50.0, "q1": 37.5, "q3": 75.0}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "required"),
        ((BUNDLED, "--shape", "llama-3.2-1b"), "not allowed with"),
        ((BUNDLED, "--quantize", "int3"), "int3"),
        ((BUNDLED, "--prompt", "600"), "made for 512"),
        ((BUNDLED, "--dtype", "float3"), "float3"),
        ((BUNDLED, "--device", "nonsense"), "nonsense"),
        ((BUNDLED, "--rounds", "0"), "--rounds"),
        (("/no/such/model",), "/no/such/model"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_arguments(arguments, words, capsys, monkeypatch):
    monkeypatch.setattr(benching, "_load", lambda *_: pytest.fail("loaded"))
    code, said = run(capsys, "bench", *arguments)
    assert code == 2 and words in said.err and len(said.err.splitlines()) == 1 and not said.out


def test_what_memory_does_not_hold_is_refused(capsys, monkeypatch):
    monkeypatch.setattr(trials, "available_bytes", lambda device: 10**9)
    monkeypatch.setattr(benching, "_load", lambda *_: pytest.fail("loaded"))
    code, said = run(capsys, "bench", "--shape", "llama-3.1-8b")
    assert code == 2 and "llama-3.1-8b needs 19.3 GB" in said.err
    assert Settings(shape="llama-3.1-8b").name == "llama-3.1-8b"
