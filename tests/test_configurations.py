"""Settings that went wrong together: each is a small run, or a part of one, that said or did something else than it should."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ltfast.data import load
from ltfast.dist import Ranks
from ltfast.errors import UserError
from ltfast.optim import GSA
from ltfast.optim.rules import Rule
from ltfast.plan import flops_ratio, predicted_flops
from ltfast.predict import Preprocess
from ltfast.preserve import Anchor
from ltfast.progress import Progress
from ltfast.recipes import build_config, rule_of
from ltfast.resume import load_bank
from ltfast.train import Trainer, train
from ltfast.unread import unread


def trainer(method: str, **flags: Any) -> Trainer:
    """Of digits-lt, without a run folder."""
    config = build_config("digits-lt", method, {}, {"device": "cpu", "batch": 64, "epochs": 2, **flags})
    return Trainer(config, None, Ranks(), Progress())


def test_group_stratified_batches_of_imbsam_all_hold_tail_images() -> None:
    made = trainer("imbsam", sampler="group-stratified", batch=16, tail_below=20)
    tail = made.counts < 20
    batches = [batch for epoch in range(3) for batch in made.source.train(epoch)]
    assert all(bool(tail[batch.labels].any()) for batch in batches)
    assert unread(made.config, ["sampler"]) == []


@pytest.mark.parametrize(("method", "read"), [("bcl", False), ("bcl+sam", False), ("gkp", True), ("gsa-full", True)])
def test_a_sampler_by_groups_is_said_to_do_nothing_without_groups(method: str, read: bool) -> None:
    config = build_config("digits-lt", method, {}, {"sampler": "group-stratified"})
    assert unread(config, ["sampler"]) == ([] if read else ["sampler"])


@pytest.mark.parametrize(
    ("name", "value", "idle", "read"),
    [
        ("nesterov", True, {"optimizer": "adamw"}, {"optimizer": "sgd"}),
        ("scale", 7.0, {"classifier": "linear"}, {"classifier": "cosine"}),
        ("imbalance_type", "step", {"imbalance": 1.0}, {}),
        ("gram_every", 1, {"scope": "classifier"}, {"scope": "all"}),
        ("gram_ema", 0.1, {"scope": "classifier", "gram_every": 2}, {"gram_every": 2, "aggregate": "share"}),
        ("aggregate", "share", {"direction": "joint"}, {"direction": "orthogonal"}),
    ],
)
def test_an_option_is_said_to_do_nothing_exactly_where_it_does_nothing(
    name: str, value: Any, idle: dict[str, Any], read: dict[str, Any]
) -> None:
    def weights(**flags: Any) -> torch.Tensor:
        made = trainer("gsa-full", limit_train=90, **{"batch": 18, "rho": 0.05, **flags})
        made.fit()
        return made.flat.data

    for others, does in ((idle, False), (read, True)):
        config = build_config("digits-lt", "gsa-full", {}, {name: value, **others})
        assert unread(config, [name]) == ([] if does else [name])
        assert torch.equal(weights(**others), weights(**others, **{name: value})) != does


@pytest.mark.parametrize("skipped", [5, 6, 8])
def test_scouting_goes_on_until_a_step_was_of_use(skipped: int) -> None:
    """fp16's loss scale finds its size by skipped steps: five of the six of scouting, so that some classes have no entry, or all."""
    made = trainer("gkp-gsa", scout=0.0, epochs=3, limit_train=90, batch=15, fisher_budget=8)
    source: Any = made.source
    real, count = source.make_batch, itertools.count()

    def make_batch(*args: Any) -> Any:
        batch = real(*args)
        views = [view * math.nan for view in batch.views] if next(count) < skipped else batch.views
        return batch._replace(views=tuple(views))

    source.make_batch = make_batch
    made.fit()
    assert made.groups is not None
    assert made.groups.unique().tolist() == [0, 1, 2, 3]
    assert bool(made.flat.data.isfinite().all())


def test_an_image_that_is_drawn_again_looks_different() -> None:
    source: Any = trainer("ce", sampler="class-balanced").source
    rarest = int(source.train_labels.bincount().argmin())
    seen: dict[int, list[torch.Tensor]] = {}
    for batch in source.train(0):
        for i, label, picture in zip(batch.index.tolist(), batch.labels.tolist(), batch.views[0], strict=True):
            if label == rarest:
                seen.setdefault(i, []).append(picture)
    pictures = max(seen.values(), key=len)
    assert len(pictures) > 5
    assert all((a - b).abs().max() > 0.01 for a, b in itertools.pairwise(pictures))


def test_a_skipped_step_does_not_spoil_the_epochs_figures() -> None:
    made = trainer("ce", epochs=1, batch=32)
    source: Any = made.source
    real, calls, found = source.make_batch, [], []

    def make_batch(*args: Any) -> Any:
        calls.append(1)
        batch = real(*args)
        if len(calls) == 3:
            batch.views[0][0] = torch.nan
        return batch

    def summary() -> dict[str, Any]:
        found.append(Trainer.summary(made))
        return found[-1]

    source.make_batch, made.summary = make_batch, summary  # type: ignore[method-assign]
    made.fit()
    assert found[0]["skipped"] == 1
    assert 0 < found[0]["loss"] < 10
    assert found[0]["grad_norm"] > 0
    assert "good" not in found[0]


