"""Memory bank: for each class, the encoder weights of the epoch that served the class best.

Many classes improve in the same epoch and share one snapshot, so the bank is a table class -> snapshot id plus the
snapshots themselves, dropped as soon as no class refers to them. Memory is live snapshots * d, never C * d: at most one
snapshot per epoch lives.

Legend: C classes, S live snapshots, D elements of the flattened encoder parameters (no BatchNorm buffers).
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ltfast.errors import UserError

NO_SNAPSHOT = -1
WEIGHTS = ("snapshot.", "origin")  # how the names of a state's large tensors begin


class Lumps(NamedTuple):
    """Distinct snapshots in order of age: ids (S numbers), masses int64 [S] = classes on each, classes = their ids."""

    ids: tuple[int, ...]
    masses: Tensor
    classes: tuple[Tensor, ...]


class MemoryBank:
    """Best snapshot of each class, in host memory.

    num_classes: C. dimension: D. origin: the initial weights [D], kept for centred grouping (optional, one snapshot of
    memory).

    holds: False on a rank that leaves the weights to rank 0. It follows the table (entries, best quality, epochs) with
    empty snapshots, so that a machine with eight ranks keeps each snapshot once.

    From CUDA the copy goes through ONE pinned buffer of D elements without stopping the host, and moves on to pageable
    memory when it is next needed. Snapshots are not pinned themselves: PyTorch's pinned allocator rounds to powers of
    two and never gives memory back, which would break the bound above.
    """

    def __init__(
        self,
        num_classes: int,
        dimension: int,
        *,
        origin: Tensor | None = None,
        holds: bool = True,
    ) -> None:
        if num_classes < 1 or dimension < 1:
            raise ValueError(f"num_classes and dimension must be positive, got {num_classes} and {dimension}")
        self.num_classes, self.dimension = num_classes, dimension
        self.holds = holds
        self.entry = torch.full((num_classes,), NO_SNAPSHOT, dtype=torch.int64)
        self.best = torch.full((num_classes,), -torch.inf, dtype=torch.float64)
        self.origin = (
            None if origin is None or not holds else self._checked(origin).detach().to("cpu", torch.float32, copy=True)
        )
        self.epochs: dict[int, int] = {}  # of each live snapshot
        self._snapshots: dict[int, Tensor] = {}  # ids count up and are never used twice: they are ordered by age
        self._next = 0
        self._pinned: Tensor | None = None
        self._pending: tuple[int, torch.cuda.Event] | None = None

    def __len__(self) -> int:
        return len(self._snapshots)

    @property
    def num_bytes(self) -> int:
        """Host memory of the live snapshots, the origin and the pinned buffer, in bytes."""
        held = [*self._snapshots.values(), *(t for t in (self.origin, self._pinned) if t is not None)]
        return sum(t.numel() * t.element_size() for t in held)

    @torch.no_grad()
    def update(self, quality_C: Tensor, theta_D: Tensor, epoch: int) -> int:
        """After an epoch: classes whose quality [C] beats their best so far take theta [D]; returns how many did.

        At most one copy of theta is made, and none if nothing improved. NaN and -inf never improve. Reading quality is
        the only host synchronisation.
        """
        quality = quality_C.detach().to("cpu", torch.float64)
        if quality.shape != self.best.shape:
            raise ValueError(f"quality must have shape [{self.num_classes}], got {tuple(quality.shape)}")
        improved = quality > self.best
        count = int(improved.sum())
        if count:
            self._checked(theta_D)
            self._settle()
            self.entry[improved], self.best[improved] = self._next, quality[improved]
            self._drop_unreferenced()
            self._store(theta_D.detach(), epoch)
        return count

    def snapshot(self, snapshot_id: int) -> Tensor:
        """The weights [D] of one snapshot, float32 on the host; do not write to it."""
        assert self.holds, "this rank leaves the weights to rank 0"
        self._settle()
        return self._snapshots[snapshot_id]

    def lumps(self) -> Lumps:
        """The distinct snapshots with the classes that share each; classes without an entry are in none."""
        ids = tuple(sorted(self._snapshots))
        classes = tuple((self.entry == i).nonzero().flatten() for i in ids)
        return Lumps(ids, torch.tensor([len(c) for c in classes], dtype=torch.int64), classes)

    def blocks(self, size: int) -> Iterator[tuple[slice, list[Tensor]]]:
        """Column blocks of all snapshots in `lumps()` order, as views: (columns, S tensors of up to `size`)."""
        assert self.holds, "this rank leaves the weights to rank 0"
        self._settle()
        rows = [self._snapshots[i] for i in sorted(self._snapshots)]
        for start in range(0, self.dimension, size):
            columns = slice(start, min(start + size, self.dimension))
            yield columns, [row[columns] for row in rows]

    def group_means(self, group_of_class: Tensor, num_groups: int, block: int = 1 << 16) -> Tensor:
        """theta*_j [G, D] float32: the mean over group j's classes of their entry, summed in float64 by blocks.

        Classes without an entry do not count; a group of such classes alone gets the largest snapshot, as in grouping.
        """
        ids, masses, classes = self.lumps()
        if not ids:
            raise ValueError("the memory bank is empty: update it after at least one epoch")
        weight = torch.stack([torch.bincount(group_of_class[c], minlength=num_groups) for c in classes], 1).double()
        if weight.shape[0] != num_groups:
            raise ValueError(f"group_of_class must name {num_groups} groups, got {weight.shape[0]}")
        weight[weight.sum(1) == 0, masses.argmax()] = 1
        weight /= weight.sum(1, keepdim=True)
        means = torch.empty(num_groups, self.dimension)
        buffer = torch.empty(len(ids), min(block, self.dimension), dtype=torch.float64)
        for columns, rows in self.blocks(block):
            means[:, columns] = (weight @ stack_into(buffer, rows)).float()
        return means

    def state_dict(self) -> dict[str, Tensor]:
        """The whole bank as plain host tensors (for safetensors); snapshots share memory with the bank. Without
        snapshots and origin where another rank holds them."""
        self._settle()
        ages = torch.tensor([(i, self.epochs[i]) for i in sorted(self._snapshots)], dtype=torch.int64).view(-1, 2)
        state = {"entry": self.entry, "best": self.best, "epochs": ages, "next": torch.tensor(self._next)}
        if self.origin is not None:
            state["origin"] = self.origin
        return state | ({f"snapshot.{i}": t for i, t in sorted(self._snapshots.items())} if self.holds else {})

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over a `state_dict()`, keeping its tensors where they are already float32 on the host.

        Raises UserError, and changes nothing, if it belongs to another model or number of classes or is damaged.
        """
        check_state(state, self.num_classes, self.dimension, self.holds)
        self._settle()
        self.entry, self.best = state["entry"].to("cpu", copy=True), state["best"].to("cpu", torch.float64, copy=True)
        self.epochs, self._next = dict(state["epochs"].tolist()), int(state["next"])
        self._snapshots = {i: torch.empty(0) for i in self.epochs}
        if self.holds:
            self.origin = state["origin"].cpu() if "origin" in state else None
            self._snapshots = {i: state[f"snapshot.{i}"].to("cpu", torch.float32) for i in self.epochs}

    def _checked(self, theta: Tensor) -> Tensor:
        if theta.shape != (self.dimension,):
            raise ValueError(f"theta must be flat with {self.dimension} elements, got shape {tuple(theta.shape)}")
        return theta

    def _drop_unreferenced(self) -> None:
        for gone in set(self._snapshots) - set(self.entry.tolist()):
            del self._snapshots[gone], self.epochs[gone]

    def _store(self, theta: Tensor, epoch: int) -> None:
        key, self._next = self._next, self._next + 1
        self.epochs[key] = epoch
        if not self.holds:
            self._snapshots[key] = torch.empty(0)
            return
        if not theta.is_cuda:
            self._snapshots[key] = theta.to("cpu", torch.float32, copy=True)
            return
        if self._pinned is None:
            self._pinned = torch.empty(self.dimension, pin_memory=True)
        # On the current stream: the next update of theta runs after the copy, the host does not wait.
        self._pinned.copy_(theta, non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(theta.device))
        self._pending = (key, event)
        self._snapshots[key] = torch.empty(self.dimension)

    def _settle(self) -> None:
        """Finish the copy that is on its way, if any: must run before any snapshot is read."""
        if self._pending is not None and self._pinned is not None:
            key, event = self._pending
            event.synchronize()
            self._snapshots[key].copy_(self._pinned)
            self._pending = None


