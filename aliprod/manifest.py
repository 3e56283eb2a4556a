"""Manifests: which photograph is filed under which class, as tables with split, class_id, image_id.

JSON to tables, balance, select, class index. Class ids stay strings; a row's key is all three columns,
since image ids repeat across splits. Everything is vectorised: 2.5 million rows are the design size.
"""

import hashlib
import os
from pathlib import Path

import msgspec
import numpy as np
import pandas as pd

from aliprod import InputError, csvfile, textfile

COLUMNS = ["split", "class_id", "image_id"]


class _Image(msgspec.Struct, gc=False):
    image_id: str
    class_id: str = ""


class _Split(msgspec.Struct):
    images: list[_Image]


def read_json(path: str | Path) -> pd.DataFrame:
    """Reads `<split>.json` of a data folder: {"images": [{"class_id": "00012", "image_id": "x.jpg"}, ...]}.

    Returns a table with columns split, class_id, image_id, in the file's order. InputError names the file
    and the record: not JSON, an id that is no string, a name that leaves its folder, a key or a photograph that
    stands there twice.
    """
    path = Path(path)
    data = textfile.utf8(path)
    try:
        images = msgspec.json.decode(data, type=_Split).images
        class_ids, image_ids = [image.class_id for image in images], [image.image_id for image in images]
        _refuse_twice(path, data, {"images": 1, "class_id": sum(map(bool, class_ids)), "image_id": len(images)})
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        textfile.refuse_other_encodings(path, data)
        raise InputError(f"{path}: {error}") from None

    table = pd.DataFrame({"class_id": pd.array(class_ids, dtype="str"), "image_id": pd.array(image_ids, dtype="str")})
    table.insert(0, "split", pd.array([path.stem] * len(table), dtype="str"))
    _refuse(path, table, table.duplicated(), "this photograph is listed twice")
    return _checked(path, table)


def read_csv(path: str | Path) -> pd.DataFrame:
    """Reads a table written by csvfile.write. InputError names the file and what is wrong with it."""
    return _checked(Path(path), csvfile.read(path, COLUMNS, by_hand=True))


def read_files(path: str | Path, needed: tuple[str, ...] = (), perhaps: tuple[str, ...] = ()) -> pd.DataFrame:
    """Reads a CSV of photographs wherever they are: file, relative to where the CSV lies, and the columns `needed`, in
    which no row may be blank; those of `perhaps` that are not there are "". InputError as of `read_csv`."""
    path = Path(path)
    table = csvfile.read(path, ["file", *needed], perhaps, by_hand=True)
    if table.empty:
        raise InputError(f"{path}: it lists no photographs")
    for column in ("file", *needed):
        _refuse(path, table, table[column] == "", f"{column} is missing")
    return table.assign(file=[str(path.parent / file) for file in table["file"]])


def digest(table: pd.DataFrame) -> str:
    """First 16 hex digits of the SHA-256 of the table as csvfile.write writes it (compare `sha256sum x.csv`)."""
    return hashlib.sha256(csvfile.to_bytes(table)).hexdigest()[:16]


def read(data: str | Path, name: str, seed: int = 0) -> pd.DataFrame:
    """The manifest that a round asks for: a split of the data folder, "balanced", or the path of a CSV."""
    data = Path(data)
    if name.endswith(".csv"):
        return read_csv(name)
    path = data / f"{'train' if name == 'balanced' else name}.json"
    if not path.is_file():
        raise InputError(
            f"{path} not found: a data folder holds train.json, val.json and <split>/<class_id>/<image_id>"
        )
    table = read_json(path)
    return balance(table, seed) if name == "balanced" else table


