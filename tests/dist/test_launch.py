"""The command line with several processes: launching, restarting after a death, stopping, torchrun, users' mistakes."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ltfast import cli, cli_train, dist, launch
from ltfast.build import build_device
from ltfast.config import Config
from ltfast.dist import Ranks, joined, lost_peer, start
from ltfast.errors import UserError
from ltfast.recipes import build_config
from ltfast.runs import RunFolder
from ltfast.train import train
from tests.pretended import pretended_gpu
from tests.procs import free_port, run_ranks
from tests.test_resume import assert_same_run, log

TRAIN = [
    sys.executable, "-m", "ltfast", "train", "--batch", "36", "--fisher-budget", "16", "--deterministic", "--no-tensorboard",
    "--device", "cpu", "--method", "gsa-full+gkp", "--gram-every", "4", "--checkpoint-minutes", "1e-5",
]  # fmt: skip
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@contextmanager
def started(words: list[str]) -> Iterator[subprocess.Popen[str]]:
    """A process group that does not outlive the test."""
    process = subprocess.Popen(
        words, env=ENVIRONMENT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )
    try:
        yield process
    finally:
        for pid in [process.pid, *workers(process.pid)]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        process.communicate()


def workers(pid: int) -> list[int]:
    """Its child processes."""
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def is_worker(pid: int) -> bool:
    """Whether it is one of a run's processes, not a short-lived child of an import."""
    with suppress(OSError):
        return b"RANK=" in Path(f"/proc/{pid}/environ").read_bytes()
    return False


