"""The demo catalogue: photographs of invented packaged goods, so that everything runs without any data.

This file decides how many products there are, how often each is photographed and what is filed wrongly, and
writes it all in the layout of AliProducts; `packages` draws the pictures.
"""

import json
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from math import inf
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import cv2
import numpy as np
import pandas as pd
from numpy.random import default_rng

from aliprod import InputError, csvfile, manifest
from aliprod.packages import DEPARTMENTS, FLAVOURS, WORDS, path, photograph
from aliprod.processors import available_cpus
from aliprod.progress import progress

TRUTH = [*manifest.COLUMNS, "true_class_id"]  # columns of truth.csv
EDITION = 1  # of the drawings: raise it when the same parameters come to render other pictures
SIBLING_SHARE = 0.8  # of the wrong labels: these stay in their category, the others fall anywhere


@dataclass(frozen=True)
class Plan:
    """The parameters of a catalogue, each with its lowest and highest value: they decide its every byte."""

    departments: Annotated[int, 1, len(DEPARTMENTS)]
    categories: Annotated[int, 1, 4]  # of a department
    brands: Annotated[int, 1, len(WORDS) // len(DEPARTMENTS) // 4]  # of a category
    products: Annotated[int, 1, len(FLAVOURS)]  # of a brand
    images: Annotated[int, 2, inf]  # train photographs of the most frequent class
    imbalance: Annotated[float, 1, inf]  # the most frequent class over the rarest, which keeps at least 2
    val_images: Annotated[int, 1, inf]  # of every class
    noise: Annotated[float, 0, 0.9]  # share of the train photographs filed under a wrong class
    size: Annotated[int, 48, 2048]  # the longest side of a photograph is 0.625 to 1.2 times this, in pixels
    seed: Annotated[int, 0, inf]

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(Plan, include_extras=True).items():
            value, kind, (low, high) = getattr(self, name), hint.__origin__, hint.__metadata__
            if not isinstance(value, (int, kind)) or not low <= value <= high:
                raise InputError(f"{name} is {value!r}, allowed: {kind.__name__} in [{low}, {high}]")
        if self.noise and self.num_classes == 1:
            raise InputError(f"noise is {self.noise}, allowed: 0 where there is no other class")

    @property
    def num_classes(self) -> int:
        """Products in all."""
        return self.departments * self.categories * self.brands * self.products


def _truth(plan: Plan) -> pd.DataFrame:
    """A row a photograph: where it is filed, and what it shows."""
    rng, labels = default_rng([plan.seed, 2]), np.arange(plan.num_classes)
    rank = rng.permutation(labels) / max(plan.num_classes - 1, 1)
    counts = np.maximum(2, np.rint(plan.images * plan.imbalance**-rank)).astype(int)
    filed = np.concatenate([np.repeat(labels, counts), np.repeat(labels, plan.val_images)])
    num_train, shown, category = counts.sum(), filed.copy(), labels // (plan.brands * plan.products)
    for row in rng.choice(num_train, round(plan.noise * num_train), replace=False):
        others = labels != filed[row]
        siblings = others & (category == category[filed[row]])
        near = siblings.any() and rng.random() < SIBLING_SHARE
        shown[row] = rng.choice(labels[siblings if near else others])
    split = np.where(np.arange(len(filed)) < num_train, "train", "val")
    truth = pd.DataFrame({"split": split, "class_id": [f"{label:05d}" for label in filed]})
    number = truth.groupby(["split", "class_id"]).cumcount() + 1
    names = ["-".join(path(plan, label)[2:]) for label in range(plan.num_classes)]
    truth["image_id"] = [f"{names[label]}_{n:03d}.jpg" for label, n in zip(filed, number, strict=True)]
    return truth.assign(true_class_id=[f"{label:05d}" for label in shown])


def _product_tree(plan: Plan) -> list[dict[str, Any]]:
    roots: list[dict[str, Any]] = []
    for label in range(plan.num_classes):
        *groups, flavour = path(plan, label)
        siblings = roots
        for group in groups:
            if not siblings or siblings[-1]["name"] != group:
                siblings.append({"name": group, "children": []})
            siblings = siblings[-1]["children"]
        siblings.append({"name": f"{groups[-1]} {flavour}", "class_id": f"{label:05d}"})
    return roots


def _fill(folder: Path, plan: Plan, workers: int) -> None:
    """Write every file of a catalogue but its colophon into an empty folder."""
    truth = _truth(plan)
    csvfile.write(truth, folder / "truth.csv")
    (folder / "product_tree.json").write_text(json.dumps(_product_tree(plan), indent=1))
    for split, rows in truth.groupby("split"):
        images = rows[["class_id", "image_id"]].to_dict("records")
        (folder / f"{split}.json").write_text(json.dumps({"images": images}, indent=1))
        for class_id in rows["class_id"].unique():
            (folder / str(split) / class_id).mkdir(parents=True)

    def take(row: Any) -> None:
        rng = default_rng([plan.seed, 3, row.Index])
        picture = photograph(plan, int(row.true_class_id), rng)
        _, jpeg = cv2.imencode(".jpg", picture, (cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(55, 96))))
        (folder / row.split / row.class_id / row.image_id).write_bytes(jpeg.tobytes())

    opencv_threads = cv2.getNumThreads()
    cv2.setNumThreads(1)  # the pictures are made side by side, so none of them is split as well
    try:
        with ThreadPoolExecutor(workers) as pool:
            for _ in progress(pool.map(take, truth.itertuples()), "catalogue", len(truth), unit="img"):
                pass
    finally:
        cv2.setNumThreads(opencv_threads)


def render(
    folder: str | Path,
    *,
    departments: int = 3,
    categories: int = 2,
    brands: int = 2,
    products: int = 3,
    images: int = 48,
    imbalance: float = 6.0,
    val_images: int = 6,
    noise: float = 0.05,
    size: int = 320,
    seed: int = 0,
    workers: int | None = None,
) -> pd.DataFrame:
    """Render a catalogue in the layout of AliProducts; return its truth.csv, a row a photograph.

    `Plan` says what the parameters mean. Photographs are made by `workers` threads (None: one a core), which
    changes no byte. A folder that holds this very catalogue is left as it is. Raises InputError for a
    parameter outside its range and for a folder that holds anything else.
    """
    plan = Plan(departments, categories, brands, products, images, imbalance, val_images, noise, size, seed)
    if workers is not None and workers < 1:
        raise InputError(f"workers is {workers}, allowed: at least 1, or None for all cores")
    folder, colophon = Path(folder), {"edition": EDITION, **asdict(plan)}
    mark = folder / "catalogue.json"
    if folder.exists() and any(folder.iterdir()):
        if not mark.exists() or json.loads(mark.read_text()) != colophon:
            raise InputError(f"folder {folder} is not empty and holds no catalogue of these parameters")
        return csvfile.read(folder / "truth.csv", TRUTH)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        draft = Path(scratch) / folder.name
        draft.mkdir()
        _fill(draft, plan, workers or available_cpus())
        (draft / mark.name).write_text(json.dumps(colophon, indent=1))
        draft.replace(folder)
    return csvfile.read(folder / "truth.csv", TRUTH)
