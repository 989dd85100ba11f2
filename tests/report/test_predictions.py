"""Calibration bins and the worst classes of a model whose answers are written by hand.

Legend: n = 10 test images of C = 4 classes, the last of which has none.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ltfast.config import Config
from ltfast.data.base import Batch
from ltfast.report.predictions import predict, to_picture

LABELS = torch.tensor([0, 1, 1, 2, 2, 0, 1, 2, 2, 1])
ANSWERS = torch.tensor([0, 2, 0, 2, 1, 0, 1, 0, 0, 3])
MARGINS = torch.tensor([4.0, 1.0, 3.0, 2.0, 1.5, 0.5, 2.5, 0.7, 5.0, 2.0])
COUNTS = torch.tensor([50, 5, 20, 9])
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.5)


class TenPictures:
    """A source whose batches come in no order; picture i holds i / 20 in its first pixel."""

    num_classes, train_counts, sizes, mean, std = 4, COUNTS, {"test": 10}, MEAN, STD

    def __init__(self):
        self.pictures = torch.rand(10, 3, 2, 5, generator=torch.Generator().manual_seed(0))
        self.pictures[:, 0, 0, 0] = torch.arange(10) / 20

    def evaluate(self, split, indices=None):
        assert split == "test"
        indices = torch.arange(10) if indices is None else indices.long()
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
        for index in indices.sort(descending=True)[0].split(4):
            yield Batch(((self.pictures[index] - mean) / std,), LABELS[index], index)


def answer(x):
    """Logits of normalised pictures: the answer of each by its margin, found by its first pixel."""
    index = ((x[:, 0, 0, 0] * STD[0] + MEAN[0]) * 20).round().long()
    return torch.nn.functional.one_hot(ANSWERS[index], 4) * MARGINS[index, None]


def live_of(model, tta="none"):
    config = Config().with_(tta=tta)
    return SimpleNamespace(source=TenPictures(), model=model, config=config, device=torch.device("cpu"))


def test_worst_classes_and_their_most_confident_mistakes():
    live = live_of(answer)
    found = predict(live, lambda: False, lambda: None)
    assert [(w.label, w.accuracy, w.images) for w in found.worst] == [(2, 25, 20), (1, 25, 5), (0, 100, 50)]
    mistakes = {2: [8, 4, 7], 1: [2, 9, 1], 0: []}  # images, by their margin
    confidence = torch.exp(MARGINS) / (torch.exp(MARGINS) + 3)
    for worst in found.worst:
        shown = mistakes[worst.label]
        assert [m.predicted for m in worst.mistakes] == ANSWERS[shown].tolist()
        assert [m.confidence for m in worst.mistakes] == pytest.approx(confidence[shown].tolist(), abs=2e-6)
        for mistake, index in zip(worst.mistakes, shown, strict=True):
            wanted = live.source.pictures[index].permute(1, 2, 0).numpy()
            np.testing.assert_allclose(mistake.picture, wanted, atol=1e-6)


def test_calibration_bins_hold_shares_of_their_own_images():
    found = predict(live_of(answer), lambda: False, lambda: None)
    confidence = (torch.exp(MARGINS) / (torch.exp(MARGINS) + 3)).double().numpy()
    place = np.ceil(confidence * 15).astype(int) - 1
    right = (LABELS == ANSWERS).numpy()
    assert found.bin_seen.tolist() == np.bincount(place, minlength=15).tolist()
    for k in range(15):
        inside = place == k
        if inside.any():
            assert found.bin_accuracy[k] == pytest.approx(100 * right[inside].mean())
            assert found.bin_confidence[k] == pytest.approx(100 * confidence[inside].mean())
        else:
            assert np.isnan(found.bin_accuracy[k])
    assert found.result["top1"] == 40


def test_predictions_are_made_as_the_run_evaluates():
    """With --tta flip each picture is seen from both sides."""
    left = lambda x: x[:, 1, 0, :4]  # noqa: E731
    plain, flipped = (predict(live_of(left, tta), lambda: False, lambda: None).result for tta in ("none", "flip"))
    x = torch.cat([b.views[0] for b in TenPictures().evaluate("test")])
    labels = torch.cat([b.labels for b in TenPictures().evaluate("test")])
    both = (left(x) + left(x.flip(-1))) / 2
    assert plain["top1"] == pytest.approx(100 * (left(x).argmax(1) == labels).float().mean().item())
    assert flipped["top1"] == pytest.approx(100 * (both.argmax(1) == labels).float().mean().item())
    assert plain["top1"] != flipped["top1"]


def test_a_gray_picture_is_shown_in_gray():
    source = SimpleNamespace(mean=(0.3,), std=(0.5,))
    unit = torch.rand(1, 4, 5)
    picture = to_picture((unit - 0.3) / 0.5, SimpleNamespace(source=source))
    np.testing.assert_allclose(picture, unit[0, :, :, None].expand(-1, -1, 3).numpy(), atol=1e-6)
