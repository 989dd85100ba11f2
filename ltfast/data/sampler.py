"""Sampling orders: which image stands where in an epoch, as one pure, vectorised function of its arguments.

An epoch has ceil(n / batch) steps of exactly `batch` images, so shapes are static: the ceil(n / batch) * batch - n
images that are missing are the head of the same permutation, met a second time.

- instance: every image once (plus the fill), in a fresh uniform permutation.
- group-stratified: the same permutation and the same fill, so the same images exactly as often: what a batch holds in
  expectation, and the epoch's gradient sum, are those of `instance`, with no re-weighting. Only the arrangement
  differs: the permutation is stably sorted by group and dealt to the batches like cards, so batch b holds floor or ceil
  of n_k / steps images of group k: a batch holds every group that has at least `steps` images, and a smaller group is
  never twice in one. The deal's batches are then shuffled, and the images inside each batch, so that neither ranks nor
  positions know groups.
- class-balanced (Kang et al. 2020; p_c = 1/C), sqrt (p_c ~ sqrt n_c), progressive (p_c goes linearly from n_c/n in the
  first epoch to 1/C in the last): class c gets floor or ceil of steps * batch * p_c places, unbiased by one random
  offset (systematic sampling); inside a class the images come in fresh permutations one after another, so none repeats
  before all of its class were seen.

Legend: n images, C classes, N = steps * batch places.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ltfast.data.rng import generator
from ltfast.errors import UserError
from ltfast.progress import counted

STEPS_ADVISED = 10  # of an epoch, about, where a batch is too large
SAMPLERS = ("instance", "class-balanced", "sqrt", "progressive", "group-stratified")


def steps_per_epoch(n: int, batch: int) -> int:
    """ceil(n / batch). ValueError when batch is not in 1..n."""
    if batch < 1 or batch > n:
        raise ValueError(f"batch must be in 1..{n} (the number of training images), got {batch}")
    return -(-n // batch)


def check_batch(batch: int, n: int, world: int, name: str) -> None:
    """UserError when the global batch is below 1, above the n training images, or no multiple of the number of
    processes."""
    if batch < 1:
        raise UserError(f"--batch {batch}: it must be at least 1")
    if batch > n:
        fitting = world * 2 ** max(round(math.log2(max(n, 1) / world / STEPS_ADVISED)), 0)
        advice = (
            f"--batch {fitting} makes {counted(-(-n // fitting), 'step')} of them"
            if fitting <= n
            else "use fewer processes"
        )
        raise UserError(f"--batch {batch} is larger than the {n} training images of {name}; {advice}")
    if batch % world:
        raise UserError(
            f"--batch {batch} cannot be shared evenly by {world} processes; choose a multiple of {world}, "
            "or another number of processes"
        )


def check_sampler(sampler: str, epochs_total: int | None) -> None:
    """UserError for an unknown sampler, or the progressive one without the number of epochs."""
    if sampler not in SAMPLERS:
        raise UserError(f"--sampler {sampler!r}: choose one of {', '.join(SAMPLERS)}")
    if sampler == "progressive" and epochs_total is None:
        raise UserError("--sampler progressive: it needs the number of epochs (--epochs)")


def epoch_order(
    kind: str,
    labels: Tensor,
    *,
    batch: int,
    seed: int,
    epoch: int,
    epochs_total: int | None = None,
    group_of_class: Tensor | None = None,
) -> Tensor:
    """Positions of the images of one epoch, LongTensor[steps * batch] on the CPU; row b of `.view(steps, batch)` is
    global batch b.

    labels: [n] int64, every class index at least 0; epochs_total: needed by "progressive"; group_of_class:
    LongTensor[C], needed by "group-stratified". ValueError for an unknown kind, a batch outside 1..n or a missing
    argument.
    """
    n = labels.numel()
    places = steps_per_epoch(n, batch) * batch
    rng = generator(seed, epoch)
    if kind == "instance":
        return _filled_permutation(n, places, rng)
    if kind == "group-stratified":
        if group_of_class is None:
            raise ValueError("group_of_class is needed by the group-stratified sampler")
        group_of_image = group_of_class.to("cpu", torch.int64)[labels]
        return _dealt(_filled_permutation(n, places, rng), group_of_image, batch, rng)
    counts = torch.bincount(labels).to(torch.float64)
    return _drawn_by_class(labels, _class_shares(kind, counts, epoch, epochs_total), places, rng)


def times_before(order: Tensor) -> Tensor:
    """How often each place's image stands before it in the epoch [N]: 0 at its first place."""
    by_image = torch.argsort(order, stable=True)
    same = order[by_image]
    times = torch.empty_like(order)
    times[by_image] = torch.arange(len(order)) - torch.searchsorted(same, same)
    return times


