"""Per-sample base losses, and their split into group losses.

Shapes: B batch, C classes, G groups, P projection width. Every loss returns one value per sample, [B], so that groups
are weighted means of them. All arithmetic is float32 or wider, also under bf16 autocast; the losses and group_losses
never make the host wait.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ltfast.models.heads import full_precision

IMBSAM_ETA = 20  # ImbSAM's released default: the field's "few" classes
FOCAL_GAMMA = 1.0  # Focal-SAM's released defaults
FOCAL_SHARPNESS = 0.5
MEMBERSHIPS = ("single", "groups", "classes", "head-tail", "focal")


def cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """-log softmax(logits)[label]: [B, C], [B] -> [B]."""
    return F.cross_entropy(full_precision(logits), labels, reduction="none", label_smoothing=label_smoothing)


def log_prior(counts: Tensor | Sequence[float]) -> Tensor:
    """log(n_c / sum n), float32 [C], from the training counts [C]. ValueError if a class has no image."""
    counts = torch.as_tensor(counts).double()
    if counts.ndim != 1 or not len(counts) or not bool(((counts > 0) & counts.isfinite()).all()):
        raise ValueError("counts: every class needs at least one training image (one-dimensional, all > 0)")
    return (counts / counts.sum()).log().float()


def balanced_softmax(logits: Tensor, labels: Tensor, log_prior: Tensor, tau: float = 1.0) -> Tensor:
    """Cross entropy of logits + tau * log prior: [B, C], [B], [C] -> [B].

    tau = 1 is balanced softmax (Ren et al. 2020) and BCL's logit-compensated branch; any tau is the logit-adjusted
    loss (Menon et al. 2021). ValueError unless the prior (of `log_prior(counts)`) has one entry per class.
    """
    if log_prior.shape != logits.shape[-1:]:
        raise ValueError(f"log_prior: shape {tuple(log_prior.shape)} must be [{logits.shape[-1]}], one for each class")
    logits = full_precision(logits)
    return cross_entropy(logits + tau * log_prior.to(logits.dtype), labels)


def balanced_supcon(
    z: Tensor, centers: Tensor, labels: Tensor, temperature: float = 0.1, group: Tensor | None = None
) -> Tensor:
    """BCL's balanced contrastive loss (Zhu et al. 2022, Eq. 8), [B]: mean over the two views' anchors of each image.

    z [2B, P]: unit features, first all of view 2 and then all of view 3; centers [C, P]: unit class centres;
    labels [B]. With s_ij = <z_i, v_j> / temperature over the contrast set v = (z, centers) and n_y the number of
    members of class y in it (class-complement: the centre makes n_y >= 1),
        l_i = log sum_{j != i} exp(s_ij) / (n_{y_j} - [y_j = y_i])  -  mean_{j != i, y_j = y_i} s_ij.
    n_{y_i} - 1 >= 1 always: the other view and the centre are there. Memory: a few [2B, 2B + C] matrices.
    With `group` [B], centers is [K, C, P] and the anchors of image i meet the centres of row group_i: K losses, each over
    its own images, at the price of one. ValueError for a wrong shape or a temperature that is not above 0.
    """
    if not isinstance(temperature, Tensor) and not temperature > 0:
        raise ValueError(f"temperature: {temperature} must be above 0")
    if z.ndim != 2 or z.shape[0] != 2 * labels.shape[0]:
        raise ValueError(f"z: shape {tuple(z.shape)} must be [2B, P] with B = {labels.shape[0]} labels")
    dims = 2 if group is None else 3
    if centers.ndim != dims or centers.shape[-1] != z.shape[1]:
        rows = "" if group is None else "K, "
        raise ValueError(f"centers: shape {tuple(centers.shape)} must be [{rows}C, {z.shape[1]}]")
    anchors, classes = z.shape[0], centers.shape[-2]
    with torch.autocast(z.device.type, enabled=False):
        z, centers = full_precision(z), full_precision(centers)
        views = labels.repeat(2)
        members = torch.cat([views, torch.arange(classes, device=labels.device)])
        counts = torch.ones(classes, dtype=z.dtype, device=z.device)
        counts = counts.index_add(0, views, torch.ones_like(views, dtype=z.dtype))
        if group is None:
            scores = z @ torch.cat([z, centers]).T / temperature
        else:
            met = (z @ centers.flatten(0, 1).T).view(anchors, -1, classes)
            place = group.repeat(2)[:, None, None].expand(-1, 1, classes)
            scores = torch.cat([z @ z.T, met.gather(1, place).squeeze(1)], dim=1) / temperature
        same = views[:, None] == members[None, :]
        own = torch.eye(anchors, anchors + classes, dtype=torch.bool, device=z.device)
        averaged = scores - torch.where(same, (counts - 1).log()[views][:, None], counts.log()[members])
        partition = averaged.masked_fill(own, -torch.inf).logsumexp(1)
        positives = scores.masked_fill(~same | own, 0.0).sum(1) / (counts[views] - 1)
        return (partition - positives).view(2, -1).mean(0)


def group_losses(per_sample: Tensor, membership: Tensor) -> tuple[Tensor, Tensor]:
    """(L [G], w [G]): L_k = sum_i m_ik l_i / sum_i m_ik (0 where the group is absent), w_k = sum_i m_ik / B.

    per_sample [B], membership [B, G] >= 0, hard (one-hot) or soft. If its rows sum to 1, sum_k w_k L_k = mean loss.
    ValueError for other shapes.
    """
    if per_sample.ndim != 1:
        raise ValueError(
            f"per_sample: shape {tuple(per_sample.shape)} must be [B], one loss per sample (reduction='none')"
        )
    if membership.ndim != 2 or membership.shape[0] != per_sample.shape[0]:
        raise ValueError(
            f"membership: shape {tuple(membership.shape)} must be [{per_sample.shape[0]}, G], as membership_for(...)[labels]"
        )
    per_sample = full_precision(per_sample)
    membership = membership.to(per_sample.dtype)
    mass = membership.sum(0)
    total = (membership * per_sample[:, None]).sum(0)
    losses = torch.where(mass > 0, total / mass.clamp_min(torch.finfo(mass.dtype).tiny), torch.zeros_like(total))
    return losses, mass / per_sample.shape[0]


def membership_for(
    kind: str,
    counts: Tensor | Sequence[float],
    group_of_class: Tensor | Sequence[int] | None = None,
    *,
    eta: int = IMBSAM_ETA,
    gamma: float = FOCAL_GAMMA,
    sharpness: float = FOCAL_SHARPNESS,
) -> Tensor:
    """Class table [C, G] float32 whose rows sum to 1; a batch's membership is table[labels]. Set-up time only.

    single: one group (SAM, ASAM). groups: one-hot of group_of_class [C] (GSA). classes: identity, C^2 floats (CC-SAM).
    head-tail: columns (head, tail), tail = classes with fewer than eta images (ImbSAM).
    focal: columns (1 - t_c, t_c), t_c = sharpness * (1 - n_c / n)^gamma: the share of each sample's loss that is
        sharpness-aware (Focal-SAM). counts [C]: training images per class. Raises ValueError.
    """
    if kind not in MEMBERSHIPS:
        raise ValueError(f"kind: {kind!r} must be one of {', '.join(MEMBERSHIPS)}")
    counts = torch.as_tensor(counts)
    if counts.ndim != 1:
        raise ValueError(f"counts: shape {tuple(counts.shape)} must be [C], training images of each class")
    classes = counts.shape[0]
    if kind == "single":
        return torch.ones(classes, 1, device=counts.device)
    if kind == "classes":
        return torch.eye(classes, device=counts.device)
    if kind == "groups":
        groups = None if group_of_class is None else torch.as_tensor(group_of_class).long()
        if groups is None or groups.shape != (classes,) or bool((groups < 0).any()):
            raise ValueError(f"group_of_class: needs one group (0, 1, ...) for each of the {classes} classes")
        return F.one_hot(groups).float()
    if kind == "head-tail":
        tail = (counts < eta).double()
    else:
        if not bool((counts >= 0).all()) or not 0 < float(counts.sum()) < math.inf:
            raise ValueError("counts: training images of each class must be at least 0, and not all 0")
        if not (0 <= sharpness <= 1 and gamma >= 0):
            raise ValueError(f"sharpness, gamma: ({sharpness}, {gamma}) need 0 <= sharpness <= 1 and gamma >= 0")
        tail = sharpness * (1 - counts.double() / counts.sum()) ** gamma
    return torch.stack([1 - tail, tail], 1).float()
