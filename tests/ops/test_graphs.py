"""What may be recorded, and whether the simulation that stands for CUDA graphs in other tests is as strict."""

import gc
import threading
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
from simulated_graphs import SimulatedRecorder

from hf_accel_patch.kernels import cpu_steps
from hf_accel_patch.ops import graphs
from hf_accel_patch.ops.fusing.running import Runner
from hf_accel_patch.ops.fusing.tracing import Unfusable, noted
from hf_accel_patch.ops.graphs import CudaRecorder, Watching, marked, recorder_for, recording
from hf_accel_patch.ops.refusing import Refused
from hf_accel_patch.ops.tape import TapeRecorder

CPU = torch.device("cpu")
X = torch.arange(6.0)


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.mark.parametrize(
    "function",
    [
        lambda: X.sum().item(),
        lambda: bool((X > 2).any()),
        lambda: float(X[2]),
        lambda: int(X.argmax()),
        lambda: X.nonzero(),
        lambda: X[X > 2],
        lambda: X.clone().index_put_((X > 2,), torch.zeros(())),
        lambda: X.masked_select(X > 2),
        lambda: X.unique(),
        lambda: torch.equal(X, X),
        lambda: torch.repeat_interleave(X, torch.ones(6, dtype=torch.long)),
        lambda: torch.tensor([1.0, 2.0]) + 1,
        lambda: X.to("meta"),
        lambda: torch.empty(6, device="meta").copy_(X),
    ],
)
def test_what_waits_is_refused(function):
    with Watching(CPU), pytest.raises(Refused):
        function()


@pytest.mark.parametrize(
    "function",
    [
        lambda: X[X.long()],
        lambda: X.masked_fill(X > 2, 0.0),
        lambda: torch.where(X > 2, X, 0.0),
        lambda: X.to(torch.float64),
        lambda: X.repeat_interleave(2),
        lambda: X.clone().copy_(X + 1),
        lambda: X.clone().index_put_((X.long(),), X),
    ],
)
def test_what_does_not_wait_is_taken(function):
    with Watching(CPU):
        assert isinstance(function(), torch.Tensor)


def test_what_records(monkeypatch):
    assert recorder_for(torch.device("meta")) is None
    monkeypatch.setattr(cpu_steps, "_load", lambda: (object(), ""))
    assert isinstance(recorder_for(CPU), TapeRecorder)
    monkeypatch.setattr(cpu_steps, "_load", lambda: (None, "there is no C compiler"))
    assert recorder_for(CPU) is None


def test_whether_a_function_is_being_recorded():
    assert not recording()
    with pytest.raises(ZeroDivisionError), marked():
        assert recording()
        raise ZeroDivisionError
    assert not recording()


# The simulation


def test_a_replay_reads_memory_and_no_numbers_of_python():
    given, length = torch.zeros(3), [1.0]
    recorded = SimulatedRecorder()(lambda: given * 2 + length[0])
    length[0] = 5.0
    for values in ((1.0, 2.0, 3.0), (4.0, 0.0, -1.0)):
        given.copy_(torch.tensor(values))
        recorded.replay()
        assert torch.equal(recorded.output, given * 2 + 1)


def test_a_capture_computes_nothing():
    held, given = torch.zeros(3), torch.ones(3)
    runs = []

    def function():
        runs.append(1)
        held.add_(given)
        return held.view(3, 1).sum(1) * 1

    recorded = SimulatedRecorder()(function)
    assert len(runs) == 2 and torch.equal(held, torch.ones(3)), "the first run counts, the capture does not"
    assert recorded.output.isnan().all()
    recorded.replay()
    assert torch.equal(held, torch.full((3,), 2.0)) and torch.equal(recorded.output, held) and len(runs) == 2


