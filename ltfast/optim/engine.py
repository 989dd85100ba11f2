"""The one engine behind SAM, ASAM, Friendly-SAM, ImbSAM, CC-SAM, Focal-SAM and GSA.

    rows  = group gradients [R, N]                      (autograd accumulates straight into them)
    M     = gram(rows, theta)                            one read of the rows and theta
    coef  = rule(M, |theta|, shares, counts)             one tiny launch, no host synchronisation
    theta + eps = perturb(theta, rows, coef)             one pass; theta is kept aside, bit for bit
    theta = update(kept theta, gradient at theta + eps)  one pass: restore, weight decay, anchor, momentum, step

Mode R (rule.gram_every > 1): an ascent needs only sum_k c_k g_k, the gradient of sum_k c_k L_k: ONE backward. The
coefficients come from a Gram matrix refreshed every few steps; the result is rescaled to the norm the rule intends.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ltfast.backward import Backward
from ltfast.flat import FlatParameters
from ltfast.kernels import ascent_coefficients, gram, gram_partials, perturb
from ltfast.optim.rules import Rule
from ltfast.reduce import Agreement

# Mode R: below this ratio of |sum_j c_j u_j|^2 to (sum_j |c_j| |u_j|)^2 the groups' terms nearly cancel and a stale Gram
# matrix no longer tells where their sum points: the step then takes the plain SAM direction at the intended norm.
CANCELLATION = 1e-2
# The paths of an ascent: group gradients; one gradient with remembered coefficients (mode R); the last eps once more.
EXACT, STALE, REPEAT = "exact", "stale", "repeat"


class Engine:
    """Climb from theta to theta + eps by `rule`, for parameters held by `flat`.

    Args:
        flat: the parameters. All of them are perturbed (classifier scope has its own, cheaper path in ltfast.step).
        rule: the method.
        counts: [G] training images of each group (Eq. 13).
        agreement: what of the ascent is taken over all ranks.
        backward: gathers gradients into the rows of `flat`.

    Attributes:
        kept: [N] theta as it was before the climb, bit-exact; meaningful while `climbed` is true.
        stats: device tensors describing the last ascent, for logging.
    """

    def __init__(
        self,
        flat: FlatParameters,
        rule: Rule,
        counts: Tensor,
        agreement: Agreement | None = None,
        backward: Backward | None = None,
    ) -> None:
        self.flat, self.rule, self.agreement = flat, rule, agreement or Agreement()
        self.backward = backward or Backward(flat)
        self.kept = torch.empty_like(flat.data)
        self.eps = torch.zeros_like(flat.data) if rule.ascent_every > 1 else None
        self.stats: dict[str, Tensor] = {}
        self.climbed = False
        self.set_groups(counts)

    def set_groups(self, counts: Tensor) -> None:
        """Start afresh with groups of `counts` [G] images: gradient rows, Gram matrix and moving averages are reset."""
        device = self.flat.device
        self.counts = counts.to(device, torch.float32)
        self.n_groups = counts.numel()
        self.n_rows = self.n_groups * (2 if self.rule.direction == "friendly" else 1)
        self.flat.resize_rows(self.n_rows + (self.rule.objective == "per_group"))
        # Changed in place only, here and below: a CUDA graph finds it where it was.
        self.memory = torch.zeros(self.n_groups, self.n_groups, dtype=torch.float64, device=device)  # read by mode R
        self.theta_sq = torch.zeros((), dtype=torch.float64, device=device)
        self.remembers = False
        self.seen = torch.zeros(self.n_groups, device=device)
        self.tail = (
            torch.arange(self.n_groups, device=device).clamp_max(1).float()
        )  # [0, 1]: what a split rule perturbs
        self.steps = 0
        # Cosines at Gram refreshes of mode R since the last reset: sum, count, smallest.
        self.refresh = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64, device=device)

    # -- the two passes ------------------------------------------------------------------------------------------------

    def next_branch(self) -> str:
        """How the coming step climbs: EXACT, STALE or REPEAT. Counts the step."""
        ascent, between = divmod(self.steps, self.rule.ascent_every)
        self.steps += 1
        if between:
            return REPEAT
        return EXACT if ascent % self.rule.gram_every == 0 or not self.remembers else STALE

    def ascend(self, losses: Tensor, shares: Tensor, branch: str = EXACT) -> Tensor:
        """First pass: from group losses [G] and batch shares [G] at theta to coefficients; leaves theta + eps in place.

        Returns the coefficients: [R] for a shared perturbation (already applied), [G, R] per group (see `move_to`).
        """
        coef, rows = self._exact(losses, shares) if branch == EXACT else self._stale(losses, shares)
        self.kept.copy_(self.flat.data)
        self.climbed = True
        if self.rule.objective == "shared":
            self.move_to(coef, rows)
            if self.eps is not None:
                torch.sub(self.flat.data, self.kept, out=self.eps)
        return coef

    def repeat(self) -> None:
        """Climb by the last ascent's eps without a pass of its own (rule.ascent_every > 1)."""
        assert self.eps is not None
        self.kept.copy_(self.flat.data)
        self.climbed = True
        self.flat.data.add_(self.eps)

    def move_to(self, coef: Tensor, rows: Tensor | None = None) -> None:
        """Put theta + s^2 * coef @ rows into the parameters (theta = `kept`)."""
        perturb(self.kept, self.rows if rows is None else rows, coef, self.rule.adaptive, out=self.flat.data)

    def restore(self) -> None:
        """Bring theta back, bit for bit."""
        if self.climbed:
            self.flat.data.copy_(self.kept)
            self.climbed = False

    # -- mode E: every group's gradient ----------------------------------------------------------------------------------

    @property
    def rows(self) -> Tensor:
        """[R, N] the gradient rows that the ascent combines."""
        return self.flat.grads[: self.n_rows]

    def _exact(self, losses: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
        for k in range(self.n_groups):
            # In a split rule row 0 is part of the final gradient, so it carries its share; directions ignore it.
            loss = losses[k] * shares[k] if self.rule.split and k == 0 else losses[k]
            self.backward(loss, k, retain_graph=k + 1 < self.n_groups)
        self.agreement.rows(self.flat.grads[: self.n_groups])
        return self.from_rows(shares), self.rows

    def from_rows(self, shares: Tensor) -> Tensor:
        """Coefficients from gradient rows that are already filled; updates mode R's memory and the moving averages."""
        rule, g = self.rule, self.n_groups
        if rule.gram_every > 1:
            matrix, theta_sq = gram(self.rows, self.flat.data, rule.adaptive)
            self.theta_sq.copy_(theta_sq)
            matrix, shares = self.agreement.gram(matrix, shares), self.agreement.shares(shares)
            stale = self.stale_coefficients(shares)[0] if self.remembers else None
            self._remember(matrix, shares)
            coef = self._coefficients(matrix, self.theta_sq, shares)
            if stale is not None:
                self._compare(stale.double(), coef.double(), matrix.double())
            return coef
        matrix, theta_sq = gram_partials(self.rows, self.flat.data, rule.adaptive)
        coef = self._coefficients(matrix, theta_sq, shares)
        if rule.direction == "friendly":
            present = (shares > 0).float() * self.stats["ok"]
            weight = present * torch.where(self.seen > 0, 1 - rule.lmbda, 1.0)
            for k in range(g):  # m <- (1 - weight) m + weight u; perturb leaves a row of weight 0 out, NaN or not
                average = self.flat.grads[g + k].mul_(1 - weight[k])
                perturb(average, self.flat.grads[k : k + 1], weight[k : k + 1], out=average)
            torch.maximum(self.seen, present, out=self.seen)
        return coef

    def _coefficients(self, matrix: Tensor, theta_sq: Tensor | None, shares: Tensor) -> Tensor:
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
        coef, stats = ascent_coefficients(matrix, theta_sq, weights, self.counts, self.flat.numel, **options)
        self.stats = stats._asdict()
        return coef

    # -- mode R: one backward with coefficients from a remembered Gram matrix ------------------------------------------

    def _remember(self, matrix: Tensor, shares: Tensor) -> None:
        present = (shares > 0) & torch.isfinite(matrix).all()  # a batch that overflowed leaves no trace
        both = present[:, None] & present[None, :]
        ema = self.rule.gram_ema
        known = self.memory.diagonal() > 0
        mixed = torch.where(known[:, None] & known[None, :], ema * self.memory + (1 - ema) * matrix, matrix)
        self.memory.copy_(torch.where(both, mixed, self.memory))
        self.remembers = True

    def _compare(self, stale: Tensor, exact: Tensor, matrix: Tensor) -> None:
        """Log the cosine between the direction of the remembered Gram matrix and the exact one, at a refresh."""
        lengths = (stale @ matrix @ stale) * (exact @ matrix @ exact)
        cosine = torch.where(lengths > 0, (stale @ matrix @ exact) / lengths.clamp_min(1e-300).sqrt(), 1.0)
        self.refresh.copy_(
            torch.stack([self.refresh[0] + cosine, self.refresh[1] + 1, self.refresh[2].minimum(cosine)])
        )

    def _stale(self, losses: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
        coef, intended = self.stale_coefficients(self.agreement.shares(shares))
        row = self.backward((coef * losses).sum(), 0)
        self.agreement.rows(row)
        actual, theta_sq = gram(row[None], self.flat.data, self.rule.adaptive)
        self.theta_sq.copy_(theta_sq)
        scale = (intended / actual.reshape(()).clamp_min(1e-30).sqrt()).float()
        scale = torch.where(torch.isfinite(scale), scale, 0.0)
        return scale.reshape(1), row[None]

    def stale_coefficients(self, shares: Tensor) -> tuple[Tensor, Tensor]:
        """Coefficients [G] from the remembered Gram matrix and the norm |s^-1 eps| they intend (0-dim)."""
        memory = self.memory
        coef = self._coefficients(memory, self.theta_sq, shares)
        c = coef.double()
        square = c @ memory @ c
        reach = (c.abs() * memory.diagonal().clamp_min(0).sqrt()).sum()
        cancels = square <= CANCELLATION * reach * reach
        plain = torch.where(cancels, shares, coef)
        return plain, torch.where(cancels, CANCELLATION**0.5 * reach, square.clamp_min(0).sqrt())

    # -- state -----------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Tensor]:
        """Tensors to checkpoint: Gram memory, moving averages, the last eps, step count."""
        g = self.n_groups
        state = {"steps": torch.tensor(self.steps), "seen": self.seen}
        if self.remembers:
            state |= {"memory": self.memory, "theta_sq": self.theta_sq}
        if self.eps is not None:
            state["eps"] = self.eps
        if self.rule.direction == "friendly":
            state["averages"] = self.flat.grads[g : 2 * g]
        return state

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Continue from `state`."""
        g = self.n_groups
        self.steps = int(state["steps"])
        self.seen.copy_(state["seen"])
        self.remembers = "memory" in state
        if self.remembers:
            self.memory.copy_(state["memory"])
            self.theta_sq.copy_(state["theta_sq"])
        if self.eps is not None:
            self.eps.copy_(state["eps"])
        if "averages" in state:
            self.flat.grads[g : 2 * g].copy_(state["averages"])
