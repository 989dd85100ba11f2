"""The registered ops: schema, fake implementation, autograd; torch.compile without a graph break."""

import pytest
import torch
from torch import Tensor

from ltfast.kernels import (
    adamw_step,
    anchor_penalty,
    ascent_coefficients,
    collapse_anchors,
    gram,
    gram_partials,
    perturb,
    sgd_step,
)

from .support import check, normal, same_bits, skip_if_interpreting

N, G = 37, 3


def arrays(count: int, seed: int = 1) -> list[Tensor]:
    return [normal(N, seed=seed + i).abs() for i in range(count)]


def op_samples() -> dict[str, list[tuple]]:
    theta, grad, a, b, c, mirror = arrays(6)
    rows, coef, one = normal(G, N, seed=9), normal(G, seed=10), torch.ones(())
    partials = gram_partials(rows, theta)
    scalars = (0.1, None, 0.0, None, 1.0, None)
    pictures, filters = normal(2, 16, 3, 4, seed=11), normal(16, 16, 3, 3, seed=12)
    device_scalars = (0.0, one, 0.0, one, 0.0, one)
    rule = (0.0, None, 0.1, None, 2e-3, None, 3e-3, None, 1.0, None)
    return {
        "gram_partials": [(rows, theta, True), (rows, None, False)],
        "gram_reduce": [partials],
        "ascent_coefficients": [
            (*partials, coef.abs(), coef.abs(), N, "orthogonal", True, *rule, "uniform", "shared"),
            (partials[0], None, None, None, N, "joint", False, *rule, "uniform", "per_group"),
        ],
        "perturb": [(theta, rows, coef, True, torch.empty(N), None), (theta, rows, coef, False, mirror, a.clone())],
        "sgd_step": [
            (theta, None, grad, None, None, None, None, None, *scalars, None, 1.0, 0.0, 0.1, False),
            (theta, a, grad, b, c, c.clone(), mirror, one, *device_scalars, one, 1.0, 0.9, 0.1, True),
        ],
        "adamw_step": [
            (theta, None, grad, a, b, None, None, None, None, *scalars, 3.0, None, 0.9, 0.999, 1e-8, 0.1),
            (theta, c, grad, a, b, c, c.clone(), mirror, one, *device_scalars, 0.0, one, 0.9, 0.999, 1e-8, 0.1),
        ],
        "anchor_penalty": [(theta.clone().requires_grad_(), rows, rows**2, coef)],
        "anchor_grad": [(theta, rows, rows**2, coef, one)],
        "collapse_anchors": [(rows, rows**2, coef.abs())],
        "conv3x3_nhwc": [
            (pictures.clone().requires_grad_(), filters.clone().requires_grad_(), False),
            (pictures, filters, True),
        ],
        "conv3x3_nhwc_weight": [(pictures, pictures)],
    }


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # torch's opcheck
@pytest.mark.parametrize("name", list(op_samples()))
def test_opcheck(name):
    op = getattr(torch.ops.ltfast, name).default
    for args in op_samples()[name]:
        results = torch.library.opcheck(op, args)
        assert set(results.values()) == {"SUCCESS"}


@skip_if_interpreting()
def test_a_whole_step_compiles_without_a_graph_break():
    def step(theta, rows, buf, moments, anchor, lr, mirror):
        partials, theta_sq = gram_partials(rows, theta, True)
        shares, counts = rows.new_tensor([0.5, 0.3, 0.2]), rows.new_tensor([100.0, 10.0, 1.0])
        coef, stats = ascent_coefficients(partials, theta_sq, shares, counts, N)
        moved = perturb(theta, rows, coef, True)
        matrix, _ = gram(rows, theta)
        weight, target, const = collapse_anchors(rows, rows**2, shares)
        sgd_step(theta, moved * 0.1, buf, lr, 0.9, anchor=(weight, target, 0.1), mirror=mirror)
        adamw_step(anchor, rows[0].contiguous(), *moments, 2, lr)
        return moved, stats.length_sq, matrix, const

    def inputs():
        theta, buf, m, v, anchor, mirror = arrays(6)
        return theta, normal(G, N, seed=3), buf, [m, v], anchor, torch.tensor(0.1), mirror

    eager, compiled = inputs(), inputs()
    expected = step(*eager)
    actual = torch.compile(step, fullgraph=True, backend="aot_eager")(*compiled)
    assert all(same_bits(a, b) for a, b in zip(expected, actual, strict=True))
    for i in (0, 2, 4, 6):  # everything the updates wrote
        assert same_bits(eager[i], compiled[i])
    assert not same_bits(eager[0], inputs()[0])


@skip_if_interpreting()
def test_a_scheduled_python_number_compiles_without_a_graph_break():
    """torch.compile makes a number that changes between calls symbolic."""
    rows = normal(2, N, seed=3)

    def step(theta, lr):
        moved = perturb(theta, rows, [lr, 2.0])
        sgd_step(theta, rows[0], None, lr)
        adamw_step(theta, rows[1], torch.zeros(N), torch.zeros(N), 1, lr)
        return moved

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for lr in (0.1, 0.2, 0.3):
        expected, actual = normal(N, seed=5), normal(N, seed=5)
        assert same_bits(step(expected, lr), compiled(actual, lr))
        assert same_bits(expected, actual)


@skip_if_interpreting()
def test_the_penalty_differentiates_inside_torch_compile():
    rows, coef = normal(G, N, seed=4), torch.ones(G)

    def loss(theta):
        return (theta**2).sum() + anchor_penalty(theta, rows, rows**2, coef)

    eager, compiled = (normal(N, seed=5).requires_grad_() for _ in range(2))
    loss(eager).backward()
    torch.compile(loss, fullgraph=True, backend="aot_eager")(compiled).backward()
    check(compiled.grad, eager.grad, "elementwise", [2 * eager])


@pytest.mark.parametrize("name", ["perturb", "sgd_step"])
def test_autograd_notices_what_an_op_has_overwritten(name):
    theta, grad = arrays(2)
    w = theta.clone().requires_grad_()
    loss = (w * theta).sum()  # keeps theta for its backward pass
    if name == "perturb":
        perturb(grad, grad[None], [1.0], out=theta)
    else:
        sgd_step(theta, grad, None, 0.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
