"""ascent_coefficients against the paper's equations written group by group on explicit vectors, in float64."""

import math

import pytest
import torch
from torch import Tensor

from ltfast.kernels import ascent_coefficients, gram_partials, perturb
from ltfast.kernels.coefficients import ascent_coefficients_reference

from .support import PLACES, check, normal

C, LOW, HIGH = 0.1, 2e-3, 3e-3
COUNTS = [500, 60, 1, 7, 30]
ROWS = {"joint": 1, "none": 1, "orthogonal": 1, "projected": 1, "friendly": 2}


def inner(a: Tensor, b: Tensor) -> float:
    return (a * b).sum().item()


def naive_directions(u: list[Tensor], m: list[Tensor], w: list[float], direction: str, sigma: list[float]):
    """uh_k of every group present (None where absent), and whether it fell back to u_k."""
    mean = sum(wk * uk for wk, uk in zip(w, u, strict=True) if wk > 0)
    result: list[Tensor | None] = []
    for k in range(len(u)):
        if w[k] == 0:
            result.append(None)
            continue
        projected = inner(u[k], mean) / inner(mean, mean) * mean
        hat = {
            "none": u[k],
            "orthogonal": u[k] - projected,
            "projected": projected,
            "friendly": u[k] - sigma[k] * m[k] if m else u[k],
        }[direction]
        lone = len(u) == 1 and direction in ("orthogonal", "projected")
        result.append(u[k] if lone or inner(hat, hat) <= 1e-6 * inner(u[k], u[k]) else hat)
    return result


def naive_eps(rows, theta, w, counts, d, direction, adaptive, rho, sigma, rule=(C, LOW, HIGH)):
    """[eps_k] of every group present: Eq. 12, 13 and 15."""
    s = theta.double().abs() if adaptive else torch.ones_like(theta, dtype=torch.float64)
    u = [s * g.double() if wk > 0 else torch.zeros_like(s) for g, wk in zip(rows, w, strict=False)]
    m = [s * g.double() for g in rows[len(w) :]]
    if direction == "joint":
        hats, counts = [sum(wk * uk for wk, uk in zip(w, u, strict=True))], [sum(counts)]
    else:
        hats = naive_directions(u, m, w, direction, sigma)
    eps = []
    for k, hat in enumerate(hats):
        if hat is None or inner(hat, hat) == 0:
            eps.append(None)
            continue
        norm = math.sqrt(inner(hat, hat))
        radius = rho
        if rho is None:
            scale, low, high = rule
            size = math.sqrt(inner(theta.double(), theta.double()))
            radius = scale * math.sqrt(size / (2 * norm)) * d**-0.25 * (max(counts[k], 2) - 1) ** -0.25
            radius = math.sqrt(d) * min(max(radius, low), high)
        eps.append(radius * s * hat / norm)
    return eps


def combine(eps: list[Tensor | None], w: list[float], aggregate: str) -> Tensor:
    if len(eps) == 1:
        return eps[0]
    present = [wk > 0 for wk in w]
    weights = [wk / sum(w) for wk in w] if aggregate == "share" else [p / sum(present) for p in present]
    return sum(a * e for a, e in zip(weights, eps, strict=True) if e is not None)


def problem(groups: int, n: int, direction: str, place: str, absent: int | None = None):
    rows = normal(groups * ROWS[direction], n, seed=1) + normal(1, n, seed=2)
    theta = normal(n, seed=3)
    w = [0.0 if k == absent else 1.0 + k for k in range(groups)]
    w = [wk / sum(w) for wk in w]
    counts = (COUNTS * 8)[:groups]
    shares = torch.tensor(w, dtype=torch.float32, device=place)
    return rows, theta, shares.tolist(), counts, shares, torch.tensor(counts, device=place)


def ascend(rows, theta, shares, counts, d, place, adaptive, **options):
    rows, theta = rows.to(place), theta.to(place)
    partials = gram_partials(rows, theta, adaptive)
    return ascent_coefficients(*partials, shares, counts, d, **options), rows, theta


