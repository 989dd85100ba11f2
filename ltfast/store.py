"""The checkpoints of one run: rotating training states written by a background thread while training goes on.

    checkpoints/state-000001234.safetensors    everything that determines the rest of the run, after 1,234 steps
    checkpoints/shared/<name>-<digest>.safetensors    tensors that never change (bank snapshots, anchors): stored once
    checkpoints/last.safetensors, best.safetensors    weights

A state names the shared files it needs; they are on the disk before it is, and go when no kept state names them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ltfast import checkpoint
from ltfast.errors import UserError

STATE = "state-{:09d}.safetensors"
SHARED = "shared"
MARKED = "epoch-"  # what the weights of an epoch in mid-run are called
DIGITS = 16  # hex digits of a shared file's checksum that its name shows


class Store:
    """Writes and reads the checkpoints in `folder`, keeping the `keep` newest training states.

    Saving returns as soon as the values are copied (on CUDA: as soon as the copies are queued), and after what was saved of
    that kind before is written; hashing and writing happen in one background thread, in the order of the calls. A failed
    write keeps what was there before; `problems` tells, `flush` raises. Weights that could not be written are tried again
    with the next write. `note` receives a line for the user when a damaged state is passed over.
    """

    def __init__(self, folder: Path, *, keep: int = 2, note: Callable[[str], None] = print) -> None:
        if keep < 1:
            raise UserError(
                f"--keep-checkpoints {keep}: at least one training state must be kept for --resume; use 1 or more"
            )
        self.folder, self.keep, self.note = folder, keep, note
        self.written: str | None = None  # the newest state known to be whole
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._jobs: dict[str, Future[None]] = {}  # the last one of each kind
        self._failed: dict[str, str] = {}  # by kind, until that kind is written again
        self._told: set[str] = set()
        self._again: dict[str, Callable[[], object]] = {}  # writes of weights that have failed
        self._pinned: dict[tuple[str, str], Tensor] = {}
        self._stored: dict[str, tuple[Tensor, str]] = {}  # shared tensors on the disk: the object and its file
        self._needs: dict[str, set[str]] = {}  # shared files of each state on the disk
        self._bad: set[str] = set()

    # -- writing -------------------------------------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        """True while something is still being written."""
        return any(not job.done() for job in self._jobs.values())

    def save_weights(self, name: str, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """Write `<name>.safetensors` (last, best) in the background."""
        self._submit(name, tensors, lambda host: checkpoint.save(self.folder / f"{name}.safetensors", host, meta))

    def save_state(
        self,
        steps: int,
        tensors: Mapping[str, Tensor],
        meta: Mapping[str, Any],
        shared: Mapping[str, Tensor] | None = None,
        before: Callable[[], object] | None = None,
    ) -> None:
        """Write the training state after `steps` steps in the background, then remove states beyond `keep`.

        shared: tensors that are never written to again; each object is stored once, however many states refer to it.
        before: called in the thread, ahead of the state: puts on the disk what the state refers to elsewhere.
        """
        self._settle("state")  # the one before may change what is stored
        constant = {
            name: tensor.detach().cpu() for name, tensor in (shared or {}).items() if not self._known(name, tensor)
        }
        objects = dict(shared or {})

        def job(host: dict[str, Tensor]) -> None:
            if before is not None:
                before()
            for name, tensor in constant.items():
                self._stored[name] = (objects[name], self._write_shared(name, tensor))
            files = {name: self._stored[name][1] for name in objects}
            name = STATE.format(steps)
            checkpoint.save(self.folder / name, host, {"run": dict(meta), "steps": steps, "shared": files})
            self.written = name
            self._needs[name] = set(files.values())
            self._bad.discard(name)
            self._stored = {k: v for k, v in self._stored.items() if k in objects}
            self._rotate()

        self._submit("state", tensors, job)

    def flush(self) -> None:
        """Wait until everything is written.

        Raises:
            UserError: the newest version of something could not be written (disk full, folder gone, ...); not of the weights
                of an epoch in mid-run (`epoch-7`), which only a report draws.
        """
        self._settle()
        if self._again:
            self._thread.submit(self._retry).result()
        failed = [text for kind, text in self._failed.items() if not kind.startswith(MARKED)]
        if failed:
            good = (
                f"the last good training state is {self.written}"
                if self.written
                else "no training state was written yet"
            )
            raise UserError(f"{failed[0]}; {good}")

    def problems(self) -> list[str]:
        """One line for each failed write that was not reported yet; training may go on, the older files are intact."""
        new = [text for kind, text in list(self._failed.items()) if kind not in self._told]
        self._told |= set(self._failed)
        return new

    def close(self) -> None:
        """Finish what is being written; never raises for a full disk (see `flush`)."""
        self._thread.shutdown(wait=True)

    def _settle(self, *kinds: str) -> None:
        """Wait for the jobs of these kinds (none given: of all); what others have ended with is seen, too."""
        for kind, job in list(self._jobs.items()):
            if not kinds or kind in kinds or job.done():
                del self._jobs[kind]
                job.result()

    def _submit(self, kind: str, tensors: Mapping[str, Tensor], write: Callable[[dict[str, Tensor]], object]) -> None:
        self._settle(kind)  # at most one version of anything waits in memory
        if kind in self._again:  # its memory is read by whatever job comes next
            self._settle()
        host, event = self._to_host(kind, tensors)

        def work() -> None:
            if event is not None:
                with torch.cuda.device(event.device):  # a thread begins on GPU 0, which may be another's
                    event.synchronize()
            self._again.pop(kind, None)
            self._try(kind, lambda: write(host))  # a state before the weights that wait: see Durable.save_state
            self._retry(but=kind)

        self._jobs[kind] = self._thread.submit(work)

    def _try(self, kind: str, write: Callable[[], object]) -> None:
        try:
            write()
            self._failed.pop(kind, None)
            self._told.discard(kind)
            self._again.pop(kind, None)
        except OSError as error:
            self._failed[kind] = f"{self.folder}: cannot write the {kind} checkpoint: {error.strerror or error}"
            if kind != "state":  # a later state stands in for it
                self._again[kind] = write

    def _retry(self, but: str | None = None) -> None:
        for kind, write in list(self._again.items()):
            if kind != but:
                self._try(kind, write)

    def _to_host(self, kind: str, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], torch.cuda.Event | None]:
        """Copies on the host, and the event after which those that come from a GPU are there."""
        host, device = {}, None
        for name, tensor in tensors.items():
            tensor = tensor.detach()
            if not tensor.is_cuda:
                host[name] = tensor.clone(memory_format=torch.contiguous_format)
                continue
            buffer = self._pinned.get((kind, name))
            if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
                buffer = self._pinned[kind, name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            # Stream order: later updates of the tensor run after this copy, and the host does not wait for it.
            buffer.copy_(tensor, non_blocking=True)
            host[name], device = buffer, tensor.device
        if device is None:
            return host, None
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(device))  # the copies', whatever device is the current one
        return host, event

    def _known(self, name: str, tensor: Tensor) -> bool:
        return name in self._stored and self._stored[name][0] is tensor

    def _write_shared(self, name: str, tensor: Tensor) -> str:
        folder = self.folder / SHARED
        folder.mkdir(exist_ok=True)
        tensors = {"data": tensor.contiguous()}
        file = f"{name}-{checkpoint.digest_of(tensors, '{}')[:DIGITS]}.safetensors"
        checkpoint.save(folder / file, tensors, {})
        return file

    def _rotate(self) -> None:
        good = [path for path in self.states() if path.name not in self._bad]
        keep = {path.name for path in good[: self.keep]}
        for path in self.states():
            if path.name not in keep:
                path.unlink(missing_ok=True)
                self._needs.pop(path.name, None)
        needed = set().union(*(self._needs_of(path) for path in good[: self.keep]))
        for path in (self.folder / SHARED).glob("*.safetensors"):
            if path.name not in needed:
                path.unlink(missing_ok=True)

    def _needs_of(self, path: Path) -> set[str]:
        if path.name not in self._needs:
            self._needs[path.name] = set(checkpoint.load_meta(path).get("shared", {}).values())
        return self._needs[path.name]

    # -- reading -------------------------------------------------------------------------------------------------------

    def states(self) -> list[Path]:
        """The training states on the disk, newest first."""
        return sorted(self.folder.glob("state-*.safetensors"), reverse=True)

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The newest whole training state (tensors, meta), or None if there has never been one.

        A damaged or unreadable state is passed over with a note.

        Raises:
            UserError: there are states, and every one is damaged.
        """
        problem, states = None, self.states()
        for path in states:
            try:
                result = self._read(path)
            except UserError as error:
                problem = error
                self._bad.add(path.name)
                if path != states[-1]:
                    self.note(f"{error}; falling back to the checkpoint before it")
                continue
            self.written = path.name
            return result
        if problem is not None:
            raise UserError(
                f"{self.folder}: every training state is damaged or unreadable ({problem}); start a new run with: "
                f"ltfast train --config {self.folder.parent}/config.toml --out NEW"
            )
        return None

    def _read(self, path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, meta = checkpoint.load(path)
        if "run" not in meta:
            raise UserError(f"{path}: not a training state")
        for name, file in meta["shared"].items():
            if Path(file).name != file:
                raise UserError(f"{path}: names a shared file outside its folder ({file!r})")
            tensors[name] = checkpoint.load(self.folder / SHARED / file)[0]["data"]
            self._stored[name] = (tensors[name], file)
        self._needs[path.name] = set(meta["shared"].values())
        return tensors, meta["run"]

    def clean(self) -> None:
        """Remove the unfinished files that a killed process left; call when no other process writes here."""
        for folder in (self.folder, self.folder / SHARED):
            remove(path for path in folder.glob(f".*{checkpoint.PART}"))


def remove(paths: Iterable[Path]) -> None:
    """Unlink, ignoring what is already gone or not ours to remove."""
    for path in paths:
        try:
            os.unlink(path)
        except OSError:
            continue
