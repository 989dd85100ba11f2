"""The optimizers: counted cost of a step beside other people's, and how good mode R's direction is on real pictures.

    python benchmarks/optimizers.py counted [--peer davda54=/tmp/sam.py] [--model resnet50] [--write]
    python benchmarks/optimizers.py sweep --data CIFAR10_PICTURES [--steps 500] [--write]

`counted` needs no GPU: a step on the parameters of a network, with gradients that cost nothing, split into what the
optimizer launches and moves itself and what gets the gradients to where it wants them (zeroing, gathering, autograd's
additions); plus waits of the host and memory kept beyond parameters, gradient and momentum.

`sweep` trains ResNet-20 on CIFAR-10-LT (imbalance 100, four groups by class size) for a while by plain SGD, then keeps the
exact [G, G] Gram matrix of every further step. From those it computes, for every refresh interval and memory (EMA), the
cosine between the direction mode R would take and the exact one, each step's shares known: mean, 10th percentile, worst.
FLOPs are counted, not assumed.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import harness
import op_bench
import peers
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ltfast.data import Source, load
from ltfast.kernels import counting
from ltfast.kernels import gram as gram_matrix
from ltfast.losses import balanced_softmax, group_losses, log_prior
from ltfast.models import LongTailModel, create_encoder
from ltfast.optim import GSA, SAM
from ltfast.optim.ascent import Ascent
from ltfast.optim.rules import Rule
from ltfast.preserve.grouping import group_by_frequency

GROUPS = 4
INTERVALS, MEMORIES = (1, 4, 16, 32, 64), (0.0, 0.5, 0.8)
MODEL, BATCH, IMBALANCE, RATE = "resnet20", 128, 100.0, 0.1
LINE = "{:34s} {:>8s} {:>7s} {:>11s} {:>10s} {:>6s} {:>7s}"


# -- counted cost ------------------------------------------------------------------------------------------------------------


def in_place(params: list[nn.Parameter], losses: peers.Losses) -> peers.Step:
    """SAM with gradients added up in the flat buffer by autograd instead of handed over and gathered."""
    optimizer = SAM(params, torch.optim.SGD, rho=0.05, **peers.BASE)

    def step() -> None:
        for take in (optimizer.first_step, optimizer.second_step):
            losses(0).backward()
            take()
            optimizer.zero_grad(set_to_none=False)

    return step


def with_anchor(params: list[nn.Parameter], losses: peers.Losses) -> peers.Step:
    """GSA in mode E with GKP's anchor in the update."""
    optimizer = GSA(params, torch.optim.SGD, peers.COUNTS, **peers.BASE)
    optimizer.set_anchor([torch.ones_like(p) for p in params], [p.detach() for p in params], 0.1)
    return lambda: optimizer.step(losses.groups)


def contenders(paths: dict[str, Path]) -> Iterator[tuple[str, peers.Make]]:
    """(name, maker) of everything that is counted."""
    for name, make, _ in peers.ours():
        yield name, make
    yield "ltfast/sam, added in place", in_place
    yield "ltfast/gsa,gram_every=1,anchor", with_anchor
    for name, make, _ in peers.peers(paths):
        yield name, make


def count(make: peers.Make, model: str) -> dict[str, float]:
    """Figures of one step in the steady state."""
    torch.manual_seed(0)
    params = list(create_encoder(model, 3)[0].parameters())
    n, losses = sum(p.numel() for p in params), peers.Losses(params)
    before = peers.live_bytes()
    step = make(params, losses)
    for _ in range(17):
        step()
    with counting() as own, op_bench._DispatchCounter() as other, peers.Waits() as waits:
        step()
    held = (peers.live_bytes() - before) / (4 * n)
    return {
        "kernels": own.kernels, "passes": round(own.passes, 2), "other_kernels": other.kernels,
        "other_passes": round(other.elements / n, 2), "syncs_per_step": sum(waits.found.values()),
        "extra_memory_per_parameter": round(held, 2),
    }  # fmt: skip


