"""Photographs: decode, letterbox, augment, and batches filled by threads.

`load` is the only way from a file's bytes to what a network sees: training, evaluation and serving call it.
Threads rather than processes: decoding releases the interpreter's lock, batches are filled in place, and
what went wrong with an image is simply noted here. Everything random about an image follows from the seed,
the epoch and its row, so it does not depend on the number of threads or on where a run was resumed.
"""

import contextlib
import functools
import io
import os
import re
import stat
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
from PIL import ExifTags, Image, TiffImagePlugin

from aliprod import InputError, formats
from aliprod.processors import available_cpus

if TYPE_CHECKING:  # exported models read photographs where there is no torch
    import torch

MAX_PIXELS = 64_000_000  # of one image, where ALIPROD_MAX_PIXELS sets nothing else; decoded at once
MOST_PIXELS = 2**30  # whatever is set: OpenCV decodes no more
LONGEST = 16_000  # pixels of a side that is augmented; OpenCV turns no image of 32,768
INTERPOLATIONS = {"bilinear": cv2.INTER_LINEAR, "bicubic": cv2.INTER_CUBIC, "lanczos": cv2.INTER_LANCZOS4}
SHRUNK = {  # what OpenCV is asked for a JPEG at 1 / 1 ... 1 / 8 of its size
    1: cv2.IMREAD_COLOR_RGB,
    2: cv2.IMREAD_REDUCED_COLOR_2,  # these are BGR
    4: cv2.IMREAD_REDUCED_COLOR_4,
    8: cv2.IMREAD_REDUCED_COLOR_8,
}
TURNS: dict[int, Callable[[np.ndarray], np.ndarray]] = {  # Exif's orientation -> what makes it upright
    2: lambda image: cv2.flip(image, 1),
    3: lambda image: cv2.flip(image, -1),
    4: lambda image: cv2.flip(image, 0),
    5: cv2.transpose,
    6: lambda image: cv2.rotate(image, cv2.ROTATE_90_CLOCKWISE),
    7: lambda image: cv2.flip(cv2.transpose(image), -1),
    8: lambda image: cv2.rotate(image, cv2.ROTATE_90_COUNTERCLOCKWISE),
}
OF_MANY_KINDS = ("TIFF", "BMP", "JPEG2000", "PPM")  # of which Pillow does not read all
UNREAD = (ValueError, OSError, MemoryError, cv2.error)  # why one image is not read
SCAN, END, FRAMES = 0xDA, 0xD9, (0xC0, 0xC1, 0xC2)  # markers of a JPEG
JPEG_KINDS = {0xC3: "lossless", 0xF7: "lossless", 0xC9: "arithmetically coded", 0xCA: "arithmetically coded"}
JPEG_KINDS |= dict.fromkeys((0xC5, 0xC6, 0xC7), "hierarchical")


class CorruptImages(InputError):
    """More of the images than the stated share cannot be read; `reasons` has them all, by file."""

    def __init__(self, reasons: dict[str, str], total: int, share: float):
        file, reason = next(iter(reasons.items()))
        super().__init__(
            f"{len(reasons)} of {total} images cannot be read, more than max_corrupt_share {share:g}; "
            f"the first: {file}: {reason}"
        )
        self.reasons = reasons


@dataclass(frozen=True)
class Preprocessing:
    """How a photograph becomes a network's input; travels with the model."""

    image_size: int  # side of the square, pixels
    mean: tuple[float, float, float]  # RGB, of values in [0, 1]
    std: tuple[float, float, float]
    interpolation: str  # used when enlarging; shrinking averages areas

    @property
    def fill(self) -> tuple[int, ...]:
        """Colour of the letterbox's bars: the mean, which normalises to zero."""
        return tuple(round(255 * value) for value in self.mean)


class Unreadable(InputError):
    """What the bytes of a file say themselves: they are no picture, or a damaged one. It will not pass."""


