"""A GPU that is not there, so that what a run does on one can be tested without one.

    with pretended_gpu() as gpu:      # torch.cuda.is_available(), one device, and --device cuda works
    stay(2)                           # for good, with two of them (in sitecustomize.py: in every process)

Tensors "on" it are CPU tensors that say that they are on cuda:0: values, views, changes in place and autograd are real, so
whole trainings run. What a GPU refuses is refused: tensors of both sides in one operation, numpy of its memory. A copy that
does not wait (`non_blocking`) arrives when something waits: until then the host's side holds rubbish, and the host's memory
must stay as it was. torch.compile compiles nothing, a CUDA graph is a tape (tape.py), a kernel its plain PyTorch form.
Between processes gloo stands in for NCCL. Not there: the order of several streams, inductor, Triton, NCCL, the speed.
"""

from __future__ import annotations

import threading
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

import ltfast.build
import ltfast.kernels.common
from tests.tape import Tape, TapeRecorder

natively = torch._C.DisableTorchFunctionSubclass  # inside, a tensor is what it really is
# What hands a value to Python, or has a shape that depends on values: the host waits.
WAITS = {
    "item", "tolist", "__bool__", "__int__", "__float__", "__index__", "__repr__", "nonzero", "unique",
    "masked_select", "unique_consecutive", "bincount", "repeat_interleave", "equal",
}  # fmt: skip
# What takes tensors of both sides.
BOTH_SIDES = {"type_as", "__getitem__", "__setitem__", "index_put_"}
RUBBISH = 111


class OnDevice(Tensor):
    """A tensor that says that it is on the GPU."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        assert Gpu.current is not None
        return Gpu.current.device

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True

    @property
    def is_cpu(self) -> bool:  # type: ignore[override]
        return False

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Outside of the mode: in another thread, or in a function that the mode calls."""
        assert Gpu.current is not None, "a tensor of a pretended GPU outlived it"
        return Gpu.current.__torch_function__(function, types, args, kwargs)


def on_device(x: Any) -> bool:
    return isinstance(x, OnDevice)


def moved(tensor: Tensor, *, there: bool) -> Tensor:
    """The same object, on the GPU or not: parameters stay parameters, views stay views."""
    param = isinstance(tensor, nn.Parameter)
    tensor.__class__ = OnDevice if there else nn.Parameter if param else Tensor
    if there and param:
        tensor._is_param = True  # type: ignore[attr-defined]
    return tensor


def put(tree: Any) -> Any:
    """All tensors of a result, on the GPU."""
    return tree_map(lambda x: moved(x, there=True) if isinstance(x, Tensor) and not on_device(x) else x, tree)


def names_device(x: Any) -> bool:
    return isinstance(x, (str, torch.device)) or type(x) is int


def names_gpu(x: Any) -> bool:
    return names_device(x) and (type(x) is int or torch.device(x).type == "cuda")


