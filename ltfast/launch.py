"""`--gpus N` and `--procs N`: this machine's processes, started and restarted by torch's own elastic launcher.

The command line runs once more in every process; there RANK and WORLD_SIZE are set, so it trains instead of launching.
Several machines: run `torchrun --nnodes ... -m ltfast train ...` on each (docs/scaling.md); it sets the same variables.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import json
import logging
import os
import signal
import sys
import tempfile
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ltfast.config import Config, flag
from ltfast.errors import UserError

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

# Where a worker leaves the text of a UserError: it then exits with 0, because no restart can mend a user's mistake.
MESSAGE = "LTFAST_MESSAGE_FILE"
ENDED = ".ended"  # beside it: rank 0 has ended in order
BEGUN = ".begun"  # the run's folder has been made
LAUNCHER = "LTFAST_LAUNCHER"  # its process number, for the workers
STARTED = "LTFAST_STARTED"  # when it did, by time.monotonic
RESTARTS = "TORCHELASTIC_RESTART_COUNT"  # torchrun's
PR_SET_PDEATHSIG = 1  # linux/prctl.h
# Seconds a worker has, after a signal to the launcher, to finish its step and write its checkpoint (torchrun's own default
# is 30, and stays where another worker has failed).
GRACE_SECONDS = 60


def launched() -> bool:
    """True in a process that torchrun (or `launch`, or anything that sets the same variables) has started."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def speaks() -> bool:
    """True in the one process of a run that tells the user what all of them meet, before they know each other."""
    return os.environ.get("RANK", "0") == "0"


def on_cpu(config: Config, resumed: bool = False) -> Config:
    """The config with --device cpu where --procs or --gpus 0 ask for the CPU; resumed: off it again where --gpus N does."""
    if config.run.procs or config.run.gpus == 0:
        return config.with_(device="cpu")
    return config.with_(device="auto") if resumed and config.run.gpus > 0 and config.run.device == "cpu" else config


def process_count(config: Config) -> int:
    """Processes to run on this machine.

    By default, data sets that are decoded on the way take every visible GPU; those that live on one device (digits,
    CIFAR) take one, so that their results do not depend on the machine.

    Raises:
        UserError: more GPUs than there are, or options that exclude each other.
    """
    import torch

    from ltfast.data.registry import LARGE

    gpus, procs, visible = config.run.gpus, config.run.procs, torch.cuda.device_count()
    if gpus >= 0 and procs:
        raise UserError("--gpus and --procs exclude each other: --gpus N runs on N GPUs, --procs N on the CPU")
    if gpus > visible:
        raise UserError(
            f"--gpus {gpus}: {visible} CUDA devices are visible; use at most that, or --procs {gpus} for the CPU"
        )
    if procs or gpus >= 0:
        return max(procs, gpus, 1)
    everything = config.data.dataset in LARGE and config.run.device in ("auto", "cuda")
    return max(visible, 1) if everything else 1


def check_count(name: str, count: int) -> None:
    """UserError if a launcher has started another number of processes on this machine than option `name` asks for.

    name: "procs" or "gpus"; count: at most 0 asks for none.
    """
    if count > 0 and launched():
        here = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
        if count != here:
            raise UserError(f"{flag(name)} {count}: the launcher runs {here} processes here; leave {flag(name)} out")


def words(flags: Mapping[str, Any]) -> list[str]:
    """Config values as command-line words."""
    return [word for name, value in flags.items() for word in (flag(name), str(value))]


def restarts() -> int:
    """How often the launcher has started the processes again after a failure; those of several machines count apart."""
    return int(os.environ.get(RESTARTS, "0"))


def end_after_mistake() -> None:
    """End a worker that was started again after another had met a user's mistake: restarting mends nothing."""
    if restarts() and message_left():
        raise SystemExit(0)


def restarted_run(config: Config, resume: str | None = None) -> str | None:
    """The run folder to continue: `resume`, or in a worker that was started again after a failure its own, or None.

    Raises:
        UserError: it cannot be known, because --out was not given; it had been made and is gone.
    """
    if resume or not restarts():
        return resume
    if config.run.out is None:
        raise UserError("restarted by torchrun after a failure, but no --out says where the run is; give --out RUN")
    if (Path(config.run.out) / "config.toml").exists():
        return config.run.out
    if MESSAGE in os.environ and Path(os.environ[MESSAGE]).with_suffix(BEGUN).exists():
        raise UserError(f"{config.run.out}: the run's folder has vanished; bring it back, then --resume it")
    return None


