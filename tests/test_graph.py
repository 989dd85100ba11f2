"""Recording and replaying steps, on a tape instead of CUDA graphs; tests/test_gpu.py does the same on a GPU."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from ltfast import build
from ltfast.data.base import Batch
from ltfast.dist import Ranks
from ltfast.flat import FlatBuffers, FlatParameters
from ltfast.graph import WARMUP, Captured, CudaRecorder, Failure
from ltfast.losses import membership_for
from ltfast.optim.rules import RULES, Rule
from ltfast.preserve import Anchor
from ltfast.recipes import build_config
from ltfast.scaler import LossScale
from ltfast.step import TrainStep
from ltfast.update import Update
from tests.tape import TapeRecorder
from tests.test_compiled import KINDS
from tests.test_step import COUNTS, GROUPS, difference, make


class Counter:
    """A function with state: adds the input to a total, in one of two ways."""

    def __init__(self) -> None:
        self.total = torch.zeros(3)
        self.python_calls = 0

    def __call__(self, branch: str, x: Tensor) -> dict[str, Tensor]:
        self.python_calls += 1
        self.total += x if branch == "add" else -x
        return {"total": self.total.clone(), "twice": 2 * x}


def test_replays_continue_the_state_and_run_no_python() -> None:
    function, told = Counter(), []
    captured = Captured(function, "count", TapeRecorder(), lambda name, **values: told.append((name, values)))
    total = torch.zeros(3)
    for step in range(12):
        x = torch.full((3,), float(step))
        branch = "subtract" if step % 3 == 2 else "add"
        total += x if branch == "add" else -x
        out = captured(branch, x)
        torch.testing.assert_close(out["total"], total, rtol=0, atol=0)
        torch.testing.assert_close(out["twice"], 2 * x, rtol=0, atol=0)
    assert function.python_calls == 2 * (WARMUP + 1)  # both branches: warm-up, then one recording
    assert [name for name, _ in told] == ["count, add", "count, subtract"]
    assert all(values["reason"] is None for _, values in told)


def test_the_tape_notices_state_that_moves() -> None:
    """The rule that recorded state is changed in place: without it a replay reads what the recording read."""
    box = {"total": torch.zeros(())}

    def moving(branch: str, x: Tensor) -> Tensor:
        box["total"] = box["total"] + x
        return box["total"]

    captured = Captured(moving, "moving", TapeRecorder())
    results = [float(captured("", torch.ones(()))) for _ in range(6)]
    assert results != [1, 2, 3, 4, 5, 6]


class Broken:
    """A recorder that cannot record."""

    def aside(self) -> AbstractContextManager[None]:
        return nullcontext()

    def record(self, function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        raise RuntimeError("operation not permitted\n when stream is capturing")


def test_a_failed_recording_runs_everything_as_it_is_and_says_so_once() -> None:
    function, told = Counter(), []
    captured = Captured(function, "count", Broken(), lambda name, **values: told.append(values["reason"]))
    for _ in range(8):
        out = captured("add", torch.ones(3))
    assert out["total"].tolist() == [8, 8, 8]
    assert told == ["RuntimeError: operation not permitted when stream is capturing"]
    assert captured.reason == told[0]


@pytest.mark.parametrize("first", [ValueError("why"), torch.OutOfMemoryError("short")])
def test_the_error_inside_a_broken_recording_is_told(first: Exception) -> None:
    """Ending the recording raises another one; what the error itself came from is its own affair."""

    class Ends(Broken):
        def record(self, function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
            try:
                function()
            finally:
                raise RuntimeError("operation failed due to a previous error during capture")

    calls = []

    def fails(branch: str, x: torch.Tensor) -> torch.Tensor:
        calls.append(branch)
        if len(calls) == 2:
            raise first from KeyError("before")
        return x

    captured = Captured(fails, "count", Ends(), warmup=1)
    captured("add", torch.ones(3))
    if isinstance(first, torch.OutOfMemoryError):
        with pytest.raises(torch.OutOfMemoryError, match="short"):
            captured("add", torch.ones(3))
    else:
        captured("add", torch.ones(3))
        assert captured.reason == "ValueError: why"


def test_after_a_failed_recording_nothing_else_is_recorded() -> None:
    """Each says why it is eager when its turn to record comes; what was recorded before goes on."""
    told, failure, tape = [], Failure(), TapeRecorder()

    def captured(name: str, recorder: Any) -> Captured:
        return Captured(Counter(), name, recorder, lambda *a, **values: told.append((*a, values["reason"])), 1, failure)

    before, broken, after = captured("views", tape), captured("step", Broken()), captured("next step", tape)
    for turn in (before, broken, after):
        for _ in range(4):
            out = turn("add", torch.ones(3))
        assert out["total"].tolist() == [4, 4, 4]
    assert before("add", torch.ones(3))["total"].tolist() == [5, 5, 5]
    assert before.function.python_calls == 2
    assert len(tape.tapes) == 1
    reason = "RuntimeError: operation not permitted when stream is capturing"
    assert told == [("views, add", None), ("step, add", reason), ("next step, add", reason)]


def test_views_are_recorded_apart_from_steps_and_share_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step's graphs are destroyed when groups appear; neither the views' nor the next step's may need anything of them."""
    made: list[Captured] = []
    monkeypatch.setattr(build, "CudaRecorder", lambda device: TapeRecorder())
    monkeypatch.setattr(build, "Captured", lambda *args, **named: made.append(Captured(*args, **named)) or made[-1])
    source: Any = SimpleNamespace(make_batch=lambda draw, key: None)
    capture = build.build_capture(
        build_config("digits-lt", "bcl", {}, {"capture": "on"}), source, torch.device("cuda"), Ranks()
    )
    assert capture is not None
    step, regrouped = capture(Counter()), capture(Counter())
    assert made[0].name == "views"
    assert len({id(each.recorder) for each in (made[0], step, regrouped)}) == 3
    assert made[0].failure is step.failure is regrouped.failure


