"""Every batched operation against torchvision.transforms.v2.functional, one sample at a time with the same parameters.

Error classes: EXACT moves or selects values; LEVEL is on the 0..255 scale where both sides truncate: a product that
falls on a whole number may come out one level lower; REAL is float32 arithmetic on the 0..1 scale. The observed error
stands beside each use.
"""

import math

import pytest
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from ltfast.data import augment_auto as auto
from ltfast.data import augment_color as color
from ltfast.data import augment_geometry as geometry
from ltfast.data.augment import DigitsView
from tests.data.small_pictures import make_pictures

N = 37
EXACT, REAL, CHAIN = 0.0, 2e-6, 5e-6
PICTURES = make_pictures(N)
FLOATS = PICTURES.float() / 255


def draw(low: float, high: float, seed: int) -> Tensor:
    return low + (high - low) * torch.rand(N, generator=torch.Generator().manual_seed(seed))


def one_by_one(operation, pictures: Tensor, *parameters) -> Tensor:
    return torch.stack([operation(p, *values) for p, *values in zip(pictures, *parameters, strict=True)])


def difference(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return (ours.double() - theirs.double()).abs().max().item()


def assert_close(ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    assert difference(ours, theirs) <= tolerance
    # The test itself must be able to fail: nothing at all, and the neighbour's result, are rejected.
    assert difference(torch.zeros_like(ours), theirs) > max(tolerance, 0.1)
    assert difference(ours.roll(1, 0), theirs) > max(tolerance, 0.1)


def assert_levels(ours: Tensor, theirs: Tensor, share: float) -> None:
    """At most one level apart, and that for at most `share` of all values."""
    apart = (ours.double() - theirs.double()).abs()
    assert apart.max() <= 1
    assert (apart > 0).double().mean() <= share
    for wrong in (torch.zeros_like(ours), ours.roll(1, 0)):
        assert (wrong.double() - theirs.double()).abs().max() > 1


def test_color_blends_on_unit_scale() -> None:
    factor = draw(0.3, 1.8, 1)
    for kind, theirs in enumerate((tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation)):
        ours = color.color_blend(FLOATS, torch.full((N,), kind), factor)
        expected = one_by_one(lambda p, f, op=theirs: op(p, float(f)), FLOATS, factor)
        assert_close(ours, expected, REAL)  # observed 0, 6e-8, 1.2e-7


def test_color_blends_on_levels() -> None:
    factor = 1 + torch.tensor([-0.9, -0.5, 0.0, 0.3, 0.6, 0.9]).repeat(7)[:N]
    for kind, theirs in enumerate((tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation)):
        ours = color.color_blend(PICTURES.float(), torch.full((N,), kind), factor, 255)
        expected = one_by_one(lambda p, f, op=theirs: op(p, float(f)), PICTURES, factor)
        assert_levels(ours, expected, 0.01)  # observed share 0, 0, .0049 (luma's last bit before it is cut)


def test_hue() -> None:
    turns = draw(-0.5, 0.5, 2)
    expected = one_by_one(lambda p, f: tv.adjust_hue(p, float(f)), FLOATS, turns)
    assert_close(color.adjust_hue(FLOATS, turns), expected, REAL)  # observed 1.4e-6


def test_gray() -> None:
    assert_close(color.to_gray(FLOATS), tv.rgb_to_grayscale(FLOATS, 3), REAL)  # observed 1.2e-7


def test_jitter_follows_each_samples_order() -> None:
    rng = torch.Generator().manual_seed(3)
    order = torch.rand(N, 4, generator=rng).argsort(1)
    factors = torch.stack([draw(0.6, 1.4, 4), draw(0.6, 1.4, 5), draw(0.6, 1.4, 6), draw(-0.1, 0.1, 7)], 1)
    applied = torch.rand(N, generator=rng) < 0.8
    operations = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue)

    def theirs(picture: Tensor, kinds: Tensor, values: Tensor, on: Tensor) -> Tensor:
        for kind in kinds.tolist() if on else []:
            picture = operations[kind](picture, float(values[kind]))
        return picture

    expected = one_by_one(theirs, FLOATS, order, factors, applied)
    assert_close(color.jitter(FLOATS.clone(), order, factors, applied), expected, CHAIN)  # observed 2.1e-6
    other = color.jitter(FLOATS.clone(), order.flip(1), factors, applied)
    assert difference(other, expected) > 0.01


@pytest.mark.parametrize("factor", [0.1, 0.7, 1.0, 1.3, 1.9])
def test_sharpness(factor: float) -> None:
    ours = color.sharpen(PICTURES.float(), torch.full((N,), factor))
    assert_levels(ours, tv.adjust_sharpness(PICTURES, factor), 2e-3)  # observed share at most .00045


@pytest.mark.parametrize("level", range(10))
def test_solarize_and_posterize(level: int) -> None:
    threshold, bits = auto.magnitude("Solarize", level), int(auto.magnitude("Posterize", level))
    ours = color.solarize(PICTURES.float(), torch.full((N,), threshold))
    assert difference(ours, tv.solarize(PICTURES, threshold)) == EXACT
    ours = color.posterize(PICTURES.float(), torch.full((N,), float(bits)))
    assert difference(ours, tv.posterize(PICTURES, bits)) == EXACT


def test_autocontrast_and_equalize() -> None:
    assert_levels(color.autocontrast(PICTURES.float()), tv.autocontrast(PICTURES), 2e-3)  # observed 0
    assert_close(color.equalize(PICTURES.float()), tv.equalize(PICTURES), EXACT)
    small = make_pictures(N, size=9)  # 81 pixels: step 0 for every picture, and nothing changes
    assert difference(color.equalize(small.float()), tv.equalize(small)) == EXACT
    bright = PICTURES.clone()
    bright[:, :, :20] = 255  # less than 510 pixels below the maximum: a step of 1
    assert_close(color.equalize(bright.float()), tv.equalize(bright), EXACT)


def test_crop_flip() -> None:
    rng = torch.Generator().manual_seed(8)
    top, left = (torch.randint(0, 9, (N,), generator=rng) for _ in range(2))
    flip = torch.rand(N, generator=rng) < 0.5

    def theirs(picture: Tensor, t: Tensor, left_: Tensor, f: Tensor) -> Tensor:
        picture = tv.crop(tv.pad(picture, [4]), int(t), int(left_), 32, 32)
        return tv.horizontal_flip(picture) if f else picture

    expected = one_by_one(theirs, PICTURES, top, left, flip)
    assert_close(geometry.crop_flip(PICTURES, top, left, flip, 4), expected, EXACT)


def test_cutout() -> None:
    rng = torch.Generator().manual_seed(9)
    y, x = (torch.randint(0, 32, (N,), generator=rng) for _ in range(2))

    def theirs(picture: Tensor, cy: Tensor, cx: Tensor) -> Tensor:
        top, left = max(0, int(cy) - 8), max(0, int(cx) - 8)
        height, width = min(32, int(cy) + 8) - top, min(32, int(cx) + 8) - left
        return tv.erase(picture, top, left, height, width, torch.zeros(3, 1, 1))

    assert_close(geometry.cutout(FLOATS, y, x, 16), one_by_one(theirs, FLOATS, y, x), EXACT)


@pytest.mark.parametrize("name", ["ShearY", "TranslateX", "TranslateY", "Rotate"])
@pytest.mark.parametrize("level", [0, 1, 4, 9])
def test_auto_augment_warps(name: str, level: int) -> None:
    sign = torch.where(torch.arange(N) % 2 == 0, 1.0, -1.0)
    strength = sign * auto.magnitude(name, level)
    ours = auto.apply_operations(PICTURES.float(), torch.full((N,), auto.CODE[name]), strength)

    def theirs(picture: Tensor, value: Tensor) -> Tensor:
        v = float(value)
        if name == "ShearY":
            return tv.affine(picture, 0.0, [0, 0], 1.0, [0.0, math.degrees(math.atan(v))], center=[0, 0])
        if name == "Rotate":
            return tv.rotate(picture, v)
        shift = [int(v * 32), 0] if name == "TranslateX" else [0, int(v * 32)]
        return tv.affine(picture, 0.0, shift, 1.0, [0.0, 0.0])

    assert_close(ours, one_by_one(theirs, PICTURES, strength), EXACT)


def test_affine_with_everything_at_once() -> None:
    angle, zoom, ky = draw(-40, 40, 10), draw(0.7, 1.4, 11), draw(-20, 20, 13)
    dx, dy = draw(-6, 6, 14).trunc(), draw(-6, 6, 15).trunc()
    inverse = geometry.inverse_affine(
        angle,
        translate_x=dx,
        translate_y=dy,
        scale=zoom,
        shear=(ky.double() * math.pi / 180).tan(),
        center_x=torch.full((N,), 3.0),
        center_y=torch.full((N,), -5.0),
    )

    def theirs(p: Tensor, *values: Tensor) -> Tensor:
        a, s, y, tx, ty = (float(v) for v in values)
        mode = tv.InterpolationMode.BILINEAR
        return tv.affine(p, a, [int(tx), int(ty)], s, [0.0, y], interpolation=mode, center=[16 + 3, 16 - 5])

    expected = one_by_one(theirs, FLOATS, angle, zoom, ky, dx, dy)
    assert_close(geometry.warp(FLOATS, inverse, "bilinear"), expected, CHAIN)  # observed 0


def test_the_digits_view_turns_zooms_and_shifts_within_its_ranges() -> None:
    u = torch.rand(N, 4, generator=torch.Generator().manual_seed(20))
    u[:, 2:] = (u[:, 2:] * 8).floor() / 8  # whole pixels of a range of 4, as torchvision shifts
    u[0] = 0.5
    view = DigitsView(30.0, 0.25, 4.0, (0.5,) * 3, (0.25,) * 3)

    def theirs(p: Tensor, values: Tensor) -> Tensor:
        angle, zoom, right, down = (float(v) for v in 2 * values.double() - 1)
        mode = tv.InterpolationMode.BILINEAR
        shift = [int(4 * right), int(4 * down)]
        return (tv.affine(p, 30 * angle, shift, 1 + 0.25 * zoom, [0.0, 0.0], interpolation=mode) - 0.5) / 0.25

    assert_close(view(PICTURES, u), one_by_one(theirs, FLOATS, u), 4 * CHAIN)  # / 0.25; observed 7e-7
    assert difference(view(PICTURES, u)[:1], (FLOATS[:1] - 0.5) / 0.25) <= 4 * CHAIN  # no change in the middle


@pytest.mark.parametrize(("side", "size"), [(32, 32), (48, 32), (32, 48), (31, 17)])
def test_resized_crop(side: int, size: int) -> None:
    pictures = make_pictures(N, side).float() / 255
    rng = torch.Generator().manual_seed(side + size)
    height, width = (torch.randint(1, side + 1, (N,), generator=rng) for _ in range(2))
    top, left = ((torch.rand(N, generator=rng) * (side + 1 - n)).long() for n in (height, width))
    flip = torch.rand(N, generator=rng) < 0.5
    ours = geometry.resized_crop(pictures, geometry.Boxes(top, left, height, width), flip, size)

    def theirs(p: Tensor, *box: Tensor) -> Tensor:
        t, left_, h, w, f = (int(v) for v in box)
        p = tv.resized_crop(p, t, left_, h, w, [size, size], antialias=True)
        return tv.horizontal_flip(p) if f else p

    expected = one_by_one(theirs, pictures, top, left, height, width, flip)
    assert_close(ours, expected, REAL)  # observed 6e-7


def test_grouped_and_dense_execution_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = torch.Generator().manual_seed(16)
    code = torch.arange(N) % len(auto.OPERATIONS)
    strength = torch.tensor([auto.magnitude(auto.OPERATIONS[c], 7) for c in code.tolist()])
    order = torch.rand(N, 4, generator=rng).argsort(1)
    factors = torch.cat([1 + 0.4 * torch.rand(N, 3, generator=rng), torch.rand(N, 1, generator=rng) - 0.5], 1)
    applied = torch.rand(N, generator=rng) < 0.8

    def run() -> list[Tensor]:
        return [
            auto.apply_operations(PICTURES.float(), code, strength),
            color.jitter(FLOATS.clone(), order, factors, applied),
        ]

    grouped = run()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    for ours, dense in zip(grouped, run(), strict=True):
        assert difference(ours, dense) == EXACT
