"""Embeddings computed once: what rounds with a frozen backbone, evaluation and cleaning work from.

An embedding depends only on the backbone's weights, the arithmetic, the preprocessing and the file. Those of one
network are kept in one folder, named by a digest of the first three, in numbered parts that are only ever added to:
whoever needs files that no part has computes those alone. A part is filled under another name, with a count of the rows
done, and renamed when complete: an interrupted computation goes on where it was.
"""

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from aliprod.atomic import replacing
from aliprod.images import Images
from aliprod.model import Recogniser, autocast, weights_digest
from aliprod.progress import progress
from aliprod.sharing import locked

BATCH_SIZE = 128  # images; without gradients this fits everywhere
SAVE_EVERY = 16  # batches between two notes of how far the computation is


class Store:
    """Embeddings of one network on disk, a row a file, all parts one after the other.

    `keys` names each row's file, size and time of change; `reasons` says why its bytes give no embedding, "" where they
    do. Rows whose file the machine could not give, or only for now, have no key: whoever needs it tries again.
    """

    def __init__(self, folder: Path):
        parts = sorted(folder.glob("[0-9]*"))
        index = pd.concat(
            [pd.DataFrame({"key": [], "unreadable": []}, dtype="str"), *map(_index, parts)], ignore_index=True
        )
        self.digest = folder.name
        self.keys = index["key"][index["key"] != ""].drop_duplicates()
        self.reasons = index["unreadable"].to_numpy()
        self._parts = [np.load(part / "embeddings.npy", mmap_mode="r") for part in parts]
        self._starts = np.cumsum([0, *map(len, self._parts)])

    def rows(self, keys: pd.Series) -> np.ndarray:
        """The row of each key (M,), -1 where there is none yet."""
        found = pd.Index(self.keys).get_indexer(pd.Index(keys))
        return np.where(found >= 0, self.keys.index.to_numpy()[found] if len(self.keys) else -1, -1)

    def take(self, rows: np.ndarray) -> np.ndarray:
        """Embeddings (B, D) float32 of these rows (B,)."""
        places = np.searchsorted(self._starts, rows, side="right") - 1
        taken = np.empty((len(rows), self._parts[0].shape[1] if self._parts else 0), dtype=np.float32)
        for place in np.unique(places):
            here = places == place
            taken[here] = self._parts[place][rows[here] - self._starts[place]]
        return taken


class Features:
    """Embeddings in the place of photographs: offers what `Images` offers, its batches go through the head alone.

    codes (N,) says which row of `store` each row of `images` is. Rows whose file cannot be read are in `corrupt` and
    in no batch.
    """

    def __init__(self, images: Images, store: Store, codes: np.ndarray):
        self.paths = images.paths
        self.labels = images.labels
        self.corrupt = images.corrupt
        self.store = store
        self.codes = codes
        self.rows = np.delete(np.arange(len(codes)), list(images.corrupt))

    def batches(self, batches: Iterable[np.ndarray], epoch: int = 0) -> Iterator[tuple[torch.Tensor, np.ndarray]]:
        """Yields embeddings (B, D) float32 and their rows (B,)."""
        for rows in batches:
            yield torch.from_numpy(self.store.take(self.codes[rows])), rows

    @staticmethod
    def embed(model: Recogniser, batch: torch.Tensor) -> torch.Tensor:
        """Embeddings (B, D) of a batch of these: the batch itself."""
        return batch


