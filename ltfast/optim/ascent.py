"""From a Gram matrix to the coefficients of an ascent: the part of the engine that never touches a parameter.

Mode E asks for exact coefficients; mode R remembers a [G, G] Gram matrix, mixes a fresh one in every few steps, and takes
the coefficients of every other step from it. Everything is a few numbers on the device; nothing waits for them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ltfast.kernels import ascent_coefficients, perturb
from ltfast.optim.rules import Rule

# With a fresh classifier the remembered part may come out far longer than expected (a batch with an odd picture); it is
# damped to the length expected, by at most this factor.
LEAST_DAMPING = 1e-3


class Stale(NamedTuple):
    """Mode R's coefficients [G] and the norms |s^-1 eps| they intend, 0-dim: of all, and of the remembered part (None
    without a fresh classifier)."""

    coef: Tensor
    norm: Tensor
    rest: Tensor | None

    def damping(self, rest_sq: Tensor) -> Tensor:
        """What the remembered part is multiplied by where its squared norm came out as `rest_sq`."""
        if self.rest is None:
            return torch.ones_like(rest_sq)
        damping = (self.rest / rest_sq.clamp_min(1e-300).sqrt()).clamp(LEAST_DAMPING, 1.0)
        return torch.where(torch.isfinite(rest_sq), damping, 1.0)


class Ascent:
    """Coefficients by `rule` for groups of `counts` [G] images and d = `n_elements` perturbed parameters.

    Attributes:
        stats: device tensors describing the last ascent, for logging.
        memory: [G, G] Gram matrix of mode R, valid once `remembers`; theta_sq: |theta|^2 that goes with it. Of all
            parameters, or (`fresh` given everywhere) of all but the classifier's.
        holds_rest: the memory leaves the classifier out.
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
        self.n_rows = self.rule.rows(self.n_groups)
        # Changed in place only, here and below: a CUDA graph finds it where it was.
        self.memory = torch.zeros(self.n_groups, self.n_groups, dtype=torch.float64, device=device)
        self.theta_sq = torch.zeros((), dtype=torch.float64, device=device)
        self.remembers, self.holds_rest = False, False
        self.seen = torch.zeros(self.n_groups, device=device)
        self.tail = torch.arange(self.n_groups, device=device).clamp_max(1).float()  # what a split rule perturbs
        self.pending: Tensor | None = None  # weights of the moving averages' next update
        self.steps = 0
        self.refresh = torch.zeros(3, dtype=torch.float64, device=device)
        self.forget_refreshes()

    def coefficients(self, matrix: Tensor, theta_sq: Tensor | None, shares: Tensor) -> Tensor:
        """[R] for a shared perturbation, [G, R] per group, from the Gram matrix (or its partials) of this step."""
        rule, options = self.rule, self.rule.options
        if rule.direction == "friendly":  # a group without an average yet keeps its whole gradient
            options["sigma"] = rule.sigma * self.seen
        weights = shares * self.tail if rule.split else shares
        coef, stats = ascent_coefficients(matrix, theta_sq, weights, self.counts, self.n_elements, **options)
        self.stats = stats._asdict()
        if rule.direction == "friendly":  # 0: leave the average alone
            present = (shares > 0).float() * self.stats["ok"]
            self.pending = present * torch.where(self.seen > 0, 1 - rule.lmbda, 1.0)
        return coef

    @torch.no_grad()
    def settle(self, *rows: Tensor) -> None:
        """Move the averages in `rows` (g_1..g_G, m_1..m_G) by the last ascent's gradients, once it has combined the old ones."""
        if self.pending is None:
            return
        g, weights, self.pending = self.n_groups, self.pending, None
        for r in rows:
            for k in range(g):  # m + weight (g - m); perturb leaves m alone where the weight is 0, whatever g holds
                pair = torch.stack((weights[k], -weights[k]))
                perturb(r[g + k], r[k : g + k + 1 : g], pair, out=r[g + k])
        torch.maximum(self.seen, (weights > 0).float(), out=self.seen)

    # -- mode R ----------------------------------------------------------------------------------------------------------

    def refreshed(self, matrix: Tensor, theta_sq: Tensor, shares: Tensor, fresh: Tensor | None = None) -> Tensor:
        """Exact coefficients at a refresh: mix the matrix into the memory, log how far off the memory's were.

        fresh: [G, G] the classifier's part of the matrix, if every step knows it; the memory then holds the rest.
        """
        self.theta_sq.copy_(theta_sq)
        if self.remembers and self.holds_rest != (fresh is not None):
            self.memory.zero_()
            self.remembers = False
        self.holds_rest = fresh is not None
        # A recorded step has `remembers` frozen as true: where its memory was emptied, this says so on the device.
        held = self.memory.any()
        stale = self.stale_coefficients(shares, fresh) if self.remembers else None
        self._remember(matrix if fresh is None else matrix - fresh, shares)
        coef = self.coefficients(matrix, self.theta_sq, shares)
        if stale is not None:
            self._log(torch.where(held, self.cosine(stale, coef.double(), matrix, fresh), torch.nan))
        return coef

    def _remember(self, matrix: Tensor, shares: Tensor) -> None:
        """Average norms in the logarithm and correlations as they are: one batch with an odd picture, whose gradient is
        much longer, would otherwise rule the memory for many refreshes."""
        norms, held = (m.diagonal().clamp_min(0).sqrt() for m in (matrix, self.memory))
        # A batch that overflowed, or a group that is absent or without a gradient, leaves no trace.
        present = (shares > 0) & (norms > 0) & torch.isfinite(matrix).all()
        both, known = torch.outer(present, present), held > 0
        ema = torch.where(torch.outer(known, known), self.rule.gram_ema, 0.0)
        mixed = torch.where(known, held, 1.0).log() * ema.diagonal()
        mixed = (mixed + torch.where(present, norms, 1.0).log() * (1 - ema.diagonal())).exp()
        cosines = ema * _correlation(self.memory, held) + (1 - ema) * _correlation(matrix, norms)
        self.memory.copy_(torch.where(both, cosines * torch.outer(mixed, mixed), self.memory))
        self.remembers = True

    @staticmethod
    def cosine(stale: Stale, exact: Tensor, matrix: Tensor, fresh: Tensor | None = None) -> Tensor:
        """Cosine between the direction that `stale` would have taken in this batch and the exact one; NaN if neither moves.

        matrix, fresh: [G, G] the batch's own Gram matrix and the classifier's part of it.
        """
        c, known = stale.coef.double(), torch.zeros_like(matrix) if fresh is None else fresh
        rest = matrix - known
        damping = stale.damping(c @ rest @ c)
        along = c @ known @ exact + damping * (c @ rest @ exact)
        lengths = (c @ known @ c + damping**2 * (c @ rest @ c)) * (exact @ matrix @ exact)
        moves = (c != 0).any() | (exact != 0).any()
        return torch.where(moves, torch.where(lengths > 0, along / lengths.clamp_min(1e-300).sqrt(), 0.0), torch.nan)

    def forget_refreshes(self) -> None:
        """Begin afresh with the cosines, in place: a recorded step adds to this very tensor."""
        self.refresh.copy_(self.refresh.new_tensor([0.0, 0.0, 1.0]))

    def _log(self, cosine: Tensor) -> None:
        known = torch.isfinite(cosine)
        cosine = torch.where(known, cosine, 0.0)
        least = torch.where(known, self.refresh[2].minimum(cosine), self.refresh[2])
        self.refresh.copy_(torch.stack([self.refresh[0] + cosine, self.refresh[1] + known.double(), least]))

    def stale_coefficients(self, shares: Tensor, fresh: Tensor | None = None) -> Stale:
        """Coefficients from the remembered Gram matrix, to which this batch's classifier part `fresh` [G, G] is added."""
        coef = self.coefficients(self.memory if fresh is None else self.memory + fresh, self.theta_sq, shares)
        norm = self.stats["length_sq"].reshape(-1)[0].sqrt()
        if fresh is None:
            return Stale(coef, norm, None)
        c = coef.double()
        return Stale(coef, norm, (c @ self.memory @ c).clamp_min(0).sqrt())

    def rescaled(
        self, partials: Tensor, theta_sq: Tensor, stale: Stale, known: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Factors that give the gradient of sum_j c_j L_j, whose Gram partials these are, the intended norm: [1] for all
        of it, and 0-dim one more for the classifier's part, whose squared norm is `known` (None: there is no such part)."""
        torch.sum(theta_sq, dim=0, out=self.theta_sq)
        actual = partials.sum()
        bad = (actual - actual).ne(0).float()  # inf or NaN; isfinite is four launches
        # Where the classifier's rows have overflowed the coefficients are 0, and so is this.
        bad = bad.maximum(self.stats["bad"].max())
        self.stats |= {"ok": self.stats["ok"] * (1 - bad), "bad": bad}
        part = None
        if known is not None:
            rest = (actual - known).clamp_min(0)
            part = torch.nan_to_num(1 / stale.damping(rest), 1.0).float()
            actual = rest + part.double().square() * known
        scale = torch.nan_to_num(stale.norm * actual.clamp_min(1e-30).rsqrt(), 0.0, 0.0, 0.0)
        return scale.float().reshape(1), part

    # -- state -----------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Tensor]:
        """Tensors to checkpoint: Gram memory, which averages have begun, step count."""
        state = {"steps": torch.tensor(self.steps), "seen": self.seen}
        if self.remembers:
            state |= {"memory": self.memory, "theta_sq": self.theta_sq, "refresh": self.refresh}
            state |= {"holds_rest": torch.tensor(self.holds_rest)}
        return state

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Continue from `state`."""
        self.steps = int(state["steps"])
        self.seen.copy_(state["seen"])
        self.remembers = "memory" in state
        if not self.remembers:
            self.memory.zero_()  # a matrix that is mixed into the first one
            self.forget_refreshes()
        else:
            self.holds_rest = bool(state.get("holds_rest", False))
            self.memory.copy_(state["memory"])
            self.theta_sq.copy_(state["theta_sq"])
            self.refresh.copy_(state["refresh"])


def _correlation(matrix: Tensor, norms: Tensor) -> Tensor:
    """Cosines of a Gram matrix with these norms, 0 where one is 0."""
    lengths = torch.outer(norms, norms)
    return torch.where(lengths > 0, matrix / torch.where(lengths > 0, lengths, 1.0), 0.0)
