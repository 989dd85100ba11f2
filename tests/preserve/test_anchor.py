"""The collapsed anchor against the paper's double sum over groups, in float64, value and gradient."""

import pytest
import torch

from ltfast import kernels
from ltfast.preserve.anchor import (
    Anchor,
    anchor_coefficients,
    critical_weight,
    group_sizes,
    stream_anchor,
)


def double_sum(theta, stars, fishers, sizes, lam, shares=None, skip_own=True):
    """L_gkp as printed: sum over g, and over j != g, of (lam / 2) (1 / |G^j|) sum_i F_ji (theta_i - theta*_ji)^2."""
    total = 0.0 * theta.sum()
    for g in range(len(sizes)):
        for j in range(len(sizes)):
            if j != g or not skip_own:
                term = 0.5 * lam / sizes[j] * (fishers[j] * (theta - stars[j]) ** 2).sum()
                total = total + (1.0 if shares is None else shares[g]) * term
    return total


def example(groups=4, size=1001, seed=0, spread=0.02):
    generator = torch.Generator().manual_seed(seed)
    centre = torch.randn(size, generator=generator)
    stars = centre + spread * torch.randn(groups, size, generator=generator)
    fishers = torch.rand(groups, size, generator=generator) ** 4 * 100
    fishers[:, ::7] = 0.0
    fishers[0, 1::7] = 0.0
    theta = centre + 2 * spread * torch.randn(size, generator=generator)
    sizes = torch.tensor([3.0, 1.0, 40.0, 2.0, 7.0], dtype=torch.float64)[:groups]
    return theta, stars, fishers, sizes


def built(how, stars, fishers, sizes):
    if how == "stream":
        return stream_anchor(zip(stars, fishers, strict=True), sizes)
    return Anchor(*kernels.collapse_anchors(stars, fishers, anchor_coefficients(sizes))[:2])


def constant(stars, fishers, sizes, target):
    """sum_i sum_j c_j F_ji (theta*_ji - T_i)^2, float64."""
    coef = anchor_coefficients(sizes)[:, None]
    return (coef * fishers.double() * (stars.double() - target.double()) ** 2).sum()


def penalty_value(theta, anchor, lam, const):
    """L_gkp of the collapsed anchor, float64."""
    return 0.5 * lam * ((anchor.weight * (theta - anchor.target) ** 2).sum(dtype=torch.float64) + const)


def penalty_gradient(theta, anchor, lam):
    """lam * A * (theta - T): what the update adds."""
    return lam * anchor.weight * (theta - anchor.target)


@pytest.mark.parametrize("how", ["stream", "kernel"])
@pytest.mark.parametrize("groups", [1, 2, 4, 5])
def test_value_and_gradient_are_the_double_sum(how, groups):
    theta, stars, fishers, sizes = example(groups)
    anchor = built(how, stars, fishers, sizes)
    const = constant(stars, fishers, sizes, anchor.target)
    wide = theta.double().requires_grad_()
    value = double_sum(wide, stars.double(), fishers.double(), sizes, 10.0)
    (gradient,) = torch.autograd.grad(value, wide)
    if groups == 1:
        assert penalty_value(theta, anchor, 10.0, const) == 0
        assert not penalty_gradient(theta, anchor, 10.0).any()
        return
    # float32 A, T and theta - T: observed 2e-8 (value), 3e-7 of the largest element (gradient).
    torch.testing.assert_close(penalty_value(theta, anchor, 10.0, const), value.detach(), rtol=1e-6, atol=0)
    scale = gradient.abs().max()
    found = penalty_gradient(theta, anchor, 10.0).double()
    torch.testing.assert_close(found / scale, gradient / scale, rtol=0, atol=2e-6)
    own = double_sum(theta.double(), stars.double(), fishers.double(), sizes, 10.0, skip_own=False)
    without_const = penalty_value(theta, anchor, 10.0, 0.0)
    for wrong in (own, without_const, torch.zeros(())):
        assert abs(wrong / value - 1) > 1e-2
    assert not (gradient / scale).abs().max() < 2e-6  # zeros would not pass
    dropped = (3 if groups > 2 else 1) * 10.0 * fishers[-1] / sizes[-1] * (theta - stars[-1])
    assert (dropped.double() / scale).abs().max() > 1e-3  # nor would one group left out


@pytest.mark.parametrize("how", ["stream", "kernel"])
def test_target_is_zero_where_no_fisher_and_between_anchors_elsewhere(how):
    _, stars, fishers, sizes = example()
    anchor = built(how, stars, fishers, sizes)
    assert not anchor.weight[::7].any()
    assert not anchor.target[::7].any()
    inside = anchor.weight > 0
    assert (anchor.target >= stars.amin(0) - 1e-6)[inside].all()
    assert (anchor.target <= stars.amax(0) + 1e-6)[inside].all()
    assert anchor.weight.dtype == anchor.target.dtype == torch.float32


