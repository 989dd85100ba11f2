"""anchor_penalty and collapse_anchors against the double sum of method GKP in float64."""

import math

import pytest
import torch
from torch import Tensor

from ltfast.kernels import anchor_penalty, collapse_anchors

from .support import PLACES, check, normal, same_bits

SHAPES = [(1, 1), (2, 7), (4, 1003), (5, 1025), (17, 333), (64, 65)]


def problem(groups: int, n: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    theta, anchors = normal(n, seed=1), normal(groups, n, seed=2)
    fishers, coef = normal(groups, n, seed=3) ** 2, normal(groups, seed=4).abs() + 0.1
    return theta, anchors, fishers, coef


def penalty(theta: Tensor, anchors: Tensor, fishers: Tensor, coef: Tensor) -> Tensor:
    terms = [
        c.double() * (f.double() * (theta.double() - a.double()) ** 2).sum()
        for a, f, c in zip(anchors, fishers, coef, strict=True)
    ]
    return 0.5 * sum(terms)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("groups", "n"), SHAPES)
def test_penalty_and_its_gradient(place, groups, n):
    theta, anchors, fishers, coef = problem(groups, n)
    ours = theta.clone().to(place).requires_grad_()
    value = anchor_penalty(ours, anchors.to(place), fishers.to(place), coef.to(place))
    assert value.dtype == torch.float32
    (3 * value).backward()
    exact = theta.double().requires_grad_()
    expected = penalty(exact, anchors, fishers, coef)
    (3 * expected).backward()
    check(value, expected, "elementwise", [penalty(theta, anchors, fishers, coef.roll(1) + 1), 2 * expected])
    check(ours.grad, exact.grad, "elementwise", [exact.grad / 3])


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("groups", "n"), SHAPES)
def test_collapse_keeps_the_penalty(place, groups, n):
    theta, anchors, fishers, coef = problem(groups, n)
    fishers[:, :: max(n // 3, 2)] = 0  # A = 0 there
    fishers[:, -1] = 1
    weight, target, const = collapse_anchors(anchors.to(place), fishers.to(place), coef.to(place))
    assert const.dtype == torch.float64
    total = (coef.double()[:, None] * fishers.double()).sum(0)
    mean = (coef.double()[:, None] * fishers.double() * anchors.double()).sum(0)
    check(weight, total, "elementwise", [total * coef[0]] if groups > 1 else [])
    check(target, torch.where(total > 0, mean / total.clamp(min=1e-300), 0.0), "elementwise", [mean])
    assert (target.cpu()[total == 0] == 0).all()
    one = 0.5 * ((weight.cpu().double() * (theta.double() - target.cpu().double()) ** 2).sum() + const.cpu())
    check(one, penalty(theta, anchors, fishers, coef), "reduction", [one - 0.5 * const.cpu()] if groups > 1 else [])
    if groups == 1:
        assert const.abs() < 1e-12


@pytest.mark.parametrize("place", PLACES)
def test_bfloat16_anchors_slices_and_two_runs(place):
    theta, anchors, fishers, coef = problem(3, 1200)
    theta, coef = theta.to(place), coef.to(place)
    anchors, fishers = anchors.bfloat16().to(place), fishers.bfloat16().to(place)
    part = slice(7, 1100)
    arrays = (anchors[:, part], fishers[:, part], coef)
    value = anchor_penalty(theta[part], *arrays)
    expected = penalty(theta[part].cpu(), anchors[:, part].cpu(), fishers[:, part].cpu(), coef.cpu())
    check(value, expected, "elementwise", [1.001 * expected])
    assert same_bits(value, anchor_penalty(theta[part], *arrays))
    first, second = collapse_anchors(*arrays), collapse_anchors(*arrays)
    assert all(same_bits(a, b) for a, b in zip(first, second, strict=True))


def test_gradcheck_in_float64():
    theta, anchors, fishers, coef = (t.double() for t in problem(3, 11))
    theta.requires_grad_()
    assert torch.autograd.gradcheck(lambda t: anchor_penalty(t, anchors, fishers, coef), (theta,))


def test_python_coefficients_and_bad_arguments():
    theta, anchors, fishers, coef = problem(2, 9)
    listed = anchor_penalty(theta, anchors, fishers, coef.tolist())
    check(listed, anchor_penalty(theta, anchors, fishers, coef), "reduction")
    for name, arguments in {
        "theta_N": (theta.half(), anchors, fishers, coef),
        r"theta_N is torch\.bfloat16": (theta.bfloat16(), anchors, fishers, coef),
        "anchors_GN": (theta, anchors[:, :8], fishers, coef),
        "fishers_GN": (theta, anchors, fishers[:, :8], coef),
        "fishers_GN has 1 rows": (theta, anchors, fishers[:1], coef),
        "coef_G": (theta, anchors, fishers, coef[:1]),
        "coef_G holds": (theta, anchors, fishers, [math.nan, 1.0]),
    }.items():
        with pytest.raises(ValueError, match=name):
            anchor_penalty(*arguments)
        if not name.startswith(("theta_N", "anchors_GN")):
            with pytest.raises(ValueError, match=name):
                collapse_anchors(*arguments[1:])
