"""Photographs: whatever the web calls .jpg is read as Pillow reads it, or refused with the reason; proportions stay."""

import io
import os
import re
import resource
import struct
import threading
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, ImageOps

from aliprod import InputError
from aliprod.images import (
    MAX_PIXELS,
    CorruptImages,
    Images,
    Preprocessing,
    Unreadable,
    decode,
    letterbox,
    load,
    read,
)
from aliprod.manifest import paths, read_json

RNG = np.random.default_rng(0)
PIXELS = cv2.resize(RNG.integers(0, 256, (6, 9, 3), np.uint8), (90, 60), interpolation=cv2.INTER_CUBIC)
PHOTO = Image.fromarray(PIXELS)
GREY = np.asarray(PHOTO.convert("L"))
ALPHA = np.zeros((60, 90), np.uint8)
ALPHA[10:50, 10:80], ALPHA[20:30, 20:60] = 255, 100
ON_WHITE = np.round(255 + (PIXELS - 255.0) * (ALPHA[:, :, None] / 255))
SRGB, LAB = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
NETWORK = Preprocessing(64, (0.2, 0.4, 0.6), (0.2, 0.2, 0.2), "bicubic")


def encode(image: Image.Image | np.ndarray, form: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, form, **options)
    return file.getvalue()


def encode_16_bit(image: np.ndarray) -> bytes:
    return cv2.imencode(".png", image.astype(np.uint16) * 257)[1].tobytes()


def without_adobe(jpeg: bytes) -> bytes:
    start = jpeg.index(b"\xff\xee")
    return jpeg[:start] + jpeg[start + 2 + int.from_bytes(jpeg[start + 2 : start + 4], "big") :]


def as_ycck(jpeg: bytes) -> bytes:
    place = jpeg.index(b"Adobe") + 11
    return jpeg[:place] + b"\2" + jpeg[place + 1 :]


