"""Diagonal empirical Fisher of the base loss at a group's anchor, F = E[(d log p(y|x) / d theta)^2].

"per-sample" (default) squares each sample's gradient; "batch" squares the mean gradient of a batch, as the released
code does, and comes out smaller by the size of a batch or more. BatchNorm runs on its running statistics, so samples do not
mix; a mean of snapshots has none of its own, hence `reestimate_batchnorm`. Only the anchored (encoder) parameters are
differentiated; the classifier is the model's current one. A network that torch's vmap cannot batch: feed it batches of
one image in mode "batch", which is the same number, slower.

    with swapped_parameters(flat_encoder, theta_star), reestimate_batchnorm(model, images):
        sums, samples = fisher_sums(model, names, batches, loss_fn)      # F = sums / samples

Legend: B batch, D elements of the flattened encoder.
"""

import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm

from ltfast.modes import evaluating
from ltfast.preserve.layers import Unlike, known_layers, sample_squares

log = logging.getLogger(__name__)

# Bytes of per-sample gradients held at once when `chunk` is not given: 11 samples of a ResNet-50, 512 of a ResNet-32.
CHUNK_BYTES = 1 << 30
MAX_CHUNK = 512
LossFn = Callable[[Tensor, Tensor], Tensor]  # (outputs [B, C], labels [B]) -> loss of each sample [B]
Flatten = Callable[[Mapping[str, Tensor]], Tensor]  # {name: tensor shaped as the parameter} -> flat [D]


def concatenate(tensors: Mapping[str, Tensor]) -> Tensor:
    """The default flattening: all elements one after another in the mapping's order."""
    return torch.cat([t.reshape(-1) for t in tensors.values()])


