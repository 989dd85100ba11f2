"""What an optimizer holds for the parameters of one device: theta in one buffer, a copy of it from before the ascent, the
state of the base optimizer, and which neighbouring parameters one launch can update.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ltfast.flat import FlatParameters
from ltfast.kernels.step import Anchor

Present = tuple[int, ...]  # one truth value (or other small number) for each parameter of a block


@dataclass
class Run:
    """Neighbouring parameters of one group that share presence and step count: one launch."""

    group: int
    first: int  # index of the first parameter
    end: int  # index behind the last one
    span: slice  # of the flat buffer
    present: int
    published: bool = False  # base.state shows the state of these parameters


class Block:
    """One flat buffer of parameters, with what the optimizer keeps beside it.

    Attributes:
        flat: the parameters.
        climbed: the parameters hold theta + eps.
        kept: [N] theta as it was before the ascent, bit for bit; meaningful while `climbed`.
        expected: of each parameter whether it had a gradient in the last pass (before any: whether it wants one).
        versions: of the parameters when they had climbed: whoever writes to one in place raises its own.
        group_of: index of each parameter's group.
        slots: flat optimizer state by torch's name; views: of each parameter; addresses: theirs, since somebody may put other
            memory below a view (`state["exp_avg"].data = ...`).
        counters: each parameter's number of updates (SGD: of its momentum buffer), 0-dim; parameters always updated
            together share one tensor.
        shown: the parameters whose state `publish` has shown, by id of that state: (the state, index of the parameter).
        counting: the counters are up to date; SGD without dampening has no use for them.
        anchor: (A, T, strength) of a quadratic penalty, or None.
    """

    def __init__(self, groups: list[tuple[int, list[nn.Parameter]]], rows: int) -> None:
        self.flat = FlatParameters([p for _, params in groups for p in params], rows)
        index = {p: k for k, params in groups for p in params}
        self.group_of = [index[p] for p in self.flat.params]
        self.climbed = False
        self.versions: list[int] = []
        self._kept: Tensor | None = None
        self.slots: dict[str, Tensor] = {}
        self.views: dict[str, list[Tensor]] = {}
        self.addresses: dict[str, list[int]] = {}
        self.counters = [torch.zeros((), device=self.flat.device, dtype=torch.float32)] * len(self.flat.params)
        self.expected = [p.requires_grad for p in self.flat.params]
        self.shown: dict[int, tuple[dict[str, Any], int]] = {}
        self.counting = False
        self.anchor: Anchor | None = None
        self._runs: dict[Present, list[Run]] = {}

    @property
    def kept(self) -> Tensor:
        """See above; allocated when first asked for (a block outside the ascent's scope needs none)."""
        if self._kept is None:
            self._kept = torch.zeros_like(self.flat.data)
        return self._kept

    def restore(self) -> None:
        """Bring theta back, bit for bit, if the parameters hold theta + eps."""
        if self.climbed:
            self.flat.data.copy_(self.kept)
            self.flat.point()
            self.climbed = False

    def note(self) -> None:
        """The parameters hold theta + eps now."""
        self.versions = [p._version for p in self.flat.params]

    def keep_written(self) -> None:
        """What somebody has put into the parameters since they climbed is theta from now on."""
        if not self.climbed:
            return
        kept, replaced = self.flat.views(self.kept), set(self.flat.replaced())
        for i, (p, version) in enumerate(zip(self.flat.params, self.versions, strict=True)):
            if p._version != version or i in replaced:
                kept[i].copy_(p.detach())

    def bounds(self, first: int, end: int) -> slice:
        """The span of parameters first .. end - 1."""
        return slice(self.flat.offsets[first], self.flat.offsets[end])

    @cached_property
    def spans(self) -> list[tuple[int, slice]]:
        """(group, span) in order."""
        runs = self.runs((True,) * len(self.group_of), split_counters=False)
        return [(run.group, run.span) for run in runs]

    def runs(self, present: Present, split_counters: bool = True) -> list[Run]:
        """The runs of neighbours that one launch can update."""
        if split_counters and present in self._runs:
            return self._runs[present]
        runs: list[Run] = []
        keys = [
            (g, here, id(c) if split_counters and here else 0)
            for g, here, c in zip(self.group_of, present, self.counters, strict=True)
        ]
        start = 0
        for end in range(1, len(keys) + 1):
            if end == len(keys) or keys[end] != keys[start]:
                runs.append(Run(keys[start][0], start, end, self.bounds(start, end), keys[start][1]))
                start = end
        if split_counters:
            if len(self._runs) >= 64:  # parameters used in ever new combinations: do not hoard
                self.forget()
            self._runs[present] = runs
        return runs

    def slot(self, name: str) -> Tensor:
        """The flat state `name`, zero when first asked for."""
        if name not in self.slots:
            self.slots[name] = torch.zeros_like(self.flat.data)
            self.views[name] = self.flat.views(self.slots[name])
            self.addresses[name] = [view.data_ptr() for view in self.views[name]]
        return self.slots[name]

    def split_counters(self, present: Present) -> None:
        """Give the present parameters counters of their own where absent ones share them."""
        if split_shared(self.counters, present):
            self.forget()

    def count(self, present: Present, skip: Tensor | None) -> None:
        """One more update of the present parameters (none if skip is nonzero)."""
        for counter in {id(c): c for c, here in zip(self.counters, present, strict=True) if here}.values():
            counter += 1.0 if skip is None else 1.0 - skip

    def forget(self) -> None:
        """The counters have changed: drop what was derived from them."""
        self._runs.clear()

    def set_counters(self, values: list[float]) -> None:
        """Start counting from `values`; equal ones share a tensor."""
        shared: dict[float, Tensor] = {}
        for v in values:
            if v not in shared:
                shared[v] = torch.full((), float(v), device=self.flat.device, dtype=torch.float32)
        self.counters = [shared[v] for v in values]
        self.forget()


def split_shared(tensors: list[Tensor], present: Present) -> bool:
    """Give present members tensors of their own where absent ones share them, in place; True if any did."""
    sharing: dict[int, list[int]] = defaultdict(list)
    for i, tensor in enumerate(tensors):
        sharing[id(tensor)].append(i)
    found = False
    for members in sharing.values():
        updated = [i for i in members if present[i]]
        if updated and len(updated) < len(members):
            own = tensors[updated[0]].clone()
            for i in updated:
                tensors[i] = own
            found = True
    return found
