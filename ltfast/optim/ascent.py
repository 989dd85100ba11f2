"""From a Gram matrix to the coefficients of an ascent: the part of the engine that never touches a parameter.

Mode E asks for exact coefficients; mode R remembers a [G, G] Gram matrix, mixes a fresh one in every few steps, and takes
the coefficients of every other step from it. Everything is a few numbers on the device; nothing waits for them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ltfast.kernels import ascent_coefficients
from ltfast.optim.rules import Rule

# Mode R: below this ratio of |sum_j c_j u_j|^2 to (sum_j |c_j| |u_j|)^2 the groups' terms nearly cancel and a stale Gram
# matrix no longer tells where their sum points: the step then takes the plain SAM direction at the intended norm.
CANCELLATION = 1e-2


class Ascent:
    """Coefficients by `rule` for groups of `counts` [G] images and d = `n_elements` perturbed parameters.

    Attributes:
        stats: device tensors describing the last ascent, for logging.
        memory: [G, G] Gram matrix of mode R, valid once `remembers`; theta_sq: |theta|^2 that goes with it.
        seen: [G] 1 where the group's moving average has begun ("friendly").
        refresh: cosines between the remembered and the exact direction at refreshes: sum, count, smallest.
    """

    def __init__(self, rule: Rule, counts: Tensor, n_elements: int, device: torch.device) -> None:
        self.rule, self.n_elements, self.device = rule, n_elements, device
        self.stats: dict[str, Tensor] = {}
        self.start(counts)

    def start(self, counts: Tensor) -> None:
        """Begin afresh with groups of `counts` [G] images."""
        device = self.device
        self.counts = counts.to(device, torch.float32)
        self.n_groups = counts.numel()
        self.n_rows = self.n_groups * (2 if self.rule.direction == "friendly" else 1)
        # Changed in place only, here and below: a CUDA graph finds it where it was.
        self.memory = torch.zeros(self.n_groups, self.n_groups, dtype=torch.float64, device=device)
        self.theta_sq = torch.zeros((), dtype=torch.float64, device=device)
        self.remembers = False
        self.seen = torch.zeros(self.n_groups, device=device)
        self.tail = torch.arange(self.n_groups, device=device).clamp_max(1).float()  # what a split rule perturbs
        self.steps = 0
        self.refresh = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64, device=device)

    def coefficients(self, matrix: Tensor, theta_sq: Tensor | None, shares: Tensor) -> Tensor:
        """[R] for a shared perturbation, [G, R] per group, from the Gram matrix (or its partials) of this step."""
        rule = self.rule
        options: dict[str, Any] = {
            "direction": rule.direction,
            "objective": rule.objective,
            "rho": rule.rho,
            "C": rule.radius_C,
            "rho_min": rule.rho_min,
            "rho_max": rule.rho_max,
            "sigma": rule.sigma * self.seen if rule.direction == "friendly" else rule.sigma,
            "aggregate": rule.aggregate,
        }
        weights = shares * self.tail if rule.split else shares
        coef, stats = ascent_coefficients(matrix, theta_sq, weights, self.counts, self.n_elements, **options)
        self.stats = stats._asdict()
        return coef

    def average_weights(self, shares: Tensor) -> Tensor:
        """[G] weight of this step's gradient in the moving averages ("friendly"); 0: leave the average alone."""
        present = (shares > 0).float() * self.stats["ok"]
        weights = present * torch.where(self.seen > 0, 1 - self.rule.lmbda, 1.0)
        torch.maximum(self.seen, present, out=self.seen)
        return weights

    # -- mode R ----------------------------------------------------------------------------------------------------------

    def refreshed(self, matrix: Tensor, theta_sq: Tensor, shares: Tensor) -> Tensor:
        """Exact coefficients at a refresh: mix the matrix into the memory, log how far off the memory's were."""
        self.theta_sq.copy_(theta_sq)
        stale = self.stale_coefficients(shares)[0] if self.remembers else None
        self._remember(matrix, shares)
        coef = self.coefficients(matrix, self.theta_sq, shares)
        if stale is not None:
            self._compare(stale.double(), coef.double(), matrix.double())
        return coef

    def _remember(self, matrix: Tensor, shares: Tensor) -> None:
        present = (shares > 0) & torch.isfinite(matrix).all()  # a batch that overflowed leaves no trace
        both = present[:, None] & present[None, :]
        ema = self.rule.gram_ema
        known = self.memory.diagonal() > 0
        mixed = torch.where(known[:, None] & known[None, :], ema * self.memory + (1 - ema) * matrix, matrix)
        self.memory.copy_(torch.where(both, mixed, self.memory))
        self.remembers = True

    def _compare(self, stale: Tensor, exact: Tensor, matrix: Tensor) -> None:
        """Log the cosine between the direction of the remembered Gram matrix and the exact one."""
        lengths = (stale @ matrix @ stale) * (exact @ matrix @ exact)
        cosine = torch.where(lengths > 0, (stale @ matrix @ exact) / lengths.clamp_min(1e-300).sqrt(), 1.0)
        self.refresh.copy_(
            torch.stack([self.refresh[0] + cosine, self.refresh[1] + 1, self.refresh[2].minimum(cosine)])
        )

    def stale_coefficients(self, shares: Tensor) -> tuple[Tensor, Tensor]:
        """Coefficients [G] from the remembered Gram matrix and the norm |s^-1 eps| they intend (0-dim)."""
        memory = self.memory
        coef = self.coefficients(memory, self.theta_sq, shares)
        c = coef.double()
        square = c @ memory @ c
        reach = (c.abs() * memory.diagonal().clamp_min(0).sqrt()).sum()
        cancels = square <= CANCELLATION * reach * reach
        plain = torch.where(cancels, shares, coef)
        return plain, torch.where(cancels, CANCELLATION**0.5 * reach, square.clamp_min(0).sqrt())

    def rescaled(self, partials: Tensor, theta_sq: Tensor, intended: Tensor) -> Tensor:
        """[1] factor that gives the gradient of sum_j c_j L_j, whose Gram partials these are, the intended norm."""
        self.theta_sq.copy_(theta_sq.sum())
        actual = partials.sum()
        finite = torch.isfinite(actual).float()
        self.stats |= {"ok": self.stats["ok"] * finite, "bad": 1 - finite}
        scale = (intended / actual.clamp_min(1e-30).sqrt()).float()
        return torch.where(torch.isfinite(scale), scale, 0.0).reshape(1)

    # -- state -----------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Tensor]:
        """Tensors to checkpoint: Gram memory, which averages have begun, step count."""
        state = {"steps": torch.tensor(self.steps), "seen": self.seen}
        if self.remembers:
            state |= {"memory": self.memory, "theta_sq": self.theta_sq, "refresh": self.refresh}
        return state

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Continue from `state`."""
        self.steps = int(state["steps"])
        self.seen.copy_(state["seen"])
        self.remembers = "memory" in state
        if self.remembers:
            self.memory.copy_(state["memory"])
            self.theta_sq.copy_(state["theta_sq"])
            self.refresh.copy_(state["refresh"])
