"""The fourteen kinds of bad file of the DALI study and a cut WebP, made from one good JPEG, and unusual files that must decode."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

from tests.data.pictures import picture


def jpeg(image: Image.Image, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "JPEG", **{"quality": 92, **options})
    return stream.getvalue()


def bad_files() -> dict[str, bytes | None]:
    """Kind -> content; None: the file is missing. Both decoders refuse these."""
    good = jpeg(picture(77, 200, 160))
    gif = io.BytesIO()
    picture(5).save(gif, "GIF")
    png = io.BytesIO()
    picture(6).save(png, "PNG")
    webp = io.BytesIO()
    picture(6).save(webp, "WEBP")
    scan = good.rfind(b"\xff\xda")
    return {
        "cut at 90 percent": good[: len(good) * 9 // 10],
        "cut at 50 percent": good[: len(good) // 2],
        "cut at 10 percent": good[: max(len(good) // 10, scan + 20)],
        "header cut short": good[:150],
        "two bytes": good[:2],
        "random bytes": np.random.default_rng(0).bytes(3000),
        "random bytes behind a signature": b"\xff\xd8\xff\xe0" + np.random.default_rng(1).bytes(3000),
        "HTML page": b"<!DOCTYPE html><html><body>404 Not Found</body></html>\n" * 20,
        "GIF": gif.getvalue(),
        "text": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        "cut PNG": png.getvalue()[: len(png.getvalue()) // 2],
        "cut WebP": webp.getvalue()[:-2],
        "empty": b"",
        "zeros": bytes(4000),
        "missing": None,
    }


def damaged_files() -> dict[str, bytes]:
    """Broken inside, yet both decoders return a picture: nothing a check of the bytes could refuse."""
    good = jpeg(picture(78, 200, 160))
    middle = len(good) // 2
    rot = bytearray(good)
    for place in range(middle, middle + 200, 7):
        if rot[place] != 0xFF and rot[place - 1] != 0xFF:
            rot[place] ^= 0x15
    return {
        "cut but ending in FF D9": good[:middle] + b"\xff\xd9",
        "bit rot": bytes(rot),
    }


def odd_files() -> dict[str, bytes]:
    """Unusual, whole, and equal in both decoders."""
    image = picture(79, 120, 90)
    exif = Image.Exif()
    exif[0x0112] = 6

    def saved(mode: str, kind: str, **options: object) -> bytes:
        stream = io.BytesIO()
        image.convert(mode).save(stream, kind, **options)
        return stream.getvalue()

    sixteen = io.BytesIO()
    levels = np.asarray(image.convert("L")).astype(np.uint16) * 257
    Image.fromarray(levels).save(sixteen, "PNG")
    return {
        "gray": jpeg(image.convert("L")),
        "CMYK": jpeg(image.convert("CMYK")),
        "progressive": jpeg(image, progressive=True),
        "EXIF orientation 6": jpeg(image, exif=exif),
        "trailing junk": jpeg(image) + b"junk" * 100,
        "1 x 1": jpeg(image.resize((1, 1))),
        "3 x 2000": jpeg(image.resize((3, 2000))),
        "PNG": saved("RGB", "PNG"),
        "PNG RGBA": saved("RGBA", "PNG"),
        "PNG palette": saved("P", "PNG"),
        "PNG 16 bit gray": sixteen.getvalue(),
        "WebP": saved("RGB", "WEBP", lossless=True),
        "BMP": saved("RGB", "BMP"),
        "TIFF": saved("RGB", "TIFF"),
    }


def tiff(mode: str, **options: object) -> bytes:
    """A TIFF in one of PIL's modes: "F" holds floats, "1" has no BitsPerSample."""
    stream = io.BytesIO()
    picture(80, 320, 240).convert(mode).save(stream, "TIFF", **options)
    return stream.getvalue()


def write(folder: Path, files: dict[str, bytes | None]) -> dict[str, Path]:
    """Writes each as <kind>.jpg; a missing one only gets its name."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {kind: folder / f"{kind.replace(' ', '_')}.jpg" for kind in files}
    for kind, content in files.items():
        if content is not None:
            paths[kind].write_bytes(content)
    return paths
