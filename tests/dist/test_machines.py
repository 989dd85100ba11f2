"""Several machines, played by several torchrun agents on this one: losing a machine, and the Slurm script of the docs."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from ltfast.runs import RunFolder
from tests.dist.test_launch import ENVIRONMENT, finish, started, until, workers
from tests.procs import free_port

pytestmark = [pytest.mark.dist, pytest.mark.slow]

ROOT = Path(__file__).resolve().parent.parent.parent
FLAGS = "--batch 36 --method ce --device cpu --no-tensorboard --deterministic"


def torchrun(port: int) -> list[str]:
    return [
        sys.executable, "-m", "torch.distributed.run", "--nnodes", "1:2", "--nproc-per-node", "1", "--rdzv-id", "7",
        "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--max-restarts", "3", "-m", "ltfast", "train",
    ]  # fmt: skip


def listening(port: int) -> bool:
    with socket.socket() as s:
        return s.connect_ex(("127.0.0.1", port)) == 0


def test_a_lost_machine_leaves_the_other_training(tmp_path: Path) -> None:
    """Agent and worker of the second "machine" are killed; the first restarts its own from the last checkpoint, alone."""
    run = tmp_path / "run"
    port = free_port()
    words = [*torchrun(port), *FLAGS.split(), "--epochs", "40", "--out", str(run)]
    with started(words) as first:
        until(lambda: listening(port), first)  # it holds the meeting point, which may not be lost
        with started(words) as second:
            until(lambda: RunFolder(run).metrics("epoch")[2:], first, 180)
            sent = [row["comm"]["calls"] for row in RunFolder(run).metrics("epoch")]
            assert sent[-1] >= 1, "two processes"
            for pid in [second.pid, *workers(second.pid)]:
                os.kill(pid, signal.SIGKILL)
        out = first.communicate(timeout=300)[0]
        assert first.returncode == 0
    assert "(restart 1 of at most 3); continuing after" in out
    epochs = RunFolder(run).metrics("epoch")
    assert [row["epoch"] for row in epochs] == list(range(40))
    assert "comm" not in epochs[-1], "one process"


def told_to_end(pid: int) -> bool:
    """SIGTERM waits for it."""
    status = Path(f"/proc/{pid}/status").read_text()
    return bool(int(status.split("ShdPnd:")[1].split()[0], 16) & 1 << signal.SIGTERM - 1)


def test_machines_that_count_restarts_differently_meet_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One machine's worker dies; the other's hangs, as in NCCL, so its agent starts it again for the first one's sake."""
    monkeypatch.setitem(ENVIRONMENT, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    run, port = tmp_path / "run", free_port()
    words = [*torchrun(port), *FLAGS.split(), "--epochs", "40", "--out", str(run)]
    words[words.index("1:2")] = "2"
    with started(words) as first:
        until(lambda: listening(port), first)
        with started(words) as second:
            until(lambda: RunFolder(run).metrics("epoch")[2:], first, 180)
            (dies,), (hangs,) = workers(first.pid), workers(second.pid)
            os.kill(hangs, signal.SIGSTOP)
            os.kill(dies, signal.SIGKILL)
            until(lambda: told_to_end(hangs), second)
            os.kill(hangs, signal.SIGCONT)
            out = finish(first) + finish(second)
    assert "(restart 1 of at most 3); continuing after" in out
    assert [row["epoch"] for row in RunFolder(run).metrics("epoch")] == list(range(40))


def slurm_script(port: int, hours: str) -> str:
    """The script of docs/scaling.md for one process a machine and a small data set."""
    text = (ROOT / "docs" / "scaling.md").read_text()
    script = next(part for part in text.split("```bash\n")[1:] if part.startswith("#!")).split("```")[0]
    changes = {
        "--nproc-per-node 8": "--nproc-per-node 1", ":29400": f":{port}", "--max-hours 23.8": f"--max-hours {hours}",
        "--dataset inat18 --data-dir $DATA": f"{FLAGS} --epochs 40", "torchrun": f"{sys.executable} -m torch.distributed.run",
    }  # fmt: skip
    for old, new in changes.items():
        assert script.count(old) == 1, old
        script = script.replace(old, new)
    return script


def test_the_slurm_script_of_the_docs(tmp_path: Path) -> None:
    """A job that runs out of time requeues itself, the next one goes on, and the last one does not requeue."""
    stand_ins = {
        "srun": 'for i in $(seq "$SLURM_NNODES"); do "$@" & done\nfor job in $(jobs -p); do wait "$job" || code=1; done\nexit ${code:-0}',
        "scontrol": f'if [ "$1" = requeue ]; then echo "$2" >> {tmp_path}/requeued; else echo 127.0.0.1; echo other; fi',
    }
    for name, body in stand_ins.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/bash\n{body}\n")
        path.chmod(0o755)
    environment = {
        **ENVIRONMENT, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "PYTHONPATH": str(ROOT),
        "SLURM_JOB_NODELIST": "a,b", "SLURM_NNODES": "2", "SLURM_JOB_ID": "77",
    }  # fmt: skip
    outputs = []
    for hours in ("0.0003", "1"):
        script = tmp_path / "job.sh"
        script.write_text(slurm_script(free_port(), hours))
        job = subprocess.run(
            ["bash", str(script)], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300
        )
        outputs.append(job.stdout)
        assert "Traceback" not in job.stderr, job.stderr
    assert "stopped after --max-hours" in outputs[0]
    assert "continuing after" in outputs[1]
    assert (tmp_path / "requeued").read_text() == "77\n", "once"
    assert RunFolder(tmp_path / "runs" / "inat18").metrics("test")


def test_the_torchrun_line_of_the_docs(tmp_path: Path) -> None:
    """Two agents with the options as written give one run of two processes."""
    text = (ROOT / "docs" / "scaling.md").read_text()
    line = text[text.index("TORCH_DISABLE_SHARE_RDZV") :].split("# several machines")[0].replace("\\\n", " ")
    changes = {
        "TORCH_": "env TORCH_", "torchrun": f"{sys.executable} -m torch.distributed.run", "--nproc-per-node 8": "--nproc-per-node 1",
        "HOST:29400": f"127.0.0.1:{free_port()}", "--dataset inat18 --data-dir D --out RUN": f"{FLAGS} --epochs 2 --out {tmp_path}/run",
    }  # fmt: skip
    for old, new in changes.items():
        assert line.count(old) == 1, old
        line = line.replace(old, new)
    with started(line.split()) as first, started(line.split()) as second:
        outputs = [finish(first), finish(second)]
    assert sum("each step sends" in out for out in outputs) == 1
    assert RunFolder(tmp_path / "run").metrics("test")