def test_const_does_not_cancel_for_nearly_equal_anchors():
    _, stars, fishers, sizes = example(spread=1e-5)
    coef, f, s = anchor_coefficients(sizes)[:, None], fishers.double(), stars.double()
    weight = (coef * f).sum(0)
    mean = (coef * f * s).sum(0) / weight.clamp(min=1e-300)
    expected = (coef * f * (s - mean) ** 2).sum()
    assert expected < 1e-4
    _, _, const = kernels.collapse_anchors(stars, fishers, coef[:, 0])
    torch.testing.assert_close(torch.as_tensor(const, dtype=torch.float64), expected, rtol=1e-6, atol=0)


def test_order_of_groups_does_not_matter():
    _, stars, fishers, sizes = example(5)
    forward = stream_anchor(zip(stars, fishers, strict=True), sizes)
    backward = stream_anchor(zip(stars.flip(0), fishers.flip(0), strict=True), sizes.flip(0))
    torch.testing.assert_close(forward.weight, backward.weight)
    torch.testing.assert_close(forward.target, backward.target)


def test_shares_of_the_released_code():
    """L = sum_g w_g L_gkp^g, so c_j = (sum_g w_g - w_j) / |G^j|."""
    theta, stars, fishers, sizes = example(4)
    shares = torch.tensor([0.7, 0.2, 0.0, 0.1])
    wide = theta.double().requires_grad_()
    expected = double_sum(wide, stars.double(), fishers.double(), sizes, 10.0, shares.double())
    (gradient,) = torch.autograd.grad(expected, wide)
    leaf = theta.clone().requires_grad_()
    coef = (shares.double().sum() - shares.double()) / sizes
    got = 10.0 * kernels.anchor_penalty(leaf, stars, fishers, coef)
    got.backward()
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=0)
    scale = gradient.abs().max()
    torch.testing.assert_close(leaf.grad.double() / scale, gradient / scale, rtol=0, atol=2e-6)
    equal = double_sum(theta.double(), stars.double(), fishers.double(), sizes, 10.0)
    assert abs(equal / expected - 1) > 0.1


def test_group_sizes():
    groups, counts = torch.tensor([0, 2, 1, 0]), torch.tensor([5, 7, 1, 3])
    assert group_sizes(groups, counts, 3).tolist() == [2, 1, 1]
    assert group_sizes(groups, counts, 3, "samples").tolist() == [8, 1, 7]
    with pytest.raises(ValueError, match="normalise"):
        group_sizes(groups, counts, 3, "images")
    for wrong in ((groups[:3], counts, 3), (groups, counts, 2), (groups - 1, counts, 3)):
        with pytest.raises(ValueError, match="group_of_class"):
            group_sizes(*wrong)


def test_expanded_leaves_the_rest_alone():
    anchor = Anchor(torch.ones(3), torch.full((3,), 2.0))
    assert anchor.expanded(3).weight.tolist() == [1, 1, 1]
    whole = anchor.expanded(8, 4)
    assert whole.weight.tolist() == [0, 0, 0, 0, 1, 1, 1, 0]
    assert whole.target.tolist() == [0, 0, 0, 0, 2, 2, 2, 0]
    with pytest.raises(ValueError, match="do not fit"):
        anchor.expanded(5, 3)


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_the_critical_weight_is_the_largest_that_does_not_overshoot(momentum):
    def lowest(weight):
        theta = torch.nn.Parameter(torch.ones((), dtype=torch.float64))  # the anchor lies at 0
        descent = torch.optim.SGD([theta], lr=0.15, momentum=momentum)
        gaps = []
        for _ in range(400):
            theta.grad = 2.0 * weight * theta.detach()
            descent.step()
            gaps.append(theta.item())
        return min(gaps), gaps[-1]

    limit = critical_weight(0.15, momentum, 2.0)
    least, last = lowest(limit)
    assert least > -1e-12
    assert last < 1e-6
    assert lowest(1.5 * limit)[0] < -1e-3


def test_bad_sizes():
    with pytest.raises(ValueError, match="positive"):
        anchor_coefficients(torch.tensor([1.0, 0.0]))
    _, stars, fishers, sizes = example(3)
    with pytest.raises(ValueError, match="argument"):
        stream_anchor(zip(stars[:2], fishers[:2], strict=True), sizes)