def with_segment(jpeg: bytes, content: bytes) -> bytes:
    return jpeg[:2] + b"\xff\xe2" + struct.pack(">H", len(content) + 2) + content + jpeg[2:]


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png_header(width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def icon(png: bytes) -> bytes:
    return struct.pack("<HHHBBBBHHII", 0, 1, 1, 0, 0, 0, 0, 1, 32, len(png), 22) + png


def png_black(side: int) -> bytes:
    """A bit a pixel: a few kilobytes that Pillow makes gigabytes of."""
    start, _, end = png_header(1, 1).partition(chunk(b"IDAT", zlib.compress(b"")))
    start = start[:8] + chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0))
    return start + chunk(b"IDAT", zlib.compress(bytes((1 + -(-side // 8)) * side))) + end


def distance(first: np.ndarray, second: np.ndarray) -> float:
    assert first.shape == second.shape
    return np.abs(first.astype(float) - second).mean()


CMYK_JPEG = encode(PHOTO.convert("CMYK"), "JPEG", quality=95)
OPAQUE = {
    "JPEG": encode(PHOTO, "JPEG"),
    "JPEG without subsampling": encode(PHOTO, "JPEG", subsampling=0),
    "JPEG progressive": encode(PHOTO, "JPEG", progressive=True),
    "JPEG grey": encode(PHOTO.convert("L"), "JPEG"),
    "JPEG CMYK, inverted as Adobe does": CMYK_JPEG,
    "JPEG CMYK, without Adobe's mark": without_adobe(CMYK_JPEG),
    "JPEG YCCK, as Photoshop writes": as_ycck(CMYK_JPEG),
    "MPO": encode(PHOTO, "MPO", save_all=True, append_images=[ImageOps.invert(PHOTO)]),
    "PNG": encode(PHOTO),
    "PNG grey": encode(PHOTO.convert("L")),
    "PNG palette": encode(PHOTO.quantize(32)),
    "PNG black and white": encode(PHOTO.convert("1")),
    "PNG animated": encode(PHOTO, save_all=True, append_images=[ImageOps.invert(PHOTO)]),
    "WebP": encode(PHOTO, "WEBP"),
    "WebP lossless": encode(PHOTO, "WEBP", lossless=True),
    "GIF": encode(PHOTO, "GIF"),
    "GIF animated": encode(PHOTO, "GIF", save_all=True, append_images=[ImageOps.invert(PHOTO)]),
    "BMP": encode(PHOTO, "BMP"),
    "BMP grey": encode(PHOTO.convert("L"), "BMP"),
    "BMP palette": encode(PHOTO.quantize(32), "BMP"),
    "TIFF": encode(PHOTO, "TIFF"),
    "AVIF": encode(PHOTO, "AVIF"),
    "JPEG 2000": encode(PHOTO, "JPEG2000"),
    "PPM": encode(PHOTO, "PPM"),
}
RGBA = Image.fromarray(np.dstack([PIXELS, ALPHA]))
PALETTE = PHOTO.quantize(16)
HOLES = np.where(np.asarray(PALETTE)[:, :, None] == 3, 255, np.asarray(PALETTE.convert("RGB")))
GREY_LEVEL = int(GREY[0, 0])
TRANSPARENT = {  # file, what it shows on white
    "PNG RGBA": (encode(RGBA), ON_WHITE),
    "PNG grey with alpha": (
        encode(Image.merge("LA", [PHOTO.convert("L"), Image.fromarray(ALPHA)])),
        255 + (GREY[:, :, None] - 255.0) * (ALPHA[:, :, None] / 255) * np.ones(3),
    ),
    "PNG palette, one colour transparent": (encode(PALETTE, transparency=3), HOLES),
    "PNG RGB, one colour transparent": (
        encode(PHOTO, transparency=tuple(PIXELS[5, 5].tolist())),
        np.where((PIXELS[5, 5] == PIXELS).all(axis=2, keepdims=True), 255, PIXELS),
    ),
    "PNG grey, one level transparent": (
        encode(PHOTO.convert("L"), transparency=GREY_LEVEL),
        np.where(GREY == GREY_LEVEL, 255, GREY)[:, :, None] * np.ones(3),
    ),
    "PNG black and white, black transparent": (
        encode(PHOTO.convert("1"), transparency=0),
        np.full((60, 90, 3), 255),
    ),
    "PNG RGBA of 16 bit": (encode_16_bit(np.dstack([PIXELS[:, :, ::-1], ALPHA])), ON_WHITE),
    "WebP lossless with alpha": (encode(RGBA, "WEBP", lossless=True, exact=True), ON_WHITE),
    "WebP with alpha": (encode(RGBA, "WEBP", quality=95), ON_WHITE),
    "GIF, one colour transparent": (encode(PALETTE, "GIF", transparency=3), HOLES),
    "TIFF RGBA": (encode(RGBA, "TIFF"), ON_WHITE),
}
UPRIGHT = {  # EXIF orientation -> what has to be done with the stored pixels
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a),
}


@pytest.mark.parametrize("name", OPAQUE)
def test_every_format_is_read_as_pillow_reads_it(name):
    decoded = decode(OPAQUE[name])
    assert decoded.dtype == np.uint8
    assert distance(decoded, np.asarray(Image.open(io.BytesIO(OPAQUE[name])).convert("RGB"))) <= 1


@pytest.mark.parametrize("name", TRANSPARENT)
def test_transparency_is_laid_on_white(name):
    data, expected = TRANSPARENT[name]
    assert distance(decode(data), expected) < (2 if name == "WebP with alpha" else 0.6)


@pytest.mark.parametrize(
    ("stored", "expected"), [(PIXELS[:, :, ::-1], PIXELS), (GREY, np.repeat(GREY[:, :, None], 3, axis=2))]
)
def test_sixteen_bits_become_eight(stored, expected):
    assert np.abs(decode(encode_16_bit(stored)).astype(int) - expected).max() <= 1


def test_sixteen_bit_grey_with_a_transparent_level_is_not_washed_out():
    data, level = encode_16_bit(GREY), int(GREY[5, 5])
    start = data.index(b"IDAT") - 4
    decoded = decode(data[:start] + chunk(b"tRNS", struct.pack(">H", level * 257)) + data[start:])
    assert np.abs(decoded.astype(int) - GREY[:, :, None])[level != GREY].max() <= 1


def oriented(image: Image.Image, form: str, orientation: int, **options) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(image, form, exif=exif, **options)


def on_white(image: Image.Image) -> np.ndarray:
    """As Pillow shows it."""
    pixels = ImageOps.exif_transpose(image).convert("RGBA")
    return np.asarray(Image.alpha_composite(Image.new("RGBA", pixels.size, "white"), pixels).convert("RGB"))


XMP = b"""<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="%d"/></rdf:RDF></x:xmpmeta>"""


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize(
    ("image", "form", "options"),
    [
        (PHOTO, "JPEG", {}),
        (PHOTO.convert("L"), "JPEG", {}),
        (PHOTO, "MPO", {"save_all": True, "append_images": [PHOTO]}),
        (PHOTO, "PNG", {}),
        (RGBA, "PNG", {}),
        (PHOTO, "WEBP", {}),
        (RGBA, "WEBP", {}),
        (PHOTO, "AVIF", {}),
        (RGBA, "AVIF", {}),
        (PHOTO, "TIFF", {}),
        (RGBA, "TIFF", {}),
        (PHOTO.convert("1"), "TIFF", {"compression": "group4"}),
        (PHOTO, "TIFF", {"compression": "jpeg"}),
    ],
    ids=lambda value: value.mode if isinstance(value, Image.Image) else "".join(value) or "plain",
)
def test_photographs_are_turned_upright_as_pillow_turns_them(image, form, options, orientation):
    data = oriented(image, form, orientation, **options)
    expected = on_white(Image.open(io.BytesIO(data)))
    assert distance(decode(data), expected) < 1
    assert distance(expected, UPRIGHT[orientation](decode(oriented(image, form, 1, **options)))) < 3  # sees the turn


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("form", ["JPEG", "WEBP", "AVIF"])
def test_photographs_that_are_turned_by_xmp_alone_are_turned_too(form, orientation):
    data = encode(PHOTO, form, xmp=XMP % orientation)
    assert distance(decode(data), on_white(Image.open(io.BytesIO(data)))) < 1
    assert distance(decode(data), UPRIGHT[orientation](decode(encode(PHOTO, form)))) < 3


@pytest.mark.parametrize("form", ["TIFF", "PNG"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_sixteen_bit_grey_is_turned_upright(form, orientation):
    data = oriented(Image.fromarray(GREY.astype(np.uint16) * 257), form, orientation)
    assert distance(decode(data), UPRIGHT[orientation](np.repeat(GREY[:, :, None], 3, axis=2))) < 1


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "AVIF", "TIFF"])
def test_a_damaged_note_does_not_damage_the_photograph(form):
    data = encode(PHOTO, form, exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff") if form != "TIFF" else encode(PHOTO, form)
    assert distance(decode(data), decode(encode(PHOTO, form))) < 1


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "BMP", "GIF"])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "CMYK"])
def test_channel_0_is_red(form, mode):
    red = Image.new("RGB", (40, 30), (250, 10, 20)).convert("RGB" if form != "JPEG" and mode == "CMYK" else mode)
    data = encode(red.convert("RGB") if (form, mode) == ("JPEG", "RGBA") else red, form)
    assert np.abs(decode(data).astype(int) - (250, 10, 20)).max() < 12


def test_real_photographs_are_read_as_pillow_reads_them(grocery):
    for file in paths(read_json(grocery / "val.json"), grocery)[::20]:
        with Image.open(file) as image:
            expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
        assert distance(decode(Path(file).read_bytes()), expected) < 1


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "the file is empty"),
        (b"<!DOCTYPE html><html>404</html>", "not an image but a web page"),
        (bytes(5000), "not an image but nothing but zeros"),
        (OPAQUE["JPEG"][:2], "not an image"),
        (png_header(60_000, 60_000), f"60000 x 60000 pixels; at most {MAX_PIXELS} in all are read"),
        (png_header(8001, 8000), f"8001 x 8000 pixels; at most {MAX_PIXELS} in all are read"),
        (icon(png_black(9000)), "ICO is not read; convert to JPEG"),
        (encode(PHOTO.resize((32, 32)), "ICNS"), "ICNS is not read; convert to JPEG"),
        (png_header(100, 100), "the PNG is damaged or cut short"),
    ],
)
def test_what_is_no_picture_is_refused_before_anything_is_allocated(data, reason):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError, match=f"^{re.escape(reason)}"):
        decode(data)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kB


