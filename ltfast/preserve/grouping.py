"""Class groups: normalised cut of the memory bank's snapshots, or ranges of class frequency.

Classes c, c' are joined by s(c, c') = (1 + cos) / 2 of their flattened encoder weights. Classes that share a snapshot
are one node of mass m: the graph of S nodes with affinity m_s m_t s(s, t) has, on vectors that are constant within a
snapshot, the normalised Laplacian of the C-node graph, so both have the same cut at S^2 instead of C^2 cost.

Groups are numbered by decreasing mean number of training images per class: group 0 is the head-most one.
Legend: C classes, S snapshots, G groups, D elements of a snapshot.
"""

import logging

import torch
from torch import Tensor

from ltfast.errors import UserError
from ltfast.preserve.bank import MemoryBank, stack_into
from ltfast.progress import counted

log = logging.getLogger(__name__)
# Columns per block of the Gram matrix. Narrower blocks make threads wait for each other on a busy machine.
BLOCK = 1 << 14
# k-means starts. Each costs microseconds; the cut value picks the winner, so more starts only guard against bad optima.
STARTS = 32
LLOYD_STEPS = 100  # of one start, at most; it ends where no label changes
# Snapshots whose cosine is nearer to 1 count as one: eigenvectors that tell them apart are rounding (about 1e-15).
SAME = 1e-13


@torch.no_grad()
def similarities(bank: MemoryBank, center: bool = False, block: int = BLOCK) -> Tensor:
    """Cosines [S, S] float64 of the bank's snapshots in `lumps()` order, streamed in blocks of `block` columns.

    center: subtract the bank's origin (initial weights) first; raw cosines of one run are all near 1. Sums are float64
    because what tells snapshots apart is 1 - cos. A snapshot of norm zero has cosine 0 to all others. Memory: one
    block of S * block * 8 bytes.
    """
    if center and bank.origin is None:
        raise ValueError("center=True needs a MemoryBank that was made with origin=<initial weights>")
    size = len(bank)
    gram = torch.zeros(size, size, dtype=torch.float64)
    buffer = torch.empty(size, min(block, bank.dimension), dtype=torch.float64)
    for columns, rows in bank.blocks(block):
        x = stack_into(buffer, rows)
        if center and bank.origin is not None:
            x -= bank.origin[columns].double()
        gram.addmm_(x, x.T)
    norm = gram.diagonal().sqrt()
    scale = torch.where(norm > 0, 1 / norm, torch.zeros_like(norm))
    cosine = (gram * scale[:, None] * scale[None]).clamp_(-1.0, 1.0)
    cosine = (cosine + cosine.T) / 2
    cosine.fill_diagonal_(1.0)
    return cosine


def spectral_groups(cosine_SS: Tensor, masses_S: Tensor, num_groups: int, seed: int = 0) -> Tensor:
    """Normalised cut of S lumped nodes: a label below G for each, int64 [S]; deterministic.

    Nodes that do not differ are merged first; if G or fewer are left, each gets a label of its own.
    """
    size = len(masses_S)
    if cosine_SS.shape != (size, size):
        raise ValueError(f"cosines must be [{size}, {size}] to match the masses, got {tuple(cosine_SS.shape)}")
    kept, node = (cosine_SS >= 1 - SAME).int().argmax(1).unique(return_inverse=True)
    if len(kept) <= num_groups:
        return node
    mass = torch.zeros(len(kept), dtype=torch.float64).index_add_(0, node, masses_S.double())
    return cut_nodes(cosine_SS[kept][:, kept].double(), mass, num_groups, seed)[node]


def cut_nodes(cosine_SS: Tensor, mass_S: Tensor, num_groups: int, seed: int = 0) -> Tensor:
    """The normalised cut itself, for S > G nodes, all float64.

    Shi and Malik's relaxation: the G largest eigenvectors of D^-1/2 W D^-1/2, D = diag(W 1), rows scaled to unit
    length (Ng, Jordan, Weiss), weighted k-means from several starts, and of its results the one with the smallest cut.
    """
    size = len(mass_S)
    affinity = mass_S[:, None] * mass_S[None] * (1 + cosine_SS) / 2
    inverse_root = affinity.sum(1).rsqrt()
    _, vectors = torch.linalg.eigh(inverse_root[:, None] * affinity * inverse_root[None])
    rows = torch.nn.functional.normalize(vectors[:, -num_groups:], dim=1)
    generator = torch.Generator().manual_seed(seed)
    starts = torch.arange(size) if size <= STARTS else torch.randperm(size, generator=generator)[:STARTS]
    best, best_cut = torch.zeros(size, dtype=torch.int64), float("inf")
    for start in starts.tolist():
        labels = weighted_kmeans(rows, mass_S, num_groups, start)
        cut = normalised_cut(affinity, labels, num_groups)
        if cut < best_cut - 1e-12:
            best, best_cut = labels, cut
    return best


