"""The trainer's ascent on all parameters, by any rule; `GroupAscent` (group_ascent.py) is the same for the drop-in optimizers.

    rows  = group gradients [R, N]                       one backward pass for each, gathered into one buffer
    M     = gram(rows, theta)                            one read of the rows and theta
    coef  = rule(M, |theta|, shares, counts)             one tiny launch, no host synchronisation
    theta + eps = perturb(theta, rows, coef)             one pass; theta is kept aside, bit for bit
    theta = update(kept theta, gradient at theta + eps)  one pass: restore, weight decay, anchor, momentum, step

Mode R (rule.gram_every > 1): an ascent needs only sum_k c_k g_k, the gradient of sum_k c_k L_k: ONE backward. The
coefficients come from a Gram matrix refreshed every few steps; the result is rescaled to the norm the rule intends.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ltfast.backward import Backward
from ltfast.flat import FlatParameters
from ltfast.kernels import gram, gram_partials, perturb
from ltfast.optim.ascent import Ascent
from ltfast.optim.fresh import FreshGradients
from ltfast.optim.rules import Rule
from ltfast.reduce import Agreement

# The paths of an ascent: group gradients; one gradient with remembered coefficients (mode R); the last eps once more.
EXACT, STALE, REPEAT = "exact", "stale", "repeat"


class Engine(Ascent):
    """Climb from theta to theta + eps by `rule`, for parameters held by `flat`.

    Args:
        flat: the parameters. All of them are perturbed (classifier scope has its own, cheaper path in ltfast.step).
        rule: the method.
        counts: [G] training images of each group (Eq. 13).
        agreement: what of the ascent is taken over all ranks.
        backward: gathers gradients into the rows of `flat`.
        classifier: a parameter of `flat` whose group gradients mode R is given in every step (ltfast.optim.fresh).

    Attributes:
        kept: [N] theta as it was before the climb, bit-exact.
        stats: device tensors describing the last ascent, for logging.
    """

    def __init__(
        self,
        flat: FlatParameters,
        rule: Rule,
        counts: Tensor,
        agreement: Agreement | None = None,
        backward: Backward | None = None,
        classifier: nn.Parameter | None = None,
    ) -> None:
        super().__init__(rule, counts, flat.numel, flat.device)
        self.flat, self.agreement = flat, agreement or Agreement()
        self.backward = backward or Backward(flat)
        self.kept = torch.empty_like(flat.data)
        self.eps = torch.zeros_like(flat.data) if rule.ascent_every > 1 else None
        self.held: dict[str, Tensor] = {}
        flat.resize_rows(self.n_rows + (rule.objective == "per_group"))
        self.last: FreshGradients | None = None
        if classifier is not None and rule.gram_every > 1:
            self.last = FreshGradients(flat, [classifier], self.n_groups)

    # -- the two passes ------------------------------------------------------------------------------------------------

    def next_branch(self) -> str:
        """How the coming step climbs: EXACT, STALE or REPEAT. Counts the step."""
        ascent, between = divmod(self.steps, self.rule.ascent_every)
        self.steps += 1
        if between:
            return REPEAT
        again = not self.remembers or self.holds_rest != (self.last is not None)
        return EXACT if ascent % self.rule.gram_every == 0 or again else STALE

    def taken(self, branch: str) -> None:
        """A step has gone along `branch`: a replay runs no Python that could note that there is a Gram matrix now."""
        if branch == EXACT and self.rule.gram_every > 1:
            self.remembers, self.holds_rest = True, self.last is not None

    def ascend(
        self, losses: Tensor, shares: Tensor, branch: str = EXACT, classifier_rows: Tensor | None = None
    ) -> Tensor:
        """First pass: from group losses [G] and batch shares [G] at theta to coefficients; leaves theta + eps in place.

        classifier_rows: group gradients [G, C, D] of the marked classifier; STALE needs them where there is one.

        Returns the coefficients: [R] for a shared perturbation (already applied), [G, R] per group (see `move_to`).
        """
        self.pending = None  # of a step that was broken off
        coef, rows = self._exact(losses, shares) if branch == EXACT else self._stale(losses, shares, classifier_rows)
        if self.rule.objective == "per_group":
            self.kept.copy_(self.flat.data)
        else:
            theta = self.flat.data
            perturb(theta, rows, coef, self.rule.adaptive, out=theta, keep=self.kept)
            self.settle(self.rows)
            if self.eps is not None:
                torch.sub(self.flat.data, self.kept, out=self.eps)
                self._hold()
        return coef

    def _hold(self) -> None:
        """Keep the statistics of this ascent, at one address, for the steps that repeat it."""
        if self.held:
            # By name: a loaded state has them in another order.
            torch._foreach_copy_(list(self.held.values()), [self.stats[name] for name in self.held])
        else:
            self.held = {name: value.clone() for name, value in self.stats.items()}
        self.stats = self.held

    def repeat(self) -> None:
        """Climb by the last ascent's eps without a pass of its own (rule.ascent_every > 1)."""
        assert self.eps is not None
        self.kept.copy_(self.flat.data)
        self.flat.data.add_(self.eps)

    def move_to(self, coef: Tensor) -> None:
        """Put theta + s^2 * coef @ rows into the parameters (theta = `kept`)."""
        perturb(self.kept, self.rows, coef, self.rule.adaptive, out=self.flat.data)

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
        rule = self.rule
        if rule.gram_every > 1:
            matrix, theta_sq = gram(self.rows, self.flat.data, rule.adaptive)
            known = [] if self.last is None else [self.last.gram(self.rows, rule.adaptive)]
            shares, matrix, *known = self.agreement.remembered(shares, matrix, *known)
            return self.refreshed(matrix, theta_sq, shares, known[0] if known else None)
        partials, theta_sq = gram_partials(self.rows, self.flat.data, rule.adaptive)
        return self.coefficients(partials, theta_sq, shares)

    # -- mode R: one backward with coefficients from a remembered Gram matrix ------------------------------------------

    def _stale(self, losses: Tensor, shares: Tensor, classifier_rows: Tensor | None) -> tuple[Tensor, Tensor]:
        last, known = self.last, []
        if last is not None:
            assert classifier_rows is not None
            known = [last.gram(self.agreement.rows(last.put_rows(classifier_rows)), self.rule.adaptive)]
        shares, *known = self.agreement.remembered(shares, *known)
        stale = self.stale_coefficients(shares, known[0] if known else None)
        row = self.backward((stale.coef * losses).sum(), 0)
        self.agreement.rows(row)
        partials, theta_sq = gram_partials(row[None], self.flat.data, self.rule.adaptive)
        part = None if last is None else last.gram(row[None], self.rule.adaptive).sum()
        scale, more = self.rescaled(partials, theta_sq, stale, part)
        if last is not None and more is not None:
            row[last.span] *= more
        return scale, row[None]

    # -- state -----------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Tensor]:
        """Tensors to checkpoint: Gram memory, moving averages, the last eps, step count."""
        g = self.n_groups
        state = super().state()
        if self.eps is not None:
            state |= {"eps": self.eps, **{f"held.{name}": value for name, value in self.held.items()}}
        if self.rule.direction == "friendly":
            state["averages"] = self.flat.grads[g : 2 * g]
        return state

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Continue from `state`."""
        super().load_state(state)
        g = self.n_groups
        if self.eps is not None:
            self.eps.copy_(state["eps"])
            held = {k.removeprefix("held."): v for k, v in state.items() if k.startswith("held.")}
            if held and not self.held:
                self.held = {name: value.clone().to(self.device) for name, value in held.items()}
            elif held:  # a recorded step writes to their addresses
                torch._foreach_copy_(list(self.held.values()), [held[name].to(self.device) for name in self.held])
            self.stats = self.held
        if "averages" in state:
            self.flat.grads[g : 2 * g].copy_(state["averages"])
