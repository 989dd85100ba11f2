"""Processes of one run: rank, world size and the few collectives that training needs (no-ops when alone)."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Ranks:
    """This process among all of the run."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0

    @property
    def main(self) -> bool:
        """True on the one process that writes files and prints."""
        return self.rank == 0

    def mean_(self, tensor: Tensor) -> Tensor:
        """Average a float tensor over the ranks, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
            tensor /= self.world
        return tensor

    def sum_(self, tensor: Tensor) -> Tensor:
        """Add a tensor up over the ranks, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor


def start() -> Ranks:
    """Join the process group that torchrun's environment describes, or be alone."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        return Ranks()
    rank, local = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", "0"))
    if not dist.is_initialized():
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    return Ranks(rank, world, local)


def stop() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()
