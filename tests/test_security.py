"""Rules that hold for the whole source: no pickle that can run code, no server, no network but for --download."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import ltfast
from ltfast.errors import UserError

ROOT = Path(ltfast.__file__).parent.parent
SOURCES = sorted((ROOT / "ltfast").rglob("*.py")) + sorted((ROOT / "kernels").rglob("*.py"))
# The one reader of pickles: CIFAR's own files, through an unpickler that makes arrays and nothing else.
MAY_IMPORT_PICKLE = {"ltfast/data/cifar.py"}
FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
NETWORK_MODULES = {"urllib", "http", "requests", "socket", "ftplib", "huggingface_hub"}


def calls(tree: ast.AST) -> list[tuple[str, ast.Call]]:
    return [(ast.unparse(node.func), node) for node in ast.walk(tree) if isinstance(node, ast.Call)]


def imports(tree: ast.AST) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found


def violations(name: str, text: str) -> list[str]:
    tree, found = ast.parse(text), []
    modules = imports(tree)
    if name not in MAY_IMPORT_PICKLE:
        found += sorted(modules & FORBIDDEN_MODULES)
    found += sorted(modules & NETWORK_MODULES)
    for function, call in calls(tree):
        options = {word.arg: ast.unparse(word.value) for word in call.keywords}
        if function == "torch.load" and options.get("weights_only") != "True":
            found.append("torch.load without weights_only=True")
        if function in ("np.load", "numpy.load") and options.get("allow_pickle", "False") != "False":
            found.append("numpy.load with pickles")
        if function in ("eval", "exec", "os.system", "pickle.load", "pickle.loads") or options.get("shell") == "True":
            found.append(function)
        if "tensorboard" in function.lower() and "program" in function.lower():
            found.append("starts TensorBoard")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_source_keeps_the_rules(path: Path) -> None:
    assert violations(str(path.relative_to(ROOT)), path.read_text()) == []


@pytest.mark.parametrize(
    "text",
    [
        "import pickle", "from joblib import load", "torch.load(p)", "torch.load(p, weights_only=False)", "np.load(p, allow_pickle=True)",
        "eval(s)", "import urllib.request", "subprocess.run(s, shell=True)", "tensorboard.program.TensorBoard().launch()",
    ],
)  # fmt: skip
def test_the_rules_notice(text: str) -> None:
    assert violations("ltfast/x.py", text)


def test_list_paths_cannot_leave_the_data_root(tmp_path: Path) -> None:
    from ltfast.data.lists import read_list

    root = tmp_path / "root"
    (root / "a").mkdir(parents=True)
    (tmp_path / "secret.jpg").write_bytes(b"x")
    for name in ("../secret.jpg", "a/../../secret.jpg", str(tmp_path / "secret.jpg"), "/etc/passwd"):
        (tmp_path / "list.txt").write_text(f"{name} 0\n")
        with pytest.raises(UserError, match="leaves"):
            read_list(tmp_path / "list.txt", root)
    (tmp_path / "list.txt").write_text("a/x..jpg 0\n")  # dots within a name are no escape
    assert len(read_list(tmp_path / "list.txt", root)) == 1


def test_resume_refuses_a_foreign_state(tmp_path: Path) -> None:
    """A run folder from elsewhere can hold wrong numbers, not code: everything is safetensors, TOML and JSON."""
    import torch

    from ltfast import checkpoint
    from ltfast.recipes import build_config
    from ltfast.train import train

    run = tmp_path / "run"
    train(
        build_config(
            "digits-lt", "ce", {}, {"epochs": 1, "limit_train": 72, "batch": 36, "device": "cpu", "out": str(run)}
        )
    )
    state = next((run / "checkpoints").glob("state-*"))
    tensors, meta = checkpoint.load(state)
    for broken in ({**tensors, "theta": torch.zeros(5)}, {k: v for k, v in tensors.items() if k != "update.slot0"}):
        checkpoint.save(state, broken, meta)
        with pytest.raises(UserError, match="--resume"):
            train(build_config("digits-lt", "ce", {}, {}), resume=str(run))


WATCHED = """
import json, sys
seen = []
def watch(event, arguments):
    if event in ("socket.connect", "socket.bind", "socket.getaddrinfo", "socket.sendto", "urllib.Request"):
        seen.append([event, repr(arguments)])
sys.addaudithook(watch)
from ltfast.cli import main
codes = [main(words) for words in json.loads(sys.argv[1])]
if sys.argv[2] == "reach":
    import socket
    socket.socket(socket.AF_INET, socket.SOCK_DGRAM).connect(("127.0.0.1", 9))
print(json.dumps([codes, seen]))
"""


def watched(commands: list[list[str]], how: str = "") -> tuple[list[int], list[list[str]]]:
    """Exit codes of ltfast commands, and what they did with sockets."""
    words = [sys.executable, "-c", WATCHED, json.dumps(commands), how]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    codes, seen = json.loads(done.stdout.splitlines()[-1])
    return codes, seen


def test_no_command_touches_the_network_or_listens(tmp_path: Path) -> None:
    """TensorBoard events are written while training: no server comes with them."""
    from PIL import Image

    run, picture = str(tmp_path / "run"), str(tmp_path / "x.png")
    Image.new("L", (8, 8)).save(picture)
    small = ["--method", "ce", "--epochs", "1", "--limit-train", "72", "--batch", "36", "--device", "cpu"]
    commands = [
        ["train", "--out", run, *small], ["train", "--resume", run], ["eval", run], ["predict", run, picture],
        ["export", run, "--format", "torch-export"], ["doctor", "--dir", str(tmp_path)],
        ["train", "--dataset", "cifar10-lt", "--data-dir", str(tmp_path)],
    ]  # fmt: skip
    codes, seen = watched(commands)
    assert codes == [0, 0, 0, 0, 0, 0, 2], "a missing data set is named, not fetched"
    assert list(Path(run, "events").iterdir())
    assert seen == []
    assert watched([], "reach")[1], "the watch sees a connection"