def test_other_shapes_are_refused() -> None:
    captured = Captured(Counter(), "count", TapeRecorder())
    captured("add", torch.ones(3))
    with pytest.raises(ValueError, match=r"count: recorded for torch.float32 \(3,\), got torch.float32 \(1,\)"):
        captured("add", torch.ones(1))


KINDS_RECORDED: dict[str, tuple[Rule | None, str, int]] = {
    **{name: (*kind, 1) for name, kind in KINDS.items()},
    "gsa-full": (*KINDS["gsa-full"], 2),  # refresh and reuse of the Gram matrix
    "one-view ascent": (*KINDS["one-view ascent"], 2),  # climb and repeat
    "cc-sam": (RULES["cc-sam"], "classes", 1),
    "per group": (Rule(groups="bank", direction="orthogonal", rho=None, objective="per_group"), "groups", 1),
    "friendly per group": (Rule(groups="bank", direction="friendly", objective="per_group"), "groups", 1),
}


def recorded_run(
    name: str, recorder: TapeRecorder | None, steps: int
) -> tuple[Any, list[dict[str, Tensor]], TrainStep]:
    rule, kind, _ = KINDS_RECORDED[name]
    net, objective, batch = make("bcl")
    flat = FlatParameters(net.parameters())
    scaler = LossScale(torch.device("cpu"), initial=64.0, interval=3) if name == "sam" else None
    update = Update(flat, weight_decay=1e-3, clip=2.0, scaler=scaler, kind="adamw" if name == "imbsam" else "sgd")
    update.anchor = Anchor(torch.ones_like(flat.data), torch.zeros_like(flat.data))
    step = TrainStep(
        net, objective, flat, FlatBuffers(net), update, rule,
        None if rule is None else membership_for(kind, COUNTS, GROUPS),
        capture=None if recorder is None else lambda take: Captured(take, "step", recorder),
    )  # fmt: skip
    net.train()
    results = []
    for i in range(steps):
        update.lr.fill_(0.02 / (i + 1))
        update.alpha.fill_(0.9 - 0.01 * i)
        update.strength.fill_(0.01 * i)
        views = tuple(v.roll(i, -1) for v in batch.views)
        if i == 5:  # a batch that overflows: skipped by tensors, so a replay skips it as well
            views = (views[0] * float("inf"), *views[1:])
        result = step(Batch(views, batch.labels.roll(i), batch.index))
        assert step.features is not None
        results.append({**{k: v.clone() for k, v in result.items()}, "features": step.features.clone()})
        results[-1] |= {f"ascent {k}": v.clone() for k, v in step.ascent_stats.items()}
    return net, results, step


