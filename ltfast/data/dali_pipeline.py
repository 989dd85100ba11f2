"""The DALI graphs: file -> ONE decode -> crops and flips -> uint8 NHWC. Everything random comes in from outside.

Why no random operator of DALI is used: its generators hang on the graph and on what ran before, so a resume in
mid-epoch needs DALI's own checkpoint and a changed graph makes it useless. Here the draws of large_views.py are
inputs, a pure function of (seed, epoch, step): the graph turns them into crop windows once it knows each picture's
size. Colour is done in torch (finish.py), which also avoids fn.color_twist: its contrast pulls towards 128 and its
hue is a YIQ rotation in degrees.

Deliberate settings: adjust_orientation=False (DALI rotates by EXIF by default, PIL and BCL's code do not);
antialias=True (default, torchvision's filter); jpeg_fancy_upsampling=True (GPU pixels otherwise differ for
subsampled JPEGs). A window is given to the resize as a region of interest, so its outermost pixels see their
neighbours, as with PIL's resize(box=...); cropping first would cost a copy of each window. A region whose left end exceeds its
right one is flipped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ltfast.data.large_views import ASPECT, CROP_TRIES, evaluation_size

PREFETCH = 2  # batches that DALI is ahead
CROP_INPUTS = 6  # path, across, down, place, flip, index


def dali_available() -> bool:
    """Whether nvidia.dali can be imported (found without importing it, which takes a while)."""
    import importlib.util

    try:
        return importlib.util.find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:
        return False


def decodes_regions(views: int, device_id: int | None) -> bool:
    """Whether only the window of a picture is decoded: on a CPU, for one view, where it is less work.

    A truncated JPEG then decodes or fails with the window that is asked for, so DaliSource looks at the bytes first. On a GPU
    pictures are decoded whole: nvImageCodec 0.9 can crash on regions (NVIDIA/nvImageCodec issue 55).
    """
    return views == 1 and device_id is None


def train_pipeline(
    source: Callable[[Any], Sequence[Any]],
    *,
    views: int,
    loose: bool,
    image_size: int,
    batch: int,
    threads: int,
    device_id: int | None,
) -> Any:
    """A pipeline with outputs view 1..views (uint8 [batch, S, S, 3]) and index (int64 [batch]).

    source(BatchInfo) -> (contents: list of uint8 [length], across, down: float64 [batch, views, CROP_TRIES], place:
    float64 [batch, views, 2], flip: float32 [batch, views], index: int64 [batch]). device_id None: all on
    the CPU; loose: contents are file names, else the encoded bytes.
    """
    dali = _dali()
    fn, types = dali.fn, dali.types

    pipeline = dali.Pipeline(batch_size=batch, num_threads=threads, device_id=device_id, prefetch_queue_depth=PREFETCH)
    with pipeline:
        content, across, down, place, flip, index = fn.external_source(
            source, num_outputs=CROP_INPUTS, batch=True, batch_info=True
        )
        raw = fn.io.file.read(content) if loose else content
        if decodes_regions(views, device_id):
            shape = fn.peek_image_shape(raw, adjust_orientation=False)
            top, left, height, width = _windows(shape, across, down, place)
            start = fn.cast(fn.cat(top, left), dtype=types.INT32)
            extent = fn.cast(fn.cat(height, width), dtype=types.INT32)
            region = fn.decoders.image_slice(raw, start=start, shape=extent, axes=[0, 1], **_decoder(device_id))
            pictures = [_resized(region, 0 * top, 0 * left, height, width, flip, 0, image_size)]
        else:
            decoded = fn.decoders.image(raw, **_decoder(device_id))
            windows = _windows(decoded.shape(), across, down, place)
            pictures = [_resized(decoded, *windows, flip, view, image_size) for view in range(views)]
        pipeline.set_outputs(*pictures, index)
    return pipeline


def evaluation_pipeline(
    source: Callable[[Any], Sequence[Any]],
    *,
    loose: bool,
    image_size: int,
    batch: int,
    threads: int,
    device_id: int | None,
) -> Any:
    """A pipeline with outputs view (uint8 [n, S, S, 3]) and index (int64 [n]), n up to batch; resize and
    centre crop.

    source(BatchInfo) -> (contents, index), StopIteration at the end.
    """
    dali = _dali()
    fn, types = dali.fn, dali.types

    pipeline = dali.Pipeline(batch_size=batch, num_threads=threads, device_id=device_id, prefetch_queue_depth=PREFETCH)
    with pipeline:
        content, index = fn.external_source(source, num_outputs=2, batch=True, batch_info=True)
        decoded = fn.decoders.image(fn.io.file.read(content) if loose else content, **_decoder(device_id))
        start, end = _centre(fn.cast(decoded.shape()[:2], dtype=types.FLOAT64), image_size)
        start, end = fn.cast(start, dtype=types.FLOAT), fn.cast(end, dtype=types.FLOAT)
        view = fn.resize(decoded, size=[image_size, image_size], roi_start=start, roi_end=end, antialias=True)
        pipeline.set_outputs(view, index)
    return pipeline


def decode_pipeline(data: bytes) -> Any:
    """A CPU pipeline that decodes one picture: the last resort to find out whether DALI can."""
    dali = _dali()
    fn = dali.fn

    pipeline = dali.Pipeline(batch_size=1, num_threads=1, device_id=None, prefetch_queue_depth=1)
    with pipeline:
        raw = fn.external_source(lambda: [np.frombuffer(data, dtype=np.uint8)], batch=True)
        pipeline.set_outputs(fn.decoders.image(raw, **_decoder(None)))
    return pipeline


def _dali() -> Any:
    import nvidia.dali.fn
    import nvidia.dali.math
    import nvidia.dali.types

    return nvidia.dali


def _decoder(device_id: int | None) -> dict[str, Any]:
    return {
        "device": "cpu" if device_id is None else "mixed",
        "adjust_orientation": False,
        "jpeg_fancy_upsampling": True,
    }


def _windows(shape: Any, across: Any, down: Any, place: Any) -> tuple[Any, Any, Any, Any]:
    """large_views.crop_windows as a graph: top, left, height, width, each float32 [views] of whole numbers.

    Candidates are weighted by their place in the queue, the largest weight among those that fit is the first of
    them; reductions know no float64, but whole numbers below 2^24 survive float32.
    """
    dali = _dali()
    fn, math, types = dali.fn, dali.math, dali.types

    size = fn.cast(shape, dtype=types.FLOAT64)
    tall, wide = size[0], size[1]
    root = math.sqrt(tall * wide)
    w, h = math.floor(across * root + 0.5), math.floor(down * root + 0.5)
    fits = (w <= wide) & (h <= tall) & (w > 0) & (h > 0)
    queue = types.Constant(np.arange(CROP_TRIES, 0, -1, dtype=np.float32)[None])
    weight = fn.cast(fits, dtype=types.FLOAT) * queue
    best = fn.reductions.max(weight, axes=[1], keep_dims=True)
    chosen = fn.cast((weight == best) & (best > 0), dtype=types.FLOAT)
    found = fn.cast(fn.reductions.max(weight, axes=[1]) > 0, dtype=types.FLOAT)
    widest = fn.cast(math.min(wide, math.floor(tall * ASPECT[1] + 0.5)), dtype=types.FLOAT)
    tallest = fn.cast(math.min(tall, math.floor(wide / ASPECT[0] + 0.5)), dtype=types.FLOAT)
    w = fn.reductions.max(fn.cast(w, dtype=types.FLOAT) * chosen, axes=[1]) + (1 - found) * widest
    h = fn.reductions.max(fn.cast(h, dtype=types.FLOAT) * chosen, axes=[1]) + (1 - found) * tallest
    top = found * math.floor(place[:, 0] * (tall - h + 1)) + (1 - found) * math.floor((tall - h) / 2)
    left = found * math.floor(place[:, 1] * (wide - w + 1)) + (1 - found) * math.floor((wide - w) / 2)
    return fn.cast(top, dtype=types.FLOAT), fn.cast(left, dtype=types.FLOAT), h, w


def _resized(picture: Any, top: Any, left: Any, height: Any, width: Any, flip: Any, view: int, side: int) -> Any:
    """The window of one view, side x side, flipped where flip is 1."""
    fn = _dali().fn
    first = fn.stack(top[view], left[view] + flip[view] * width[view])
    last = fn.stack(top[view] + height[view], left[view] + (1 - flip[view]) * width[view])
    return fn.resize(picture, size=[side, side], roi_start=first, roi_end=last, antialias=True)


def _centre(size: Any, side: int) -> tuple[Any, Any]:
    """large_views.evaluation_window as a region of the picture: (start, end) float64 [2]."""
    math = _dali().math

    shorter = math.min(size[0], size[1])
    resized = math.floor(evaluation_size(side) * size / shorter)
    room = resized - side
    # Python's round(room / 2): halves go to the even neighbour.
    odd = room - 2 * math.floor(room / 2)
    corner = odd * 2 * math.floor((room + 1) / 4) + (1 - odd) * room / 2
    return corner * size / resized, (corner + side) * size / resized
