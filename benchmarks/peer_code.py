"""Surroundings in which other people's training code runs as it is. Each function returns None where the code is not there,
else a maker of `run(n)`, which takes n steps. SGD is foreach, as torch chooses on CUDA, also where it is counted on a CPU.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import importlib.util
import io
import logging
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock, patch

import peers
import torch
import torch.nn.functional as F
from peer_setting import BASE, CLASSES, COUNTS, GROUPS, Setting
from torch import Tensor, nn

Run = Callable[[int], object]


def function_of(path: Path, name: str, space: dict[str, Any]) -> Callable[..., Any]:
    """Function `name` of a file, without running the rest of the file; `space`: the globals it reads."""
    body: list[ast.stmt] = [
        n for n in ast.parse(path.read_text()).body if isinstance(n, ast.FunctionDef) and n.name == name
    ]
    if not body:
        raise SystemExit(f"--peer: {path} defines no function {name}")
    exec(compile(ast.Module(body, []), str(path), "exec"), space)
    return space[name]


def composer_steps(setting: Setting, paths: dict[str, Path]) -> Callable[[], Run] | None:
    """Composer's SAM: its optimizer asks for a closure that runs forward and backward, as Composer's trainer gives it."""
    if "composer" in paths:
        kind = peers.class_of(paths["composer"], "SAMOptimizer")
    elif importlib.util.find_spec("composer"):
        kind = importlib.import_module("composer.algorithms.sam").SAMOptimizer
    else:
        return None

    def make() -> Run:
        model, batch = setting.model("ce"), setting.batch
        optimizer = kind(torch.optim.SGD(model.parameters(), **BASE, foreach=True), rho=0.05)

        def closure(**_: Any) -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(batch.views[0]), batch.labels)
            loss.backward()
            return loss

        def run(n: int) -> None:
            for _ in range(n):
                optimizer.step(closure)

        return run

    return make


def timm_steps(setting: Setting, paths: dict[str, Path]) -> Callable[[], Run] | None:
    """timm's training loop (train_one_epoch of its train.py, by path) with its task and SGD; plain cross-entropy."""
    if "timm" not in paths or not importlib.util.find_spec("timm"):
        return None
    import timm.optim
    import timm.task
    import timm.utils

    space = {
        "torch": torch, "utils": timm.utils, "suppress": contextlib.suppress, "time": time, "OrderedDict": OrderedDict,
        "_logger": logging.getLogger("timm"), "os": MagicMock(), "torchvision": MagicMock(),
    }  # fmt: skip
    epoch = function_of(paths["timm"], "train_one_epoch", space)
    args = MagicMock(
        mixup_off_epoch=0, prefetcher=False, distributed=False, grad_accum_steps=1, channels_last=False, clip_grad=None,
        synchronize_step=False, log_interval=10**9, recovery_interval=0, save_images=False, world_size=1,
    )  # fmt: skip

    def make() -> Run:
        model, batch, device = setting.model("ce"), setting.batch, setting.device
        task = timm.task.ClassificationTask(model, criterion=nn.CrossEntropyLoss(), device=device, verbose=False)
        optimizer = timm.optim.create_optimizer_v2(model, opt="momentum", **BASE, foreach=True)
        pair = (batch.views[0], batch.labels)
        return lambda n: epoch(0, model, [pair] * n, optimizer, args, task=task, device=device)

    return make


