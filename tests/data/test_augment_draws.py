"""What is drawn, against torchvision's own draws: 10,000 samples of each parameter, Kolmogorov-Smirnov or chi-square,
seeds fixed.

The thresholds are p > 1e-3 with fixed seeds, so a pass is a pass for good; each test also rejects a neighbouring
distribution.
"""

import collections

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor
from torchvision.transforms import v2

from ltfast.data import augment_auto as auto
from ltfast.data import augment_geometry as geometry
from ltfast.data.augment import CifarStrong, Contrastive, CropFlip, recipe
from ltfast.data.rng import epoch_key, uniforms

N = 10_000
SCALE = ((0.5,) * 3, (0.25,) * 3)


def numbers(draws: int, stream: int = 0) -> Tensor:
    return uniforms(epoch_key(11, 4), torch.arange(N), stream, draws)


def same_distribution(ours: Tensor, theirs: list[float] | Tensor) -> bool:
    return stats.ks_2samp(ours.double().numpy(), np.asarray(theirs, dtype=float), method="asymp").pvalue > 1e-3


def same_counts(ours: collections.Counter, theirs: collections.Counter) -> bool:
    keys = sorted(set(ours) | set(theirs), key=repr)
    table = np.array([[side[k] for k in keys] for side in (ours, theirs)])
    return stats.chi2_contingency(table).pvalue > 1e-3


def test_uniform_numbers_are_uniform_and_unrelated() -> None:
    u = numbers(8)
    assert u.min() >= 0
    assert u.max() < 1
    assert all(stats.kstest(column.numpy(), "uniform").pvalue > 1e-3 for column in u.double().unbind(1))
    other_view, other_epoch = numbers(8, stream=1), uniforms(epoch_key(11, 5), torch.arange(N), 0, 8)
    columns = torch.cat([u, other_view, other_epoch, u.roll(1, 0)], 1).double().T
    correlation = torch.corrcoef(columns) - torch.eye(len(columns))
    assert correlation.abs().max() < 5 / N**0.5


def test_crop_offsets_and_cutout_centres() -> None:
    drawn = CifarStrong(*SCALE).draw(numbers(CifarStrong.draws), 32, 32)
    torch.manual_seed(0)
    theirs = v2.RandomCrop(32, padding=4)
    picture = torch.zeros(3, 32, 32, dtype=torch.uint8)
    params = [theirs.make_params([picture]) for _ in range(N)]
    top, left, flip = CropFlip(*SCALE).draw(numbers(CropFlip.draws))
    assert all(torch.equal(a, b) for a, b in ((drawn.top, top), (drawn.left, left), (drawn.flip, flip)))
    for ours, name in ((drawn.top, "top"), (drawn.left, "left")):
        assert same_counts(collections.Counter(ours.tolist()), collections.Counter(p[name] for p in params))
    for centre in (drawn.hole_y, drawn.hole_x):
        assert stats.chisquare(centre.bincount(minlength=32).numpy()).pvalue > 1e-3
    assert abs(drawn.flip.double().mean() - 0.5) < 4 * 0.5 / N**0.5


@pytest.mark.parametrize(("side", "padding", "hole"), [(16, 2, 8), (32, 4, 16), (64, 8, 32)])
def test_padding_and_cutout_are_in_proportion_to_the_picture(side: int, padding: int, hole: int, monkeypatch) -> None:
    view = recipe("cifar", 1, mean=(0.5,) * 3, std=(0.5,) * 3, size=side)[0]
    drawn = view.draw(numbers(view.draws), side, side)
    assert (drawn.top.max(), drawn.left.max()) == (2 * padding, 2 * padding)
    monkeypatch.setattr(type(view.auto), "forward", lambda self, images, policy: images)
    shown = view(torch.full((200, 3, side, side), 255, dtype=torch.uint8), numbers(view.draws)[:200])
    dark = (shown < 0).all(1)
    assert dark[:, padding : side - padding, padding : side - padding].sum((1, 2)).max() == hole**2


