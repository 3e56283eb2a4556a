"""Photographs from files to normalised batches of 224 x 224 pixels, by two threads or two processes."""

from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.functional import normalize, to_tensor

from aliprod import manifest
from aliprod.images import Images, Preprocessing
from benchmarks.stopwatch import race

BATCH_SIZE, WORKERS = 64, 2
PREPROCESSING = Preprocessing(224, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bicubic")  # of tf_efficientnet_lite0
SQUARE = (PREPROCESSING.image_size, PREPROCESSING.image_size)


class Photographs(Dataset):
    """What a DataLoader reads: photographs opened by `opened`, as normalised (3, S, S), and their labels."""

    def __init__(self, paths: list[str], labels: np.ndarray, opened: Callable[[str], Image.Image | np.ndarray]):
        self.paths, self.labels, self.opened = paths, labels, opened

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, row: int) -> tuple[torch.Tensor, int]:
        image = to_tensor(self.opened(self.paths[row]))
        return normalize(image, PREPROCESSING.mean, PREPROCESSING.std), self.labels[row]


def peers_opened(path: str) -> Image.Image:
    """RGB, fitted into the square, bars in the mean colour."""
    image = Image.open(path).convert("RGB")
    return ImageOps.pad(image, SQUARE, Image.Resampling.BICUBIC, PREPROCESSING.fill)


def seed_opened(path: str) -> np.ndarray:
    """BGR on a black square, shrunk by interpolating between neighbours."""
    image = cv2.imread(path)
    height, width = image.shape[:2]
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    border = (top, side - height - top, left, side - width - left)
    return cv2.resize(cv2.copyMakeBorder(image, *border, cv2.BORDER_CONSTANT), SQUARE)


def measure(data: Path, limit: int = 2_000) -> Iterator[str]:
    """Yields one table, for `limit` train photographs, or as many as there are."""
    table = manifest.read(data, "train").sample(frac=1, random_state=0)[:limit]
    paths, labels = manifest.paths(table, data), np.zeros(len(table), dtype=np.int64)

    def loader(opened: Callable) -> DataLoader:
        return DataLoader(Photographs(paths, labels, opened), BATCH_SIZE, num_workers=WORKERS)

    ways = {
        "ours: OpenCV, threads": lambda: _drain(_ours(paths)),
        "peers': PIL, DataLoader": lambda: _drain(images for images, _ in loader(peers_opened)),
        "seed's: OpenCV, DataLoader": lambda: _drain(images for images, _ in loader(seed_opened)).flip(1),  # to RGB
    }
    loading = race(ways, rounds=5)
    speeds = len(paths) / loading.seconds.median()
    errors = {way: _error(images, paths) for way, images in loading.results.items()}
    assert max(errors.values()) < 10, errors
    notes = {way: f"{speeds[way]:,.0f} photographs/s, {errors[way]:.1f} of 255 levels from Lanczos" for way in ways}
    yield loading.table(f"images: {len(paths):,} photographs decoded, letterboxed and normalised", notes)


def _ours(paths: list[str]) -> Iterator[torch.Tensor]:
    """What `Recogniser.embed` makes of our batches: normalising is the device's work, here the same machine's."""
    mean, std = (255 * torch.tensor(values).view(1, 3, 1, 1) for values in (PREPROCESSING.mean, PREPROCESSING.std))
    rows = np.split(np.arange(len(paths)), range(BATCH_SIZE, len(paths), BATCH_SIZE))
    for images, _ in Images(paths, None, PREPROCESSING, workers=WORKERS).batches(rows):
        yield (images.float() - mean) / std


def _drain(batches: Iterator[torch.Tensor]) -> torch.Tensor:
    """Draws all batches and returns the first."""
    first = next(batches)
    for _ in batches:
        pass
    return first


def _error(images: torch.Tensor, paths: list[str]) -> float:
    """Mean difference of a batch (B, 3, S, S) to the same photographs shrunk by Lanczos's filter, bars left out."""
    differences = []
    for image, path in zip(images, paths, strict=False):
        original = Image.open(path).convert("RGB")
        reference = 255 * to_tensor(ImageOps.pad(original, SQUARE, Image.Resampling.LANCZOS))
        inside = to_tensor(ImageOps.pad(Image.new("L", original.size, 255), SQUARE))[0] > 0
        differences.append((127.5 * (image + 1) - reference).abs()[:, inside].mean())
    return float(torch.stack(differences).mean())
