"""Device memory that a step needs, estimated without a device, and what to tell a user whose batch does not fit.

What autograd keeps for backward is a sum of tensors of sizes 1, B and B^2 (BalSCL's similarities), so three small batches
of fake tensors give it for every B. A compiled step keeps less, so this is an upper bound.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ltfast.data.small import SmallSource
from ltfast.errors import UserError
from ltfast.models import LongTailModel
from ltfast.objective import Autocast, Objective

if TYPE_CHECKING:
    from ltfast.train import Trainer

GIB = 1 << 30
PROBES = (4, 8, 16)
LARGE_SIDE = 64  # pixels
# Gradients of activations, convolution workspaces and what the allocator cannot use come on top of what autograd keeps.
OVERHEAD = 1.25


@dataclass(frozen=True)
class Activations:
    """Bytes that a forward pass of B images keeps for backward: constant + linear * B + square * B^2."""

    constant: float
    linear: float
    square: float

    def at(self, batch: int) -> float:
        """Bytes for a batch."""
        return self.constant + self.linear * batch + self.square * batch * batch

    def largest(self, room: float) -> int:
        """The largest batch whose bytes do not exceed `room`; 0 if there is none."""
        low, high = 0, 1
        while self.at(high) <= room and high < 1 << 40:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.at(middle) <= room else (low, middle)
        return low


class _Losses(nn.Module):
    """The losses of a step as a module, so that its parameters can be replaced by fakes."""

    def __init__(self, model: LongTailModel, objective: Objective) -> None:
        super().__init__()
        self.model, self.objective = model, objective

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        features = self.model.features(x)
        z = self.model.project(features[labels.numel() :]) if self.objective.kind == "bcl" else None
        return self.objective(self.model, features, z, labels).mean()


def activations(
    model: LongTailModel, objective: Objective, input_shape: tuple[int, int, int], autocast: Autocast = nullcontext
) -> Activations:
    """Measured on fake tensors: nothing is computed or allocated, whatever the model's size. The model is left alone."""
    b = torch.tensor(PROBES, dtype=torch.float64)
    kept = [kept_bytes(model, objective, n, input_shape, autocast) for n in PROBES]
    powers = torch.stack([torch.ones_like(b), b, b * b], 1)
    fit = torch.linalg.solve(powers, torch.tensor(kept, dtype=torch.float64)).clamp_min(0)
    return Activations(*fit.tolist())


def kept_bytes(
    model: LongTailModel,
    objective: Objective,
    batch: int,
    input_shape: tuple[int, int, int],
    autocast: Autocast = nullcontext,
    *,
    fake: bool = True,
) -> int:
    """Bytes of the tensors that autograd keeps for one forward pass, parameters not counted; fake: without memory."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    storages: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        storages.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    _ = objective.prior  # asks the device once, which a fake one cannot answer
    losses, device = _Losses(model, objective), next(model.parameters()).device
    with FakeTensorMode(allow_non_fake_inputs=True) if fake else nullcontext() as mode:
        state = dict(losses.named_parameters()) | dict(losses.named_buffers())
        if mode is not None:
            state = {name: mode.from_tensor(value) for name, value in state.items()}
        own = {t.untyped_storage()._cdata for t in state.values()}
        labels = torch.zeros(batch, dtype=torch.int64, device=device)
        x = torch.empty(batch * objective.n_views, *input_shape, device=device)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast():
            loss = torch.func.functional_call(losses, state, (x, labels))
        assert loss.requires_grad
        return sum(t.untyped_storage().nbytes() for key, t in storages.items() if key not in own)


def too_large(batch: int, need: Activations, state: float, room: float, device: str, *, world: int = 1) -> str:
    """The message for a batch that does not fit.

    Args:
        batch: global batch; every one of `world` processes takes its part.
        need: activations of one process's part.
        state, room: bytes of weights, gradients, optimizer state and data, and bytes that the process could have.
        device: its name.
    """
    local = -(-batch // world)
    activation = OVERHEAD * need.at(local)
    fits = need.largest((room - state) / OVERHEAD)
    # It did not fit, whatever the estimate says: then the largest batch is below this one by the overhead at least.
    fits = min(fits, int(local / OVERHEAD))
    step = 8 if fits >= 64 else 1
    fits = fits // step * step * world
    remedy = (
        f"the largest batch that would fit is about {fits:,}: use --batch {fits}"
        if fits
        else "not even one image a process would fit: choose a smaller --model"
    )
    return (
        f"--batch {batch} does not fit on {device}: a step needs about {(state + activation) / GIB:.2f} GiB "
        f"({state / GIB:.2f} for weights, gradients, optimizer and data, {activation / GIB:.2f} for activations), "
        f"there are {room / GIB:.2f}; {remedy}"
    )


def out_of_memory(trainer: Trainer) -> str:
    """The message for a run whose device ran out of memory."""
    device, world = trainer.device, trainer.ranks.world
    need = activations(trainer.model, trainer.objective, trainer.source.input_shape, trainer.forward.autocast)
    free, _ = torch.cuda.mem_get_info(device)
    room = free + torch.cuda.memory_reserved(device)
    name = f"{device} ({torch.cuda.get_device_name(device)})"
    return too_large(trainer.config.data.batch, need, state_bytes(trainer), room, name, world=world)


def check_main_memory(trainer: Trainer) -> None:
    """UserError where a step on the CPU cannot fit: there the system ends the process without a word. Large pictures only,
    of which a few are gigabytes."""
    config, shape = trainer.config, trainer.source.input_shape
    if trainer.device.type != "cpu" or shape[-1] < LARGE_SIDE or config.run.compile == "on":
        return
    world = trainer.ranks.world
    need = activations(trainer.model, trainer.objective, shape, trainer.forward.autocast)
    room = available_memory() / world
    if need.at(-(-config.data.batch // world)) > room:
        state = state_bytes(trainer)
        raise UserError(too_large(config.data.batch, need, state, room + state, "the CPU", world=world))


def available_memory() -> float:
    """Bytes of main memory and swap that programs may still take; infinite where the system does not tell."""
    sizes = meminfo()
    return sizes["MemAvailable"] + sizes.get("SwapFree", 0) if "MemAvailable" in sizes else math.inf


def meminfo() -> dict[str, int]:
    """Linux's own figures of main memory (MemTotal, MemAvailable, SwapFree, ...) in bytes; {} elsewhere."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return {}
    return {
        name: 1024 * int(value.split()[0])
        for name, _, value in (line.partition(":") for line in lines)
        if value.endswith("kB")
    }


def state_bytes(trainer: Trainer) -> int:
    """Bytes of what stays on the device: weights, gradient rows, optimizer state, anchor, data."""
    flat = trainer.flat
    tensors = [flat.data, flat.grads, *trainer.update.slots, *(trainer.update.anchor or ())]
    if trainer.step.engine is not None:
        tensors.append(trainer.step.engine.kept)
    if isinstance(trainer.source, SmallSource):
        tensors += [*trainer.source.images.values(), *trainer.source.labels.values()]
    return sum(t.numel() * t.element_size() for t in tensors if t.device == flat.data.device)
