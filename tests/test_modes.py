"""Whatever looks at a model in evaluation mode leaves every layer in the mode it was in, also when it fails."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from ltfast.data.base import Batch
from ltfast.evaluate import evaluate
from ltfast.flat import FlatParameters
from ltfast.modes import untuned
from ltfast.observe import gradient_gram
from ltfast.preserve.fisher import fisher_sums, reestimate_batchnorm
from ltfast.report.curvature import hessian_product

X, Y = torch.randn(4, 3), torch.tensor([0, 1, 0, 1])
BATCH = Batch((X,), Y, torch.arange(4))


def loss(logits, labels):
    return nn.functional.cross_entropy(logits, labels, reduction="none")


def evaluated(model, loss):
    def batches(split):
        yield BATCH
        loss(model(X), Y)  # may fail between two batches

    source = SimpleNamespace(num_classes=2, train_counts=torch.tensor([2, 2]), evaluate=batches)
    evaluate(model, source, "test", torch.device("cpu"))


def reestimated(model, loss):
    def images():
        yield X
        loss(model(X), Y)

    with reestimate_batchnorm(model, images()):
        pass


LOOKS = {
    "evaluate": evaluated,
    "gram": lambda model, loss: gradient_gram(model, FlatParameters(model.parameters()), loss, [[BATCH]]),
    "hessian": lambda model, loss: hessian_product(model, list(model.parameters()), loss, [(X, Y)])(torch.ones(14)),
    "fisher": lambda model, loss: fisher_sums(model, ["2.weight"], [(X, Y)], loss),
    "batchnorm": reestimated,
}


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("look", LOOKS)
def test_every_layer_keeps_its_mode(look, fails):
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5), nn.Linear(3, 2))
    model[0].eval()  # a frozen layer of a model in training

    def failing(logits, labels):
        assert not model[1].training
        if fails:
            raise RuntimeError("stopped")
        return loss(logits, labels)

    if fails:
        with pytest.raises(RuntimeError, match="stopped"):
            LOOKS[look](model, failing)
    else:
        LOOKS[look](model, failing)
    assert [m.training for m in model.modules()] == [True, False, True, True]


@pytest.mark.parametrize("tuned", [False, True])
def test_cudnn_tries_nothing_inside_and_is_as_it_was_afterwards(monkeypatch: pytest.MonkeyPatch, tuned: bool) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", tuned)
    with untuned():
        assert not torch.backends.cudnn.benchmark
    assert torch.backends.cudnn.benchmark == tuned