class Notes(Progress):
    """Keeps what is said."""

    def __init__(self) -> None:
        super().__init__()
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def test_scouting_to_the_end_is_said(tmp_path: Path) -> None:
    for epochs, said in ((1, True), (3, False)):
        flags = {"device": "cpu", "epochs": epochs, "out": str(tmp_path / str(epochs)), "tensorboard": False}
        progress = Notes()
        train(build_config("digits-lt", "gkp-gsa", {}, flags), progress=progress)
        assert any("for scouting: no groups" in note for note in progress.notes) == said


def test_a_bank_without_its_origin_cannot_be_centred(tmp_path: Path) -> None:
    out = str(tmp_path / "run")
    train(build_config("digits-lt", "gkp", {}, {"device": "cpu", "epochs": 2, "out": out, "tensorboard": False}))
    assert load_bank(Path(out))
    with pytest.raises(UserError, match="--center: the bank of"):
        load_bank(Path(out), center=True)


def test_the_cap_of_gkp_takes_the_smallest_alpha_of_the_run() -> None:
    largest = []
    for start, end in ((0.8, 0.95), (0.95, 0.8), (0.8, 0.8)):
        made = trainer("gkp", alpha_start=start, alpha_end=end, gkp_lambda=10.0)
        theta = made.flat.data
        capped = made.stable(Anchor(torch.full_like(theta, 1e9), theta.clone()))
        largest.append(float(capped.weight.max()))
    assert largest[0] == largest[1] == largest[2] < 1e9


def test_one_direction_for_all_groups_has_no_perturbation_of_each() -> None:
    with pytest.raises(ValueError, match="shared with direction joint"):
        Rule(direction="joint", objective="per_group")


def test_frozen_parameters_do_not_count_as_perturbed() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(30, 30), torch.nn.Linear(30, 3))
    model[0].requires_grad_(False)
    x, lengths = torch.randn(9, 30), []
    for params in (model.parameters(), model[1].parameters()):
        optimizer = GSA(params, torch.optim.SGD, [9, 5, 2], lr=0.0, adaptive=False)
        optimizer.step(
            lambda: (torch.stack([model(x).square()[:, k].mean() for k in range(3)]), torch.full((3,), 1 / 3))
        )
        lengths.append(float(optimizer.ascent.n_elements))
    assert lengths == [93.0, 93.0]


def test_predicted_cost_knows_the_number_of_views() -> None:
    config = build_config("digits-lt", "balanced-softmax+gsa-exact", {}, {"ascent_views": 1})
    assert predicted_flops(config, 10) == flops_ratio(rule_of(config), config.preserve.groups, 1)


def inat(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A small set in the form of iNaturalist 2018."""
    monkeypatch.setattr("ltfast.data.public._check_facts", lambda *_: None)
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        names = [f"{split}/{c}-{i}.png" for c in range(3) for i in range(3)]
        (folder / split).mkdir()
        for name in names:
            Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(folder / name)
        (folder / f"{split}.txt").write_text("".join(f"{name} {Path(name).name[0]}\n" for name in names))
    return load(
        "inat18", data_dir=folder, train_list=folder / "train.txt", val_list=folder / "val.txt", batch=2, num_views=1,
        loader="torch", workers=0, image_size=32,
    )  # fmt: skip


@pytest.mark.parametrize(("budget", "sizes"), [(33, [11, 11, 11]), (17, [9, 8]), (1, [2])])
def test_statistics_of_anchors_come_from_batches_of_one_size(
    budget: int, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each weighs the same in the mean, and none has one picture alone, which a network that ends at 1 x 1 pixel refuses."""
    made, found = trainer("ce+gkp", fisher_budget=budget, groups=2), []

    @contextmanager
    def reestimate(model: torch.nn.Module, images: Iterator[torch.Tensor]) -> Iterator[None]:
        found.append([len(pictures) for pictures in images])
        yield

    monkeypatch.setattr("ltfast.preserve.knowledge.reestimate_batchnorm", reestimate)
    made.source.eval_batch = 16
    made.bank.update(torch.ones(10), made.flat.data[made.encoder], 0)
    made.group()
    assert found == [sizes, sizes]


def test_one_picture_is_too_few_for_some_networks(tmp_path: Path) -> None:
    flags = {"device": "cpu", "batch": 1, "limit_train": 10, "model": "mobilenet_v3_small", "out": str(tmp_path / "a")}
    with pytest.raises(UserError, match="more than one picture"):
        train(build_config("digits-lt", "ce", {}, flags))


def test_an_operator_that_is_not_deterministic_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As on a GPU the backward pass of adaptive pooling is not."""

    def put(self: Any, batch: Any) -> None:
        torch.zeros(3).put_(torch.tensor([0]), torch.ones(1))

    monkeypatch.setattr("ltfast.step.TrainStep.__call__", put)
    config = build_config("digits-lt", "ce", {}, {"deterministic": True, "out": str(tmp_path / "run"), "device": "cpu"})
    try:
        with pytest.raises(UserError, match="--deterministic: put_, which --model resnet8 needs, is not deterministic"):
            train(config)
    finally:
        torch.use_deterministic_algorithms(False)


def test_prediction_normalises_as_training_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = inat(tmp_path, monkeypatch)
    batch = next(iter(source.evaluate("test")))
    again = Preprocess.of(source)(source.lists["test"].file(int(batch.index[0])))
    torch.testing.assert_close(again, batch.views[0][0], rtol=0, atol=1e-5)  # ImageNet's constants are .47 apart


def test_making_a_loader_draws_nothing_that_a_resumed_run_would_draw_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, before = inat(tmp_path, monkeypatch), torch.get_rng_state()
    assert len(list(source.train(0))) == 5
    assert torch.equal(before, torch.get_rng_state())  # dropout draws from it
