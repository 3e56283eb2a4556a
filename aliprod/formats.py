"""What a file is, told by its first bytes: a picture that is read, a picture that is not, or no picture at all.

The one list of formats: what folders are searched for, what is decoded and what is refused by its name follow from it.
"""

import codecs
import re
from collections.abc import Callable

from PIL import (
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    Jpeg2KImagePlugin,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

HEAD = 4096  # bytes that tell every format
_FTYP = rb".{4}ftyp(?:.{4}){0,20}?"  # the file and its brands; a video is whatever has no other name
_MARKUP = rb"(?i)(?:\xef\xbb\xbf)?\s*"

# Of these Pillow reads the header alone; of icons it decodes what is in them before anyone knows how large it is.
READ: dict[str, tuple[bytes, Callable]] = {
    "JPEG": (rb"\xff\xd8\xff", JpegImagePlugin.jpeg_factory),
    "PNG": (rb"\x89PNG\r\n\x1a\n", PngImagePlugin.PngImageFile),
    "WEBP": (rb"RIFF.{4}WEBP", WebPImagePlugin.WebPImageFile),
    "GIF": (rb"GIF8[79]a", GifImagePlugin.GifImageFile),
    "BMP": (rb"BM.{12}[\x0c\x28\x34\x38\x40\x6c\x7c]\0\0\0", BmpImagePlugin.BmpImageFile),
    "TIFF": (rb"(?!.{8}CR\x02)(?:II(?:\*\0|\+\0\x08\0)|MM(?:\0\*|\0\+\0\x08))", TiffImagePlugin.TiffImageFile),
    "AVIF": (_FTYP + rb"avi[fs]", AvifImagePlugin.AvifImageFile),
    "JPEG2000": (rb"\xff\x4f\xff\x51|\0{3}\x0cjP  \r\n\x87\n", Jpeg2KImagePlugin.Jpeg2KImageFile),
    "PPM": (rb"P[1-6](?:\s|#[^\n]*\n)+\d", PpmImagePlugin.PpmImageFile),
}
UNREAD = {  # pictures that need another library
    "HEIC": _FTYP + rb"he(?:i[cxms]|v[cxms])",
    "camera raw (CR3)": _FTYP + rb"crx ",
    "camera raw (CR2)": rb"(?:II\*\0|MM\0\*).{4}CR\x02",
    "camera raw": rb"IIR[OS]|MMOR|IIU\0|FUJIFILMCCD-RAW|FOVb|\0MRM|II\x1a\0{3}HEAPCCDR",
    "HEIF": rb"(?!" + _FTYP + rb"avi[fs])" + _FTYP + rb"(?:mif[12]|msf1|miaf)",
    "JPEG XL": rb"\xff\x0a|\0{3}\x0cJXL \r\n\x87\n",
    "JPEG XR": rb"II\xbc",
    "PSD": rb"8BPS",
    "EXR": rb"v/1\x01",
    "Radiance HDR": rb"#\?(?:RADIANCE|RGBE)",
    "PFM (a map of floating-point numbers)": rb"P[Ff]\s",
    "PAM": rb"P7\s",
    "ICO": rb"\0\0[\x01\x02]\0[^\0]\0",
    "ICNS": rb"icns",
    "DDS": rb"DDS ",
    "QOI": rb"qoif",
    "BPG": rb"BPG\xfb",
    "FLIF": rb"FLIF",
    "XCF": rb"gimp xcf",
    "DjVu": rb"AT&TFORM",
    "PostScript": rb"%!PS|\xc5\xd0\xd3\xc6",
    "WMF": rb"\xd7\xcd\xc6\x9a",
    "DICOM": rb".{128}DICM",
    "FITS": rb"SIMPLE  =",
    "SVG": _MARKUP + rb"(?=<)(?!.*<(?:html|!doctype html)).*?<svg[\s>]",
}
OTHERS = {
    "a PDF": rb"%PDF-",
    "a video": _FTYP
    + rb"|.{4}(?:moov|mdat|wide|skip)|RIFF.{4}AVI |\x1aE\xdf\xa3|FLV\x01|\0\0\x01[\xba\xb3]|OggS|0&\xb2u",
    "a ZIP archive": rb"PK(?:\x03\x04|\x05\x06)",
    "an archive": rb"\x1f\x8b|7z\xbc\xaf|Rar!|\xfd7zXZ|BZh|\x28\xb5\x2f\xfd|.{257}ustar",
    "a Git LFS pointer, the picture itself was not fetched": rb"version https://git-lfs",
    "what macOS keeps beside a file (AppleDouble)": rb"\0\x05\x16[\x00\x07]",
    "a web page": _MARKUP + rb"(?:<!--.*?-->\s*)*<(?:!doctype html|html|head|body)",
    "nothing but zeros": rb"\0+\Z",
}
SUFFIXES = {suffix for suffix, form in Image.EXTENSION.items() if form in READ or form == "MPO"}


def read_as(head: bytes) -> str:
    """The name in READ of the format that begins so, "" if it is none of them."""
    return next((name for name, (pattern, _) in READ.items() if re.match(pattern, head[:HEAD], re.DOTALL)), "")


def is_picture(head: bytes) -> bool:
    """Whether a file that begins so is a picture, be its format read or not."""
    return bool(read_as(head) or _named(head, UNREAD))


def refusal(head: bytes) -> str:
    """Why a file that begins so is not read, if it is in none of the formats that are."""
    if not head:
        return "the file is empty"
    if name := _named(head, UNREAD):
        return f"{name} is not read; convert to JPEG"
    name = _named(head, OTHERS) or ("text" if _is_text(head[:HEAD]) else "")
    return f"not an image but {name}" if name else "not an image"


def _named(head: bytes, patterns: dict[str, bytes]) -> str:
    return next((name for name, pattern in patterns.items() if re.match(pattern, head[:HEAD], re.DOTALL)), "")


def _is_text(head: bytes) -> bool:
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):  # of UTF-16
        return True
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(head)  # the last letter may be cut
    except UnicodeDecodeError:
        return False
    return not re.search(r"[\0-\x08\x0e-\x1a\x1c-\x1f\x7f]", text)
