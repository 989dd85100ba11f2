"""conv3x3 and its gradients against nine shifted products in float64, and through torch.compile and autocast."""

import itertools

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from ltfast.errors import UserError
from ltfast.kernels import common
from ltfast.kernels.conv import WEIGHT_BLOCK, conv3x3, conv3x3_reference
from ltfast.models import create_encoder
from ltfast.models.conv import Conv3x3, use_own_kernels
from ltfast.models.resnet import BasicBlock

from ..pretended import pretended_gpu
from .support import PLACES, check, normal, same_bits, skip_if_interpreting

# N, I, O, H, W: more than one program, a last one half full, one row, one column, one pixel, channels that change
SHAPES = [
    (3, 16, 16, 9, 7), (2, 32, 32, 8, 8), (2, 16, 32, 5, 4), (2, 32, 16, 4, 4), (3, 16, 16, 1, 5), (2, 16, 16, 5, 1),
    (1, 32, 32, 1, 1),
]  # fmt: skip
KINDS = {torch.float32: "convolution", torch.bfloat16: "bf16", torch.float16: "fp16"}
NHWC = torch.channels_last


def problem(n: int, i: int, o: int, h: int, w: int, dtype: torch.dtype, place: str) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures in channels_last, a filter, and the gradient of the result."""
    x = normal(n, i, h, w, seed=1).to(dtype).to(place, memory_format=NHWC)
    return (
        x,
        normal(o, i, 3, 3, seed=2, place=place),
        normal(n, o, h, w, seed=3).to(dtype).to(place, memory_format=NHWC),
    )


def with_gradients(function, x: Tensor, weight: Tensor, up: Tensor) -> list[Tensor]:
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    y = function(x, weight)
    return [y, *torch.autograd.grad(y, [x, weight], up.to(y.dtype))]


def exact_dtype(place: str) -> torch.dtype:
    """The widest that there is; sums of its products are float32 in either case."""
    return torch.float32 if place == "cpu" else torch.float16


def skip_what_is_not_there(dtype: torch.dtype, place: str) -> None:
    if place == "cuda" and dtype == torch.float32:
        pytest.skip("float32 is refused on a GPU")
    if common.INTERPRET and place == "cpu" and dtype == torch.bfloat16:
        pytest.skip("triton's interpreter multiplies the bits of bfloat16, not its numbers")


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dtype", list(KINDS))
@pytest.mark.parametrize("shape", SHAPES)
def test_result_and_gradients(place, dtype, shape):
    skip_what_is_not_there(dtype, place)
    x, weight, up = problem(*shape, dtype, place)
    found = with_gradients(conv3x3, x, weight, up)
    assert [t.dtype for t in found] == [dtype, dtype, torch.float32]
    assert found[0].is_contiguous(memory_format=NHWC)
    x, weight = x.double(), weight.to(dtype).double()
    expected = with_gradients(conv3x3_reference, x, weight, up)
    turned = with_gradients(conv3x3_reference, x, weight.flip(2, 3), up)
    kinds = [KINDS[dtype], KINDS[dtype], "convolution"]
    for actual, exact, wrong, kind in zip(found, expected, turned, kinds, strict=True):
        check(actual, exact, kind, [wrong] if shape[-2:] != (1, 1) and actual is not found[2] else [])


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("channels", [16, 32])
def test_every_program_of_the_weights_gradient_takes_several_blocks(place, channels, monkeypatch):
    monkeypatch.setattr("ltfast.kernels.conv.WEIGHT_PROGRAMS", 4 * channels)
    pixels = 2 * 4 * WEIGHT_BLOCK + 77
    x, weight, up = problem(1, channels, channels, 1, pixels, exact_dtype(place), place)
    found, again = (with_gradients(conv3x3, x, weight, up)[2] for _ in range(2))
    check(found, with_gradients(conv3x3_reference, x.double(), weight.double(), up)[2], "convolution")
    assert same_bits(found, again)


@pytest.mark.parametrize("place", PLACES)
def test_any_memory_format_of_pictures_filter_and_gradient(place):
    x, weight, up = problem(2, 16, 32, 6, 5, exact_dtype(place), place)
    expected = with_gradients(conv3x3, x, weight, up)
    for a, b, c in itertools.product((NHWC, torch.contiguous_format), repeat=3):
        found = with_gradients(
            conv3x3, x.contiguous(memory_format=a), weight.contiguous(memory_format=b), up.contiguous(memory_format=c)
        )
        assert all(same_bits(p, q) for p, q in zip(found, expected, strict=True))


def test_float32_is_refused_on_a_gpu():
    """Its exact products take no tensor cores and spill registers there."""
    with pretended_gpu(), pytest.raises(ValueError, match=r"torch.float32; supported on cuda:0: torch.bfloat16, torch"):
        conv3x3(torch.ones(2, 16, 4, 4, device="cuda"), torch.ones(16, 16, 3, 3, device="cuda"))


def test_bad_arguments_are_named():
    x, weight = torch.ones(2, 16, 4, 4), torch.ones(16, 16, 3, 3)
    for name, arguments in {
        r"x_NCHW must be .* not \(2, 8, 4, 4\)": (x[:, :8], weight),
        "x_NCHW must be": (x[0], weight),
        r"x_NCHW must be .* not \(0,": (x[:0], weight),
        "weight_OIKK must be": (x, weight[:, :, :1]),
        r"weight_OIKK must be \[O, 16": (x, weight[:8]),
        "x_NCHW is torch.float64": (x.double(), weight),
        "weight_OIKK is torch.float16": (x, weight.half()),
        "weight_OIKK lies on meta": (x, weight.to("meta")),
    }.items():
        with pytest.raises(ValueError, match=name):
            conv3x3(*arguments)
    with pytest.raises(ValueError, match="2\\^31 pixels"):
        conv3x3(torch.empty(1, 16, 2**16, 2**15, device="meta"), weight.to("meta"))


# --- in a network -------------------------------------------------------------------------------------------------------


def block(place: str, own: bool) -> BasicBlock:
    torch.manual_seed(0)
    made = BasicBlock(16, 16).to(place, memory_format=NHWC)
    if own:
        use_own_kernels(made)
    return made


def passed(model: torch.nn.Module, function, x: Tensor) -> list[Tensor]:
    with torch.autocast(x.device.type, torch.bfloat16):
        y = function(x)
    return [y, *torch.autograd.grad(y.square().sum(), list(model.parameters()))]


@skip_if_interpreting()
@pytest.mark.parametrize("place", PLACES)
def test_a_block_under_autocast_computes_what_the_library_computes(place):
    x = normal(4, 16, 8, 8, seed=4, place=place).to(memory_format=NHWC)
    library, ours = (passed(m, m, x) for m in (block(place, False), block(place, True)))
    for a, b in zip(ours, library, strict=True):
        assert a.dtype == b.dtype
        assert (a - b).norm() < 0.02 * b.norm()  # both are rounded to bfloat16, at different places
    with torch.no_grad():  # no autocast: the library, bit for bit
        assert same_bits(block(place, True)(x), block(place, False)(x))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("layout", [NHWC, torch.contiguous_format])
@pytest.mark.parametrize(("inner", "outer"), [(16, 16), (16, 32), (32, 16)])
def test_the_weights_gradient_lies_as_the_librarys_does(inner, outer, layout, place):
    """torch's foreach functions take all gradients one by one if a single one lies otherwise than its weight."""
    x, layer = normal(2, inner, 8, 8, seed=8).half().to(place, memory_format=NHWC), Conv3x3(inner, outer)
    layer = layer.to(place, memory_format=layout)
    found = []
    for own in (False, True):
        layer.own_kernel = own
        with torch.autocast(place, torch.float16):
            found.append(torch.autograd.grad(layer(x).sum(), layer.weight)[0].stride())
    assert found[0] == found[1]
    assert layout != NHWC or found[1] == layer.weight.stride()