SIGMA = [0.3, 0.9, 0.0, 1.0, 0.5]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("rho", [None, 0.05])
@pytest.mark.parametrize("absent", [None, 1])
@pytest.mark.parametrize("groups", [1, 3, 5])
@pytest.mark.parametrize("direction", list(ROWS))
def test_per_group_perturbations(place, direction, groups, absent, rho):
    if groups == 1 and absent:
        pytest.skip("the only group cannot be absent")
    n, adaptive = 301, groups != 3
    rows, theta, w, counts, shares, counts_t = problem(groups, n, direction, place, absent)
    if absent and direction != "friendly":
        rows[absent] = torch.nan  # must not matter
    sigma = torch.tensor(SIGMA[:groups], device=place) if direction == "friendly" else 1.0
    (coef, stats), device_rows, _ = ascend(
        rows, theta, shares, counts_t, n - 1, place, adaptive,
        direction=direction, objective="per_group", rho=rho, sigma=sigma,
    )  # fmt: skip
    expected = naive_eps(rows, theta, w, counts, n - 1, direction, adaptive, rho, SIGMA)
    assert stats.ok == 1
    assert coef.shape == (len(expected), rows.shape[0])
    s = theta.double().abs() if adaptive else 1.0
    for k, eps in enumerate(expected):
        if eps is None:
            assert (coef[k] == 0).all()
            assert stats.norm_sq[k] == stats.length_sq[k] == stats.fallback[k] == 0
            continue
        moved = torch.nan_to_num(device_rows.double()).T @ coef[k].double()
        check(moved.cpu() * s * s, eps, "elementwise", [eps * 1.01])
        check(stats.length_sq[k], ((eps / s) ** 2).sum(), "elementwise")


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    ("groups", "absent", "aggregate"),
    [(1, None, "share"), (3, None, "share"), (4, 3, "uniform"), (4, 3, "share"), (17, 2, "uniform")],
)
@pytest.mark.parametrize("direction", list(ROWS))
def test_shared_perturbation_through_the_whole_chain(place, direction, groups, absent, aggregate):
    n = 333
    rows, theta, w, counts, shares, counts_t = problem(groups, n, direction, place, absent)
    (coef, stats), rows_t, theta_t = ascend(
        rows, theta, shares, counts_t, n, place, True, direction=direction, aggregate=aggregate, sigma=0.7,
        rho_min=1e-4, rho_max=1.0,
    )  # fmt: skip
    eps = naive_eps(rows, theta, w, counts, n, direction, True, None, [0.7] * groups, rule=(C, 1e-4, 1.0))
    expected = combine(eps, w, aggregate)
    moved = perturb(torch.ones_like(theta_t), rows_t, coef)  # theta = 1: only coef @ rows
    check((moved.cpu().double() - 1) * theta.double() ** 2, expected, "bf16", [1.01 * expected])
    exact = rows_t.double().T @ coef.double()
    check(exact.cpu() * theta.double() ** 2, expected, "elementwise", [1.001 * expected])
    check(stats.length_sq, ((expected / theta.double()) ** 2).sum(), "elementwise")
    assert stats.clipped.abs().sum() == 0


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("objective", ["shared", "per_group"])
@pytest.mark.parametrize("direction", ["joint", "none", "orthogonal", "projected"])
@pytest.mark.parametrize("groups", [33, 63])
def test_more_groups_than_compile_well_are_filled_up_with_absent_ones(place, groups, direction, objective):
    """The kernel sees 64 groups, the caller nothing of it: results are the oracle's for the groups there are."""
    rows, shares = normal(groups, 500, seed=1).to(place), normal(groups, seed=2).abs().to(place)
    shares[5] = 0.0
    partials, theta_sq = gram_partials(rows, normal(500, seed=3).to(place))
    counts = torch.arange(1, groups + 1, device=place)
    options = {"direction": direction, "objective": objective, "aggregate": "uniform"}
    coef, stats = ascent_coefficients(partials, theta_sq, shares, counts, 500, rho_min=1e-4, rho_max=1.0, **options)
    expected, other = ascent_coefficients_reference(
        partials, theta_sq, shares, counts, 500, direction, None, 0.1, 1e-4, 1.0, 1.0, "uniform", objective
    )
    assert coef.is_contiguous()
    check(coef, expected, "coefficients", [1.001 * expected])
    check(stats.norm_sq, other[0], "coefficients")
    assert stats.radius.shape == other[1].shape
    half, _ = ascent_coefficients(partials, theta_sq, None, counts, 500, **options)
    even, _ = ascent_coefficients(partials, theta_sq, torch.full_like(shares, 1 / groups), counts, 500, **options)
    check(half, even, "coefficients")


@pytest.mark.parametrize("place", PLACES)
def test_orthogonal_and_share_cancel(place):
    """sum_k w_k uh_k = 0: with one radius for all, the shared perturbation weighted by shares vanishes."""
    rows, theta, _, _, shares, counts = problem(4, 200, "orthogonal", place)
    (coef, stats), *_ = ascend(
        rows, theta, shares, counts, 200, place, False, direction="orthogonal", rho=None, C=0.0, aggregate="share",
        objective="per_group",
    )  # fmt: skip
    unnormalised = coef * stats.norm_sq.sqrt()[:, None]
    total = (shares[:, None] * unnormalised).sum(0)
    assert total.abs().max() < 1e-5 * unnormalised.abs().max()


