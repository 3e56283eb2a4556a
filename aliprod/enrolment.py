"""Products photographed after training: the gallery that a round leaves, photographs added to it and taken from it.

The whitening is that of linear discriminant analysis with a shrunken covariance (Friedman, JASA 1989), as of Hayes and
Kanan's deep streaming LDA (CVPR Workshops 2020), but scored by cosine.
"""

import dataclasses
import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch.nn.functional import normalize

from aliprod import InputError, calibration, features, manifest, prediction
from aliprod.features import BATCH_SIZE, Features
from aliprod.gallery import ENROLLED, Gallery
from aliprod.images import Images, opened, reason
from aliprod.model import Recogniser, Saved
from aliprod.streams import plain

SHRINKAGE = 0.3  # share of the within-class covariance that is made the same in all directions
LEAST_SPREAD = 1e-4  # of unit directions within classes, all dimensions together; less is rounding, or one photograph
MAX_NOISE = 10.0  # of networks that hardly tell the classes apart
CHUNK = 16384  # embeddings at a time
TEMPERATURES = (1e-3, 1.0)  # bounds of what similarities, in [-1, 1], are divided by
COLUMNS = ["file", "class_id", "name", "path"]  # of a table of photographs to enrol


def gallery(
    model: Recogniser,
    classes: pd.DataFrame,
    table: pd.DataFrame,
    val: pd.DataFrame,
    data: str | Path,
    cache: str | Path,
    precision: str,
) -> Gallery:
    """The gallery of the `classes` that `model` was trained on: their means over the photographs of `table`, whitened
    by their spread, and the scale fitted on those of `val`. Rows of other classes are left out; embeddings are kept in
    `cache`."""

    def embedded(rows: pd.DataFrame) -> Features:
        labels = manifest.labels(rows, classes)
        paths = manifest.paths(rows[labels >= 0], data)
        return features.compute(model, Images(paths, labels[labels >= 0], model.preprocessing), cache, precision)

    return of_embeddings(embedded(table), embedded(val), classes, model.width, model.device)


def of_embeddings(
    stored: Features,
    val: Features,
    classes: pd.DataFrame,
    width: int,
    device: torch.device,
    shrinkage: float = SHRINKAGE,
) -> Gallery:
    """As `gallery`, from embeddings (D = width) whose labels are rows of `classes`; memory for one chunk of them."""
    assert stored.labels is not None and val.labels is not None
    sums = torch.zeros(len(classes), width, dtype=torch.float64, device=device)
    moments = torch.zeros(width, width, dtype=torch.float64, device=device)
    for embeddings, labels in _chunks(stored, CHUNK, device):
        directions = normalize(embeddings.double())  # of few repeats what is left of moments is small
        sums.index_add_(0, labels, directions)
        moments += directions.T @ directions
    counts = torch.from_numpy(np.bincount(stored.labels[stored.rows], minlength=len(classes)))
    seen = counts.clamp_min(1).to(device)[:, None]
    means, known = sums / seen, counts.to(device) > 0
    freedom = max(1, int(counts.sum()) - int(known.sum()))
    within = (moments - means.T @ sums) / freedom  # (D, D), of directions within classes
    mean_variance = within.diagonal().mean().clamp_min(LEAST_SPREAD / width)
    even = torch.eye(width, dtype=torch.float64, device=device) * mean_variance
    factor = torch.linalg.cholesky((1 - shrinkage) * within + shrinkage * even)
    whitening = torch.linalg.inv(factor).T  # places are then (direction - center) @ whitening
    variance = (whitening.T @ within @ whitening).trace().item()
    center = means[known].mean(dim=0)
    places = (means - center) @ whitening
    own = variance / seen[:, 0]  # what their being of so few adds to the means' lengths
    between = (places.square().sum(dim=1) - own)[known].mean().item()
    made = Gallery(
        center=center.float().cpu(),
        whitening=whitening.float().contiguous().cpu(),
        means=torch.where(known[:, None], places, 0).half().cpu(),
        counts=counts,
        places=torch.zeros(0, width, dtype=torch.float16),
        noise=_single(min(MAX_NOISE, variance / max(between, 1e-12))),
        scale=1.0,
        trained=classes,
        enrolled=pd.DataFrame(columns=ENROLLED, dtype="str"),
    )

    whole = dataclasses.replace(made, exact=len(classes))  # FAISS would leave labels out

    def similarities() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return ((whole.similarities(embeddings), labels) for embeddings, labels in _chunks(val, BATCH_SIZE, device))

    return dataclasses.replace(made, scale=_single(1 / calibration.temperature(similarities, TEMPERATURES)))


