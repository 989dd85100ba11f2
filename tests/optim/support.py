"""Small networks, batches and closures for the optimizer tests."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ltfast.losses import cross_entropy, group_losses, membership_for

CLASSES = 5
COUNTS = torch.tensor([200, 90, 40, 12, 5])
GROUP_OF_CLASS = torch.tensor([0, 0, 1, 2, 2])
GROUP_COUNTS = [290.0, 40.0, 17.0]
SGD = (torch.optim.SGD, {"lr": 0.01, "momentum": 0.9, "weight_decay": 1e-3})
# eps: gradients that are zero but for rounding (biases of attention keys) must not become steps of full size.
ADAMW = (torch.optim.AdamW, {"lr": 3e-3, "weight_decay": 1e-2, "eps": 1e-3})

BASES = {"sgd": SGD, "adamw": ADAMW, "rmsprop": (torch.optim.RMSprop, {"lr": 1e-3, "momentum": 0.9})}


def mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 17), nn.Tanh(), nn.Linear(17, CLASSES))


def conv() -> nn.Module:
    """With BatchNorm, odd channel counts."""
    return nn.Sequential(
        nn.Conv2d(3, 7, 3, padding=1, bias=False), nn.BatchNorm2d(7), nn.ReLU(),
        nn.Conv2d(7, 9, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(9), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(9, CLASSES),
    )  # fmt: skip


class ViT(nn.Module):
    """Patches of 4, two transformer layers of width 12."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 12, 4, stride=4)
        self.position = nn.Parameter(torch.randn(1, 4, 12) * 0.1)
        layers = [nn.TransformerEncoderLayer(12, 3, 24, 0.0, "gelu", batch_first=True) for _ in range(2)]
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        z = self.patches(x).flatten(2).transpose(1, 2) + self.position
        return self.head(self.layers(z).mean(1))


MODELS: dict[str, Callable[[], nn.Module]] = {"mlp": mlp, "conv": conv, "vit": ViT}


def make(name: str = "mlp", seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return MODELS[name]()


def batch(step: int = 0, size: int = 30, missing: int | None = None) -> tuple[Tensor, Tensor]:
    """A batch of the step's own, every class in it but `missing`."""
    generator = torch.Generator().manual_seed(1000 + step)
    y = torch.arange(size) % CLASSES
    if missing is not None:
        y = torch.where(y == missing, 0, y)
    x = torch.randn(size, 3, 8, 8, generator=generator) + 0.3 * y.float().view(-1, 1, 1, 1)
    return x, y


def autocast(precision: str) -> AbstractContextManager[Any]:
    return torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else nullcontext()


def loss_of(model: nn.Module, step: int, precision: str = "fp32", size: int = 30) -> Tensor:
    x, y = batch(step, size)
    with autocast(precision):
        out = model(x)
    return F.cross_entropy(out.float(), y)


def table(kind: str) -> Tensor:
    return membership_for(kind, COUNTS, GROUP_OF_CLASS, eta=20)


def watched_closure(
    optimizer: Any, closure: Callable[[], tuple[Tensor, Tensor]]
) -> tuple[Callable[[], tuple[Tensor, Tensor]], list[Tensor]]:
    """The closure, and the list of weights (of the first block) at which it has been called."""
    seen: list[Tensor] = []

    def watched() -> tuple[Tensor, Tensor]:
        seen.append(optimizer.blocks[0].flat.data.clone())
        return closure()

    return watched, seen


def group_closure(
    model: nn.Module,
    step: int,
    kind: str = "groups",
    precision: str = "fp32",
    size: int = 30,
    missing: int | None = None,
) -> Callable[[], tuple[Tensor, Tensor]]:
    x, y = batch(step, size, missing)

    def closure() -> tuple[Tensor, Tensor]:
        with autocast(precision):
            out = model(x)
        return group_losses(cross_entropy(out, y), table(kind)[y])

    return closure


def two_passes(model: nn.Module, optimizer: Any, step: int, precision: str = "fp32") -> None:
    """davda54's protocol."""
    loss_of(model, step, precision).backward()
    optimizer.first_step(zero_grad=True)
    loss_of(model, step, precision).backward()
    optimizer.second_step(zero_grad=True)


def clone(model: nn.Module, name: str) -> nn.Module:
    copy = make(name)
    copy.load_state_dict(model.state_dict())
    return copy


def distance(a: nn.Module, b: nn.Module) -> float:
    """Largest difference of two parameters."""
    return max(float((p - q).detach().abs().max()) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def last_layer(model: nn.Module) -> nn.Module:
    return model.head if isinstance(model, ViT) else model[-1]


def classifier_groups(model: nn.Module) -> list[dict[str, Any]]:
    head = last_layer(model)
    own = set(head.parameters())
    return [
        {"params": [p for p in model.parameters() if p not in own]},
        {"params": list(head.parameters()), "classifier": True},
    ]


def counted(model: nn.Module) -> Callable[[], int]:
    """How often the model ran."""
    calls = [0]

    def count(*_: Any) -> None:
        calls[0] += 1

    model.register_forward_hook(count)
    return partial(lambda c: c[0], calls)


def bits(model: nn.Module) -> list[Tensor]:
    return [p.detach().view(torch.int32).clone() for p in model.parameters()]


def same_bits(model: nn.Module, before: list[Tensor]) -> bool:
    return all(torch.equal(p.detach().view(torch.int32), b) for p, b in zip(model.parameters(), before, strict=True))
