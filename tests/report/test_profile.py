"""The step profile of a short run."""

import pytest
import torch
from torch.autograd import DeviceType

from ltfast.optim.rules import Rule
from ltfast.report import profile as module
from ltfast.report.profile import part_of, profile, revive, whole_cycles
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
    assert len(ticks) == 2 * module.WARM + 16 + module.TIMED, "a whole cycle of Gram refreshes, and plain steps"
    assert all(torch.equal(before[k], v) for k, v in lives[0].model.state_dict().items())


@pytest.mark.parametrize(("gram", "ascent", "steps"), [(1, 1, 6), (16, 1, 16), (1, 5, 10), (16, 5, 80), (4, 1, 8)])
def test_every_kind_of_step_has_its_share_of_the_timed_ones(gram, ascent, steps):
    """gram_every 16 had its only exact step in the warm-up, and the median of ascent_every 5 was that of a repetition."""
    rule = Rule(gram_every=gram, ascent_every=ascent)
    assert whole_cycles(rule, 6) == steps
    assert whole_cycles(None, 6) == 6


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