def counted(args: argparse.Namespace) -> None:
    """Print the table, append rows with --write."""
    paths = {name: Path(path) for name, _, path in (peer.partition("=") for peer in args.peer)}
    print(LINE.format(args.model, "kernels", "passes", "+ kernels", "+ passes", "waits", "memory"))
    for name, make in contenders(paths):
        figures = count(make, args.model)
        print(LINE.format(name, *(str(v) for v in figures.values())), flush=True)
        for metric, value in figures.items() if args.write else ():
            harness.append_row("optimizers", f"{name}/{args.model}", metric, value, config={"groups": peers.GROUPS})


# -- mode R on real pictures -------------------------------------------------------------------------------------------------


class Record(NamedTuple):
    """One step of the trajectory: exact Gram matrix [G, G] float64, |theta|^2, batch shares [G]."""

    matrix: Tensor
    theta_sq: Tensor
    shares: Tensor


def pictures(data: str, sampler: str, seed: int) -> Source:
    """CIFAR-10-LT in batches drawn by `sampler`."""
    source = load(
        "cifar10-lt", data_dir=data, imbalance=IMBALANCE, batch=BATCH, num_views=1, sampler=sampler, seed=seed
    )
    source.set_groups(group_by_frequency(source.train_counts, GROUPS))
    return source


def batches(source: Source) -> Iterator[tuple[Tensor, Tensor]]:
    """Training batches without end."""
    for epoch in itertools.count():
        for batch in source.train(epoch):
            yield batch.views[0].contiguous(memory_format=torch.channels_last), batch.labels


