"""What the product tree is worth: heads on the same frozen embeddings, cross-validated, flat against those that use it.

Photographs of one class that look alike are held out together, or every test photograph would have its twin in train:
grocery's were taken in series.
"""

import copy
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy import stats
from scipy.sparse.csgraph import connected_components

from aliprod import assembly, features, manifest, metrics, recipe, training
from aliprod.features import Features, Store
from aliprod.images import Images
from aliprod.model import Recogniser
from aliprod.prediction import predict
from aliprod.recipe import Round
from aliprod.taxonomy import Levels
from benchmarks.stopwatch import race
from benchmarks.tables import titled
from entrypoints.command import recipe_path

FOLDS = 5
ALIKE = 0.84  # cosine of embeddings from which on two photographs of a class are held out together
IMBALANCE = 20  # of the long-tailed version: photographs of the most frequent class over those of the rarest
MOST = 40  # photographs of its most frequent class
COSTED = ("flat", "tree smoothing", "paths, tree smoothing")
WAYS: dict[str, dict[str, Any]] = {
    "flat": {},
    "the seed's branches": {"hierarchy": "branches", "level_weights": {"1": 0.6, "2": 0.6}},
    "losses of the levels": {"level_weights": {"1": 0.5, "2": 0.5}},
    "paths": {"hierarchy": "paths"},
    "tree smoothing": {"tree_smoothing": 0.4},
    "paths, tree smoothing": {"hierarchy": "paths", "tree_smoothing": 0.4},
}


def measure(data: Path) -> Iterator[str]:
    """Yields a table for the data as it is and for it long-tailed, each also with adjusted logits; and the cost."""
    row = recipe.override(
        recipe.read(recipe_path("grocery")).row("frozen"), "hierarchy=none tree_smoothing=0 logit_adjustment=0"
    )
    model, source, levels = material(row, data)
    for imbalance in (1, IMBALANCE):
        for adjustment in (0.0, 0.5):
            ways = {
                name: row.model_copy(update={"logit_adjustment": adjustment, **fields}) for name, fields in WAYS.items()
            }
            title = "as it is" if imbalance == 1 else f"long-tailed, imbalance {imbalance}"
            title += f", logit_adjustment {adjustment}" if adjustment else ""
            yield compare(title, ways, model, source, levels, imbalance)
    yield from cost()


def material(row: Round, data: Path) -> tuple[Recogniser, Features, Levels]:
    """The backbone, the embeddings of train and val together, and the tree's levels."""
    tables = assembly.tables(row, data)
    assert tables.levels, "the data has a product tree"
    table = pd.concat([manifest.read(data, "train"), tables.val], ignore_index=True)
    model = assembly.model(row, len(tables.classes), row.init, tables.levels)
    images = Images(manifest.paths(table, data), manifest.labels(table, tables.classes), model.preprocessing)
    return model, features.compute(model, images, Path("work/features"), row.precision), tables.levels


def folds(source: Features) -> np.ndarray:
    """The part (N,) of each photograph: in each class groups of like ones are dealt out, the largest first."""
    labels = source.labels
    vectors = source.store.take(source.codes)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    alike = (vectors @ vectors.T > ALIKE) & (labels[:, None] == labels)
    table = pd.DataFrame({"label": labels, "group": connected_components(alike)[1]})
    parts = np.empty(len(table), dtype=np.int64)
    for _, rows in table.groupby("label"):
        filled = np.random.default_rng(int(rows.index[0])).random(FOLDS)  # ties fall by chance
        for group, size in rows["group"].value_counts().items():
            parts[rows.index[rows["group"] == group]] = filled.argmin()
            filled[filled.argmin()] += size
    return parts


def long_tailed(labels: np.ndarray, rows: np.ndarray, imbalance: int, seed: int) -> np.ndarray:
    """Rows so that classes, in random order, keep from MOST photographs down to MOST / imbalance, at least 2."""
    rng = np.random.default_rng(seed)
    num_classes = labels.max() + 1
    keep = np.maximum(2, np.rint(MOST * imbalance ** -(rng.permutation(num_classes) / (num_classes - 1))))
    shuffled = pd.Series(rng.permutation(rows))
    return shuffled[(shuffled.groupby(labels[shuffled]).cumcount() < keep[labels[shuffled]])].to_numpy()


