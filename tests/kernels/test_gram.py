"""gram and gram_partials against sums written out pair by pair in float64."""

import pytest
import torch
from torch import Tensor

from ltfast.kernels import gram, gram_partials

from .support import PLACES, check, normal, same_bits

SMALL_ROWS = 8  # above, tiles go through the tensor cores where there are any

# Rows and lengths: one, odd, a block and one more (512 to 2048 by R; 32 above 8 rows), several programs.
SHAPES = [(1, 1), (1, 2049), (2, 7), (3, 1003), (4, 1025), (5, 513), (8, 1), (9, 33), (17, 100), (64, 65), (4, 5003)]


def kind(place: str, rows: int) -> str:
    """Class of error."""
    return "tensor cores" if place == "cuda" and rows > SMALL_ROWS else "reduction"


def pairwise(grads: Tensor, theta: Tensor, adaptive: bool) -> Tensor:
    scale = theta.double().abs() if adaptive else torch.ones_like(theta, dtype=torch.float64)
    rows = [scale * g.double() for g in grads]
    return torch.stack([torch.stack([(a * b).sum() for b in rows]) for a in rows])


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize(("rows", "n"), SHAPES)
def test_gram_is_the_matrix_of_inner_products(place, rows, n, adaptive):
    grads, theta = normal(rows, n, seed=1) + 0.5, normal(n, seed=2) + 0.1
    matrix, theta_sq = gram(grads.to(place), theta.to(place), adaptive)
    assert matrix.dtype == theta_sq.dtype == torch.float64
    assert theta_sq.shape == ()
    less = pairwise(grads[:, :-1], theta[:-1], adaptive)  # the last element forgotten
    check(matrix, pairwise(grads, theta, adaptive), kind(place, rows), [less, pairwise(grads, theta, not adaptive)])
    check(theta_sq, (theta.double() ** 2).sum(), "reduction", [(theta[:-1].double() ** 2).sum()])


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("rows", "n"), [(1, 777), (4, 777), (5, 777), (7, 1025), (8, 3), (17, 777)])
def test_bfloat16_gradients(place, rows, n):
    grads, theta = normal(rows, n, seed=3, dtype=torch.bfloat16), normal(n, seed=4)
    matrix, _ = gram(grads.to(place), theta.to(place), True)
    check(matrix, pairwise(grads, theta, True), kind(place, rows), [pairwise(grads, theta, False)])


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("rows", [2, 12])
def test_slices_of_a_larger_buffer(place, rows):
    buffer, theta = normal(rows, 500, seed=5).to(place), normal(500, seed=6).to(place)
    part = slice(3, 400)  # rows at a distance of 500, not aligned to 16 bytes
    matrix, theta_sq = gram(buffer[:, part], theta[part])
    check(matrix, pairwise(buffer[:, part].cpu(), theta[part].cpu(), False), kind(place, rows))
    check(theta_sq, (theta[part].double() ** 2).sum(), "reduction")


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("rows", [4, 9])
def test_two_runs_agree_bit_for_bit_and_partials_add_up(place, rows):
    grads, theta = normal(rows, 3000, seed=7).to(place), normal(3000, seed=8).to(place)
    first, second = gram(grads, theta, True), gram(grads, theta, True)
    assert all(same_bits(a, b) for a, b in zip(first, second, strict=True))
    partials, theta_sq = gram_partials(grads, theta, True)
    check(partials.sum(0), first[0], "reduction")
    check(theta_sq.sum(0), first[1], "reduction")


@pytest.mark.parametrize("place", PLACES)
def test_theta_may_be_left_out_and_infinity_shows(place):
    grads = normal(2, 100, seed=9).to(place)
    partials, theta_sq = gram_partials(grads)
    check(partials.sum(0), pairwise(grads.cpu(), torch.ones(100), False), "reduction")
    assert theta_sq.sum() == 0
    grads[1, 50] = torch.inf
    matrix = gram_partials(grads)[0].sum(0)
    assert torch.isfinite(matrix[0, 0])
    assert not torch.isfinite(matrix[1, 1])


def test_bad_arguments_are_named():
    grads, theta = torch.ones(2, 8), torch.ones(8)
    with pytest.raises(ValueError, match="grads_GN has rows of 8"):
        gram(grads, theta[:7])
    with pytest.raises(ValueError, match=r"grads_GN is torch\.float16"):
        gram(grads.half(), theta)
    with pytest.raises(ValueError, match=r"theta_N is torch\.bfloat16"):
        gram(grads, theta.bfloat16())
    with pytest.raises(ValueError, match=r"theta_N is torch\.bfloat16"):
        gram_partials(grads, theta.bfloat16())
    with pytest.raises(ValueError, match="grads_RN must be"):
        gram_partials(theta)
    with pytest.raises(ValueError, match="grads_RN must be"):
        gram_partials(torch.ones(8, 2).T)
    with pytest.raises(ValueError, match="65 rows"):
        gram_partials(torch.ones(65, 2))
    with pytest.raises(ValueError, match="empty"):
        gram_partials(torch.ones(2, 0))
    with pytest.raises(ValueError, match="lies on meta"):
        gram(grads.to("meta"), theta)
    with pytest.raises(ValueError, match="theta_N is None"):
        gram_partials(grads, None, True)