class Gpu(TorchFunctionMode):
    """The device.

    Attributes:
        device: where all tensors lie, of as many as are visible.
        selected: the current device's number.
        waits: (what, file:line of ltfast) -> how often the host waited.
    """

    current: Gpu | None = None

    def __init__(self) -> None:
        super().__init__()
        self.device = torch.device("cuda", 0)
        self.selected = 0
        self.waits: Counter[tuple[str, str]] = Counter()
        self._lock = threading.Lock()  # checkpoints wait in a thread of their own
        self._to_host: list[tuple[Tensor, Tensor]] = []  # (where it will be, value)
        self._to_device: list[tuple[Tensor, Tensor]] = []  # (where it came from, what it was)
        self._special: Mapping[str, Callable[..., Any]] = {
            "__array__": self._numpy, "__deepcopy__": self._deepcopy, "__format__": self._format, "copy_": self._copy,
            "_has_compatible_shallow_copy_type": lambda *_: True, "cpu": self._cpu, "cuda": self._cuda, "numpy": self._numpy,
            "pin_memory": lambda _, tensor: tensor.clone(), "register_hook": self._hook, "to": self._to,
            "register_post_accumulate_grad_hook": self._hook,
        }  # fmt: skip

    def become(self, device: torch.device) -> None:
        """torch.cuda.set_device."""
        self.device = torch.device(device)
        self.selected = self.device.index or 0

    @contextmanager
    def select(self, device: Any) -> Iterator[None]:
        """torch.cuda.device."""
        before, self.selected = self.selected, torch.device(device).index or 0
        try:
            yield
        finally:
            self.selected = before

    # -- waiting ---------------------------------------------------------------------------------------------------------

    def wait(self, what: str) -> None:
        """The host waits: what is on its way arrives."""
        self.note(what)
        with self._lock, natively(), torch.no_grad():
            for target, value in self._to_host:
                target.copy_(value)
            for source, value in self._to_device:
                assert torch.equal(source, value), (
                    "memory of the host was changed while a copy to the GPU was under way"
                )
            self._to_host.clear()
            self._to_device.clear()

    def note(self, what: str) -> None:
        frames = [f for f in traceback.extract_stack() if "/ltfast/" in f.filename or "/kernels/" in f.filename]
        at = f"{frames[-1].filename.rpartition('/')[2]}:{frames[-1].lineno}" if frames else ""
        self.waits[what, at] += 1

    def _underway_to_host(self, target: Tensor, value: Tensor) -> None:
        with self._lock, natively(), torch.no_grad():
            self._to_host.append((target, value.clone()))
            target.fill_(float("nan") if target.is_floating_point() else target.dtype == torch.bool or RUBBISH)

    def _from_host(self, source: Tensor, non_blocking: bool) -> None:
        if non_blocking:
            with self._lock, natively():
                self._to_device.append((source, source.clone()))
        elif source.dim():
            self.note("copy to the GPU")

    # -- every call ------------------------------------------------------------------------------------------------------

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = dict(kwargs or {}), getattr(function, "__name__", "")
        if name in ("__get__", "__set__"):
            return self._property(function, name, *args)
        tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
        ours = [t for t in tensors if on_device(t)]
        if name in self._special and (ours or name in ("to", "cuda", "pin_memory")):
            return self._special[name](function, *args, **kwargs)
        if ours:
            self._check(name, args, [t for t in tensors if not on_device(t)])
        make = names_gpu(kwargs.get("device"))
        if make:
            kwargs["device"] = "cpu"
        kwargs.pop("pin_memory", None)
        with natively():
            result = function(*args, **kwargs)
        if result is None or (args and result is args[0]):  # in place: it stays where it is
            return result
        return put(result) if make or (ours and kwargs.get("device") is None) else result

    def _check(self, name: str, args: tuple[Any, ...], others: list[Tensor]) -> None:
        """Refuse or count what a GPU refuses or waits for."""
        if name in WAITS:
            self.wait(name)
        inside = torch._C._functorch.peek_interpreter_stack()  # whose tensors do not tell where they are
        shapes = [tuple(t.shape) for t in others if t.dim()]
        if shapes and name not in BOTH_SIDES and not inside:
            raise RuntimeError(
                f"Expected all tensors to be on the same device, {name} got some on cuda:0, on cpu {shapes}"
            )
        if name in ("__getitem__", "__setitem__", "index_put_"):
            if not on_device(args[0]):
                raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            if any(isinstance(i, Tensor) and i.dtype == torch.bool for i in index):
                self.wait("mask")

    def _property(self, function: Any, name: str, *args: Any) -> Any:
        with natively():
            result = function(*args)
        if name == "__set__":
            if function == Tensor.data.__set__ and on_device(args[0]) != on_device(args[1]):  # type: ignore[attr-defined]
                moved(args[0], there=on_device(args[1]))
            return None
        return put(result) if on_device(args[0]) and isinstance(result, Tensor) else result

    # -- copies ----------------------------------------------------------------------------------------------------------

    def _to(self, function: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        given = [x.device if isinstance(x, Tensor) else x for x in (*args, *kwargs.values())]
        there = next((names_gpu(x) for x in given if names_device(x)), on_device(tensor))
        non_blocking = kwargs.pop("non_blocking", False)
        host = torch.device("cpu")
        args, kwargs = tree_map(lambda x: host if names_device(x) else x, (args, kwargs))
        if there == on_device(tensor):
            with natively():
                result = function(tensor, *args, **kwargs)
            return result if result is tensor or not there else put(result)
        with natively():
            result = moved(function(tensor, *args, **{**kwargs, "copy": True}), there=there)
        if there:
            self._from_host(tensor, non_blocking)
        elif non_blocking:
            self._underway_to_host(result, result)
        else:
            self.wait("to")
        return result

    def _cpu(self, function: Any, tensor: Tensor, *_: Any) -> Tensor:
        return self._to(Tensor.to, tensor, "cpu")

    def _cuda(self, function: Any, tensor: Tensor, *_: Any, non_blocking: bool = False) -> Tensor:
        return self._to(Tensor.to, tensor, self.device, non_blocking=non_blocking)

    def _copy(self, function: Any, target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        if on_device(source) and not on_device(target):
            if non_blocking:
                with natively():
                    value = torch.empty_like(target).copy_(source)
                self._underway_to_host(target, value)
                return target
            self.wait("copy_")
        elif not on_device(source):
            self._from_host(source, non_blocking)
        with natively():
            return function(target, source)  # type: ignore[no-any-return]

    def _numpy(self, function: Any, *_: Any, **__: Any) -> Any:
        raise TypeError(
            "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory"
        )

    def _format(self, function: Any, tensor: Tensor, spec: str) -> str:
        return format(tensor.item() if tensor.dim() == 0 else str(tensor), spec)

    def _deepcopy(self, function: Any, tensor: Tensor, memo: Any) -> Tensor:
        moved(tensor, there=False)
        try:
            with natively():
                return moved(type(tensor).__deepcopy__(tensor, memo), there=True)  # type: ignore[no-untyped-call]
        finally:
            moved(tensor, there=True)

    def _from_dlpack(self, function: Any, tensor: Tensor) -> Tensor:
        if self.device.index != self.selected:
            raise BufferError("Can't export tensors on a different CUDA device index")  # as torch does
        with natively():
            return put(function(tensor.as_subclass(Tensor)))  # type: ignore[no-any-return]

    def _hook(self, function: Any, tensor: Tensor, hook: Callable[[Tensor], Any]) -> Any:
        """The engine calls hooks with what a tensor really is."""

        def inside(grad: Tensor) -> Any:
            with torch._C._EnableTorchFunction(), self:
                result = hook(put(grad))
            return moved(result, there=False) if on_device(result) else result

        with natively():
            return function(tensor, inside)


class Stream:
    """torch.cuda.Stream, of which there is only one."""

    def __init__(self, *_: Any, **__: Any) -> None:
        assert Gpu.current is not None
        self.device = Gpu.current.device

    def wait_stream(self, other: Any) -> None: ...


class Event:
    """torch.cuda.Event."""

    def __init__(self, **_: Any) -> None:
        assert Gpu.current is not None
        self.device = Gpu.current.device

    def record(self, stream: Any = None) -> None: ...

    def synchronize(self) -> None:
        assert Gpu.current is not None
        Gpu.current.wait("event")


class Properties:
    """torch.cuda.get_device_properties(): an H100's."""

    name, total_memory, multi_processor_count, major, minor = "pretended GPU", 80 << 30, 132, 9, 0


class _RawTape(Tape):
    """Works on what tensors really are."""

    def __torch_dispatch__(self, *args: Any, **kwargs: Any) -> Any:
        with torch._C.DisableTorchFunction():
            return super().__torch_dispatch__(*args, **kwargs)

    def __exit__(self, *error: Any) -> None:
        with torch._C.DisableTorchFunction():
            super().__exit__(*error)

    def replay(self) -> None:
        with torch._C.DisableTorchFunction():
            super().replay()


class Recorder(TapeRecorder):
    """A `ltfast.graph.Recorder` of the pretended GPU."""

    tape = _RawTape


class Mean:
    """A sum that is under way, divided once it is there: gloo cannot average."""

    def __init__(self, work: Any, tensor: Tensor) -> None:
        self.work, self.tensor = work, tensor

    def wait(self) -> None:
        self.work.wait()
        with natively(), torch.no_grad():
            self.tensor /= dist.get_world_size()


def collectives() -> Iterator[tuple[Any, str, Any]]:
    """torch.distributed with gloo for NCCL. A group that was made for gloo takes tensors of the host only."""
    start, reduce = dist.init_process_group, dist.all_reduce

    def by_gloo(backend: str, **options: Any) -> None:
        assert backend == "cpu:gloo,cuda:nccl"
        start("gloo", **options)

    def checked(call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, group: Any = None, **options: Any) -> Any:
            if group is not None and any(on_device(x) for x in tree_flatten(args)[0]):
                raise RuntimeError("a group of gloo got a tensor of a GPU")
            with natively():
                return call(*args, group=group, **options)

        return run

    def all_reduce(tensor: Tensor, op: Any = dist.ReduceOp.SUM, *, async_op: bool = False, **options: Any) -> Any:
        if op != dist.ReduceOp.AVG:
            return reduce(tensor, op, async_op=async_op, **options)
        assert async_op
        assert on_device(tensor)
        return Mean(reduce(tensor, dist.ReduceOp.SUM, async_op=True, **options), tensor)

    yield dist, "init_process_group", by_gloo
    yield dist, "all_reduce", checked(all_reduce)
    for name in ("broadcast", "all_gather"):
        yield dist, name, checked(getattr(dist, name))


_kept: list[Any] = []  # a context that is collected ends


def stay(count: int) -> None:
    """From now on there are `count` GPUs."""
    manager = pretended_gpu(count)
    _kept.append(manager)
    manager.__enter__()


@contextmanager
def pretended_gpu(count: int = 1) -> Iterator[Gpu]:
    """Inside, there are `count` GPUs; see the module."""
    gpu = Gpu()
    profile, dlpack = torch.profiler.profile, torch.from_dlpack

    class Autocast(torch.autocast):
        def __init__(self, device_type: str, dtype: torch.dtype | None = None, *args: Any, **kwargs: Any) -> None:
            # A CPU is slow at fp16.
            super().__init__("cpu", torch.bfloat16 if dtype == torch.float16 else dtype, *args, **kwargs)

    cuda: dict[str, Any] = {
        "_lazy_init": lambda: None, "is_available": lambda: True, "device_count": lambda: count,
        "current_device": lambda: gpu.selected, "set_device": gpu.become, "device": gpu.select,
        "get_device_name": lambda _=None: Properties.name, "get_device_capability": lambda _=None: (9, 0),
        "get_device_properties": lambda _=None: Properties, "mem_get_info": lambda _=None: (70 << 30, 80 << 30),
        "memory_reserved": lambda _=None: 0, "synchronize": lambda _=None: gpu.wait("synchronize"),
        "Stream": Stream, "Event": Event, "current_stream": lambda _=None: Stream(),
        "is_current_stream_capturing": lambda: False, "get_rng_state": lambda _=None: torch.get_rng_state(),
        "set_rng_state": lambda *_: None, "manual_seed_all": lambda _: None,
    }  # fmt: skip
    others: list[tuple[Any, str, Any]] = [
        (torch, "autocast", Autocast),
        (torch, "compile", lambda function, **_: function),
        (torch, "from_dlpack", lambda t: gpu._from_dlpack(dlpack, t) if on_device(t) else dlpack(t)),
        (torch.profiler, "profile", lambda activities, **k: profile(activities=activities[:1], **k)),
        (ltfast.build, "CudaRecorder", lambda device: Recorder()),
        (ltfast.kernels.common, "triton", None),  # no kernel is launched
        *collectives(),
    ]
    with ExitStack() as stack:
        for owner, name, value in [(torch.cuda, name, value) for name, value in cuda.items()] + others:
            stack.enter_context(mock.patch.object(owner, name, value))
        stack.enter_context(mock.patch.object(Gpu, "current", gpu))
        stack.enter_context(gpu)
        yield gpu
