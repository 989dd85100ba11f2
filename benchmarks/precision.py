"""How much of a perturbation survives a working copy of fewer bits, on a trained ResNet-20 and real group gradients.

    python benchmarks/precision.py                                             # digits-lt
    python benchmarks/precision.py --dataset cifar10-lt --data-dir PACK.npz    # real pictures

Intended: eps = s^2 sum_j c_j g_j in float64. Effective: q(theta + eps) - q(theta), q the rounding of what the network
multiplies with. Rows for each rule and rounding: cosine and norm ratio of effective to intended, share of the elements
that do not move at all, and the rise of the loss along the effective over that along the intended perturbation, both
evaluated in fp32 so that only the perturbation differs.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import NamedTuple

import harness
import torch
from torch import Tensor

from ltfast.data.base import Batch
from ltfast.dist import Ranks
from ltfast.kernels import ascent_coefficients, gram
from ltfast.losses import group_losses
from ltfast.preserve import group_by_frequency
from ltfast.progress import Progress
from ltfast.recipes import build_config
from ltfast.train import Trainer

TF32_DROPPED = 13  # low bits of fp32's mantissa that TF32 has not
GROUPS = 4
# name -> arguments of the coefficients; SAM's radius is the usual .05, GSA's are the paper's and ten times the paper's.
RULES: dict[str, dict[str, object]] = {
    "sam,rho=0.05": {"direction": "joint", "rho": 0.05},
    "asam,rho=0.5": {"direction": "joint", "rho": 0.5},
    "gsa,radius=x1": {"direction": "orthogonal", "rho_min": 2e-3, "rho_max": 3e-3},
    "gsa,radius=x10": {"direction": "orthogonal", "rho_min": 2e-2, "rho_max": 3e-2},
}


class Setting(NamedTuple):
    """A trained network at one batch: parameters, group gradients and what the rules need of the batch."""

    trainer: Trainer
    batch: Batch
    rows_GN: Tensor
    shares_G: Tensor
    counts_G: Tensor
    weights_N: Tensor  # 1 where autocast rounds (matrices and filters), 0 where it keeps fp32 (BatchNorm)


def round_tf32(x: Tensor) -> Tensor:
    """Nearest TF32 number, ties away from zero, as tensor cores are fed."""
    half = 1 << (TF32_DROPPED - 1)
    return ((x.view(torch.int32) + half) & -(1 << TF32_DROPPED)).view(torch.float32)


def working_copy(dtype: torch.dtype) -> Callable[[Tensor, Tensor], Tensor]:
    """Rounding of all parameters to `dtype`."""
    return lambda x, weights: x.to(dtype).float()


def autocast(rounding: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """Rounding of filters and matrices only."""
    return lambda x, weights: torch.where(weights > 0, rounding(x), x)


ROUNDINGS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "fp32": lambda x, weights: x,
    "tf32": autocast(round_tf32),
    "fp16 working copy": working_copy(torch.float16),
    "fp16 autocast": autocast(lambda x: x.half().float()),
    "bf16 working copy": working_copy(torch.bfloat16),
    "bf16 autocast": autocast(lambda x: x.bfloat16().float()),
}


def prepare(dataset: str, data_dir: str | None, epochs: int, seed: int, limit: int) -> Setting:
    """Train `epochs` of BCL, then take the next batch's group gradients (classes grouped by size)."""
    flags = {
        "model": "resnet20", "epochs": epochs, "seed": seed, "device": "cpu", "compile": "off", "warmup": 1.0,
        "batch": 128, "limit_train": limit, "data_dir": data_dir, "schedule": "constant", "lr": 0.05,
    }  # fmt: skip
    trainer = Trainer(build_config(dataset, "bcl", {}, flags), None, Ranks(), Progress())
    trainer.fit()
    source, model = trainer.source, trainer.model
    batch = next(iter(source.train(epochs)))
    table = group_by_frequency(source.train_counts, GROUPS)
    membership = torch.nn.functional.one_hot(table[batch.labels], GROUPS).float()
    model.train()
    losses, shares = group_losses(trainer.objective.classification(model(batch.views[0]), batch.labels), membership)
    rows = [
        trainer.flat.flatten(torch.autograd.grad(loss, trainer.flat.params, retain_graph=True, allow_unused=True))
        for loss in losses
    ]
    counts = torch.zeros(GROUPS).index_add_(0, table, source.train_counts.float())
    weights = trainer.flat.flatten([torch.full_like(p, float(p.ndim > 1)) for p in trainer.flat.params])
    return Setting(trainer, batch, torch.stack(rows), shares.detach(), counts, weights)


