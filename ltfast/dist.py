"""Processes of one run: rank, world size and the few collectives that training needs (no-ops when alone)."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from textwrap import shorten
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ltfast.errors import UserError
from ltfast.launch import RESTARTS, launched, restarts

T = TypeVar("T")
HASH_BLOCK = 1 << 22  # elements hashed at once: 32 MiB of int64 products
# A peer that dies closes its connections (gloo) or is noticed by the launcher (NCCL); this only ends a true hang.
TIMEOUT = timedelta(minutes=30)
ERROR_WIDTH = 500  # characters: NCCL's first line, its kind of error and its "Last error" take up to 450


@dataclass
class Traffic:
    """Collectives this process took part in and the bytes it handed to them."""

    calls: int = 0
    bytes: int = 0

    def add(self, tensor: Tensor) -> None:
        """Count one collective on `tensor`."""
        self.calls += 1
        self.bytes += tensor.numel() * tensor.element_size()

    @contextmanager
    def noted_in(self, other: Traffic) -> Iterator[None]:
        """Add what happens inside to `other` as well."""
        calls, size = self.calls, self.bytes
        yield
        other.calls += self.calls - calls
        other.bytes += self.bytes - size


@dataclass(frozen=True)
class Ranks:
    """This process among all of the run.

    Every method that takes part in a collective must be called by all ranks, in the same order. `host` is a group for
    decisions of the host (gloo): using it never waits for a device. `traffic` counts what goes over the wire.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    host: Any = field(default=None, compare=False, repr=False)
    traffic: Traffic = field(default_factory=Traffic, compare=False, repr=False)

    @property
    def main(self) -> bool:
        """True on the one process that writes files and prints."""
        return self.rank == 0

    # -- tensors -------------------------------------------------------------------------------------------------------

    def sum_(self, tensor: Tensor) -> Tensor:
        """Add a tensor up over the ranks, in place; every rank gets the same bits."""
        if self.world > 1:
            self.traffic.add(tensor)
            dist.all_reduce(tensor)
        return tensor

    def mean_(self, tensor: Tensor) -> Tensor:
        """Average a float tensor over the ranks, in place; every rank gets the same bits."""
        return self.sum_(tensor).div_(self.world) if self.world > 1 else tensor

    def broadcast_(self, tensor: Tensor) -> Tensor:
        """Overwrite a tensor with rank 0's, in place."""
        if self.world > 1:
            self.traffic.add(tensor)
            dist.broadcast(tensor, 0)
        return tensor

    def gather(self, tensor: Tensor) -> Tensor:
        """[world, ...] the tensors of all ranks, on every rank (shapes must agree)."""
        if self.world == 1:
            return tensor[None]
        tensor = tensor.contiguous()
        parts = [torch.empty_like(tensor) for _ in range(self.world)]
        self.traffic.add(tensor)
        dist.all_gather(parts, tensor)
        return torch.stack(parts)

    # -- decisions of the host -----------------------------------------------------------------------------------------

    def most(self, value: int) -> int:
        """The largest of the ranks' values."""
        if self.world == 1:
            return value
        largest = torch.tensor(value)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.host)
        return int(largest)

    def share(self, value: T, source: int = 0) -> T:
        """The `value` of rank `source` (anything JSON holds) on every rank."""
        if self.world == 1:
            return value
        text = json.dumps(value).encode() if self.rank == source else b""
        length = torch.tensor([len(text)])
        dist.broadcast(length, source, group=self.host)
        data = torch.empty(int(length), dtype=torch.uint8)
        if self.rank == source:
            data.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
        dist.broadcast(data, source, group=self.host)
        return json.loads(bytes(data.numpy()))  # type: ignore[no-any-return]

    def complaint(self, own: str | None) -> str | None:
        """The complaint of the first rank that has one, with its number, on every rank; None if all are content."""
        if self.world == 1:
            return own
        first = torch.tensor(self.world if own is None else self.rank)
        dist.all_reduce(first, dist.ReduceOp.MIN, group=self.host)
        if int(first) == self.world:
            return None
        return f"{self.share(own, int(first))} (on rank {int(first)})"

    def on_main(self, work: Callable[[], T]) -> T | None:
        """Run `work` on rank 0 only; its UserError is raised on every rank. Returns its result there, None elsewhere."""
        result, error = None, None
        if self.main:
            try:
                result = work()
            except UserError as problem:
                error = str(problem)
        error = self.share(error)
        if error is not None:
            raise UserError(error)
        return result

    def tensors(self, named: dict[str, Tensor] | None, kept: tuple[str, ...] = ()) -> dict[str, Tensor]:
        """Rank 0's host tensors on every rank (a checkpoint: only rank 0 needs to see the file system it lies on).

        kept: how the names begin of those that stay on rank 0.
        """
        if self.world == 1:
            return named or {}
        result = {k: v for k, v in (named or {}).items() if k.startswith(kept)}
        plan: list[Any] = [
            [k, list(v.shape), str(v.dtype).split(".")[1]] for k, v in (named or {}).items() if k not in result
        ]
        for name, shape, dtype in self.share(plan):
            tensor = named[name].contiguous() if named is not None else torch.empty(shape, dtype=getattr(torch, dtype))
            if tensor.numel():
                dist.broadcast(tensor.reshape(-1).view(torch.uint8), 0, group=self.host)
            result[name] = tensor
        return result

    def check_same(self, tensor: Tensor, what: str) -> None:
        """Compare a float32 tensor over the ranks, bit for bit, by a 64-bit checksum.

        Raises:
            UserError: some rank holds other bits: a hardware fault, or an operation that differs between devices.
        """
        if self.world == 1:
            return
        sums = self.gather(checksum(tensor).reshape(1)).flatten().tolist()
        wrong = [r for r, value in enumerate(sums) if value != sums[0]]
        if wrong:
            raise UserError(
                f"ranks {wrong} hold other {what} than rank 0: a faulty device, or kernels that differ between them; "
                "continue from the last checkpoint with --resume, on healthy and equal devices"
            )


