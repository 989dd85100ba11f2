"""The classifier that begins at mean features: against loops, over ranks, in whole runs."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ltfast.dist import Ranks
from ltfast.errors import UserError
from ltfast.models import LongTailModel, imprint
from ltfast.models.imprint import pictures_per_class
from ltfast.progress import Progress
from ltfast.recipes import build_config
from ltfast.runs import RunFolder
from ltfast.train import Trainer, train
from tests import procs
from tests.test_resume import SMALL, Notes, StopAt, assert_same_run

LABELS = torch.tensor([0, 2, 2, 0, 4, 2, 0])  # of five classes; none of 1 and 3


def small_model(classifier: str = "cosine") -> LongTailModel:
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return LongTailModel(encoder, 6, 5, classifier=classifier).double()


def pictures() -> Tensor:
    return torch.randn(7, 1, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_rows_by_loops() -> None:
    model, x = small_model(), pictures()
    before = model.classifier.weight.detach().clone()
    buffers = [b.clone() for b in model.buffers()]
    model.train()
    model.encoder[2].eval()
    assert imprint(model, [(x[:3], LABELS[:3]), (x[3:], LABELS[3:])]) == 3
    assert all(b.equal(old) for b, old in zip(model.buffers(), buffers, strict=True)), "BatchNorm keeps its statistics"
    assert (model.training, model.encoder[2].training) == (True, False)
    features = model.eval().features(x).tolist()
    for c, row in enumerate(model.classifier.weight.tolist()):
        if c in (1, 3):
            assert row == before[c].tolist(), "a class without a picture keeps its row"
            continue
        total = [0.0] * 6
        for feature, label in zip(features, LABELS.tolist(), strict=True):
            if label == c:
                total = [t + f / math.hypot(*feature) for t, f in zip(total, feature, strict=True)]
        assert row == pytest.approx([t / math.hypot(*total) for t in total], abs=1e-12)


def test_pictures_of_features_that_are_not_finite_are_left_out() -> None:
    model, x = small_model(), pictures()
    before = model.classifier.weight.detach().clone()
    x[3:5] = math.nan  # one of three of class 0, the only one of 4
    assert imprint(model, [(x, LABELS)]) == 2
    assert model.classifier.weight[4].equal(before[4])
    good = torch.tensor([0, 1, 2, 5, 6])
    again = small_model()
    imprint(again, [(pictures()[good], LABELS[good])])
    torch.testing.assert_close(model.classifier.weight, again.classifier.weight)


def test_a_linear_classifier_is_refused() -> None:
    with pytest.raises(ValueError, match="only a cosine classifier"):
        imprint(small_model("linear"), [])
    with pytest.raises(UserError, match="leave --imprint or --classifier out"):
        build_config("digits-lt", "ce", {}, {"imprint": "on", "classifier": "linear"})


def test_pictures_of_a_class() -> None:
    labels = torch.randint(7, (300,), generator=torch.Generator().manual_seed(0))
    labels[labels == 3] = 4  # no picture of 3
    labels[(labels == 5).nonzero().flatten()[2:]] = 6  # two of 5
    chosen = pictures_per_class(labels, 20)
    assert chosen.equal(chosen.unique()), "increasing, each once"
    assert labels[chosen].bincount().tolist() == labels.bincount().clamp_max(20).tolist()
    assert chosen.equal(pictures_per_class(labels, 20))
    assert not chosen.equal(pictures_per_class(labels, 20, seed=1))
    assert pictures_per_class(labels, 300).equal(torch.arange(300))


def share(ranks: Ranks, world: int) -> Tensor:
    model, part = small_model(), torch.arange(7).tensor_split(world)[ranks.rank]
    imprint(model, [(pictures()[i][None], LABELS[i][None]) for i in part], ranks)
    return model.classifier.weight.detach()


@pytest.mark.dist
def test_ranks_end_with_the_same_rows(tmp_path: Path) -> None:
    a, b = procs.run_ranks(2, tmp_path, share, 2)
    assert a.equal(b)
    torch.testing.assert_close(a, share(Ranks(), 1), rtol=1e-12, atol=1e-12)


# -- in a run ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Encoder weights from another run."""
    out = tmp_path_factory.mktemp("imprint") / "before"
    train(build_config("digits-lt", "ce", {}, {**SMALL, "epochs": 2, "out": str(out)}))
    return out / "checkpoints" / "last.safetensors"