@pytest.mark.parametrize("place", PLACES)
def test_a_shared_sum_that_cancels_is_no_direction(place):
    """Two groups of one radius are exactly opposite under Eq. 12; so are two equal and opposite gradients."""
    rows, theta, w, counts, shares, counts_t = problem(2, 300, "orthogonal", place)
    opposite = torch.stack((rows[0], -rows[0]))
    for own, options in (
        (rows, {"rho": 0.1}),
        (rows, {"rho_min": 2e-3, "rho_max": 2e-3}),
        (opposite, {"rho": 0.1, "direction": "none"}),
        (torch.cat((rows, rows + opposite)), {"rho": 0.1, "direction": "friendly"}),
    ):
        (coef, stats), *_ = ascend(own, theta, shares, counts_t, 300, place, False, **options)
        assert (coef == 0).all()
        assert stats.length_sq == 0
        assert (stats.norm_sq > 0).all()
        assert stats.ok == 1
    # Radii that differ leave a direction.
    (coef, stats), rows_t, _ = ascend(rows, theta, shares, counts_t, 300, place, False, rho_min=1e-4, rho_max=1.0)
    eps = naive_eps(rows, theta, w, counts, 300, "orthogonal", False, None, [1.0] * 2, rule=(C, 1e-4, 1.0))
    expected = combine(eps, w, "uniform")
    assert expected.norm() > 0
    moved = rows_t.double().T @ coef.double()
    check(moved, expected, "elementwise", [1.01 * expected])


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("direction", ["orthogonal", "projected"])
def test_parallel_gradients_and_a_single_group_fall_back_to_sam(place, direction):
    base, theta = normal(50, seed=4), normal(50, seed=5)
    for factors in ([1.0], [1.0, 2.0, 0.5]):
        rows = torch.tensor(factors)[:, None] * base
        shares = torch.full((len(factors),), 1 / len(factors), device=place)
        (coef, stats), *_ = ascend(
            rows, theta, shares, None, 50, place, False, direction=direction, rho=0.1, objective="per_group"
        )
        fell = direction == "orthogonal" or len(factors) == 1
        assert stats.fallback.tolist() == [float(fell)] * len(factors)
        eps = coef.double().cpu() @ rows.double()
        for row in eps:
            check(row, 0.1 * base.double() / base.double().norm(), "elementwise", [0.1001 * base / base.norm()])


@pytest.mark.parametrize("place", PLACES)
def test_only_what_keeps_less_than_a_millionth_counts_as_cancelled(place):
    half, one = torch.tensor([0.5, 0.5], device=place), torch.tensor([1.0], device=place)
    for gap in (2e-3, 5e-4):  # of a gradient to its average
        row = torch.tensor([[1.0, 1 - gap]], dtype=torch.float64, device=place)
        _, stats = ascent_coefficients(row.T @ row, None, one, None, 9, direction="friendly", rho=0.1)
        assert stats.fallback.tolist() == [float(gap < 1e-3)]
    for angle in (4e-3, 1e-3):  # by which two gradients miss being opposite: (angle / 2)^2 is what is left of the sum
        u = torch.tensor([[1.0, 0.0], [-math.cos(angle), math.sin(angle)]], dtype=torch.float64, device=place)
        coef, stats = ascent_coefficients(u @ u.T, None, half, None, 9, direction="none", rho=0.1)
        assert bool((coef == 0).all()) == bool(stats.length_sq == 0) == (angle < 2e-3)


@pytest.mark.parametrize("place", PLACES)
def test_clip_is_reported(place):
    rows, theta, w, counts, shares, counts_t = problem(3, 100, "none", place)
    s = theta.double()
    radii = [
        C * math.sqrt(s.norm().item() / (2 * r.double().norm().item())) * 100**-0.25 * (max(n, 2) - 1) ** -0.25
        for r, n in zip(rows, counts, strict=True)
    ]
    low, high = sorted(radii)[0] * 1.01, sorted(radii)[2] * 0.99
    (_, stats), *_ = ascend(
        rows, theta, shares, counts_t, 100, place, False, direction="none", rho_min=low, rho_max=high
    )
    check(stats.radius, torch.tensor(radii), "elementwise")
    assert stats.clipped.tolist() == [float((r > high) - (r < low)) for r in radii]
    assert sorted(stats.clipped.tolist()) == [-1.0, 0.0, 1.0]
    assert len(w) == 3


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # numpy, under the interpreter
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("objective", ["shared", "per_group"])
@pytest.mark.parametrize("direction", list(ROWS))
def test_zero_or_infinite_gradients_give_no_perturbation(place, direction, objective):
    theta = normal(64, seed=6)
    shares, counts = torch.tensor([0.25, 0.75], device=place), torch.tensor([3, 4], device=place)
    for value in (0.0, torch.inf, torch.nan):
        rows = torch.zeros(2 * ROWS[direction], 64)
        rows[0] = value
        for rho in (None, 0.05):
            (coef, stats), *_ = ascend(
                rows, theta, shares, counts, 64, place, False, direction=direction, rho=rho, objective=objective
            )
            assert (coef == 0).all()
            assert stats.ok == 0
    rows = normal(2 * ROWS[direction], 64, seed=7)
    for bad in (torch.tensor([torch.nan, 1.0]), torch.zeros(2)):
        (coef, stats), *_ = ascend(
            rows, theta, bad.to(place), counts, 64, place, False, direction=direction, objective=objective
        )
        assert (coef == 0).all()
        assert stats.ok == 0