@torch.no_grad()  # torch.func differentiates all the same; no graph of the other parameters is kept
def fisher_sums(
    model: nn.Module,
    names: Sequence[str],
    batches: Iterable[tuple[Tensor, Tensor]],
    loss_fn: LossFn,
    *,
    mode: str = "per-sample",
    chunk: int | None = None,
    flatten: Flatten = concatenate,
) -> tuple[Tensor, int]:
    """Sum of squared gradients [D] in `flatten`'s order and dtype, and the number of samples behind it (0 is allowed).

    Ranks add both up and divide: exact for shares of any size. names: parameters to differentiate, as in
    `model.named_parameters()`. loss_fn: per-sample -log p(y|x). chunk: samples differentiated together, by default what
    CHUNK_BYTES holds. In mode "batch" a squared batch mean counts as often as the batch has samples. The model is run
    in eval mode and its modes are restored; gradients of parameters are not touched.
    """
    if mode not in ("per-sample", "batch"):
        raise ValueError(f"mode must be per-sample or batch, got {mode!r}")
    named, names = dict(model.named_parameters()), list(names)
    if not names:
        raise ValueError("names: give at least one parameter of the model")
    unknown = [n for n in names if n not in named]
    if unknown:
        raise ValueError(f"names must be parameters of the model, got {unknown[0]!r}")
    params = {n: named[n].detach() for n in names}
    chunk = chunk or max(1, min(MAX_CHUNK, CHUNK_BYTES // (4 * sum(p.numel() for p in params.values()))))
    sums = {n: torch.zeros_like(p, dtype=torch.float64) for n, p in params.items()}
    squares = _sample_squares(model, names, loss_fn, chunk) if mode == "per-sample" else _batch_squares(model, loss_fn)
    seen = 0
    with evaluating(model):
        for images, labels in batches:
            seen += len(labels)
            for name, value in squares(params, images, labels) if len(labels) else ():
                sums[name] += value
    return flatten(sums), seen


Squares = Callable[[dict[str, Tensor], Tensor, Tensor], Iterator[tuple[str, Tensor]]]


def _sample_squares(model: nn.Module, names: list[str], loss_fn: LossFn, chunk: int) -> Squares:
    """Yields sum over samples of squared gradients, parameter by parameter, `chunk` samples at a time, fewer from where the
    GPU's memory is short on.

    On a GPU layer by layer where every layer is of a kind that layers.py knows (each batch's first chunk is checked
    against autograd), else by vmap.
    """
    by_vmap = _vmapped_squares(model, loss_fn)
    layers = known_layers(model, names) if _by_layers(model) else None
    if layers is None and _by_layers(model):
        log.warning("Fisher: a layer of a kind that is not known, so samples go through vmap, which takes longer")

    def of_chunk(params: dict[str, Tensor], x: Tensor, y: Tensor, check: bool) -> Mapping[str, Tensor]:
        nonlocal layers
        if layers is not None:
            try:
                return sample_squares(model, layers, loss_fn, x, y, names, check=check)
            except Unlike as error:
                log.warning(
                    "Fisher: %s is not what its layer says, so samples go through vmap, which takes longer", error
                )
                layers = None
        return by_vmap(params, x, y)

    def squares(params: dict[str, Tensor], images: Tensor, labels: Tensor) -> Iterator[tuple[str, Tensor]]:
        nonlocal chunk
        done = 0
        while done < len(labels):
            size = min(chunk, len(labels) - done)
            part = slice(done, done + size)
            try:
                found = of_chunk(params, images[part], labels[part], done == 0)
            except torch.OutOfMemoryError:  # CHUNK_BYTES knows nothing of activations
                if size == 1:
                    raise
                chunk = size // 2
                continue
            done = part.stop
            yield from found.items()

    return squares


def _by_layers(model: nn.Module) -> bool:
    """cuDNN is slow at vmap's convolutions with one group per sample; on a CPU they are faster for small networks."""
    return next(model.parameters()).is_cuda


def _vmapped_squares(
    model: nn.Module, loss_fn: LossFn
) -> Callable[[dict[str, Tensor], Tensor, Tensor], Mapping[str, Tensor]]:
    """The same for any network that torch.func.vmap can batch, all samples at once."""

    def loss(params: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        return loss_fn(functional_call(model, params, (image[None],)), label[None]).sum()

    per_sample = vmap(grad(loss), in_dims=(None, 0, 0))

    def squares(params: dict[str, Tensor], images: Tensor, labels: Tensor) -> Mapping[str, Tensor]:
        with _vmap_friendly():
            gradients = per_sample(params, images, labels)
        return {name: g.square().sum(0) for name, g in gradients.items()}

    return squares


@contextmanager
def _vmap_friendly() -> Iterator[None]:
    """Attention by plain products, which vmap can batch; no warning about operations that it runs one by one."""
    with warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH):
        warnings.filterwarnings("ignore", "There is a performance drop because we have not yet implemented")
        yield


def _batch_squares(model: nn.Module, loss_fn: LossFn) -> Squares:
    """Yields B times the squared gradient of the batch's mean loss."""

    def loss(params: dict[str, Tensor], images: Tensor, labels: Tensor) -> Tensor:
        return loss_fn(functional_call(model, params, (images,)), labels).mean()

    def squares(params: dict[str, Tensor], images: Tensor, labels: Tensor) -> Iterator[tuple[str, Tensor]]:
        for name, g in grad(loss)(params, images, labels).items():
            yield name, g.square() * len(labels)

    return squares


def sample_indices(group_of_class: Tensor, labels: Tensor, group: int, budget: int | None, seed: int = 0) -> Tensor:
    """Positions in the train split of at most `budget` images of a group (None: all), int64, increasing.

    labels: of the whole train split, on the host. Drawn without replacement; a function of (seed, group) only.
    """
    if budget is not None and budget < 1:
        raise ValueError(f"budget must be at least 1 sample per group, got {budget}")
    members = (group_of_class.cpu()[labels.cpu()] == group).nonzero().flatten()
    if budget is None or len(members) <= budget:
        return members
    generator = torch.Generator().manual_seed(seed * 1_000_003 + group)
    return members[torch.randperm(len(members), generator=generator)[:budget]].sort().values


@contextmanager
def swapped_parameters(flat: Tensor, values: Tensor) -> Iterator[None]:
    """Inside, `flat` (the buffer behind the parameters, or a slice of it) holds `values`; then its old contents, to the
    bit, whatever happened inside."""
    if flat.shape != values.shape:
        raise ValueError(f"values must have the shape of flat, {tuple(flat.shape)}, got {tuple(values.shape)}")
    buffer = flat.detach()
    saved = buffer.clone()
    try:
        buffer.copy_(values)
        yield
    finally:
        buffer.copy_(saved)


@contextmanager
def reestimate_batchnorm(model: nn.Module, batches: Iterable[Tensor]) -> Iterator[None]:
    """Inside, BatchNorm statistics are the plain average over `batches` of images at the current weights.

    One forward pass without gradients; only BatchNorm is in training mode, so dropout is off. Afterwards statistics,
    momenta and modes are what they were. Raises ValueError if the model has BatchNorm and there is no batch.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    saved = [(m, m.momentum, {k: b.clone() for k, b in m.named_buffers(recurse=False)}) for m in norms]
    try:
        if norms:
            _estimate(model, norms, batches)
        yield
    finally:
        for m, momentum, buffers in saved:
            m.momentum = momentum
            for name, value in buffers.items():
                getattr(m, name).copy_(value)


@torch.no_grad()
def _estimate(model: nn.Module, norms: Sequence[_BatchNorm], batches: Iterable[Tensor]) -> None:
    count = 0
    with evaluating(model):
        for m in norms:
            m.reset_running_stats()
            m.momentum = None  # cumulative average
            m.train()
        for images in batches:
            model(images)
            count += 1
    if not count:
        raise ValueError("batches are empty: BatchNorm statistics need at least one batch")
