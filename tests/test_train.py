"""Training on the embedded digits: the loss falls, the tail gains over plain cross-entropy, the same seed the same weights."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ltfast import build, checkpoint
from ltfast.build import build_membership
from ltfast.compiled import Compiler
from ltfast.data.base import Batch
from ltfast.dist import Ranks
from ltfast.errors import UserError
from ltfast.optim.rules import RULES
from ltfast.preserve import Anchor, QualityStats, group_sizes
from ltfast.preserve.anchor import critical_weight
from ltfast.preserve.knowledge import collapse_knowledge
from ltfast.progress import Progress
from ltfast.recipes import build_config, rule_of
from ltfast.schedule import alpha_at, lr_at
from ltfast.survive import Signals
from ltfast.train import Trainer, train

ROWS = Path(__file__).resolve().parent.parent / "benchmarks" / "results" / "digits-lt.jsonl"


def run(
    tmp_path: Path, method: str, name: str = "run", **flags: Any
) -> tuple[dict[str, Any], list[dict[str, Any]], Path]:
    """(test results, epoch rows, run folder) of a short run."""
    flags = {"epochs": 4, "scout": 0.5, "fisher_budget": 32, "tensorboard": False, **flags}
    folder = tmp_path / name
    result = train(build_config("digits-lt", method, {}, {"out": str(folder), **flags}))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return result, [r for r in rows if r["kind"] == "epoch"], folder


def made(method: str, **flags: Any) -> Trainer:
    """A run that has not begun and leaves nothing on the disk."""
    config = build_config("digits-lt", method, {}, {"device": "cpu", "fisher_budget": 16, **flags})
    return Trainer(config, None, Ranks(), Progress())


def test_loss_falls_and_the_tail_gains_over_cross_entropy(tmp_path: Path) -> None:
    """A third of the recipe's epochs; over ten full-length seeds see the committed rows below."""
    ours, epochs, _ = run(tmp_path, "gkp-gsa", epochs=20, scout=0.4)
    plain, plain_epochs, _ = run(tmp_path, "ce", "ce", epochs=20)
    for rows in (epochs, plain_epochs):
        assert rows[-1]["loss"] < 0.3 * rows[0]["loss"]
    assert ours["last"]["few"] > plain["last"]["few"] + 2


def test_committed_rows_show_the_margin() -> None:
    """Over seeds; single ones scatter, and one of ten falls short of cross-entropy."""
    few: dict[tuple[str, str], float] = {}
    for line in ROWS.read_text().splitlines():
        row = json.loads(line)
        method, _, seed = row["case"].split("/")
        if row["metric"] == "few":
            few[method, seed] = row["value"]
    seeds = {seed for method, seed in few if method == "gkp-gsa"}
    assert len(seeds) >= 10
    margins = [few["gkp-gsa", s] - few["ce", s] for s in seeds]
    assert sorted(margins)[1] > 2
    assert sum(margins) / len(margins) > 5
    error = statistics.stdev(margins) / len(margins) ** 0.5
    assert statistics.fmean(margins) - 2.3 * error > 2


@pytest.mark.slow
def test_the_margin_holds_over_five_seeds(tmp_path: Path) -> None:
    margins = []
    for seed in range(5):
        ours, _, _ = run(tmp_path, "gkp-gsa", f"g{seed}", seed=seed, epochs=60, scout=0.4, fisher_budget=128)
        plain, _, _ = run(tmp_path, "ce", f"c{seed}", seed=seed, epochs=60)
        margins.append(ours["last"]["few"] - plain["last"]["few"])
    assert sum(margins) / 5 > 5


@pytest.mark.parametrize(
    "method", ["asam", "friendly-sam", "imbsam", "focal-sam", "cc-sam", "gsa-full+gkp", "gsa-release"]
)
def test_every_kind_of_method_trains(tmp_path: Path, method: str) -> None:
    result, epochs, _ = run(tmp_path, method, epochs=2)
    assert len(epochs) == 2
    assert result["last"]["n"] == 400
    assert result["last"]["nonfinite"] == 0


@pytest.mark.parametrize("method", ["bcl+gkp", "bcl+gsa-exact", "balanced-softmax+gsa-full+gkp"])
def test_a_skipped_step_does_not_spoil_its_classes_in_the_bank(tmp_path: Path, method: str) -> None:
    """A picture with a NaN spreads through BatchNorm to all of its batch."""
    config = build_config("digits-lt", method, {}, {"epochs": 2, "scout": 0.5, "device": "cpu", "batch": 24})
    trainer = Trainer(config, None, Ranks(), Progress())
    make, steps = trainer.source.train, iter(range(10**6))

    def spoilt(*place: int) -> Iterator[Batch]:
        for batch in make(*place):
            if next(steps) == 1:
                batch.views[0][0, 0, 0, 0] = float("nan")
            yield batch

    trainer.source.train = spoilt  # type: ignore[method-assign]
    trainer.guard(Signals(False))
    trainer.model.train()
    trainer.train_epoch(0)
    total = float(trainer.sums["loss"])
    summary = trainer.summary()
    assert summary["skipped"] == 1
    assert summary["loss"] == pytest.approx(total / (trainer.source.steps_per_epoch - 1))
    counted = trainer.quality.counts.sum()
    assert counted == (trainer.source.steps_per_epoch - 1) * 24
    quality = trainer.quality.compute().quality
    assert torch.equal(quality.isfinite(), trainer.quality.counts > 0)
    trainer.remember(0)
    assert len(trainer.bank) == 1