def stack_into(buffer: Tensor, rows: list[Tensor]) -> Tensor:
    """Copy S rows into the leading columns of a reused [S, block] buffer: fresh ones cost more than the products."""
    width = rows[0].numel()
    for target, row in zip(buffer, rows, strict=True):
        target[:width].copy_(row)
    return buffer[:, :width]


def check_state(state: Mapping[str, Tensor], num_classes: int, dimension: int, holds: bool = True) -> None:
    """Raise UserError unless the tensors form a bank of this shape; `holds`: with its snapshots."""
    absent = [name for name in ("entry", "best", "epochs", "next") if name not in state]
    if absent:
        raise UserError(f"not a memory bank: {' and '.join(absent)} missing (found {sorted(state)[:5]})")
    for name, tensor in state.items():
        expected = {"entry": (num_classes,), "best": (num_classes,), "epochs": (len(state["epochs"]), 2), "next": ()}
        if tuple(tensor.shape) != expected.get(name, (dimension,)):
            raise UserError(
                f"the memory bank is of another model or class list: {name} has shape {tuple(tensor.shape)}, this run "
                f"needs {expected.get(name, (dimension,))}; give the bank of a run with the same model and dataset"
            )
    needed = set(state["entry"].tolist()) - {NO_SNAPSHOT} | {i for i, _ in state["epochs"].tolist()}
    missing = sorted(i for i in needed if holds and f"snapshot.{i}" not in state)
    if missing:
        raise UserError(f"the memory bank is damaged: snapshots {missing[:5]} are missing; use another run's bank")