def fit(model: Recogniser, row: Round, source: Features, rows: np.ndarray, test: np.ndarray, levels: Levels) -> dict:
    """Scores on the rows `test` of a fresh head trained on `rows`."""
    torch.manual_seed(row.seed)
    weighted = [level for level in map(int, row.level_weights or {}) if level < len(levels.sizes)]
    hierarchy = {"kind": row.hierarchy, "levels": weighted}
    fresh = Recogniser(model.backbone_name, model.num_classes, hierarchy=hierarchy, levels=levels).to(model.device)
    train, held = copy.copy(source), copy.copy(source)
    train.rows, held.rows = rows, test
    with tempfile.TemporaryDirectory() as folder:
        for _ in training.train(fresh, row, train, None, folder, levels=levels):
            continue
    answers = predict(fresh, held, row.precision, levels=levels)
    counts = np.bincount(source.labels[rows], minlength=model.num_classes)
    tail = np.argsort(counts, kind="stable")[: len(counts) // 3]
    accuracy = metrics.class_accuracy(answers["label"].to_numpy(), answers["pred"].to_numpy(), len(counts))
    return metrics.summary(answers) | metrics.by_level(answers, levels) | {"tail": np.nanmean(accuracy[tail])}


def compare(
    title: str, ways: dict[str, Round], model: Recogniser, source: Features, levels: Levels, imbalance: int
) -> str:
    """Markdown: a row a way with its means over the folds; against flat with the 95 % interval of a paired t."""
    parts = folds(source)
    runs = []
    for fold in range(FOLDS):
        rows, test = np.flatnonzero(parts != fold), np.flatnonzero(parts == fold)
        if imbalance > 1:
            rows = long_tailed(source.labels, rows, imbalance, fold)
        for way, row in ways.items():
            seeded = row.model_copy(update={"seed": fold})
            runs.append({"way": way, "fold": fold} | fit(model, seeded, source, rows, test, levels))
    table = pd.DataFrame(runs)
    wide = table.pivot(index="fold", columns="way", values="map")
    half = stats.t.ppf(0.975, FOLDS - 1) / FOLDS**0.5
    coarse = [f"level_{level}_accuracy" for level in range(1, len(levels.sizes))]
    columns = ["map", "tail", *coarse, "consistency", "severity", "distance", "safe_severity", "safe_distance"]
    names = {name: name.removesuffix("_accuracy").replace("_", " ") for name in coarse}
    names |= {"map": "MAP", "tail": "tail MAP"}
    rows = table.groupby("way", sort=False)[columns].mean().rename(columns=names)
    difference = wide.sub(wide["flat"], axis=0)[rows.index]
    against = [f"{mean:+.4f} ± {half * spread:.4f}" for mean, spread in difference.agg(["mean", "std"]).T.to_numpy()]
    rows.insert(1, "against flat", against)
    return titled(f"**hierarchy: {title}** (means of {FOLDS} folds)", rows)


def cost(num_classes: int = 50_030, batch: int = 64) -> Iterator[str]:
    """Yields a table for a step of the head alone, as in frozen rounds, and one for a step that trains everything, over
    as many classes as the competition has, in four levels."""
    sizes = [11, 100, 1000, num_classes]
    ancestors = np.stack([np.arange(num_classes) * size // num_classes for size in sizes])
    levels = Levels(ancestors, [np.arange(size).astype(str) for size in sizes])
    images = torch.randint(0, 256, (batch, 3, 224, 224), dtype=torch.uint8)

    def stepping(fields: dict[str, Any], everything: bool) -> Callable[[], float]:
        row = Round(name="cost", precision="bf16", freeze="none" if everything else "all", **fields)
        network = Recogniser("efficientnet_lite0", num_classes, hierarchy={"kind": row.hierarchy}, levels=levels)
        inputs = images if everything else torch.randn(8 * batch, network.width)
        labels = np.random.default_rng(0).integers(0, num_classes, len(inputs))
        rows = Images([""] * len(inputs), labels, network.preprocessing)
        source = rows if everything else Features(rows, Store(Path("nowhere")), np.arange(len(inputs)))
        learner = training._Learner(network, row, source, levels)
        step = partial(learner.step, inputs, torch.from_numpy(labels), row.lr)
        step()  # the first one allocates
        return lambda: step()[1].item()

    for title, everything in {
        f"the head alone, {8 * batch} embeddings": False,
        f"everything, {batch} images": True,
    }.items():
        steps = race({name: stepping(WAYS[name], everything) for name in COSTED}, rounds=5)
        notes = {name: f"loss {loss:.2f}" for name, loss in steps.results.items()}
        yield steps.table(f"hierarchy: a step of {title}, {num_classes:,} classes", notes)