def limit(name: str, default: int, environment: Mapping[str, str] = os.environ) -> int:
    """The limit that a variable of the environment sets. InputError if it is no whole number above 0."""
    text = environment.get(name) or str(default)
    if not text.isdecimal() or not int(text):
        raise InputError(f"{name} {text!r}: must be a whole number above 0")
    return int(text)


@contextlib.contextmanager
def opened(file: str | Path) -> Iterator[io.BufferedReader]:
    """A regular file, open for reading. InputError if it is something else: a pipe is not waited for."""
    with open(file, "rb", opener=lambda path, flags: os.open(path, flags | os.O_NONBLOCK)) as stream:
        if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
            raise InputError("not a file but a pipe or a device")
        yield stream


def read(file: str | Path) -> bytes:
    """The bytes of a picture's file; of what does not begin as one that is read, the beginning alone.

    OSError if there is none, ValueError if there can be none of this name or it is no file.
    """
    with opened(file) as stream:
        head = stream.read(formats.HEAD)
        return head + stream.read() if formats.read_as(head) else head


def decode(data: bytes, max_pixels: int | None = None, needed: int | None = None) -> np.ndarray:
    """Decodes whatever the web calls .jpg to RGB (H, W, 3) uint8, upright, transparency laid on white.

    No more than max_pixels are decoded, by default ALIPROD_MAX_PIXELS; a JPEG that has more is decoded at half, a
    quarter or an eighth of its size if its longer side keeps `needed` pixels. Unreadable says what is wrong with the
    bytes; InputError that they are of a format that is not read, or of too many pixels; MemoryError is raised as it is.
    """
    max_pixels = min(max_pixels or limit("ALIPROD_MAX_PIXELS", MAX_PIXELS), MOST_PIXELS)
    name = formats.read_as(data)
    if not name:
        raise (InputError if formats.is_picture(data) else Unreadable)(formats.refusal(data))
    try:
        return _decode(name, data, max_pixels, needed)
    except (InputError, MemoryError):
        raise
    except Image.DecompressionBombError as error:  # a frame or a tile that the header said nothing of
        raise InputError(f"more pixels than Pillow decodes: {error}") from None
    except Exception as error:  # decoders raise whatever they like
        if isinstance(error, cv2.error) and error.code == cv2.Error.StsNoMem:
            raise MemoryError from None
        if name == "JPEG":
            _refuse_kind(data)
        raise Unreadable(f"the {name} is damaged or cut short: {error}") from None


def letterbox(image: np.ndarray, preprocessing: Preprocessing) -> np.ndarray:
    """Fits (H, W, 3) into the square (S, S, 3), sides in proportion, centred, bars in the mean colour."""
    size = preprocessing.image_size
    height, width = image.shape[:2]
    scale = size / max(height, width)
    new_height, new_width = max(1, round(height * scale)), max(1, round(width * scale))
    method = cv2.INTER_AREA if scale < 1 else INTERPOLATIONS[preprocessing.interpolation]
    top, left = (size - new_height) // 2, (size - new_width) // 2
    resized = cv2.resize(image, (new_width, new_height), interpolation=method)
    bottom, right = size - new_height - top, size - new_width - left
    return cv2.copyMakeBorder(resized, top, bottom, left, right, cv2.BORDER_CONSTANT, value=preprocessing.fill)


