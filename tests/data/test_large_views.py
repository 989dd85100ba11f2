"""What is drawn for large views: torchvision's distributions, independence, and dependence on nothing but the
position.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from torchvision.transforms import RandomResizedCrop

from ltfast.data.large_views import (
    RECIPES,
    Crop,
    ViewRecipe,
    crop_windows,
    draw_view,
    draw_views,
    evaluation_size,
    evaluation_window,
    view_recipes,
)
from ltfast.data.rng import epoch_key
from ltfast.errors import UserError

KEY = epoch_key(7, 3)


def windows(n: int, height: int, width: int, scale=(0.08, 1.0)) -> np.ndarray:
    crop = draw_view(ViewRecipe(scale=scale), KEY, torch.arange(n), 0).crop
    return crop_windows(crop, torch.tensor([[height, width]]).expand(n, 2)).numpy()


@pytest.mark.parametrize(
    ("height", "width", "scale"), [(375, 500, (0.08, 1.0)), (500, 333, (0.2, 1.0)), (80, 900, (0.08, 1.0))]
)
def test_crop_windows_have_torchvisions_distribution(height, width, scale):
    n = 4000
    ours = windows(n, height, width, scale)
    torch.manual_seed(0)
    picture = torch.empty(3, height, width)
    theirs = np.array([RandomResizedCrop.get_params(picture, list(scale), [3 / 4, 4 / 3]) for _ in range(n)])
    assert (ours[:, :2] >= 0).all()
    assert (ours[:, 0] + ours[:, 2] <= height).all()
    assert (ours[:, 1] + ours[:, 3] <= width).all()
    for feature in (lambda w: w[:, 2] * w[:, 3], lambda w: w[:, 3] / w[:, 2], lambda w: w[:, 0], lambda w: w[:, 1]):
        assert stats.ks_2samp(feature(ours), feature(theirs)).pvalue > 1e-3
    wrong = windows(n, height, width, (0.3, 1.0))
    assert stats.ks_2samp(wrong[:, 2] * wrong[:, 3], theirs[:, 2] * theirs[:, 3]).pvalue < 1e-6


def test_a_very_long_picture_falls_back_to_the_widest_centred_window():
    crop = Crop(torch.full((2, 10), 1e6, dtype=torch.float64), torch.ones(2, 10).double(), torch.zeros(2, 2).double())
    sizes = torch.tensor([[30, 4000], [4000, 30]])
    assert crop_windows(crop, sizes).tolist() == [[0, 1980, 30, 40], [1980, 0, 40, 30]]
    assert crop_windows(crop, torch.tensor([[90, 100], [1, 1]])).tolist() == [[0, 0, 90, 100], [0, 0, 1, 1]]
    torch_says = [RandomResizedCrop.get_params(torch.empty(3, 30, 4000), [5.0, 6.0], [3 / 4, 4 / 3])]
    assert torch_says == [(0, 1980, 30, 40)]


def test_rates_and_ranges_of_the_contrastive_view():
    n = 20_000
    draw = draw_view(RECIPES["imagenet"][1], KEY, torch.arange(n), 1)
    assert draw.jitter is not None
    for drawn, rate in ((draw.jitter.applied, 0.8), (draw.jitter.gray, 0.2), (draw.flip, 0.5)):
        assert abs(drawn.double().mean().item() - rate) < 4 * (rate * (1 - rate) / n) ** 0.5
    for k, (low, high) in enumerate([(0.6, 1.4)] * 3 + [(-0.1, 0.1)]):
        u = (draw.jitter.factors[:, k].double().numpy() - low) / (high - low)
        assert stats.kstest(u, "uniform").pvalue > 1e-3
    orders = np.unique(draw.jitter.order.numpy(), axis=0, return_counts=True)[1]
    assert len(orders) == 24
    assert stats.chisquare(orders).pvalue > 1e-3
    assert draw.augment is None
    first = draw_view(RECIPES["imagenet"][0], KEY, torch.arange(n), 0)
    assert first.jitter is not None
    assert first.augment is not None
    assert bool(first.jitter.applied.all())
    assert not bool(first.jitter.gray.any())
    assert bool((first.jitter.factors[:, 3] == 0).all()), "view 1 has no hue"


def test_views_of_one_picture_are_independent():
    n = 5000
    a, b = (draw_view(RECIPES["imagenet"][1], KEY, torch.arange(n), view) for view in (1, 2))
    assert a.jitter is not None
    assert b.jitter is not None
    for x, y in ((a.crop.across[:, 0], b.crop.across[:, 0]), (a.jitter.factors[:, 0], b.jitter.factors[:, 0])):
        assert abs(np.corrcoef(x, y)[0, 1]) < 0.05
    both = (a.jitter.gray & b.jitter.gray).double().mean().item()
    assert abs(both - 0.04) < 4 * (0.04 * 0.96 / n) ** 0.5


def test_draws_depend_on_seed_epoch_view_and_position_only():
    recipes = RECIPES["imagenet"]
    whole = draw_views(recipes, 1, 2, torch.arange(30))
    part = draw_views(recipes, 1, 2, torch.arange(11, 19))
    for a, b in zip(whole, part, strict=True):
        assert torch.equal(a.crop.across[11:19], b.crop.across)
        assert torch.equal(a.jitter.factors[11:19], b.jitter.factors)
    assert not torch.equal(whole[1].crop.across, whole[2].crop.across), "the same recipe, another view"
    for other in (draw_views(recipes, 1, 3, torch.arange(30)), draw_views(recipes, 2, 2, torch.arange(30))):
        assert not torch.equal(other[0].crop.across, whole[0].crop.across)


@pytest.mark.parametrize(("height", "width"), [(375, 500), (500, 333), (256, 256), (97, 1000), (224, 225), (8, 8)])
@pytest.mark.parametrize("side", [224, 64, 97])
def test_evaluation_window_is_torchvisions(height, width, side):
    import torchvision.transforms.functional as F

    picture = torch.arange(height * width, dtype=torch.float32).view(1, height, width)
    resized = F.resize(picture, [evaluation_size(side)], antialias=True)
    tall, wide, top, left = evaluation_window(height, width, side)
    assert tuple(resized.shape[1:]) == (tall, wide)
    assert torch.equal(F.center_crop(resized, [side, side]), F.crop(resized, top, left, side, side))


def test_recipe_names():
    assert evaluation_size(224) == 256
    assert len(view_recipes("imagenet", 3)) == 3
    assert view_recipes("imagenet", 1) == (RECIPES["imagenet"][0],)
    assert view_recipes((ViewRecipe(),), 3) == (ViewRecipe(),)
    with pytest.raises(UserError, match="--views 'cifar'"):
        view_recipes("cifar", 3)
    with pytest.raises(ValueError, match="num_views"):
        view_recipes("crop", 2)