def test_writes_through_views_are_replayed():
    buffer, places = torch.zeros(2, 3, 8, 4), torch.tensor([[1, 2], [4, 5]])
    new, rows = torch.rand(2, 3, 2, 4), torch.arange(2)[:, None]

    def function():
        buffer[rows, :, places] = new.transpose(1, 2)
        return buffer.narrow(2, 0, 6).sum(-1)

    recorded = SimulatedRecorder()(function)
    buffer.zero_()
    places.copy_(torch.tensor([[0, 1], [3, 2]]))
    recorded.replay()
    expected = torch.zeros(2, 3, 8, 4)
    for row in range(2):
        for at, place in enumerate(places[row].tolist()):
            expected[row, :, place] = new[row, :, at]
    assert torch.equal(buffer, expected) and torch.equal(recorded.output, expected[:, :, :6].sum(-1))


@pytest.mark.parametrize("name", ["tolist", "numpy", "cpu"])
def test_what_only_a_gpu_would_notice_is_refused(name):
    with pytest.raises(Refused, match=name):
        SimulatedRecorder()(lambda: X * len(getattr(X, name)()))
    assert getattr(X, name)() is not None


def test_a_tensor_that_is_kept_is_an_error():
    kept = []

    def function():
        kept[:] = [X * 2]
        return kept[0] + 1

    with pytest.raises(Refused, match="kept outside"):
        SimulatedRecorder()(function)


# The real recorder, with a CUDA that notes what it is told


class Told:
    """Streams and graphs that write down their calls."""

    def __init__(self, log, name):
        self.log, self.name = log, name

    def __getattr__(self, call):
        return lambda *args: self.log.append((self.name, call, *(getattr(each, "name", each) for each in args)))


class Generator:
    """Its state, and which one is in use."""

    def __init__(self, state="state of all"):
        self.state = state

    def graphsafe_get_state(self):
        return Generator(self.state)

    def clone_state(self):
        return Generator(f"copy of the {self.state}")

    def graphsafe_set_state(self, other):
        self.state = other.state


class Graph:
    """One that CUDA may refuse to end."""

    invalid = False  # once something was not permitted

    def __init__(self, log, current, number):
        self.log, self.current, self.name = log, current, f"graph {number}"

    def capture_begin(self, pool, capture_error_mode):
        assert not torch.is_inference_mode_enabled() and not torch.is_grad_enabled()
        draws = torch.cuda.default_generators[0].state
        self.log.append(("capture", pool, self.current[0].name, capture_error_mode, gc.isenabled(), draws))

    def capture_end(self):
        if self.invalid:
            raise RuntimeError("operation failed due to a previous error during capture")
        self.log.append(("captured", self.current[0].name))

    def replay(self):
        self.log.append((self.name, "replay"))


@pytest.fixture
def cuda(monkeypatch):
    """What `torch.cuda` was asked for, in order; `current` says on which stream."""
    graphs._side_stream.cache_clear()
    log, current, made = [], [Told([], "default")], []

    @contextmanager
    def on(stream):
        before, current[0] = current[0], stream
        try:
            yield
        finally:
            current[0] = before

    default = current[0]
    default.log = log
    replaced = {
        "current_device": lambda: 0, "graph_pool_handle": lambda: log.append("handle") or "pool",
        "Stream": lambda device: Told(log, "side"),
        "current_stream": lambda device=None: current[0], "stream": on, "device": lambda device: nullcontext(),
        "CUDAGraph": lambda: made.append(Graph(log, current, len(made))) or made[-1],
        "synchronize": lambda: log.append("synchronize"), "empty_cache": lambda: log.append("empty_cache"),
        "default_generators": [Generator()],
    }  # fmt: skip
    for name, fake in replaced.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(CudaRecorder, "fuses", False)
    monkeypatch.setattr(CudaRecorder, "races", False)
    for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
        monkeypatch.setattr(torch._C, name, lambda *args, name=name: log.append((name, *args)), raising=False)
    return log, current