def enroll(saved: Saved, photographs: pd.DataFrame, run: str = "") -> tuple[Gallery, pd.DataFrame]:
    """The model's gallery with more photographs, of new classes or of known ones, and what became of each.

    photographs: as of `listed`; `run` is kept with each, to find the files by. The table returned is they, with sha256
    and outcome: enrolled, known (the same bytes are there already), or why it cannot be read. InputError if none can,
    if the same photograph would stand for two classes, or a class that the model or its tree knows be called otherwise.
    """
    before = _gallery(saved)
    table = photographs[COLUMNS].fillna("").reset_index(drop=True)
    if (table["class_id"] == "").any():
        raise InputError(f"{table['file'][int((table['class_id'] == '').argmax())]}: its class_id is missing")
    table = _named(table, saved)
    table["sha256"], table["outcome"] = zip(*map(_sha256, table["file"]), strict=True)
    readable = table[table["sha256"] != ""]
    both = pd.concat([before.enrolled, readable], ignore_index=True)
    doubted = both[both.groupby("sha256")["class_id"].transform("nunique") > 1]
    if len(doubted):
        one = doubted[doubted["sha256"] == doubted["sha256"].iloc[0]].drop_duplicates("class_id", keep="last")
        files, ids = one["file"].iloc[-1], " and ".join(one["class_id"])
        raise InputError(f"{files}: the same photograph cannot be enrolled as {ids}; withdraw the one that is wrong")
    known = table["sha256"].isin(before.enrolled["sha256"]) | table["sha256"].duplicated()
    table.loc[known & (table["sha256"] != ""), "outcome"] = "known"
    fresh = table[table["outcome"] == ""]
    images = Images(fresh["file"].tolist(), None, saved.model.preprocessing)
    places, rows = _places(saved, before, images)
    reasons = pd.Series(images.corrupt, dtype="str")
    table.loc[fresh.index, "outcome"] = "enrolled"
    table.loc[fresh.index[reasons.index.to_numpy(dtype=np.int64)], "outcome"] = reasons.to_numpy()
    if not table["outcome"].isin(["enrolled", "known"]).any():
        raise InputError(f"none of the {len(table)} photographs can be read; {table['file'][0]}: {table['outcome'][0]}")
    added = fresh.iloc[rows].assign(run=run)[ENROLLED]
    enrolled = pd.concat([before.enrolled, added], ignore_index=True)
    names = table[table["outcome"].isin(["enrolled", "known"])].drop_duplicates("class_id").set_index("class_id")
    for column in ("name", "path"):  # what is said last holds for all of a class's photographs
        said = enrolled["class_id"].map(names[column]).fillna("")
        enrolled[column] = said.where(said != "", enrolled[column])
    return before.replace(enrolled, torch.cat([before.places, places])), table


def withdraw(saved: Saved, class_ids: list[str], files: list[str]) -> tuple[Gallery, pd.DataFrame]:
    """The model's gallery without the enrolled photographs of these classes and without these photographs (found by
    their bytes), and the rows that went. A class goes with its last one. InputError names what is not enrolled."""
    before = _gallery(saved)
    if unknown := sorted(set(class_ids) - set(before.enrolled["class_id"])):
        raise InputError(f"class {unknown[0]!r}: no photograph of it is enrolled")
    shas, enrolled = {file: _sha256(file) for file in files}, set(before.enrolled["sha256"])
    for file, (sha, why) in shas.items():
        if sha not in enrolled:
            raise InputError(f"{file}: {why or 'not enrolled'}")
    leaving = before.enrolled["class_id"].isin(class_ids)
    leaving |= before.enrolled["sha256"].isin([sha for sha, _ in shas.values()])
    staying = torch.from_numpy(~leaving.to_numpy())
    return before.replace(before.enrolled[~leaving], before.places[staying]), before.enrolled[leaving]


