"""Other people's optimizers beside ours: what their optimizer part costs a step, on the parameters of a ResNet.

    git -C davda54-sam show HEAD:sam.py > /tmp/sam.py                      # any file that defines the class
    python benchmarks/peers.py --peer davda54=/tmp/sam.py --peer release=... --peer fsam=... --write

A step is everything but forward and backward: gradients come from a stand-in that costs nothing, the same for all. Counted
on the CPU: kernels (operators dispatched; ours: kernels launched on a GPU plus operators dispatched, autograd's additions
to gradients that live in one buffer included), passes over the parameters, waits of the host, memory kept beyond the
parameters, backward passes asked for. Timed on any device, all in turns, with gradients made before the clock starts:
seconds of a step (a mean over one period of the method) and their ratio to foreach operators in the same round. Peers are
given by path, or used if their package is installed; this file only adapts them.
"""

from __future__ import annotations

import argparse
import ast
import gc
import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import harness  # noqa: E402
import op_bench  # noqa: E402

from ltfast.kernels import counting  # noqa: E402
from ltfast.models import create_encoder  # noqa: E402
from ltfast.optim import GSA, SAM, FriendlySAM  # noqa: E402
from tests.syncs import Waits  # noqa: E402

GROUPS = 4
COUNTS = [1000, 300, 100, 30]
BASE = {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}
WARM_UP = 17  # steps
BASELINE = "torch/foreach-sam"
ON_CUDA: dict[str, Any] = {**BASE, "foreach": True}  # what torch chooses on CUDA, also where steps are counted on a CPU
Step = Callable[[], object]
Make = Callable[[list[nn.Parameter], "Losses"], Step]


class Losses:
    """Losses with given gradients: backward hands out tensors made beforehand, so that only the optimizer is counted.

    Attributes:
        stock: gradients that the next backward passes hand out as they are, for steps under the clock.
    """

    def __init__(self, params: list[nn.Parameter]) -> None:
        self.params = params
        self.grads = [[torch.randn_like(p) * 1e-2 for p in params] for _ in range(GROUPS)]
        self.stock: list[list[Tensor]] = []
        self.shares = torch.full((GROUPS,), 1 / GROUPS).to(params[0].device)

    def restock(self, steps: int) -> None:
        """Make gradients for so many steps."""
        count = steps * (GROUPS + 1)
        self.stock = [[grad.clone() for grad in self.grads[i % GROUPS]] for i in range(count)]

    def backward(self, k: int = 0) -> None:
        """self(k).backward(), or the same from stock."""
        if not self.stock:
            return self(k).backward()
        for p, grad in zip(self.params, self.stock.pop(), strict=True):
            p.grad = grad

    def __call__(self, k: int = 0) -> Tensor:
        """A scalar whose gradient is row k."""
        return Given.apply(self.grads[k : k + 1], self.stock, *self.params)[0]

    def groups(self) -> tuple[Tensor, Tensor]:
        """(group losses [G], shares [G])."""
        return Given.apply(self.grads, self.stock, *self.params), self.shares


class Given(torch.autograd.Function):
    """Losses of 1 with given gradients."""

    @staticmethod
    def forward(ctx: Any, rows: list[list[Tensor]], stock: list[list[Tensor]], *params: Tensor) -> Tensor:
        ctx.rows, ctx.stock = rows, stock
        return torch.ones(len(rows), device=params[0].device)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        if ctx.stock:
            return None, None, *ctx.stock.pop()
        with _disable_current_modes():  # fresh tensors, as autograd's own are, but not counted
            return (
                None,
                None,
                *(torch.tensordot(upstream, torch.stack(column), 1) for column in zip(*ctx.rows, strict=True)),
            )


def two_steps(optimizer: Any, losses: Losses) -> Step:
    """The step of everything with davda54/sam's interface."""

    def step() -> None:
        losses.backward(0)
        optimizer.first_step(zero_grad=True)
        losses.backward(1)
        optimizer.second_step(zero_grad=True)

    return step


def release_step(optimizer: Any, losses: Losses) -> Step:
    """The released GSA: an ascent vector for each group, one aggregated ascent, a step."""

    def step() -> None:
        for k in range(GROUPS):
            losses.backward(k)
            optimizer.compute_group_ascent_vector(k, 1 / GROUPS, COUNTS[k])
            optimizer.zero_grad()
        optimizer.apply_global_ascent(zero_grad=True)
        losses.backward(0)
        optimizer.second_step(zero_grad=True)

    return step


