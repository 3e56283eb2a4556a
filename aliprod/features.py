"""Embeddings computed once: what rounds with a frozen backbone, evaluation and cleaning work from.

An embedding depends only on the backbone's weights, the arithmetic, the preprocessing and the file, so it is
kept on disk under the digest of those. The file is filled under another name, with a count of the rows done
beside it, and renamed when complete: an interrupted computation goes on where it was.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from aliprod.images import Images
from aliprod.model import Recogniser, autocast, weights_digest
from aliprod.progress import progress

BATCH_SIZE = 128  # images; without gradients this fits everywhere
SAVE_EVERY = 16  # batches between two notes of how far the computation is


class Features:
    """Embeddings in the place of photographs: offers what `Images` offers, its batches go through the head alone.

    embeddings (M, D) float32 of M files, named by `digest`; codes (N,) which of them each row of `images` is.
    Rows whose file cannot be read are in `corrupt` and in no batch.
    """

    def __init__(self, images: Images, embeddings: np.ndarray, codes: np.ndarray, digest: str):
        self.paths = images.paths
        self.labels = images.labels
        self.corrupt = images.corrupt
        self.embeddings = embeddings
        self.codes = codes
        self.digest = digest
        self.rows = np.delete(np.arange(len(codes)), list(images.corrupt))

    def batches(self, batches: Iterable[np.ndarray], epoch: int = 0) -> Iterator[tuple[torch.Tensor, np.ndarray]]:
        """Yields embeddings (B, D) float32 and their rows (B,)."""
        for rows in batches:
            yield torch.from_numpy(self.embeddings[self.codes[rows]]), rows

    @staticmethod
    def embed(model: Recogniser, batch: torch.Tensor) -> torch.Tensor:
        """Embeddings (B, D) of a batch of these: the batch itself."""
        return batch


def compute(model: Recogniser, images: Images, folder: str | Path, precision: str = "fp32") -> Features:
    """The features of `images`, from the cache in `folder` or computed into it now.

    A file is embedded once however many rows it has. Raises CorruptImages as `Images` does.
    """
    assert images.augment == "none", "an augmented image has no one embedding"
    codes, files = pd.factorize(np.array(images.paths, dtype=object))
    path = Path(folder) / f"{_key(model, images, files, precision)}.npy"
    reasons_path = path.with_suffix(".corrupt.json")
    if not path.exists():
        _fill(model, images.replace(files.tolist()), path, reasons_path, precision)
    reasons = {int(code): reason for code, reason in json.loads(reasons_path.read_text()).items()}
    corrupt_rows = np.flatnonzero(np.isin(codes, list(reasons)))
    images.note_corrupt({int(row): reasons[codes[row]] for row in corrupt_rows})
    return Features(images, np.load(path, mmap_mode="r"), codes, path.stem)


@torch.inference_mode()
def _fill(model: Recogniser, images: Images, path: Path, reasons_path: Path, precision: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial, note = path.with_suffix(".partial.npy"), path.with_suffix(".partial.json")
    state: dict[str, Any] = json.loads(note.read_text()) if note.exists() else {"done": 0, "corrupt": {}}
    images.corrupt = {int(code): reason for code, reason in state["corrupt"].items()}
    total, done = len(images.paths), state["done"]
    mode = "r+" if done else "w+"
    store = np.lib.format.open_memmap(partial, mode, np.float32, (total, model.width))
    model.eval()
    chunks = [np.arange(start, min(start + BATCH_SIZE, total)) for start in range(done, total, BATCH_SIZE)]
    with progress(total=total, initial=done, desc="embedding", unit="img") as bar:
        for number, (batch, rows) in enumerate(images.batches(chunks)):
            with autocast(model.device, precision):
                store[rows] = model.embed(batch.to(model.device, non_blocking=True)).float().cpu().numpy()
            bar.update(len(chunks[number]))
            if number % SAVE_EVERY == SAVE_EVERY - 1:
                store.flush()
                _write(note, {"done": int(chunks[number][-1]) + 1, "corrupt": images.corrupt})
    store.flush()
    _write(reasons_path, images.corrupt)
    partial.replace(path)
    note.unlink(missing_ok=True)


def _write(path: Path, value: dict) -> None:
    beside = path.with_name(f"{path.name}.{os.getpid()}")
    beside.write_text(json.dumps(value))
    beside.replace(path)


def _key(model: Recogniser, images: Images, files: np.ndarray, precision: str) -> str:
    sha = hashlib.sha256()
    sha.update(json.dumps([weights_digest(model.backbone), precision, asdict(images.preprocessing)]).encode())
    for file in files:
        try:
            stat = Path(file).stat()
            sha.update(f"{file}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
        except OSError:
            sha.update(f"{file}\0missing\n".encode())
    return sha.hexdigest()[:32]
