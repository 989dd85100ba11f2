"""Curvature and landscapes of a real run: the numbers belong to its weights, and the weights stay as they are."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from ltfast import checkpoint
from ltfast.report import geometry
from ltfast.report.budget import Budget
from ltfast.report.compute import Computed, compute_all
from ltfast.report.numbers import bank_epochs
from ltfast.report.runs import Missing, open_live, open_runs

pytestmark = pytest.mark.usefixtures("small")


def live_of(run):
    return open_live(open_runs([run])[0], device="cpu")


def never():
    return False


def nothing():
    pass


@pytest.fixture(scope="module")
def live(runs):
    return live_of(runs[0])


def direct_losses(live):
    """Mean classification loss of each side, image by image from the data source."""
    values = []
    for side in geometry.SIDES:
        batches = live.source.evaluate("train", live.indices(side, geometry.IMAGES), 7)
        with torch.no_grad():
            values.append(torch.cat([live.loss(live.model(b.views[0]), b.labels) for b in batches]).double().mean())
    return torch.stack(values)


def test_landscape_at_the_origin_is_the_loss(live):
    before = {k: v.clone() for k, v in live.model.state_dict().items()}
    found = geometry.solution_landscape(live, never, nothing)
    torch.testing.assert_close(found.surface.center, direct_losses(live), rtol=1e-5, atol=1e-8)  # observed 3e-8
    assert (found.surface.values[:, 0, 0] - found.surface.center).abs().min() > 1e-2
    assert found.images == {"head": 24, "tail": 24}
    assert all(torch.equal(before[k], v) for k, v in live.model.state_dict().items())


def test_plane_goes_through_the_kept_epochs_and_leaves_the_model_alone(live):
    before = {k: v.clone() for k, v in live.model.state_dict().items()}
    found = geometry.plane_landscape(live, never, nothing)
    assert found.labels == ("t0: epoch 1", "t1: epoch 2", "t2: end, epoch 3")
    assert found.note == "weights kept during training"
    assert found.surface.values.shape == (2, 5, 5)
    assert torch.isfinite(found.surface.values).all()
    assert all(torch.equal(before[k], v) for k, v in live.model.state_dict().items())
    x, y = found.surface.x, found.surface.y
    for a, b in found.points:
        assert x[0] < a < x[-1]
        assert y[0] < b < y[-1]


def test_curvature_of_both_sides(live):
    ticks = []
    found = geometry.curvature(live, lambda: never, lambda: ticks.append(0))
    assert len(ticks) == geometry.products()
    for side in geometry.SIDES:
        top, error = found.spectra[side].top
        assert top > 0
        assert error < top
        value, bound = found.tops[side]
        assert value == pytest.approx(top, rel=1e-3)
        assert 0 < bound < top
        assert found.spectra[side].size == sum(p.numel() for p in live.params)


def test_time_that_runs_out_is_said(live):
    for work in (geometry.solution_landscape, geometry.plane_landscape):
        with pytest.raises(Missing, match="max-minutes"):
            work(live, lambda: True, nothing)
    with pytest.raises(Missing, match="max-minutes"):
        geometry.curvature(live, lambda: lambda: True, nothing)


def copy_without(run, target, pattern):
    shutil.copytree(run, target)
    for path in (target / "checkpoints").glob(pattern):
        path.unlink()
    return live_of(str(target))


def stopped_copy(run, target, epoch, batch):
    """A copy that was broken off in (batch > 0) or before (0) epoch number `epoch`, counted from 0."""
    shutil.copytree(run, target)
    rows = [json.loads(row) for row in (target / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["kind"] != "test" and row.get("epoch", 0) < epoch]
    (target / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for path in (target / "checkpoints").glob("state-*"):
        path.unlink()
    last = target / "checkpoints" / "last.safetensors"
    checkpoint.save(last, checkpoint.load(last)[0], {"epoch": epoch, "model": "resnet8"})
    state = {"run": {"epoch": epoch, "batch": batch}}
    checkpoint.save(target / "checkpoints" / "state-000000001.safetensors", {"x": torch.zeros(1)}, state)
    return str(target)


@pytest.mark.parametrize("batch", [3, 0])
def test_weights_of_a_stopped_run_are_not_its_end(runs, tmp_path, batch):
    """They are written at the end of an epoch only."""
    run = stopped_copy(runs[0], tmp_path / "run", 2, batch)
    assert geometry.three_points(live_of(run))[1][2] == "t2: last weights, epoch 2"
    view = open_runs([run])[0]
    assert (view.ended, view.epochs) == (False, "2 of 3")
    assert open_runs([runs[0]])[0].epochs == 3


def test_three_points_fall_back_to_the_bank(runs, tmp_path):
    live = copy_without(runs[0], tmp_path / "run", "epoch-*.safetensors")
    points, labels, note = geometry.three_points(live)
    if "memory bank" in note:  # two snapshots survived
        assert labels[0] == "t0: epoch 1"
    size = sum(p.numel() for p in live.params)
    assert [p.numel() for p in points] == [size] * 3
    assert torch.equal(points[2], torch.cat([p.detach().reshape(-1) for p in live.params]))


def test_epochs_of_a_bank_that_began_in_another_run_are_not_told(runs, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(runs[0], run)
    assert bank_epochs(open_runs([run])[0])
    config = run / "config.toml"
    config.write_text(config.read_text().replace("[preserve]", f'[preserve]\nbank = "{runs[0]}"'))
    assert geometry.bank_snapshots(live_of(run)) == []
    assert bank_epochs(open_runs([run])[0]) is None


def test_bank_snapshots_are_the_encoders_of_their_epochs(runs):
    """The default run scouts for one epoch: the kept weights of epoch 1 and the bank's first snapshot are the same."""
    live = live_of(runs[0])
    bank = geometry.bank_snapshots(live)
    if not bank:  # one epoch of scouting leaves one snapshot
        from ltfast.resume import load_bank

        state = load_bank(Path(runs[0]))
        number, epoch = state["epochs"].tolist()[0]
        from ltfast.flat import FlatParameters

        flat = FlatParameters([torch.nn.Parameter(p.detach().clone()) for p in live.model.encoder.parameters()])
        bank = [(epoch, torch.cat([v.reshape(-1) for v in flat.views(state[f"snapshot.{number}"])]))]
    epoch, vector = bank[0]
    kept = geometry.weights_of(live, live.folder.checkpoints / f"epoch-{epoch + 1}.safetensors")
    encoder = torch.cat([p.reshape(-1) for p in kept])[: vector.numel()]
    assert torch.equal(vector, encoder)


