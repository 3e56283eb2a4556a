"""train.json of 2.5 million records to a table, and the choice that balances its 50,030 classes."""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd

from aliprod import manifest
from benchmarks.stopwatch import race

NUM_CLASSES = 50_030


def measure(limit: int = 2_500_000) -> Iterator[str]:
    """Yields a table for reading and one for balancing `limit` records."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "train.json"
        sizes = _generate(path, limit)  # (C,)
        reads = {
            "ours": manifest.read_json,
            "peers': json, pd.DataFrame, the same checks": peers_read_checked,
            "peers': json, pd.DataFrame, unchecked": peers_read,
        }
        reading = race({way: lambda read=read: read(path) for way, read in reads.items()})
        peaks = {way: f"equal; peak memory {_peak(read, path):,} MiB" for way, read in reads.items()}
    table = reading.results["ours"]
    for result in reading.results.values():
        assert result[["class_id", "image_id"]].equals(table[["class_id", "image_id"]])
    yield reading.table(f"manifest: {limit:,} JSON records to a table", peaks)

    numbers = table.assign(class_id=table["class_id"].astype(int))  # what the seed's CSV made of the ids
    timed = min(200, len(sizes))  # of the seed's loop, whose time grows linearly with the classes
    seed = f"seed's: a loop over classes, {timed} timed, scaled to {len(sizes):,}"
    balances = {
        "ours": lambda: manifest.balance(table, seed=0),
        "peers': pandas groupby": lambda: peers_balance(table),
        seed: lambda: seed_balance(numbers, timed),
    }
    balancing = race(balances)
    balancing.seconds[seed] *= len(sizes) / timed
    kept = [np.bincount(result["class_id"].astype(int)) for result in balancing.results.values()]
    assert all((counts == _quota(sizes)[: len(counts)]).all() for counts in kept)
    yield balancing.table(f"manifest: {limit:,} rows balanced", dict.fromkeys(balances, "as many of each class"))


def peers_read(path: str | Path) -> pd.DataFrame:
    """The standard library's parser and one constructor."""
    return pd.DataFrame(json.loads(Path(path).read_bytes())["images"])


def peers_read_checked(path: str | Path) -> pd.DataFrame:
    """The same, refusing as ours does a photograph listed twice and a name that leaves its folder."""
    table = peers_read(path)
    unsafe = [table[column].str.contains(r"[/\\\x00]|^\.{0,2}$").any() for column in table]
    assert not any(unsafe) and not table.duplicated().any()
    return table


def peers_balance(table: pd.DataFrame) -> pd.DataFrame:
    """Shuffled rows, counted within their groups."""
    shuffled = table.sample(frac=1, random_state=0)
    classes = shuffled.groupby("class_id")["class_id"]
    return shuffled[classes.cumcount() < _quota(classes.transform("size"))].sort_index()


def seed_balance(table: pd.DataFrame, num_classes: int) -> pd.DataFrame:
    """Every class compared with every row."""
    classes = (table[table["class_id"] == label] for label in range(num_classes))
    return pd.concat([rows.sample(int(_quota(len(rows)))) for rows in classes])


def _quota(sizes: np.ndarray) -> np.ndarray:
    return np.select([sizes >= 400, sizes >= 200, sizes >= 100], [400, 200, 100], sizes)


def _generate(path: Path, num_records: int) -> np.ndarray:
    """Writes a split whose classes fall off as the root of their rank, in random order; returns their sizes."""
    rng = np.random.default_rng(0)
    shares = np.arange(1, min(NUM_CLASSES, num_records // 50) + 1) ** -0.5
    sizes = 1 + rng.multinomial(num_records - len(shares), shares / shares.sum())
    labels = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    records = [{"class_id": f"{label:05d}", "image_id": f"{row:07d}.jpg"} for row, label in enumerate(labels)]
    path.write_text(json.dumps({"images": records}))
    return sizes


def _peak(read: Callable, path: Path) -> int:
    """Peak memory, MiB, of a fresh process that reads the file this way; some 100 are the interpreter's own."""
    # Not resource.ru_maxrss, which a child inherits from the process that started it.
    call = f"{read.__module__}.{read.__name__}(sys.argv[1])"
    code = f"import sys, {read.__module__}; {call}; print(open('/proc/self/status').read())"
    status = subprocess.run([sys.executable, "-c", code, path], check=True, capture_output=True, text=True).stdout
    return int(re.search(r"VmHWM:\s*(\d+)", status)[1]) // 1024
