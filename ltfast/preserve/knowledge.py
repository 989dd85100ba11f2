"""From the memory bank's groups to the one anchor of GKP: theta*_j, its Fisher F_j, and their collapse."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ltfast.data.base import Source
from ltfast.dist import Ranks
from ltfast.flat import FlatParameters
from ltfast.models import LongTailModel
from ltfast.modes import untuned
from ltfast.preserve.anchor import Anchor, stream_anchor
from ltfast.preserve.bank import MemoryBank
from ltfast.preserve.fisher import fisher_sums, reestimate_batchnorm, sample_indices, swapped_parameters

PREFIX = "encoder."


def collapse_knowledge(
    model: LongTailModel,
    flat: FlatParameters,
    source: Source,
    bank: MemoryBank,
    groups: Tensor,
    sizes: Tensor,
    loss: Callable[[Tensor, Tensor], Tensor],
    *,
    fisher: str = "per-sample",
    budget: int = 512,
    seed: int = 0,
    ranks: Ranks | None = None,
) -> Anchor:
    """The collapsed anchor of all groups over the encoder's slice of `flat`; one group's Fisher is held at a time.

    Args:
        bank: rank 0's must hold its weights; the others receive the means from it.
        groups, sizes: group of each class [C] and |G^j| [G] (see `group_sizes`).
        loss: (logits [B, C], labels [B]) -> -log p(y|x) of each sample [B].
        fisher: "per-sample" or "batch". budget: images per group for F_j, and for BatchNorm.
    """
    ranks = ranks or Ranks()
    span = flat.span(model.encoder.parameters())
    names = [PREFIX + name for name, _ in model.encoder.named_parameters()]
    means: list[Tensor] | Tensor = [torch.empty(bank.dimension)] * len(sizes)
    if bank.holds:
        means = bank.group_means(groups, len(sizes))
    everything = torch.zeros_like(groups)
    calibration = sample_indices(everything, source.train_labels, 0, max(budget, 2 * ranks.world), seed)
    share = -(-len(calibration) // ranks.world)
    calibration = calibration.repeat(ranks.world)[: share * ranks.world]  # equal shares
    # Batches as equal as they go: each weighs the same in BatchNorm's statistics, and one picture alone may have none.
    size = -(-share // -(-share // source.eval_batch))

    def flatten(gradients: Mapping[str, Tensor]) -> Tensor:
        parts = {p: gradients[n] for n, p in model.named_parameters() if n in gradients}
        return flat.flatten([parts.get(p) for p in flat.params])[span]

    def pairs() -> Iterator[tuple[Tensor, Tensor]]:
        for j, mean in enumerate(means):
            theta_star = ranks.broadcast_(mean.to(flat.device, copy=True))
            chosen = sample_indices(groups, source.train_labels, j, budget, seed)
            images = (batch.views[0] for batch in source.evaluate("train", calibration, size))
            with untuned(), swapped_parameters(flat.data[span], theta_star), reestimate_batchnorm(model, images):
                batches = ((batch.views[0], batch.labels) for batch in source.evaluate("train", chosen))
                agree_on_statistics(model, ranks)
                sums, seen = fisher_sums(model, names, batches, loss, mode=fisher, flatten=flatten)
            total = ranks.sum_(torch.tensor([float(seen)], dtype=torch.float64, device=sums.device))
            yield theta_star, (ranks.sum_(sums) / total).float()

    return stream_anchor(pairs(), sizes)


@torch.no_grad()
def agree_on_statistics(model: nn.Module, ranks: Ranks) -> None:
    """BatchNorm statistics of equal shares of images, merged over the ranks: mean of means, mean of variances plus
    variance of means. Exact for the first layer; deeper ones have seen inputs normalised by their own rank's share."""
    if ranks.world == 1:
        return
    for module in model.modules():
        if isinstance(module, _BatchNorm) and module.running_mean is not None and module.running_var is not None:
            own = module.running_mean.clone()
            ranks.mean_(module.running_mean)
            module.running_var += (own - module.running_mean).square()
            ranks.mean_(module.running_var)
