"""No host synchronisation on the step path, and the whole chain inside a CUDA graph with device scalars."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ltfast.kernels import adamw_step, anchor_penalty, ascent_coefficients, gram, gram_partials, perturb, sgd_step

from .support import PLACES, normal, same_bits

N, G = 3001, 4
WAITS = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "unique")


class NoHostReads(TorchDispatchMode):
    """Fails on every operator that needs a value on the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        assert name not in WAITS, f"{name} waits for the device"
        assert not (name == "_to_copy" and args[0].is_cuda and "cpu" in str((kwargs or {}).get("device"))), (
            "copied to host"
        )
        return func(*args, **(kwargs or {}))


class Chain:
    """Ascent, GSA's coefficients, perturbation in place, anchored update that takes it back; all numbers on the device."""

    def __init__(self, place: str) -> None:
        self.theta, self.buf, self.kept = (
            normal(N, seed=1).to(place),
            torch.zeros(N, device=place),
            normal(N, seed=2).to(place),
        )
        self.rows = normal(G, N, seed=3).to(place)
        self.moments = [torch.zeros(N, device=place) for _ in range(2)]
        self.other = normal(N, seed=4).to(place)
        self.shares, self.counts = (
            torch.tensor([0.4, 0.3, 0.2, 0.1], device=place),
            torch.tensor([50, 20, 9, 1], device=place),
        )
        self.lr, self.strength, self.step_count = (torch.tensor(v, device=place) for v in (0.1, 0.5, 1.0))
        self.anchor = (normal(N, seed=5).abs().to(place), normal(N, seed=6).to(place), self.strength)

    def __call__(self) -> None:
        coef, stats = ascent_coefficients(
            *gram_partials(self.rows, self.theta, True), self.shares, self.counts, N, rho_max=self.strength
        )
        perturb(self.theta, self.rows, coef, True, out=self.theta, keep=self.kept)
        found = 1 - stats.ok
        sgd_step(
            self.theta, self.rows[0], self.buf, self.lr, 0.9, anchor=self.anchor, source=self.kept, found_inf=found,
            grad_scale=self.strength, first_step=found,
        )  # fmt: skip
        adamw_step(self.other, self.rows[1], *self.moments, self.step_count, self.lr, anchor=self.anchor)
        matrix, _ = gram(self.rows, self.theta)
        self.other += 1e-6 * matrix[0, 0].float() + anchor_penalty(self.theta, self.rows, self.rows**2, self.shares)


@pytest.mark.parametrize("place", PLACES)
def test_nothing_waits_for_the_device(place):
    chain = Chain(place)
    before = chain.theta.clone()
    with NoHostReads():
        chain()
    assert not same_bits(chain.theta, before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_captured_step_follows_device_scalars():
    eager, captured = Chain("cuda"), Chain("cuda")
    eager()
    eager()  # the two runs that capture makes as a warm-up
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        captured()
        captured()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured()
    for lr in (0.1, 0.02, 0.5):
        eager.lr.fill_(lr)
        captured.lr.fill_(lr)
        eager()
        graph.replay()
        assert same_bits(eager.theta, captured.theta)
        assert same_bits(eager.other, captured.other)
