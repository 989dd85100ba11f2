"""One file at a time: what decodes, what does not and why, and what the quick look at the bytes finds."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from ltfast.data.decode import (
    BadImage,
    JpegHeader,
    decode,
    file_format,
    jpeg_header,
    load_picture,
    look,
    reader,
    tiff_tags,
    to_rgb,
)
from tests.data import bad_files
from tests.data.pictures import picture

BAD = bad_files.bad_files()


@pytest.mark.parametrize("kind", [k for k in BAD if BAD[k] is not None])
def test_bad_bytes_are_refused_with_a_reason(kind):
    data = BAD[kind]
    assert data is not None
    with pytest.raises(BadImage) as error:
        decode(data)
    assert str(error.value)
    assert look(data)


def test_missing_files_and_folders(tmp_path):
    with pytest.raises(BadImage, match="missing"):
        load_picture(tmp_path / "none.jpg")
    with pytest.raises(BadImage, match="directory"):
        load_picture(tmp_path)


def test_a_look_at_the_bytes_cannot_see_bit_rot():
    for data in bad_files.damaged_files().values():
        assert look(data) == ""
        decode(data)


@pytest.mark.parametrize("kind", list(bad_files.odd_files()))
def test_odd_files_are_pils_convert(kind):
    data = bad_files.odd_files()[kind]
    assert look(data) == ""
    image = decode(data)
    assert image.mode == "RGB"
    if kind != "PNG 16 bit gray":
        assert np.array_equal(np.asarray(image), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


def test_sixteen_bit_gray_is_scaled_not_clipped():
    image = decode(bad_files.odd_files()["PNG 16 bit gray"])
    expected = np.asarray(picture(79, 120, 90).convert("L"))
    assert np.array_equal(np.asarray(image)[..., 0], expected)
    assert np.asarray(to_rgb(Image.fromarray(np.full((2, 2), 70_000, dtype=np.int32)))).max() == 255


def test_headers():
    odd = bad_files.odd_files()
    assert jpeg_header(odd["gray"]) == JpegHeader(90, 120, 1)
    assert jpeg_header(odd["CMYK"]) == JpegHeader(90, 120, 4)
    assert jpeg_header(odd["EXIF orientation 6"]) == JpegHeader(90, 120, 3, 6)
    assert jpeg_header(odd["3 x 2000"]) == JpegHeader(2000, 3, 3)
    zero = bytearray(odd["gray"])
    frame = zero.find(b"\xff\xc0")
    zero[frame + 5 : frame + 7] = b"\0\0"
    assert jpeg_header(bytes(zero)) == "zero height or width"
    formats = {"PNG": "PNG", "WebP": "WEBP", "BMP": "BMP", "TIFF": "TIFF", "progressive": "JPEG"}
    assert {k: file_format(odd[k][:16]) for k in formats} == formats
    assert file_format(b"") == ""


@pytest.mark.parametrize("options", [{}, {"big_tiff": True}, {"compression": "tiff_lzw"}])
def test_tags_of_tiffs(options):
    """PIL writes the directory in front, libtiff (for a compression) at the end; three samples have their own place."""
    data = bad_files.tiff("RGB", **options)
    tags = tiff_tags(reader(data))
    assert [tags[k] for k in (256, 257, 258, 277)] == [320, 240, 8, 3]
    assert look(data) == ""
    assert look(bad_files.tiff("F", **options)).startswith("floating-point")
    assert tiff_tags(reader(data[:9])) == {}
    assert look(data[:9]).startswith("truncated")
    assert tiff_tags(reader(data[:4] + b"\xff" * 12)) == {}


def test_big_endian_exif_and_junk_exif():
    stream = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 8
    exif.endian = ">"
    picture(1).save(stream, "JPEG", exif=exif.tobytes())
    header = jpeg_header(stream.getvalue())
    assert isinstance(header, JpegHeader)
    assert header.orientation == 8
    junk = stream.getvalue().replace(b"Exif\0\0MM", b"Exif\0\0M?")
    assert isinstance(jpeg_header(junk), JpegHeader)