def foreach_sam(params: list[nn.Parameter], losses: Losses) -> Step:
    """SAM as one would write it with torch's foreach operators and the fused SGD."""
    optimizer = torch.optim.SGD(params, **BASE, fused=True)

    def step() -> None:
        losses.backward(0)
        grads = [p.grad for p in params if p.grad is not None]
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
        eps = torch._foreach_mul(grads, 0.05 / (norm + 1e-12))
        with torch.no_grad():
            kept = torch._foreach_mul(params, 1.0)
            torch._foreach_add_(params, eps)
        optimizer.zero_grad()
        losses.backward(1)
        with torch.no_grad():
            torch._foreach_copy_(params, kept)
        optimizer.step()
        optimizer.zero_grad()

    return step


def compiled_sam(params: list[nn.Parameter], losses: Losses) -> Step:
    """SAM and momentum SGD in foreach operators, the ascent and the descent compiled."""
    momenta = [torch.zeros_like(p) for p in params]

    @torch.compile(dynamic=False)
    def climb(theta: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
        kept = torch._foreach_mul(theta, 1.0)
        torch._foreach_add_(theta, torch._foreach_mul(grads, 0.05 / (norm + 1e-12)))
        return kept

    @torch.compile(dynamic=False)
    def descend(theta: list[Tensor], kept: list[Tensor], grads: list[Tensor]) -> None:
        torch._foreach_copy_(theta, kept)
        torch._foreach_mul_(momenta, BASE["momentum"])
        torch._foreach_add_(momenta, torch._foreach_add(grads, theta, alpha=BASE["weight_decay"]))
        torch._foreach_add_(theta, momenta, alpha=-BASE["lr"])

    def grads_of(loss: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(loss, params))

    def step() -> None:
        with torch.no_grad():
            data = [p.data for p in params]
        kept = climb(data, grads_of(losses(0)))
        descend(data, kept, grads_of(losses(1)))

    return step


def ours() -> Iterator[tuple[str, Make, int]]:
    """(name, maker, backward passes) of our optimizers and the two one would write with torch alone."""
    sgd = torch.optim.SGD
    yield "ltfast/sam", lambda params, losses: two_steps(SAM(params, sgd, rho=0.05, **BASE), losses), 2
    yield "ltfast/friendly-sam", lambda params, losses: two_steps(FriendlySAM(params, sgd, rho=0.05, **BASE), losses), 2
    for every, backwards in ((1, GROUPS + 1), (16, 2 + (GROUPS - 1) / 16)):

        def make(params: list[nn.Parameter], losses: Losses, every: int = every) -> Step:
            optimizer = GSA(params, sgd, COUNTS, gram_every=every, **BASE)
            return lambda: optimizer.step(losses.groups)

        yield f"ltfast/gsa,gram_every={every}", make, backwards
    yield "torch/foreach-sam", foreach_sam, 2


def file_of(path: str | Path) -> Path:
    """The file that a path given for a peer means: of a folder, the optimizer in it, sam.py.

    Raises:
        SystemExit: there is none.
    """
    file = Path(path) / "sam.py" if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise SystemExit(f"{file}: no such file")
    return file


def paths_of(words: list[str]) -> dict[str, Path]:
    """{name: file} of `--peer name=path` options."""
    return {name: file_of(path) for name, _, path in (word.partition("=") for word in words)}


def class_of(path: Path, name: str) -> Any:
    """Class `name` of a file, without running the rest of the file (it may import what is not there)."""
    tree = ast.parse(path.read_text())
    body: list[ast.stmt] = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name]
    if not body:
        raise SystemExit(f"--peer: {path} defines no class {name}")
    space: dict[str, Any] = {"torch": torch, "__name__": path.stem}
    exec(compile(ast.Module(body, []), str(path), "exec"), space)
    return space[name]


def peers(paths: dict[str, Path]) -> Iterator[tuple[str, Make, int]]:
    """The same for code given by path and for installed packages."""
    sgd = torch.optim.SGD
    for name, wanted in (("davda54", "SAM"), ("fsam", "FriendlySAM")):
        if name in paths:
            kind = class_of(paths[name], wanted)
            yield (
                f"{name}/{wanted}",
                lambda p, losses, kind=kind: two_steps(kind(p, sgd, rho=0.05, **ON_CUDA), losses),
                2,
            )
    if "release" in paths:
        kind = class_of(paths["release"], "GSA")
        yield "release/GSA", lambda p, losses: release_step(kind(p, sgd(p, **ON_CUDA)), losses), GROUPS + 1
    if importlib.util.find_spec("pytorch_optimizer"):
        import pytorch_optimizer

        other = pytorch_optimizer.SAM
        yield "pytorch_optimizer/SAM", lambda p, losses: two_steps(other(p, sgd, rho=0.05, **ON_CUDA), losses), 2


def live_bytes() -> int:
    """Bytes of all storages that a tensor holds now."""
    gc.collect()
    found = (o for o in gc.get_objects() if type(o) in (Tensor, nn.Parameter))
    return sum({s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in found)}.values())


