"""One picture file to pixels with PIL, and the quick look at its bytes that finds most broken files.

No path rotates by EXIF orientation: neither here nor in the DALI pipeline (its default would), as in BCL's code.
Formats are those that both decoders read, but for odd TIFFs and PNMs (`dali_fault`); a GIF or an HTML page named .jpg is
refused by both.
"""

from __future__ import annotations

import io
import os
import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM", "JPEG2000")
SIGNATURES: dict[str, tuple[bytes, ...]] = {
    "JPEG": (b"\xff\xd8\xff",),
    "PNG": (b"\x89PNG\r\n\x1a\n",),
    "BMP": (b"BM",),
    "TIFF": (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"),
    "PPM": (b"P1", b"P2", b"P3", b"P4", b"P5", b"P6"),
    "JPEG2000": (b"\0\0\0\x0cjP  \r\n\x87\n", b"\xff\x4f\xff\x51"),
    "GIF": (b"GIF87a", b"GIF89a"),
}
ORIENTATION = 0x0112  # EXIF
BITS_PER_SAMPLE = 258  # TIFF; one bit where it is absent
NEXT_PAGE = 0  # no tag: stands for a further directory
PHOTOMETRIC = 262  # TIFF; 0 and 1: gray
SAMPLES_PER_PIXEL = 277  # TIFF
EXTRA_SAMPLES = 338  # TIFF; 1: colours are multiplied by alpha
SAMPLE_FORMAT = 339  # TIFF; 2: signed, 3: floating point
FLOATS = "floating-point pixels, whose range nobody knows"
_PNG_DEPTH = 24  # place of the bits a sample in a PNG
_PNM_MAXIMUM = re.compile(rb"P[2356](?:\s|#[^\n]*\n)+(?:\d+(?:\s|#[^\n]*\n)+){2}(\d{1,5})")  # behind width and height
_SHORT = 3  # type of TIFF values: 16 bits
_LEVELS_16_BIT = 257  # 65535 / 255
_STANDALONE = frozenset((0x01, *range(0xD0, 0xD9)))  # JPEG markers without a length
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # SOF0..SOF15 without DHT, JPG, DAC
Reader = Callable[[int, int], bytes]  # (start, size) -> those bytes, or as many as there are


class BadImage(Exception):
    """A file that cannot be decoded; the text says why in a few words."""


def file_format(head: bytes) -> str:
    """Format by the first bytes: a key of SIGNATURES, 'WEBP', or '' when unknown."""
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    return next((name for name, starts in SIGNATURES.items() if head.startswith(starts)), "")


def look(data: bytes) -> str:
    """Why the bytes cannot be a whole picture, or ''. Walks a JPEG's markers, decodes nothing.

    Finds empty, unknown and cut files, and TIFFs of floats; it cannot see bit rot, nor a cut file that ends in FF D9.
    """
    if not data:
        return "empty file"
    kind = file_format(data[:16])
    if not kind or kind == "GIF":
        return "not a picture" if not kind else "a GIF, which the loaders do not read"
    if kind == "TIFF":
        return tiff_fault(tiff_tags(reader(data)))
    if kind == "PNG":
        return "" if data.rfind(b"IEND") > 0 else "truncated: no end marker"
    if kind == "WEBP":
        return "truncated" if webp_size(data) > len(data) else ""
    if kind != "JPEG":
        return ""
    header = jpeg_header(data)
    if isinstance(header, str):
        return header
    # Trailing junk after the last FF D9 is common and harmless.
    return "" if data.rfind(b"\xff\xd9") > 0 else "truncated: no end marker"


def webp_size(head: bytes) -> int:
    """Bytes that a WebP file has by its own account, which may be less than there are."""
    return 8 + int.from_bytes(head[4:8], "little")


@dataclass(frozen=True, slots=True)
class JpegHeader:
    """Frame size, number of components (1 gray, 3 colour, 4 CMYK) and EXIF orientation (1 upright) of a JPEG."""

    height: int
    width: int
    components: int
    orientation: int = 1


def jpeg_header(data: bytes) -> JpegHeader | str:
    """The header of a JPEG, or why it has none. Walks the markers up to the first scan."""
    place, orientation, frame = 2, 1, None
    while place + 4 <= len(data):
        if data[place] != 0xFF:
            return "corrupt header"
        marker = data[place + 1]
        if marker == 0xFF:  # fill byte
            place += 1
            continue
        if marker in _STANDALONE:
            place += 2
            continue
        length = int.from_bytes(data[place + 2 : place + 4], "big")
        segment = data[place + 4 : place + 2 + length]
        if marker == 0xDA:
            return JpegHeader(*frame, orientation) if frame else "corrupt header"
        if length < 2:
            return "corrupt header"
        if marker in _FRAMES and len(segment) >= 6:
            frame = (int.from_bytes(segment[1:3], "big"), int.from_bytes(segment[3:5], "big"), segment[5])
            if not frame[0] or not frame[1]:
                return "zero height or width"
        elif marker == 0xE1 and segment.startswith(b"Exif\0\0"):
            orientation = _orientation(segment[6:])
        place += 2 + length
    return "truncated: the header ends early"


def _orientation(tiff: bytes) -> int:
    """EXIF orientation 1..8 of a TIFF block; 1 when absent or unreadable."""
    value = tiff_tags(reader(tiff)).get(ORIENTATION, 1)
    return value if 1 <= value <= 8 else 1


def reader(data: bytes) -> Reader:
    """A Reader of bytes at hand."""
    return lambda start, size: data[start : start + size]


def tiff_tags(read: Reader) -> dict[int, int]:
    """Each tag of a TIFF's first directory with its first value as 16 bits, and NEXT_PAGE if another directory follows; empty
    where the directory is out of reach."""
    head = read(0, 16)
    order: Literal["little", "big"] = "little" if head[:2] == b"II" else "big"
    big = b"+" in head[2:4]  # BigTIFF: offsets and counts of 64 bits
    start = int.from_bytes(head[8:16] if big else head[4:8], order)
    width, size, layout = (8, 20, "HHQ8s") if big else (2, 12, "HHI4s")
    layout = ("<" if order == "little" else ">") + layout
    entries = int.from_bytes(read(start, width), order)
    directory = read(start + width, min(entries, 1 << 12) * size)
    tags: dict[int, int] = {}
    for tag, kind, count, value in struct.iter_unpack(layout, directory[: len(directory) // size * size]):
        if kind == _SHORT and 2 * count > len(value):  # then it is the place of the values
            value = read(int.from_bytes(value, order), 2)
        tags.setdefault(tag, int.from_bytes(value[:2], order))
    if tags and any(read(start + width + entries * size, 8 if big else 4)):
        tags[NEXT_PAGE] = 1
    return tags


def tiff_fault(tags: dict[int, int]) -> str:
    """Why a TIFF with these tags is no picture for the loaders, or ''. DALI would show floats as white."""
    if not tags:
        return "truncated: no directory"
    return FLOATS if tags.get(SAMPLE_FORMAT) == 3 else ""


def sample_bits(data: bytes, tags: Mapping[int, int]) -> int:
    """Bits of a sample of a picture with these first bytes, of a TIFF with these tags: those of a PNG, TIFF or PNM, 8 for every
    other."""
    kind = file_format(data[:16])
    if kind == "TIFF":
        return tags.get(BITS_PER_SAMPLE, 1)
    if kind == "PNG":
        return int.from_bytes(data[_PNG_DEPTH : _PNG_DEPTH + 1])
    return 16 if _pnm_maximum(data) > 255 else 8


def _pnm_maximum(data: bytes) -> int:
    """The level that is white in a PNM, 255 for any other file."""
    found = _PNM_MAXIMUM.match(data)
    return int(found[1]) if found else 255


def dali_fault(data: bytes) -> str:
    """Why DALI alone cannot read a picture, or reads it wrongly without a word, or ''."""
    return dali_tiff_fault(tiff_tags(reader(data))) if file_format(data[:16]) == "TIFF" else ""


def dali_tiff_fault(tags: dict[int, int]) -> str:
    """`dali_fault` of a TIFF with these tags. Gray with alpha comes out as colours that are not there."""
    bits, gray = tags.get(BITS_PER_SAMPLE), tags.get(PHOTOMETRIC) in (0, 1)
    if bits is None:
        what = "no BitsPerSample"
    elif bits > 16 or (gray and bits not in (1, 8, 16)):
        what = f"{bits} bits a sample"
    elif tags.get(SAMPLE_FORMAT) == 2:
        what = "signed samples"
    elif tags.get(SAMPLES_PER_PIXEL) == 2:
        what = "gray with alpha"
    elif tags.get(EXTRA_SAMPLES) == 1:
        what = "colours multiplied by alpha"
    else:
        return ""
    return f"{what}, which DALI does not read as it is; --loader torch does"


def dali_distortion(data: bytes) -> str:
    """What DALI shows otherwise than it is in a picture that it reads, or ''."""
    white = _pnm_maximum(data)
    return "" if white in (255, 65535) else f"its white is {white}, which DALI does not scale; --loader torch does"


def to_rgb(image: Image) -> Image:
    """RGB; 16-bit gray is scaled by 1/257 (PIL's own convert clips it to white)."""
    from PIL import Image as pil

    if image.mode.startswith("I;16") or image.mode == "I":
        levels = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
        return pil.fromarray((levels // _LEVELS_16_BIT).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise BadImage(FLOATS)
    if image.mode == "P":
        image.info.pop("transparency", None)  # else PIL warns; the colours are the palette's either way
    return image.convert("RGB")


def decode(data: bytes) -> Image:
    """RGB picture, not rotated. Raises BadImage for anything PIL cannot fully decode."""
    from PIL import Image as pil
    from PIL import UnidentifiedImageError

    try:
        image = pil.open(io.BytesIO(data), formats=FORMATS)
        if image.format == "TIFF":
            image.getexif().pop(ORIENTATION, None)  # PIL would turn it, alone among formats and loaders
        return to_rgb(image)
    except UnidentifiedImageError as error:
        raise BadImage(look(data) or "not a picture") from error
    except (OSError, ValueError, SyntaxError, EOFError, pil.DecompressionBombError) as error:
        raise BadImage(look(data) or str(error)) from error


def read_file(path: str) -> bytes:
    """The file's bytes. Raises BadImage when it is missing, a folder or unreadable."""
    try:
        with open(path, "rb") as file:
            return file.read()
    except FileNotFoundError as error:
        raise BadImage("missing") from error
    except OSError as error:
        raise BadImage((error.strerror or str(error)).lower()) from error


def load_picture(path: str | os.PathLike[str]) -> Image:
    """The file as an RGB picture. Raises BadImage."""
    return decode(read_file(os.fspath(path)))