def normalised_cut(affinity: Tensor, labels: Tensor, num_groups: int) -> float:
    """sum_k cut(k, rest) / volume(k); an empty group counts as 1, the worst a group can be."""
    member = torch.nn.functional.one_hot(labels, num_groups).to(affinity)
    within = torch.einsum("sk,st,tk->k", member, affinity, member)
    volume = member.T @ affinity.sum(1)
    return float((1 - torch.where(volume > 0, within / volume.clamp(min=1e-300), torch.zeros_like(volume))).sum())


def weighted_kmeans(points: Tensor, mass: Tensor, k: int, start: int) -> Tensor:
    """Lloyd's algorithm on points [S, E] with weights [S] from farthest-first centres; deterministic given `start`."""
    centres = points[start : start + 1]
    for _ in range(k - 1):
        centres = torch.cat([centres, points[torch.cdist(points, centres).amin(1).argmax()][None]])
    labels = torch.full((len(points),), -1)
    for _ in range(LLOYD_STEPS):
        previous, labels = labels, torch.cdist(points, centres).argmin(1)
        if torch.equal(labels, previous):
            break
        member = torch.nn.functional.one_hot(labels, k).to(points) * mass[:, None]
        weight = member.sum(0)[:, None]
        centres = torch.where(weight > 0, member.T @ points / weight.clamp(min=1e-300), centres)
    return labels


def group_by_frequency(counts_C: Tensor, num_groups: int) -> Tensor:
    """Contiguous ranges of the classes sorted by training images, most first, of equal size: group of class [C]."""
    check_num_groups(num_groups, len(counts_C))
    groups = torch.empty(len(counts_C), dtype=torch.int64)
    for j, part in enumerate(torch.argsort(counts_C.cpu(), descending=True, stable=True).tensor_split(num_groups)):
        groups[part] = j
    return groups


def group_classes(
    bank: MemoryBank,
    counts_C: Tensor,
    num_groups: int,
    *,
    center: bool = False,
    seed: int = 0,
) -> Tensor:
    """Group of each class, int64 [C], from a bank; every group 0..G-1 holds at least one class.

    counts_C: training images of each class. Where snapshots tell fewer than G groups apart, the largest are split into
    ranges of class frequency; classes without an entry join the largest snapshot's group. Both are logged.
    Raises UserError if G is larger than C, ValueError for counts of other classes than the bank's.
    """
    check_num_groups(num_groups, bank.num_classes)
    if counts_C.shape != (bank.num_classes,):
        raise ValueError(f"counts_C: shape {tuple(counts_C.shape)} must be [{bank.num_classes}], as the bank's classes")
    ids, masses, classes = bank.lumps()
    if not ids:
        log.warning("the memory bank is empty: %d groups by class frequency alone", num_groups)
        return group_by_frequency(counts_C, num_groups)
    labels = spectral_groups(similarities(bank, center), masses, num_groups, seed)
    groups = torch.full((bank.num_classes,), -1)
    for label, members in zip(labels.tolist(), classes, strict=True):
        groups[members] = label
    orphans = int((groups < 0).sum())
    if orphans:
        log.warning("%d classes have no entry in the memory bank; they join the group of its largest snapshot", orphans)
        groups[groups < 0] = labels[masses.argmax()]
    distinct = len(groups.unique())
    if distinct < num_groups:
        log.warning(
            "clustering %s of the memory bank gives %s; the largest are split by class frequency to make %d",
            counted(len(ids), "snapshot"), counted(distinct, "group"), num_groups,
        )  # fmt: skip
        groups = split_by_frequency(groups, counts_C.cpu(), num_groups)
    return head_first(groups, counts_C.cpu())


def split_by_frequency(groups_C: Tensor, counts_C: Tensor, num_groups: int) -> Tensor:
    """Cut the largest groups into ranges of class frequency, sizes as equal as they go, until there are G groups."""
    parts = {int(g): 1 for g in groups_C.unique()}
    size = {g: int((groups_C == g).sum()) for g in parts}
    while sum(parts.values()) < num_groups:
        parts[max((g for g in parts if size[g] > parts[g]), key=lambda g: size[g] / parts[g])] += 1
    result, label = torch.empty_like(groups_C), 0
    for g, pieces in parts.items():
        members = (groups_C == g).nonzero().flatten()
        order = members[torch.argsort(counts_C[members], descending=True, stable=True)]
        for piece in order.tensor_split(pieces):
            result[piece] = label
            label += 1
    return result


def head_first(groups_C: Tensor, counts_C: Tensor) -> Tensor:
    """Number groups by decreasing mean images per class; equal ones by their first class. Labels become 0..G-1."""
    found = groups_C.unique().tolist()
    mean = {g: counts_C[groups_C == g].double().mean().item() for g in found}
    first = {g: int((groups_C == g).nonzero()[0]) for g in found}
    result = torch.empty_like(groups_C)
    for new, old in enumerate(sorted(found, key=lambda g: (-mean[g], first[g]))):
        result[groups_C == old] = new
    return result


def check_num_groups(num_groups: int, num_classes: int) -> None:
    """Raise UserError unless 1 <= G <= C."""
    if not 1 <= num_groups <= num_classes:
        raise UserError(f"the number of groups must be between 1 and the {num_classes} classes, got {num_groups}")
