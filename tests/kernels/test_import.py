"""The kernels' module on machines without triton, and what importing it drags in."""

import subprocess
import sys

from .support import skip_if_interpreting

WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # any import of it fails
import torch
before = set(sys.modules)
import ltfast.kernels as kernels
added = {name.split(".")[0] for name in set(sys.modules) - before}
assert added <= {"ltfast", "statistics", "_statistics", "decimal", "_decimal", "fractions", "numbers"}, added
assert "torch._dynamo" not in sys.modules and "torch._inductor" not in sys.modules
theta, rows = torch.ones(5), torch.ones(2, 5)
partials = kernels.gram_partials(rows, theta)
coef, _ = kernels.ascent_coefficients(*partials, None, None, 5, direction="joint", rho=0.1)
out = kernels.perturb(theta, rows, coef)
kernels.sgd_step(theta, rows[0], None, 0.5)
assert abs((out - 1).norm().item() - 0.1) < 1e-6 and theta.tolist() == [0.5] * 5
print("fine")
"""


@skip_if_interpreting()
def test_the_oracles_need_no_triton():
    result = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True)
    assert result.stdout.strip() == "fine", result.stderr
