"""What a run writes down for the report."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from ltfast import observe
from ltfast.data.base import Batch
from ltfast.flat import FlatParameters
from ltfast.models import LongTailModel
from ltfast.observe import (
    AscentMeter,
    finite,
    forces_row,
    gradient_gram,
    head_and_tail,
    marked_epochs,
    quality_row,
    refresh_row,
)
from ltfast.optim.engine import Engine
from ltfast.optim.rules import RULES
from ltfast.preserve import Anchor, Quality


@pytest.mark.parametrize(
    ("counts", "head", "tail"),
    [
        ([200, 150, 50, 10, 5], [0, 1], [3, 4]),
        ([5, 150, 50, 10, 200], [1, 4], [0, 3]),
        ([90, 80, 70, 60, 50, 40], [0, 1], [4, 5]),  # neither many- nor few-shot classes
        ([500, 400, 300, 300], [0], [3]),  # no few-shot class; equal sizes keep their order
        ([7, 3], [0], [1]),
    ],
)
def test_head_and_tail(counts, head, tail):
    found = head_and_tail(torch.tensor(counts))
    assert found[0].tolist() == head
    assert found[1].tolist() == tail


def test_marked_epochs_lie_in_the_run():
    assert marked_epochs(60) == (20, 40)
    assert [marked_epochs(epochs) for epochs in (1, 2, 3)] == [(1, 1), (1, 1), (1, 2)]


def test_finite_is_json():
    assert finite(torch.tensor([1.23456789, float("nan"), float("inf"), -float("inf"), 0.0])) == [
        1.2346,
        None,
        None,
        None,
        0.0,
    ]


def test_quality_of_very_many_classes_is_summarised():
    counts = torch.cat([torch.full((600,), 200), torch.full((600,), 5)])
    value = torch.arange(1200, dtype=torch.float64)
    value[0] = -torch.inf
    counts[-1] = 1  # no spread: its Q says nothing
    row = quality_row(Quality(value, value, value), counts)
    assert row["quality"] == {"many": 300.0, "medium": None, "few": 899.0}
    short = quality_row(Quality(value[:3], value[:3], value[:3]), counts[:3])
    assert short["variance"] == [None, 1.0, 2.0]


def stats(radius, clipped, length):
    radius = torch.tensor(radius)
    zeros = torch.zeros_like(radius)
    return {
        "radius": radius, "clipped": torch.tensor(clipped), "fallback": zeros, "norm_sq": torch.full_like(radius, 4.0),
        "length_sq": torch.tensor(length), "ok": torch.tensor(1.0),
    }  # fmt: skip


def test_meter_means_over_the_steps_that_hold_the_group():
    meter = AscentMeter(steps=6)
    meter.add(0, stats([0.2, 0.1], [1.0, -1.0], 9.0))
    meter.add(1, stats([0.4, 0.0], [0.0, 0.0], 1.0))
    meter.add(2, {})
    row = meter.result()
    assert row["steps"] == [2.0, 1.0]
    assert row["radius"] == pytest.approx([0.3, 0.1])
    assert row["above"] == [0.5, 0.0]
    assert row["below"] == [0.0, 1.0]
    assert row["length"] == [2.0, 3.0]
    assert row["norm"][0] == 2.0
    assert meter.result() == {}


def test_meter_leaves_out_a_skipped_step():
    """Whose Gram matrix was not finite, and with it its lengths."""
    meter = AscentMeter(steps=4)
    meter.add(0, {**stats([0.5], [0.0], 1.0), "length_sq": torch.tensor(torch.nan)}, torch.tensor(0.0))
    meter.add(1, stats([0.1], [0.0], 4.0), torch.tensor(1.0))
    row = meter.result()
    assert row["steps"] == [1.0]
    assert row["radius"] == pytest.approx([0.1])
    assert row["length"] == [2.0]


def test_meter_of_a_group_that_few_ranks_have_seen():
    """Sums come as means over the ranks: of eight, one has had it."""
    meter = AscentMeter(steps=4)
    meter.add(0, stats([0.2], [0.0], 9.0))
    assert meter.sums is not None
    meter.sums /= 8
    row = meter.result()
    assert row["steps"] == [0.125]
    assert (row["radius"], row["length"]) == (pytest.approx([0.2]), [3.0])


def test_meter_samples_long_epochs():
    meter = AscentMeter(steps=1600)
    for step in range(1600):
        meter.add(step, stats([0.1], [0.0], 1.0))
    assert meter.result()["steps"] == [16.0]


def test_meter_begins_afresh_with_other_groups():
    """The scouting epochs end in mid-epoch of a resumed run, and the ascent of one group may become one of many."""
    meter = AscentMeter(steps=4)
    meter.add(0, stats([0.5], [0.0], 1.0))
    meter.add(1, stats([0.1, 0.2], [0.0, 0.0], 1.0))
    assert meter.result()["radius"] == pytest.approx([0.1, 0.2])


def trainer_of(**values):
    """What the rows read of a Trainer."""
    step = SimpleNamespace(engine=None)
    return SimpleNamespace(**{"step": step, "groups": None, "ranks": None, **values})


def test_forces_are_those_that_the_update_applies():
    theta, target = torch.tensor([3.0, 4.0, 0.0]), torch.tensor([1.0, 4.0, 2.0])
    anchor, strength = torch.tensor([0.5, 9.0, 2.0]), torch.tensor(0.2)
    update = SimpleNamespace(weight_decay=0.01, anchor=None, strength=strength, alpha=torch.tensor(0.75))
    trainer = trainer_of(update=update, flat=SimpleNamespace(data=theta), encoder=slice(1, 3))
    assert forces_row(trainer) == pytest.approx({"theta": 5.0, "decay": 0.04})
    update.anchor = Anchor(anchor, target)
    # strength A (theta - T) = (.2, 0, -.8); strength / 2 sum A (theta - T)^2 = .1 (2 + 8)
    expected = {"theta": 5.0, "decay": 0.04, "gkp": 0.68**0.5, "gkp_loss": 1.0, "alpha": 0.75}
    assert forces_row(trainer) == pytest.approx(expected)


def test_refreshes_are_reported_once_as_their_mean():
    engine = SimpleNamespace(refresh=torch.tensor([1.5, 2.0, 0.6]))
    engine.forget_refreshes = lambda: engine.refresh.zero_()
    trainer = trainer_of(step=SimpleNamespace(engine=engine))
    assert refresh_row(trainer) == pytest.approx({"refreshes": 2.0, "refresh_cos": 0.75, "refresh_min": 0.6})
    assert refresh_row(trainer) == {}
    assert refresh_row(trainer_of()) == {}


def test_probes_and_marked_weights_come_when_they_should(monkeypatch):
    monkeypatch.setattr(observe, "probe_row", lambda trainer: {})
    monkeypatch.setattr(observe, "forces_row", lambda trainer: {})
    for epochs, probed, marked in (
        (40, [0, *range(3, 40, 4)], [13, 26]),
        (23, [0, *range(1, 23, 2)], [7, 15]),
        (5, list(range(5)), [1, 3]),
    ):
        rows, saved = [], []
        trainer = trainer_of(
            config=SimpleNamespace(optim=SimpleNamespace(epochs=epochs)), meter=AscentMeter(1),
            log=lambda kind, epoch, rows=rows, **_: rows.append((kind, epoch)), save_weights=saved.append,
        )  # fmt: skip
        for epoch in range(epochs):
            observe.observe_epoch(trainer, epoch)
        last = [*probed, epochs - 1] if probed[-1] != epochs - 1 else probed
        assert [epoch for kind, epoch in rows if kind == "probe"] == last
        assert saved == [f"epoch-{epoch}" for epoch in marked]


def test_a_probe_names_the_shots_that_exist_and_knows_the_groups():
    model = make_model()
    counts, labels = torch.tensor([150, 6, 4]), torch.arange(12) % 3
    images = torch.randn(12, 1, 3, 4)
    source = SimpleNamespace(
        train_counts=counts, train_labels=labels,
        evaluate=lambda split, index: [Batch((images[index],), labels[index], index)],
    )  # fmt: skip
    objective = SimpleNamespace(classification=lambda x, y: nn.functional.cross_entropy(x, y, reduction="none"))
    trainer = trainer_of(source=source, model=model, flat=FlatParameters(model.parameters()), objective=objective)
    row = observe.probe_row(trainer)
    assert row["names"] == ["many", "few"]  # no medium-shot class
    assert set(row) == {"names", "shots"}
    trainer.groups = torch.tensor([0, 1, 2])
    row = observe.probe_row(trainer)
    with torch.no_grad():
        each = objective.classification(model.eval()(images), labels)
    for name, groups in (("shots", [labels == 0, labels > 0]), ("groups", [labels == k for k in range(3)])):
        assert row[name]["loss"] == pytest.approx([float(each[g].mean()) for g in groups], rel=1e-3)
        assert [len(line) for line in row[name]["gram"]] == [len(groups)] * len(groups)


def make_model():
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.BatchNorm1d(5), nn.ReLU())
    return LongTailModel(encoder, 5, 3, projection=(4, 4))


def test_gradient_gram_is_that_of_the_group_means():
    model = make_model()
    images, labels = torch.randn(20, 1, 3, 4), torch.arange(20) % 3
    model(images)  # running statistics that are not the initial ones
    flat = FlatParameters(model.parameters())
    before, buffers = flat.data.clone(), {k: b.clone() for k, b in model.named_buffers()}
    parts = [slice(0, 7), slice(7, 20)]
    groups = [
        [Batch((images[p][:3],), labels[p][:3], labels[p][:3]), Batch((images[p][3:],), labels[p][3:], labels[p][3:])]
        for p in parts
    ]

    def loss(logits, y):
        return nn.functional.cross_entropy(logits, y, reduction="none")

    gram, losses = gradient_gram(model, flat, loss, groups)
    assert model.training
    assert all(p.grad is None for p in flat.params)
    assert torch.equal(before, flat.data)
    assert all(torch.equal(buffers[k], b) for k, b in model.named_buffers())

    model.eval()
    rows, values = [], []
    for p in parts:
        value = loss(model(images[p]), labels[p]).mean()
        grads = torch.autograd.grad(value, list(model.parameters()), allow_unused=True)
        rows.append(torch.cat([g.reshape(-1) for g in grads if g is not None]).double())
        values.append(value.detach().double())
    expected = torch.stack(rows) @ torch.stack(rows).T
    torch.testing.assert_close(gram, expected, rtol=1e-4, atol=0)  # observed 2e-6
    torch.testing.assert_close(losses, torch.stack(values), rtol=1e-5, atol=0)
    assert not torch.allclose(gram, torch.diag(gram.diagonal()), rtol=1e-2)
    # Two ranks that hold the same images: sums and counts add up, the means stay.
    double = SimpleNamespace(sum_=lambda tensor: tensor.mul_(2))
    again, values = gradient_gram(model, flat, loss, groups, double)
    torch.testing.assert_close(again, expected, rtol=1e-4, atol=0)
    torch.testing.assert_close(values, losses, rtol=1e-5, atol=0)


def test_an_engine_that_is_set_back_forgets_and_keeps_its_addresses():
    """As after untimed steps, which a recorded step outlives."""
    rule = dataclasses.replace(RULES["gsa-full"], gram_every=2, ascent_every=2)
    made = []
    for steps_before in (0, 5):
        torch.manual_seed(0)
        model = nn.Linear(4, 3)
        flat = FlatParameters(model.parameters())
        engine = Engine(flat, rule, torch.tensor([10.0, 5.0, 2.0]))
        start = {name: value.clone() for name, value in engine.state().items()}

        def climb(seed, model=model, engine=engine):
            x = torch.randn(8, 4, generator=torch.Generator().manual_seed(seed))
            values = nn.functional.cross_entropy(model(x), torch.arange(8) % 3, reduction="none")
            losses = torch.stack([part.mean() for part in values.split((3, 3, 2))])
            branch = engine.next_branch()
            if branch == "repeat":
                engine.repeat()
            else:
                engine.ascend(losses, torch.tensor([3.0, 3.0, 2.0]) / 8, branch)
            engine.flat.data.copy_(engine.kept)

        for step in range(steps_before):
            climb(100 + step)
        held = dict(engine.held)
        engine.load_state(start)
        climb(0)
        assert all(engine.held[name] is value for name, value in held.items())
        made.append(engine)
    fresh, back = made
    assert torch.equal(fresh.memory, back.memory)
    assert fresh.steps == back.steps == 1
    assert all(torch.equal(fresh.held[name], back.held[name]) for name in fresh.held)


def test_engine_logs_the_cosine_at_each_refresh():
    model = nn.Linear(4, 3)
    flat = FlatParameters(model.parameters())
    engine = Engine(
        flat, dataclasses.replace(RULES["gsa-full"], gram_every=2), torch.tensor([10.0, 5.0, 2.0])
    )  # two of one radius would cancel
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    shares = torch.tensor([3.0, 3.0, 2.0]) / 8
    for step in range(5):
        values = nn.functional.cross_entropy(model(x), torch.arange(8) % 3, reduction="none")
        losses = torch.stack([part.mean() for part in values.split((3, 3, 2))])
        engine.ascend(losses, shares, engine.next_branch())
        flat.data.copy_(engine.kept)
        assert engine.refresh[1] == step // 2  # the first refresh fills the memory: nothing to compare it with
    total, count, smallest = engine.refresh.tolist()
    # The weights did not move, so the remembered matrix is the exact one.
    assert total / count == pytest.approx(1, abs=1e-6)
    assert smallest == pytest.approx(1, abs=1e-6)