def box(*brands: bytes) -> bytes:
    content = b"ftyp" + brands[0] + bytes(4) + b"".join(brands)
    return struct.pack(">I", len(content) + 4) + content + bytes(200)


def tiff(*tags: tuple[int, int]) -> bytes:
    """A TIFF of one strip that the tags (LONG) are added to."""
    every = {256: 4, 257: 4, 258: 8, 259: 1, 262: 1, 273: 8, 277: 1, 278: 4, 279: 16} | dict(tags)
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(every.items()))
    return struct.pack("<2sHI16sH", b"II", 42, 24, bytes(range(16)), len(every)) + entries + bytes(4)


def frame(code: int, bits: int = 8) -> bytes:
    """A JPEG that says it is of another kind."""
    start = OPAQUE["JPEG"].index(b"\xff\xc0")
    return OPAQUE["JPEG"][: start + 1] + bytes([code, 0, 17, bits]) + OPAQUE["JPEG"][start + 5 :]


SVG = b'<?xml version="1.0"?>\n<!-- drawn -->\n<svg xmlns="http://www.w3.org/2000/svg"/>'
NOT_READ = {  # what needs another library, by name; nothing in these is damaged
    "HEIC": box(b"heic", b"mif1"),
    "HEIC ": box(b"mif1", b"heic"),
    "HEIF": box(b"mif1"),
    "camera raw (CR3)": box(b"crx "),
    "camera raw (CR2)": b"II*\0\x10\0\0\0CR\2\0" + bytes(99),
    "camera raw (DNG, NEF, ARW ...)": tiff((50706, 1)),
    "camera raw (DNG, NEF, ARW ...) ": tiff((254, 1), (330, 8)),
    "camera raw (DNG, NEF, ARW ...)  ": tiff((262, 32803)),
    "camera raw": b"FUJIFILMCCD-RAW 0201",
    "JPEG XL": b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(50),
    "JPEG XL ": b"\xff\x0a" + bytes(50),
    "SVG": SVG,
    "PSD": b"8BPS\0\1" + bytes(50),
    "EXR": b"v/1\1" + bytes(50),
    "Radiance HDR": cv2.imencode(".hdr", PIXELS.astype(np.float32))[1].tobytes(),
    "PFM (a map of floating-point numbers)": cv2.imencode(".pfm", PIXELS.astype(np.float32))[1].tobytes(),
    "PFM (a map of floating-point numbers) ": cv2.imencode(".pfm", GREY.astype(np.float32))[1].tobytes(),
    "TIFF of 32 bits in each channel": encode(Image.fromarray(GREY.astype(np.float32)), "TIFF"),
    "TIFF of 32 bits in each channel ": encode(Image.fromarray(GREY.astype(np.int32)), "TIFF"),
    "lossless JPEG": frame(0xF7),
    "JPEG of 12 bits": frame(0xC1, 12),
}
NO_IMAGES = {
    "a PDF": b"%PDF-1.7\n",
    "a video": box(b"isom", b"mp42"),
    "a video ": b"\x1aE\xdf\xa3" + bytes(50),
    "a ZIP archive": b"PK\3\4" + bytes(50),
    "an archive": b"\x1f\x8b\x08" + bytes(50),
    "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
    "a web page": b"\n<!DOCTYPE html>\n<html><svg/></html>",
    "text": "Guten Tag, schöne Grüße".encode(),
    "text ": b'{"error": "404"}',
    "text  ": b"BMW, P2 and GIF",
    "what macOS keeps beside a file (AppleDouble)": b"\0\5\x16\7\0\2\0\0Mac OS X",
}