def settings(encoder: Path | None, **values: Any) -> Any:
    given = {**SMALL, "epochs": 2, "weights": encoder and str(encoder), **values}
    return build_config("digits-lt", "balanced-softmax", {}, given)


class Begun(Trainer):
    """Stops before its first step."""

    def train_epoch(self, epoch: int) -> Any:
        raise StopIteration


def begun(config: Any, progress: Progress | None = None) -> Begun:
    trainer = Begun(config, None, Ranks(), progress or Progress())
    with pytest.raises(StopIteration):
        trainer.fit()
    return trainer


def test_a_run_begins_at_the_means_of_its_training_pictures(encoder: Path) -> None:
    trainer = begun(settings(encoder))
    found = trainer.model.classifier.weight.detach().clone()
    with torch.no_grad():
        trainer.model.classifier.weight.zero_()
    chosen = pictures_per_class(trainer.source.train_labels, 32)
    assert imprint(trainer.model, [(b.views[0], b.labels) for b in trainer.source.evaluate("train", chosen)]) == 10
    torch.testing.assert_close(trainer.model.classifier.weight, found)
    assert trainer.seconds > 0, "of the first epoch"


@pytest.mark.parametrize("wanted", ["auto", "on", "off"])
def test_where_weights_are_given(encoder: Path, wanted: str) -> None:
    notes = Notes()
    for weights in (encoder, None):
        drawn = Trainer(settings(weights), None, Ranks(), Progress()).model.classifier.weight
        done = wanted == "on" or (wanted == "auto" and weights is not None)
        assert begun(settings(weights, imprint=wanted), notes).model.classifier.weight.equal(drawn) is not done
    assert len([line for line in notes.lines if "mean features of" in line]) == {"auto": 1, "on": 2, "off": 0}[wanted]


def test_no_more_pictures_than_that_in_all(encoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ltfast.start.TOTAL", 20)
    notes = Notes()
    begun(settings(encoder), notes)
    assert notes.lines[-1] == "the classifier begins at the mean features of 20 pictures"


def test_untimed_steps_come_before_and_leave_nothing(encoder: Path) -> None:
    rows = [begun(settings(encoder, untimed_steps=steps)).model.classifier.weight for steps in (0, 2)]
    assert rows[0].equal(rows[1])


@pytest.mark.parametrize("weights", [True, False])
def test_a_run_that_goes_on_is_not_imprinted_again(encoder: Path, tmp_path: Path, weights: bool) -> None:
    out, whole = tmp_path / "run", tmp_path / "whole"
    given = settings(encoder if weights else None, imprint="on")
    train(given.with_(out=str(whole)))
    train(given.with_(out=str(out)), progress=StopAt(4))
    train(given, resume=str(out))
    assert_same_run(whole, out)
    (row,) = RunFolder(out).metrics("imprint")
    counts = RunFolder(out).data_row["counts"]
    assert (row["classes"], row["pictures"]) == (10, sum(min(n, 32) for n in counts))


def test_a_class_without_a_usable_picture_is_told(encoder: Path) -> None:
    notes = Notes()

    class Blind(Begun):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            real = self.source.evaluate

            def evaluate(*key: Any) -> Any:
                for batch in real(*key):
                    yield batch._replace(views=(batch.views[0].where(batch.labels[:, None, None, None] > 1, math.nan),))

            self.source.evaluate = evaluate

    trainer = Blind(settings(encoder), None, Ranks(), notes)
    with pytest.raises(StopIteration):
        trainer.fit()
    assert notes.lines[-1] == "classes whose classifier rows begin at random, without a usable picture: 2"
    assert trainer.model.classifier.weight.isfinite().all()


def test_what_the_encoder_knows_is_not_lost(encoder: Path) -> None:
    """Before the first step the imprinted network is better than chance by far, the other is not."""
    on, off = (begun(settings(encoder, imprint=wanted)).evaluate("test")["top1"] for wanted in ("on", "off"))
    assert on > 50 > 25 > off


def test_auto_wants_weights_and_a_cosine_classifier(encoder: Path) -> None:
    config = settings(encoder)
    assert config.model.imprints
    assert not dataclasses.replace(config.model, weights=None).imprints
    assert not dataclasses.replace(config.model, classifier="linear").imprints
