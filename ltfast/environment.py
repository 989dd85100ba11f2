"""What a run ran on: versions, hardware and the commit of the source tree."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

import ltfast


def environment(*, cpu: bool = False) -> dict[str, Any]:
    """All of it, for env.json and result rows. cpu: what ran leaves a GPU that may be there alone."""
    from importlib.metadata import PackageNotFoundError, version

    def installed(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    cuda = torch.cuda.is_available() and not cpu
    return {
        "ltfast": ltfast.__version__,
        "commit": commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": installed("triton"),
        "torchvision": installed("torchvision"),
        "timm": installed("timm"),
        "numpy": installed("numpy"),
        "dali": installed("nvidia-dali-cuda130"),
        "cuda": torch.version.cuda if cuda else None,
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def commit() -> str | None:
    """LTFAST_COMMIT, for a copy whose repository did not come along or is another's; else the commit of the source tree that
    ltfast runs from, with '+' if it is modified; None outside a checkout."""
    if told := os.environ.get("LTFAST_COMMIT"):
        return told
    root = Path(ltfast.__file__).resolve().parent.parent

    def git(*args: str) -> str:
        done = subprocess.run(["git", "-C", str(root), *args], capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) != root:
            return None
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def cpu_name() -> str:
    """The processor's model name."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
