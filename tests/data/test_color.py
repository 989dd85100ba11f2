"""Colour on batches against torchvision on PIL pictures, step by step and as a whole, and its own grouped form."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as F
from PIL import Image

from ltfast.data import color
from ltfast.data.large_views import RECIPES, draw_view
from ltfast.data.rng import epoch_key
from ltfast.data.torch_source import augment
from tests.data.pictures import picture

SIZES = [(33, 41), (64, 64), (1, 7)]


def batch(n: int = 6, width: int = 41, height: int = 33) -> tuple[list[Image.Image], torch.Tensor]:
    pictures = [picture(seed, width, height) for seed in range(n)]
    return pictures, planar(pictures)


def planar(pictures: list[Image.Image]) -> torch.Tensor:
    """float32 [n, 3, P]."""
    return torch.stack([torch.from_numpy(np.array(p)).permute(2, 0, 1).float().flatten(1) for p in pictures])


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().mean().item()


# Mean difference to torchvision on PIL in levels of 0..255; observed values in the comment of each line.
STEPS = [
    ("brightness", F.adjust_brightness, color.adjust_brightness, 1.37, 0.6),  # 0.49: PIL cuts the fraction off
    ("brightness", F.adjust_brightness, color.adjust_brightness, 0.63, 0.6),  # 0.49
    ("contrast", F.adjust_contrast, color.adjust_contrast, 1.4, 0.6),  # 0.37
    ("contrast", F.adjust_contrast, color.adjust_contrast, 0.6, 0.6),  # 0.47
    ("saturation", F.adjust_saturation, color.adjust_saturation, 1.4, 0.6),  # 0.42
    ("saturation", F.adjust_saturation, color.adjust_saturation, 0.0, 0.6),  # 0.25
    ("hue", F.adjust_hue, color.adjust_hue, 0.1, 1.6),  # 1.3: PIL holds hue in 256 steps
    ("hue", F.adjust_hue, color.adjust_hue, -0.37, 1.6),  # 1.1
]


@pytest.mark.parametrize(("name", "theirs", "ours", "strength", "tolerance"), STEPS)
def test_each_step_equals_torchvision(name, theirs, ours, strength, tolerance):
    pictures, x = batch()
    expected = planar([theirs(p, strength) for p in pictures])
    got = ours(x.clone(), torch.full((len(pictures),), strength))
    assert distance(got, expected) < tolerance
    assert distance(x, expected) > 4 * tolerance, "the step must do something"
    half = ours(x.clone(), torch.full((len(pictures),), strength / 2 if name == "hue" else (1 + strength) / 2))
    assert distance(half, expected) > 2 * tolerance, "half the strength is another picture"


def test_contrast_pulls_towards_the_pictures_own_gray_not_128():
    dark = Image.fromarray((np.asarray(picture(3)) // 4).astype(np.uint8))
    expected = planar([F.adjust_contrast(dark, 0.5)])
    ours = color.adjust_contrast(planar([dark]), torch.tensor([0.5]))
    about_128 = (planar([dark]) - 128) * 0.5 + 128
    assert distance(ours, expected) < 0.6
    assert distance(about_128, expected) > 20


def test_hue_is_in_turns_of_hsv_not_in_degrees_nor_yiq():
    red = torch.tensor([255.0, 0.0, 0.0]).view(1, 3, 1)
    third = color.adjust_hue(red.clone(), torch.tensor([1 / 3]))
    torch.testing.assert_close(third.flatten(), torch.tensor([0.0, 255.0, 0.0]))
    # 0.1 of a turn is 36 degrees: red goes 60 % of the way to yellow, its value stays; a YIQ rotation would darken it.
    tenth = color.adjust_hue(red.clone(), torch.tensor([0.1])).flatten()
    torch.testing.assert_close(tenth, torch.tensor([255.0, 153.0, 0.0]))
    whole = color.adjust_hue(batch()[1], torch.ones(6))
    torch.testing.assert_close(whole, batch()[1], atol=2e-3, rtol=0)


def test_hue_keeps_gray_value_and_chroma():
    x = batch()[1]
    shifted = color.adjust_hue(x.clone(), torch.linspace(-0.5, 0.5, 6))
    torch.testing.assert_close(shifted.amax(1), x.amax(1), atol=1e-3, rtol=0)
    torch.testing.assert_close(shifted.amin(1), x.amin(1), atol=1e-3, rtol=0)
    gray = color.to_gray(x.clone())
    torch.testing.assert_close(color.adjust_hue(gray.clone(), torch.full((6,), 0.3)), gray, atol=1e-3, rtol=0)
    expected = planar([F.to_grayscale(p, 3) for p in batch()[0]])
    assert distance(gray, expected) < 0.6  # observed 0.25, PIL rounds


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_a_whole_jitter_equals_pil_in_each_pictures_own_order(width, height):
    pictures, x = batch(24, width, height)
    draw = draw_view(RECIPES["imagenet"][1], epoch_key(0, 0), torch.arange(24), 1)
    assert draw.jitter is not None
    assert 0 < draw.jitter.applied.sum() < 24
    assert len({tuple(o) for o in draw.jitter.order.tolist()}) > 8
    whole = draw.crop._replace(across=torch.full((24, 10), 1e9), place=torch.zeros(24, 2))
    side = (height, width)
    only_colour = draw._replace(crop=whole, flip=torch.zeros(24, dtype=torch.bool))
    expected = []
    for i, p in enumerate(pictures):
        expected.append(colour_by_pil(p, only_colour, i))
    got = color.apply_jitter(x.clone(), draw.jitter)
    assert got.shape[2] == side[0] * side[1]
    assert distance(got, planar(expected)) < 1.7  # observed 0.9..1.3
    assert distance(x, planar(expected)) > 10
    reverse = draw.jitter._replace(order=draw.jitter.order.flip(1))
    ours, other = distance(got, planar(expected)), distance(color.apply_jitter(x.clone(), reverse), planar(expected))
    assert other > ours, "the order matters (through clipping)"


def colour_by_pil(image: Image.Image, draw, i: int) -> Image.Image:
    """Jitter and gray of `augment` without its crop."""
    from ltfast.data.torch_source import _jitter_step

    if draw.jitter.applied[i]:
        for step in draw.jitter.order[i].tolist():
            image = _jitter_step(image, step, float(draw.jitter.factors[i, step]))
    return F.to_grayscale(image, 3) if draw.jitter.gray[i] else image


def test_grouped_and_single_forms_agree():
    x = batch(24)[1]
    jitter = draw_view(RECIPES["imagenet"][1], epoch_key(1, 2), torch.arange(24), 2).jitter
    assert jitter is not None
    one_by_one = color.apply_jitter(x.clone(), jitter)
    torch.testing.assert_close(color.apply_jitter_grouped(x.clone(), jitter), one_by_one, atol=1e-3, rtol=0)
    for i in (0, 5, 23):
        part = color.Jitter(*(field[i : i + 1] for field in jitter))
        torch.testing.assert_close(color.apply_jitter(x[i : i + 1].clone(), part), one_by_one[i : i + 1])


def test_on_subset_changes_the_chosen_rows_only():
    x = torch.arange(12.0).view(4, 3, 1)
    chosen = torch.tensor([False, True, False, True])
    out = color.on_subset(x.clone(), chosen, lambda y, s: y * s[:, None, None], torch.tensor([9.0, 2.0, 9.0, 3.0]))
    expected = x.clone()
    expected[1] *= 2
    expected[3] *= 3
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(color.on_subset(x.clone(), chosen & False, lambda y, s: y + 1, torch.ones(4)), x)
    torch.testing.assert_close(color.on_subset(x.clone(), chosen | True, lambda y, s: y + 1, torch.ones(4)), x + 1)


def test_the_pil_twin_is_torchvisions_color_jitter():
    """Same factors, same order: `augment` is ColorJitter's own forward, written out."""
    image = picture(9, 64, 64)
    recipe = RECIPES["imagenet"][1]
    draw = draw_view(recipe, epoch_key(0, 0), torch.arange(40), 1)
    assert draw.jitter is not None
    i = int((draw.jitter.applied & ~draw.jitter.gray).nonzero()[0])
    expected = image
    names = {0: "brightness", 1: "contrast", 2: "saturation", 3: "hue"}
    for step in draw.jitter.order[i].tolist():
        expected = getattr(F, f"adjust_{names[step]}")(expected, float(draw.jitter.factors[i, step]))
    draw = draw._replace(flip=torch.zeros(40, dtype=torch.bool))
    draw.crop.across[:] = 1.0
    draw.crop.down[:] = 1.0
    assert np.array_equal(np.asarray(augment(image, draw, i, 64)), np.asarray(expected))
