"""The counter-based numbers against splitmix64 written from its definition in plain integers."""

import pytest
import torch

from ltfast.data.rng import STREAM_DRAWS, epoch_key, fold, generator, uniforms

MASK = (1 << 64) - 1
GAMMA = 0x9E3779B97F4A7C15


def mix(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def reference(key: int, index: int, stream: int, draw: int, gamma: int = GAMMA) -> float:
    base = mix(key ^ mix((index + 1) * gamma & MASK))
    return (mix((base + draw + 1 + stream * STREAM_DRAWS) * gamma & MASK) >> 40) / 2**24


def test_equals_splitmix64() -> None:
    key, index = epoch_key(2**40 + 7, 199), torch.tensor([0, 1, 812, 2**33 + 5])
    for stream in (0, 2, 9):
        ours = uniforms(key, index, stream, 5)
        expected = [[reference(int(key), int(i), stream, d) for d in range(5)] for i in index]
        assert torch.equal(ours, torch.tensor(expected))
        wrong = [[reference(int(key), int(i), stream, d, GAMMA + 2) for d in range(5)] for i in index]
        assert not torch.isclose(ours, torch.tensor(wrong), atol=1e-3).all()


def test_first_output_of_splitmix64_is_the_published_one() -> None:
    # splitmix64 seeded with 1234567: first output 6457827717110365317 (Vigna's reference program).
    assert mix((1234567 + GAMMA) & MASK) == 6457827717110365317
    assert fold(1234567) == 6457827717110365317 >> 1


def test_depends_on_nothing_but_its_arguments() -> None:
    key = epoch_key(1, 2)
    together = uniforms(key, torch.arange(50), 1, 7)
    assert torch.equal(uniforms(key, torch.tensor([33, 4]), 1, 7), together[[33, 4]])
    assert torch.equal(uniforms(key, torch.arange(50), 1, 3), together[:, :3])
    for other in (uniforms(epoch_key(1, 3), torch.arange(50), 1, 7), uniforms(key, torch.arange(50), 2, 7)):
        assert (other == together).float().mean() < 0.05


def test_fold_sees_order_and_sign() -> None:
    values = {fold(1, 2), fold(2, 1), fold(1), fold(1, 2, 0), fold(-1, 2), fold(0), fold(0, 0)}
    assert len(values) == 7
    assert all(0 <= value < 2**63 for value in values)
    assert torch.rand(1, generator=generator(3, 4)) == torch.rand(1, generator=generator(3, 4))


@pytest.mark.parametrize("draws", [0, STREAM_DRAWS + 1])
def test_refuses_too_many_draws(draws: int) -> None:
    with pytest.raises(ValueError, match="draws"):
        uniforms(epoch_key(0, 0), torch.arange(2), 0, draws)