@skip_if_interpreting()
@pytest.mark.parametrize("place", PLACES)
def test_a_block_compiles_to_one_graph_with_the_same_result(place):
    x = normal(4, 16, 8, 8, seed=5, place=place).to(memory_format=NHWC)
    model = block(place, True)
    eager = passed(model, model, x)
    compiled = passed(model, torch.compile(model, fullgraph=True, dynamic=False), x)
    for a, b in zip(compiled, eager, strict=True):
        assert (a - b).norm() < 0.02 * b.norm()


def test_its_operations_are_counted_like_the_librarys():
    counts = []
    for own in (False, True):
        model, x = block("cpu", own), normal(2, 16, 6, 6, seed=6)
        with FlopCounterMode(display=False) as counter:
            passed(model, model, x)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


class Calls(TorchDispatchMode):
    """Counts the calls of the kernel's op inside."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.ltfast.conv3x3_nhwc.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("own", "dtype", "autocast", "calls"), [
    (True, torch.float32, True, 2), (True, torch.bfloat16, False, 2), (True, torch.float32, False, 0),
    (False, torch.float32, True, 0),
])  # fmt: skip
def test_16_bit_pictures_go_through_the_kernel_if_it_is_asked_for(own, dtype, autocast, calls):
    model, x = block("cpu", own).to(dtype), normal(2, 16, 6, 6, seed=7).to(dtype)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast), Calls() as seen:
        model(x)
    assert seen.count == calls


def test_only_what_the_kernel_can_do_goes_through_it():
    encoder, _ = create_encoder("resnet20", 3)
    use_own_kernels(encoder)
    layers = [m for m in encoder.modules() if isinstance(m, Conv3x3)]
    ours = [m for m in layers if m.own_kernel]
    assert len(layers) == 19
    assert len(ours) == 6 + 5  # not the stem's 3 channels, the 64 of the last stage, or a stride of 2
    with pytest.raises(UserError, match="--convolutions kernel"):
        use_own_kernels(torch.nn.Sequential(torch.nn.Conv2d(16, 16, 3)))
