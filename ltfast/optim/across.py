"""Group losses in several processes: what an ascent adds up over them, and what it must refuse."""

from __future__ import annotations

from typing import Self

import torch.distributed as dist
from torch import Tensor, nn

from ltfast.optim.base import FlatOptimizer
from ltfast.optim.processes import group_of, reduces, wrappers_of
from ltfast.optim.rules import Rule


class AcrossProcesses(FlatOptimizer):
    """What GroupAscent does where several processes train together.

    A local ascent climbs by its own process's batch; a global one by the whole batch, whose rows and shares it adds up itself.
    """

    rule: Rule

    def _setup(self) -> None:
        super()._setup()
        self._searched = False

    def _leaves_unreduced(self, ascent: str) -> bool:
        return True  # the rows of a global ascent are added up here

    def bind(self, model: nn.Module, ascent: str = "local") -> Self:
        super().bind(model, ascent)
        self._searched = False
        return self

    def _check_processes(self) -> None:
        """Refuse, before a step of several processes, what would make them hang or drift apart.

        Raises:
            ValueError: DistributedDataParallel was not given to `bind` and would reduce at the wrong times, or `join` lets
                processes run out of batches whose ascents need all of them.
        """
        if not self._several():
            return
        by_class = self.rule.groups == "class"  # as many passes as this process's batch has classes
        if reduces(self._model):
            join = getattr(self._model, "_join_config", None)
            if join is not None and join.enable and (by_class or self._world() > 1):
                raise ValueError(
                    "model: DistributedDataParallel.join does not work with CCSAM nor with a global ascent by group losses: "
                    "give every process as many batches"
                )
        elif not self._searched:
            wrappers = wrappers_of(self._params())
            if any(by_class or wrapper.static_graph for wrapper in wrappers):
                raise ValueError(
                    "several processes train these parameters by DistributedDataParallel, whose reductions the optimizer "
                    "must direct: call optimizer.bind(ddp) with that module, made without static_graph"
                )
            self._searched = True

    def _world(self) -> int:
        """Processes whose gradients a global ascent adds up; 1 for a local one."""
        return dist.get_world_size(group_of(self._model)) if self._ascent == "global" and self._several() else 1

    def _verdict_is_shared(self) -> bool:
        return not self._several() or self._world() > 1

    def _of_all(self, bad: Tensor) -> Tensor:
        """The flag, nonzero on all processes of a global ascent if it is on one."""
        if self._world() > 1:
            bad = bad.clone()
            self._add_up(bad)
        return bad

    def _add_up(self, *tensors: Tensor) -> None:
        """Sum over the processes, in place, for a global ascent."""
        if self._world() > 1:
            for tensor in tensors:
                dist.all_reduce(tensor, group=group_of(self._model))
