"""Peak memory of a call on a CPU, for tests and benchmarks."""

from __future__ import annotations

import os
from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile


def peak_bytes(call: Callable[[], object]) -> int:
    """Most bytes taken at once beyond those at the start, as the CPU allocator reports them for the calling thread."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as found:
        call()
    assert found.profiler is not None
    events = [(e.start_ns(), e.nbytes()) for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for _, size in sorted(events):
        now += size
        peak = max(peak, now)
    return peak
