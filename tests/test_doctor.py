"""The doctor finds what is there, notices what is wrong, and its self-test rejects wrong kernels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ltfast import doctor
from ltfast.cli import main
from ltfast.errors import UserError


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "DISK_BYTES", 2 * doctor.MIB)
    assert main(["doctor", "--dir", str(tmp_path), "--json"]) == 0
    findings = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert (
        findings["torch"]["value"] == torch.__version__.split("+")[0] or findings["torch"]["value"] == torch.__version__
    )
    assert {
        "python",
        "processor",
        "disk",
        "shared memory",
        "loader",
        "kernel gram",
        "kernel adamw_step",
    } <= findings.keys()
    assert not list(tmp_path.iterdir()), "the test file is gone"
    doctor.print_findings([doctor.Finding(**row) for row in findings.values()])
    assert "nothing is broken" in capsys.readouterr().out


def test_the_self_test_rejects_wrong_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    import ltfast.kernels as kernels

    assert all(f.level == "ok" for f in doctor.kernels("cpu"))
    right = kernels.sgd_step

    def without_decay(*args: Any, **options: Any) -> None:
        right(*args, **{**options, "weight_decay": 0.0})

    monkeypatch.setattr(kernels, "sgd_step", without_decay)
    monkeypatch.setattr(kernels, "perturb", lambda theta, *args, **options: torch.zeros_like(theta))
    monkeypatch.setattr(kernels, "gram", lambda *args, **options: 1 / 0)
    levels = {f.name: f for f in doctor.kernels("cpu")}
    assert levels["kernel sgd_step"].level == "fail"
    assert levels["kernel perturb"].level == "fail"
    assert "ZeroDivisionError" in levels["kernel gram"].value
    assert levels["kernel adamw_step"].level == "ok"


def test_slow_disk_small_shared_memory_and_missing_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "DISK_BYTES", 2 * doctor.MIB)
    monkeypatch.setattr(doctor, "SLOW_DISK", 1e9)
    assert doctor.disk(tmp_path).level == "note"
    monkeypatch.setattr(doctor, "SHM_NEEDED", 1 << 60)
    assert any("--shm-size" in f.advice for f in doctor.memory())
    monkeypatch.setattr(doctor, "PACKAGES", ("no-such-package",))
    assert next(f for f in doctor.versions() if f.name == "no-such-package").advice == "pip install no-such-package"
    assert doctor.disk(tmp_path / "missing").level == "fail"
    with pytest.raises(UserError, match="no such folder"):
        doctor.examine(tmp_path / "missing")


def test_pictures(tmp_path: Path) -> None:
    assert doctor.pictures(tmp_path).level == "fail"
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "y.jpg").symlink_to(tmp_path / "gone")
    assert doctor.pictures(tmp_path).value.endswith("none of 1 files can be read")
    (tmp_path / "a" / "x.jpg").write_bytes(b"x" * 100)
    found = doctor.pictures(tmp_path)
    assert "files/s" in found.value
    assert (found.level, found.value.endswith("1 files cannot be read")) == ("note", True)


def test_a_pack_is_read_as_a_folder_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "DISK_BYTES", 2 * doctor.MIB)
    (tmp_path / "s.npz").write_bytes(b"x" * (3 * doctor.MIB))
    found = {f.name: f for f in doctor.examine(tmp_path, tmp_path / "s.npz")}
    assert "MiB/s" in found["pictures"].value
    with pytest.raises(UserError, match=r"none.npz: no such file or folder"):
        doctor.examine(tmp_path, tmp_path / "none.npz")
    with pytest.raises(UserError, match=r"s.npz: no such folder"):
        doctor.examine(tmp_path / "s.npz")


def test_a_processor_with_bf16_is_told_what_is_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for has, said in (({"avx512_bf16": True}, True), ({"avx512_bf16": False, "avx2": True}, False), ({}, False)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda has=has: has)
        (finding,) = doctor.gpus()
        assert ("--precision bf16 --compile on" in finding.advice) == said