@pytest.mark.parametrize("name", NOT_READ)
def test_what_needs_another_library_is_called_by_its_name(name):
    with pytest.raises(InputError, match=rf"^{re.escape(name.strip())} is not read; convert to ") as refusal:
        decode(NOT_READ[name])
    assert not isinstance(refusal.value, Unreadable), "another release may read it"


@pytest.mark.parametrize("name", NO_IMAGES)
def test_what_is_no_image_is_called_what_it_is(name):
    with pytest.raises(Unreadable, match=rf"^not an image but {re.escape(name.strip())}"):
        decode(NO_IMAGES[name])


ODD = {  # file, what it shows
    "TIFF LAB": (encode(ImageCms.profileToProfile(PHOTO, SRGB, LAB, outputMode="LAB"), "TIFF"), PIXELS),
    "TIFF CMYK": (encode(PHOTO.convert("CMYK"), "TIFF"), PIXELS),
    "TIFF by zstd": (encode(PHOTO, "TIFF", compression="zstd"), PIXELS),
    "TIFF of two pages": (encode(PHOTO, "TIFF", save_all=True, append_images=[ImageOps.invert(PHOTO)]), PIXELS),
    "TIFF grey, white is zero, of 16 bits": (
        encode(Image.fromarray(GREY.astype(np.uint16) * 257), "TIFF", tiffinfo={262: 0}),
        255 - np.repeat(GREY[:, :, None], 3, axis=2),
    ),
    "TIFF of 16 bits": (cv2.imencode(".tif", PIXELS[:, :, ::-1].astype(np.uint16) * 257)[1].tobytes(), PIXELS),
    "PGM of 16 bits": (
        cv2.imencode(".pgm", GREY.astype(np.uint16) * 257)[1].tobytes(),
        np.repeat(GREY[:, :, None], 3, axis=2),
    ),
    "JPEG 2000 of 16 bits": (cv2.imencode(".jp2", PIXELS[:, :, ::-1].astype(np.uint16) * 257)[1].tobytes(), PIXELS),
    "JPEG 2000 CMYK": (encode(PHOTO.convert("CMYK"), "JPEG2000"), PIXELS),
    "JPEG 2000 YCbCr": (encode(PHOTO.convert("YCbCr"), "JPEG2000"), PIXELS),
    "WebP animated": (
        encode(PHOTO, "WEBP", lossless=True, save_all=True, append_images=[ImageOps.invert(PHOTO)]),
        PIXELS,
    ),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_kinds_show_what_was_put_into_them(name):
    data, expected = ODD[name]
    assert distance(decode(data), expected) < 2


@pytest.mark.parametrize("odd", [*NOT_READ.values(), *NO_IMAGES.values(), b"", b"\xff\xd8\xff", OPAQUE["TIFF"][:99]])
def test_an_odd_image_does_not_touch_its_neighbours(odd):
    good = OPAQUE["PNG"]
    images = Images([good, odd, good], None, NETWORK)
    pictures, rows = drawn(images, [[0, 1, 2]])
    assert rows == [0, 2] and list(images.corrupt) == [1]
    assert torch.equal(pictures, drawn(Images([good], None, NETWORK), [[0, 0]])[0])


def test_what_only_the_machine_refuses_may_pass(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    files = [
        tmp_path / "nowhere.jpg",
        tmp_path,
        tmp_path / "pipe.jpg",
        Path("/proc/self/mem"),
        tmp_path / "damaged.jpg",
    ]
    files[-1].write_bytes(OPAQUE["JPEG"][:-9])
    images = Images([*map(str, files), "nul\0.jpg"], None, NETWORK)
    assert not drawn(images, [list(range(6))])[1]
    assert images.corrupt == {
        0: "No such file or directory",
        1: "Is a directory",
        2: "not a file but a pipe or a device",
        3: "Input/output error",
        4: "the JPEG is cut short",
        5: "embedded null byte",
    }
    assert images.passing == {0, 1, 2, 3, 5}


def test_of_what_is_no_picture_only_the_beginning_is_read(tmp_path):
    with (tmp_path / "film.jpg").open("wb") as file:
        file.write(NO_IMAGES["a video"])
        file.truncate(2**40)
    assert len(read(tmp_path / "film.jpg")) < 10_000


PHONE = cv2.resize(PIXELS, (2400, 1800), interpolation=cv2.INTER_CUBIC)


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize(("most", "shrink"), [(2400 * 1800, 1), (2400 * 1800 - 1, 2), (10**6, 4), (10**5, 8)])
def test_a_jpeg_of_more_pixels_is_decoded_at_a_part_of_its_size(most, shrink, orientation):
    data = oriented(Image.fromarray(PHONE), "JPEG", orientation)
    whole, part = decode(data), decode(data, most, needed=128)
    assert part.shape == tuple(side // shrink for side in whole.shape[:2]) + (3,)
    assert distance(letterbox(part, NETWORK), letterbox(whole, NETWORK)) < 1
    for augment in ("none", "light"):
        assert distance(load(data, NETWORK, augment, 5, most), load(data, NETWORK, augment, 5)) < 2


@pytest.mark.parametrize(
    "data",
    [
        encode(PHONE, "JPEG", progressive=True),  # all of its coefficients would be held at once
        encode(PHONE[:120, :160], "JPEG"),  # too little would be left of it
        encode(PHONE, "PNG"),
    ],
    ids=["progressive", "small", "PNG"],
)
def test_what_cannot_be_decoded_in_part_is_refused_above_the_limit(data):
    with pytest.raises(InputError, match="pixels; at most 9999 in all are read; ALIPROD_MAX_PIXELS sets it") as refusal:
        load(data, NETWORK, max_pixels=9999)
    assert not isinstance(refusal.value, Unreadable)


def test_one_variable_limits_the_pixels_wherever_images_are_read(monkeypatch):
    data = encode(PHONE, "PNG")
    monkeypatch.setenv("ALIPROD_MAX_PIXELS", str(2400 * 1800 - 1))
    images = Images([data], None, NETWORK)
    assert not drawn(images, [[0]])[1] and "at most 4319999" in images.corrupt[0]
    with pytest.raises(InputError, match="2400 x 1800 pixels"):
        decode(data)
    monkeypatch.setenv("ALIPROD_MAX_PIXELS", str(2400 * 1800))
    assert drawn(Images([data], None, NETWORK), [[0]])[1] == [0]
    monkeypatch.setenv("ALIPROD_MAX_PIXELS", "many")
    with pytest.raises(InputError, match="ALIPROD_MAX_PIXELS 'many': must be a whole number above 0"):
        Images([data], None, NETWORK)


@pytest.mark.parametrize("form", ["WEBP", "TIFF"])
def test_what_pillow_holds_for_too_large_is_not_called_damaged(form, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 99)
    with pytest.raises(InputError, match="more pixels than Pillow decodes") as refusal:
        decode(encode(PHOTO, form))
    assert not isinstance(refusal.value, Unreadable)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "BMP", "AVIF", "JPEG2000", "PPM"])
def test_pillows_own_limit_does_not_hold_here(form, monkeypatch):
    data = encode(PHOTO, form)
    expected = decode(data)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 99)
    with pytest.raises(Image.DecompressionBombError):
        Image.open(io.BytesIO(data))
    np.testing.assert_array_equal(decode(data), expected)