def until(condition: Callable[[], object], process: subprocess.Popen[str], seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "nothing happened in time"
        time.sleep(0.02)


def finish(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, (out, err)
    return out


def undisturbed(ranks: Ranks, out: str) -> None:
    flags = {
        "batch": 36,
        "fisher_budget": 16,
        "deterministic": True,
        "tensorboard": False,
        "device": "cpu",
        "gram_every": 4,
    }
    train(build_config("digits-lt", "gsa-full+gkp", {}, {**flags, "epochs": 4, "out": out}), ranks=ranks)


@pytest.mark.dist
def test_a_killed_worker_costs_nothing_but_time(tmp_path: Path) -> None:
    """One of two processes is killed: both start again from the last checkpoint, and the result is the same to the bit."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    run_ranks(2, tmp_path / "ranks", undisturbed, str(whole))
    with started([*TRAIN, "--procs", "2", "--epochs", "4", "--out", str(run)]) as process:
        until(lambda: list((run / "checkpoints").glob("state-*")), process)
        victim = workers(process.pid)[-1]
        assert is_worker(victim)
        os.kill(victim, signal.SIGKILL)
        out = finish(process)
        assert "each step sends" in out
        assert re.search(
            r"a process has died, .*\(restart 1 of at most 3\); continuing after \d+ steps, in epoch \d", out
        )
        assert out.count("top-1 %") == 1, f"one process speaks: {out}"
    assert_same_run(whole, run)


@pytest.mark.dist
def test_sigterm_then_torchrun(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with started([*TRAIN, "--procs", "2", "--epochs", "30", "--out", str(run)]) as process:
        until(lambda: list((run / "checkpoints").glob("state-*")), process)
        for pid in [*workers(process.pid), process.pid]:  # all of them, as Slurm does; the launcher hands its own on
            os.kill(pid, signal.SIGTERM)
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        assert err == "\nstopping after this step and a checkpoint; once more to stop at once\n", "torch says nothing"
        assert "stopped by SIGTERM" in out
        assert f"continue with: ltfast train --resume {run}" in out
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "ltfast"]
    with started([*torchrun, "train", "--resume", str(run), "--max-hours", "0.0002"]) as process:
        out = finish(process)
        assert "stopped after --max-hours 0.0002" in out
    epochs = [row["epoch"] for row in log(run) if row["kind"] == "epoch"]
    assert epochs == list(range(len(epochs)))
    assert len([row for row in log(run) if row["kind"] == "data"]) == 1


@pytest.mark.dist
def test_sigterm_before_a_resumed_run_goes_on(tmp_path: Path) -> None:
    run = tmp_path / "run"
    RunFolder.create(build_config("digits-lt", "ce", {}, {"out": str(run), "device": "cpu"})).close()
    with started([*TRAIN[:4], "--procs", "2", "--resume", str(run)]) as process:
        until(lambda: any(map(is_worker, workers(process.pid))), process)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, (out, err)
    remedy = f"continue from the last checkpoint with: ltfast train --resume {run}"
    assert err == f"ltfast: stopped by SIGTERM at once; {remedy}\n"


@pytest.mark.dist
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells children of their parent's end")
def test_workers_end_with_a_launcher_that_is_killed(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with started([*TRAIN, "--procs", "2", "--epochs", "300", "--out", str(run)]) as process:
        until(lambda: list((run / "checkpoints").glob("state-*")), process)
        ranks = workers(process.pid)
        process.kill()
        try:
            process.communicate(timeout=30)  # until the workers, who share its output, are gone as well
        finally:
            for pid in ranks:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
    RunFolder.open(run, lock=True).close()
    assert not RunFolder(run).metrics("test")


@pytest.mark.dist
@pytest.mark.parametrize("nohup", [False, True])
def test_a_hangup_of_the_launcher(tmp_path: Path, nohup: bool) -> None:
    run = tmp_path / "run"
    words = [*TRAIN, "--procs", "2", "--epochs", "4" if nohup else "30", "--out", str(run)]
    with started([*(["nohup"] if nohup else []), *words]) as process:
        until(lambda: list((run / "checkpoints").glob("state-*")), process)
        process.send_signal(signal.SIGHUP)
        out = finish(process)
    assert ("stopped by SIGHUP" in out) is not nohup
    assert bool(RunFolder(run).metrics("test")) is nohup


@pytest.mark.dist
def test_a_users_mistake_is_one_line_and_no_restart(tmp_path: Path) -> None:
    with started([*TRAIN, "--procs", "2", "--batch", "37", "--out", str(tmp_path / "run")]) as process:
        err = process.communicate(timeout=120)[1]
    assert process.returncode == 2
    fix = "choose a multiple of 2, or another number of processes"
    assert err == f"ltfast: --batch 37 cannot be shared evenly by 2 processes; {fix}\n", err
    assert not (tmp_path / "run").exists()


def config(**values: object) -> Config:
    return Config().with_(**values)


@pytest.mark.parametrize(
    ("values", "visible", "count"),
    [
        ({}, 0, 1), ({}, 8, 1), ({"dataset": "inat18"}, 8, 8), ({"dataset": "inat18"}, 0, 1),
        ({"dataset": "inat18", "device": "cpu"}, 8, 1),
        ({"dataset": "inat18", "device": "cuda"}, 8, 8), ({"gpus": 8}, 8, 8),
        ({"gpus": 4}, 8, 4), ({"gpus": 0, "dataset": "inat18"}, 8, 1), ({"procs": 3}, 8, 3),
    ],
)  # fmt: skip
def test_process_count(monkeypatch: pytest.MonkeyPatch, values: dict[str, object], visible: int, count: int) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: visible)
    assert launch.process_count(launch.on_cpu(config(**values))) == count


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"gpus": 9}, "--gpus 9: 8 CUDA"),
        ({"gpus": 1, "procs": 2}, "exclude"),
        ({"gpus": 0, "procs": 2}, "exclude"),
    ],
)
def test_process_count_refuses(monkeypatch: pytest.MonkeyPatch, values: dict[str, object], message: str) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    with pytest.raises(UserError, match=message):
        launch.process_count(config(**values))


def test_a_restarted_worker_finds_its_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert launch.restarted_run(config()) is None
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    with pytest.raises(UserError, match="give --out RUN"):
        launch.restarted_run(config())
    assert launch.restarted_run(config(out=str(tmp_path))) is None, "it died before the folder was made"
    assert launch.restarted_run(config(), "RUN") == "RUN"
    (tmp_path / "config.toml").write_text("")
    assert launch.restarted_run(config(out=str(tmp_path))) == str(tmp_path)
    (tmp_path / "message").write_text("no such file")
    monkeypatch.setenv(launch.MESSAGE, str(tmp_path / "message"))
    monkeypatch.setattr(dist, "start", lambda: pytest.fail("joins the others"))
    with pytest.raises(SystemExit, match=r"^0$"):
        cli_train.train_here(config(out=str(tmp_path)), None, {})
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    launch.end_after_mistake()


@pytest.mark.dist
def test_processes_whose_launchers_count_restarts_differently_go_on_together(tmp_path: Path) -> None:
    """A machine that was started again because another one was has counted nothing; rank 0 may be on it."""
    run = tmp_path / "run"
    RunFolder.create(build_config("digits-lt", "ce", {}, {"out": str(run), "device": "cpu"})).close()
    words = [*TRAIN[:4], "--method", "ce", "--device", "cpu", "--batch", "36", "--epochs", "1", "--out", str(run)]
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    second, first = (
        subprocess.Popen(
            words, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env=ENVIRONMENT | common | {"RANK": rank, launch.RESTARTS: count, "TORCHELASTIC_USE_AGENT_STORE": "False"},
        )
        for rank, count in (("1", "2"), ("0", "0"))
    )  # fmt: skip
    try:
        out = first.communicate(timeout=120)[0]
        assert (first.returncode, second.wait(30)) == (0, 0), out
    finally:
        for process in (first, second):
            process.kill()
            process.communicate()
    assert "(restart 2 of at most ?); " in out
    assert RunFolder(run).metrics("test")


def test_a_mistake_that_one_rank_alone_meets_ends_the_others(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With gloo they notice that it is gone; with NCCL they would hang, so it must fail for the launcher to end them."""
    monkeypatch.setenv(launch.MESSAGE, str(tmp_path / "message"))
    for gpu in (False, True):
        monkeypatch.setattr("torch.cuda.is_available", lambda gpu=gpu: gpu)
        assert launch.report(UserError("bad picture")) == int(gpu)
        assert launch.report(UserError("what followed from it")) == int(gpu)
    assert (tmp_path / "message").read_text() == "bad picture"


def test_alone_a_mistake_is_told_by_one_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in (launch.MESSAGE, "TORCHELASTIC_ERROR_FILE", "RANK"):
        monkeypatch.delenv(name, raising=False)
    for rank, text in ((None, "ltfast: bad picture\n"), ("0", "ltfast: bad picture\n"), ("1", "")):
        if rank is not None:
            monkeypatch.setenv("RANK", rank)
        assert launch.report(UserError("bad picture")) == 2
        assert capsys.readouterr().err == text


class Elastic:
    """Stands for torch's launcher: notes what it was given and ends as `work` does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, work: Callable[[], object]) -> None:
        self.work = work
        monkeypatch.setattr("torch.distributed.launcher.api.elastic_launch", self.launch)
        monkeypatch.setattr(launch, "_quiet", lambda message: None)
        for name in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES"):
            monkeypatch.setenv(name, "")  # so that what `launch` sets does not outlive the test
            monkeypatch.delenv(name)

    def launch(self, config: Any, program: str) -> Callable[..., object]:
        self.config, self.environment = config, dict(os.environ)

        def run(*words: str) -> object:
            self.words = words
            return self.work()

        return run


@pytest.mark.parametrize(("count", "cores", "threads"), [(4, 64, "16"), (3, 8, "2"), (8, 2, "1")])
def test_workers_share_the_cores_and_are_told_of_their_launcher(
    monkeypatch: pytest.MonkeyPatch, count: int, cores: int, threads: str
) -> None:
    elastic = Elastic(monkeypatch, lambda: None)
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    assert launch.launch(count, ["train"], out="run", max_restarts=5, cpu=True) == 0
    assert elastic.words == ("-m", "ltfast", "train")
    assert (elastic.config.nproc_per_node, elastic.config.max_restarts) == (count, 5)
    assert elastic.environment["OMP_NUM_THREADS"] == threads
    assert elastic.environment["CUDA_VISIBLE_DEVICES"] == ""
    assert elastic.environment[launch.LAUNCHER] == str(os.getpid())
    assert not {launch.MESSAGE, launch.LAUNCHER, launch.STARTED} & set(os.environ)


def test_a_launch_ends_as_its_workers_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    def fails() -> None:
        raise ChildFailedError("ltfast", {1: ProcessFailure(1, 77, -signal.SIGKILL, "no file")})

    def meets_a_mistake() -> None:
        Path(os.environ[launch.MESSAGE]).write_text("one bad picture")
        fails()

    Elastic(monkeypatch, fails)
    assert launch.launch(2, [], out=str(tmp_path), max_restarts=3, cpu=False) == 1
    assert (
        capsys.readouterr().err == "ltfast: process 1 ended with SIGKILL after 3 restarts, before the run had begun\n"
    )
    (tmp_path / "config.toml").touch()
    assert launch.launch(2, [], out=str(tmp_path), max_restarts=0, cpu=False) == 1
    text = capsys.readouterr().err
    assert text.startswith("ltfast: process 1 ended with SIGKILL and --max-restarts is 0; continue with: ltfast train")
    Elastic(monkeypatch, meets_a_mistake)
    with pytest.raises(UserError, match=r"^one bad picture$"):
        launch.launch(2, [], out=str(tmp_path), max_restarts=3, cpu=False)
    assert capsys.readouterr().err == ""
    assert launch.MESSAGE not in os.environ


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells children of their parent's end")
def test_a_worker_whose_launcher_is_gone_before_it_could_ask_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr("ctypes.CDLL", lambda _: SimpleNamespace(prctl=lambda *args: asked.append(args)))
    monkeypatch.delenv(launch.LAUNCHER, raising=False)
    launch.end_with_launcher()
    assert not asked
    monkeypatch.setenv(launch.LAUNCHER, str(os.getppid()))
    launch.end_with_launcher()
    assert asked == [(1, signal.SIGTERM)]
    monkeypatch.setenv(launch.LAUNCHER, str(os.getpid()))
    with pytest.raises(SystemExit, match=str(128 + signal.SIGTERM)):
        launch.end_with_launcher()


def test_torchruns_summary_says_what_one_rank_alone_met(tmp_path: Path) -> None:
    """Rank 0 says nothing of it; torchrun would name an exit code."""
    worker = tmp_path / "worker.py"
    worker.write_text(
        "import os, sys, time\nfrom ltfast import launch\nfrom ltfast.errors import UserError\n"
        "sys.exit(launch.report(UserError('only here'))) if os.environ['RANK'] == '1' else time.sleep(60)\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(worker)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 1
    assert "ltfast: only here" in ended.stderr


@pytest.mark.parametrize("error", [UserError("one bad picture"), ValueError("a fault of ours")])
def test_a_rank_that_fails_beside_nccl_ends_without_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    """NCCL's communicators end on all ranks of a machine at once: leaving in order would wait for those that wait for it."""

    def fails(*_: object, **__: object) -> None:
        raise error

    def ends(code: int) -> None:
        raise SystemExit(code)

    message = tmp_path / "message"
    monkeypatch.setenv(launch.MESSAGE, str(message))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.destroy_process_group", lambda: pytest.fail("waits for the others"))
    monkeypatch.setattr("ltfast.train.train", fails)
    monkeypatch.setattr(dist, "start", lambda: Ranks(1, 2, 1))
    monkeypatch.setattr(os, "_exit", ends)
    with pytest.raises(SystemExit, match=r"^1$"):
        cli_train.train_here(Config(), None, {})
    if isinstance(error, UserError):
        assert message.read_text() == "one bad picture"
    else:
        assert "ValueError: a fault of ours" in capsys.readouterr().err


def test_processes_of_other_machines_are_not_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "16")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert launch.processes_here() == 8
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert launch.processes_here() == 1


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("option", ["--procs", "--gpus"])
def test_another_number_than_torchruns_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, option: str, resume: bool
) -> None:
    """It would have no effect and stand in config.toml."""
    begun: list[object] = []
    monkeypatch.setattr(cli_train, "train_here", lambda *arguments: begun.append(arguments) or 0)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    monkeypatch.delenv(launch.MESSAGE, raising=False)
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "4"), ("LOCAL_WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    words = ["train", "--resume" if resume else "--out", str(tmp_path)]
    for count, code in (("3", 2), ("1", 2), ("4", 2), ("2", 0), ("0", 0)):
        assert cli.main([*words, option, count]) == code
        said = f"ltfast: {option} {count}: the launcher runs 2 processes here; leave {option} out\n"
        assert capsys.readouterr().err == (said if code else "")
    monkeypatch.delenv("LOCAL_WORLD_SIZE")  # what only some launchers set
    assert cli.main([*words, option, "4"]) == 0
    assert len(begun) == 3


def test_several_processes_are_not_put_on_one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(UserError, match="--device cuda:1: several processes need a GPU each"):
        build_device(build_config("digits-lt", "ce", {}, {"device": "cuda:1"}), Ranks(1, 2, 1))


@pytest.mark.parametrize("chosen", [None, "Ring"])
@pytest.mark.parametrize("deterministic", [False, True])
def test_nccl_connects_before_there_is_a_folder(
    monkeypatch: pytest.MonkeyPatch, deterministic: bool, chosen: str | None
) -> None:
    """It reads its variables then, and fails then if it does."""
    sent: list[tuple[torch.device, str | None]] = []

    def sum_(self: Ranks, tensor: torch.Tensor) -> torch.Tensor:
        sent.append((tensor.device, os.environ.get("NCCL_ALGO")))
        return tensor

    monkeypatch.setattr(Ranks, "sum_", sum_)
    monkeypatch.setattr("torch.use_deterministic_algorithms", lambda mode: None)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("NCCL_ALGO", chosen or "")
    if chosen is None:
        monkeypatch.delenv("NCCL_ALGO")
    config = build_config("digits-lt", "ce", {}, {"device": "cuda", "deterministic": deterministic})
    with pretended_gpu(2):
        build_device(config, Ranks())
        assert not sent
        assert build_device(config, Ranks(1, 2, 1)) == torch.device("cuda:1")
        build_device(config.with_(device="cpu"), Ranks(1, 2, 1))
    assert sent == [(torch.device("cuda:1"), chosen or ("^NVLS" if deterministic else None))]


def test_a_process_of_another_machine_has_its_own_device_and_writes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second of the second machine's eight, and its first."""
    monkeypatch.setattr("ltfast.dist._joined", Ranks())  # put back afterwards
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.new_group", lambda **_: "host")
    monkeypatch.setattr("torch.distributed.all_reduce", lambda *_, **__: None)
    monkeypatch.setenv(launch.RESTARTS, "0")
    values = {"WORLD_SIZE": "16", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for rank, local in (("9", "1"), ("8", "0")):
        for name, value in (*values.items(), ("RANK", rank), ("LOCAL_RANK", local)):
            monkeypatch.setenv(name, value)
        assert start() == joined() == Ranks(int(rank), 16, int(local))
        assert not joined().main
        assert joined().host == "host"


def test_workers_keep_the_threads_that_the_user_has_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    elastic = Elastic(monkeypatch, lambda: None)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert launch.launch(2, ["train"], out="run", max_restarts=0, cpu=False) == 0
    assert elastic.environment["OMP_NUM_THREADS"] == "3"


def test_workers_on_gpus_see_them(monkeypatch: pytest.MonkeyPatch) -> None:
    elastic = Elastic(monkeypatch, lambda: None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    assert launch.launch(2, ["train"], out="run", max_restarts=0, cpu=False) == 0
    assert elastic.environment["CUDA_VISIBLE_DEVICES"] == "4,5"


def test_workers_have_time_for_a_checkpoint_and_a_store_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    elastic = Elastic(monkeypatch, lambda: None)
    assert launch.launch(2, ["train"], out="run", max_restarts=0, cpu=True) == 0
    assert elastic.environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] == str(launch.GRACE_SECONDS)
    assert getattr(elastic.config, "shutdown_timeout", launch.GRACE_SECONDS) == launch.GRACE_SECONDS
    assert elastic.environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"


def test_workers_know_when_their_launcher_started_by_their_own_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """--max-hours counts from there."""
    elastic, before = Elastic(monkeypatch, lambda: None), time.monotonic()
    assert launch.launch(2, ["train"], out="run", max_restarts=0, cpu=True) == 0
    assert before <= float(elastic.environment[launch.STARTED]) <= time.monotonic()


NCCL_ERROR = torch.distributed.DistBackendError(
    "NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.cpp:94, unhandled system error (run with NCCL_DEBUG=INFO "
    "for details), NCCL version 2.27.5\nncclSystemError: System call (e.g. socket, malloc) or external library call failed or "
    "device error. \nLast error:\nError while creating shared memory segment /dev/shm/nccl-8bN2dQ (size 9637888), error: No "
    "space left on device (28)\nException raised from getNCCLComm (most recent call first):\nframe #0: c10::Error"
)


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (
            RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1"),
            "because another one is gone",
        ),
        (RuntimeError("size mismatch"), None),
        (RuntimeError("Connection refused"), None),
    ],
)
def test_whose_fault_a_failed_collective_is(error: RuntimeError, why: str | None) -> None:
    assert lost_peer(error) == why


def test_what_nccl_says_is_shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """It fails in the same way where a process is gone and where something is wrong with the machine."""

    def fails(*_: object, **__: object) -> None:
        raise NCCL_ERROR

    monkeypatch.setattr("ltfast.train.train", fails)
    monkeypatch.delenv(launch.MESSAGE, raising=False)
    assert cli_train.train_as(Ranks(1, 2, 1), Config(), None, {}) == 1
    err = capsys.readouterr().err
    assert err.startswith("ltfast: process 1 ends because another one is gone, or of this: NCCL error in: /pytorch")
    assert err.endswith("error: No space left on device (28)\n")
    assert err.count("\n") == 1
