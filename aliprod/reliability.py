"""What confidences are worth: measured on photographs that the model has not learnt, and drawn.

Validation is all there is beside what the network has learnt, so it is cross-fitted: of its halves each is scored with
the temperature and the threshold fitted on the other. Those of the whole go with the model.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch.nn.utils import parametrize

from aliprod import calibration, manifest, metrics
from aliprod.features import BATCH_SIZE, Features
from aliprod.lettering import Figure
from aliprod.model import Recogniser, autocast

FITTED = 20_000  # photographs, drawn by chance, that temperatures are fitted on at most
REFUSED = 0.05  # share of the photographs of known products that the threshold takes for unknown


@dataclass(frozen=True)
class Reliability:
    """How a model's confidences become probabilities, and what they then tell.

    scores: temperature and unknown_below, the threshold, both fitted to all photographs; known_refused, the share of
    photographs of known products below the threshold, cross-fitted; where there are some of unknown products also
    unknown_auroc, of telling known ones from them by confidence, and unknown_accepted, the share of them not below it.
    Nothing where nothing could be fitted. temperatures (N,) has for every row that fitted to the half without it;
    unknown (M,) are the confidences of unknown products.
    """

    scores: dict[str, float]
    temperatures: np.ndarray
    unknown: np.ndarray


def measure(
    model: Recogniser,
    source: Features,
    unknown: Features | None,
    table: pd.DataFrame,
    precision: str,
    refused: float = REFUSED,
) -> Reliability:
    """Fits and measures on the rows of `source`, whose keys are those of `table`; `unknown` holds products that the
    model does not know. Fewer than two readable photographs fit nothing."""
    rows, parts = source.rows, np.zeros(len(table), dtype=np.int64)
    if len(rows) < 2:
        return Reliability({}, np.ones(len(table)), np.empty(0))
    parts[rows] = halves(table.iloc[rows])
    drawn = rows
    if len(rows) > FITTED:
        drawn = np.sort(np.random.default_rng(0).choice(rows, FITTED, replace=False))

    def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        assert source.labels is not None
        for logits, chosen in _logits(model, source, drawn, precision):
            labels, halves = (torch.from_numpy(values[chosen]).to(model.device) for values in (source.labels, parts))
            yield logits, labels, halves

    found = calibration.temperatures(batches, 2)
    known = _confidences(model, source, found, precision)  # (R, 3)
    strangers = _confidences(model, unknown, found, precision) if unknown else np.empty((0, 3))
    measured: dict[str, list[float]] = {"known_refused": [], "unknown_auroc": [], "unknown_accepted": []}
    for half in (0, 1):  # with what the other has taught
        ours, theirs = known[parts[rows] == half, half], known[parts[rows] != half, half]
        threshold = np.quantile(theirs, refused)
        measured["known_refused"] += (ours < threshold).tolist()
        if len(strangers):
            measured["unknown_auroc"].append(metrics.auroc(ours, strangers[:, half]))
            measured["unknown_accepted"] += (strangers[:, half] >= threshold).tolist()
    scores = {"temperature": found[2], "unknown_below": float(np.quantile(known[:, 2], refused))}
    scores |= {name: float(np.mean(values)) for name, values in measured.items() if values}
    return Reliability(scores, np.asarray(found)[parts], strangers[:, 2])


def halves(table: pd.DataFrame) -> np.ndarray:
    """The half (N,), 0 or 1, of every row: by its key, whatever the order; of each class and in all as many, or one
    less."""
    order = np.lexsort((pd.util.hash_pandas_object(table[manifest.COLUMNS], index=False), table["class_id"]))
    dealt = np.empty(len(table), dtype=np.int64)
    dealt[order] = np.arange(len(table)) % 2
    return dealt


@torch.inference_mode()
def _logits(
    model: Recogniser, source: Features, rows: np.ndarray, precision: str
) -> Iterator[tuple[torch.Tensor, np.ndarray]]:
    """Logits (B, C) of a batch after the other, and its rows (B,)."""
    model.eval()
    chunks = [rows[start : start + BATCH_SIZE] for start in range(0, len(rows), BATCH_SIZE)]
    with parametrize.cached():
        for batch, chosen in source.batches(chunks):
            with autocast(model.device, precision):
                logits = model.head(batch.to(model.device, non_blocking=True))
            yield logits.float(), chosen


@torch.inference_mode()
def _confidences(model: Recogniser, source: Features, temperatures: list[float], precision: str) -> np.ndarray:
    """Largest probability (R, T) of each readable row at each temperature."""
    found = []
    for logits, _ in _logits(model, source, source.rows, precision):
        best = logits.amax(dim=1)
        logits -= best[:, None]
        found.append(torch.stack([(-(logits / t).logsumexp(dim=1)).exp() for t in temperatures], dim=1).cpu().numpy())
    return np.concatenate(found) if found else np.empty((0, len(temperatures)))


def diagram(correct: np.ndarray, before: np.ndarray, after: np.ndarray) -> Figure:
    """Accuracy by confidence, before and after, in bins of equal mass; below, how many photographs have which.

    correct (N,) bool; before and after (N,) confidences. On the diagonal confidences are probabilities; the bars are
    Wilson's 95 % intervals of the accuracy.
    """
    figure = Figure(figsize=(9, 5.4), layout="constrained")
    rows = figure.subplots(2, 2, sharex=True, sharey="row", height_ratios=(3, 1))
    for (axes, counts), confidence, name in zip(rows.T, (before, after), ("as trained", "calibrated"), strict=True):
        table = metrics.reliability(correct, confidence)
        share, extra = table["accuracy"], 1.96**2 / table["count"]
        center = (share + extra / 2) / (1 + extra)
        error = np.sqrt(share * (1 - share) * extra + extra**2 / 4) / (1 + extra)
        axes.plot([0, 1], [0, 1], color="grey", linewidth=1, linestyle="--")
        axes.errorbar(table["confidence"], center, error, fmt="none", capsize=2)
        axes.plot(table["confidence"], share, "o", color="tab:blue", markersize=4)
        axes.set(title=f"{name}: calibration error {metrics.calibration_error(correct, confidence):.3f}")
        axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
        axes.grid(alpha=0.3)
        counts.hist(confidence, bins=20, range=(0, 1))
        counts.set(xlabel="confidence")
    rows[0, 0].set(ylabel="accuracy")
    rows[1, 0].set(ylabel="photographs")
    return figure


def known_or_not(known: np.ndarray, trust: Reliability) -> Figure:
    """Confidences of photographs of known (N,) and of unknown products, and the threshold between them."""
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    for values, name in ((known, "known"), (trust.unknown, "unknown")):
        weights = np.full(len(values), 1 / len(values))
        axes.hist(values, bins=20, range=(0, 1), weights=weights, alpha=0.6, label=f"{name} products ({len(values)})")
    axes.axvline(trust.scores["unknown_below"], color="black", linestyle="--", label="unknown below")
    axes.set(xlabel="confidence", ylabel="share of the photographs")
    axes.set(title=f"Known or not: AUROC {trust.scores['unknown_auroc']:.3f}")
    axes.legend(fontsize=8)
    return figure