@contextmanager
def without_cuda() -> Iterator[None]:
    """Inside, moving to CUDA does nothing, for code that does so unasked; Tensor.cpu, which would wait, is counted."""
    given = torch.Tensor.cpu

    def cpu(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not self.requires_grad and self.numel():
            self.reshape(-1)[0].item()  # the wait that a GPU would see
        return given(self, *args, **kwargs)

    stay = lambda self, *args, **kwargs: self  # noqa: E731
    with (
        patch.object(torch.Tensor, "cuda", stay), patch.object(nn.Module, "cuda", stay),
        patch.object(torch.Tensor, "cpu", cpu), patch.object(torch.cuda, "FloatTensor", torch.FloatTensor),
    ):  # fmt: skip
        yield


class Released:
    """The authors' released train() on one network, with its losses, optimizer and defaults.

    Call `prepare` before `train`; between them the network may be made from `code`, inside `around`.
    """

    def __init__(self, path: Path, device: torch.device) -> None:
        self.code, self.on_cpu = imported(self.script(path)), device.type == "cpu"

    @staticmethod
    def script(path: Path) -> Path:
        """The script with train(), of the release's folder or of a file in it."""
        return (path if path.is_dir() else path.parent) / "cifar_OneBackward.py"

    @contextmanager
    def around(self) -> Iterator[None]:
        """What its code needs around it."""
        with without_cuda() if self.on_cpu else contextlib.nullcontext(), contextlib.redirect_stdout(io.StringIO()):
            yield

    def prepare(
        self, network: nn.Module, sgd: torch.optim.SGD, counts: list[int], groups: list[list[int]], anchors: dict[int, Any],
        *, a_ce: float = 2.0, a_scl: float = 0.6, temperature: float = 0.1,
    ) -> None:  # fmt: skip
        """network: pictures [3B, ...] -> (z, logits, centres); counts: images of each class; anchors: see `anchor`."""
        self.network, self.anchors = network, anchors
        with self.around():
            self.losses = self.code.LogitAdjust(counts), self.code.BalSCL(counts, temperature)
        self.optimizer = self.code.GSA(network.parameters(), sgd, adaptive=True, rho_scale_C=0.1)
        self.gammas = dict.fromkeys(range(len(groups)), 10.0)
        self.args = SimpleNamespace(
            groups=groups, gpu="cpu" if self.on_cpu else 0, cls_num=len(counts), alpha=a_ce, beta=a_scl, print_freq=10**9,
            cls_num_list=counts,
        )  # fmt: skip

    def train(self, loader: Any, alpha: float) -> None:
        """One epoch over what gives ([view 1, view 2, view 3], labels)."""
        with self.around():
            self.code.train(
                loader,
                self.network,
                *self.losses,
                self.optimizer,
                0,
                self.args,
                MagicMock(),
                self.anchors,
                self.gammas,
                alpha,
            )


def release_steps(setting: Setting, paths: dict[str, Path]) -> Callable[[], Run] | None:
    """The released train() with anchors for GROUPS groups (its default of one group leaves nothing to do)."""
    if "release" not in paths or not Released.script(paths["release"]).exists():
        return None

    def make() -> Run:
        released = Released(paths["release"], setting.device)
        with released.around():
            model = released.code.ResNet32Model(CLASSES, use_norm=True, classifier=True).to(setting.device)
        sgd = torch.optim.SGD(model.parameters(), **BASE, foreach=True)
        groups = [torch.nonzero(setting.groups == k).flatten().tolist() for k in range(GROUPS)]
        anchors = {k: anchor(model, sum(COUNTS[c].item() for c in group)) for k, group in enumerate(groups)}
        released.prepare(model, sgd, COUNTS.tolist(), groups, anchors)
        data = (list(setting.batch.views), setting.batch.labels)
        return lambda n: released.train([data] * n, 0.9)

    return make


def anchor(model: nn.Module, images: int) -> dict[str, Any]:
    """An anchor as the release keeps it: Fisher and weights of the backbone by name."""
    names = {n: p.detach() for n, p in model.named_parameters() if "linear" not in n and "fc" not in n}
    return {
        "fim": {n: torch.rand_like(p) for n, p in names.items()}, "theta_star": {n: p.clone() for n, p in names.items()},
        "n_j": images,
    }  # fmt: skip


def imported(script: Path) -> ModuleType:
    """The module of a script whose folder holds what it imports; packages that only log are stood in for."""
    if "tensorboardX" not in sys.modules and not importlib.util.find_spec("tensorboardX"):
        sys.modules["tensorboardX"] = MagicMock()
    with patch.object(sys, "path", [str(script.parent), *sys.path]):
        spec = importlib.util.spec_from_file_location("released_train", script)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module
