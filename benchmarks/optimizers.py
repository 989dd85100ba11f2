"""The optimizers: counted cost of a step beside other people's, and how good mode R's direction is on real pictures.

    python benchmarks/optimizers.py counted [--peer davda54=/tmp/sam.py] [--model resnet50] [--write]
    python benchmarks/optimizers.py tables
    python benchmarks/optimizers.py sweep --data CIFAR10_PICTURES [--model resnet20] [--steps 500] [--write]

`counted` needs no GPU: a step on the parameters of a network, with gradients that cost nothing, split into what the
optimizer launches and moves itself and what gets the gradients to where it wants them (zeroing, gathering, autograd's
additions); plus waits of the host and memory held between steps beyond the parameters.

`sweep` (benchmarks/direction.py) trains on CIFAR-10-LT and computes, for every refresh interval and memory (EMA), the cosine
between the direction mode R would take and the exact one: mean, 10th percentile, worst. FLOPs are counted, not assumed.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import direction
import harness
import op_bench
import optimizer_tables
import peers
import torch
from torch import Tensor, nn

from ltfast.kernels import counting
from ltfast.models import create_encoder
from ltfast.optim import GSA, SAM

PERIOD = 16  # steps between renewals of mode R
LINE = "{:34s} {:>8s} {:>7s} {:>11s} {:>10s} {:>6s} {:>6s} {:>7s}"


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


class Passes(peers.Losses):
    """Losses that count forward and backward passes."""

    forwards = backwards = 0

    def __call__(self, k: int = 0) -> Tensor:
        return self._watched(super().__call__(k))

    def groups(self) -> tuple[Tensor, Tensor]:
        losses, shares = super().groups()
        return self._watched(losses), shares

    def _watched(self, loss: Tensor) -> Tensor:
        self.forwards += 1
        loss.register_hook(self._backward)
        return loss

    def _backward(self, gradient: Tensor) -> None:
        self.backwards += 1


def count(make: peers.Make, model: str, period: int = 2) -> dict[str, float]:
    """Figures of one step in the steady state; FLOPs over a period of mode R, a backward pass being two forward ones."""
    torch.manual_seed(0)
    params = list(create_encoder(model, 3)[0].parameters())
    n, losses = sum(p.numel() for p in params), Passes(params)
    before = peers.live_bytes()
    step = make(params, losses)
    step()
    losses.forwards = losses.backwards = 0
    for _ in range(period):
        step()
    flops = (losses.forwards + 2 * losses.backwards) / 3 / period
    with counting() as own, op_bench.DispatchCounter() as other, peers.Waits() as waits:
        step()
    held = (peers.live_bytes() - before) / (4 * n)
    return {
        "kernels": own.kernels, "passes": round(own.passes, 2), "other_kernels": other.kernels,
        "other_passes": round(other.elements / n, 2), "flops_vs_sgd": round(flops, 3),
        "syncs_per_step": sum(waits.found.values()), "extra_memory_per_parameter": round(held, 2),
    }  # fmt: skip


def counted(args: argparse.Namespace) -> None:
    """Print the table, append rows with --write."""
    paths = peers.paths_of(args.peer)
    print(LINE.format(args.model, "kernels", "passes", "+ kernels", "+ passes", "FLOPs", "waits", "memory"))
    for name, make in contenders(paths):
        figures = count(make, args.model, PERIOD if f"gram_every={PERIOD}" in name else 2)
        print(LINE.format(name, *(str(v) for v in figures.values())), flush=True)
        for metric, value in figures.items() if args.write else ():
            harness.append_row(
                "optimizers", f"{name}/{args.model}", metric, value, config={"device": "cpu", "groups": peers.GROUPS}
            )


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
    pictures_.add_argument("--model", default="resnet20")
    pictures_.add_argument("--batch", type=int, default=128)
    pictures_.add_argument("--warm", type=int, default=300, help="steps before recording")
    pictures_.add_argument("--steps", type=int, default=500, help="recorded steps with stratified batches")
    pictures_.add_argument(
        "--random-steps", type=int, default=500, help="recorded steps with random batches after them"
    )
    pictures_.add_argument(
        "--records", default="runs/direction", help="folder of the Gram matrices, reused if complete"
    )
    pictures_.add_argument("--seed", type=int, default=0)
    pictures_.set_defaults(run=direction.sweep)
    commands.add_parser(
        "tables", help="fill docs/optimizers.md (and README.md, where it has the markers) from the rows"
    ).set_defaults(run=lambda _: optimizer_tables.fill_documents())
    for command in (table, pictures_):
        command.add_argument("--write", action="store_true", help="append rows to benchmarks/results/optimizers.jsonl")
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
