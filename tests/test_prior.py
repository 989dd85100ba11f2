"""`--prior`: a model's answers for other class frequencies than its training assumed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from ltfast.cli import main
from ltfast.errors import UserError
from ltfast.evaluate import SAMPLED, prior_shift
from ltfast.export import export
from ltfast.losses import log_prior
from ltfast.predict import load_trained, predict
from ltfast.recipes import build_config

COUNTS = (80, 15, 5)


@pytest.mark.parametrize(("method", "flags", "share"), [
    ("ce", {}, 1.0), ("balanced-softmax", {}, 0.0), ("bcl", {"tau": 0.5}, 0.5), ("ce", {"sampler": "class-balanced"}, 0.0),
    ("ce", {"sampler": "sqrt"}, 0.5), ("balanced-softmax", {"sampler": "class-balanced"}, -1.0),
])  # fmt: skip
def test_what_training_left_of_the_prior_is_taken_into_account(method: str, flags: dict, share: float) -> None:
    """Logits that the optimum of the loss has where pictures tell nothing: share of the log prior. Answers are then the prior."""
    config = build_config("digits-lt", method, {}, flags)
    logits = share * log_prior(COUNTS)
    assert torch.allclose((logits + prior_shift(config, COUNTS, "uniform")).softmax(0), torch.full((3,), 1 / 3))
    trained = (logits + prior_shift(config, COUNTS, "train")).softmax(0)
    assert torch.allclose(trained, torch.tensor(COUNTS) / 100)


def test_every_sampler_has_its_share() -> None:
    from ltfast.data.sampler import SAMPLERS

    assert set(SAMPLED) == set(SAMPLERS)


def test_the_optimum_of_a_balanced_loss_holds_no_prior() -> None:
    """One picture, labels 80 : 15 : 5: descent on the logits ends at what `prior_shift` assumes."""
    from ltfast.losses import balanced_softmax

    labels = torch.repeat_interleave(torch.arange(3), torch.tensor(COUNTS))
    logits = torch.zeros(3, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = balanced_softmax(logits.expand(100, 3), labels, log_prior(COUNTS), tau=0.5).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    config = build_config("digits-lt", "balanced-softmax", {}, {"tau": 0.5})
    found = (logits.detach() + prior_shift(config, COUNTS, "train")).softmax(0)
    torch.testing.assert_close(found, torch.tensor(COUNTS) / 100, atol=1e-3, rtol=0)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prior") / "run"
    words = ["--epochs", "6", "--model", "resnet8-w8", "--method", "ce", "--device", "cpu", "--no-tensorboard"]
    assert main(["train", *words, "--out", str(path)]) == 0
    return path


def test_eval_and_predict_answer_for_it(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    found = {}
    for prior in (None, "train", "uniform"):
        assert main(["eval", str(run), "--json", *(["--prior", prior] if prior else [])]) == 0
        found[prior] = json.loads(capsys.readouterr().out)
        assert found[prior]["prior"] == prior
    assert found[None]["per_class"] == found["train"]["per_class"]  # what cross-entropy assumes
    assert found["uniform"]["few"] > found["train"]["few"]
    assert main(["eval", str(run), "--prior", "uniform"]) == 0
    assert "400 images, for uniform class frequencies" in capsys.readouterr().out

    Image.new("L", (8, 8), 90).save(tmp_path / "a.png")
    for where in (run, export(run)):
        trained = load_trained(where)
        (plain,) = predict(trained, [tmp_path / "a.png"], top=10)
        (uniform,) = predict(trained, [tmp_path / "a.png"], top=10, prior="uniform")
        assert trained.counts is not None
        odds = {
            name: p / dict(zip(plain["classes"], plain["probabilities"], strict=True))[name] * trained.counts[int(name)]
            for name, p in zip(uniform["classes"], uniform["probabilities"], strict=True)
        }
        assert max(odds.values()) == pytest.approx(min(odds.values()), rel=1e-3)
    assert main(["predict", str(run), str(tmp_path / "a.png"), "--prior", "uniform"]) == 0
    with pytest.raises(UserError, match="--prior train: the file does not say how common its classes were"):
        list(predict(replace(trained, counts=None), [tmp_path / "a.png"], prior="train"))