@pytest.mark.parametrize(
    ("height", "width", "scale"), [(32, 32, (0.2, 1.0)), (32, 32, (0.08, 1.0)), (40, 24, (0.3, 1.0))]
)
def test_random_resized_crop_boxes(height: int, width: int, scale: tuple[float, float]) -> None:
    ratio = (3 / 4, 4 / 3)
    boxes = geometry.random_boxes(numbers(geometry.RRC_DRAWS), height, width, scale, ratio)
    assert ((boxes.top >= 0) & (boxes.top + boxes.height <= height)).all()
    assert ((boxes.left >= 0) & (boxes.left + boxes.width <= width)).all()
    torch.manual_seed(1)
    theirs = v2.RandomResizedCrop(32, scale=scale, ratio=ratio)
    picture = torch.zeros(3, height, width, dtype=torch.uint8)
    params = [theirs.make_params([picture]) for _ in range(N)]
    for name in geometry.Boxes._fields:
        assert same_distribution(getattr(boxes, name), [p[name] for p in params])
    other = geometry.random_boxes(numbers(geometry.RRC_DRAWS), height, width, (scale[0] + 0.05, 1.0), ratio)
    assert not same_distribution(other.height, [p["height"] for p in params])


def test_no_try_fits_takes_the_centre() -> None:
    boxes = geometry.random_boxes(numbers(geometry.RRC_DRAWS)[:5], 100, 10, (0.9, 1.0), (3 / 4, 4 / 3))
    assert [tuple(int(x[0]) for x in boxes), tuple(int(x[4]) for x in boxes)] == [(43, 0, 13, 10)] * 2


def test_jitter_parameters() -> None:
    drawn = Contrastive(32, *SCALE).draw(numbers(Contrastive.draws), 32, 32)
    torch.manual_seed(2)
    theirs = v2.ColorJitter(0.4, 0.4, 0.4, 0.1)
    params = [theirs.make_params([]) for _ in range(N)]
    for i, name in enumerate(("brightness", "contrast", "saturation", "hue")):
        assert same_distribution(drawn.factors[:, i], [p[f"{name}_factor"] for p in params])
    orders = collections.Counter(map(tuple, drawn.order.tolist()))
    assert len(orders) == 24
    assert same_counts(orders, collections.Counter(tuple(p["fn_idx"].tolist()) for p in params))
    assert abs(drawn.jittered.double().mean() - 0.8) < 4 * 0.4 / N**0.5
    assert abs(drawn.gray.double().mean() - 0.2) < 4 * 0.4 / N**0.5


def test_policy_is_torchvisions() -> None:
    theirs = v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10)
    expected = [tuple((name, p, level or 0) for name, p, level in pair) for pair in theirs._policies]
    assert auto.cifar_policy() == expected
    for name, (values, _) in theirs._AUGMENTATION_SPACE.items():
        magnitudes = values(10, 32, 32)
        if magnitudes is not None and name in auto.CODE:  # its CIFAR policy never shears along x
            scale = {"TranslateX": 32, "TranslateY": 32, "Solarize": 1 / 255}.get(name, 1)
            ours = [auto.magnitude(name, level) * scale for level in range(10)]
            np.testing.assert_allclose(ours, magnitudes.numpy(), atol=1e-6)


def test_policy_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which operations follow each other, with which sign and strength: as often as torchvision's transform calls
    them."""
    calls: list[tuple[str, float]] = []

    class Recorder(v2.AutoAugment):
        def _apply_image_or_video_transform(self, image, transform_id, magnitude, interpolation, fill):
            calls.append((transform_id, round(magnitude, 4)))
            return image

    torch.manual_seed(3)
    recorder, picture = Recorder(v2.AutoAugmentPolicy.CIFAR10), torch.zeros(3, 1, 1, dtype=torch.uint8)
    theirs: collections.Counter = collections.Counter()
    for _ in range(N):
        calls.clear()
        recorder(picture)
        theirs[tuple(calls)] += 1
    code, strength = auto.AutoAugmentCifar().draw(numbers(auto.AutoAugmentCifar.draws))
    scale = {"Solarize": 1 / 255}
    ours: collections.Counter = collections.Counter()
    for codes, values in zip(code.tolist(), strength.double().tolist(), strict=True):
        names = [auto.OPERATIONS[c] for c in codes]
        pairs = [
            (n, round(v * scale.get(n, 1.0), 4) + 0.0) for n, v in zip(names, values, strict=True) if n != "Identity"
        ]
        ours[tuple(p for p in pairs if p != ("Posterize", 8.0))] += 1

    def rare_together(counter: collections.Counter) -> collections.Counter:
        merged: collections.Counter = collections.Counter()
        for key, count in counter.items():
            merged[key if ours[key] + theirs[key] >= 20 else "rare"] += count
        return merged

    assert same_counts(rare_together(ours), rare_together(theirs))
