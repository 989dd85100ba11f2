"""The ascent of optimizers whose closure returns group losses: ImbSAM, Focal-SAM, CC-SAM and GSA (their step: grouped.py).

    closure() -> (L [G], w [G]):  L_k = mean loss over the samples of group k (0 where absent),  w_k = their batch share
    (ltfast.losses.group_losses and membership_for make both from per-sample losses and labels)

The optimizer runs every backward itself: one per group in mode E or a single one in mode R, then the final one. Gradients of
the first pass come from autograd.grad and never touch p.grad, so hooks on accumulated gradients and DistributedDataParallel
see the final one only (hooks of a tensor see each).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler

from ltfast.kernels import gram_partials, perturb
from ltfast.kernels.common import MAX_ROWS
from ltfast.optim.across import AcrossProcesses
from ltfast.optim.ascent import Ascent, Stale
from ltfast.optim.block import Block
from ltfast.optim.fresh import FreshGradients
from ltfast.optim.passes import loss_scale
from ltfast.optim.rules import Rule
from ltfast.optim.state import averages_by_index, check_averages, load_averages
from ltfast.rows import GradientRows

Losses = tuple[Tensor, Tensor]
Closure = Callable[[], Losses]
# Key of a param group: what scope="classifier" perturbs, and whose group gradients mode R computes in every step.
MARK = "classifier"


def batch_loss(losses: Tensor, shares: Tensor) -> Tensor:
    """Mean loss of a batch, 0-dim, from group losses [G] and batch shares [G]; what an absent group's loss is does not matter."""
    losses, shares = losses.detach(), shares.to(torch.promote_types(losses.dtype, shares.dtype))
    return torch.dot(torch.where(shares > 0, losses, shares), shares)


