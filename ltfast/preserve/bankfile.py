"""A memory bank on disk: a folder with one safetensors file a snapshot and an index that is replaced last.

A snapshot never changes, so saving after an epoch writes that epoch's snapshot alone: 100 MB for a ResNet-50, not the
10 GB that a whole bank of 100 snapshots holds. A crash at any moment leaves the old index with all its snapshots.
"""

import os
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ltfast.errors import UserError
from ltfast.preserve.bank import MemoryBank

INDEX = "index.safetensors"


class BankFolder:
    """Saves one bank into `folder`, which is made if need be, or loads from it.

    Files that this object has neither written nor read are never trusted: they are written again, so that a run resumed
    from an older state cannot pick up a later run's snapshot of the same number.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._known: set[str] = set()

    def save(self, bank: MemoryBank) -> int:
        """Write what is new, then the index, then remove what no class refers to; returns the files written."""
        self.folder.mkdir(parents=True, exist_ok=True)
        state = bank.state_dict()
        large = {k: v for k, v in state.items() if k == "origin" or k.startswith("snapshot.")}
        new = [k for k in large if k not in self._known]
        for name in new:
            self._write(f"{name}.safetensors", {name: large[name]})
        self._write(INDEX, {k: v for k, v in state.items() if k not in large})
        self._known = set(large)
        keep = {INDEX, *(f"{name}.safetensors" for name in large)}
        for path in self.folder.glob("*.safetensors"):
            if path.name not in keep:
                path.unlink()
        return len(new) + 1

    def load(self, bank: MemoryBank) -> None:
        """Fill `bank`. Raises UserError, naming the file, if one is missing or damaged or is of another model."""
        state = self._read(INDEX)
        if "epochs" not in state:
            raise UserError(f"{self.folder / INDEX} is not the index of a memory bank; give the folder of one")
        names = [f"snapshot.{i}" for i, _ in state["epochs"].tolist()]
        if (self.folder / "origin.safetensors").exists():
            names.append("origin")
        for name in names:
            state |= self._read(f"{name}.safetensors")
        bank.load_state_dict(state)
        self._known = set(names)

    def _write(self, name: str, tensors: dict[str, Tensor]) -> None:
        partial = self.folder / f"{name}.partial"
        save_file(tensors, partial)
        os.replace(partial, self.folder / name)

    def _read(self, name: str) -> dict[str, Tensor]:
        path = self.folder / name
        try:
            return load_file(path)
        except FileNotFoundError:
            raise UserError(f"{path} is missing: {self.folder} is not a whole memory bank; use another run's") from None
        except SafetensorError as error:
            raise UserError(f"{path} is damaged ({error}); use another run's memory bank") from None
