"""The package's types reach its users: a strictly checked program on the installed layout sees complete signatures."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.blocks import ROOT
from tests.docs.test_api import MODULES, public_names

USER = """
import torch
from ltfast.optim import GSA, SAM, frozen_statistics
model = torch.nn.Linear(3, 2)
optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.05, adaptive=False, lr=0.1)
optimizer.first_step(zero_grad=True)
optimizer.second_step(zero_grad=True)
with frozen_statistics(model):
    pass
GSA(model.parameters(), torch.optim.SGD, [3, 2], gram_every=16, lr=0.1).bind(model)
"""


@pytest.mark.slow
def test_a_strictly_checked_program_sees_types(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    site = tmp_path / "site"
    shutil.copytree(ROOT / "ltfast", site / "ltfast", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "kernels", site / "ltfast" / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    names = [f"{path}.{name}" for path in MODULES[1:] for name in public_names(__import__(path, fromlist=["_"]))]
    imports = "".join(f"import {path}\n" for path in MODULES[1:])
    reveals = "".join(f"reveal_type({name})\n" for name in names)
    program = tmp_path / "user.py"
    program.write_text(imports + USER + reveals)
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "--config-file", "", str(program)]
    done = subprocess.run(command, env={"MYPYPATH": str(site)}, cwd=tmp_path, capture_output=True, text=True)
    errors = [line for line in done.stdout.splitlines() if " error: " in line]
    assert not errors, "\n".join(errors)
    types = re.findall(r'Revealed type is "(.*)"', done.stdout)
    assert len(types) == len(names), done.stdout[-2000:] + done.stderr[-2000:]
    assert "Any" not in types
    gram = types[names.index("ltfast.kernels.gram")]
    assert re.fullmatch(
        r"def \(grads_GN: .*Tensor, theta_N: .*Tensor, adaptive: .*bool =\) -> tuple\[.*Tensor, .*Tensor.*\]", gram
    )