def test_alpha_strength_and_learning_rate_follow_the_place_in_the_run() -> None:
    """alpha g + (1 - alpha) lambda A (theta - T); without an anchor the loss has the whole weight."""
    trainer = made("bcl+gkp", epochs=8, schedule="cosine", gkp_lambda=3.0, batch=128)
    config, theta, update = trainer.config, trainer.flat.data, trainer.update
    trainer.set_schedules(2.0)
    assert float(update.alpha) == 1
    update.anchor = Anchor(torch.ones_like(theta), theta.clone())
    trainer.set_schedules(2.5)
    alpha = alpha_at(config.preserve, 2.5 / 8)
    found = [float(value) for value in (update.alpha, update.strength, update.lr)]
    assert found == pytest.approx([alpha, (1 - alpha) * 3.0, lr_at(config.optim, 2.5)])

    places: list[float] = []
    trainer.set_schedules = places.append  # type: ignore[method-assign]
    trainer.guard(Signals(False))
    trainer.train_epoch(3)
    steps = trainer.source.steps_per_epoch
    assert places == [3 + i / steps for i in range(steps)]


def test_groups_are_made_after_scouting_and_then_every_so_many_epochs() -> None:
    for regroup, due in ((0, [2]), (3, [2, 5])):
        trainer, found = made("gkp-gsa", epochs=8, scout=0.25, regroup=regroup), []
        assert not trainer.grouping_due(2)  # nothing in the bank
        trainer.bank.update(torch.ones(10), trainer.flat.data[trainer.encoder], 0)
        for epoch in range(8):
            trainer.batch = 1  # taken up again in the middle of the epoch
            assert not trainer.grouping_due(epoch)
            trainer.batch = 0
            if trainer.grouping_due(epoch):
                found.append(epoch)
                trainer.groups = torch.zeros_like(trainer.counts)
        assert found == due
        assert not trainer.grouping_due(2)


def test_the_bank_takes_the_quality_of_each_epoch_as_long_as_groups_are_to_come() -> None:
    labels = torch.arange(10).repeat(9)
    noise, centres = torch.randn(2, 90, 64, generator=torch.Generator().manual_seed(0))
    for regroup in (0, 1):
        trainer = made("gkp-gsa", epochs=4, scout=0.25, regroup=regroup, lambda_q=0.25)
        dim, held = trainer.model.feature_dim, []
        for epoch, spread in enumerate((1.0, 0.5)):
            features, twin = (centres[labels] + spread * noise)[:, :dim], QualityStats(10, dim)
            trainer.quality.update(features, labels)
            twin.update(features, labels)
            trainer.remember(epoch)
            assert trainer.quality.counts.sum() == 0
            held.append(twin.compute(0.25).quality)
        assert (held[1] > held[0]).all()
        torch.testing.assert_close(trainer.bank.best, held[regroup])


