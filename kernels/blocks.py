"""How CPU tensors are gone through: a cache-sized block at a time, on as many threads as torch may use.

What one torch call leaves for the next is then still in the cache, and no temporary is larger than a block. The threads are
our own, each with a stretch of blocks that it works through alone: torch's threads meet after every call, hundreds of times
an op, and each time wait for the slowest. Blocks do not depend on the number of threads, so results do not either.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from itertools import repeat
from typing import Any, TypeVar

import torch
from torch import Tensor

R = TypeVar("R")

# Elements of a block: 512 KiB of float32, of which a core's cache holds one or a few. Larger ones leave it before the next
# call, and of smaller ones torch's calls cost more than their work.
BLOCK = 131_072
# Arrays of one such block are cut into parts that torch works through on the calling thread, whatever its number of threads.
SERIAL = 32_768

_lock = threading.Lock()
_pool: tuple[int, ThreadPoolExecutor] | None = None


def in_blocks(work: Callable[[Iterator[tuple[Any, ...]]], R], *arrays: Tensor | None, rows: int = 1) -> list[R]:
    """work(blocks) for each stretch of the arrays, in order; blocks gives the arrays' parts side by side (None: None).

    Args:
        work: goes through the blocks of its stretch; runs without autograd and autocast and, with several threads, beside others.
        arrays: cut along the last dimension, the same for all.
        rows: how many rows of a block are worked on at once; the block is that much shorter.
    """
    first = next(a for a in arrays if a is not None)
    n = first.shape[-1]
    if n <= SERIAL // rows:
        with _plain():
            return [work(iter((arrays,)))]
    size = max((BLOCK if n > BLOCK else SERIAL) // rows, 1)
    threads = torch.get_num_threads() if n > BLOCK and first.device.type == "cpu" else 1
    stretch = -(-n // (size * threads)) * size
    tasks = (side_by_side(size, *parts) for parts in side_by_side(stretch, *arrays))
    if threads == 1:
        with _plain():
            return [work(task) for task in tasks]
    inference = torch.is_inference_mode_enabled()  # each thread has modes of its own

    def beside(task: Iterator[tuple[Any, ...]]) -> R:
        with torch.inference_mode(inference), _plain():
            return work(task)

    pool = _workers(threads)
    futures = [pool.submit(beside, task) for task in tasks]
    try:
        return [future.result() for future in futures]
    finally:
        wait(futures)  # whatever interrupts this thread, nobody writes into the arrays once it goes on


@contextmanager
def _plain() -> Iterator[None]:
    """Without autograd and autocast, which would make products bfloat16."""
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        yield


def side_by_side(size: int, *arrays: Tensor | None) -> Iterator[tuple[Any, ...]]:
    """Parts of `size` elements of the last dimension, of all arrays at once."""
    return zip(*(repeat(None) if a is None else a.split(size, -1) for a in arrays), strict=False)


def _workers(threads: int) -> ThreadPoolExecutor:
    """The threads, made once for each number of them."""
    global _pool
    with _lock:
        if _pool is None or _pool[0] != threads:
            # One that it replaces ends with its last user, who may be about to use it.
            barrier = threading.Barrier(threads)

            def alone() -> None:
                torch.set_num_threads(1)  # of this thread
                barrier.wait()

            _pool = threads, ThreadPoolExecutor(threads, "ltfast-blocks")
            list(_pool[1].map(lambda _: alone(), range(threads)))
            torch.set_num_threads(threads)  # the call above is also what threads to come start with
        return _pool[1]


def _forget() -> None:
    global _pool, _lock
    _pool, _lock = None, threading.Lock()


os.register_at_fork(after_in_child=_forget)  # a child has none of its parent's threads
