"""The copies that make a sharpness-aware step ten passes: `keep` of perturb, `source` of sgd_step and adamw_step."""

import pytest
import torch

from ltfast.kernels import adamw_step, ascent_coefficients, counting, gram, perturb, sgd_step

SIZES = (1, 127, 1024, 2500)


def arrays(n: int, count: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, generator=generator) for _ in range(count)]


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("adaptive", [False, True])
def test_keep_is_theta_bit_for_bit_and_out_is_unchanged_by_it(n: int, adaptive: bool) -> None:
    theta, g, h = arrays(n, 3)
    if n > 1:
        theta[0] = -0.0
    rows = torch.stack([g, h])
    expected = perturb(theta, rows, [0.3, -0.2], adaptive)
    before, keep = theta.clone(), torch.full((n,), 7.0)
    out = perturb(theta, rows, [0.3, -0.2], adaptive, out=theta, keep=keep)
    assert out is theta
    assert torch.equal(keep.view(torch.int32), before.view(torch.int32))
    assert torch.equal(theta, expected)
    assert not torch.equal(theta, before)


def test_out_may_be_one_of_the_rows() -> None:
    g, m = arrays(1500, 2)
    expected = 0.9 * m + 0.1 * g
    rows = torch.stack([g, m])
    perturb(rows[1], rows, [0.1, -0.1], out=rows[1])
    torch.testing.assert_close(rows[1], expected, atol=1e-6, rtol=0)  # observed 2.4e-7
    assert torch.equal(rows[0], g)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_an_update_from_a_source_equals_restore_then_update(n: int, skip: bool, kind: str) -> None:
    theta, grad, climbed, anchor_weight, anchor_target, *state = arrays(n, 7)
    state = [state[0], state[1].abs()]
    found = torch.tensor(float(skip))
    anchor = (anchor_weight.abs(), anchor_target, 0.3)

    def update(target: torch.Tensor, source: torch.Tensor | None) -> list[torch.Tensor]:
        slots = [s.clone() for s in state]
        common = {"weight_decay": 1e-2, "anchor": anchor, "grad_scale": 0.5, "found_inf": found, "source": source}
        if kind == "sgd":
            sgd_step(target, grad, slots[0], 0.1, 0.9, nesterov=True, **common)
        else:
            adamw_step(target, grad, *slots, 3, 1e-2, **common)
        return [target, *slots]

    expected = update(theta.clone(), None)
    from_source = update(climbed.clone(), theta)
    for a, b in zip(expected, from_source, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(from_source[0], theta) == skip
    if not skip:  # an update that read the working copy is something else
        assert not torch.allclose(update(climbed.clone(), None)[0], expected[0])


def test_passes() -> None:
    theta, g, keep, m = arrays(512, 4)
    with counting() as cost:
        perturb(theta, g[None], [0.1], out=theta, keep=keep)
        sgd_step(theta, g, m, 0.1, 0.9, source=keep)
    assert (cost.kernels, cost.passes) == (2, 9)


def test_bad_arguments_write_nothing() -> None:
    theta, g, m = arrays(64, 3)
    before = theta.clone()
    for name, call in {
        "keep": lambda: perturb(theta, g[None], [0.1], out=theta, keep=torch.zeros(63)),
        "keep ": lambda: perturb(theta, g[None], [0.1], out=theta, keep=theta),
        "source": lambda: sgd_step(theta, g, m, 0.1, 0.9, source=torch.zeros(64, dtype=torch.float64)),
    }.items():
        with pytest.raises(ValueError, match=name.strip()):
            call()
    assert torch.equal(theta, before)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy, in triton's interpreter
@pytest.mark.parametrize("objective", ["shared", "per_group"])
def test_bad_tells_a_gradient_that_is_not_finite_from_one_that_is_zero(objective: str) -> None:
    theta, *rows = arrays(300, 3)
    for value, bad, ok in ((1.0, 0, 1), (0.0, 0, 0), (torch.inf, 1, 0), (torch.nan, 1, 0)):
        stacked = torch.stack(rows)
        stacked[:, :200] = value
        if value == 0:
            stacked.zero_()
        _, stats = ascent_coefficients(
            *gram(stacked, theta), torch.tensor([0.5, 0.5]), torch.tensor([3.0, 4.0]), 300, objective=objective
        )
        assert (float(stats.bad), float(stats.ok)) == (bad, ok)
