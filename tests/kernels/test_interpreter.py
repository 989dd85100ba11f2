"""Runs the parity tests a second time with TRITON_INTERPRET=1: then CPU tensors take the Triton kernels."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from .support import skip_if_interpreting

HERE = Path(__file__).parent
FILES = ("gram", "coefficients", "perturb", "step", "anchor", "conv", "ops", "working_copy", "counts", "large", "graph")
# triton 3.6's interpreter cannot turn a bound of range() into an int with numpy 2.4; later ones can.
PROBE = """
import numpy, torch, triton, triton.language as tl
@triton.jit
def _probe(out, n):
    for i in range(0, n):
        tl.store(out + i, 1.0)
out = torch.zeros(3)
try:
    _probe[(1,)](out, 3)
except Exception:
    print("broken")
"""


@skip_if_interpreting()
def test_the_kernels_pass_the_same_tests_in_the_interpreter(tmp_path):
    triton = pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    probe = tmp_path / "probe.py"
    probe.write_text(PROBE)
    found = subprocess.run([sys.executable, str(probe)], env=environment, capture_output=True, text=True, check=True)
    if "broken" in found.stdout:
        pytest.skip(f"the interpreter of triton {triton.__version__} does not run with this numpy")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not gpu and not slow", "-rf"]
    command += ["-W", "ignore:Conversion of an array with ndim:DeprecationWarning"]  # triton 3.6 with numpy 1.25 to 2.3
    files = [str(HERE / f"test_{name}.py") for name in FILES]
    run = subprocess.run([*command, *files], env=environment, capture_output=True, text=True, cwd=HERE.parents[1])
    summary = run.stdout.strip().splitlines()[-1]
    assert run.returncode == 0, run.stdout[-4000:]
    passed = re.search(r"(\d+) passed", summary)
    assert passed, summary
    assert int(passed[1]) >= 250, summary
    print(summary)
