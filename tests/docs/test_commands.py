"""Every command of README.md and docs/*.md, run at smoke size or read by the parser it would meet; see rules.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ltfast.cli import main
from ltfast.report import geometry
from tests.docs import parsing
from tests.docs.blocks import PAGES, PROGRAMS, ROOT, Command, blocks, commands, is_script
from tests.docs.rules import PARSED, RUN, SLOW, rule_for

COMMANDS = commands()


def of_mode(*modes: str) -> list[Command]:
    """Commands by the mode of their rule."""
    return [c for c in COMMANDS if (rule := rule_for(c.text)) is not None and rule.mode in modes]


def named(command: Command) -> str:
    return f"{command.where} {command.text}"[:90]


def test_every_command_has_a_rule() -> None:
    without = [f"{c.where}: {c.text}" for c in COMMANDS if rule_for(c.text) is None]
    assert not without, "add a rule to tests/docs/rules.py for: " + "; ".join(without)
    assert rule_for("ltfast publish RUN") is None  # an unknown command would be found
    assert len(of_mode(RUN)) > len(of_mode(SLOW))
    assert len(of_mode(RUN)) >= 15


def test_every_block_says_what_it_is() -> None:
    for page in PAGES:
        for block in blocks(page):
            assert block.language in ("bash", "python", "toml", ""), f"{block.page}:{block.line}"
            if block.language == "":  # a listing
                starts = {line.split()[0] for line in block.text.splitlines() if line.strip()}
                assert not starts & set(PROGRAMS), f"{block.page}:{block.line} holds a command, mark it ```bash"


def run(command: Command, place: dict[str, str]) -> None:
    """Through the command line's own entry point, with the rule's words added; exit code 0."""
    rule = rule_for(command.text)
    assert rule is not None
    resumes = "--resume" in command.words
    words = [place["STOPPED" if resumes and w == "RUN" else w] if w in place else w for w in command.words[1:]]
    if words[-1] == "--help":
        with pytest.raises(SystemExit) as stop:
            main(words)
        assert stop.value.code == 0
        return
    code = main([*words, *rule.extra])
    assert code == 0 or words[0] == "doctor"  # 1 where this machine lacks something
    if words[0] == "train" and "--dry-run" not in words and not resumes:
        assert list(Path("runs").rglob("last.safetensors")) or "--out" in words


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Report figures at sizes that take a second."""
    for name, value in (
        ("IMAGES", 16), ("LANCZOS_STEPS", 4), ("LANCZOS_MINIMUM", 2), ("LANCZOS_PROBES", 1), ("TRACE_PROBES", 1), ("LEVELS", 1),
    ):  # fmt: skip
        monkeypatch.setattr(geometry, name, value)
    monkeypatch.setattr("ltfast.report.style.DPI", 40)


@pytest.mark.parametrize("command", of_mode(RUN), ids=named)
def test_command_runs(command: Command, place: dict[str, str]) -> None:
    run(command, place)


@pytest.mark.slow
@pytest.mark.parametrize("command", of_mode(SLOW), ids=named)
def test_slow_command_runs(command: Command, place: dict[str, str]) -> None:
    if "onnx" in command.words:
        for name in ("onnx", "onnxscript"):
            pytest.importorskip(name)
    run(command, place)


@pytest.mark.parametrize("command", of_mode(PARSED, SLOW), ids=named)
def test_command_is_parsed(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parsed only: needs GPUs, machines, large data or an install."""
    parsing.check(command.words, monkeypatch)


@pytest.mark.parametrize(
    "words", ["ltfast train --epoch x --gpus 8", "python benchmarks/run.py --budgets 3", "pip install -e .[gpu]"]
)
def test_wrong_words_are_refused(
    words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises((Exception, SystemExit)):
        parsing.check(words.split(), monkeypatch)


BENCHMARKS = sorted({c.words[1] for c in COMMANDS if c.words[0] == "python" and c.words[1].endswith(".py")})


@pytest.mark.slow
@pytest.mark.parametrize("script", BENCHMARKS)
def test_script_finds_its_imports(script: str) -> None:
    """In a fresh interpreter with nothing on the path but what `python script` gives."""
    if "argparse" not in (ROOT / script).read_text():
        return  # it would do its work
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run([sys.executable, script, "--help"], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout


SCRIPTS = [block for page in PAGES for block in blocks(page) if block.language == "bash" and is_script(block)]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda b: f"{b.page}:{b.line}")
@pytest.mark.parametrize("again", [False, True], ids=["first", "requeued"])
def test_script_starts_a_job_that_parses(script, again: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch script is run by bash with stand-ins for Slurm's programs; what srun would start is parsed."""
    (tmp_path / "bin").mkdir()
    nodes = 'if [ "$1" = show ]; then echo node1; echo node2; fi'
    for name, text in (("srun", 'printf "%s\\n" "$@" > srun.txt'), ("scontrol", nodes)):
        path = tmp_path / "bin" / name
        path.write_text(f"#!/bin/bash\n{text}\n")
        path.chmod(0o755)
    (tmp_path / "script.sh").write_text(script.text)
    if again:
        run_folder = next(line.split("=")[1] for line in script.text.splitlines() if line.startswith("run="))
        (tmp_path / run_folder).mkdir(parents=True)
        (tmp_path / run_folder / "config.toml").write_text("")
    env = {"PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}", "DATA": "data", "SLURM_JOB_ID": "7"}
    env |= {"SLURM_NNODES": "4", "SLURM_JOB_NODELIST": "node[1-4]"}
    subprocess.run(["bash", "-eu", "script.sh"], cwd=tmp_path, env=env, check=True, timeout=60)
    words = (tmp_path / "srun.txt").read_text().split("\n")[:-1]
    assert ("--resume" in words) == again
    assert "node1:29400" in words
    parsing.check(words, monkeypatch)
