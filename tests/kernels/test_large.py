"""Offsets beyond 2^31 elements, without the memory: address space is reserved, only the pages at the end are touched.

In the interpreter only the last block runs (its program index is set by hand), which is where 32-bit offsets would wrap.
"""

import mmap
import sys

import pytest
import torch
from torch import Tensor

from ltfast.kernels import adamw_step, gram_partials, perturb, sgd_step

from .support import check, normal, same_bits, skip_unless_interpreting

BIG = 2**31 + 1024 + 333  # the last block of 1024 holds 333
TAIL = 200


def reserve(n: int, dtype: torch.dtype) -> Tensor:
    """[n] zeros in address space that takes memory only where it is written."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)  # named since Python 3.13
    try:
        space = mmap.mmap(-1, n * dtype.itemsize, flags=flags)
    except OSError as error:
        pytest.skip(f"this machine does not lend {n * dtype.itemsize} bytes of address space: {error}")
    return torch.frombuffer(space, dtype=dtype)


@pytest.fixture
def last_block_only(monkeypatch):
    """Make every kernel run its last program alone, and the interpreter leave the storages where they are."""
    import triton.runtime.interpreter as interpreter

    from ltfast.kernels import common

    builder = interpreter.interpreter_builder
    set_size, set_index, ran = builder.set_grid_dim, builder.set_grid_idx, []

    def launch(kernel, grid, device, *args, **options):
        ran.append(grid[0])
        monkeypatch.setattr(builder, "set_grid_dim", lambda x, y, z: set_size(grid[0], y, z))
        monkeypatch.setattr(builder, "set_grid_idx", lambda x, y, z: set_index(grid[0] - 1, y, z))
        kernel[(1,)](*args, **options)

    monkeypatch.setattr(
        interpreter.GridExecutor, "_restore_args_dev", lambda *args: None
    )  # would copy 8 GB onto itself
    for name in ("perturb", "step"):
        monkeypatch.setattr(sys.modules[f"ltfast.kernels.{name}"], "launch", launch)
    assert common.INTERPRET
    return ran


@skip_unless_interpreting()
def test_the_last_elements_of_a_huge_perturbation(last_block_only):
    theta, grads = reserve(BIG, torch.float32), reserve(BIG, torch.bfloat16)[None]
    out = reserve(BIG, torch.bfloat16)
    theta[-TAIL:], grads[0, -TAIL:] = normal(TAIL, seed=1), normal(TAIL, seed=2)
    small = theta[-TAIL:].clone(), grads[:, -TAIL:].clone(), torch.tensor([2.0])
    perturb(theta, grads, small[2], True, out)
    assert last_block_only[0] * 1024 > 2**31
    check(out[-TAIL:], small[0] + small[0] ** 2 * 2 * small[1][0], "bf16", [small[0]])
    assert (out[:64] == 0).all()  # where offsets that wrapped would have written


@skip_unless_interpreting()
@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_the_last_elements_of_a_huge_update(last_block_only, kind):
    arrays = [reserve(BIG, torch.float32) for _ in range(4)]
    for i, array in enumerate(arrays):
        array[-TAIL:] = normal(TAIL, seed=i).abs()
    small = [a[-TAIL:].clone() for a in arrays]
    for theta, grad, m, v in (arrays, small):
        if kind == "sgd":
            sgd_step(theta, grad, m, 0.1, 0.9)
        else:
            adamw_step(theta, grad, m, v, 2, 0.1)
    assert last_block_only[0] * 1024 > 2**31
    assert all(same_bits(a[-TAIL:], b) for a, b in zip(arrays, small, strict=True))
    assert not same_bits(small[0], normal(TAIL, seed=0).abs())
    assert (arrays[0][:64] == 0).all()


@skip_unless_interpreting()
@pytest.mark.parametrize("rows", [3, 11])
def test_rows_far_apart(rows, monkeypatch):
    """r * stride passes 2^31 with the second row: slices of a huge buffer."""
    import triton.runtime.interpreter as interpreter

    monkeypatch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *args: None)
    stride = 2**31 + 64
    grads = reserve(stride * (rows - 1) + 100, torch.bfloat16).as_strided((rows, 100), (stride, 1))
    for i, row in enumerate(grads):
        row.copy_(normal(100, seed=i))
    theta, coef, compact = normal(100, seed=20), normal(rows, seed=21), grads.clone()
    assert compact.stride(0) == 100
    assert same_bits(perturb(theta, grads, coef), perturb(theta, compact, coef))
    matrix = gram_partials(grads)[0].sum(0)
    check(matrix, compact.double() @ compact.double().T, "reduction", [torch.diag(matrix.diagonal())])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_huge_arrays_on_a_gpu():
    free, _ = torch.cuda.mem_get_info()
    if free < 40 * 2**30:
        pytest.skip(f"needs 40 GiB of free device memory, found {free / 2**30:.0f}")
    theta = torch.ones(BIG, device="cuda")
    grads, out = (torch.zeros(1, BIG, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    grads[0, -TAIL:] = 1.0
    partials, theta_sq = gram_partials(grads, theta)
    assert partials.sum().item() == TAIL
    check(theta_sq.sum(), torch.tensor(float(BIG)), "reduction")
    perturb(theta, grads, torch.tensor([0.5], device="cuda"), out=out[0])
    assert (out[0, -TAIL:] == 1.5).all()
    assert (out[0, :64] == 1).all()
    buf = torch.zeros(BIG, device="cuda")
    sgd_step(theta, grads[0], buf, 0.5, 0.9)
    assert (theta[-TAIL:] == 0.5).all()
    assert (theta[:64] == 1).all()