@pytest.mark.parametrize("place", PLACES)
def test_a_group_with_zero_gradient_does_not_stop_the_others(place):
    rows, theta, _, _, shares, counts = problem(3, 40, "orthogonal", place)
    rows[2] = 0
    (coef, stats), *_ = ascend(rows, theta, shares, counts, 40, place, False, objective="per_group")
    assert stats.ok == 1
    assert (coef[2] == 0).all()
    assert (coef[:2, :2] != 0).all()


@pytest.mark.parametrize("place", PLACES)
def test_device_scalars_finished_gram_and_default_shares(place):
    rows, theta, *_, counts = problem(2, 90, "none", place)
    rows, theta = rows.to(place), theta.to(place)
    partials, theta_sq = gram_partials(rows, theta)
    half = torch.tensor([0.5, 0.5], device=place)
    plain, _ = ascent_coefficients(partials, theta_sq, half, counts, 90, C=0.2, rho_min=1e-3, rho_max=5.0)
    numbers = {k: torch.tensor(v, device=place) for k, v in {"C": 0.2, "rho_min": 1e-3, "rho_max": 5.0}.items()}
    other, _ = ascent_coefficients(partials.sum(0), theta_sq.sum(0), None, counts, 90, **numbers)
    check(other, plain, "coefficients", [plain.flip(0)])
    own = {"direction": "none"}
    fixed, _ = ascent_coefficients(partials, None, half, None, 90, rho=torch.tensor(0.05, device=place), **own)
    check(
        fixed, ascent_coefficients(partials, None, None, None, 90, rho=0.05, **own)[0], "coefficients", [1.01 * fixed]
    )
    sam, stats = ascent_coefficients(gram_partials(rows[:1])[0], None, None, None, 90, direction="joint", rho=0.05)
    check(sam, 0.05 / rows[:1].double().norm(dim=1), "coefficients")
    check(stats.length_sq, torch.tensor(0.05**2), "coefficients")


def test_bad_arguments_are_named():
    matrix, theta_sq = torch.eye(2, dtype=torch.float64), torch.ones((), dtype=torch.float64)
    half, counts = torch.full((2,), 0.5), torch.tensor([1, 2])
    for name, options in {
        "rho": {"rho": -0.1},
        "C ": {"C": math.nan},
        "rho_min": {"rho_min": -1.0},
        "rho_max": {"rho_max": math.inf},
        "sigma": {"sigma": torch.ones(3)},
        "direction": {"direction": "sideways"},
        "aggregate": {"aggregate": "sum"},
        "objective": {"objective": "none"},
    }.items():
        with pytest.raises(ValueError, match=name):
            ascent_coefficients(matrix, theta_sq, half, counts, 10, **options)
    with pytest.raises(ValueError, match="shares_G"):
        ascent_coefficients(matrix, theta_sq, torch.ones(3), counts, 10)
    with pytest.raises(ValueError, match="counts_G"):
        ascent_coefficients(matrix, theta_sq, half, None, 10)
    with pytest.raises(ValueError, match="theta_sq"):
        ascent_coefficients(matrix, theta_sq.expand(3), half, counts, 10)
    with pytest.raises(ValueError, match="theta_sq"):
        ascent_coefficients(matrix, 1.0, half, counts, 10)
    with pytest.raises(ValueError, match="n_elements"):
        ascent_coefficients(matrix, theta_sq, half, counts, 0)
    with pytest.raises(ValueError, match="gram"):
        ascent_coefficients(matrix.float(), theta_sq, half, counts, 10)
    for rows in (0, 65):
        with pytest.raises(ValueError, match="gram has shape"):
            ascent_coefficients(matrix.new_zeros(rows, rows), None, None, None, 10, rho=0.1)
    with pytest.raises(ValueError, match="friendly"):
        ascent_coefficients(torch.eye(3, dtype=torch.float64), theta_sq, half, counts, 10, direction="friendly")
