"""Flat parameters, gradient rows, and buffers that are put back."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from ltfast.flat import ALIGN, FlatBuffers, FlatParameters
from ltfast.rows import GradientRows


def params() -> list[nn.Parameter]:
    torch.manual_seed(0)
    shapes = ((3, 5), (7,), (2, 3, 3, 3), (1,), ())
    return [nn.Parameter(torch.randn(shape)) for shape in shapes]


def test_parameters_are_aligned_views_with_their_values() -> None:
    own = params()
    own[2].data = own[2].data.to(memory_format=torch.channels_last)
    values = [p.detach().clone() for p in own]
    flat = FlatParameters([*own, own[0]], rows=2)
    assert flat.numel == 15 + 7 + 54 + 1 + 1
    assert flat.size == 5 * ALIGN + ALIGN
    for p, value, offset in zip(own, values, flat.offsets[:-1], strict=True):
        assert torch.equal(p, value)
        assert p.data_ptr() == flat.data.data_ptr() + 4 * offset
        assert offset % ALIGN == 0
    assert own[2].is_contiguous(memory_format=torch.channels_last)
    flat.data.mul_(2)
    assert torch.equal(own[1], 2 * values[1])
    assert float(flat.data.abs().sum()) == pytest.approx(float(sum(p.detach().abs().sum() for p in own)))
    assert torch.equal(flat.flatten([p.detach() for p in own]), flat.data)
    assert float(flat.flatten([None] * 5).abs().sum()) == 0


def test_span_wants_neighbours() -> None:
    own = params()
    flat = FlatParameters(own)
    assert flat.span(own[1:3]) == slice(ALIGN, ALIGN + 3 * ALIGN)
    assert flat.span(own[-1:]) == slice(5 * ALIGN, 6 * ALIGN)
    for wrong in ([], [own[0], own[2]], [nn.Parameter(torch.zeros(1))]):
        with pytest.raises(ValueError, match="consecutive"):
            flat.span(wrong)


def test_bad_parameters_are_named() -> None:
    for wrong, message in (
        ([], "empty"),
        ([nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))], "bfloat16"),
        ([nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2, device="meta"))], "meta"),
        ([nn.UninitializedParameter()], "lazy"),
    ):
        with pytest.raises(ValueError, match=message):
            FlatParameters(wrong)
    whole = torch.zeros(6)
    with pytest.raises(ValueError, match="share memory"):
        FlatParameters([nn.Parameter(whole[:4]), nn.Parameter(whole[2:])])
    FlatParameters([nn.Parameter(whole[:3]), nn.Parameter(whole[3:])])


def test_adopt_takes_replaced_storage_back() -> None:
    own = params()
    flat = FlatParameters(own)
    address = own[0].data_ptr()
    own[0].data = torch.full((3, 5), 3.0)
    flat.adopt()
    assert own[0].data_ptr() == address
    assert torch.equal(own[0], torch.full((3, 5), 3.0))
    own[1].data = own[1].data.double()
    with pytest.raises(RuntimeError, match="float64"):
        flat.adopt()
    values = flat.data.clone()
    for shape in ((1,), (15,), (5, 3)):  # one that would broadcast, one of as many elements
        own[0].data = torch.ones(shape)
        with pytest.raises(RuntimeError, match=re.escape(f"now torch.float32 {shape}")):
            flat.adopt()
    assert torch.equal(flat.data, values)


# -- gradient rows --------------------------------------------------------------------------------------------------------------


def test_autograd_adds_up_in_the_attached_row() -> None:
    own = params()
    flat = FlatParameters(own, rows=2)
    row = flat.attach(1)
    (own[0].sum() * 3 + own[3].sum()).backward()
    own[3].sum().backward()
    assert torch.equal(row[:15], torch.full((15,), 3.0))
    assert flat.rows.collect(1) == (True, False, False, True, False)
    assert float(row[flat.offsets[3]]) == 2
    assert flat.rows.gathered == 0
    assert float(flat.grads[0].abs().sum()) == 0
    flat.attach(1)
    assert float(row.abs().sum()) == 0
    assert flat.rows.collect(1) == (False,) * 5


def test_own_tensors_are_copied_and_left_alone() -> None:
    own = params()
    flat = FlatParameters(own)
    flat.attach()
    own[0].sum().backward()
    own[1].grad = torch.full((7,), 5.0)
    assert flat.rows.collect() == (True, True, False, False, False)
    assert torch.equal(flat.grads[0, ALIGN : ALIGN + 7], torch.full((7,), 5.0))
    assert flat.rows.gathered == 1
    assert torch.equal(own[1].grad, torch.full((7,), 5.0))
    own[1].grad = None  # what was copied goes with it
    assert flat.rows.collect() == (True, False, False, False, False)
    assert float(flat.grads[0, ALIGN : 2 * ALIGN].abs().sum()) == 0


def test_clipping_does_not_make_a_gradient() -> None:
    own = params()
    flat = FlatParameters(own)
    flat.attach()
    (own[0].sum() + own[2].sum()).backward()
    nn.utils.clip_grad_norm_(own, 1.0)
    assert flat.rows.collect() == (True, False, True, False, False)
    flat.attach()
    sum(p.sum() for p in own).backward()
    nn.utils.clip_grad_norm_(own, 1.0)
    assert flat.rows.collect() == (True,) * 5


def test_put_writes_and_adds() -> None:
    own = params()
    flat = FlatParameters(own)
    gradient = [torch.ones_like(p) for p in own]
    flat.rows.put(0, [gradient[0], None, gradient[2], None, None])
    flat.rows.put(0, [gradient[0], gradient[1], None, None, None], add=True)
    flat.attach(0, zero=False)
    assert flat.rows.collect() == (True, True, True, False, False)
    assert float(flat.grads.sum()) == 2 * 15 + 7 + 54
    own[2].sum().backward()
    assert flat.rows.collect() == (True, True, True, False, False)
    assert float(flat.grads.sum()) == 2 * 15 + 7 + 2 * 54
    flat.rows.put(0, [None] * 5)
    assert float(flat.grads.abs().sum()) == 0


def test_what_put_leaves_out_is_no_gradient() -> None:
    own = params()
    flat = FlatParameters(own)
    flat.rows.attach(present=[True] * 5)
    flat.rows.put(0, [torch.ones_like(own[0]), None, None, None, None])
    flat.attach(zero=False)
    assert flat.rows.collect() == (True, False, False, False, False)


def test_a_gradient_that_was_taken_away_stays_away() -> None:
    own = params()
    flat = FlatParameters(own)
    flat.attach()
    (own[0].sum() + own[1].sum()).backward()
    own[1].grad = None
    assert flat.rows.collect() == (True, False, False, False, False)
    flat.attach(zero=False)
    assert flat.rows.collect() == (True, False, False, False, False)


def test_a_zero_gradient_that_was_there_outlives_clipping() -> None:
    own = params()
    flat = FlatParameters(own)
    flat.rows.attach(present=[False, True, False, False, False])
    own[0].sum().backward()
    nn.utils.clip_grad_norm_(own, 1.0)
    assert flat.rows.collect() == (True, True, False, False, False)


def test_fresh_knows_new_gradients_from_used_ones() -> None:
    own = params()
    flat = FlatParameters(own)
    rows: GradientRows = flat.rows
    assert not rows.fresh()
    own[0].sum().backward()
    assert rows.fresh()
    rows.collect()
    rows.consume()
    assert not rows.fresh()
    own[0].sum().backward()
    assert rows.fresh()
    flat.attach()
    assert not rows.fresh()
    own[1].sum().backward()
    assert rows.fresh()
    own[1].grad = None
    own[0].grad = None
    assert not rows.fresh()


def test_resized_rows_start_at_zero() -> None:
    own = params()
    flat = FlatParameters(own)
    flat.attach()
    own[0].sum().backward()
    held = flat.rows
    flat.resize_rows(1)
    assert flat.rows is held
    flat.resize_rows(3)
    assert flat.grads.shape == (3, flat.size)
    assert float(flat.grads.abs().sum()) == 0
    assert own[0].grad is not None


# -- buffers ------------------------------------------------------------------------------------------------------------------------


def test_buffers_come_back_with_their_counters() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.BatchNorm1d(4, affine=False))
    buffers = FlatBuffers(model)
    model(torch.randn(8, 3))
    buffers.save()
    before = [b.clone() for b in model.buffers()]
    model(torch.randn(8, 3) + 5)
    assert not torch.equal(model[1].running_mean, before[0])
    buffers.restore()
    assert all(torch.equal(b, k) for b, k in zip(model.buffers(), before, strict=True))
    assert int(model[1].num_batches_tracked) == 1


def test_a_skipped_step_leaves_the_statistics_where_they_were() -> None:
    model = nn.BatchNorm1d(4)
    buffers = FlatBuffers(model)
    for skipped in (0, 1, 2):
        before = buffers.data.clone()
        buffers.begin()
        model(torch.randn(8, 4))
        moved = buffers.data.clone()
        assert not torch.equal(moved, before)
        buffers.undo(torch.tensor(float(skipped)))
        assert torch.equal(buffers.data, before if skipped else moved)


def test_without_buffers_the_statistics_lie_where_the_network_does() -> None:
    """An undo compares them with a counter there."""
    buffers = FlatBuffers(nn.Linear(2, 2, device="meta"))
    buffers.begin()
    buffers.undo(torch.ones((), device="meta"))
    assert buffers.data.shape == (0,)
    assert buffers.data.device.type == "meta"
