"""Photographs: decode, letterbox, augment, and batches filled by threads.

`load` is the only way from a file's bytes to what a network sees: training, evaluation and serving call it.
Threads rather than processes: decoding releases the interpreter's lock, batches are filled in place, and
what went wrong with an image is simply noted here. Everything random about an image follows from the seed,
the epoch and its row, so it does not depend on the number of threads or on where a run was resumed.
"""

import functools
import io
import re
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
from PIL import ExifTags, Image, ImageOps

from aliprod import InputError
from aliprod.processors import available_cpus

if TYPE_CHECKING:  # exported models read photographs where there is no torch
    import torch

MAX_PIXELS = 64_000_000  # of one image; more is refused before it is decoded
# Of which Pillow reads the header alone; of icons it decodes what is in them before anyone knows how large it is.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")
LONGEST = 16_000  # pixels of a side that is augmented; OpenCV turns no image of 32,768
INTERPOLATIONS = {"bilinear": cv2.INTER_LINEAR, "bicubic": cv2.INTER_CUBIC, "lanczos": cv2.INTER_LANCZOS4}


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


def decode(data: bytes, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decodes whatever the web calls .jpg to RGB (H, W, 3) uint8, upright, transparency laid on white.

    InputError says why it cannot: empty, not an image of FORMATS, cut short, more than max_pixels in all.
    """
    max_pixels = min(max_pixels, 2 * (Image.MAX_IMAGE_PIXELS or max_pixels))  # Pillow opens none larger
    if not data:
        raise InputError("the file is empty")
    try:
        header = Image.open(io.BytesIO(data), formats=FORMATS)  # reads the header alone
    except Image.UnidentifiedImageError:
        raise InputError("not an image") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise InputError(f"too many pixels; at most {max_pixels} in all are read") from None
    except Exception as error:
        raise InputError(f"damaged or cut short: {error}") from None
    width, height = header.size
    if width * height > max_pixels:
        raise InputError(f"{width} x {height} pixels; at most {max_pixels} in all are read")
    if data.startswith(b"\xff\xd8") and not _has_end(data):  # libjpeg would paint what is missing grey
        raise InputError("the JPEG is cut short")
    try:
        turned = header.format == "WEBP" and ExifTags.Base.Orientation in header.getexif()  # OpenCV overlooks it
        if turned or (header.has_transparency_data and header.mode != "I;16"):
            return _on_white(header)
        image = cv2.imdecode(np.frombuffer(data, dtype=np.uint8), cv2.IMREAD_COLOR_RGB)
    except Exception as error:
        raise InputError(f"the {header.format} is damaged or cut short: {error}") from None
    if image is None:
        raise InputError(f"the {header.format} is damaged or cut short")
    return image


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
    data: bytes, preprocessing: Preprocessing, augment: str = "none", seed: int = 0, max_pixels: int = MAX_PIXELS
) -> np.ndarray:
    """A file's bytes as the network sees them: RGB (S, S, 3) uint8. InputError as of `decode`."""
    image = decode(data, max_pixels)
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


class Images:
    """The photographs of a table, as batches.

    paths: N files, or what stands in them; labels (N,) int64 or None. `corrupt` collects row -> reason as batches
    are drawn, and CorruptImages is raised once they are more than max_corrupt_share of all N.
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
        max_pixels: int = MAX_PIXELS,
        workers: int | None = None,
    ):
        self.paths = paths
        self.labels = labels
        self.rows = np.arange(len(paths))
        self.preprocessing = preprocessing
        self.augment = augment
        self.seed = seed
        self.max_corrupt_share = max_corrupt_share
        self.max_pixels = max_pixels
        self.workers = workers or available_cpus()
        self.corrupt: dict[int, str] = {}

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

    def _fill(self, target: np.ndarray, row: int, epoch: int) -> str | None:
        try:
            data = file if isinstance(file := self.paths[row], bytes) else Path(file).read_bytes()
            seed = int(np.random.SeedSequence([self.seed, epoch, int(row)]).generate_state(1)[0])
            target[:] = load(data, self.preprocessing, self.augment, seed, self.max_pixels)
            return None
        except (InputError, OSError) as error:
            return str(error.strerror if isinstance(error, OSError) else error)

    def _collect(self, images: np.ndarray, rows: np.ndarray, futures: list[Future]) -> tuple[np.ndarray, np.ndarray]:
        reasons = [future.result() for future in futures]
        good = np.array([reason is None for reason in reasons])
        if not good.all():
            self.note_corrupt({int(row): reason for row, reason in zip(rows, reasons, strict=True) if reason})
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


_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")  # in a JPEG; the others stand inside the compressed data


def _has_end(jpeg: bytes) -> bool:
    """Whether the end marker follows the last scan. Thumbnails, and films that telephones append, have their own."""
    at = 2
    while marker := _MARKER.search(jpeg, at):
        if marker[0] == b"\xff\xd9":
            return True
        at = marker.end() + int.from_bytes(jpeg[marker.end() : marker.end() + 2], "big")  # past the segment
    return False


def _on_white(image: Image.Image) -> np.ndarray:
    upright = ImageOps.exif_transpose(image).convert("RGBA")
    return np.array(Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright).convert("RGB"))
