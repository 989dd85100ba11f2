"""Processes for tests: a fork server imports ltfast once, so that each further process starts in milliseconds."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["ltfast.train", "ltfast.recipes", "ltfast.data.small", "sklearn.datasets", "sklearn.cluster"]
)
TIMEOUT = 120


def start(work: Callable[..., Any], *args: Any) -> BaseProcess:
    """Run `work(*args)` in a process of its own."""
    os.environ["OMP_NUM_THREADS"] = "1"
    process = CONTEXT.Process(target=work, args=args, daemon=True)
    process.start()
    return process


def wait(process: BaseProcess) -> int:
    """Its exit code (negative: the signal that ended it); AssertionError if it does not end."""
    process.join(TIMEOUT)
    if process.is_alive():
        process.kill()
        process.join()
        raise AssertionError(f"process {process.name} did not end within {TIMEOUT} s")
    assert process.exitcode is not None
    return process.exitcode


def free_port() -> int:
    """A TCP port nobody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _rank(work: Callable[..., Any], rank: int, world: int, port: int, folder: str, args: tuple[Any, ...]) -> None:
    import torch

    from ltfast import dist

    torch.set_num_threads(1)
    stacks = open(Path(folder) / f"{rank}.txt", "w")  # noqa: SIM115
    faulthandler.dump_traceback_later(TIMEOUT - 20, file=stacks)  # a deadlock shows where everyone waits
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    ranks = dist.start()
    try:
        torch.save(work(ranks, *args), Path(folder) / f"{rank}.pt")
    except BaseException:
        traceback.print_exc(file=stacks)
        stacks.flush()
        os._exit(1)
    finally:
        faulthandler.cancel_dump_traceback_later()
        dist.stop()


def run_ranks(world: int, folder: Path, work: Callable[..., Any], *args: Any) -> list[Any]:
    """`work(ranks, *args)` on `world` gloo processes; their results (anything torch.save takes), by rank."""
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    processes = [start(_rank, work, rank, world, port, str(folder), args) for rank in range(world)]
    for process in processes:
        process.join(TIMEOUT)
    codes = [-9 if process.is_alive() else process.exitcode for process in processes]
    for process in processes:
        process.kill()
    errors = "\n".join(path.read_text() for path in sorted(folder.glob("*.txt")))
    assert codes == [0] * world, f"exit codes {codes}\n{errors}"
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]
