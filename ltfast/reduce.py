"""What the ranks exchange within a step: the final gradient always, the ascent's ingredients if asked for.

Local ascent (default, "m-sharpness"): every rank climbs along its own part of the batch; the wire carries the final
gradient only, as in plain data parallelism, and in mode R one message of a few G x G numbers per step.
Global ascent: group gradients, group shares and the contrast set of bcl are those of the whole batch.

Shapes: N flat parameters, G groups, R gradient rows, B local batch, P projection width.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ltfast.collectives import gather_own_first
from ltfast.dist import Ranks
from ltfast.flat import FlatParameters

# DistributedDataParallel's sizes: large enough for full bandwidth, small enough that most of them leave during an eager backward.
BUCKET_BYTES = 25 << 20


class GradientReducer:
    """Averages the final gradient over the ranks, in an uncompiled run while backward is still computing earlier layers.

    The flat gradient row is cut into contiguous spans from its end, the order in which backward fills it. When autograd
    has added the last gradient of a span, the span itself is all-reduced asynchronously: no copy into buckets, none back.
    A compiled loss is one node of autograd, which hands over all gradients at its end: then every span leaves there.
    Unlike DistributedDataParallel, which reduces after every backward of its forward, this reduces the one that `arm`
    announces, so the G + 1 backwards of a sharpness-aware step cost one reduction.

    bucket_bytes: least bytes of a span. Every rank must have the same parameters in the same order.
    """

    def __init__(self, flat: FlatParameters, ranks: Ranks, bucket_bytes: int = BUCKET_BYTES) -> None:
        self.ranks = ranks
        self.spans: list[slice] = []
        self._members: list[int] = []  # parameters in each span
        self._row: Tensor | None = None
        self._left: list[int] = []
        self._work: list[Any] = []
        end, members = flat.size, 0
        for i in reversed(range(len(flat.params))):
            flat.params[i].register_post_accumulate_grad_hook(partial(self._arrived, len(self.spans)))
            members += 1
            if (end - flat.offsets[i]) * 4 >= bucket_bytes or i == 0:
                self.spans.append(slice(flat.offsets[i], end))
                self._members.append(members)
                end, members = flat.offsets[i], 0

    def arm(self, row: Tensor) -> None:
        """The next backward accumulates the final gradient into `row` [N]: send each span as soon as it is complete."""
        self._row, self._left, self._work = row, list(self._members), []

    def finish(self, bad: Tensor) -> None:
        """Send what is left and wait (on the device) for all of it; `row` then holds the mean over the ranks.

        bad: 0-dim; nonzero on one rank makes the gradient NaN on every rank, so all of them skip the step.
        """
        row = self._row
        assert row is not None
        # The first layers' span becomes complete last of all, so holding it back costs no overlap.
        row[:1] += torch.where(bad != 0, torch.nan, 0.0)
        while len(self._work) < len(self.spans):
            self._send(row)
        for work in self._work:
            work.wait()
        if not row.is_cuda:
            row /= self.ranks.world
        self._row = None

    def _arrived(self, span: int, parameter: Tensor) -> None:
        if self._row is None:
            return
        self._left[span] -= 1
        # In order, and the last one only in `finish`: every rank issues the same collectives in the same sequence.
        while len(self._work) < len(self.spans) - 1 and self._left[len(self._work)] == 0:
            self._send(self._row)

    def _send(self, row: Tensor) -> None:
        part = row[self.spans[len(self._work)]]
        self.ranks.traffic.add(part)
        # gloo cannot average: its sums are divided at the end.
        op = dist.ReduceOp.AVG if row.is_cuda else dist.ReduceOp.SUM
        self._work.append(dist.all_reduce(part, op, async_op=True))


@dataclass(frozen=True)
class Agreement:
    """What of an ascent is the whole batch's: everything (`everything`), or only what mode R remembers."""

    ranks: Ranks = field(default_factory=Ranks)
    everything: bool = False

    @property
    def alone(self) -> bool:
        """True where there is nothing to agree on."""
        return self.ranks.world == 1

    def losses(self, losses: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
        """Group losses [G] and shares [G] of this rank -> of the whole batch, if everything is global.

        Losses stay this rank's part, scaled so that their mean over the ranks (and that of their gradients) is the whole
        batch's: L_k * w_k(rank) / w_k(batch).
        """
        if self.alone or not self.everything:
            return losses, shares
        whole = self.ranks.mean_(shares.detach().clone())
        return losses * torch.where(whole > 0, shares / whole, 0.0), whole

    def rows(self, rows: Tensor) -> Tensor:
        """Gradient rows, averaged over the ranks in place if everything is global."""
        return self.ranks.mean_(rows) if self.everything else rows

    def remembered(self, shares: Tensor, *matrices: Tensor) -> tuple[Tensor, ...]:
        """What mode R's coefficients are made of, the same on every rank, in one message: shares [G] of the whole batch, and
        Gram matrices [G, G], each entry the mean over the ranks on which both groups are present (shares: this rank's).
        """
        if self.alone or self.everything:
            return shares, *matrices
        if not matrices:
            return (self.ranks.mean_(shares.detach().clone()),)
        g, present = shares.numel(), (shares > 0).double()
        both = torch.outer(present, present)
        packed = self.ranks.sum_(
            torch.cat([shares.detach().double(), *(m.flatten() for m in (both, *(both * m for m in matrices)))])
        )
        met = packed[g : g + g * g].clamp_min(1.0)
        agreed = (packed[g + g * g :].view(-1, g * g) / met).view(-1, g, g)
        return (packed[:g] / self.ranks.world).to(shares.dtype), *agreed.unbind()

    def contrast(self, z: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, slice]:
        """Projections z [2B, P] and labels [B] of all ranks, differentiable, and the slice of labels that is this rank's."""
        if self.alone or not self.everything:
            return z, labels, slice(None)
        b, world = labels.numel(), self.ranks.world
        views = z.view(2, b, -1).transpose(0, 1)  # [B, 2, P], so that ranks follow each other along the batch
        whole, everyone = gather_own_first(views, world), gather_own_first(labels, world)
        return whole.transpose(0, 1).reshape(-1, z.shape[1]), everyone, slice(b)
