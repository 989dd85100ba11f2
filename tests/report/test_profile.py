"""The step profile of a short run."""

import shutil

import pytest
import torch
from torch.autograd import DeviceType

from ltfast.flat import FlatParameters
from ltfast.optim.engine import EXACT, REPEAT, STALE, Engine
from ltfast.optim.rules import Rule
from ltfast.report import profile as module
from ltfast.report.profile import part_of, profile, revive
from ltfast.report.runs import Missing, open_live, open_runs


class Event:
    def __init__(self, name, parent=None, device_type=DeviceType.CPU):
        self.name, self.cpu_parent, self.device_type = name, parent, device_type


def test_an_operation_counts_to_the_innermost_part():
    step = Event(module.STEP)
    backward = Event("autograd::engine::evaluate_function: MulBackward0", step)
    assert part_of(Event("aten::mul", backward)) == "backward"
    assert part_of(Event("aten::mul", step)) == "forward and loss"
    assert part_of(Event("aten::mul", Event("ltfast::perturb", step))) == "perturb"
    assert part_of(Event("aten::mul", Event(module.DATA))) == "data and views"
    assert part_of(Event("aten::mul")) is None


def test_spans_on_the_gpu_do_not_count_beside_the_kernels_in_them():
    """record_function marks the device's time line as well, from the first kernel inside to the last."""
    assert part_of(Event(module.STEP, device_type=DeviceType.CUDA)) is None
    assert part_of(Event(module.DATA, device_type=DeviceType.CUDA)) is None


@pytest.fixture(scope="module")
def lives(runs):
    return [open_live(open_runs([run])[0], device="cpu") for run in runs]


def test_parts_of_the_default_method_add_up(lives):
    before = {k: v.clone() for k, v in lives[0].model.state_dict().items()}
    ticks = []
    found = profile(lives[0], lambda: False, lambda: ticks.append(0))
    assert {"data and views", "forward and loss", "backward", "perturb", "update"} <= set(found["parts"])
    assert sum(found["parts"].values()) == pytest.approx(found["measured"])
    assert found["parts"]["backward"] > found["parts"]["update"]
    assert found["predicted"] > 0
    assert len(ticks) == 3 * (module.WARM + module.TIMED), "exact, remembered and plain steps"
    assert all(torch.equal(before[k], v) for k, v in lives[0].model.state_dict().items())


@pytest.mark.parametrize(
    ("gram", "ascent", "shares"),
    [(1, 1, {EXACT: 1}), (16, 1, {EXACT: 1 / 16, STALE: 15 / 16}), (4, 5, {EXACT: 0.05, STALE: 0.15, REPEAT: 0.8})],
)
def test_kinds_of_step_count_as_often_as_they_are_taken(gram, ascent, shares):
    rule = Rule(gram_every=gram, ascent_every=ascent)
    assert module.kinds(rule) == pytest.approx(shares)
    assert module.kinds(None) == {EXACT: 1.0}
    engine = Engine(FlatParameters([torch.nn.Parameter(torch.ones(3))]), rule, torch.ones(1))
    taken = []
    for _ in range(gram * ascent):
        taken.append(engine.next_branch())
        engine.taken(taken[-1])
    assert {kind: taken.count(kind) / len(taken) for kind in set(taken)} == pytest.approx(shares)


def test_the_mean_step_weighs_each_kind(lives, monkeypatch):
    """A median would be that of the commonest kind alone."""
    clock, cost = [0.0], {EXACT: 9.0, STALE: 3.0, REPEAT: 1.0}

    def take(trainer, kind, batch):
        clock[0] += cost[kind]

    monkeypatch.setattr(module, "take", take)
    monkeypatch.setattr(module.time, "perf_counter", lambda: clock[0])
    trainer = revive(lives[0])
    trainer.step.rule = Rule(gram_every=4, ascent_every=5)
    found = module.seconds_a_step(trainer, iter([None] * 99), lambda: False, lambda: None)
    assert found == pytest.approx(0.05 * 9 + 0.15 * 3 + 0.8 * 1)


def test_plain_descent_has_no_ascent_and_no_prediction(lives):
    found = profile(lives[1], lambda: False, lambda: None)
    assert found["predicted"] is None
    assert "perturb" not in found["parts"]


def test_revived_step_is_the_one_of_the_last_phase(lives):
    trainer = revive(lives[0])
    assert trainer.groups is not None
    assert trainer.update.anchor is not None
    assert trainer.step.group_counts.numel() == trainer.config.preserve.groups
    weights = lives[0].model.state_dict()
    assert all(torch.equal(weights[k], v) for k, v in trainer.model.state_dict().items())


def test_time_that_runs_out_is_said(lives):
    with pytest.raises(Missing, match="max-minutes"):
        profile(lives[1], lambda: True, lambda: None)


def test_a_run_that_was_stopped_while_scouting_takes_plain_steps(runs, tmp_path):
    """Nothing is predicted of a step that it does not take."""
    run = tmp_path / "run"
    shutil.copytree(runs[0], run)
    rows = [line for line in (run / "metrics.jsonl").read_text().splitlines() if '"group"' not in line[:20]]
    (run / "metrics.jsonl").write_text("\n".join(rows) + "\n")
    found = profile(open_live(open_runs([str(run)])[0], device="cpu"), lambda: False, lambda: None)
    assert found["predicted"] is None
    assert "perturb" not in found["parts"]
