"""How good mode R's ascent direction is on real pictures: its cosine to the exact one (benchmarks/optimizers.py sweep).

A ResNet is trained on CIFAR-10-LT (imbalance 100, four groups by class size) by plain SGD for a while; every further step
then keeps the exact [G, G] Gram matrix of its group gradients, and the classifier's part of it, in a file. That is the
expensive part, done once for each network and sampler. From the file every refresh interval, memory (EMA) and kind of
memory is played through side by side with the library's own rule. At a refresh, too, the direction judged is that of before
the refresh, so the memory is as old as it can be.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import harness
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ltfast.data import Source, load
from ltfast.kernels import gram as gram_matrix
from ltfast.losses import balanced_softmax, group_losses, log_prior
from ltfast.models import LongTailModel, create_encoder
from ltfast.optim import GSA, SAM
from ltfast.optim.ascent import Ascent
from ltfast.optim.fresh import FreshGradients
from ltfast.optim.rules import Rule
from ltfast.preserve.grouping import group_by_frequency

GROUPS = 4
INTERVALS, MEMORIES = (1, 4, 16, 32, 64), (0.0, 0.5, 0.8)
KINDS = {"remembered": False, "fresh classifier": True}  # what of the Gram matrix every step knows
SAMPLERS = ("group-stratified", "instance")
IMBALANCE, RATE, SAVE_EVERY = 100.0, 0.1, 50
Records = dict[str, Any]


def pictures(data: str, sampler: str, batch: int, seed: int) -> Source:
    """CIFAR-10-LT in batches drawn by `sampler`."""
    source = load(
        "cifar10-lt", data_dir=data, imbalance=IMBALANCE, batch=batch, num_views=1, sampler=sampler, seed=seed
    )
    source.set_groups(group_by_frequency(source.train_counts, GROUPS))
    return source


def batches(source: Source) -> Iterator[tuple[Tensor, Tensor]]:
    """Training batches without end."""
    for epoch in itertools.count():
        for batch in source.train(epoch):
            yield batch.views[0].contiguous(memory_format=torch.channels_last), batch.labels


class Trajectory:
    """A network trained by momentum SGD, each step's group gradients kept as their Gram matrix."""

    def __init__(self, source: Source, model: str, seed: int) -> None:
        torch.manual_seed(seed)
        encoder, dim = create_encoder(model, 3)
        self.model = LongTailModel(encoder, dim, source.num_classes).to(memory_format=torch.channels_last)
        self.prior = log_prior(source.train_counts)
        groups = group_by_frequency(source.train_counts, GROUPS)
        self.table = F.one_hot(groups, GROUPS).float()
        self.counts = torch.zeros(GROUPS).index_add_(0, groups, source.train_counts.float())
        self.optimizer = SAM(
            self.model.parameters(), torch.optim.SGD, rho=0.0, lr=RATE, momentum=0.9, weight_decay=5e-4
        )
        self.flat = self.optimizer.blocks[0].flat
        self.last = FreshGradients(self.flat, [self.model.classifier.weight], GROUPS)

    def losses(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Group losses and shares of a batch."""
        return group_losses(balanced_softmax(self.model(x), y, self.prior), self.table[y])

    def train(self, source: Source, steps: int) -> None:
        """Plain steps."""
        for x, y in itertools.islice(batches(source), steps):
            losses, shares = self.losses(x, y)
            (losses * shares).sum().backward()
            self.optimizer.second_step(zero_grad=True)

    def record(self, source: Source, steps: int) -> Iterator[dict[str, Tensor]]:
        """Steps whose gradient, sum_k w_k g_k, is put together from the group gradients; what is kept of each."""
        rows = torch.zeros(GROUPS, self.flat.size)
        views = [self.flat.views(row) for row in rows]
        for x, y in itertools.islice(batches(source), steps):
            losses, shares = self.losses(x, y)
            for k, loss in enumerate(losses):
                grads = torch.autograd.grad(loss, self.flat.params, retain_graph=k + 1 < GROUPS)
                torch._foreach_copy_(views[k], grads)
            matrix, theta_sq = gram_matrix(rows, self.flat.data, adaptive=True)
            yield {
                "matrix": matrix, "classifier": self.last.gram(rows, True), "theta_sq": theta_sq, "shares": shares.clone(),
            }  # fmt: skip
            for p, view in zip(self.flat.params, self.flat.views(shares @ rows), strict=True):
                p.grad = view
            self.optimizer.second_step(zero_grad=True)


def recorded(args: argparse.Namespace, folder: Path) -> Iterator[tuple[str, Records]]:
    """(sampler, records), from files if they are there, else made and saved every SAVE_EVERY steps."""
    start = time.process_time()
    for sampler, steps in zip(SAMPLERS, (args.steps, args.random_steps), strict=True):
        if steps < 2:
            continue
        path = folder / f"{args.model}-{sampler}-batch={args.batch}-warm={args.warm}-seed={args.seed}.pt"
        held = torch.load(path, weights_only=True) if path.exists() else {"matrix": []}
        if len(held["matrix"]) >= steps:
            yield sampler, held
            continue
        warm = pictures(args.data, "instance", args.batch, args.seed)
        run = Trajectory(warm, args.model, args.seed)
        run.train(warm, args.warm)
        kept = []
        for step in run.record(pictures(args.data, sampler, args.batch, args.seed), steps):
            kept.append(step)
            if len(kept) % SAVE_EVERY == 0 or len(kept) == steps:
                held = {name: torch.stack([k[name] for k in kept]) for name in step}
                held |= {"counts": run.counts, "n_elements": run.flat.numel}
                folder.mkdir(parents=True, exist_ok=True)
                torch.save(held, path)
                print(f"{sampler}: {len(kept)} steps, {time.process_time() - start:.0f} s of CPU", flush=True)
        yield sampler, held


def cosines(records: Records, every: int, ema: float, fresh: bool) -> Tensor:
    """Cosine of mode R's direction to the exact one at every step but the first, [steps - 1]; NaN: neither perturbs."""
    rule = Rule(groups="bank", direction="orthogonal", adaptive=True, rho=None, gram_every=2, gram_ema=ema)
    ascent = Ascent(rule, records["counts"], records["n_elements"], torch.device("cpu"))
    names = ("matrix", "theta_sq", "shares", "classifier")
    found = []
    for step, (matrix, theta_sq, shares, classifier) in enumerate(zip(*(records[n] for n in names), strict=True)):
        known = classifier if fresh else None
        if ascent.remembers:
            ascent.theta_sq.copy_(theta_sq)
            stale = ascent.stale_coefficients(shares, known)
            exact = ascent.coefficients(matrix, theta_sq, shares).double()
            found.append(ascent.cosine(stale, exact, matrix, known))
        if step % every == 0:
            ascent.refreshed(matrix, theta_sq, shares, known)
    return torch.stack(found)


def flops_vs_sgd(name: str, fresh: bool) -> dict[int, float]:
    """FLOPs of a GSA step over those of plain SGD, for every interval: counted on an exact and on a remembered step."""
    model = LongTailModel(*create_encoder(name, 3), 10)
    x, y = torch.randn(8, 3, 32, 32), torch.arange(8) % GROUPS
    table = torch.eye(10, GROUPS)
    params = [{"params": model.encoder.parameters()}, {"params": [model.classifier.weight], "classifier": fresh}]
    optimizer = GSA(params, torch.optim.SGD, [4, 3, 2, 1], gram_every=2, lr=0.0)

    def closure() -> tuple[Tensor, Tensor]:
        return group_losses(F.cross_entropy(model(x), y, reduction="none"), table[y])

    totals = []
    for call in (lambda: (closure()[0].sum()).backward(), *[lambda: optimizer.step(closure)] * 2):
        with FlopCounterMode(display=False) as flops:
            call()
        totals.append(flops.get_total_flops())
    plain, exact, stale = totals
    return {every: round((exact + (every - 1) * stale) / every / plain, 3) for every in INTERVALS}


def sweep(args: argparse.Namespace) -> None:
    """Train and record (or read the records), print and write a row for each cell."""
    flops = {kind: flops_vs_sgd(args.model, fresh) for kind, fresh in KINDS.items()}
    for sampler, records in recorded(args, Path(args.records)):
        absent = float((records["shares"] == 0).any(1).float().mean())
        print(f"{args.model}, {sampler}: {len(records['matrix'])} steps, {absent:.1%} of the batches lack a group")
        config = {"device": "cpu", "imbalance": IMBALANCE, "batch": args.batch, "lr": RATE, "warm_steps": args.warm, "seed": args.seed,
                  "data": Path(args.data).name, "batches_without_a_group": round(absent, 4)}  # fmt: skip
        for kind, every, ema in itertools.product(KINDS, INTERVALS, MEMORIES):
            found = cosines(records, every, ema, KINDS[kind])
            found = found[torch.isfinite(found)]
            figures = {
                "cosine_mean": float(found.mean()), "cosine_p10": float(found.quantile(0.1)),
                "cosine_worst": float(found.min()), "below_zero": float((found < 0).float().mean()),
                "flops_vs_sgd": flops[kind][every],
            }  # fmt: skip
            print(
                f"  {kind}, gram_every={every}, ema={ema}: " + " ".join(f"{v:.3f}" for v in figures.values()),
                flush=True,
            )
            case = f"gsa-full/{args.model}/G={GROUPS}/{kind}/gram_every={every}/ema={ema}/{sampler}"
            for metric, value in figures.items() if args.write else ():
                harness.append_row("optimizers", case, metric, round(value, 4), n=len(found), config=config)