def test_the_order_in_which_a_graph_is_made_and_replayed(cuda):
    log, current = cuda
    recorder = recorder_for(torch.device("cuda"))
    assert recorder.device == torch.device("cuda", 0)
    runs = []
    recorded = recorder(lambda: (runs.append((current[0].name, recording())), X * 2)[1])
    assert [name for name, _ in runs] == ["side", "side"] and torch.equal(recorded.output, X * 2)
    assert log == [
        ("side", "wait_stream", "default"),
        ("default", "wait_stream", "side"),
        "handle",
        "synchronize",
        "empty_cache",
        ("capture", "pool", "side", "thread_local", False, "copy of the state of all"),
        ("captured", "side"),
    ]
    assert gc.isenabled() and torch.cuda.default_generators[0].state == "state of all"
    log.clear()
    recorded.replay(), recorded.replay()
    assert log == [("graph 0", "replay")] * 2
    first, current[0] = current[0], Told(log, "other")
    recorder(lambda: X * 3).replay()
    assert log[-2:] == [("other", "wait_stream", first.name), ("graph 1", "replay")]


def test_a_fused_function_runs_once(cuda, monkeypatch):
    """What it did is done again by what was noted of it: to be tried, and to be captured."""
    _, current = cuda
    monkeypatch.setattr(CudaRecorder, "fuses", True)
    runs, again = [], []

    def kernel(x):
        again.append(current[0].name)
        return x * 2

    recorded = recorder_for(torch.device("cuda", 0))(lambda: (runs.append(current[0].name), noted(kernel, X) + 1)[1])
    assert runs == ["side"] and again == ["side"] * 3 and torch.equal(recorded.output, X * 2 + 1)


@pytest.mark.parametrize("error", [Unfusable("why"), ImportError("no module triton"), RuntimeError("anything")])
def test_what_cannot_be_fused_is_recorded_as_it_is(error, cuda, monkeypatch):
    monkeypatch.setattr(CudaRecorder, "fuses", True)

    def fails(function, device):
        raise error

    monkeypatch.setattr(graphs, "runner", fails)
    runs = []
    recorded = recorder_for(torch.device("cuda", 0))(lambda: (runs.append(1), X * 2)[1])
    assert len(runs) == 2 and torch.equal(recorded.output, X * 2)


class Planned(Runner):
    """One whose plan has fused something."""

    def __init__(self, function):
        self.function, self.plan = function, SimpleNamespace(fused=7)

    def __call__(self):
        return self.function()


class Event:
    """One of a clock that only replays move, each by the milliseconds of its graph."""

    def __init__(self, log, milliseconds):
        self.log, self.milliseconds = log, milliseconds

    def record(self):
        replays = [entry[0] for entry in self.log if entry[1:] == ("replay",)]
        self.at = sum(self.milliseconds[name] for name in replays)

    def synchronize(self):
        pass

    def elapsed_time(self, other):
        return other.at - self.at


@pytest.mark.parametrize("fused, apart", [(2.0, 3.0), (3.0, 2.0)])
def test_fused_steps_have_to_be_faster(fused, apart, cuda, monkeypatch):
    """The first is recorded both ways, those after it in the way that was replayed in less time."""
    log, current = cuda
    monkeypatch.setattr(CudaRecorder, "fuses", True)
    monkeypatch.setattr(CudaRecorder, "races", True)
    times = {"graph 0": fused, "graph 1": apart}
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: Event(log, times))
    monkeypatch.setattr(graphs, "runner", lambda function, device: Planned(function))
    recorder, runs = recorder_for(torch.device("cuda", 0)), []
    first = recorder(lambda: (runs.append(current[0].name), X * 2)[1])
    assert first.graph.name == ("graph 0" if fused < apart else "graph 1") and bool(first.fused) == (fused < apart)
    assert torch.equal(first.replay(), X * 2) and runs == ["side"] * 2, "captured twice"
    log.clear()
    second = recorder(lambda: X * 3)
    assert bool(second.fused) == (fused < apart)
    assert not any("replay" in entry for entry in log), "it is settled"
    assert CudaRecorder.fuses and CudaRecorder.races, "of this recorder alone"