@pytest.mark.parametrize("name", KINDS_RECORDED)
def test_recorded_steps_are_the_eager_ones_bit_for_bit(name: str) -> None:
    """Weights, statistics and every figure of 16 steps, 13 of them (mode R and repeats: 10) without any Python."""
    steps, recorder = 16, TapeRecorder()
    net, expected, _ = recorded_run(name, None, steps)
    twin, results, step = recorded_run(name, recorder, steps)
    assert len(recorder.tapes) == KINDS_RECORDED[name][2]
    assert difference(net, twin) == 0
    for a, b in zip(net.buffers(), twin.buffers(), strict=True):
        assert torch.equal(a, b)
    for i, (a, b) in enumerate(zip(expected, results, strict=True)):
        for key, value in a.items():
            torch.testing.assert_close(b[key], value, rtol=0, atol=0, equal_nan=True, msg=f"{key} of step {i}")
    assert float(step.update.skipped) == 1


def test_the_schedule_of_branches() -> None:
    """gram_every counts ascents; ascent_every counts steps."""
    net, objective, _ = make("bcl")
    flat = FlatParameters(net.parameters())
    rule = Rule(**{**vars(RULES["gsa-full"]), "gram_every": 3, "ascent_every": 2})
    step = TrainStep(
        net, objective, flat, FlatBuffers(net), Update(flat), rule, membership_for("groups", COUNTS, GROUPS)
    )
    assert step.engine is not None
    step.engine.remembers = step.engine.holds_rest = True
    branches = [step.next_branch() for _ in range(10)]
    assert branches == ["exact", "repeat", "stale", "repeat", "stale", "repeat", "exact", "repeat", "stale", "repeat"]
    state = copy.deepcopy(step.engine.state())
    after = [step.next_branch() for _ in range(5)]
    step.engine.load_state(state)
    assert [step.next_branch() for _ in range(5)] == after


@pytest.mark.parametrize("name", sorted(RULES))
def test_every_rule_is_recorded_by_one_of_its_kind(name: str) -> None:
    """So that a new rule does not stay unrecorded: its path through TrainStep is among the kinds above."""
    kinds = {(r.scope, r.objective, r.split) for r, _, _ in KINDS_RECORDED.values() if r is not None}
    rule = RULES[name]
    assert (rule.scope, rule.objective, rule.split) in kinds


def test_a_recorded_refresh_is_remembered_after_a_warm_up_was_undone() -> None:
    """Else every step would be an exact one: the recording was made where there was a Gram matrix already."""
    step = recorded_run("gsa-full", TapeRecorder(), 16)[2]
    batch, engine = make("bcl")[2], step.engine
    assert engine is not None
    engine.load_state({"steps": torch.tensor(0), "seen": torch.zeros_like(engine.seen)})
    branches = []
    for _ in range(5):
        step(batch)
        branches.append(engine.next_branch())
        engine.steps -= 1
    assert branches == ["stale", "stale", "stale", "exact", "stale"]


@pytest.mark.parametrize("recorded", [False, True])
def test_the_first_refresh_after_a_warm_up_was_undone_compares_nothing(recorded: bool) -> None:
    """There is no remembered direction, though the recording was made where there was one."""
    step = recorded_run("gsa-full", TapeRecorder() if recorded else None, 16)[2]
    batch, engine = make("bcl")[2], step.engine
    assert engine is not None
    assert engine.refresh[1] > 0
    engine.load_state({"steps": torch.tensor(0), "seen": torch.zeros_like(engine.seen)})
    step(batch)
    assert engine.refresh.tolist() == [0, 0, 1]
    engine.steps = 0
    step(batch)
    assert engine.refresh[1] == 1
    assert engine.refresh[0] == engine.refresh[2] > 0.9  # the same batch again


@pytest.mark.parametrize("recorded", [False, True])
def test_a_step_that_is_replaced_is_gone_at_once(recorded: bool) -> None:
    """With its rows and recordings, not when Python next collects garbage: that may be while the new one is recorded."""
    step = recorded_run("gsa-full", TapeRecorder() if recorded else None, WARMUP + 2)[2]
    gc.collect()
    gc.disable()
    try:
        gone = weakref.ref(step)
        del step
        assert gone() is None
    finally:
        gc.enable()