def listed(images: str, class_id: str = "", name: str = "", path: str = "") -> pd.DataFrame:
    """The photographs meant by `images`: file, class_id, name, path.

    A folder with a subfolder a class, named by its id; a .csv with the columns file (relative to where it lies),
    class_id and perhaps name and path; or, with `class_id`, anything that prediction.image_files takes, all of that
    class.
    """
    if class_id:
        files = _named_in_utf8(prediction.image_files(images))
        return pd.DataFrame({"file": files, "class_id": class_id, "name": name, "path": path})
    if name or path:
        raise InputError("name, path: they are of one class; give its class_id too")
    if images.endswith(".csv") and prediction.kind(images) == "file":
        return manifest.read_files(images, ("class_id",), ("name", "path"))
    if prediction.kind(images) != "folder":
        raise InputError(f"images {images!r}: give a folder with a subfolder a class, a .csv, or class_id too")
    files = _named_in_utf8(prediction.image_files(images))
    folders = [Path(file).relative_to(images).parts for file in files]
    if loose := next((file for file, parts in zip(files, folders, strict=True) if len(parts) < 2), None):
        raise InputError(f"{loose}: in no subfolder of {images}, whose names are the classes; or give class_id")
    return pd.DataFrame({"file": files, "class_id": [parts[0] for parts in folders], "name": "", "path": ""})


def _named_in_utf8(files: list[str]) -> list[str]:
    """The same; InputError at a file whose name, or a folder's on the way, no table can hold."""
    if wrong := next((file for file in files if plain(file) != file), None):
        raise InputError(f"'{plain(wrong)}': the name is not UTF-8; give it another")
    return files


def _gallery(saved: Saved) -> Gallery:
    if not saved.gallery:
        raise InputError("the model was saved without a gallery; train its round again")
    return saved.gallery


def _named(table: pd.DataFrame, saved: Saved) -> pd.DataFrame:
    """The table with one name and path a class: those that the model or its tree has, else the last given; a class that
    has but a path is named by its end."""
    ids = table["class_id"].drop_duplicates()
    sources = [saved.classes] + ([saved.tree.describe(ids).assign(class_id=ids.to_numpy())] if saved.tree else [])
    known = pd.concat(sources).drop_duplicates("class_id").set_index("class_id").reindex(ids)
    for column in ("path", "name"):
        ours = known[column].fillna("")
        given = table[table[column] != ""].drop_duplicates("class_id", keep="last").set_index("class_id")[column]
        given = given.reindex(ids, fill_value="")
        fixed = (ours != "") | ours.index.isin(saved.classes["class_id"])
        if (wrong := fixed & (given != "") & (given != ours)).any():
            one = wrong.idxmax()
            raise InputError(f"class {one!r} is known, its {column} is {ours[one]!r} and not {given[one]!r}")
        table[column] = given.where(~fixed, ours)[table["class_id"]].to_numpy()
    table["name"] = table["name"].where(table["name"] != "", table["path"].str.split(" > ").str[-1])
    return table


@torch.inference_mode()
def _places(saved: Saved, gallery: Gallery, images: Images) -> tuple[torch.Tensor, np.ndarray]:
    """Places (P, D) float16 of the images that can be read, and their rows (P,)."""
    places, rows = [torch.zeros(0, saved.model.width, dtype=torch.float16)], [np.empty(0, dtype=np.int64)]
    chunks = [images.rows[at : at + BATCH_SIZE] for at in range(0, len(images.rows), BATCH_SIZE)]
    for batch, batch_rows in images.batches(chunks):
        if len(batch):
            embeddings = saved.model.embed(batch.to(saved.model.device))
            places.append(gallery.place(embeddings).half().cpu())
            rows.append(batch_rows)
    return torch.cat(places), np.concatenate(rows)


def _sha256(file: str) -> tuple[str, str]:
    """The digest of a file's bytes and "", or "" and why it cannot be read."""
    try:
        with opened(file) as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest(), ""
    except (OSError, ValueError) as error:
        return "", reason(error)


@torch.inference_mode()
def _chunks(source: Features, size: int, device: torch.device) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    assert source.labels is not None
    for at in range(0, len(source.rows), size):
        rows = source.rows[at : at + size]
        embeddings = torch.from_numpy(source.store.take(source.codes[rows])).to(device)
        yield embeddings, torch.from_numpy(source.labels[rows]).to(device)


def _single(value: float) -> float:
    """What is left of a number once it has been saved."""
    return float(np.float32(value))
