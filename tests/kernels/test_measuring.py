"""What a machine's measurements leave behind."""

import json
import math
import time

import pytest
import torch

from hf_accel_patch.kernels import measuring
from hf_accel_patch.kernels.measuring import remembered


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Nothing is kept yet. Tests that run beside these hold up nothing that counts."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(measuring, "LEAST_WALL", 0.04)
    monkeypatch.setattr(measuring, "LEAST_OTHERS", math.inf)
    return tmp_path / "hf_accel_patch"


def held_up(*answer):
    def measure():
        time.sleep(0.05)
        return list(answer)

    return measure


def test_what_was_measured_is_remembered(folder):
    assert remembered("rows", lambda: [3, 4]) == remembered("rows", lambda: [5, 6]) == [3, 4]
    assert remembered("others", lambda: [7]) == [7]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert remembered("rows", lambda: [8]) == [8], "other threads, another machine"
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    "text",
    (
        "{",
        "[3]",
        '{"settled": true}',
        '{"settled": true, "answers": []}',
        '{"settled": true, "answers": [[]]}',
        '{"settled": 1, "answers": [[1]]}',
    ),
)
def test_what_cannot_be_read_is_measured_anew(text, folder):
    remembered("rows", lambda: [8])
    for path in folder.glob("measured-*.json"):
        path.write_text(text)
    assert remembered("rows", lambda: [9]) == [9] == remembered("rows", lambda: [10])


def test_a_busy_machine_is_measured_again(folder):
    assert remembered("rows", held_up(3), [5, 1]) == [5, 1], "at least so many"
    assert remembered("rows", lambda: [4], [5]) == [4], "a quiet one"
    assert remembered("rows", held_up(3)) == [4]


def test_some_measurements_of_a_busy_machine_settle_it(folder):
    assert remembered("rows", held_up(16, 0, 17)) == [16, 0, 17]
    assert remembered("rows", held_up(1, 64, 0)) == [1, 64, 0]
    assert remembered("rows", held_up(8, 0, 9), [32]) == [8, 0, 9], "which is most like the others"
    assert remembered("rows", held_up(2, 0, 0)) == [8, 0, 9]
    (kept,) = folder.iterdir()
    assert json.loads(kept.read_text()) == {"settled": True, "answers": [[8, 0, 9]]}


def test_other_processes_are_seen(folder, monkeypatch):
    monkeypatch.setattr(measuring, "LEAST_OTHERS", 0.01)
    seconds = iter((0.0, 1e3, 0.0, 0.0))
    monkeypatch.setattr(measuring, "_machine_seconds", lambda: next(seconds))
    wait = time.perf_counter() + 0.02

    def measure():
        while time.perf_counter() < wait:
            pass
        return [3]

    assert remembered("rows", measure, [5]) == [5]
    assert remembered("rows", lambda: [4]) == [4]


def test_the_time_of_the_machine_grows():
    before, wait = measuring._machine_seconds(), time.perf_counter() + 0.2
    while time.perf_counter() < wait:
        pass
    if measuring.Path("/proc/stat").exists():
        assert measuring._machine_seconds() > before > 0