def compute(model: Recogniser, images: Images, folder: str | Path, precision: str = "fp32") -> Features:
    """The features of `images`, from the cache in `folder` or computed into it now.

    A file is embedded once however many rows it has. What its bytes say against it is kept as well; what else kept it
    from being read is tried again next time. Raises CorruptImages as `Images` does.
    """
    assert images.augment == "none", "an augmented image has no one embedding"
    codes, files = pd.factorize(np.array(images.paths, dtype=object))
    keys = pd.Series([_key(file) for file in files], dtype="str")
    home = Path(folder) / _digest(model, images, precision)
    home.mkdir(parents=True, exist_ok=True)
    store = Store(home)
    passing: dict[int, str] = {}  # file -> why it could not be read just now
    if (store.rows(keys) < 0).any():
        with locked(home / "lock", "embeddings"):  # another process may be at the same work: then wait for what it does
            store = Store(home)
            missing = np.flatnonzero(store.rows(keys) < 0)
            if len(missing):
                source = images.replace(files[missing].tolist())
                source.max_corrupt_share *= len(images.paths) / len(missing)
                _fill(model, source, keys[missing], home, precision)
                passing = {int(missing[row]): source.corrupt[row] for row in source.passing}
                store = Store(home)

    places = store.rows(keys)
    reasons = np.append(store.reasons, "")[places]  # -1 is where there is none
    reasons[list(passing)] = list(passing.values())
    reasons = reasons[codes]
    images.passing |= set(np.flatnonzero(np.isin(codes, list(passing))).tolist())
    images.note_corrupt({int(row): reasons[row] for row in np.flatnonzero(reasons != "")})
    return Features(images, store, places[codes])


@torch.inference_mode()
def _fill(model: Recogniser, images: Images, keys: pd.Series, home: Path, precision: str) -> None:
    partial = home / f"partial-{hashlib.sha256(chr(10).join(keys).encode()).hexdigest()[:16]}"
    partial.mkdir(exist_ok=True)
    note = partial / "done.json"
    state: dict[str, Any] = json.loads(note.read_text()) if note.exists() else {"done": 0, "corrupt": []}
    total, done = len(images.paths), state["done"]
    shape = (total, model.width)
    store = np.lib.format.open_memmap(partial / "embeddings.npy", "r+" if done else "w+", np.float32, shape)

    # What could not be read before the interruption may be readable by now.
    left = np.concatenate([np.array([int(row) for row in state["corrupt"]], dtype=np.int64), np.arange(done, total)])
    chunks = [left[start : start + BATCH_SIZE] for start in range(0, len(left), BATCH_SIZE)]
    model.eval()
    with progress(total=total, initial=total - len(left), desc="embedding", unit="img") as bar:
        for number, (batch, rows) in enumerate(images.batches(chunks)):
            with autocast(model.device, precision):
                store[rows] = model.embed(batch.to(model.device, non_blocking=True)).float().cpu().numpy()
            bar.update(len(chunks[number]))
            done = max(done, int(chunks[number][-1]) + 1)
            if number % SAVE_EVERY == SAVE_EVERY - 1:
                store.flush()
                with replacing(note) as path:
                    path.write_text(json.dumps({"done": done, "corrupt": list(images.corrupt)}))
    store.flush()

    keys = keys.reset_index(drop=True).where(~np.isin(np.arange(total), list(images.passing)), "")
    if not keys.any():
        shutil.rmtree(partial)
        return
    reasons = ["" if row in images.passing else images.corrupt.get(row, "") for row in range(total)]
    pd.DataFrame({"key": keys, "unreadable": reasons}, dtype="str").to_parquet(partial / "files.parquet", index=False)
    note.unlink(missing_ok=True)
    partial.rename(home / f"{len(list(home.glob('[0-9]*'))):05d}")


def _index(part: Path) -> pd.DataFrame:
    index = pd.read_parquet(part / "files.parquet")
    if "unreadable" in index:
        return index
    # Parts of before did not tell what the bytes say from what the machine does: all that had a reason is tried again.
    return pd.DataFrame({"key": index["key"].where(index["reason"] == "", ""), "unreadable": ""}, dtype="str")


def _digest(model: Recogniser, images: Images, precision: str) -> str:
    about = [weights_digest(model.backbone), precision, asdict(images.preprocessing)]
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()[:32]


def _key(file: str) -> str:
    try:
        stat = Path(file).stat()
        return f"{file}\0{stat.st_size}\0{stat.st_mtime_ns}"
    except OSError:
        return f"{file}\0missing"