def test_the_anchor_is_that_of_its_groups_and_capped(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = made("gkp-gsa", epochs=4, groups=3, gkp_normalise="samples", lr=5.0)
    torch.manual_seed(0)
    encoder, best = trainer.flat.data[trainer.encoder], torch.full((10,), -torch.inf)
    for epoch in range(4):
        best[epoch::4] = 1.0
        trainer.bank.update(best, encoder + 0.1 * torch.randn_like(encoder), epoch)
    told: dict[str, dict[str, Any]] = {}
    monkeypatch.setattr(trainer, "log", lambda kind, **values: told.update({kind: values}))
    trainer.group()
    assert trainer.groups is not None
    anchor = trainer.update.anchor
    assert anchor is not None
    for normalise in ("classes", "samples"):
        sizes = group_sizes(trainer.groups, trainer.source.train_counts, 3, normalise)
        twin = collapse_knowledge(
            trainer.model, trainer.flat, trainer.source, trainer.bank, trainer.groups, sizes,
            trainer.objective.classification, budget=16, seed=trainer.config.run.seed,
        )  # fmt: skip
        limit = critical_weight(5.0, 0.9, 0.2 * 10.0)
        assert 0 < (twin.weight > limit).sum() < len(encoder)
        same = torch.equal(anchor.weight[trainer.encoder], twin.weight.clamp_max(limit))
        assert same == (normalise == "samples")
    assert torch.equal(anchor.target[trainer.encoder], twin.target)
    assert anchor.weight.sum() == anchor.weight[trainer.encoder].sum()
    held = twin.weight > 0
    assert 0 < held.sum() < len(encoder)
    assert told["anchor"]["away"] == pytest.approx(float((encoder - twin.target)[held].norm() / encoder.norm()))


@pytest.mark.parametrize(
    ("distance", "note"), [(0, "where the encoder is now"), (1e-5, "1e-05 of the encoder's norm away")]
)
def test_the_anchors_distance_is_told_at_any_size(distance: float, note: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = made("gkp-gsa")
    told: list[str] = []
    monkeypatch.setattr(trainer.progress, "note", told.append)
    monkeypatch.setattr(trainer, "log", lambda kind, **values: None)
    held = torch.zeros_like(trainer.flat.data)
    held[trainer.encoder] = 1e-6
    trainer.stable(Anchor(held, trainer.flat.data * (1 - distance)))
    assert told == [f"GKP's anchor lies {note}, its strength lambda is 0.1"]


def test_the_test_split_sees_the_best_weights_too_and_the_last_ones_stay() -> None:
    trainer = made("ce", epochs=2)
    trainer.best = {"score": 50.0, "epoch": 7}
    last = trainer.flat.data.clone()
    written = {"last": last, "best": torch.randn_like(last)}
    trainer.best_written = lambda: True  # type: ignore[method-assign]
    trainer.load_weights = lambda name: trainer.flat.data.copy_(written[name])  # type: ignore[method-assign,assign]
    result = trainer.finish()
    assert torch.equal(trainer.flat.data, last)
    assert result["last"] == trainer.evaluate("test")
    trainer.flat.data.copy_(written["best"])
    assert result["best"] == {**trainer.evaluate("test"), "epoch": 7} != result["last"]


def test_same_seed_same_weights_other_seed_other_weights(tmp_path: Path) -> None:
    weights = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        _, _, folder = run(tmp_path, "gkp-gsa", name, seed=seed, epochs=2, deterministic=True)
        weights.append(checkpoint.load(folder / "checkpoints" / "last.safetensors")[0])
    torch.use_deterministic_algorithms(False)
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])
    assert not all(torch.equal(weights[0][k], weights[2][k]) for k in weights[0])


def test_regrouping_and_the_other_grouping_options(tmp_path: Path) -> None:
    flags = {
        "epochs": 4,
        "scout": 0.25,
        "regroup": 1,
        "center": True,
        "fisher": "batch",
        "gkp_normalise": "samples",
        "groups": 3,
    }
    _, epochs, folder = run(tmp_path, "gkp-gsa", **flags)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    groups = [r["groups"] for r in rows if r["kind"] == "group"]
    assert len(groups) == 3
    assert all(set(g) == {0, 1, 2} for g in groups)
    assert len(epochs) == 4


def test_the_losses_are_compiled_once_before_and_after_groups_appear(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scouting has one loss for all classes, but in the shape of the groups to come."""
    monkeypatch.setattr(
        build, "Compiler", lambda module, report, agree: Compiler(module, report, backend="eager", agree=agree)
    )
    _, epochs, folder = run(tmp_path, "gkp-gsa", epochs=2, compile="on")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [r["phase"] for r in epochs] == ["scout", "train"]
    compiled = [r["seconds"] for r in rows if r["kind"] == "compile" and r["what"] == "losses"]
    assert len(compiled) == 1
    assert epochs[0]["compiling"] == compiled[0] < epochs[0]["seconds"]  # evaluation, outside the epoch, is not in it


def test_cc_sam_has_a_limit_of_classes() -> None:
    """Its own rule can go in parts; one whose classes know of each other needs all in one Gram matrix."""
    config, rule = build_config("digits-lt", "ce+cc-sam", {}, {}), RULES["cc-sam"]
    for allowed, most in ((rule, 128), (dataclasses.replace(rule, direction="orthogonal"), 64)):
        assert build_membership(config, allowed, torch.full((most,), 5), None).shape == (most, most)
        with pytest.raises(UserError, match=f"{most + 1} classes, one group each, is more than {most}"):
            build_membership(config, allowed, torch.full((most + 1,), 5), None)


@pytest.mark.parametrize(
    ("method", "values", "most"),
    [("gsa-paper", {}, 64), ("gsa-full", {}, 64), ("gsa-release", {}, 32), ("gsa-paper", {"direction": "none"}, 128)],
)
def test_groups_that_no_gram_matrix_holds_are_refused_before_scouting(
    method: str, values: dict[str, Any], most: int
) -> None:
    counts = torch.full((200,), 5)
    for groups in (most, most + 1):
        config = build_config("digits-lt", method, {}, {"groups": groups, **values})
        if groups == most:
            assert build_membership(config, rule_of(config), counts, None).shape == (200, most)
        else:
            with pytest.raises(UserError, match=f"--groups {groups}: {method} takes at most {most} groups"):
                build_membership(config, rule_of(config), counts, None)
    config = build_config("digits-lt", "bcl+gkp", {}, {"groups": 150})  # GKP alone has no rows
    assert build_membership(config, rule_of(config), counts, None).shape == (200, 1)