def prepared(make: Make, model: str, device: str) -> tuple[Step, Losses, int]:
    """(a step on fresh parameters of the network, its losses, bytes that lived before)."""
    torch.manual_seed(0)
    params = list(create_encoder(model, 3)[0].to(device).parameters())
    losses = Losses(params)
    before = live_bytes()
    return make(params, losses), losses, before


def measure(make: Make, model: str, device: str) -> dict[str, Any]:
    """Counted figures of one optimizer."""
    step, losses, before = prepared(make, model, device)
    n = sum(p.numel() for p in losses.params)
    for _ in range(WARM_UP):  # state is made, and one exact and many remembered Gram matrices pass
        step()
    with counting() as own, op_bench.DispatchCounter() as other, Waits() as waits:
        step()
    return {
        "kernels": own.kernels + other.kernels, "passes": round(own.passes + other.elements / n, 2),
        "syncs_per_step": sum(waits.found.values()), "extra_memory_per_parameter": round((live_bytes() - before) / (4 * n), 2),
    }  # fmt: skip


def measure_compiled(make: Make, model: str, device: str) -> dict[str, Any]:
    """The same for a compiled step: kernels are those that the compiler made, passes and waits are not counted.

    For a CPU the compiler makes at least one kernel a tensor; for a GPU it joins those of a list.
    """
    import torch._inductor.metrics as generated

    generated.reset()
    step, losses, before = prepared(make, model, device)
    for _ in range(3):
        step()
    n = sum(p.numel() for p in losses.params)
    return {
        "kernels": generated.generated_kernel_count,
        "extra_memory_per_parameter": round((live_bytes() - before) / (4 * n), 2),
    }


def clocked(makers: dict[str, Make], model: str, device: str, rounds: int) -> dict[str, dict[str, harness.Timing]]:
    """Seconds of a step of each, in turns, and their ratios to the baseline's: means over as many steps as the cost takes
    to repeat."""
    calls, stocks, periods = dict[str, Step](), dict[str, Step](), dict[str, int]()
    for name, make in makers.items():
        step, losses, _ = prepared(make, model, device)
        periods[name] = period = 16 if name.endswith("gram_every=16") else 1

        def run(step: Step = step, period: int = period) -> None:
            for _ in range(period):
                step()

        def restock(losses: Losses = losses, period: int = period) -> None:
            losses.restock(period)

        for _ in range(WARM_UP):
            step()
        calls[name], stocks[name] = run, restock
    found = harness.in_turns(calls, rounds, stocks)
    seconds = {name: [value / periods[name] for value in values] for name, values in found.items()}
    return harness.compared(seconds, BASELINE, "foreach")


def main() -> None:
    """Print a line an optimizer, append rows with --write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PATH", help="davda54, fsam or release")
    parser.add_argument("--model", default="resnet32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--compiled", action="store_true", help="also a compiled step (compiling takes a minute or two)"
    )
    parser.add_argument("--rounds", type=int, help="of the clock; 0: only count (default: 15, on a GPU 50)")
    parser.add_argument("--write", action="store_true", help="append rows to benchmarks/results/peers.jsonl")
    args = parser.parse_args()
    paths = paths_of(args.peer)
    compiled = (("torch.compile/foreach-sam", compiled_sam, 2),) if args.compiled else ()
    everyone = (*ours(), *peers(paths), *compiled)
    rounds = (50 if args.device == "cuda" else 15) if args.rounds is None else args.rounds

    def note(name: str, figures: dict[str, Any]) -> None:
        print(f"{name:30s}", figures, flush=True)
        config = {"model": args.model, "groups": GROUPS, "part": "optimizer", "threads": torch.get_num_threads()}
        for metric, value in figures.items() if args.write else ():
            more = {"n": value.n, "p20": value.p20, "p80": value.p80} if isinstance(value, harness.Timing) else {}
            value = value.median if isinstance(value, harness.Timing) else value
            harness.append_row("peers", f"{name}/{args.model}", metric, value, config=config, **more)

    for name, make, backwards in everyone if args.device == "cpu" else ():  # a GPU counts the same
        count = measure_compiled if make is compiled_sam else measure
        note(name, {**count(make, args.model, args.device), "backwards": round(backwards, 2)})
    makers = {name: make for name, make, _ in everyone}
    last = {name: makers.pop(name) for name, *_ in compiled}
    found = clocked(makers, args.model, args.device, rounds)
    for name, figures in found.items():
        note(name, figures)
    if last:  # by itself: compiling may outlast a time budget
        found = clocked({BASELINE: makers[BASELINE], **last}, args.model, args.device, rounds)
        for name in found.keys() & last.keys():
            note(name, found[name])


if __name__ == "__main__":
    main()
