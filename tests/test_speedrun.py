"""The speedrun recipe at smoke size: the warm-up leaves no trace, the table and the clock are there."""

from __future__ import annotations

import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from ltfast.cli import main
from ltfast.dist import Ranks
from ltfast.errors import UserError
from ltfast.observe import refresh_row
from ltfast.progress import Progress
from ltfast.recipes import NAMED, build_config, named_recipe
from ltfast.runs import RunFolder
from ltfast.speedrun import COLUMNS, TableProgress, warm_up
from ltfast.survive import Signals
from ltfast.train import Trainer, train
from tests.data.small_sets import write_cifar10


def test_recipe_runs_at_smoke_size_and_prints_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_cifar10(tmp_path / "data")
    out = tmp_path / "run"
    words = [
        "train", "--recipe", "cifar10-lt-speedrun", "--data-dir", str(tmp_path / "data"), "--imbalance", "4", "--epochs", "2",
        "--model", "resnet8-w8", "--batch", "16", "--device", "cpu", "--untimed-steps", "2", "--out", str(out),
    ]  # fmt: skip
    assert main(words) == 0
    printed = capsys.readouterr().out
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in printed.splitlines() if line.startswith("|")
    ]
    assert tuple(rows[0]) == COLUMNS
    assert [row[1] for row in rows[1:]] == ["1", "2", "eval"]
    seconds = [float(row[-1]) for row in rows[1:]]
    assert 0 < seconds[0] < seconds[1] == seconds[2]
    assert 0 <= float(rows[-1][4]) <= 100
    run = RunFolder.open(out)
    assert run.config.data.dataset == "cifar10-lt"
    assert run.config.loss.loss == "balanced-softmax"
    assert run.config.run.table
    assert seconds[1] == pytest.approx(sum(row["seconds"] for row in run.metrics("epoch")), abs=1e-3)


def test_grouping_is_on_the_clock(tmp_path: Path) -> None:
    """Its seconds are those of no epoch."""
    values = {"epochs": 2, "device": "cpu", "limit_train": 160, "fisher_budget": 16, "out": str(tmp_path / "run")}
    progress = TableProgress()
    train(build_config("digits-lt", "gkp-gsa", {}, values), progress=progress)
    run = RunFolder.open(tmp_path / "run")
    epochs, (group,) = run.metrics("epoch"), run.metrics("group")
    assert group["seconds"] > 0
    assert progress.seconds == pytest.approx(sum(row["seconds"] for row in (*epochs, group)), rel=1e-9)


@pytest.mark.parametrize(
    ("method", "gram_every"),
    [("balanced-softmax", None), ("balanced-softmax+sam", 2), ("balanced-softmax+friendly-sam", None)],
)
def test_warm_up_leaves_no_trace(method: str, gram_every: int | None) -> None:
    flags = {"epochs": 1, "device": "cpu", "batch": 32, "gram_every": gram_every}
    runs = []
    for steps in (0, 3):
        trainer = Trainer(build_config("digits-lt", method, {}, flags), None, Ranks(), Progress())
        trainer.guard(Signals(False))
        if steps:
            before = trainer.flat.data.clone()
            warm_up(trainer, steps)
            assert torch.equal(trainer.flat.data, before)
        trainer.train_epoch(0)
        runs.append((trainer.flat.data, trainer.buffers.data, trainer.summary()["loss"], refresh_row(trainer)))
    assert torch.equal(runs[0][0], runs[1][0])
    assert torch.equal(runs[0][1], runs[1][1])
    assert runs[0][2:] == runs[1][2:]


def test_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(UserError, match=re.escape("did you mean cifar10-lt-speedrun?")):
        named_recipe("cifar10-speedrun")
    assert all(build_config(dataset, method, values(), {}) for dataset, method, values in NAMED.values())


def test_the_clock_goes_on_where_a_run_was_stopped(tmp_path: Path) -> None:
    run = tmp_path / "run"
    values = {"epochs": 3, "device": "cpu", "limit_train": 160, "out": str(run)}

    class Once(TableProgress):
        def epoch(self, *args: Any) -> None:
            super().epoch(*args)
            signal.raise_signal(signal.SIGTERM)

    first, second = Once(), TableProgress()
    assert "stopped" in train(build_config("digits-lt", "ce", {}, values), progress=first)
    train(build_config("digits-lt", "ce", {}, values), resume=str(run), progress=second)
    assert first.seconds > 0
    whole = sum(row["seconds"] for row in RunFolder.open(run).metrics("epoch"))
    assert second.seconds == pytest.approx(whole, rel=1e-9)