def test_no_garbage_is_collected_while_a_graph_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph that is destroyed meanwhile breaks the recording, so old ones go before."""

    class Old:
        def __init__(self) -> None:
            self.itself = self

    for name in ("Stream", "graph_pool_handle", "CUDAGraph", "current_stream", "set_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: SimpleNamespace(device=None, replay=None))
    monkeypatch.setattr(torch.cuda, "graph", lambda *_, **__: nullcontext())
    recorder, old = CudaRecorder(torch.device("cuda")), Old()
    gone = weakref.ref(old)
    del old
    assert recorder.record(lambda: (gone(), gc.isenabled()))[1] == (None, False)
    assert gc.isenabled()

    def fails() -> None:
        raise RuntimeError("not recorded")

    with pytest.raises(RuntimeError, match="not recorded"):
        recorder.record(fails)
    assert gc.isenabled()


class Lines:
    """Streams that note who waits for whom."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.said: list[str] = []
        lines = self

        class Stream:
            def __init__(self, name: str) -> None:
                self.name, self.device = name, None

            def wait_stream(self, other: Stream) -> None:
                lines.said.append(f"{self.name} waits for {other.name}")

        self.side, self.current = Stream("side"), Stream("main")

        @contextmanager
        def inside(stream: Stream) -> Iterator[None]:
            before, self.current = self.current, stream
            yield
            self.current = before

        def select(stream: Stream) -> None:
            self.current = stream

        for name, value in (
            ("Stream", lambda _: self.side), ("stream", inside), ("current_stream", lambda *_: self.current),
            ("set_stream", select), ("graph_pool_handle", lambda: "pool"), ("CUDAGraph", lambda: SimpleNamespace(replay=None)),
        ):  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, value)


def test_the_side_stream_and_the_current_one_wait_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = Lines(monkeypatch)
    with CudaRecorder(torch.device("cuda")).aside():
        lines.said.append(f"work on {lines.current.name}")
    assert lines.said == ["side waits for main", "work on side", "main waits for side"]
    assert lines.current.name == "main"


def test_a_recording_shares_memory_and_stream_and_leaves_no_stream_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    lines, given = Lines(monkeypatch), []

    def graph(*_: Any, **options: Any) -> AbstractContextManager[None]:
        given.append(options)
        return nullcontext()

    def fails() -> None:
        lines.current = lines.side  # as if the recording could not be ended
        raise RuntimeError("not recorded")

    monkeypatch.setattr(torch.cuda, "graph", graph)
    recorder = CudaRecorder(torch.device("cuda"))
    recorder.record(lambda: None)
    assert given == [{"pool": "pool", "stream": lines.side, "capture_error_mode": "thread_local"}]
    with pytest.raises(RuntimeError, match="not recorded"):
        recorder.record(fails)
    assert lines.current.name == "main"


def test_memory_that_does_not_suffice_for_a_recording_is_told_as_such() -> None:
    """Not taken for a reason to go on eagerly."""

    class Full(Broken):
        def record(self, function: Callable[[], Any]) -> Any:
            raise torch.OutOfMemoryError("CUDA out of memory")

    captured = Captured(Counter(), "count", Full(), warmup=1)
    captured("add", torch.ones(3))
    with pytest.raises(torch.OutOfMemoryError):
        captured("add", torch.ones(3))
    assert captured.reason is None


def test_other_dtypes_are_refused() -> None:
    captured = Captured(Counter(), "count", TapeRecorder())
    captured("add", torch.ones(3))
    with pytest.raises(ValueError, match=r"count: recorded for torch.float32 \(3,\), got torch.float64 \(3,\)"):
        captured("add", torch.ones(3).double())


def test_the_first_call_is_never_recorded() -> None:
    function = Counter()
    captured = Captured(function, "count", TapeRecorder(), warmup=0)
    for _ in range(3):
        out = captured("add", torch.ones(3))
    assert out["total"].tolist() == [3, 3, 3]
    assert len(captured.recorder.tapes) == 1
    assert captured.branches["add"].calls == 3
    assert function.python_calls == 2


def test_recordings_go_when_another_one_fails() -> None:
    """Their memory, too: nothing replays them any more."""

    class Second(TapeRecorder):
        def record(self, function: Callable[[], Any]) -> Any:
            if self.tapes:
                raise RuntimeError("no second one")
            return super().record(function)

    captured = Captured(Counter(), "count", Second(), warmup=1)
    for branch in ("add", "add", "subtract", "subtract"):
        captured(branch, torch.ones(3))
    assert captured.reason == "RuntimeError: no second one"
    assert not captured.branches
