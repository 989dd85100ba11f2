"""The run folder: a run describes itself (config.toml, env.json, metrics.jsonl, TensorBoard events, checkpoints/)."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import platform
import time
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch

from ltfast.checkpoint import PART, load_meta, write_atomically
from ltfast.config import Config, flag, load_toml
from ltfast.environment import environment
from ltfast.errors import UserError
from ltfast.places import absolute, short
from ltfast.text import composed, to_json, toml_of

if TYPE_CHECKING:
    from ltfast.data.base import Source
    from ltfast.events import Events

LOCK = "lock"


class RunFolder:
    """Paths and logs of one run.

    Attributes:
        unlocked: why `lock` could not lock it, or an empty string.
    """

    def __init__(self, path: Path) -> None:
        self.path = path = Path(os.path.abspath(path))  # the working folder may change
        self.checkpoints = path / "checkpoints"
        self.last = self.checkpoints / "last.safetensors"
        self.best = self.checkpoints / "best.safetensors"
        self.unlocked = ""
        self._lock: BinaryIO | None = None
        self._events: Events | None = None

    def __str__(self) -> str:
        """Its path, for a person."""
        return short(self.path)

    @staticmethod
    def create(config: Config) -> RunFolder:
        """Make the folder named by --out (or a fresh default one), lock it, and write config.toml and env.json.

        Raises:
            UserError: the folder exists and is not empty, or cannot be written; a path is not UTF-8, as config.toml must be.
        """
        text = toml_of(absolute(config).to_dict())
        try:
            content = text.encode()
        except UnicodeEncodeError as error:
            name = text[: error.start].rpartition("\n")[2].partition(" = ")[0]
            raise UserError(
                f"{flag(name)}: holds a byte that is not UTF-8, which config.toml cannot; use another path"
            ) from None
        folder = RunFolder(Path(config.run.out) if config.run.out else fresh_folder(config))
        folder.check_free()
        try:
            folder.path.mkdir(parents=True, exist_ok=True)
            folder.lock()
            folder.check_free()  # again: another process may have been between the first time and the lock
            # Whole and first: who finds it, however this process ends, may --resume.
            write_atomically(folder.path / "config.toml", [content])
            folder.prepare(config)
        except OSError as error:
            folder.close()
            raise cannot_write(folder.path, error) from None
        except UserError:
            folder.close()
            raise
        return folder

    def check_free(self) -> None:
        """UserError unless the path is free for a new run: nothing is there, or what a killed process left at once."""
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"--out {self}: is a file; choose a folder")
        if self.path.exists() and any(p.suffix != PART and p.name != LOCK for p in self.path.iterdir()):
            raise UserError(f"--out {self}: already exists; choose another folder or continue it with --resume {self}")

    def lock(self) -> None:
        """Keep every other process from training in this folder, until `close` or the end of this one, however it ends.

        The file RUN/lock stays behind and means nothing by itself: the lock is the operating system's. Where there is
        none (some network file systems, a full disk) `unlocked` says so.

        Raises:
            UserError: another process is training in it.
            OSError: the folder may not be written.
        """
        try:
            file = self._lock = open(self.path / LOCK, "ab+", buffering=0)  # noqa: SIM115
            # Not flock: forked loader workers would share it, and hold it for seconds after this process was killed.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
                raise
            self.unlocked = str(error.strerror)
            if error.errno == errno.EAGAIN:
                with file:
                    file.seek(0)
                    who = file.read().decode(errors="replace") or "another process"
                raise UserError(f"{self}: {who} is training in it; wait until it ends, or stop it") from None
            return
        with contextlib.suppress(OSError):  # a full disk
            file.truncate(0)
            file.write(f"process {os.getpid()} on {platform.node()}, since {time.strftime('%F %T')}".encode())

    @property
    def resumed_config(self) -> Config:
        """The config to go on with: the first weights are not read again where it holds weights of its own."""
        own = self.last.exists() or any(self.checkpoints.glob("state-*.safetensors"))
        return self.config.with_(weights=None) if own else self.config

    def trained_on(self) -> tuple[tuple[str, ...] | None, int | None]:
        """Classes and side of the pictures that its network was trained on; None, None where it is not noted how those were
        prepared."""
        row = self.data_row
        return (tuple(row["class_names"]), int(row["preprocess"]["size"])) if "preprocess" in row else (None, None)

    def check_classes(self, class_names: Sequence[str], what: str, remedy: str) -> None:
        """UserError, begun by `what` and ended by `remedy`, if the run's classes are not `class_names` in this order."""
        for c, (there, here) in enumerate(zip_longest(self.data_row.get("class_names", class_names), class_names)):
            if there is None or here is None or composed(there) != composed(here):
                raise UserError(f"{what}: class {c} is {there!r} there and {here!r} here; {remedy}")

    def check_held_out(self, source: Source, split: str, what: str) -> None:
        """UserError, begun by `what`, if `split` is drawn from the training pictures and these are not the run's own: a draw
        from one picture more or less holds out others, and most of those have been trained on."""
        drawn = {"test": source.test_from, "val": source.val_from}.get(split) == "train"
        row = self.data_row
        if drawn and row.get("fingerprint", source.fingerprint) != source.fingerprint:
            before, now = row["sizes"]["train"], source.sizes["train"]
            raise UserError(
                f"{what}: its {split} images are drawn from the training pictures, and those have changed ({before:,} images "
                f"to train on then, {now:,} now): it has been trained on some of them; bring the pictures back, or give a "
                f"data set with a {split} split of its own"
            )

    def as_trained(self, source: Source, split: str, what: str) -> None:
        """Give a source, of which `split` is to be evaluated, what the run had of its training pictures, whatever lies there
        now: how many of each class, and the mean and deviation that its network is used to.

        Raises:
            UserError: begun by `what`; its classes are others, see `check_held_out`, or its pictures have another shape.
        """
        self.check_classes(source.class_names, what, "give the data that the run was trained on")
        self.check_held_out(source, split, what)
        row = self.data_row
        if row:
            source.train_counts = torch.tensor(row["counts"], dtype=torch.int64)
        if used := row.get("preprocess"):
            channels, height, width = source.input_shape
            if (used["channels"], used["size"], used["size"]) != (channels, height, width):
                raise UserError(
                    f"{what}: trained on pictures of {used['size']} x {used['size']} pixels and {used['channels']} channels, these "
                    f"have {width} x {height} and {channels}; give the data that the run was trained on"
                )
            source.normalise(tuple(used["mean"]), tuple(used["std"]))

    @staticmethod
    def open(path: str | Path, *, lock: bool = False) -> RunFolder:
        """An existing run folder, locked if it is to be written.

        Raises:
            UserError: it is missing or holds no config.toml; another process is training in it; it cannot be written.
        """
        if not (Path(path) / "config.toml").is_file():
            raise UserError(f"{path}: not a run folder (no config.toml in it)")
        folder = RunFolder(Path(path))
        try:
            if lock:
                folder.lock()
        except OSError as error:
            raise UserError(
                f"--resume {path}: cannot write there ({error.strerror}), so nothing that it trains could be kept; make the folder "
                "writable, or resume a copy of it"
            ) from None
        return folder

    def prepare(self, config: Config) -> None:
        """Make what a process that was killed while it created the folder did not come to. OSError if it cannot."""
        self.checkpoints.mkdir(exist_ok=True)
        if not (self.path / "env.json").exists():
            env = environment(cpu=config.run.device == "cpu")
            write_atomically(self.path / "env.json", [json.dumps(env, indent=1).encode() + b"\n"])

    def changed_environment(self, config: Config) -> dict[str, Any]:
        """What is other here than where the run began, by the names of env.json; {} where that file cannot be read."""
        try:
            began = json.loads((self.path / "env.json").read_text())
        except (OSError, ValueError):
            return {}
        if not isinstance(began, dict):
            return {}
        now = environment(cpu=config.run.device == "cpu")
        return {name: now[name] for name in began.keys() & now.keys() - {"date"} if now[name] != began[name]}

    @property
    def config(self) -> Config:
        """The resolved config of the run."""
        path = self.path / "config.toml"
        values = load_toml(path)
        if not values:
            raise UserError(f"{path}: is empty, so the run's settings are not known; bring the file back from a copy")
        return Config.from_dict(values, str(path))

    def log(self, kind: str, **values: Any) -> None:
        """Append one line to metrics.jsonl."""
        line = (to_json({"kind": kind, **values}) + "\n").encode()
        with open(self.path / "metrics.jsonl", "ab", buffering=0) as file:
            size = file.tell()
            try:
                written = file.write(line)
                if written != len(line):  # the disk is full
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                with contextlib.suppress(OSError):
                    file.truncate(size)  # half a line would swallow the next one
                raise

    def metrics_bytes(self) -> int:
        """Length of metrics.jsonl."""
        path = self.path / "metrics.jsonl"
        return path.stat().st_size if path.exists() else 0

    def sync_log(self) -> None:
        """Put metrics.jsonl on the disk, ahead of a checkpoint that refers to its length."""
        with contextlib.suppress(OSError):  # losing a line of the log is no reason to lose a checkpoint
            handle = os.open(self.path / "metrics.jsonl", os.O_RDWR)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)

    def cut_metrics(self, size: int) -> int:
        """Drop what metrics.jsonl holds beyond `size` bytes: a resumed run writes those lines again. Returns how many of the
        `size` are missing after a power loss; of a line that it cut in two nothing stays."""
        if not self.metrics_bytes():
            return size
        with open(self.path / "metrics.jsonl", "r+b") as file:
            kept = file.read(size).rfind(b"\n") + 1
            file.truncate(kept)
        return size - kept

    def set_metrics_aside(self) -> Path:
        """Move the lines of metrics.jsonl to the end of metrics.jsonl.old; returns that file."""
        path, old = self.path / "metrics.jsonl", self.path / "metrics.jsonl.old"
        with open(old, "ab") as file:
            file.write(path.read_bytes())
        os.truncate(path, 0)
        return old

    def metrics(self, kind: str | None = None) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl, of one kind if given; a line cut short by a crash is left out."""
        path, rows = self.path / "metrics.jsonl", []
        for line in path.read_text().splitlines() if path.exists() else []:
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            if kind in (None, row.get("kind")):
                rows.append(row)
        return rows

    @property
    def data_row(self) -> dict[str, Any]:
        """What the run has noted of its data; empty before it did."""
        return next(reversed(self.metrics("data")), {})

    def weights(self, which: str) -> Path:
        """The file of `which` weights: last or best. UserError for the best of a run that had nothing to choose it by."""
        path = self.checkpoints / f"{which}.safetensors"
        if which == "best" and not path.exists() and not self.data_row.get("sizes", {"val": 1})["val"]:
            raise UserError(
                f"{path}: no such checkpoint; this run had no validation split, so none was chosen best; use --checkpoint last"
            )
        return path

    def progress(self, which: str) -> str:
        """How far a run that has not come to its end has trained `which` weights, as " (epoch 2 of 4)"; else ''."""
        epochs = self.config.optim.epochs
        done = self.epoch_of("last")
        if done is None or done >= epochs:
            return ""
        return f" (epoch {self.epoch_of(which) or '?'} of {epochs})"

    def epoch_of(self, which: str) -> int | None:
        """Epochs after which the `last` or `best` weights in the folder were written, if the file says so."""
        epoch = load_meta(self.weights(which)).get("epoch")
        return None if epoch is None else int(epoch)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Write TensorBoard scalars. OSError if the folder is gone or cannot be written."""
        self.path.stat()  # a folder that has vanished is not made anew
        if self._events is None:
            from ltfast.events import Events

            self._events = Events(self.path / "events", purge_step=step)
        self._events.scalars(step, values)

    def close(self) -> None:
        """Release the lock and close the TensorBoard events."""
        if self._lock is not None:
            self._lock.close()
        if self._events is not None:
            self._events.close()


def fresh_folder(config: Config) -> Path:
    """Make runs/<dataset>-<method>-s<seed>, with -2, -3, ... if taken. UserError if it cannot be made."""
    base = Path("runs") / f"{config.data.dataset}-{config.method}-s{config.run.seed}"
    path, n = base, 1
    try:
        base.parent.mkdir(exist_ok=True)
        while True:
            try:
                path.mkdir()
                return path
            except FileExistsError:
                n += 1
                path = base.with_name(f"{base.name}-{n}")
    except OSError as error:
        raise cannot_write(path, error) from None


def cannot_write(path: Path, error: OSError) -> UserError:
    """The UserError for a folder that cannot be made or written."""
    return UserError(f"--out {path}: cannot write there ({error.strerror}); choose another folder")
