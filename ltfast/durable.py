"""What a Trainer keeps on the disk while it runs: log, weights, training states; see ltfast/store.py and ltfast/resume.py."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import TYPE_CHECKING, Any, cast

from ltfast import checkpoint, resume
from ltfast.config import Config
from ltfast.data.base import Source
from ltfast.dist import Ranks
from ltfast.errors import UserError
from ltfast.flat import FlatBuffers, FlatParameters
from ltfast.launch import began, restart_note
from ltfast.models import LongTailModel
from ltfast.predict import Preprocess
from ltfast.progress import Progress, counted
from ltfast.runs import RunFolder
from ltfast.store import Store
from ltfast.survive import BadSteps, Signals, Watch
from ltfast.update import Update

if TYPE_CHECKING:
    from ltfast.train import Trainer


class Durable:
    """Base of Trainer: everything that touches the run folder. Only rank 0 has one; every rank calls every method."""

    needs_groups: bool
    scouts: int
    config: Config
    folder: RunFolder | None
    ranks: Ranks
    source: Source
    progress: Progress
    model: LongTailModel
    flat: FlatParameters
    buffers: FlatBuffers
    update: Update
    epoch: int
    compiling: float
    batch: int
    steps: int
    store: Store | None = None
    best: dict[str, Any]
    saved: tuple[int, int] | None = None  # (steps, batch) of the newest training state
    resumed: bool = False  # a run that had begun before
    _replaced: int = 0  # unreadable images of the epoch before
    _logging: bool = True  # the last line of metrics.jsonl could be written
    _charting: bool = True  # until TensorBoard events could not be written

    def guard(self, signals: Signals) -> None:
        """What keeps the run alive: the checkpoint store, the watch over time and signals, the counter of bad steps."""
        run = self.config.run
        if self.store is None:
            self.store = self._open_store()
        self.watch = Watch(
            self.ranks, signals, checkpoint_minutes=run.checkpoint_minutes, max_hours=run.max_hours, began=began(),
            busy=lambda: self.store is not None and self.store.busy,
        )  # fmt: skip
        path = self.folder.path if self.folder is not None else None
        self.bad_steps = BadSteps(run.max_bad_steps, self.update.in_a_row, self.ranks, path)
        if self.resumed or restart_note():
            self.progress.note(restart_note() + self._where())

    def _open_store(self) -> Store | None:
        """Where checkpoints go; None on ranks other than 0, which have no folder."""
        if self.folder is None:
            return None
        return Store(self.folder.checkpoints, keep=self.config.run.keep_checkpoints, note=self.progress.note)

    def describe(self) -> None:
        """What rank 0 writes down, once in a run, before its first step."""
        if self.folder is None:
            return
        if self.folder.unlocked:
            self.progress.note(
                f"{self.folder}: cannot be locked ({self.folder.unlocked}); let no other process train in it"
            )
        if not self.folder.data_row:
            if self.needs_groups and self.scouts >= self.config.optim.epochs:
                self.progress.note(
                    f"all epochs ({self.scouts}) are for scouting: no groups, and nothing of {self.config.method} that needs them; "
                    "give more --epochs or less --scout"
                )
            self.log(
                "data",
                class_names=self.source.class_names,
                counts=self.source.train_counts.tolist(),
                sizes=self.source.sizes,
                test_from=self.source.test_from,
                fingerprint=self.source.fingerprint,
                preprocess=dataclasses.asdict(Preprocess.of(self.source)),
            )

    def _where(self) -> str:
        """At which point the run goes on."""
        if not self.steps:
            return "there was no checkpoint yet: from the beginning"
        if self.epoch >= self.config.optim.epochs:
            return f"all {self.steps:,} steps are done: evaluating"
        return f"continuing after {counted(self.steps, 'step')}, in epoch {self.epoch + 1}"

    def flush(self) -> None:
        """Wait for the checkpoints under way; UserError, on every rank, if one could not be written."""

        def work() -> None:
            if self.store is None:
                return
            try:
                self.store.flush()
            except UserError as error:
                raise UserError(f"{error}{self._weights_there()}") from None
            for problem in self.store.problems():
                self.progress.note(problem)

        self.ranks.on_main(work)

    def _weights_there(self) -> str:
        """Which of the run's weights are on the disk, and what evaluates them; '' if none are."""
        folder = self.folder
        epoch = None if folder is None else folder.epoch_of("last")
        if folder is None or epoch is None:
            return ""
        which = "the trained weights" if epoch == self.config.optim.epochs else f"the weights after epoch {epoch}"
        return f"; {which} are in {folder.last}: `ltfast eval {folder}`"

    def best_written(self) -> bool:
        """Whether the weights of the best epoch are on the disk, on every rank; a note says if it is another epoch's."""

        def work() -> bool:
            if self.folder is None or self.best["epoch"] < 0:
                return False
            try:
                _, meta = checkpoint.load(self.folder.best)
            except UserError:
                state = "damaged" if self.folder.best.exists() else "missing"
                self.progress.note(f"{self.folder.best}: is {state}; it is not evaluated")
                return False
            there, best = meta.get("epoch"), self.best["epoch"] + 1
            if there != best:
                self.progress.note(
                    f"{self.folder.best}: could not be written after the best epoch ({best}) and is of epoch {there}; it is not evaluated"
                )
            return there == best

        return bool(self.ranks.share(self.ranks.on_main(work)))

    def stop(self) -> dict[str, Any]:
        """Leave early with a checkpoint; UserError if it cannot be written."""
        if self.saved != (self.steps, self.batch):
            self.save_state()
        self.flush()
        where = f"in epoch {self.epoch + 1}" if self.batch else f"after epoch {self.epoch}"
        self.progress.note(f"{self.watch.reason} {where} after {counted(self.steps, 'step')}; checkpoint written")
        return {"stopped": self.watch.reason}

    def compiled(self, name: str, *, seconds: float, reason: str | None) -> None:
        """Note what was compiled or recorded, or (reason) why it runs eagerly instead; see `ltfast.compiled.Report`."""
        self.compiling += seconds
        if reason is not None:
            self.progress.note(f"{name}: running eagerly, slower and with the same results, because of {reason}")
        self.log("compile", what=name, seconds=seconds, ok=reason is None, reason=reason)

    def log(self, kind: str, **values: Any) -> None:
        """Append a line to metrics.jsonl."""
        if self.folder is not None:
            try:
                self.folder.log(kind, **values)
                self._logging = True
            except OSError as error:  # losing a line of the log is no reason to lose the run
                if self._logging:
                    self.progress.note(
                        f"{self.folder}/metrics.jsonl: cannot write ({error.strerror}); training goes on"
                    )
                self._logging = False
            if kind == "epoch" and self._charting and self.config.run.tensorboard:
                self.chart(values)

    def chart(self, values: dict[str, Any]) -> None:
        """The numbers of an epoch as TensorBoard events, losses and the like under train/, the rest under val/."""
        assert self.folder is not None
        numbers = {f"train/{k}": v for k, v in values.items() if isinstance(v, int | float) and k != "epoch"}
        numbers |= {f"val/{k}": v for k, v in values.get("val", {}).items()}
        try:
            self.folder.scalars(self.steps, numbers)
        except OSError as error:
            self._charting = False
            self.progress.note(f"{self.folder}/events: cannot write ({error.strerror}); training goes on without")

    def replaced_images(self) -> dict[str, int]:
        """{"replaced": unreadable training images that others stood in for in this epoch, on all ranks}; {} where the
        source has no such thing. Every rank must call it."""
        count = getattr(self.source, "replaced", None)
        if count is None:
            return {}
        replaced = int(self.ranks.sum_(count.clone()))
        count.zero_()
        if replaced and replaced != self._replaced:
            self.progress.note(f"unreadable images replaced by others of their class in this epoch: {replaced}")
        self._replaced = replaced
        return {"replaced": replaced}

    def save_weights(self, name: str) -> None:
        """Write the model's weights to checkpoints/<name>.safetensors in the background."""
        if self.store is not None:
            meta = {"epoch": self.epoch, "model": self.config.model.model}
            self.store.save_weights(name, dict(self.model.state_dict()), meta)

    def load_weights(self, name: str) -> None:
        """Put a written checkpoint's weights into the model, on every rank."""

        def work() -> None:
            if self.folder is not None:
                checkpoint.load_into(self.model, self.folder.checkpoints / f"{name}.safetensors")

        self.ranks.on_main(work)
        self.ranks.broadcast_(self.flat.data)
        self.ranks.broadcast_(self.buffers.data)

    def save_state(self) -> None:
        """Everything `--resume` needs; written in the background while training goes on."""
        tensors, meta, shared = resume.capture(cast("Trainer", self))
        self.watch.saved()
        self.saved = self.steps, self.batch
        if self.store is not None and self.folder is not None:
            self.store.save_state(self.steps, tensors, meta, shared, before=self.folder.sync_log)
            if self.batch == 0:
                self.save_weights("last")  # after the state: a kill in between must not leave weights alone
            for problem in self.store.problems():
                self.progress.note(f"{problem}; training goes on, older checkpoints are intact")

    def load_state(self) -> None:
        """Continue from the newest whole training state; from the start if there has never been one.

        Raises:
            UserError: there is none, but weights, results or so many logged epochs that there has been one.
        """
        store = self.store = self._open_store()
        if self.folder is not None and store is not None:
            with contextlib.suppress(OSError):  # the first write will tell
                self.folder.prepare(self.config)
            store.clean()
        tensors, meta = self.ranks.on_main(lambda: store and store.load()) or (None, None)
        meta = self.ranks.share(meta)
        if meta is None:
            self.ranks.on_main(self._check_unsaved)
            cast("Trainer", self).take_bank()
        else:
            resume.restore(cast("Trainer", self), self.ranks.tensors(tensors, kept=resume.HELD), meta)
        self.resumed = True
        if self.folder is None:
            return
        if meta is None and self.folder.metrics("epoch"):
            self.progress.note(f"what the run has logged so far is kept in {self.folder.set_metrics_aside()}")
        elif lost := self.folder.cut_metrics(meta["metrics"] if meta else 0):
            self.progress.note(
                f"{self.folder}/metrics.jsonl: lacks {counted(lost, 'byte')} that were there when the checkpoint was "
                "written; rows of earlier epochs are missing"
            )
        if changed := self.folder.changed_environment(self.config):
            self.log("env", epoch=self.epoch, **changed)
            told = ", ".join(f"{name} {value}" for name, value in sorted(changed.items()))
            self.progress.note(f"goes on with other than env.json says: {told}")

    def _check_unsaved(self) -> None:
        """UserError if the run has got as far as its first training state: without one it would be trained again."""
        if self.folder is None:
            return
        run, weights, done = self.folder, self.folder.last.exists(), len(self.folder.metrics("epoch"))
        # The first state may have been lost with its process: it is on the disk before weights are, and before the second
        # one, which follows the log of its epoch, is begun.
        if weights or done > 2 * self.config.run.checkpoint_every or self.folder.metrics("test"):
            raise UserError(
                f"--resume {run}: it has trained for {counted(done, 'epoch')}, but no training state (state-*) is in "
                "checkpoints/; going on would start again"
                + (
                    f" and overwrite its weights{run.progress('last')}, which `ltfast eval {run}` evaluates"
                    if weights
                    else ""
                )
                + f". Start a new run: ltfast train --config {run}/config.toml --out NEW"
            )
