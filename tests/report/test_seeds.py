"""Runs that differ in their seed alone."""

import math
import statistics

import pytest
from scipy import stats

from ltfast.recipes import build_config
from ltfast.report.runs import RunView
from ltfast.report.seeds import half_interval, over_seeds


def view(method, seed, top1, *, ended=True, fingerprint="a", **flags):
    """A run that ended with this accuracy; no folder stands behind it."""
    config = build_config("cifar10-lt", method, {}, {"seed": seed, "out": f"runs/{method}-{seed}", **flags})
    last = {"top1": top1, "many": 100.0, "medium": top1 - 1, "few": None, "ece": 5.0}
    data = {"class_names": ["a", "b"], "counts": [9, 2], "sizes": {"train": 11}, "fingerprint": fingerprint}
    return RunView(f"{method}-{seed}", None, config, {"data": [data], **({"test": [{"last": last}]} if ended else {})})


def test_runs_of_one_setting_are_one_row_and_compared_at_the_seeds_of_both():
    plain = [view("ce", seed, top1) for seed, top1 in ((0, 80.0), (1, 83.0), (2, 82.0))]
    other = [view("bcl", seed, top1) for seed, top1 in ((1, 85.0), (2, 88.0), (5, 30.0))]
    table = over_seeds([*plain, *other])
    first, second = (
        tuple(
            cell.replace("\N{NO-BREAK SPACE}\N{PLUS-MINUS SIGN}\N{NO-BREAK SPACE}", " +- ")
            if isinstance(cell, str)
            else cell
            for cell in row
        )
        for row in table.rows
    )
    assert first[:2] == ("ce", 3)
    assert first[2] == f"{statistics.fmean((80, 83, 82)):.1f} +- {statistics.stdev((80, 83, 82)):.1f}"
    assert first[3:7] == ("100.0 +- 0.0", "80.7 +- 1.5", None, "5.0 +- 0.0")
    assert first[7:] == ("", "ce-0, ce-1, ce-2")
    half = stats.t.ppf(0.975, 1) * statistics.stdev((2, 6)) / math.sqrt(2)
    assert second[7] == f"+4.0 +- {half:.1f}"  # seeds 1 and 2; seed 5 has no partner


def test_where_a_run_lies_and_on_which_gpu_is_no_setting_but_the_learning_rate_is():
    same = [view("ce", seed, 80.0, device=f"cuda:{seed}", data_dir=f"/data{seed}") for seed in (0, 1)]
    (row,) = over_seeds(same).rows
    assert row[1] == 2
    assert over_seeds([view("ce", 0, 80.0), view("ce", 1, 80.0, lr=0.3)]) is None


def test_other_pictures_are_another_setting_and_a_seed_may_come_twice():
    """Which pictures they are says the run's data row, not the folder."""
    runs = [view("ce", seed, top1, fingerprint=name, data_dir=f"/{name}") for name, seed, top1 in (
        ("a", 0, 80.0), ("a", 1, 81.0), ("b", 0, 20.0), ("b", 1, 21.0))]  # fmt: skip
    first, second = over_seeds(runs).rows
    assert (first[1], second[1]) == (2, 2)
    assert (first[2][:4], second[2][:4]) == ("80.5", "20.5")
    (row,) = over_seeds([view("ce", 0, 80.0), view("ce", 0, 90.0)]).rows
    assert (row[1], row[2][:4]) == (2, "85.0")
    assert over_seeds([view("gkp", 0, 80.0), view("gkp", 1, 81.0, bank="runs/x")]) is None


def test_runs_that_have_not_ended_and_settings_of_one_seed():
    assert over_seeds([view("ce", 0, 80.0), view("ce", 1, 0.0, ended=False)]) is None
    rows = over_seeds([view("ce", 0, 80.0), view("ce", 1, 81.0), view("bcl", 0, 85.0), view("sam", 7, 85.0)]).rows
    assert [row[1] for row in rows] == [2, 1, 1]
    assert rows[1][2:4] == ("85.0", "100.0")
    assert rows[1][7] == "+5.0 (one seed)"
    assert rows[2][7] is None


def test_interval_against_scipy_and_of_one_value():
    values = [1.0, 4.0, 2.5, 3.0]
    low, high = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    assert half_interval(values) == pytest.approx((high - low) / 2)
    assert half_interval([1.0]) == math.inf


def test_every_name_put_aside_is_an_option():
    from ltfast.config import FIELDS
    from ltfast.report.seeds import ASIDE

    assert set(ASIDE) <= set(FIELDS)
