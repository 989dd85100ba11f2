"""`ltfast doctor`: what this machine has, a self-test of the kernels, and what would be slow and how to mend it."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ltfast.errors import UserError

MIB = 1 << 20
DISK_BYTES = 64 * MIB
SLOW_DISK = 100  # MiB/s: a ResNet-50's training state of 300 MiB then takes 3 s in the background
READ_BYTES = 256 * MIB  # at most of one file: a pack may be larger than memory
SLOW_READ = 30  # MiB/s of pictures: about 300 ImageNet files a second
SHM_NEEDED = 1 << 30  # DataLoader workers hand batches over through it: 8 workers x 2 batches x 3 views x 19 MiB
TEST_ELEMENTS = 1_000_003  # not a multiple of any block
TEST_ROWS = 4
TEST_SECONDS = 5.0
TEST_FILES = 200
PACKAGES = ("torch", "torchvision", "triton", "numpy", "scikit-learn", "safetensors")
DALI = "nvidia-dali-cuda130"


class Finding(NamedTuple):
    """level: "ok", "note" (would be slow or is missing) or "fail" (broken); advice: how to mend it, or ''."""

    name: str
    value: str
    level: str = "ok"
    advice: str = ""


def examine(folder: str | Path = ".", data_dir: str | Path | None = None) -> list[Finding]:
    """All findings; takes a few seconds.

    Raises:
        UserError: a folder does not exist, or neither a folder nor a pack is at `data_dir`.
    """
    if not Path(folder).is_dir():
        raise UserError(f"{folder}: no such folder")
    if data_dir is not None and not Path(data_dir).exists():
        raise UserError(f"{data_dir}: no such file or folder")
    findings = [*versions(), *processor(), *gpus(), *memory(), disk(Path(folder)), loader()]
    if data_dir is not None:
        findings.append(pictures(Path(data_dir)))
    return [*findings, *kernels()]


def versions() -> Iterator[Finding]:
    """Python and the packages."""
    yield Finding("python", platform.python_version())
    for name in PACKAGES:
        try:
            yield Finding(name, version(name))
        except PackageNotFoundError:
            yield Finding(name, "not installed", "note", f"pip install {name}")
    try:
        yield Finding("DALI", version(DALI))
    except PackageNotFoundError:
        yield Finding("DALI", "not installed", "note", "large pictures are decoded by PIL; pip install 'ltfast[dali]'")


def processor() -> Iterator[Finding]:
    """Cores this process may use, and threads."""
    from ltfast.data.large_source import available_cores
    from ltfast.environment import cpu_name

    cores = available_cores()
    yield Finding("processor", f"{cpu_name()}, {cores} of {os.cpu_count()} cores usable")
    threads = torch.get_num_threads()
    if threads > cores:
        advice = f"more threads than cores slow each other down; export OMP_NUM_THREADS={cores}"
        yield Finding("threads", str(threads), "note", advice)
    else:
        yield Finding("threads", str(threads))


def has_bf16() -> bool:
    """Whether the processor has bf16 instructions, by its name for them (avx512_bf16, amx_bf16)."""
    return any(there is True for name, there in torch.cpu.get_capabilities().items() if "bf16" in name)


def gpus() -> Iterator[Finding]:
    """CUDA devices, driver, cuDNN, NCCL, and whether devices reach each other directly."""
    if not torch.cuda.is_available():
        built = torch.version.cuda
        advice = (
            "no NVIDIA driver or no device visible (nvidia-smi, CUDA_VISIBLE_DEVICES)"
            if built
            else "a CPU build of torch"
        )
        faster = ", faster with --precision bf16 --compile on" if has_bf16() else ""
        yield Finding("GPU", "none", "note", f"{advice}; training runs on the CPU{faster}")
        return
    driver = Path("/proc/driver/nvidia/version")
    if driver.exists():
        yield Finding(
            "driver", next((w for w in driver.read_text().split() if w.count(".") >= 1 and w[0].isdigit()), "?")
        )
    yield Finding("CUDA", f"{torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}")
    count = torch.cuda.device_count()
    for i in range(count):
        properties = torch.cuda.get_device_properties(i)
        free, total = torch.cuda.mem_get_info(i)
        text = f"{properties.name}, {total / 2**30:.0f} GiB, compute {properties.major}.{properties.minor}"
        if free < 0.9 * total:
            yield Finding(f"GPU {i}", f"{text}, {free / 2**30:.0f} GiB free", "note", "another program uses it")
        elif properties.major < 8:
            yield Finding(f"GPU {i}", text, "note", "older than Ampere: no bf16; --precision auto is fp16")
        else:
            yield Finding(f"GPU {i}", text)
    if torch.distributed.is_nccl_available():
        yield Finding("NCCL", ".".join(map(str, torch.cuda.nccl.version())))
    else:
        yield Finding("NCCL", "not available", "note", "several GPUs need a torch build with NCCL")
    apart = [(i, j) for i in range(count) for j in range(i) if not torch.cuda.can_device_access_peer(i, j)]
    if apart:
        advice = "gradients pass through host memory; see docs/scaling.md for what that costs"
        yield Finding("GPU to GPU", f"{len(apart)} pairs have no direct path", "note", advice)


def memory() -> Iterator[Finding]:
    """Main and shared memory, open files."""
    from ltfast.memory import meminfo

    if available := meminfo().get("MemAvailable"):
        yield Finding("memory", f"{available / 2**30:.1f} GiB available")
    shm = Path("/dev/shm")
    if shm.is_dir():
        free = shutil.disk_usage(shm).free
        low = free < SHM_NEEDED
        advice = "DataLoader workers may die with a bus error; docker run --shm-size=8g, or --loader dali"
        yield Finding("shared memory", f"{free / 2**30:.1f} GiB free", "note" if low else "ok", advice if low else "")
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    low = soft < 4096
    yield Finding("open files", str(soft), "note" if low else "ok", f"ulimit -n {min(hard, 65536)}" if low else "")


def disk(folder: Path) -> Finding:
    """Write speed, flushed to the disk, and free space where runs go."""
    path, data = folder / f".ltfast-doctor.{os.getpid()}", os.urandom(MIB)
    try:
        started = time.perf_counter()
        with open(path, "wb") as file:
            for _ in range(DISK_BYTES // MIB):
                file.write(data)
            file.flush()
            os.fsync(file.fileno())
        speed = DISK_BYTES / MIB / (time.perf_counter() - started)
    except OSError as error:
        return Finding(
            "disk", f"{folder.resolve()}: {error.strerror}", "fail", "runs cannot be written here; use --out"
        )
    finally:
        with contextlib.suppress(OSError):  # read-only: even a file that is not there cannot be removed
            path.unlink()
    text = f"{folder.resolve()}: writes {speed:.0f} MiB/s, {shutil.disk_usage(folder).free / 2**30:.0f} GiB free"
    if speed < SLOW_DISK:
        return Finding(
            "disk", text, "note", "checkpoints take long (training goes on meanwhile); raise --checkpoint-minutes"
        )
    return Finding("disk", text)


def pictures(folder: Path) -> Finding:
    """Reading speed of the first files found, or of a pack, without decoding."""
    started, size, count, failed = time.perf_counter(), 0, 0, 0
    places = [(str(folder.parent), [], [folder.name])] if folder.is_file() else os.walk(folder)
    for root, _, names in places:
        for name in names:
            if count < TEST_FILES and time.perf_counter() - started < TEST_SECONDS:
                try:
                    with open(Path(root) / name, "rb") as file:
                        size += len(file.read(READ_BYTES))
                    count += 1
                except OSError:
                    failed += 1
    seconds = time.perf_counter() - started
    if not count:
        found = f"none of {failed} files can be read" if failed else "no files"
        return Finding("pictures", f"{folder}: {found}", "fail", "give the folder that holds the pictures")
    text = f"{folder}: {count / seconds:.0f} files/s, {size / MIB / seconds:.0f} MiB/s"
    if failed:
        return Finding("pictures", f"{text}; {failed} files cannot be read", "note", "ltfast data check names them")
    slow = size / MIB / seconds < SLOW_READ
    return Finding("pictures", text, "note" if slow else "ok", "copy the data to a local disk" if slow else "")


def loader() -> Finding:
    """What --loader auto chooses for three views, and why."""
    from ltfast.data.large import choose_loader

    choice = choose_loader("auto", "cuda" if torch.cuda.is_available() else "cpu", 3)
    return Finding("loader", f"{choice.name}: {choice.reason}")


# -- the kernels' self-test ----------------------------------------------------------------------------------------------


def kernels(device: torch.device | str | None = None) -> Iterator[Finding]:
    """Each op on random numbers against its equation in float64: the Triton kernels on a GPU, the torch path on a CPU."""
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    started = time.perf_counter()
    for name, check in SELF_TESTS.items():
        if time.perf_counter() - started > TEST_SECONDS * 4:  # the first run of a kernel compiles it
            yield Finding(f"kernel {name}", "not tested: compiling took too long", "note", "run it again")
            continue
        try:
            error = check(device)
        except Exception as problem:
            yield Finding(
                f"kernel {name}", f"{type(problem).__name__}: {problem}", "fail", "report it with this output"
            )
            continue
        bad = not error < 1e-5
        advice = "wrong results: update the driver and triton, or report it with this output" if bad else ""
        yield Finding(f"kernel {name}", f"relative error {error:.1e} on {device.type}", "fail" if bad else "ok", advice)


def _numbers(device: torch.device, *shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device)


def _error(got: Tensor, wanted: Tensor) -> float:
    return float((got.double() - wanted).norm() / wanted.norm())


def _gram(device: torch.device) -> float:
    from ltfast.kernels import gram

    theta, rows = _numbers(device, TEST_ELEMENTS), _numbers(device, TEST_ROWS, TEST_ELEMENTS, seed=1)
    matrix, square = gram(rows, theta, adaptive=True)
    scaled = rows.double() * theta.double().abs()
    return max(_error(matrix, scaled @ scaled.T), _error(square, theta.double().square().sum()))


def _perturb(device: torch.device) -> float:
    from ltfast.kernels import perturb

    theta, rows = _numbers(device, TEST_ELEMENTS), _numbers(device, TEST_ROWS, TEST_ELEMENTS, seed=1)
    coef = _numbers(device, TEST_ROWS, seed=2)
    out = perturb(theta, rows, coef, adaptive=True)
    return _error(out, theta.double() + theta.double().square() * (coef.double() @ rows.double()))


def _sgd_step(device: torch.device) -> float:
    from ltfast.kernels import sgd_step

    theta, grad, momentum = (_numbers(device, TEST_ELEMENTS, seed=i) for i in range(3))
    weight, target = _numbers(device, TEST_ELEMENTS, seed=3).abs(), _numbers(device, TEST_ELEMENTS, seed=4)
    total = grad.double() + 0.01 * theta.double() + 2.0 * weight.double() * (theta.double() - target.double())
    wanted = theta.double() - 0.1 * (0.9 * momentum.double() + total)
    sgd_step(theta, grad, momentum, 0.1, momentum=0.9, weight_decay=0.01, anchor=(weight, target, 2.0))
    return _error(theta, wanted)


def _adamw_step(device: torch.device) -> float:
    from ltfast.kernels import adamw_step

    theta, grad = (_numbers(device, TEST_ELEMENTS, seed=i) for i in range(2))
    first, second = torch.zeros_like(theta), torch.zeros_like(theta)
    g = grad.double()
    wanted = theta.double() * (1 - 0.1 * 0.01) - 0.1 * g / (g.abs() + 1e-8)  # the first step: both biases cancel
    adamw_step(theta, grad, first, second, 1, 0.1, (0.9, 0.999), 1e-8, 0.01)
    return _error(theta, wanted)


def _collapse_anchors(device: torch.device) -> float:
    from ltfast.kernels import collapse_anchors

    anchors, fishers = (_numbers(device, TEST_ROWS, TEST_ELEMENTS, seed=i) for i in range(2))
    fishers, coef = fishers.square(), _numbers(device, TEST_ROWS, seed=2).abs()
    weight, target, _ = collapse_anchors(anchors, fishers, coef)
    w = coef.double()[:, None] * fishers.double()
    return max(_error(weight, w.sum(0)), _error(target, (w * anchors.double()).sum(0) / w.sum(0)))


SELF_TESTS: dict[str, Callable[[torch.device], float]] = {
    "gram": _gram, "perturb": _perturb, "sgd_step": _sgd_step, "adamw_step": _adamw_step, "collapse_anchors": _collapse_anchors,
}  # fmt: skip


def print_findings(findings: list[Finding]) -> None:
    """A table, then what to mend."""
    width = max(len(f.name) for f in findings)
    marks = {"ok": " ", "note": "!", "fail": "X"}
    for f in findings:
        print(f"{marks[f.level]} {f.name:{width}}  {f.value}")
    print()
    for f in findings:
        if f.advice:
            print(f"{marks[f.level]} {f.name}: {f.advice}")
    broken = sum(f.level == "fail" for f in findings)
    print(f"{broken} broken" if broken else "nothing is broken")