@pytest.mark.parametrize("share", [0.3, 0.5, 0.9, 0.995])
@pytest.mark.parametrize(
    ("form", "options"),
    [
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("MPO", {"save_all": True}),
        ("PNG", {}),
        ("WEBP", {}),
        ("WEBP", {"lossless": True}),
        ("GIF", {}),
        ("BMP", {}),
    ],
)
def test_a_file_cut_short_is_refused(form, options, share):
    whole = encode(RNG.integers(0, 256, (80, 120, 3), np.uint8), form, **options)
    with pytest.raises(InputError, match="cut short"):
        decode(whole[: int(share * len(whole))])


@pytest.mark.parametrize("form", ["PNG", "WEBP"])
def test_a_transparent_file_cut_short_is_refused(form):
    whole = encode(RNG.integers(0, 256, (80, 120, 4), np.uint8), form)
    with pytest.raises(InputError, match="cut short"):
        decode(whole[: len(whole) // 2])


@pytest.mark.parametrize("tail", [b"\0", b"<!-- served in 3 ms -->", b"film \xff\xda \xff\xd8 frames", OPAQUE["PNG"]])
@pytest.mark.parametrize("name", ["JPEG", "JPEG progressive"])
def test_bytes_after_a_jpegs_end_do_no_harm(name, tail):
    np.testing.assert_array_equal(decode(OPAQUE[name] + tail), decode(OPAQUE[name]))


def test_the_end_of_a_thumbnail_is_not_the_end_of_the_photograph():
    whole = with_segment(OPAQUE["JPEG"], encode(PHOTO.resize((16, 16)), "JPEG"))
    np.testing.assert_array_equal(decode(whole), decode(OPAQUE["JPEG"]))
    with pytest.raises(InputError, match="cut short"):
        decode(whole[:-2])
    start_of_scan = whole.rindex(b"\xff\xda")
    with pytest.raises(InputError, match="cut short"):
        decode(whole[: start_of_scan + 30])


@pytest.mark.parametrize(
    ("height", "width"), [(1, 500), (500, 1), (64, 64), (100, 100), (1, 1), (2, 3), (37, 91), (1001, 999), (63, 64)]
)
def test_letterbox_centres_the_whole_picture_between_bars_of_the_mean_colour(height, width):
    square = letterbox(np.full((height, width, 3), 255, np.uint8), NETWORK)
    assert (square.shape, square.dtype) == ((64, 64, 3), np.uint8)
    rows, columns = np.nonzero((square == 255).all(axis=2))
    top, bottom, left, right = rows.min(), 63 - rows.max(), columns.min(), 63 - columns.max()
    expected = [max(1, round(64 * side / max(height, width))) for side in (height, width)]
    assert [64 - top - bottom, 64 - left - right] == expected
    assert abs(top - bottom) <= 1
    assert abs(left - right) <= 1
    assert len(rows) == expected[0] * expected[1]
    square[rows, columns] = NETWORK.fill
    assert (square == (51, 102, 153)).all()


def test_a_picture_of_the_right_size_is_left_as_it_is():
    picture = RNG.integers(0, 256, (64, 64, 3), np.uint8)
    np.testing.assert_array_equal(letterbox(picture, NETWORK), picture)


@pytest.mark.parametrize(("height", "width"), [(300, 500), (500, 300), (40, 50), (1999, 3001)])
def test_a_circle_stays_round(height, width):
    picture = np.zeros((height, width, 3), np.uint8)
    cv2.circle(picture, (width // 2, height // 2), min(height, width) * 2 // 5, (255, 255, 255), -1)
    rows, columns = np.nonzero(letterbox(picture, Preprocessing(224, (0, 0, 0), (1, 1, 1), "bilinear"))[:, :, 0] > 127)
    assert abs(np.ptp(rows) - np.ptp(columns)) <= 1


@pytest.mark.parametrize("size", [128, 200, 333, 1000])
def test_a_fine_checkerboard_shrinks_to_grey_without_moire(size):
    board = np.repeat((np.indices((size, size)).sum(axis=0) % 2 * 255).astype(np.uint8)[:, :, None], 3, axis=2)
    shrunk = letterbox(board, NETWORK).astype(int)
    assert shrunk.mean() == pytest.approx(127.5, abs=1)
    assert shrunk.std() < 255 * (64 / size) ** 2 / 2  # a pixel holds (size / 64)^2 squares; nearest would give 127


def test_load_without_augmentation_is_decode_and_letterbox():
    expected = letterbox(decode(OPAQUE["JPEG"]), NETWORK)
    for seed in (0, 1):
        np.testing.assert_array_equal(load(OPAQUE["JPEG"], NETWORK, "none", seed), expected)


@pytest.mark.parametrize("augment", ["light", "strong"])
def test_the_seed_alone_decides_what_augmentation_does(augment):
    first = [load(OPAQUE["PNG"], NETWORK, augment, seed) for seed in range(24)]
    for seed in reversed(range(24)):
        np.testing.assert_array_equal(load(OPAQUE["PNG"], NETWORK, augment, seed), first[seed])
    assert len({picture.tobytes() for picture in first}) > 12


@pytest.mark.parametrize("augment", ["light", "strong"])
def test_augmentation_survives_what_opencv_does_not_turn(augment):
    for height, width in ((1, 40_000), (40_000, 5)):
        data = encode(np.full((height, width, 3), 255, np.uint8))
        seen = [load(data, NETWORK, augment, seed) for seed in range(4)]  # as often as not it is turned
        assert {picture.shape for picture in seen} == {(64, 64, 3)} and max(map(np.max, seen)) == 255


@pytest.mark.parametrize("augment", ["light", "strong"])
@pytest.mark.parametrize(("height", "width"), [(1, 500), (500, 1), (1, 1), (2, 3), (3000, 3)])
def test_augmentation_survives_every_shape(augment, height, width):
    data = encode(RNG.integers(0, 256, (height, width, 3), np.uint8))
    assert {load(data, NETWORK, augment, seed).shape for seed in range(20)} == {(64, 64, 3)}


@pytest.mark.parametrize(("height", "width"), [(300, 400), (1200, 1000)])
def test_light_augmentation_keeps_circles_round(height, width):
    picture = np.zeros((height, width, 3), np.uint8)
    cv2.circle(picture, (width // 2, height // 2), min(height, width) // 3, (255, 255, 255), -1)
    data, network = encode(picture), Preprocessing(224, (0, 0, 0), (1, 1, 1), "bilinear")
    for seed in range(30):
        seen = (load(data, network, "light", seed)[:, :, 0] > 127).astype(np.uint8)
        contour = max(cv2.findContours(seen, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)[0], key=cv2.contourArea)
        _, axes, _ = cv2.fitEllipse(contour)
        assert abs(axes[0] - axes[1]) < 1.5


def test_light_augmentation_turns_up_to_15_degrees_half_of_the_time():
    picture = np.zeros((400, 400, 3), np.uint8)
    cv2.rectangle(picture, (60, 190), (340, 210), (255, 255, 255), -1)
    data, network = encode(picture), Preprocessing(200, (0, 0, 0), (1, 1, 1), "bilinear")
    angles = []
    for seed in range(200):
        rows, columns = np.nonzero(load(data, network, "light", seed)[:, :, 0] > 127)
        angles.append(np.degrees(np.arctan(np.polyfit(columns, rows, 1)[0])))
    turned = np.abs(angles) > 0.3
    assert 0.35 < turned.mean() < 0.65
    assert 12 < np.max(angles) < 15.5
    assert -15.5 < np.min(angles) < -12


@pytest.fixture
def files(tmp_path) -> list[str]:
    """Twelve pictures of every format, all named .jpg, each with its row as brightness."""
    for row, form in enumerate(["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"] * 2):
        picture = np.full((50 + row, 80, 3), 20 * row, np.uint8)
        picture[10:20, 10:30] = (255, 0, 0)
        (tmp_path / f"{row}.jpg").write_bytes(encode(picture, form))
    return [str(tmp_path / f"{row}.jpg") for row in range(12)]


def drawn(images: Images, chunks: list[list[int]], epoch: int = 0) -> tuple[torch.Tensor, list[int]]:
    batches, rows = zip(*images.batches([np.array(chunk) for chunk in chunks], epoch), strict=True)
    return torch.cat(batches), np.concatenate(rows).tolist()


def test_batches_hold_the_rows_asked_for_in_their_order(files):
    chunks = [[3, 0, 11], [7], [2, 2], [10, 1, 5, 4], [8, 9, 6]]
    images = Images(files, None, NETWORK)
    for (batch, rows), chunk in zip(images.batches(map(np.array, chunks)), chunks, strict=True):
        assert rows.tolist() == chunk
        assert (batch.shape, batch.dtype) == ((len(chunk), 3, 64, 64), torch.uint8)
        assert batch.is_contiguous(memory_format=torch.channels_last)
        assert (batch[:, :, 40, 60].float().mean(dim=1) / 20).round().tolist() == chunk
        assert (batch[:, 0, 21, 15] > 200).all()
        assert (batch[:, 2, 21, 15] < 60).all()
    assert images.corrupt == {}


@pytest.mark.parametrize("augment", ["none", "light", "strong"])
def test_neither_threads_nor_batches_change_a_pixel(files, augment):
    expected, _ = drawn(Images(files, None, NETWORK, augment=augment, seed=5, workers=1), [list(range(12))])
    for workers, chunks in [(4, [list(range(12))]), (1, [[row] for row in range(12)]), (3, [[0, 1, 2, 3, 4]] * 2)]:
        images = Images(files, None, NETWORK, augment=augment, seed=5, workers=workers)
        pictures, rows = drawn(images, chunks)
        assert torch.equal(pictures, expected[rows])


def test_epoch_and_seed_and_row_change_what_is_drawn(files):
    def draw(seed: int, epoch: int) -> torch.Tensor:
        same = [Path(files[0]).read_bytes()] * 12
        return drawn(Images(same, None, NETWORK, augment="strong", seed=seed), [list(range(12))], epoch)[0]

    pictures = torch.cat([draw(0, 0), draw(0, 1), draw(1, 0)])
    assert len(pictures.flatten(1).unique(dim=0)) > 30
    assert torch.equal(draw(1, 2), draw(1, 2))


def test_bytes_do_as_well_as_paths(files):
    contents = [Path(file).read_bytes() for file in files]
    every = [list(range(12))]
    assert torch.equal(drawn(Images(contents, None, NETWORK), every)[0], drawn(Images(files, None, NETWORK), every)[0])


def test_unreadable_rows_are_left_out_and_noted_with_the_reason(files):
    Path(files[1]).write_bytes(b"")
    Path(files[4]).write_text("hello")
    Path(files[6]).write_bytes(Path(files[6]).read_bytes()[:-2])
    Path(files[9]).unlink()
    images = Images(files, None, NETWORK)
    pictures, rows = drawn(images, [[0, 1, 2, 3], [4], [9, 8, 7, 6, 5]])
    assert rows == [0, 2, 3, 8, 7, 5]
    assert torch.equal(pictures, drawn(Images(files, None, NETWORK), [rows])[0])
    assert images.corrupt == {
        1: "the file is empty",
        4: "not an image but text",
        6: "the JPEG is cut short",
        9: "No such file or directory",
    }


@pytest.mark.parametrize(("share", "stops"), [(0.0, True), (0.16, True), (2 / 12, False), (1.0, False)])
def test_more_corrupt_images_than_the_share_stop_the_run(files, share, stops):
    Path(files[3]).write_bytes(b"")
    Path(files[5]).write_text("hello")
    threads = threading.active_count()
    images = Images(files, None, NETWORK, max_corrupt_share=share)
    if not stops:
        assert len(drawn(images, [list(range(12))])[1]) == 10
        return
    with pytest.raises(
        CorruptImages, match=f"2 of 12 images cannot be read.*{share:g};.*3.jpg: the file is empty"
    ) as caught:
        drawn(images, [list(range(12)), list(range(12))])
    assert caught.value.reasons == {files[3]: "the file is empty", files[5]: "not an image but text"}
    assert threading.active_count() == threads


def test_corrupt_bytes_are_named_by_their_number():
    with pytest.raises(CorruptImages, match="1 of 2 images cannot be read.*: image 1: not an image but text$"):
        drawn(Images([OPAQUE["PNG"], b"hello"], None, NETWORK, max_corrupt_share=0), [[0, 1]])


@pytest.mark.parametrize("taken", [0, 1, 3])
def test_batches_closed_early_leave_no_threads(files, taken):
    before = threading.active_count()
    batches = Images(files, None, NETWORK, workers=4).batches(np.arange(12)[:, None])
    for _ in range(taken):
        next(batches)
    assert threading.active_count() > before or not taken
    batches.close()
    assert threading.active_count() == before


def test_replace_keeps_everything_but_the_files(files):
    images = Images(files, np.arange(12), NETWORK, augment="strong", seed=3, max_corrupt_share=0.5, workers=2)
    other = images.replace(files[6:])
    assert (other.labels, other.max_corrupt_share, other.workers, other.rows.tolist()) == (None, 0.5, 2, list(range(6)))
    expected = drawn(Images(files[6:], None, NETWORK, augment="strong", seed=3), [[0, 1, 2]])[0]
    assert torch.equal(drawn(other, [[0, 1, 2]])[0], expected)
