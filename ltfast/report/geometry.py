"""Curvature and landscapes of a live run, for its head and tail classes.

The loss is the run's own classification loss (with the log prior if the method has one), averaged over a fixed random
choice of training images of the head or tail, plain views, BatchNorm on running statistics unless stated.
Legend: K = 2 sides (head, tail), N parameters of encoder and classifier.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ltfast import checkpoint
from ltfast.errors import UserError
from ltfast.flat import FlatParameters
from ltfast.preserve import reestimate_batchnorm, sample_indices
from ltfast.report.curvature import Spectrum, flatten, hessian_product, residual, spectrum, unflatten
from ltfast.report.landscape import LossAt, Plane, Surface, around, moved, surface
from ltfast.report.runs import CHUNK, OUT_OF_TIME, Live, Missing
from ltfast.resume import load_bank

SIDES = ("head", "tail")
IMAGES = 256  # training images per side
LANCZOS_STEPS, LANCZOS_PROBES, TRACE_PROBES = 24, 2, 12
LANCZOS_MINIMUM = 8  # steps: fewer place the largest eigenvalue too roughly
BASIS_BYTES = 8 << 30  # of Lanczos vectors: 24 x 25.6M x 4 bytes are 2.5 GB
LEVELS = 3  # landscapes of 17 x 17 points

Stop = Callable[[], bool]
Tick = Callable[[], None]


@dataclass(frozen=True)
class Curvature:
    """Spectra by side, the images each was computed on, and the largest eigenvalue with its error, from one product in
    float64 (products in float32 are off by far more than Lanczos is)."""

    spectra: dict[str, Spectrum]
    images: dict[str, int]
    tops: dict[str, tuple[float, float]]


def curvature(live: Live, share: Callable[[], Stop], tick: Tick) -> Curvature:
    """Hessian spectra of head and tail; `share()` starts a side's share of the time.

    Raises Missing if the time does not suffice for LANCZOS_MINIMUM steps per side.
    """
    params = live.params
    size = sum(p.numel() for p in params)
    steps = max(2, min(LANCZOS_STEPS, BASIS_BYTES // (4 * size)))
    spectra, images, tops = {}, {}, {}
    exact = copy.deepcopy(live.model).double()
    exact_params = [*exact.encoder.parameters(), *exact.classifier.parameters()]
    for side in SIDES:
        x, y = live.fetch("train", live.indices(side, IMAGES))
        batches = list(zip(x.split(CHUNK), y.split(CHUNK), strict=True))
        product = hessian_product(live.model, params, live.loss, batches)
        stop = share()
        spectra[side] = spectrum(
            product,
            flatten(params),
            probes=LANCZOS_PROBES,
            steps=steps,
            trace_probes=TRACE_PROBES,
            stop=stop,
            tick=tick,
        )
        if len(spectra[side].quadratures[0].nodes) < LANCZOS_MINIMUM and stop():
            raise Missing(OUT_OF_TIME)
        images[side] = len(y)
        halves = [(a.double(), b) for a, b in zip(x.split(CHUNK // 2), y.split(CHUNK // 2), strict=True)]
        tops[side] = residual(
            hessian_product(exact, exact_params, live.loss, halves), spectra[side].best.vector.double()
        )
    return Curvature(spectra, images, tops)


def products() -> int:
    """Hessian-vector products of `curvature` when nothing stops it (the progress bar's length)."""
    return len(SIDES) * (LANCZOS_PROBES * LANCZOS_STEPS + TRACE_PROBES)


@dataclass(frozen=True)
class Landscape:
    """Losses [K, ny, nx] of head and tail over a plane of weight space; `points` and `labels` mark weights in it."""

    surface: Surface
    images: dict[str, int]
    points: tuple[tuple[float, float], ...] = ((0.0, 0.0),)
    labels: tuple[str, ...] = ("solution",)
    note: str = ""


def side_losses(live: Live) -> tuple[Callable[[], Tensor], dict[str, int]]:
    """(function that returns the losses [K] at the model's present weights, images per side); one pass over both sides."""
    x, y = zip(*(live.fetch("train", live.indices(side, IMAGES)) for side in SIDES), strict=True)
    images, labels, sizes = torch.cat(x), torch.cat(y), [len(part) for part in y]

    @torch.no_grad()
    def losses() -> Tensor:
        values = [live.loss(live.model(a), b) for a, b in zip(images.split(512), labels.split(512), strict=True)]
        return torch.stack([part.double().mean() for part in torch.cat(values).split(sizes)])

    return losses, dict(zip(SIDES, sizes, strict=True))


def solution_landscape(live: Live, stop: Stop, tick: Tick) -> Landscape:
    """The surroundings of the last weights in two filter-normalised directions, from -1 to 1 filter norms."""
    losses, images = side_losses(live)
    loss_at = around(live.params, losses)
    return Landscape(timed_surface(loss_at, stop=stop, tick=tick), images)


def timed_surface(loss_at: LossAt, *ranges: tuple[float, float], stop: Stop, tick: Tick) -> Surface:
    """`surface` in LEVELS levels. Raises Missing if the time does not suffice for the first."""
    try:
        return surface(loss_at, *ranges, levels=LEVELS, stop=stop, tick=tick)
    except TimeoutError:
        raise Missing(OUT_OF_TIME) from None


def plane_landscape(live: Live, stop: Stop, tick: Tick) -> Landscape:
    """The plane through theta(t0), theta(t1), theta(t2); BatchNorm statistics re-estimated at every point of it.

    Raises Missing if the run kept no three weights that span a plane.
    """
    points, labels, note = three_points(live)
    try:
        plane = Plane.through(points)
    except ValueError:
        raise Missing(f"its three kept weights ({', '.join(labels)}) lie on one line") from None
    losses, images = side_losses(live)
    everything = torch.zeros(live.source.num_classes, dtype=torch.int64)
    calibration, _ = live.fetch("train", sample_indices(everything, live.source.train_labels, 0, IMAGES))
    params = live.params

    @torch.no_grad()
    def loss_at(x: float, y: float) -> Tensor:
        with moved(params) as put:
            put(unflatten(plane.at(x, y), params))
            with reestimate_batchnorm(live.model, [calibration]):
                return losses()

    found = timed_surface(loss_at, *plane.ranges(), stop=stop, tick=tick)
    marks = tuple((float(x), float(y)) for x, y in plane.points)
    return Landscape(found, images, marks, tuple(labels), note)


def three_points(live: Live) -> tuple[list[Tensor], list[str], str]:
    """theta(t0), theta(t1), theta(t2) as vectors [N], their labels, and a note on where they come from.

    t2: the last weights. t0 and t1: the weights kept at marked epochs; or else the oldest and the newest snapshot of
    the memory bank (encoder only, with the final classifier); or else initial and best weights.
    """
    last = flatten(live.params)
    final = f"t2: {'end' if live.folder.metrics('test') else 'last weights'}, epoch {live.folder.epoch_of('last') or 0}"
    kept = sorted(live.folder.checkpoints.glob("epoch-*.safetensors"), key=epoch_of)
    if len(kept) >= 2:
        chosen = (kept[0], kept[-1])
        points = [flatten(weights_of(live, path)) for path in chosen]
        names = [f"t{i}: epoch {epoch_of(path)}" for i, path in enumerate(chosen)]
        return [*points, last], [*names, final], "weights kept during training"
    snapshots = bank_snapshots(live)
    if len(snapshots) >= 2:
        tail = flatten(list(live.model.classifier.parameters()))
        names = [f"t{i}: epoch {epoch + 1}" for i, (epoch, _) in enumerate(snapshots)]
        points = [torch.cat([vector.to(tail), tail]) for _, vector in snapshots]
        return [*points, last], [*names, final], "encoders of the memory bank with the final classifier"
    if live.folder.best.exists():
        best, meta = weights_of(live, live.folder.best), checkpoint.load(live.folder.best)[1]
        points = [flatten(initial_weights(live)), flatten(best)]
        names = ["t0: initial", f"t1: best, epoch {meta.get('epoch', '?')}"]
        return [*points, last], [*names, final], "the initial weights, the best on validation and the last"
    raise Missing("it kept no weights of earlier epochs")


def epoch_of(path: Path) -> int:
    """N of epoch-N.safetensors, 0 for another name."""
    number = path.stem.removeprefix("epoch-")
    return int(number) if number.isdigit() else 0


def weights_of(live: Live, path: Path) -> list[Tensor]:
    """Encoder and classifier parameters of a weights file, like `live.params`."""
    tensors, _ = checkpoint.load(path)
    named = {id(p): name for name, p in live.model.named_parameters()}
    try:
        return [tensors[named[id(p)]].to(p).reshape(p.shape) for p in live.params]
    except (KeyError, RuntimeError):
        raise Missing(f"{path.name} holds weights of another model") from None


def initial_weights(live: Live) -> Sequence[Tensor]:
    """The weights the run started from: a function of its config and seed."""
    from ltfast import build

    if live.folder.metrics("imprint"):
        raise Missing("its classifier began at mean features, which are not kept")
    try:
        model = build.build_model(live.config, live.source.input_shape, live.source.num_classes)
    except UserError as error:
        raise Missing(f"its initial weights are missing ({error})") from None
    parts = [*model.encoder.parameters(), *model.classifier.parameters()]
    return [p.detach().to(live.device) for p in parts]


def bank_snapshots(live: Live) -> list[tuple[int, Tensor]]:
    """(epoch, encoder as a vector like `live.params`) of the oldest and the newest live snapshot; [] without a bank, or where
    it began as another run's, whose epochs are not this one's."""
    if live.config.preserve.bank:
        return []
    try:
        bank = load_bank(live.folder.path)
    except UserError:  # no training state, or a method without a bank
        return []
    ages = bank["epochs"].tolist()
    if len(ages) < 2:
        return []
    rows = [(epoch, bank.get(f"snapshot.{number}")) for number, epoch in (ages[0], ages[-1])]
    flat = FlatParameters([torch.nn.Parameter(p.detach().cpu().clone()) for p in live.model.encoder.parameters()])
    found = []
    for epoch, row in rows:
        if row is not None and row.numel() == flat.size:
            found.append((epoch, torch.cat([v.reshape(-1) for v in flat.views(row)])))
    return found
