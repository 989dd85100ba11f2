"""Lanczos quadrature against the exact Hessian of small networks, in float64."""

import pytest
import torch
from torch import nn

from ltfast.report.curvature import (
    TRACE_LEAST,
    Spectrum,
    flatten,
    hessian_product,
    lanczos,
    residual,
    spectrum,
    unflatten,
)


def small_net(bn=False):
    torch.manual_seed(0)
    norm = [nn.BatchNorm1d(6)] if bn else []
    return nn.Sequential(nn.Linear(5, 6), *norm, nn.Tanh(), nn.Linear(6, 3)).double()


def data(n=37):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 5, generator=generator, dtype=torch.float64), torch.randint(3, (n,), generator=generator)


def per_sample(logits, labels):
    return nn.functional.cross_entropy(logits, labels, reduction="none")


def exact_hessian(model, images, labels):
    params = list(model.parameters())
    model.eval()

    def loss(vector):
        parts = dict(zip([n for n, _ in model.named_parameters()], unflatten(vector, params), strict=True))
        return per_sample(torch.func.functional_call(model, parts, (images,)), labels).mean()

    return torch.autograd.functional.hessian(loss, flatten(params))


@pytest.fixture(params=[False, True], ids=["plain", "batchnorm"])
def problem(request):
    model = small_net(request.param)
    if request.param:
        model(data()[0])  # running statistics that are not the initial ones
    model.train()
    images, labels = data()
    params = list(model.parameters())
    batches = list(zip(images.split(10), labels.split(10), strict=True))
    product = hessian_product(model, params, per_sample, batches)
    return model, product, exact_hessian(small_copy(model), images, labels)


def small_copy(model):
    import copy

    return copy.deepcopy(model)