class Ordered:
    """What sources of small and of large pictures share: the order of an epoch, of which each rank takes its part.

    Attributes of the source: sampler, train_labels, num_classes, batch, seed, epochs_total, rank, world, fingerprint.
    """

    sampler: str
    train_labels: Tensor
    num_classes: int
    batch: int
    seed: int
    epochs_total: int | None
    rank: int
    world: int
    fingerprint: str
    group_of_class: Tensor | None = None

    def set_groups(self, group_of_class: Tensor) -> None:
        """Groups for the group-stratified sampler, LongTensor[C]; takes effect at the next epoch."""
        if group_of_class.shape != (self.num_classes,):
            raise ValueError(f"group_of_class must have shape ({self.num_classes},), got {tuple(group_of_class.shape)}")
        self.group_of_class = group_of_class.to("cpu", torch.int64)

    def identity(self) -> dict[str, Any]:
        """See Source.identity."""
        fields = {"seed": self.seed, "batch": self.batch, "sampler": self.sampler, "images": len(self.train_labels)}
        return {**fields, "training list": self.fingerprint}

    def whole_epoch(self, epoch: int) -> Tensor:
        """[steps * batch] int64: the images of all ranks, place by place."""
        groups = self.group_of_class
        if self.sampler == "group-stratified" and groups is None:  # no groups yet: one, the same images as instance
            groups = torch.zeros(self.num_classes, dtype=torch.int64)
        return epoch_order(
            self.sampler, self.train_labels, batch=self.batch, seed=self.seed, epoch=epoch,
            epochs_total=self.epochs_total, group_of_class=groups,
        )  # fmt: skip

    def epoch_indices(self, epoch: int) -> Tensor:
        """[steps, batch / world] int64 on the CPU: the images that this rank trains on, step by step."""
        return rank_slice(self.whole_epoch(epoch), self.batch, self.rank, self.world)


def rank_slice(order: Tensor, batch: int, rank: int, world: int) -> Tensor:
    """[steps, batch / world]: the rank-th contiguous part of every global batch. ValueError unless world divides
    batch."""
    if world < 1 or batch % world or not 0 <= rank < world:
        raise ValueError(
            f"batch must be a multiple of world and 0 <= rank < world, got batch {batch}, rank {rank}, world {world}"
        )
    part = batch // world
    return order.view(-1, batch)[:, rank * part : (rank + 1) * part].contiguous()


def _filled_permutation(n: int, places: int, rng: torch.Generator) -> Tensor:
    permutation = torch.randperm(n, generator=rng)
    return torch.cat([permutation, permutation[: places - n]])


def _dealt(order: Tensor, group_of_image: Tensor, batch: int, rng: torch.Generator) -> Tensor:
    steps = order.numel() // batch
    by_group = order[torch.argsort(group_of_image[order], stable=True)]
    batches = by_group.view(batch, steps).T[torch.randperm(steps, generator=rng)]
    inside = torch.rand(steps, batch, generator=rng).argsort(dim=1)
    return batches.gather(1, inside).reshape(-1)


def _class_shares(kind: str, counts: Tensor, epoch: int, epochs_total: int | None) -> Tensor:
    """Probability of each class, float64 [C], zero for a class with no image."""
    present = (counts > 0).to(torch.float64)
    balanced = present / present.sum()
    if kind == "class-balanced":
        return balanced
    if kind == "sqrt":
        return counts.sqrt() / counts.sqrt().sum()
    if kind == "progressive":
        if epochs_total is None:
            raise ValueError("epochs_total is needed by the progressive sampler")
        t = min(1.0, epoch / max(1, epochs_total - 1))
        return (1 - t) * counts / counts.sum() + t * balanced
    raise ValueError(f"kind must be one of {', '.join(SAMPLERS)}, got {kind!r}")


def _systematic(expected: Tensor, total: int, rng: torch.Generator) -> Tensor:
    """Integers [C] that sum to total, each floor or ceil of its expectation and right on average; 0 stays 0."""
    wanted = expected.nonzero().squeeze(1)
    wanted = wanted[torch.randperm(wanted.numel(), generator=rng)]
    edges = expected[wanted].cumsum(0) + torch.rand((), generator=rng, dtype=torch.float64)
    edges[-1] = total  # total + u up to rounding, whose floor is total
    edges = edges.floor().to(torch.int64).clamp_(max=total)
    quota = torch.zeros_like(expected, dtype=torch.int64)
    quota[wanted] = torch.diff(edges, prepend=edges.new_zeros(1))
    return quota


def _drawn_by_class(labels: Tensor, shares: Tensor, places: int, rng: torch.Generator) -> Tensor:
    counts = torch.bincount(labels)
    quota = _systematic(shares * places, places, rng)
    # Every round of a class is a fresh permutation of it; rounds are numbered over all classes and sorted in one go.
    rounds = torch.where(counts > 0, (quota + counts - 1) // counts.clamp(min=1), 0)
    first_round = rounds.cumsum(0) - rounds
    repeats = rounds[labels]
    image = torch.arange(labels.numel()).repeat_interleave(repeats)
    start = repeats.cumsum(0) - repeats
    round_of = torch.arange(image.numel()) - start[image] + first_round[labels[image]]
    random_bits = torch.randint(1 << 31, (image.numel(),), generator=rng)
    image = image[torch.argsort((round_of << 31) | random_bits)]
    size = rounds * counts
    place_in_class = torch.arange(image.numel()) - (size.cumsum(0) - size)[labels[image]]
    drawn = image[place_in_class < quota[labels[image]]]
    return drawn[torch.randperm(places, generator=rng)]
