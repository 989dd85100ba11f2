"""BatchNorm over the batch of all ranks (`--sync-bn`).

On CUDA this is torch.nn.SyncBatchNorm. That class refuses CPU tensors, so for gloo runs the same equations stand here:
    mean = sum_r sum x / n,   var = sum_r sum (x - mean)^2 / n,   n = sum_r n_r
with sums over ranks whose backward is the sum over ranks of the incoming gradients.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ltfast.dist import Ranks

Net = TypeVar("Net", bound=nn.Module)


class SumOverRanks(torch.autograd.Function):
    """y = sum_r x_r on every rank; every rank's loss depends on every x, so gradients add up as well."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return ranks.sum_(x.clone())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.ranks.sum_(grad.contiguous().clone()), None


class SyncedBatchNorm(_BatchNorm):
    """BatchNorm1d or 2d whose training statistics are those of all ranks' batches together; see `synchronise`."""

    ranks: Ranks = Ranks()

    def _check_input_dim(self, x: Tensor) -> None:
        if x.dim() < 2:
            raise ValueError(f"BatchNorm input must have at least 2 dimensions, got {x.dim()}")

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, ...] -> the same shape."""
        if not self.training or self.ranks.world == 1:
            return super().forward(x)
        self._check_input_dim(x)
        dims = [d for d in range(x.dim()) if d != 1]
        shape = [1, -1] + [1] * (x.dim() - 2)
        count = x.new_full((1,), x.numel() / x.shape[1])
        sums = SumOverRanks.apply(torch.cat([x.float().sum(dims), count.float()]), self.ranks)
        n = sums[-1].detach()
        mean = sums[:-1] / n
        centred = x.float() - mean.view(shape)
        variance = SumOverRanks.apply(centred.square().sum(dims), self.ranks) / n
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


def synchronise(module: Net, ranks: Ranks, cuda: bool) -> Net:
    """`module` with every BatchNorm taking its training statistics over all ranks; parameters and buffers stay the same
    objects with the same names. Returns the module to use."""
    if ranks.world == 1:
        return module
    if cuda:
        converted: Net = nn.SyncBatchNorm.convert_sync_batchnorm(module)
        return converted
    bound = type("SyncedBatchNorm", (SyncedBatchNorm,), {"ranks": ranks})
    for part in module.modules():
        if isinstance(part, _BatchNorm):
            part.__class__ = bound
    return module