def launch(count: int, arguments: Sequence[str], *, out: str, max_restarts: int, cpu: bool) -> int:
    """Run `ltfast ARGUMENTS` in `count` processes; returns the exit code.

    A worker that dies makes all of them start again from the last checkpoint in `out`, at most `max_restarts` times.
    SIGTERM, SIGINT and SIGHUP go on to the workers, which checkpoint and end.

    Raises:
        UserError: what a worker raised.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(GRACE_SECONDS))
    # A fresh store for every start, see ltfast/dist.py.
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    if cpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    with tempfile.TemporaryDirectory(prefix="ltfast-") as folder:
        message = Path(folder) / "message"
        os.environ |= {MESSAGE: str(message), LAUNCHER: str(os.getpid()), STARTED: str(time.monotonic())}
        _quiet(message)
        config = LaunchConfig(
            min_nodes=1, max_nodes=1, nproc_per_node=count, run_id=uuid.uuid4().hex, rdzv_backend="c10d",
            rdzv_endpoint="localhost:0", max_restarts=max_restarts, monitor_interval=0.2,
        )  # fmt: skip
        fields = {field.name for field in dataclasses.fields(config)}
        if "shutdown_timeout" in fields:  # torch 2.11 has none and waits 30 s
            config.shutdown_timeout = GRACE_SECONDS
        if "signals_to_handle" in fields and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
            config.signals_to_handle = "SIGTERM,SIGINT,SIGQUIT"  # nohup: torch would handle SIGHUP all the same
        code = 0
        try:
            elastic_launch(config, sys.executable)("-m", "ltfast", *arguments)
        except SignalException as stop:
            at_once = isinstance(stop.__context__, SignalException) or not message.with_suffix(ENDED).exists()
            if at_once and not message.exists():
                code = _stopped(stop, out)
        except ChildFailedError as error:
            if not message.exists():
                print(f"ltfast: {_failure(error, max_restarts, out)}", file=sys.stderr)
            code = 1
        finally:
            del os.environ[MESSAGE], os.environ[LAUNCHER], os.environ[STARTED]
        if message.exists():
            raise UserError(message.read_text())
    return code


def end_with_launcher() -> None:
    """In a worker of `launch`, on Linux: get SIGTERM when the launcher is gone, however it ended.

    Killed, or stopped while it was starting the workers, it would leave them behind: training on, or waiting for each
    other, with the run folder locked.
    """
    if (launcher := os.environ.get(LAUNCHER)) and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != int(launcher):
            raise SystemExit(128 + signal.SIGTERM)


def _quiet(message: Path) -> None:
    """Of torch's launcher only errors are shown, and none once a worker has left a message for the user."""

    def worth_showing(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR and not message.exists()

    for name in list(logging.root.manager.loggerDict):  # each has a level of its own
        if name.startswith("torch.distributed"):
            logging.getLogger(name).addFilter(worth_showing)


def _stopped(stop: SignalException, out: str) -> int:
    """The exit code after a signal that the workers had no time to act upon: they started, or a second one came."""
    began = (Path(out) / "config.toml").exists()
    when = "at once" if began else "before the run had begun"
    how = f"; continue from the last checkpoint with: ltfast train --resume {out}" if began else ""
    print(f"ltfast: stopped by {stop.sigval.name} {when}{how}", file=sys.stderr)
    return 128 + stop.sigval


def began() -> float | None:
    """When the launcher of this process started, by time.monotonic; None without one. Restarts do not change it."""
    return float(os.environ[STARTED]) if STARTED in os.environ and launched() else None


def tell_begun() -> None:
    """Tell processes that are started again that the run's folder has been made."""
    if MESSAGE in os.environ:
        Path(os.environ[MESSAGE]).with_suffix(BEGUN).touch()


def tell_ended() -> None:
    """Tell the launcher that the run has ended in order: it is finished, or has stopped with a checkpoint."""
    if MESSAGE in os.environ:
        Path(os.environ[MESSAGE]).with_suffix(ENDED).touch()


def _failure(error: ChildFailedError, max_restarts: int, out: str) -> str:
    """Who ended how, and how to go on."""
    rank, failure = error.get_first_failure()
    code = failure.exitcode
    what = signal.Signals(-code).name if -code in set(signal.Signals) else f"exit code {code}"
    tried = f"after {max_restarts} restarts" if max_restarts else "and --max-restarts is 0"
    if (Path(out) / "config.toml").exists():
        return f"process {rank} ended with {what} {tried}; continue with: ltfast train --resume {out}"
    return f"process {rank} ended with {what} {tried}, before the run had begun"


def message_left() -> bool:
    """True if some process of this run has met a user's mistake, which the launcher will tell."""
    return MESSAGE in os.environ and Path(os.environ[MESSAGE]).exists()


def restart_note() -> str:
    """What to tell the user in a process that was started again after a failure; else an empty string."""
    count = restarts()
    most = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "?")
    return f"a process has died, so all were started again (restart {count} of at most {most}); " if count else ""


def processes_here() -> int:
    """How many processes a launcher runs on this machine; 1 without one."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def report(error: UserError) -> int:
    """Hand a worker's UserError to the launching process, once; returns the worker's exit code."""
    path = os.environ.get(MESSAGE)
    if path is None:  # alone, or under plain torchrun, whose summary has the words of the rank that ended first
        if speaks():
            print(f"ltfast: {error}", file=sys.stderr)
        if summary := os.environ.get("TORCHELASTIC_ERROR_FILE"):
            about = {"py_callstack": f"ltfast: {error}", "timestamp": str(int(time.time()))}
            with contextlib.suppress(OSError):
                Path(summary).write_text(json.dumps({"message": {"message": str(error), "extraInfo": about}}))
        return 2
    try:
        with open(path, "x", errors="backslashreplace") as file:  # a file's name may be no text
            file.write(str(error))
    except OSError:
        pass
    # Where NCCL is used, ranks that did not meet the mistake hang in a collective until one fails; gloo's notice it.
    import torch

    return int(torch.cuda.is_available())
