"""Cross-fitting: every photograph judged by a head that never saw its label.

A model that has memorised a wrong label confirms it, and cleaning by that model finds nothing. Here the photographs
are split into parts, and each part is answered by a fresh head, trained on the embeddings of the others. The backbone
is the model's own: one that was fine-tuned on the wrong labels has them in its embeddings, and confirms them still.
"""

import copy
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn

from aliprod import InputError, features, heads, manifest, metrics, training
from aliprod.features import Features
from aliprod.images import Images
from aliprod.model import Recogniser, Saved
from aliprod.prediction import predict
from aliprod.progress import progress
from aliprod.recipe import Round
from aliprod.taxonomy import Levels

# What every head is trained by, whatever trained the model; its kind, loss, margins and seed are the model's own.
SCHEDULE = {
    "init": "random", "freeze": "all", "augment": "none", "images_per_class": 1, "triplet_weight": 0.0,
    "label_smoothing": 0.2, "optimizer": "adamw", "weight_decay": 0.9, "ema_decay": 0.0, "compile": False,
    "epochs": 20, "batch_size": 128, "lr": 1e-2, "schedule": "cosine", "warmup_epochs": 0.0,
}  # fmt: skip


FOLDS = 5  # that a judge is measured by, where cleaning by it is not cross-fitted itself


def answers(
    saved: Saved,
    table: pd.DataFrame,
    classes: pd.DataFrame,
    data: str | Path,
    cache: str | Path,
    precision: str,
    folds: int,
    seed: int,
) -> pd.DataFrame:
    """What `prediction.predict_table` gives, by heads of the model's kind on its backbone, none of which was trained
    on the photograph it answers for. Labels and answers are rows of `classes`, whatever classes the model has itself.
    InputError if too few photographs can be read."""
    images = Images(manifest.paths(table, data), manifest.labels(table, classes), saved.model.preprocessing)
    source = features.compute(saved.model, images, cache, precision)
    dealt = parts(table, folds, seed)
    if len(set(dealt[source.rows])) < 2:
        reason = next(iter(source.corrupt.values()), "")
        raise InputError(
            f"only {len(source.rows)} of {len(table)} photographs can be read, too few to judge by: {reason}"
        )
    row = head_round(saved, precision)
    levels = saved.tree.levels(classes["class_id"]) if saved.tree else None
    return out_of_fold(saved.model, row, source, len(classes), dealt, levels)


def folds_for(table: pd.DataFrame) -> int:
    """How many parts measure a judge on these rows: FOLDS, or fewer where there are fewer photographs."""
    return max(2, min(FOLDS, len(table[manifest.COLUMNS].drop_duplicates())))


def judge_map(answers: pd.DataFrame, table: pd.DataFrame) -> float:
    """MAP, in [0, 1], of a model's cross-fitted `answers` for rows of `table`, by the labels as they are.

    Classes of a single photograph are left out: no head has seen another of them.
    """
    photographs = table[manifest.COLUMNS].drop_duplicates()["class_id"].value_counts()
    several = table["class_id"].map(photographs)[answers.index] > 1
    judged = answers[several]
    return metrics.mean_class_accuracy(judged["label"].to_numpy(), judged["pred"].to_numpy())


def head_round(saved: Saved, precision: str) -> Round:
    """The round that trains a head like the model's own on its frozen backbone."""
    own = saved.config.get("round") or {"name": "judge", "head": saved.model.head_options["kind"]}  # saved by hand
    fields = own | SCHEDULE | {"precision": precision}
    if fields.get("hierarchy") == "branches":  # which have no part in the classes' scores
        fields |= {"hierarchy": "none", "branch_stage": None, "level_weights": None}
    return Round(**fields | ({"loss": "cross_entropy"} if fields.get("loss") == "triplet" else {}))


def parts(table: pd.DataFrame, folds: int, seed: int) -> np.ndarray:
    """The part (N,) in [0, folds) of every row, by chance.

    Equal rows share a part. Counting each photograph once, the parts of every class and of the whole are equal within
    one. InputError if there are fewer photographs than parts.
    """
    codes, photographs = pd.factorize(pd.MultiIndex.from_frame(table[manifest.COLUMNS]))
    if len(photographs) < folds:
        raise InputError(f"folds {folds}: there are only {len(photographs)} photographs")
    order = np.lexsort((np.random.default_rng(seed).random(len(photographs)), photographs.codes[1]))
    dealt = np.empty(len(photographs), dtype=np.int64)
    dealt[order] = np.arange(len(photographs)) % folds  # class after class, each in random order
    return dealt[codes]


def out_of_fold(
    model: Recogniser,
    row: Round,
    source: Features,
    num_classes: int,
    parts: np.ndarray,
    levels: Levels | None = None,
) -> pd.DataFrame:
    """The answers of `predict` for every row of `source`, those of each part by a head trained on the others."""
    tables = []
    for part in progress(np.unique(parts[source.rows]), desc="cross-fitting", unit="part"):
        inside = parts[source.rows] == part
        head, others, own = _Head(model, row, num_classes, levels), copy.copy(source), copy.copy(source)
        others.rows, own.rows = source.rows[~inside], source.rows[inside]
        for _ in training.train(head, row, others, None, None, levels=levels):
            pass
        tables.append(predict(head, own, row.precision))
    return pd.concat(tables).sort_index()


class _Head(Recogniser):
    """A fresh head of a model's kind without its backbone, so that nothing else can learn."""

    def __init__(self, model: Recogniser, row: Round, num_classes: int, levels: Levels | None):
        nn.Module.__init__(self)
        torch.manual_seed(row.seed)
        self.backbone, self.width, self.num_classes = nn.Identity(), model.width, num_classes
        self.branches = None
        paths = levels if row.hierarchy == "paths" else None
        self.head = heads.head(width=model.width, num_classes=num_classes, levels=paths, **model.head_options)
        self.register_buffer("_mean", model._mean, persistent=False)
        self.to(model.device)

    def freeze(self, what: str | int) -> None:
        """There is nothing to freeze."""
