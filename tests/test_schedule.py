"""Schedules at hand-computed positions of a run."""

from __future__ import annotations

import math

import pytest
import torch

from ltfast.config import Optim, Preserve
from ltfast.preserve.anchor import stream_anchor
from ltfast.schedule import alpha_at, lambda_of, lr_at, scouting_epochs


def optim(schedule: str, warmup: float = 0.0, epochs: int = 50) -> Optim:
    return Optim(epochs=epochs, lr=0.2, schedule=schedule, warmup=warmup)


@pytest.mark.parametrize("schedule", ["multistep", "cosine", "constant"])
def test_the_warm_up_rises_in_a_line_from_one_part_to_the_whole_rate(schedule: str) -> None:
    warm = optim(schedule, warmup=4.0)
    rates = [lr_at(warm, epoch) / 0.2 for epoch in (0.0, 1.0, 2.5, 4.0)]
    assert rates == pytest.approx([1 / 5, 2 / 5, 3.5 / 5, 1.0], rel=1e-12)
    assert lr_at(optim(schedule), 0.0) == 0.2


def test_multistep_falls_to_a_tenth_at_80_and_at_90_percent() -> None:
    rates = [lr_at(optim("multistep"), epoch) / 0.2 for epoch in (0.0, 39.99, 40.0, 44.99, 45.0, 49.99)]
    assert rates == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01], rel=1e-12)


@pytest.mark.parametrize("warmup", [0.0, 10.0])
def test_the_cosine_begins_behind_the_warm_up_and_ends_at_zero(warmup: float) -> None:
    rates = [
        lr_at(optim("cosine", warmup), warmup + part * (50 - warmup)) / 0.2 for part in (0.0, 1 / 3, 1 / 2, 2 / 3, 1.0)
    ]
    assert rates == pytest.approx([1, 3 / 4, 1 / 2, 1 / 4, 0], rel=1e-9, abs=1e-12)
    assert lr_at(optim("cosine", warmup), 60.0) == pytest.approx(0, abs=1e-12)  # does not rise again


def test_a_warm_up_of_the_whole_run_leaves_the_cosine_nothing() -> None:
    whole = optim("cosine", warmup=50.0)
    assert math.isfinite(lr_at(whole, 49.99))
    assert lr_at(whole, 50.0) == 0.2


def test_a_constant_rate_stays() -> None:
    assert lr_at(optim("constant", 5.0), 49.9) == 0.2


def test_alpha_goes_from_start_to_end_by_a_cosine() -> None:
    preserve = Preserve(alpha_start=0.9, alpha_end=0.5)
    found = [alpha_at(preserve, progress) for progress in (0.0, 1 / 3, 0.5, 2 / 3, 1.0)]
    assert found == pytest.approx([0.9, 0.8, 0.7, 0.6, 0.5], rel=1e-12)


def test_gkp_is_weaker_for_few_classes_unless_its_strength_is_given() -> None:
    """The same curvature beside the loss's as the paper's 10 has for 1,000: groups are divided by their classes."""
    found = [lambda_of(Preserve(), classes) for classes in (2, 10, 999, 1000, 8142)]
    assert found == pytest.approx([0.02, 0.1, 9.99, 10.0, 10.0])
    assert lambda_of(Preserve(gkp_normalise="samples"), 10) == 10.0
    assert [lambda_of(Preserve(gkp_lambda=value), 10) for value in (0.0, 10.0, 30.0)] == [0.0, 10.0, 30.0]


def test_the_curvature_of_gkp_beside_that_of_the_loss() -> None:
    """(1 - alpha) lambda G^2 (G - 1) / C for groups of equal size and Fisher: a tenth at most."""
    fisher, groups = torch.rand(7), 4
    for classes, expected in ((100, 0.096), (1000, 0.096), (10_000, 0.0096)):
        sizes = torch.full((groups,), classes / groups)
        anchor = stream_anchor([(torch.zeros(7), fisher)] * groups, sizes)
        preserve = Preserve(groups=groups)
        strength = (1 - alpha_at(preserve, 1.0)) * lambda_of(preserve, classes)
        torch.testing.assert_close(strength * anchor.weight, expected * fisher)


def test_scouting_takes_its_share_at_least_one_epoch_and_none_with_a_bank() -> None:
    assert [scouting_epochs(Preserve(scout=share), 50) for share in (0.0, 0.014, 0.4, 1.0)] == [1, 1, 20, 50]
    assert scouting_epochs(Preserve(scout=0.036), 50) == 2  # 1.8: to the nearest
    assert [scouting_epochs(Preserve(scout=0.8), epochs) for epochs in (1, 2, 3, 4, 200)] == [1, 1, 2, 3, 160]
    assert [scouting_epochs(Preserve(scout=1.0), epochs) for epochs in (1, 2)] == [1, 2]
    assert scouting_epochs(Preserve(scout=0.4, bank="runs/a"), 50) == 0
