"""perturb against theta + s^2 * sum_j c_j g_j written out in float64."""

import math

import pytest
import torch
from torch import Tensor

from ltfast.kernels import perturb

from .support import PLACES, check, narrowed, normal, same_bits

SHAPES = [(1, 1), (1, 1025), (2, 7), (4, 1003), (5, 1024), (8, 65), (17, 333), (64, 33)]
WIDE, NARROW = torch.float32, torch.bfloat16


def moved(theta: Tensor, grads: Tensor, coef: Tensor, adaptive: bool) -> Tensor:
    scale = theta.double() ** 2 if adaptive else 1.0
    return theta.double() + scale * sum(c.double() * g.double() for c, g in zip(coef, grads, strict=True))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize(("rows", "n"), SHAPES)
def test_perturbation(place, rows, n, adaptive):
    theta, grads, coef = normal(n, seed=1) + 2, normal(rows, n, seed=2), normal(rows, seed=3) / math.sqrt(rows)
    out = perturb(theta.to(place), grads.to(place), coef.to(place), adaptive)
    assert out.dtype == torch.float32
    expected = moved(theta, grads, coef, adaptive)
    wrong = [moved(theta, grads[:-1], coef[:-1], adaptive), moved(theta, grads, -coef, adaptive), theta]
    check(out, expected, "elementwise", wrong)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("grads_dtype", "out_dtype"), [(NARROW, WIDE), (WIDE, NARROW), (NARROW, NARROW)])
def test_bfloat16_gradients_and_working_copy(place, grads_dtype, out_dtype):
    theta, grads = normal(1030, seed=4), normal(3, 1030, seed=5, dtype=grads_dtype)
    coef = torch.tensor([0.5, -1.0, 2.0])
    out = torch.full((1030,), 7.0, dtype=out_dtype, device=place)
    returned = perturb(theta.to(place), grads.to(place), coef.to(place), out=out)
    assert returned is out
    expected = moved(theta, grads, coef, False)
    kind = "elementwise" if out_dtype == WIDE else "bf16"
    check(out, expected, kind, [moved(theta, grads[:2], coef[:2], False)])
    if out_dtype == NARROW:  # one rounding of the float32 result, nothing more
        assert same_bits(out, narrowed(perturb(theta.to(place), grads.to(place), coef.to(place))))


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # numpy, under the interpreter
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("rows", [3, 11])
def test_a_zero_coefficient_removes_its_row_whatever_it_holds(place, rows):
    theta, grads, coef = normal(200, seed=6), normal(rows, 200, seed=7), normal(rows, seed=8)
    coef[1] = 0
    expected = moved(theta, grads, coef, True)
    grads[1] = torch.nan
    grads[1, ::2] = torch.inf
    check(perturb(theta.to(place), grads.to(place), coef.to(place), True), expected, "elementwise")
    untouched = perturb(theta.to(place), grads.to(place), torch.zeros(rows, device=place))
    assert same_bits(untouched, theta)


@pytest.mark.parametrize("place", PLACES)
def test_in_place_on_slices_of_a_larger_buffer_and_two_runs(place):
    buffer, rows = normal(600, seed=9).to(place), normal(2, 600, seed=10).to(place)
    coef = torch.tensor([0.3, -0.7], device=place)
    part = slice(5, 500)
    before = buffer.clone()
    expected = moved(buffer[part].cpu(), rows[:, part].cpu(), coef.cpu(), False)
    first = perturb(buffer[part], rows[:, part], coef)
    perturb(buffer[part], rows[:, part], coef, out=buffer[part])
    check(buffer[part], expected, "elementwise", [before[part]])
    assert same_bits(buffer[part], first)
    assert same_bits(buffer[:5], before[:5])
    assert same_bits(buffer[500:], before[500:])


@pytest.mark.parametrize("place", PLACES)
def test_a_hundred_perturbations_leave_theta_alone(place):
    theta, grads = normal(100, seed=11).to(place), normal(4, 100, seed=12).to(place)
    before = theta.clone()
    out = torch.empty_like(theta)
    for i in range(100):
        perturb(theta, grads, torch.full((4,), 0.01 * i, device=place), True, out)
    assert same_bits(theta, before)


def test_bad_arguments_are_named_and_nothing_is_written():
    theta, grads, coef = torch.ones(8), torch.ones(2, 8), torch.ones(2)
    out = torch.full((8,), 5.0)
    for name, arguments in {
        "theta_N": (theta.half(), grads, coef, False, out),
        r"theta_N is torch\.bfloat16": (theta.bfloat16(), grads, coef, False, out),
        "theta_N must be": (theta[::2], grads[:, ::2], coef, False, out),
        "grads_GN": (theta, grads[:, :7], coef, False, out),
        "grads_GN is": (theta, grads.long(), coef, False, out),
        "coef_G has shape": (theta, grads, torch.ones(3), False, out),
        "coef_G holds nan": (theta, grads, [1.0, math.nan], False, out),
        "coef_G must be": (theta, grads, 1.0, False, out),
        "coef_G must": (theta, grads, [[1.0, 1.0]], False, out),
        "coef_G lies on meta": (theta, grads, coef.to("meta"), False, out),
        "out has 7": (theta, grads, coef, False, out[:7]),
        "out is": (theta, grads, coef, False, out.half()),
        r"keep is torch\.bfloat16": (theta, grads, coef, False, out, out.bfloat16()),
    }.items():
        with pytest.raises(ValueError, match=name):
            perturb(*arguments)
    assert (out == 5).all()


def test_memory_that_is_shared_out_of_place_is_refused():
    buffer = torch.arange(40.0)
    before = buffer.clone()
    theta, rows, coef = buffer[:8], buffer[16:].view(3, 8), torch.ones(3)
    for name, arguments in {
        "out shares memory with grads_GN": (theta, buffer[4:28].view(3, 8), coef, False, theta),
        "out shares memory with grads_GN:": (theta, rows, coef, False, buffer[28:36]),
        "theta_N shares memory with out": (theta, rows, coef, False, buffer[2:10]),
        "out shares": (theta, rows[::2], torch.ones(2), False, buffer[20:28]),
        "keep shares memory with grads_GN": (theta, rows, coef, False, theta, rows[1]),
        "theta_N shares memory with keep": (theta, rows, coef, False, buffer[8:16], theta),
        "keep shares memory with out": (theta, rows, coef, False, buffer[6:14], buffer[8:16]),
        "theta_N shares memory with out,": (theta, rows, coef, False, theta.view(torch.bfloat16)[:8]),
    }.items():
        with pytest.raises(ValueError, match=name):
            perturb(*arguments)
    assert torch.equal(buffer, before)
    expected = theta + rows[0] + rows[2]
    for out in (buffer[8:16], rows[1], rows[2], theta):  # apart, between the rows, one of them, theta itself
        buffer.copy_(before)
        assert torch.equal(perturb(theta, rows[::2], torch.ones(2), out=out), expected)