_joined = Ranks()


def checksum(tensor: Tensor) -> Tensor:
    """int64 0-dim: sum_i bits_i * (2 i + 1) mod 2^64 of a float32 tensor. Any single changed element changes it."""
    bits = tensor.detach().reshape(-1).view(torch.int32)
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, bits.numel(), HASH_BLOCK):
        part = bits[start : start + HASH_BLOCK].long()
        odd = torch.arange(2 * start + 1, 2 * (start + part.numel()) + 1, 2, device=tensor.device)
        total += (part * odd).sum()
    return total


def start() -> Ranks:
    """Join the process group that torchrun's environment describes, or be alone.

    Raises:
        UserError: that environment is not complete.
    """
    world = int(os.environ.get("WORLD_SIZE", "1")) if launched() else 1
    if world == 1:
        return Ranks()
    rank, local = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", "0"))
    if missing := [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        raise UserError(
            f"RANK and WORLD_SIZE are set to {rank} and {world}, but not {' and '.join(missing)}: start with torchrun, or unset them"
        )
    if not dist.is_initialized():
        store, _, _ = next(dist.rendezvous("env://", timeout=TIMEOUT))
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            # The launcher's store outlives a restart of the workers, and with it the addresses of those that died. Those
            # of several machines count restarts apart and so would not meet: docs/scaling.md has them share no store.
            store = dist.PrefixStore(f"start-{restarts()}", store)
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=TIMEOUT)
    global _joined
    _joined = Ranks(rank, world, local, host=dist.new_group(backend="gloo", timeout=TIMEOUT))
    os.environ[RESTARTS] = str(_joined.most(restarts()))  # a machine that only waited for another has not counted
    return _joined


def joined() -> Ranks:
    """What `start` has returned, for ops that take tensors only."""
    return _joined


def lost_peer(error: RuntimeError) -> str | None:
    """Why this process ends, if a collective failed as it does where another process is gone; None for other errors.

    NCCL fails in the same way where something is wrong here (no shared memory, an old driver), so its words are quoted.
    """
    if isinstance(error, dist.DistError):
        words, _, _ = str(error).partition("Exception raised from")  # C++ frames follow
        return f"because another one is gone, or of this: {shorten(words, ERROR_WIDTH)}"
    return "because another one is gone" if "gloo" in str(error) and "onnection" in str(error) else None


def leaves_together() -> bool:
    """True where `stop` waits for the other processes: NCCL's communicators end on all of a machine's at once."""
    return dist.is_initialized() and torch.cuda.is_available()


def stop() -> None:
    """Leave the process group, when all do."""
    if dist.is_initialized():
        dist.destroy_process_group()
