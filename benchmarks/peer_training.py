"""A whole training by the authors' released code, to see what accuracy it reaches: `ablation.py --sweeps release --release PATH`.

    python benchmarks/peer_training.py --release GKP-GSA --data-dir HALF.npz       # first steps beside ours

Theirs are the training function with its losses, its optimizer and its defaults: one group of classes, whose anchor has no
part in the loss, alpha from .9 to .8. Ours are the pictures, their order and views, the network and its first weights, the
learning rate and the evaluation of the last weights (the release reports the best epoch on the test set). Called as a
script it takes the same steps by `--method gsa-release --groups 1` and prints how far the two networks are apart; SiLU stands
for ReLU there, since a sum that rounds to either side of 0 would make two networks of one.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import harness
import peer_code
import peer_tables
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

from ltfast import build
from ltfast.config import Config
from ltfast.data.base import Batch
from ltfast.dist import Ranks
from ltfast.evaluate import evaluate
from ltfast.flat import FlatBuffers, FlatParameters
from ltfast.models import LongTailModel
from ltfast.recipes import rule_of
from ltfast.schedule import alpha_at, lr_at
from ltfast.step import TrainStep
from ltfast.update import Update

STEPS = 10  # taken beside ours


class Outputs(nn.Module):
    """Our network with the outputs of the release's: pictures [3B, ...] -> (z [3B, P], logits [3B, C], centres [C, P]).

    Args:
        contrasted: True: the projection's BatchNorm sees views 2 and 3 only, as in our steps, and z of view 1, which no loss
            reads, is 0; False: all three, as in the release.
    """

    def __init__(self, model: LongTailModel, contrasted: bool) -> None:
        super().__init__()
        self.model, self.contrasted = model, contrasted

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        features = self.model.features(x)
        first = len(x) // 3 if self.contrasted else 0
        z = self.model.project(features[first:])
        z = torch.cat([z.new_zeros(first, z.shape[1]), z])
        return z, self.model.logits(features), self.model.centers()


class Loader:
    """Batches as the release's loader gives them; sets the learning rate of each."""

    def __init__(self, batches: Iterator[tuple[float, Batch]], sgd: torch.optim.SGD) -> None:
        self.batches, self.sgd = batches, sgd

    def __len__(self) -> int:
        return 1  # asked for a line of progress

    def __iter__(self) -> Iterator[tuple[list[Tensor], Tensor]]:
        for lr, batch in self.batches:
            self.sgd.param_groups[0]["lr"] = lr
            yield list(batch.views), batch.labels


@contextlib.contextmanager
def smooth() -> Iterator[None]:
    """Inside, ReLU is SiLU."""

    def silu(x: Tensor, inplace: bool = False) -> Tensor:
        return F.silu(x)

    with patch.object(F, "relu", silu):  # nn.ReLU calls it, too
        yield


def parts(config: Config) -> tuple[Any, LongTailModel, torch.device]:
    """(data, network in training mode, device) of a config, as its trainer has them."""
    device = build.build_device(config, Ranks())
    source = build.build_data(config, device, Ranks())
    return source, build.build_model(config, source.input_shape, source.num_classes).to(device).train(), device


def prepared(
    path: Path, config: Config, model: LongTailModel, source: Any, contrasted: bool = False
) -> Callable[[Iterator[tuple[float, Batch]], float], None]:
    """The released train() on our network, one group: trains on (learning rate, batch) pairs with an alpha."""
    network, counts = Outputs(model, contrasted), source.train_counts.tolist()
    optim, loss = config.optim, config.loss
    sgd = torch.optim.SGD(network.parameters(), lr=optim.lr, momentum=optim.momentum, weight_decay=optim.weight_decay)
    released = peer_code.Released(path, next(model.parameters()).device)
    alone = {0: {"fim": {}, "theta_star": {}, "n_j": sum(counts)}}  # only its size is read
    released.prepare(
        network,
        sgd,
        counts,
        [list(range(len(counts)))],
        alone,
        a_ce=loss.a_ce,
        a_scl=loss.a_scl,
        temperature=loss.temperature,
    )
    return lambda batches, alpha: released.train(Loader(batches, sgd), alpha)


def run(path: Path, config: Config) -> dict[str, Any]:
    """Test figures of the last weights after a training by `config`'s data, loss, schedule and seed."""
    source, model, device = parts(config)
    train, total = prepared(path, config, model, source), source.steps_per_epoch

    def batches(epoch: int) -> Iterator[tuple[float, Batch]]:
        for k, batch in enumerate(source.train(epoch, 0)):
            yield lr_at(config.optim, epoch + k / total), batch

    for epoch in range(config.optim.epochs):
        model.train()
        train(batches(epoch), alpha_at(config.preserve, epoch / config.optim.epochs))
    return evaluate(model, source, "test", device, Ranks())


def apart(path: Path, config: Config, steps: int) -> Iterator[float]:
    """After each of the first steps: distance of the released code's parameters and ours, over the norm of ours."""
    source, theirs, device = parts(config)
    ours, objective = copy.deepcopy(theirs), build.build_objective(config, source.train_counts.to(device))
    train = prepared(path, config, theirs, source, contrasted=True)
    flat = FlatParameters(ours.parameters())
    update = Update(flat, momentum=config.optim.momentum, weight_decay=config.optim.weight_decay)
    rule = rule_of(config)
    member = build.build_membership(config, rule, source.train_counts, None)
    step = TrainStep(ours, objective, flat, FlatBuffers(ours), update, rule, member)
    for k, batch in zip(range(steps), source.train(0, 0), strict=False):
        lr = lr_at(config.optim, k / source.steps_per_epoch)
        update.lr.fill_(lr)
        with smooth():
            train(iter([(lr, batch)]), 1.0)
            step(batch)
        a, b = (parameters_to_vector(network.parameters()).detach().double() for network in (theirs, ours))
        yield float((a - b).norm() / b.norm())


def main() -> None:
    """Print a line a step, append rows with --write."""
    import ablation

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--release", type=Path, required=True, metavar="PATH", help="folder of the released code")
    parser.add_argument("--dataset", default="cifar10-half")
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", action="store_true", help="append rows to benchmarks/results/peers.jsonl")
    args = parser.parse_args()
    config = ablation.configured(
        args.dataset, "gsa-release", {"groups": 1, "data_dir": args.data_dir, "seed": args.seed}
    )
    value = 0.0
    for k, value in enumerate(apart(args.release, config, STEPS), 1):
        print(f"after {k} steps {value:.2g} apart", flush=True)
    if args.write:
        about = {"model": config.model.model, "seed": args.seed, "steps": STEPS}
        harness.append_row("peers", f"{peer_tables.SAME}{args.dataset}", "apart", float(f"{value:.3g}"), config=about)


if __name__ == "__main__":
    main()