def load(
    data: bytes, preprocessing: Preprocessing, augment: str = "none", seed: int = 0, max_pixels: int | None = None
) -> np.ndarray:
    """A file's bytes as the network sees them: RGB (S, S, 3) uint8. Errors as of `decode`."""
    image = decode(data, max_pixels, needed=2 * preprocessing.image_size)  # twice: what is left to shrink is averaged
    if augment != "none":
        # Cropping and turning come before the square, so that neither distorts the proportions; a large
        # photograph is halved until it is near its final size, which loses nothing and saves most of the work.
        while min(image.shape[:2]) >= 4 * preprocessing.image_size:
            image = cv2.resize(image, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
        if (scale := LONGEST / max(image.shape[:2])) < 1:
            width, height = (max(1, round(scale * side)) for side in image.shape[1::-1])
            image = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
        sequence = _augmenter(augment, sum(preprocessing.fill) // 3, threading.get_ident())
        sequence.seed_(seed)
        image = np.ascontiguousarray(sequence(image=image))
    return letterbox(image, preprocessing)


def reason(error: Exception) -> str:
    """What is said of an image that was not read because of this."""
    if isinstance(error, MemoryError | cv2.error):
        return "not enough memory to decode it" if isinstance(error, MemoryError) else f"OpenCV: {error.err}"
    return getattr(error, "strerror", None) or str(error)


class Images:
    """The photographs of a table, as batches.

    paths: N files, or what stands in them; labels (N,) int64 or None. `corrupt` collects row -> reason as batches
    are drawn, and CorruptImages is raised once they are more than max_corrupt_share of all N; `passing` are those rows
    of it whose reason is not in the bytes: no permission, no memory, a disk away, a limit that can be set.
    """

    def __init__(
        self,
        paths: list[str] | list[bytes],
        labels: np.ndarray | None,
        preprocessing: Preprocessing,
        *,
        augment: str = "none",
        seed: int = 0,
        max_corrupt_share: float = 1.0,
        max_pixels: int | None = None,
        workers: int | None = None,
    ):
        self.paths = paths
        self.labels = labels
        self.rows = np.arange(len(paths))
        self.preprocessing = preprocessing
        self.augment = augment
        self.seed = seed
        self.max_corrupt_share = max_corrupt_share
        self.max_pixels = max_pixels or limit("ALIPROD_MAX_PIXELS", MAX_PIXELS)
        self.workers = workers or available_cpus()
        self.corrupt: dict[int, str] = {}
        self.passing: set[int] = set()

    def batches(self, batches: Iterable[np.ndarray], epoch: int = 0) -> Iterator[tuple["torch.Tensor", np.ndarray]]:
        """Yields images (B, 3, S, S) uint8, channels last, and their rows (B,); unreadable ones are left out."""
        import torch

        for images, rows in self.arrays(batches, epoch):
            batch = torch.from_numpy(images)
            yield (batch.pin_memory() if torch.cuda.is_available() else batch), rows

    def arrays(self, batches: Iterable[np.ndarray], epoch: int = 0) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The same without torch."""
        cv2.setNumThreads(1)  # each image has a thread already
        pool = ThreadPoolExecutor(self.workers)
        waiting: deque[tuple[np.ndarray, np.ndarray, list[Future]]] = deque()
        try:
            for rows in batches:
                waiting.append(self._submit(pool, rows, epoch))
                if len(waiting) > 2:  # batches ahead of the network
                    yield self._collect(*waiting.popleft())
            while waiting:
                yield self._collect(*waiting.popleft())
        finally:
            pool.shutdown(cancel_futures=True)

    def note_corrupt(self, reasons: dict[int, str]) -> None:
        """Adds to `corrupt`; raises CorruptImages once there are too many."""
        self.corrupt |= reasons
        if len(self.corrupt) > self.max_corrupt_share * len(self.paths):
            files = {
                f"image {row}" if isinstance(path := self.paths[row], bytes) else str(path): reason
                for row, reason in self.corrupt.items()
            }
            raise CorruptImages(files, len(self.paths), self.max_corrupt_share)

    def replace(self, paths: list[str]) -> "Images":
        """The same treatment of other files, without labels."""
        return Images(
            paths,
            None,
            self.preprocessing,
            augment=self.augment,
            seed=self.seed,
            max_corrupt_share=self.max_corrupt_share,
            max_pixels=self.max_pixels,
            workers=self.workers,
        )

    @staticmethod
    def embed(model: Any, batch: "torch.Tensor") -> "torch.Tensor":
        """Embeddings (B, D) of a batch of these: what the backbone makes of them."""
        return model.embed(batch)

    def _submit(self, pool: ThreadPoolExecutor, rows: np.ndarray, epoch: int) -> tuple:
        size = self.preprocessing.image_size
        images = np.empty((len(rows), size, size, 3), dtype=np.uint8)
        return images, rows, [pool.submit(self._fill, images[at], row, epoch) for at, row in enumerate(rows)]

    def _fill(self, target: np.ndarray, row: int, epoch: int) -> Exception | None:
        try:
            data = file if isinstance(file := self.paths[row], bytes) else read(file)
            seed = int(np.random.SeedSequence([self.seed, epoch, int(row)]).generate_state(1)[0])
            target[:] = load(data, self.preprocessing, self.augment, seed, self.max_pixels)
        except UNREAD as error:  # its neighbours go on
            return error
        return None

    def _collect(self, images: np.ndarray, rows: np.ndarray, futures: list[Future]) -> tuple[np.ndarray, np.ndarray]:
        errors = [future.result() for future in futures]
        good = np.array([error is None for error in errors])
        if not good.all():
            wrong = {int(row): error for row, error in zip(rows, errors, strict=True) if error}
            self.passing |= {row for row, error in wrong.items() if not isinstance(error, Unreadable)}
            self.note_corrupt({row: reason(error) for row, error in wrong.items()})
            images, rows = images[good], rows[good]
        return images.transpose(0, 3, 1, 2), rows


@functools.lru_cache(maxsize=256)
def _augmenter(name: str, fill: int, thread: int):  # one a thread: it holds a generator
    import imgaug.augmenters as iaa  # takes a second: only those who augment wait for it

    def half(augmenter):
        return iaa.Sometimes(0.5, augmenter)

    light = [half(iaa.Crop(percent=(0, 0.06), keep_size=False)), half(iaa.Rotate((-15, 15), cval=fill))]
    strong = [
        iaa.Fliplr(0.5),
        iaa.Crop(percent=(0, 0.2), keep_size=False),
        half(iaa.Affine(rotate=(-20, 20), shear=(-8, 8), cval=fill)),
        # imgaug seeds all but the order of these two.
        half(iaa.MultiplyAndAddToBrightness(mul=(0.7, 1.3), add=(-20, 20), random_order=False)),
        half(iaa.MultiplyHueAndSaturation(mul_saturation=(0.6, 1.4))),
    ]
    return iaa.Sequential({"light": light, "strong": strong}[name])


def _decode(name: str, data: bytes, max_pixels: int, needed: int | None) -> np.ndarray:
    header = _header(name, data)
    width, height = header.size
    shrink = 1
    if name == "JPEG":
        codes = [code for code, _ in _markers(data)]
        if not codes or codes[-1] != END:  # libjpeg would paint what is missing grey
            raise Unreadable("the JPEG is cut short")
        # Of several scans all coefficients are held at once, whatever is made of them.
        shrink = _shrink(header.size, max_pixels, needed or 0 if codes.count(SCAN) == 1 else 0)
    elif width * height > max_pixels:
        shrink = 0
    if not shrink or width * height > MOST_PIXELS:
        setting = f"ALIPROD_MAX_PIXELS sets it, up to {MOST_PIXELS}"
        raise InputError(f"{width} x {height} pixels; at most {max_pixels} in all are read; {setting}")

    if name == "JPEG" or (name == "JPEG2000" and not header.has_transparency_data and _is_deep(data)):
        image = cv2.imdecode(np.frombuffer(data, dtype=np.uint8), SHRUNK[shrink] | cv2.IMREAD_IGNORE_ORIENTATION)
        if image is None:
            raise ValueError("it cannot be decoded")
        if shrink > 1:
            image = cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
    else:
        header.load()
        image = _of_eight_bits(header)
    return _upright(image, header)


def _header(name: str, data: bytes) -> Image.Image:
    """What Pillow reads before any pixel: size, mode, metadata."""
    try:
        if name == "TIFF":
            _refuse_raw(data)
        return formats.READ[name][1](io.BytesIO(data), "")
    except (InputError, MemoryError, Image.DecompressionBombError):
        raise
    except Exception as error:
        if name not in OF_MANY_KINDS:
            raise
        raise InputError(f"the {name} is of a kind that is not read, or damaged: {error}") from None


def _of_eight_bits(image: Image.Image) -> np.ndarray:
    """RGB (H, W, 3) of what Pillow loaded, on white."""
    deep = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
    if image.mode == "F" or (image.mode == "I" and not deep):
        raise InputError(f"{image.format} of 32 bits in each channel is not read; convert to 8 or 16")
    if deep:
        grey = (np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8)
        if isinstance(image, TiffImagePlugin.TiffImageFile) and image.tag_v2.get(262) == 0:  # white is zero
            grey = 255 - grey
        return cv2.cvtColor(grey, cv2.COLOR_GRAY2RGB)
    if not image.has_transparency_data:
        return np.array(image.convert("RGB"))
    pixels = image.convert("RGBA")
    return np.array(Image.alpha_composite(Image.new("RGBA", pixels.size, "white"), pixels).convert("RGB"))


def _upright(image: np.ndarray, header: Image.Image) -> np.ndarray:
    try:
        orientation = header.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # a damaged note on how the photograph was taken does not damage the photograph
        orientation = 1
    turn = TURNS.get(orientation)
    return turn(image) if turn else image


def _shrink(size: tuple[int, int], max_pixels: int, needed: int) -> int:
    """The least of 1, 2, 4, 8 that a JPEG has to be shrunk by, 0 if none will do; it is not if nothing is `needed`."""
    width, height = size
    for shrink in SHRUNK if needed else [1]:
        if -(-width // shrink) * -(-height // shrink) <= max_pixels:
            return shrink if shrink == 1 or max(size) >= shrink * needed else 0
    return 0


def _refuse_raw(tiff: bytes) -> None:
    """InputError if it is a camera's: what is shown first in there is but a thumbnail."""
    file = io.BytesIO(tiff)
    tags = TiffImagePlugin.ImageFileDirectory_v2(file.read(16 if 43 in tiff[2:4] else 8))  # 43: BigTIFF
    file.seek(tags.next)
    tags.load(file)
    small = tags.get(254, 0) & 1 and 330 in tags  # a reduced image, others below it
    if small or 50706 in tags or tags.get(262) in (32803, 34892):  # a DNG's version; pixels of the sensor
        raise InputError("camera raw (DNG, NEF, ARW ...) is not read; convert to JPEG")


def _is_deep(jpeg2000: bytes) -> bool:
    """Whether a channel has more than 8 bits: Pillow's overflow."""
    start = jpeg2000.find(b"\xff\x4f\xff\x51")
    return (jpeg2000[start + 42] & 0x7F) > 7


_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")  # in a JPEG; the others stand inside the compressed data


def _markers(jpeg: bytes) -> list[tuple[int, int]]:
    """Every marker and where its segment begins, down to the end marker. Thumbnails, and films that telephones append,
    have their own."""
    markers, at = [], 2
    while marker := _MARKER.search(jpeg, at):
        at = marker.end()
        markers.append((jpeg[at - 1], at))
        if jpeg[at - 1] == END:
            break
        at += int.from_bytes(jpeg[at : at + 2], "big")  # past the segment
    return markers


def _refuse_kind(jpeg: bytes) -> None:
    """InputError if it is of a kind that is not read, rather than damaged."""
    for code, start in _markers(jpeg):
        if kind := JPEG_KINDS.get(code):
            raise InputError(f"{kind} JPEG is not read; convert to a usual one")
        if code in FRAMES and jpeg[start + 2 : start + 3] not in (b"", b"\x08"):
            raise InputError(f"JPEG of {jpeg[start + 2]} bits is not read; convert to one of 8")
