"""Compile what a launcher would launch to sm_80 or sm_90, on a machine without a GPU.

The launcher runs on CPU tensors with `launch` replaced, so kernel, constants and options are the real ones; the arguments
are specialised as triton's launcher does (pointers and integers divisible by 16, None folded away).
"""

import contextlib
import io
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float64: "*fp64", torch.int64: "*i64"}


class Launch(NamedTuple):
    """One call of `common.launch`."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple
    options: dict


class Compiled(NamedTuple):
    """What the checks need of a compiled kernel."""

    ttir: str
    ptx: str
    spilled_bytes: int
    registers: int
    shared_bytes: int

    def vector_accesses(self, kind: str) -> int:
        """Number of 128-bit global accesses: kind is "ld" or "st"."""
        return len(re.findall(rf"\b{kind}\.global[.\w:]*\.(?:v4\.b32|v2\.b64|v4\.f32|b128)", self.ptx))

    def scalar_accesses(self, kind: str) -> int:
        """Number of global accesses narrower than 64 bits."""
        return len(re.findall(rf"\b{kind}\.global[.\w:]*\.(?:b32|b16|f32)", self.ptx)) - len(
            re.findall(rf"\b{kind}\.global[.\w:]*\.v[24]\.(?:b32|b16|f32)", self.ptx)
        )

    def tensor_accesses(self, kind: str, elements: int) -> int:
        """tt.load / tt.store of arrays of `elements` elements in the TTIR."""
        return len(re.findall(rf"tt\.{kind} .*tensor<{elements}x!tt.ptr", self.ttir))


def record_launches(monkeypatch, module: Any, call: Callable[[], Any]) -> list[Launch]:
    """Run `call` with the kernel path forced on CPU tensors and launches noted instead of made."""
    launches: list[Launch] = []

    def note(kernel, grid, device, *args, **options):
        launches.append(Launch(kernel, grid, args, options))

    monkeypatch.setattr(module, "launch", note)
    monkeypatch.setattr(module, "use_kernel", lambda tensor, **_: True)
    call()
    return launches


def compile_launch(launch: Launch, capability: int) -> Compiled:
    """Compile one launch for compute capability 80 or 90."""
    kernel = launch.kernel
    values = dict(zip(kernel.arg_names, launch.args, strict=False)) | {
        k: v for k, v in launch.options.items() if k in kernel.arg_names
    }
    options = {k: v for k, v in launch.options.items() if k not in kernel.arg_names}
    signature, constants, attrs = {}, {}, {}
    for i, param in enumerate(kernel.params):
        value = values[param.name]
        if param.is_constexpr or value is None or (type(value) is int and value == 1):
            signature[param.name] = "constexpr"
            constants[(i,)] = value
        elif isinstance(value, torch.Tensor):
            signature[param.name] = POINTERS[value.dtype]
            if value.data_ptr() % 16 == 0:
                attrs[(i,)] = [["tt.divisibility", 16]]
        elif isinstance(value, int):
            signature[param.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                attrs[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[param.name] = "fp32"
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attrs)
    report = io.StringIO()
    with always_reported(), contextlib.redirect_stdout(report):
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", report.getvalue())
    registers = re.findall(r"Used (\d+) registers", report.getvalue())
    assert spills, report.getvalue()
    return Compiled(
        compiled.asm["ttir"],
        compiled.asm["ptx"],
        sum(map(int, spills)),
        max(map(int, registers)),
        compiled.metadata.shared,
    )


@contextlib.contextmanager
def always_reported() -> Iterator[None]:
    """Make triton run ptxas (no cache) and print what ptxas says of registers and spills."""
    with triton.knobs.compilation.scope(), triton.knobs.nvidia.scope():
        triton.knobs.compilation.always_compile = True
        triton.knobs.nvidia.dump_ptxas_log = True
        yield
