"""Kernels launched and parameter-sized passes of whole optimizer steps, counted, not timed."""

import pytest
import torch

from ltfast.kernels import ascent_coefficients, collapse_anchors, common, counting, gram_partials, perturb, sgd_step

from .support import normal

N, G = 1500, 4


def sam_step(theta, rows, buf, kept):
    """SAM in place: theta is kept aside by the ascent and read back by the update."""
    coef, _ = ascent_coefficients(*gram_partials(rows[:1]), None, None, N, direction="joint", rho=0.05)
    perturb(theta, rows[:1], coef, out=theta, keep=kept)
    sgd_step(theta, rows[0], buf, 0.1, 0.9, weight_decay=5e-4, source=kept)


def sam_step_with_working_copy(theta, rows, buf, working):
    """SAM with a working copy: theta never moves, the update refreshes the copy."""
    coef, _ = ascent_coefficients(*gram_partials(rows[:1]), None, None, N, direction="joint", rho=0.05)
    perturb(theta, rows[:1], coef, out=working)
    sgd_step(theta, rows[0], buf, 0.1, 0.9, weight_decay=5e-4, mirror=working)


def gsa_step(theta, rows, buf, kept, anchor=None):
    """GSA, adaptive, one shared perturbation of the four groups' gradients."""
    shares, counts = torch.full((G,), 1 / G), torch.tensor([100, 50, 20, 5])
    coef, _ = ascent_coefficients(*gram_partials(rows, theta, True), shares, counts, N)
    perturb(theta, rows, coef, True, out=theta, keep=kept)
    sgd_step(theta, rows[0], buf, 0.1, 0.9, weight_decay=5e-4, source=kept, anchor=anchor)


def gsa_gkp_step(theta, rows, buf, kept):
    """GSA with the collapsed GKP anchor in the update pass."""
    gsa_step(theta, rows, buf, kept, anchor=(buf.abs(), kept.clone(), 0.1))


# step: kernels and passes it makes, and the targets of the project
STEPS = {
    sam_step: (4, 10, 4, 10),
    sam_step_with_working_copy: (4, 10, 4, 10),
    gsa_step: (4, 17, 5, 18),
    gsa_gkp_step: (4, 19, 5, 20),
}


@pytest.mark.parametrize("step", list(STEPS), ids=lambda s: s.__name__)
def test_kernels_and_passes_of_a_step(step):
    kernels, passes, most_kernels, most_passes = STEPS[step]
    theta, buf, kept = normal(N, seed=1), normal(N, seed=2), torch.zeros(N)
    with counting() as counters:
        step(theta, normal(G, N, seed=3), buf, kept)
    assert (counters.kernels, counters.passes) == (kernels, passes)
    assert counters.bytes == passes * N * 4
    assert kernels <= most_kernels
    assert passes <= most_passes
    if common.INTERPRET:  # what was declared is what was launched
        assert len(counters.launched) == counters.kernels
    assert torch.isfinite(theta).all()


def test_bytes_follow_the_dtypes():
    rows, theta, out = normal(2, N, seed=1).bfloat16(), normal(N, seed=2), torch.empty(N, dtype=torch.bfloat16)
    with counting() as counters:
        perturb(theta, rows, torch.ones(2), out=out)
    assert (counters.passes, counters.bytes) == (4, N * (4 + 2 * 2 + 2))


def test_many_rows_and_a_regrouping_declare_what_they_launch():
    rows = normal(12, 100, seed=1)
    with counting() as counters:
        ascent_coefficients(*gram_partials(rows), None, None, 100, rho=0.1)
        collapse_anchors(rows, rows**2, torch.ones(12))
    by_op = {cost.op: cost.kernels for cost in counters.ops}
    assert by_op == {"gram_partials": 1, "ascent_coefficients": 1, "collapse_anchors": 2} | (
        {"gram_reduce": 1}
        if common.INTERPRET
        else {}  # 12 rows leave several partials, which take a launch of their own
    )
    if common.INTERPRET:
        assert len(counters.launched) == counters.kernels


def test_nothing_is_counted_outside():
    with counting() as counters:
        pass
    gram_partials(torch.ones(1, 3))
    assert counters.ops == []
    assert counters.launched == []