def test_plain_run_falls_back_to_initial_and_best(runs, tmp_path):
    live = copy_without(runs[1], tmp_path / "run", "epoch-*.safetensors")
    points, labels, _ = geometry.three_points(live)
    assert labels[0] == "t0: initial"
    assert labels[1].startswith("t1: best")
    assert not torch.equal(points[0], points[1])
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "imprint", "pictures": 9, "classes": 3, "seconds": 1.0}\n')
    with pytest.raises(Missing, match="classifier began at mean features"):
        geometry.three_points(live)
    bare = copy_without(str(tmp_path / "run"), tmp_path / "bare", "best.safetensors")
    with pytest.raises(Missing, match="no weights of earlier epochs"):
        geometry.three_points(bare)


def test_run_without_weights_or_data_says_so(runs, tmp_path, capsys):
    target = tmp_path / "run"
    shutil.copytree(runs[1], target)
    lines = (target / "metrics.jsonl").read_text()
    (target / "metrics.jsonl").write_text(lines.replace('"class_names": ["0", "1"', '"class_names": ["1", "0"'))
    with pytest.raises(Missing, match="class 0 is '1' there and '0' here; give the data"):
        open_live(open_runs([str(target)])[0])
    (target / "metrics.jsonl").write_text(lines)
    view = open_runs([str(target)])[0]
    (target / "checkpoints" / "last.safetensors").write_bytes(b"half a file")
    with pytest.raises(Missing, match=r"its weights cannot be used \(.*last\.safetensors"):
        open_live(view)
    (target / "checkpoints" / "last.safetensors").unlink()
    with pytest.raises(Missing, match=r"last\.safetensors"):
        open_live(view)
    elsewhere = open_runs([runs[1]])[0]
    elsewhere.config = elsewhere.config.with_(dataset="cifar10-lt", data_dir=str(tmp_path / "nowhere"))
    with pytest.raises(Missing, match="its data is missing"):
        open_live(elsewhere)
    compute_all([elsewhere], [Computed()], Budget(None), data_dir=str(tmp_path / "no"), quiet=False)
    said = " ".join(capsys.readouterr().err.split())
    assert f"report: {elsewhere.name}: its data is missing (cifar10-lt: --data-dir {tmp_path}/no does not" in said
    assert said.endswith("; its log alone is drawn")
