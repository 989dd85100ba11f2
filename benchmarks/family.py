"""Processor time and memory of this process and its descendants (Linux)."""

from __future__ import annotations

import os
import resource
import time
from pathlib import Path


def family() -> list[int]:
    """This process and its descendants."""
    parents = {}
    for entry in os.listdir("/proc"):
        try:
            if entry.isdigit():
                parents[int(entry)] = int(Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    members = [os.getpid()]
    for parent in members:
        members += [child for child, its_parent in parents.items() if its_parent == parent]
    return members


def cpu_seconds() -> float:
    """Processor time of the family so far, ended children included."""
    ticks, ended = 0, resource.getrusage(resource.RUSAGE_CHILDREN)
    for pid in family():
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK") + ended.ru_utime + ended.ru_stime


def memory_mib() -> float:
    """Memory of the family: private and shared pages counted once, shared-memory files whether mapped or not.

    A batch that a worker has handed over and nobody has fetched is mapped nowhere: only an open file keeps it.
    """
    kib, shared = 0, dict[tuple[int, int], int]()
    for pid in family():
        fields = dict(line.split(":") for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:])
        kib += int(fields["Pss"].split()[0]) - int(fields["Pss_Shmem"].split()[0])
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            try:
                if os.readlink(entry).startswith("/dev/shm/"):
                    file = entry.stat()
                    shared[file.st_dev, file.st_ino] = file.st_blocks * 512
            except OSError:
                continue
    return kib / 1024 + sum(shared.values()) / 2**20


def wait_until_idle(most: float = 60.0) -> None:
    """Returns when the family has used no processor time for a second: every queue is full then."""
    end, before = time.perf_counter() + most, -1.0
    while time.perf_counter() < end and (used := cpu_seconds()) - before > 0.03:
        before = used
        time.sleep(1)