def test_without_memory_for_both_fused_steps_stay(cuda, monkeypatch):
    monkeypatch.setattr(CudaRecorder, "fuses", True)
    monkeypatch.setattr(CudaRecorder, "races", True)
    monkeypatch.setattr(graphs, "runner", lambda function, device: Planned(lambda: X * 2))

    def function():
        raise torch.OutOfMemoryError("CUDA out of memory")

    recorded = recorder_for(torch.device("cuda", 0))(function)
    assert recorded.fused and torch.equal(recorded.replay(), X * 2)
    assert gc.isenabled() and torch.cuda.default_generators[0].state == "state of all"


def test_a_pool_goes_with_its_last_graph(cuda):
    log, _ = cuda
    recorder = recorder_for(torch.device("cuda", 0))
    first = recorder(lambda: X * 2)
    second = recorder(lambda: X * 3)
    assert log.count("handle") == 1
    del first
    third = recorder(lambda: X * 4)
    assert log.count("handle") == 1
    del second, third
    recorder(lambda: X * 5)
    assert log.count("handle") == 2


def test_inference_mode_is_that_of_the_function_not_of_the_beginning(cuda):
    """Of which a state of random numbers is left, that is written to in either mode."""
    modes = []
    with torch.inference_mode():
        recorder_for(torch.device("cuda", 0))(lambda: (modes.append(torch.is_inference_mode_enabled()), X * 2)[1])
    assert modes == [True, True]


@pytest.mark.parametrize("invalid", [False, True])
def test_a_capture_that_fails_leaves_things_as_they_were(invalid, cuda, monkeypatch):
    """The stream, the random numbers, and the memory, which the allocator records until it is told of the end. What is
    raised is what happened, not that the end failed too."""
    log, current = cuda
    recorder, runs = recorder_for(torch.device("cuda", 0)), []

    def function():
        runs.append(1)
        if len(runs) == 2:
            monkeypatch.setattr(Graph, "invalid", invalid)
            raise RuntimeError("operation not permitted when stream is capturing")
        return X * 2

    with pytest.raises(RuntimeError, match="not permitted"):
        recorder(function)
    assert current[0].name == "default" and len(runs) == 2
    assert gc.isenabled() and torch.cuda.default_generators[0].state == "state of all"
    ends = [("_cuda_endAllocateToPool", 0, "pool"), ("_cuda_releasePool", 0, "pool")]
    assert log[-2:] == ends if invalid else log[-1] == ("captured", "side")


def test_what_fails_before_the_capture_is_waited_for(cuda):
    """What was computed until then may write to memory that the next ordinary step uses."""
    log, current = cuda

    def function():
        raise Refused("why")

    with pytest.raises(Refused):
        recorder_for(torch.device("cuda", 0))(function)
    assert log == [("side", "wait_stream", "default"), ("default", "wait_stream", "side")]
    assert current[0].name == "default"


def test_nobody_replays_between_a_replay_and_its_copy(cuda, monkeypatch):
    """The other graph's output lies where this one computes."""
    recorder = recorder_for(torch.device("cuda", 0))
    first, second = recorder(lambda: X * 2), recorder(lambda: X * 3)
    started, other = threading.Event(), []

    def interfere():
        started.set()
        second.replay()
        first.output.fill_(-1)

    def replay(self):
        if self is first.graph:
            other.append(threading.Thread(target=interfere))
            other[0].start()
            assert started.wait(10)
            other[0].join(0.05)

    monkeypatch.setattr(Graph, "replay", replay)
    assert torch.equal(first.replay(), X * 2)
    other[0].join()
    assert torch.equal(first.output, torch.full_like(X, -1)), "it has had its turn"
