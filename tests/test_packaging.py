"""Wheel, sdist and editable installs all carry ltfast.kernels; the public API changes only on purpose."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROBE = "import ltfast, ltfast.kernels, ltfast.baselines; print(ltfast.kernels.__file__); assert ltfast.kernels.gram"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("build")
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    files = subprocess.run(["git", "-C", str(ROOT), "ls-files"], capture_output=True, text=True).stdout.split()
    if not files:
        pytest.skip("not a git checkout: nothing tells which files belong to the package")
    for name in files:
        if name.startswith(("ltfast/", "kernels/")) or "/" not in name:
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return out


def imported_from(folder: Path, tmp_path: Path) -> str:
    env = {**os.environ, "PYTHONPATH": str(folder)}
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_wheel_holds_the_kernels(built: Path, tmp_path: Path) -> None:
    wheel = next(built.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "w")
    assert imported_from(tmp_path / "w", tmp_path) == str(tmp_path / "w" / "ltfast" / "kernels" / "__init__.py")
    for name in ("py.typed", "baselines.json"):
        assert (tmp_path / "w" / "ltfast" / name).exists()


def test_sdist_holds_the_kernels(built: Path) -> None:
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        names = archive.getnames()
    for wanted in ("setup.py", "kernels/gram.py", "ltfast/train.py", "README.md"):
        assert any(name.endswith("/" + wanted) for name in names), wanted


def test_editable_install_imports_the_kernels(tmp_path: Path) -> None:
    """From another folder, as a user would; skipped where ltfast is only on the path, not installed."""
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, cwd=tmp_path)
    if "No module named 'ltfast'" in done.stderr:
        pytest.skip("ltfast is not installed")
    assert done.returncode == 0, done.stderr


def test_public_api_changes_only_on_purpose() -> None:
    """The names that README and docs promise; a change here is a change for users and belongs in CHANGELOG.md."""
    import ltfast.kernels
    import ltfast.optim
    from ltfast.cli import build_parser

    assert set(ltfast.kernels.__all__) == {
        "AscentStats", "adamw_step", "anchor_penalty", "ascent_coefficients", "collapse_anchors", "counting", "gram",
        "gram_partials", "perturb", "sgd_step",
    }  # fmt: skip
    assert {"SAM", "FriendlySAM", "ImbSAM", "CCSAM", "FocalSAM", "GSA"} <= set(ltfast.optim.__all__)
    commands = build_parser().format_help()
    for verb in ("train", "eval", "data", "report", "export", "predict", "doctor", "bench", "methods", "datasets"):
        assert f"\n    {verb} " in commands