def test_product_equals_exact_hessian_and_leaves_the_model_alone(problem):
    model, product, hessian = problem
    before = {k: v.clone() for k, v in model.state_dict().items()}
    eye = torch.eye(len(hessian), dtype=torch.float64)
    got = torch.stack([product(v) for v in eye], 1)
    torch.testing.assert_close(got, hessian, rtol=1e-9, atol=1e-12)
    assert hessian.abs().max() > 1e-2
    one_batch_short = got - got[:, :1] * 0.1
    assert not torch.allclose(one_batch_short, hessian, rtol=1e-9, atol=1e-12)
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_complete_lanczos_is_the_whole_spectrum(problem):
    _, product, hessian = problem
    start = torch.randn(len(hessian), dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    got = lanczos(product, start, len(hessian))
    assert got.weights.sum() == pytest.approx(1, abs=1e-12)
    values = torch.linalg.eigvalsh(hessian)
    # Every Ritz value that carries weight is an eigenvalue; zero eigenvalues of equal value merge into one.
    gaps = (got.nodes[:, None] - values).abs().amin(1)
    assert gaps[got.weights > 1e-12].max() < 1e-8
    assert len(got.nodes) > 10


def test_top_eigenvalue_and_trace_lie_within_the_stated_error(problem):
    _, _, hessian = problem
    values = torch.linalg.eigvalsh(hessian)
    found = spectrum(lambda v: hessian @ v, flatten([hessian[0]]), probes=3, steps=12, trace_probes=400)
    top, error = found.top
    assert abs(top - float(values[-1])) <= error + 1e-9
    assert error < 0.02 * top
    assert top <= float(values[-1]) + 1e-9
    low, low_error = found.bottom
    assert abs(low - values).min() <= low_error + 1e-9
    trace, standard = found.trace
    exact = float(hessian.diagonal().sum())
    assert abs(trace - exact) < 4 * standard
    assert standard < 0.1 * exact
    assert abs(0.0 - exact) > 4 * standard  # zeros would not pass
    off_diagonal = float(hessian.sum() - hessian.diagonal().sum())
    assert abs(off_diagonal) > 4 * standard  # nor would 1'H1


def test_quadrature_is_exact_for_polynomials_below_twice_its_steps(problem):
    _, product, hessian = problem
    start = torch.ones(len(hessian), dtype=torch.float64)
    start[::3] = -1
    steps = 4
    got = lanczos(product, start, steps)
    power = start.clone()
    for k in range(2 * steps + 1):
        expected = float(start @ power / (start @ start))
        value = float(got.weights @ got.nodes**k)
        if k < 2 * steps:
            assert value == pytest.approx(expected, rel=1e-8, abs=1e-12)
        else:
            assert value != pytest.approx(expected, rel=1e-8)
        power = hessian @ power


def test_density_has_the_moments_of_the_eigenvalues(problem):
    """Probes that form an orthonormal basis average to the trace without any sampling error."""
    _, _, hessian = problem
    values = torch.linalg.eigvalsh(hessian)
    size = len(values)
    eye = torch.eye(size, dtype=torch.float64)
    quadratures = tuple(lanczos(lambda v: hessian @ v, unit, 3) for unit in eye)
    found = Spectrum(size, quadratures, tuple(q.first for q in quadratures))
    for k in range(6):
        assert found.moment(k) == pytest.approx(float((values**k).mean()), rel=1e-8)
    assert found.moment(6) != pytest.approx(float((values**6).mean()), rel=1e-8)
    assert found.trace[0] == pytest.approx(float(values.sum()), rel=1e-12)
    grid = torch.linspace(float(values[0]) - 1, float(values[-1]) + 1, 4001, dtype=torch.float64)
    step, sigma = float(grid[1] - grid[0]), 0.02
    density = found.density(grid, sigma)
    assert float(density.sum() * step) == pytest.approx(1, abs=1e-6)
    assert float((density * grid).sum() * step) == pytest.approx(float(values.mean()), rel=1e-5)
    second = float((density * grid**2).sum() * step)
    assert second == pytest.approx(float(values.square().mean()) + sigma**2, rel=1e-5)


def test_reorthogonalisation_keeps_single_eigenvalues_single():
    values = torch.cat(
        [torch.linspace(0, 1, 60, dtype=torch.float64), torch.tensor([50.0, 100.0], dtype=torch.float64)]
    )
    matrix = torch.diag(values)
    got = lanczos(lambda v: matrix @ v, torch.ones(62, dtype=torch.float64), 50)
    assert (got.nodes > 40).sum() == 2
    torch.testing.assert_close(got.nodes[-2:], values[-2:], rtol=1e-12, atol=0)
    torch.testing.assert_close(got.weights[-2:], torch.full((2,), 1 / 62, dtype=torch.float64), rtol=1e-9, atol=0)


def test_a_second_probe_that_is_broken_off_counts_for_the_trace_alone():
    """Its few nodes would stand as a peak of the density."""
    diagonal, calls = torch.linspace(0.0, 1.0, 40, dtype=torch.float64), []
    found = spectrum(
        lambda v: diagonal * v, diagonal, probes=2, steps=12,
        stop=lambda: len(calls) >= 13, tick=lambda: calls.append(0),
    )  # fmt: skip
    assert [len(q.nodes) for q in found.quadratures] == [12]
    assert len(found.quadratic_forms) == 2


def test_fused_attention_has_a_hessian():
    """torch's kernels for it have no second derivative."""
    torch.manual_seed(0)

    class Attention(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(4, 4))

        def forward(self, x):
            y = (x @ self.weight)[:, None]
            return torch.nn.functional.scaled_dot_product_attention(y, y, y)[:, 0].mean(1)

    model = Attention()
    x, y = torch.randn(3, 5, 4), torch.tensor([0, 1, 2])
    product = hessian_product(
        model, [model.weight], lambda z, y: torch.nn.functional.cross_entropy(z, y, reduction="none"), [(x, y)]
    )
    vectors = torch.randn(2, 16)
    a, b = product(vectors[0]), product(vectors[1])
    assert a.norm() > 0
    assert float(vectors[1] @ a) == pytest.approx(float(vectors[0] @ b), rel=1e-3)


def test_stop_ends_early_with_what_there_is():
    matrix = torch.diag(torch.arange(1.0, 31.0, dtype=torch.float64))
    calls = []
    found = spectrum(
        lambda v: matrix @ v, torch.zeros(30, dtype=torch.float64), probes=5, steps=20, trace_probes=9,
        stop=lambda: len(calls) >= 3, tick=lambda: calls.append(0),
    )  # fmt: skip
    assert len(calls) == 3
    assert len(found.quadratures) == 1
    assert len(found.quadratures[0].nodes) == 3
    assert found.trace[0] == pytest.approx(465, rel=1e-9)  # diagonal matrix: every sign vector gives the trace exactly
    assert found.trace[1] != found.trace[1]


def test_the_residual_holds_where_products_are_rounded(problem):
    """Lanczos bounds its own error alone: products off by 1e-3, as those of float32 are by less, leave that bound far behind."""
    _, _, hessian = problem
    values, size = torch.linalg.eigvalsh(hessian), len(hessian)
    noise = torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).triu(1)
    rounded = hessian + 1e-3 * values[-1] * (noise + noise.T) / (2 * size) ** 0.5
    found = spectrum(lambda v: rounded @ v, flatten([hessian[0]]), probes=1, steps=size)
    lanczos_value, lanczos_error = found.top
    assert abs(lanczos_value - float(values[-1])) > 10 * lanczos_error
    value, error = residual(lambda v: hessian @ v, found.best.vector)
    assert float((values - value).abs().min()) <= error < 0.01 * value
    assert abs(value - float(values[-1])) < abs(lanczos_value - float(values[-1]))


def test_a_trace_of_few_probes_has_no_standard_error():
    for probes in (1, TRACE_LEAST - 1, TRACE_LEAST):
        found = spectrum(
            lambda v: v.flip(0), torch.zeros(9, dtype=torch.float64), steps=3, probes=1, trace_probes=probes - 1
        )
        assert len(found.quadratic_forms) == probes
        assert (found.trace[1] == found.trace[1]) == (probes >= TRACE_LEAST)


def test_zero_hessian_breaks_down_at_once():
    got = lanczos(torch.zeros_like, torch.ones(7), 5)
    assert got.nodes.tolist() == [0.0]
    assert got.residuals.tolist() == [0.0]


def test_flatten_and_unflatten_are_inverse():
    tensors = [torch.randn(2, 3), torch.randn(4), torch.randn(1, 1, 2)]
    for a, b in zip(unflatten(flatten(tensors), tensors), tensors, strict=True):
        assert torch.equal(a, b)
