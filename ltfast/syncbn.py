"""BatchNorm over the batch of all ranks (`--sync-bn`).

    mean = sum_r sum x / n,   var = sum_r sum (x - mean)^2 / n,   n = sum_r n_r
with sums over ranks whose backward is the sum over ranks of the incoming gradients. torch.nn.SyncBatchNorm has the same
equations, but refuses CPU tensors and waits for the host once a layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ltfast.collectives import sum_over_ranks
from ltfast.dist import Ranks
from ltfast.errors import UserError


class SyncedBatchNorm(_BatchNorm):
    """BatchNorm1d or 2d whose training statistics are those of all ranks' batches together; see `synchronise`."""

    def _check_input_dim(self, x: Tensor) -> None:
        if x.dim() < 2:
            raise ValueError(f"BatchNorm input must have at least 2 dimensions, got {x.dim()}")

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, ...] -> the same shape."""
        y = self._normalised(x) if self.training else super().forward(x)
        part: Any = self
        return part.act(part.drop(y)) if _activates(self) else y

    def _normalised(self, x: Tensor) -> Tensor:
        self._check_input_dim(x)
        dims = [d for d in range(x.dim()) if d != 1]
        shape = [1, -1] + [1] * (x.dim() - 2)
        # Never in the dtype of x, which autocast makes a 16-bit one: fp16 ends at 65,504, bf16 counts to 256 exactly.
        count = x.new_full((1,), x.numel() / x.shape[1], dtype=torch.float32)
        sums = sum_over_ranks(torch.cat([x.float().sum(dims), count]))
        n = sums[-1].detach()
        mean = sums[:-1] / n
        centred = x.float() - mean.view(shape)
        variance = sum_over_ranks(centred.square().sum(dims)) / n
        self._remember(mean.detach(), variance.detach() * (n / (n - 1).clamp_min(1)))
        y = centred * torch.rsqrt(variance + self.eps).view(shape)
        if self.affine:
            y = y * self.weight.view(shape) + self.bias.view(shape)
        return y.to(x.dtype)

    @torch.no_grad()
    def _remember(self, mean: Tensor, variance: Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked += 1
        factor = torch.reciprocal(self.num_batches_tracked.float()) if self.momentum is None else self.momentum
        for running, new in ((self.running_mean, mean), (self.running_var, variance)):
            running.add_((new - running) * factor)


def _activates(part: nn.Module) -> bool:
    """True for timm's BatchNormAct2d, which drops and activates what it has normalised."""
    return hasattr(part, "act") and hasattr(part, "drop")


def synchronise(module: nn.Module, ranks: Ranks) -> None:
    """Make every BatchNorm take its training statistics over all ranks; parameters and buffers stay the same objects.

    Not those of a LongTailModel's `center_projection`, whose batch is not the pictures but the classes' weights, the same
    on every rank.

    Raises:
        UserError: a subclass of BatchNorm that does something of its own.
    """
    if ranks.world == 1:
        return
    centers = getattr(module, "center_projection", None)
    whole = set() if centers is None else set(centers.modules())
    for part in module.modules():
        if isinstance(part, _BatchNorm) and part not in whole:
            own = type(part).forward not in (_BatchNorm.forward, SyncedBatchNorm.forward, nn.SyncBatchNorm.forward)
            if own and not _activates(part):
                raise UserError(
                    f"--sync-bn: {type(part).__name__} of this --model is not known here; leave --sync-bn out"
                )
            part.__class__ = SyncedBatchNorm