def balance(table: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Caps the frequent classes as the seed did, by a random choice; row order is kept.

    Classes of 400 photographs or more keep 400, of 200 to 399 keep 200, of 100 to 199 keep 100, others all.
    """
    codes, _ = pd.factorize(table["class_id"])
    counts = np.bincount(codes)
    quotas = np.select([counts >= 400, counts >= 200, counts >= 100], [400, 200, 100], counts)
    order = np.lexsort((np.random.default_rng(seed).random(len(table)), codes))
    starts = np.cumsum(counts) - counts
    rank = np.arange(len(table)) - starts[codes[order]]  # place within its class, in random order
    return table.iloc[np.sort(order[rank < quotas[codes[order]]])].reset_index(drop=True)


def grow(table: pd.DataFrame, least: int, seed: int) -> pd.DataFrame:
    """Repeats rows of the classes that have fewer than `least` until they have as many, each as often as the others."""
    shuffled = table.iloc[np.random.default_rng(seed).permutation(len(table))]
    counts = shuffled.groupby("class_id")["class_id"].transform("size").to_numpy()
    place = shuffled.groupby("class_id").cumcount().to_numpy()
    # Row number `place` of its class stands in for the places place, place + count, place + 2 * count ... < least.
    times = np.where(counts < least, -(-(least - place) // counts), 1)
    return shuffled.loc[shuffled.index.repeat(times)].sort_index(kind="stable").reset_index(drop=True)


def select(table: pd.DataFrame, least: float, most: float) -> pd.DataFrame:
    """Rows of the classes with `least` to `most` photographs in this table, both inclusive."""
    counts = table.groupby("class_id")["class_id"].transform("size")
    chosen = table[counts.between(least, most)].reset_index(drop=True)
    if chosen.empty:
        raise InputError(
            f"samples_per_class [{least:g}, {most:g}]: no class is in this range; "
            f"the classes here have {counts.min()} to {counts.max()} photographs"
        )
    return chosen


def select_quantile(table: pd.DataFrame, low: float, high: float) -> pd.DataFrame:
    """Rows of the classes whose photographs are as many as those of the `low` to `high` quantile of classes."""
    return select(table, *np.quantile(table["class_id"].value_counts(), [low, high]))


def select_listed(table: pd.DataFrame, path: str | Path, min_confidence: float) -> pd.DataFrame:
    """Rows of the classes that a select list (a CSV with class_id, confidence) gives at least this confidence."""
    listed = csvfile.read(path, ["class_id", "confidence"], by_hand=True)
    confidence = pd.to_numeric(listed["confidence"], errors="coerce")
    _refuse(Path(path), listed, confidence.isna(), "confidence must be a number")
    sure = listed.loc[confidence >= min_confidence, "class_id"]
    chosen = table[table["class_id"].isin(sure)].reset_index(drop=True)
    if chosen.empty:
        raise InputError(f"{path}: no class of this data has a confidence of {min_confidence:g} or more")
    return chosen


def hold_out(table: pd.DataFrame, classes: pd.DataFrame, share: float, seed: int) -> pd.DataFrame:
    """Rows without those of a share of `classes` (of class_index, as of the whole data), drawn by seed."""
    drawn = np.random.default_rng(seed).permutation(len(classes))[: round(share * len(classes))]
    return table[~table["class_id"].isin(classes["class_id"].iloc[drawn])].reset_index(drop=True)


def class_index(table: pd.DataFrame) -> pd.DataFrame:
    """The classes of a table in the order of their ids: class_id, num_train; the row number is the label."""
    return table.groupby("class_id").size().rename("num_train").reset_index()


def labels(table: pd.DataFrame, classes: pd.DataFrame) -> np.ndarray:
    """Label of every row (N,) int64: its class's row in `classes`, -1 where that class is not among them."""
    return pd.Index(classes["class_id"]).get_indexer(table["class_id"]).astype(np.int64)


def paths(table: pd.DataFrame, data: str | Path) -> list[str]:
    """Path of every row's photograph: <data>/<split>/<class_id>/<image_id>."""
    folders = f"{data}{os.sep}" + table["split"] + os.sep + table["class_id"] + os.sep
    return (folders + table["image_id"]).tolist()


def _refuse_twice(path: Path, data: bytes, expected: dict[str, int]) -> None:
    """InputError if a key stands twice in one object. Of such the decoder takes the last; reading again in a way that
    shows it costs several times as much, so that is only done where a key stands there more often than `expected`."""
    escaped = rb"\u00" in data  # as letters of a key could be written
    if escaped or any(data.count(f'"{key}"'.encode()) > count for key, count in expected.items()):
        textfile.refuse_twice(path, data, tuple(expected))


def _checked(path: Path, table: pd.DataFrame) -> pd.DataFrame:
    if table.empty:
        raise InputError(f"{path}: it lists no photographs")
    for column in COLUMNS:
        wrong = table[column].str.contains(r"[/\\\x00]", regex=True) | table[column].isin([".", ".."])
        _refuse(path, table, wrong, f"{column} must be a plain name, without / or \\")
    _refuse(path, table, table["image_id"] == "", "image_id is missing")
    _refuse(path, table, table["split"] == "", "split is missing")
    _refuse(path, table, (table["class_id"] == "") & (table["split"] != "test"), "class_id is missing")
    return table


def _refuse(path: Path, table: pd.DataFrame, wrong: pd.Series, why: str) -> None:
    if wrong.any():
        number = int(np.argmax(wrong.to_numpy()))
        row = table.iloc[number].drop("split", errors="ignore")
        shown = ", ".join(f"{column} {value!r}" for column, value in row.items())
        raise InputError(f"{path}: record {number} ({shown}): {why}")
