"""`ltfast predict RUN IMAGES...`: classes and probabilities of pictures, from a run folder or an exported file alone.

Nothing here reads the training data: a run notes its classes and how a picture becomes its input when it starts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ltfast import build, checkpoint
from ltfast.config import Config
from ltfast.data import folders
from ltfast.data.base import Source
from ltfast.data.large_source import LargeSource
from ltfast.errors import UserError
from ltfast.evaluate import augmented, prior_shift
from ltfast.models import LongTailModel
from ltfast.runs import RunFolder


@dataclass(frozen=True)
class Preprocess:
    """How a picture file becomes input: RGB or gray, `size` x `size`, (x / 255 - mean) / std by channel.

    crop: resize the short side to size * 256 / 224 and take the centre, as evaluation of large pictures does; else the
    whole picture is resized.
    """

    channels: int
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop: bool

    @staticmethod
    def of(source: Source) -> Preprocess:
        """What `source.evaluate` does to a picture."""
        channels, _, size = source.input_shape
        return Preprocess(channels, size, tuple(source.mean), tuple(source.std), crop=isinstance(source, LargeSource))

    @staticmethod
    def from_dict(values: dict[str, Any]) -> Preprocess:
        """Inverts `dataclasses.asdict` after a trip through JSON."""
        return Preprocess(**{**values, "mean": tuple(values["mean"]), "std": tuple(values["std"])})

    def __call__(self, path: str | Path) -> Tensor:
        """The picture in `path` as [channels, size, size] float32.

        Raises:
            UserError: missing, or not a picture that can be decoded.
        """
        import numpy as np
        from PIL.Image import Resampling

        from ltfast.data.decode import BadImage, load_picture

        try:
            image = load_picture(path)
        except BadImage as error:
            raise UserError(f"{path}: cannot be read as a picture: {error}") from None
        if self.crop:
            from ltfast.data.torch_source import evaluation_crop

            image = evaluation_crop(image, self.size)
        if self.channels == 1:
            image = image.convert("L")
        if image.size != (self.size, self.size):
            image = image.resize((self.size, self.size), Resampling.BILINEAR)
        pixels = torch.from_numpy(np.array(image)).view(self.size, self.size, self.channels).permute(2, 0, 1)
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        return (pixels.float() / 255 - mean) / std


@dataclass(frozen=True)
class Trained:
    """A trained model with what is needed to use it."""

    model: LongTailModel
    config: Config
    classes: tuple[str, ...]
    preprocess: Preprocess
    counts: tuple[int, ...] | None = None
    """Training images of each class; None: an export of before they were noted."""

    def describe(self) -> dict[str, Any]:
        """Everything but the weights, as JSON."""
        known = {} if self.counts is None else {"counts": list(self.counts)}
        return {
            "config": self.config.to_dict(), "classes": list(self.classes), "preprocess": asdict(self.preprocess), **known
        }  # fmt: skip

    def prior_shift(self, prior: str) -> Tensor:
        """See `ltfast.evaluate.prior_shift`. UserError where the training images of the classes are not known."""
        if self.counts is None:
            raise UserError(f"--prior {prior}: the file does not say how common its classes were; export the run again")
        return prior_shift(self.config, self.counts, prior)


def load_trained(where: str | Path, which: str = "last") -> Trained:
    """The model of a run folder (`which`: last or best) or of a file that `ltfast export --format safetensors` wrote.

    Raises:
        UserError: neither of them, or incomplete.
    """
    if Path(where).is_file():
        if which != "last":
            raise UserError(f"--checkpoint {which}: {where} holds one model; leave the option out")
        if Path(where).suffix in (".pt2", ".onnx"):
            raise UserError(
                f"{where}: for use without ltfast (torch.export.load, onnxruntime); give the run folder, or a file of "
                "`ltfast export RUN --format safetensors`"
            )
        tensors, meta = checkpoint.load(Path(where))
        if "classes" not in meta:
            raise UserError(f"{where}: not an exported model; make one with `ltfast export RUN --format safetensors`")
        config = Config.from_dict(meta["config"], str(where))
        trained = _build(config, meta["classes"], meta["preprocess"], meta.get("counts"))
        trained.model.load_state_dict(tensors)
        return trained
    run = RunFolder.open(where)
    config, row = run.config, run.data_row
    if "preprocess" not in row:
        raise UserError(f"{where}: its metrics.jsonl does not say how pictures were prepared; was it cut or edited?")
    trained = _build(config, row["class_names"], row["preprocess"], row.get("counts"))
    checkpoint.load_into(trained.model, run.weights(which))
    return trained


def _build(config: Config, classes: Sequence[str], preprocess: dict[str, Any], counts: Sequence[int] | None) -> Trained:
    how = Preprocess.from_dict(preprocess)
    shape = (how.channels, how.size, how.size)
    model = build.build_model(config.with_(weights=None), shape, len(classes))
    return Trained(model.eval(), config, tuple(classes), how, None if counts is None else tuple(counts))


def pictures_below(paths: Iterable[str | Path]) -> Iterator[str]:
    """The paths, and for a folder among them the picture files below it, sorted: those that training would find there.

    Hidden files and folders do not count, links are followed, and a warning counts the files of other suffixes.

    Raises:
        UserError: a folder without any, or one that cannot be read.
    """
    for path in paths:
        if not Path(path).is_dir():
            yield str(path)
            continue
        unread: Counter[str] = Counter()
        found = sorted(folders.pictures_below(Path(path), unread))
        folders.warn_of_unread(path, unread)
        if not found:
            kinds = ", ".join(sorted(folders.IMAGE_SUFFIXES))
            raise UserError(f"{path}: no pictures below this folder ({kinds})")
        yield from found


@torch.no_grad()
def predict(
    trained: Trained,
    paths: Iterable[str | Path],
    *,
    top: int = 5,
    batch: int = 64,
    device: torch.device | str = "cpu",
    prior: str | None = None,
    unreadable: Callable[[UserError], None] | None = None,
) -> Iterator[dict[str, Any]]:
    """For each picture {"image", "classes": the `top` likeliest, "probabilities": theirs}, in order.

    prior: class frequencies that the probabilities are for, see `ltfast.evaluate.prior_shift`; None: those that the loss assumed.
    unreadable: told of each picture that cannot be read, which is then left out.

    Raises:
        UserError: no such device; or a picture cannot be read, and nobody is to be told.
    """
    if top < 1:
        raise UserError(f"--top {top}: use 1 or more")
    device = build.pick_device(device) if isinstance(device, str) else device
    model, waiting = augmented(trained.model.to(device), trained.config.run.tta), list(paths)
    shift = 0.0 if prior is None else trained.prior_shift(prior).to(device)
    for start in range(0, len(waiting), batch):
        read = list(_read(trained.preprocess, waiting[start : start + batch], unreadable))
        if not read:
            continue
        logits = model(torch.stack([x for _, x in read]).to(device)).float()
        probabilities = (logits + shift).softmax(1)
        best = probabilities.topk(min(top, len(trained.classes)), dim=1)
        for (path, _), values, index in zip(read, best.values.tolist(), best.indices.tolist(), strict=True):
            yield {"image": path, "classes": [trained.classes[i] for i in index], "probabilities": values}


def _read(
    preprocess: Preprocess, paths: Iterable[str | Path], unreadable: Callable[[UserError], None] | None
) -> Iterator[tuple[str, Tensor]]:
    for path in paths:
        try:
            yield str(path), preprocess(path)
        except UserError as error:
            if unreadable is None:
                raise
            unreadable(error)