class Trajectory:
    """ResNet-20 trained by momentum SGD, each step's group gradients kept as their Gram matrix."""

    def __init__(self, source: Source, seed: int) -> None:
        torch.manual_seed(seed)
        encoder, dim = create_encoder(MODEL, 3)
        self.model = LongTailModel(encoder, dim, source.num_classes).to(memory_format=torch.channels_last)
        self.counts = source.train_counts
        self.prior = log_prior(self.counts)
        groups = group_by_frequency(self.counts, GROUPS)
        self.table = F.one_hot(groups, GROUPS).float()
        self.group_counts = torch.zeros(GROUPS).index_add_(0, groups, self.counts.float())
        self.optimizer = SAM(
            self.model.parameters(), torch.optim.SGD, rho=0.0, lr=RATE, momentum=0.9, weight_decay=5e-4
        )
        self.flat = self.optimizer.blocks[0].flat

    def losses(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Group losses and shares of a batch."""
        return group_losses(balanced_softmax(self.model(x), y, self.prior), self.table[y])

    def train(self, source: Source, steps: int) -> None:
        """Plain steps."""
        for x, y in itertools.islice(batches(source), steps):
            losses, shares = self.losses(x, y)
            (losses * shares).sum().backward()
            self.optimizer.second_step(zero_grad=True)

    def record(self, source: Source, steps: int) -> list[Record]:
        """Steps whose gradient, sum_k w_k g_k, is put together from the group gradients."""
        records = []
        rows = torch.zeros(GROUPS, self.flat.size)
        views = [self.flat.views(row) for row in rows]
        for x, y in itertools.islice(batches(source), steps):
            losses, shares = self.losses(x, y)
            for k, loss in enumerate(losses):
                grads = torch.autograd.grad(loss, self.flat.params, retain_graph=k + 1 < GROUPS)
                torch._foreach_copy_(views[k], grads)
            records.append(Record(*gram_matrix(rows, self.flat.data, adaptive=True), shares.detach().clone()))
            for p, view in zip(self.flat.params, self.flat.views(shares @ rows), strict=True):
                p.grad = view
            self.optimizer.second_step(zero_grad=True)
        return records


def cosines(records: list[Record], counts: Tensor, n_elements: int, every: int, ema: float) -> Tensor:
    """Cosine of mode R's direction to the exact one at every step but the first, [steps - 1].

    The memory is as old as it can be: at a refresh, too, the direction is that of before the refresh.
    """
    ascent = Ascent(Rule(groups="bank", direction="orthogonal", adaptive=True, rho=None, gram_every=2, gram_ema=ema), counts,
                    n_elements, torch.device("cpu"))  # fmt: skip
    found = []
    for step, (matrix, theta_sq, shares) in enumerate(records):
        if ascent.remembers:
            stale = ascent.stale_coefficients(shares)[0].double()
            exact = ascent.coefficients(matrix, theta_sq, shares).double()
            lengths = (stale @ matrix @ stale) * (exact @ matrix @ exact)
            found.append((stale @ matrix @ exact) / lengths.clamp_min(1e-300).sqrt())
        if step % every == 0:
            ascent.refreshed(matrix, theta_sq, shares)
        ascent.theta_sq.copy_(theta_sq)
    return torch.stack(found)


def flops_vs_sgd() -> dict[int, float]:
    """FLOPs of a GSA step over those of plain SGD, for every interval: counted on an exact and on a remembered step."""
    model = LongTailModel(*create_encoder(MODEL, 3), 10)
    x, y = torch.randn(8, 3, 32, 32, requires_grad=False), torch.arange(8) % GROUPS
    table = torch.eye(10, GROUPS)
    optimizer = GSA(model.parameters(), torch.optim.SGD, [4, 3, 2, 1], gram_every=2, lr=0.0)

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
    """Train, record, print and write a row for each cell."""
    flops = flops_vs_sgd()
    print("FLOPs of a step over SGD's:", flops, flush=True)
    start = time.process_time()
    sources = {sampler: pictures(args.data, sampler, args.seed) for sampler in ("group-stratified", "instance")}
    run = Trajectory(sources["instance"], args.seed)
    run.train(sources["instance"], args.warm)
    for (sampler, source), steps in zip(sources.items(), (args.steps, args.random_steps), strict=True):
        records = run.record(source, steps)
        absent = sum(bool((r.shares == 0).any()) for r in records) / max(len(records), 1)
        print(f"{sampler}: {steps} steps, {time.process_time() - start:.0f} s of CPU so far, "
              f"{absent:.1%} of the batches lack a group", flush=True)  # fmt: skip
        for every, ema in itertools.product(INTERVALS, MEMORIES):
            found = cosines(records, run.group_counts, run.flat.numel, every, ema)
            figures = {
                "cosine_mean": float(found.mean()), "cosine_p10": float(found.quantile(0.1)),
                "cosine_worst": float(found.min()), "flops_vs_sgd": flops[every],
            }  # fmt: skip
            print(f"  gram_every={every:2d} ema={ema}: " + " ".join(f"{v:.3f}" for v in figures.values()), flush=True)
            config = {"imbalance": IMBALANCE, "batch": BATCH, "lr": RATE, "warm_steps": args.warm, "seed": args.seed,
                      "data": Path(args.data).name, "batches_without_a_group": absent}  # fmt: skip
            case = f"gsa-full/{MODEL}/G={GROUPS}/gram_every={every}/ema={ema}/{sampler}"
            for metric, value in figures.items() if args.write else ():
                harness.append_row("optimizers", case, metric, round(value, 4), n=len(found), config=config)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    table = commands.add_parser("counted", help="kernels, passes, waits and memory of a step")
    table.add_argument("--peer", action="append", default=[], metavar="NAME=PATH", help="davda54, fsam or release")
    table.add_argument("--model", default="resnet50")
    table.set_defaults(run=counted)
    pictures_ = commands.add_parser("sweep", help="mode R's direction on CIFAR-10-LT")
    pictures_.add_argument("--data", required=True, help="CIFAR-10: torchvision's folder, class folders, or a pack")
    pictures_.add_argument("--warm", type=int, default=100, help="steps before recording")
    pictures_.add_argument("--steps", type=int, default=500, help="recorded steps with stratified batches")
    pictures_.add_argument(
        "--random-steps", type=int, default=150, help="recorded steps with random batches after them"
    )
    pictures_.add_argument("--seed", type=int, default=0)
    pictures_.set_defaults(run=sweep)
    for command in (table, pictures_):
        command.add_argument("--write", action="store_true", help="append rows to benchmarks/results/optimizers.jsonl")
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