class GroupAscent(AcrossProcesses):
    """Climb by group losses; see GSA.

    Attributes:
        rule: the method as data (ltfast.optim.rules).
        ascent: coefficients, Gram memory, and `refresh`: cosines between mode R's and the exact direction.
    """

    def __init__(
        self,
        params: Any,
        base_optimizer: Any,
        rule: Rule,
        counts: Any,
        options: dict[str, Any],
        base_kwargs: dict[str, Any],
    ) -> None:
        self.rule = rule
        self._counts = self._checked(counts)
        super().__init__(params, base_optimizer, options, base_kwargs)

    def _checked(self, counts: Any) -> Tensor:
        """[G] counts as a tensor of our own."""
        counts = torch.as_tensor(counts).detach().clone()
        if counts.ndim != 1 or counts.numel() < 1 or not bool(((counts >= 0) & counts.isfinite()).all()):
            raise ValueError(f"counts must be one-dimensional, training images of each group, all >= 0, not {counts}")
        most = MAX_ROWS // 2 if self.rule.direction == "friendly" else MAX_ROWS
        if counts.numel() > most and self.rule.groups != "class":  # classes are taken one after the other
            raise ValueError(
                f"counts has {counts.numel()} groups; direction {self.rule.direction!r} takes up to {most}"
            )
        return counts

    def _own_state(self) -> dict[str, Any]:
        return {"rule": self.rule, "_counts": self._counts}

    def _setup(self) -> None:
        super()._setup()
        self._looked = False
        self._last: list[FreshGradients | None] = []
        self._last_layers()
        self.ascent = Ascent(self.rule, self._counts, 1, self.blocks[0].flat.device)

    # -- what is perturbed -----------------------------------------------------------------------------------------------

    def _make_blocks(self) -> list[Block]:
        indices = range(len(self.param_groups))
        if self.rule.scope == "all":  # mode R wants the marked groups side by side
            return [self._block(sorted(indices, key=lambda k: bool(self.param_groups[k].get(MARK))))]
        marked = [k for k in indices if self.param_groups[k].get(MARK)]
        if not marked:
            raise ValueError(
                "scope='classifier' needs to know the classifier: pass param groups and give its group {'classifier': True}"
            )
        others = [k for k in indices if k not in marked]
        return [self._block(marked)] + ([self._block(others)] if others else [])

    def _block(self, groups: Any) -> Block:
        block = super()._block(groups)
        block.flat.resize_rows(self._rows_of(block))
        return block

    def _climbs(self, block: Block) -> bool:
        return self.rule.scope == "all" or bool(self.param_groups[block.group_of[0]].get(MARK))

    def _rows_of(self, block: Block) -> int:
        """Row 0 is the final gradient; a shared perturbation is done with its rows by then and starts there, too."""
        rows = self.rule.rows(self._counts.numel())
        return self._first_row + rows if self._climbs(block) and self.rule.gram_every == 1 else 1

    @property
    def _first_row(self) -> int:
        return 1 if self.rule.objective == "per_group" else 0

    @property
    def _climbing(self) -> list[Block]:
        return [block for block in self.blocks if self._climbs(block)]

    def _last_layers(self) -> list[FreshGradients | None]:
        """The marked parameters of each climbing block in mode R (None: it has none)."""
        blocks = self._climbing
        if len(self._last) != len(blocks):
            self._last = [None] * len(blocks)
            for i, block in enumerate(blocks if self.rule.gram_every > 1 and self.rule.scope == "all" else []):
                groups = zip(block.flat.params, block.group_of, strict=True)
                marked = [p for p, k in groups if self.param_groups[k].get(MARK)]
                if marked:
                    self._last[i] = FreshGradients(block.flat, marked, self._counts.numel())
        return self._last

    def set_groups(self, counts: Any) -> None:
        """Start afresh with groups of `counts` [G] training images (after regrouping).

        Raises:
            ValueError: counts are no such numbers, or of more groups than an ascent takes; then nothing has changed.
        """
        self._counts, self._last = self._checked(counts), []
        self.restore()
        for block in self.blocks:
            block.flat.resize_rows(self._rows_of(block))
        self.ascent.start(self._counts)

    def _climbing_elements(self) -> int:
        """d of Eq. 13: what is perturbed; frozen parameters have no part in it."""
        return max(1, sum(p.numel() for block in self._climbing for p in block.flat.params if p.requires_grad))

    # -- the first pass --------------------------------------------------------------------------------------------------

    def _first(self, closures: list[Closure], scaler: GradScaler | None) -> tuple[Tensor, list[Tensor], Tensor]:
        """Coefficients, the gradient rows they combine (for each climbing block), and the loss at theta."""
        ascent, every = self.ascent, self.rule.gram_every
        other = ascent.holds_rest != any(self._last_layers())
        exact = every == 1 or not ascent.remembers or other or ascent.steps % every == 0
        ascent.steps += 1
        ascent.n_elements = self._climbing_elements()
        coef, rows, loss = (self._exact if exact else self._stale)(closures, scaler)
        stats = ascent.stats
        self.stats = stats
        bad = stats["bad"]
        if not any(p.requires_grad for block in self._climbing for p in block.flat.params):  # their rows say nothing
            bad = bad.maximum((~torch.isfinite(loss)).float())
        self._first_bad = self._of_all(bad)
        return coef, rows, loss

    def _evaluate(self, closure: Closure) -> Losses:
        with torch.enable_grad():
            result = closure()
        for block in self.blocks:
            if not block.climbed:
                block.flat.adopt()  # of layers that replace .data in their forward pass (max-norm)
        if not isinstance(result, tuple) or len(result) != 2:
            raise ValueError("closure must return (group losses [G], batch shares [G])")
        g = self._counts.numel()
        for name, tensor in zip(("group losses", "batch shares"), result, strict=True):
            if not isinstance(tensor, Tensor) or tensor.shape != (g,):
                shape = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
                raise ValueError(f"closure: the {name} must be a tensor of shape ({g},), not {shape}")
        if not result[0].requires_grad:
            raise ValueError("closure: the group losses do not depend on any parameter (computed under no_grad?)")
        return result[0], result[1].detach()

    def _exact(self, closures: list[Closure], scaler: GradScaler | None) -> tuple[Tensor, list[Tensor], Tensor]:
        """Mode E: every group's gradient."""
        g, first, split = self._counts.numel(), self._first_row, self.rule.split
        temporary = self.rule.gram_every > 1
        holders = [GradientRows(b.flat, g) if temporary else b.flat.rows for b in self._climbing]
        world = self._world()
        weighted = len(closures) > 1 or world > 1
        total, loss = torch.zeros((), device=self.ascent.device), torch.zeros((), device=self.ascent.device)
        for m, closure in enumerate(closures):
            with self._unreduced():
                losses, shares = self._evaluate(closure)
            parts = shares / (len(closures) * world)
            total, loss = total + parts, loss + batch_loss(losses, shares) / len(closures)
            for k in range(g):
                # In a split rule row 0 is part of the final gradient, so it carries its share; directions ignore it.
                factor = shares[0] / len(closures) if split and k == 0 else parts[k] if weighted else None
                self._fill(holders, first + k, losses[k], factor, scaler, add=m > 0, retain=k + 1 < g)
        rows = [holder.data[first : first + self.ascent.n_rows] for holder in holders]
        own = [r[1 if split else 0 : g] for r in rows]
        if weighted:
            self._add_up(*own, total)
        if scaler is not None:
            self._unscale(own, scaler)
        if weighted:
            inverse = torch.where(total > 0, 1 / total.clamp_min(1e-30), 0.0)
            for r in own:
                r *= inverse[1 if split else 0 :, None]
        return self._coefficients(rows, total), rows, loss

    def _coefficients(self, rows: list[Tensor], shares: Tensor) -> Tensor:
        ascent = self.ascent
        matrix, theta_sq = self._gram(rows)
        if self.rule.gram_every > 1:
            return ascent.refreshed(matrix.sum(0), theta_sq.sum(), shares, self._fresh_gram(rows))
        coef = ascent.coefficients(matrix, theta_sq, shares)
        if self.rule.split:  # coefficients look at groups that are present and perturbed, the update takes them all
            whole = matrix.sum()
            ascent.stats["bad"] = torch.maximum(ascent.stats["bad"], (whole - whole).ne(0))
        return coef

    def _stale(self, closures: list[Closure], scaler: GradScaler | None) -> tuple[Tensor, list[Tensor], Tensor]:
        """Mode R: one backward of sum_j c_j L_j with coefficients from the remembered Gram matrix.

        With several micro-batches each takes the coefficients of its own shares (and of its own classifier gradients).
        """
        holders, world, count = [b.flat.rows for b in self._climbing], self._world(), len(closures)
        found, parts = [], []
        for m, closure in enumerate(closures):
            with self._unreduced():
                losses, shares = self._evaluate(closure)
            found.append(batch_loss(losses, shares))
            total = shares / world if world > 1 else shares
            self._add_up(total)
            stale = self.ascent.stale_coefficients(total, self._fresh_of(losses, shares, total, scaler))
            parts.append(stale)
            factor = stale.coef if count == 1 else stale.coef / count
            if world > 1:
                factor = factor * torch.where(total > 0, shares / (world * total.clamp_min(1e-30)), 0.0)
            if scaler is not None:  # an overflow must show in the gradient, where the scaler looks for it
                factor = torch.where(self.ascent.stats["bad"] > 0, torch.nan, factor)
            self._fill(holders, 0, (factor * losses).sum(), None, scaler, add=m > 0, retain=False)
        rows = [holder.data[:1] for holder in holders]
        self._add_up(*rows)
        if scaler is not None:
            self._unscale(rows, scaler)
        if count > 1:
            rests = [part.rest for part in parts if part.rest is not None]
            norm = torch.stack([part.norm for part in parts]).mean()
            stale = Stale(stale.coef, norm, torch.stack(rests).mean() if rests else None)
        fresh = self._fresh_gram(rows)
        scale, more = self.ascent.rescaled(*self._gram(rows), stale, None if fresh is None else fresh.sum())
        for last, r in zip(self._last_layers(), rows, strict=True):
            if last is not None and more is not None:
                r[:, last.span] *= more
        return scale, rows, found[0] if count == 1 else torch.stack(found).mean()

    def _fresh_gram(self, rows: list[Tensor]) -> Tensor | None:
        """Gram matrix of the rows' classifier part; None if no classifier is marked."""
        pairs = zip(self._last_layers(), rows, strict=True)
        found = [last.gram(r, self.rule.adaptive) for last, r in pairs if last is not None]
        return torch.stack(found).sum(0) if found else None

    def _fresh_of(self, losses: Tensor, shares: Tensor, total: Tensor, scaler: GradScaler | None) -> Tensor | None:
        """Gram matrix [G, G] of the classifier's group gradients in this batch, of all processes if the ascent is global."""
        found, world = [], self._world()
        for last in self._last_layers():
            if last is None:
                continue
            scale = None if scaler is None else loss_scale(scaler, self.ascent.device)
            rows = last.put(losses if world == 1 else losses * (shares / world), scale)
            if world > 1:
                self._add_up(rows)
                rows *= torch.where(total > 0, 1 / total.clamp_min(1e-30), 0.0)[:, None]
            found.append(last.gram(rows, self.rule.adaptive))
        return torch.stack(found).sum(0) if found else None

    def _fill(
        self, holders: list[GradientRows], row: int, loss: Tensor, factor: Tensor | None, scaler: GradScaler | None,
        *, add: bool, retain: bool,
    ) -> None:  # fmt: skip
        """Write (or add) the gradient of factor * loss to row `row` of the climbing blocks."""
        params = [p for holder in holders for p in holder.params if p.requires_grad]
        with torch.enable_grad():
            loss = loss if factor is None else loss * factor
            loss = loss if scaler is None else scaler.scale(loss)
        found: dict[Tensor, Tensor] = {}
        if params:  # else they are frozen
            grads = torch.autograd.grad(loss, params, retain_graph=retain, allow_unused=True)
            if not self._looked and any(grad is None for grad in grads):
                refuse_reentrant(loss)
                self._looked = True
            found = dict(zip(params, grads, strict=True))
        for holder in holders:
            holder.put(row, [found.get(p) for p in holder.params], add=add)

    def _gram(self, rows: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Partial Gram matrices and |theta|^2 of the climbing blocks; frozen parameters have no part in either."""
        blocks, adaptive = self._climbing, self.rule.adaptive
        with self._without_absent():
            pairs = [gram_partials(r, block.flat.data, adaptive) for r, block in zip(rows, blocks, strict=True)]
        matrix, theta_sq = pairs[0] if len(pairs) == 1 else (torch.cat(part) for part in zip(*pairs, strict=True))
        frozen = [p.detach() for block in blocks for p in block.flat.params if not p.requires_grad and p.numel()]
        if frozen:
            theta_sq[0] -= torch.stack([p.double().square().sum() for p in frozen]).sum()
        return matrix, theta_sq

    @contextmanager
    def _without_absent(self) -> Iterator[None]:
        """The moving averages of parameters without a gradient play no part meanwhile, and stay what they are.

        In a global ascent only frozen ones count as such: another process may have a gradient.
        """
        with ExitStack() as stack:
            for block in self._climbing if self.rule.direction == "friendly" else []:
                first, g = self._first_row, self._counts.numel()
                here = block.flat.rows.filled(range(first, first + g))
                absent = [
                    i
                    for i, p in enumerate(block.flat.params)
                    if not p.requires_grad or not (here[i] or self._world() > 1)
                ]
                stack.enter_context(block.flat.rows.without(range(first + g, first + 2 * g), absent))
            yield

    def _settle(self, rows: list[Tensor]) -> None:
        """Move the averages, once the ascent has used the old ones."""
        with self._without_absent():
            self.ascent.settle(*rows)

    @torch.no_grad()
    def _climb(self, coef: Tensor, rows: list[Tensor]) -> None:
        """Put theta + s^2 * coef @ rows into the parameters, from wherever they are."""
        if self._maximizes():  # the worst is where the objective is least
            coef = -coef
        with self._without_absent():
            for block, r in zip(self._climbing, rows, strict=True):
                theta = block.flat.data
                if block.climbed:
                    block.flat.point()
                    perturb(block.kept, r, coef, self.rule.adaptive, out=theta)
                else:
                    perturb(theta, r, coef, self.rule.adaptive, out=theta, keep=block.kept)
                    block.climbed = True
                block.note()
        self._moved()

    def _maximizes(self) -> bool:
        """Whether the base optimizer goes uphill."""
        found = {bool(group.get("maximize")) for group in self.param_groups}
        if len(found) > 1:
            raise ValueError("maximize differs between the param groups: their losses are one")
        return found.pop()

    # -- loss scaling ----------------------------------------------------------------------------------------------------

    def _unscale(self, rows: list[Tensor], scaler: GradScaler, *, tell: bool = True) -> None:
        """Unscale the first pass's rows; tell the scaler (once a step) of an overflow there, too, if all processes see it."""
        if not tell or not self._verdict_is_shared():
            scale = loss_scale(scaler, self.ascent.device)
            for r in rows:
                r /= scale
            return
        self._first_pass.params = [_holding(r) for r in rows]
        scaler.unscale_(self._first_pass)  # type: ignore[arg-type]

    # -- state -----------------------------------------------------------------------------------------------------------

    def _export(self) -> dict[str, Any]:
        extra: dict[str, Any] = {"engine": {k: v.clone() for k, v in self.ascent.state().items()}}
        if self.rule.direction == "friendly":
            g = self._counts.numel()
            extra["averages"] = averages_by_index(self, self._first_row + g, g, self._climbing)
        return extra

    def _check_extra(self, extra: dict[str, Any]) -> None:
        g = self._counts.numel()
        for name, shape in (("seen", (g,)), ("memory", (g, g))):
            held = extra.get("engine", {}).get(name)
            if held is not None and held.shape != shape:
                raise ValueError(f"state_dict is of {len(held)} groups, this optimizer has {g}: call set_groups before")
        if self.rule.direction == "friendly":
            check_averages(self, extra.get("averages", {}), g)

    def _import(self, extra: dict[str, Any]) -> None:
        self.ascent.start(self._counts)
        if "engine" in extra:
            self.ascent.load_state(extra["engine"])
        if self.rule.direction == "friendly":
            g = self._counts.numel()
            load_averages(self, extra.get("averages", {}), self._first_row + g, g, self._climbing)


def refuse_reentrant(loss: Tensor) -> None:
    """ValueError if a part of the network is behind reentrant checkpointing, whose parameters autograd.grad does not see."""
    nodes, seen = [loss.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        if "CheckpointFunction" in node.name():
            raise ValueError(
                "closure: reentrant checkpointing hides parameters; call checkpoint(..., use_reentrant=False)"
            )
        seen.add(node)
        nodes += [after for after, _ in node.next_functions]


def _holding(rows: Tensor) -> Tensor:
    """A tensor without memory whose .grad is `rows`: what GradScaler.unscale_ wants to see."""
    holder = nn.Parameter(rows.new_empty(1).expand(rows.shape), requires_grad=False)
    holder.grad = rows
    return holder