def intended(setting: Setting, rule: dict[str, object]) -> Tensor:
    """eps [N] float64 of a rule on this batch; adaptive wherever the method is."""
    theta, adaptive = setting.trainer.flat.data, rule.get("rho") != 0.05
    matrix, theta_sq = gram(setting.rows_GN, theta, adaptive)
    coef, _ = ascent_coefficients(
        matrix, theta_sq, setting.shares_G, setting.counts_G, setting.trainer.flat.numel, **rule
    )  # type: ignore[arg-type]
    scale = theta.double() ** 2 if adaptive else torch.ones_like(theta, dtype=torch.float64)
    return scale * (coef.double() @ setting.rows_GN.double())


@torch.no_grad()
def loss_at(setting: Setting, theta: Tensor) -> float:
    """Mean loss of the batch with parameters `theta` [N], training-mode statistics, fp32; parameters are put back."""
    trainer, kept = setting.trainer, setting.trainer.flat.data.clone()
    trainer.buffers.save()
    trainer.flat.data.copy_(theta)
    value = trainer.objective.classification(trainer.model(setting.batch.views[0]), setting.batch.labels).mean()
    trainer.flat.data.copy_(kept)
    trainer.buffers.restore()
    return float(value)


def compare(setting: Setting, eps: Tensor, rounding: Callable[[Tensor, Tensor], Tensor]) -> dict[str, float]:
    """The figures of one rounding."""
    theta, weights = setting.trainer.flat.data, setting.weights_N
    climbed = (theta.double() + eps).float()
    effective = (rounding(climbed, weights) - rounding(theta, weights)).double()
    moved, base = eps != 0, loss_at(setting, theta)
    return {
        "cosine": float(torch.nn.functional.cosine_similarity(effective, eps, dim=0)),
        "norm_ratio": float(effective.norm() / eps.norm()),
        "unmoved": float(((effective == 0) & moved).sum() / moved.sum()),
        "rise_ratio": (loss_at(setting, (theta + effective).float()) - base) / (loss_at(setting, climbed) - base),
        "relative_size": float((eps[moved].abs() / theta[moved].abs().clamp_min(1e-12)).median()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="digits-lt")
    parser.add_argument("--data-dir")
    parser.add_argument("--epochs", type=int, default=5, help="of training before the measurement")
    parser.add_argument("--limit-train", type=int, default=0, help="keep this many training images; 0 = all")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    args = parser.parse_args()
    for seed in args.seeds:
        setting = prepare(args.dataset, args.data_dir, args.epochs, seed, args.limit_train)
        config = {"dataset": args.dataset, "epochs": args.epochs, "limit_train": args.limit_train, "groups": GROUPS}
        for rule, values in RULES.items():
            eps = intended(setting, values)
            for name, rounding in ROUNDINGS.items():
                figures = compare(setting, eps, rounding)
                print(f"{rule:16s} {name:18s} seed {seed}", {k: round(v, 4) for k, v in figures.items()}, flush=True)
                for metric, value in figures.items():
                    case = f"{args.dataset}/{rule}/resnet20/{name}/seed={seed}"
                    harness.append_row("precision", case, metric, round(value, 6), config=config)


if __name__ == "__main__":
    main()
