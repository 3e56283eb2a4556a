"""Cleaning: which photographs of a training manifest are filed wrongly, judged by what models answer on them.

A rule looks at predictions (as of `prediction.predict`, one table a model, of the same rows) and says for each row why
it is suspect, "" where it is not. `clean` turns that into a new manifest; the old one is never changed.
"""

import functools
from collections.abc import Callable

import numpy as np
import pandas as pd

from aliprod import InputError, manifest, metrics

Rule = Callable[[list[pd.DataFrame]], np.ndarray]  # -> reasons (N,)
MOST_DROPPED = 0.5  # share of the photographs, where nothing says how many labels are wrong
SPARE = 0.1  # share that may be dropped beyond what is estimated to be wrong


def misclassified(min_accuracy: float = 0.92) -> Rule:
    """The competition entry's rule: wrong answers of the first model, except in classes recognised this well."""

    def rule(predictions: list[pd.DataFrame]) -> np.ndarray:
        labels, preds = (predictions[0][name].to_numpy() for name in ("label", "pred"))
        accuracy = metrics.class_accuracy(labels, preds, labels.max() + 1)[labels]
        return np.where((labels != preds) & (accuracy < min_accuracy), "misclassified", "")

    return rule


def disagreement(votes: int = 2) -> Rule:
    """Fewer than `votes` models answer what the photograph is filed under."""

    def rule(predictions: list[pd.DataFrame]) -> np.ndarray:
        if votes > len(predictions):
            raise InputError(f"votes {votes}: there are only {len(predictions)} models to vote")
        agreeing = np.sum([table["pred"].to_numpy() == table["label"].to_numpy() for table in predictions], axis=0)
        return np.where(agreeing < votes, "too few models agree", "")

    return rule


def confident() -> Rule:
    """Confident learning (Northcutt et al., JAIR 2021): the off-diagonal of the confident joint, first model only.

    A class's threshold is the mean probability of that class over the photographs filed under it; a row belongs to the
    most probable class that passes its threshold, and is suspect if that is another than its own. Streams: reads the
    answers kept for each row, never an N x C matrix; exact while no class beyond those passes its threshold.
    """

    def rule(predictions: list[pd.DataFrame]) -> np.ndarray:
        belongs = _belongs(predictions[0])
        suspect = (belongs >= 0) & (belongs != predictions[0]["label"].to_numpy())
        return np.where(suspect, "another class is more probable", "")

    return rule


def wrong_share(predictions: pd.DataFrame) -> float:
    """The share of wrong labels, in [0, 1], that confident learning estimates from the answers of one model.

    The off-diagonal of its joint: the confident joint, each class's row scaled to as many photographs as it has. Rows
    that no class is confident of count in proportion, and a class has at least one right label, as in cleanlab.
    """
    labels, belongs = predictions["label"].to_numpy(), _belongs(predictions)
    confident, right = belongs >= 0, belongs == labels
    counts = np.bincount(labels)
    kept = np.bincount(labels[right], minlength=len(counts)).clip(min=1)
    moved = np.bincount(labels[confident & ~right], minlength=len(counts))
    return float((counts * moved / (kept + moved)).sum() / max(1, len(labels)))


def _belongs(table: pd.DataFrame) -> np.ndarray:
    """The class (N,) that every row of a model's answers belongs to; -1 where none passes its threshold."""
    labels = table["label"].to_numpy()
    own = np.exp(-table["loss"].to_numpy(dtype=np.float64))  # (N,) probability of the row's label
    answers = table.filter(regex="^pred").to_numpy()  # (N, K), surest first
    scores = table.filter(regex="^confidence").to_numpy(dtype=np.float64)
    num_classes = max(labels.max(initial=0), answers.max(initial=0)) + 1
    counts = np.bincount(labels, minlength=num_classes)
    sums = np.bincount(labels, weights=own, minlength=num_classes)
    thresholds = np.divide(sums, counts, out=np.full(num_classes, np.inf), where=counts > 0)
    passing = scores >= thresholds[answers] - 1e-6  # float32 scores
    return np.where(passing.any(axis=1), answers[np.arange(len(table)), passing.argmax(axis=1)], -1)


def clean(
    table: pd.DataFrame, predictions: list[pd.DataFrame], rule: Rule, *, least: int, seed: int
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The rows of `table` worth training on, and those dropped, with their reason.

    `predictions` are indexed by row; rows that lack one, which could not be read, are dropped too. A class that would
    lose all keeps one of its readable rows by chance, and classes of fewer than `least` rows are grown to that.
    """
    readable = functools.reduce(pd.Index.intersection, (answers.index for answers in predictions))
    predictions = [answers.loc[readable] for answers in predictions]
    reasons = pd.Series("unreadable", index=table.index, dtype="str")
    reasons[readable] = rule(predictions)
    rng = np.random.default_rng(seed)
    shuffled = readable[rng.permutation(len(readable))]
    classes = table["class_id"]
    lost = ~classes.isin(classes[reasons == ""])
    rescued = classes[shuffled][lost[shuffled]].drop_duplicates().index
    reasons[rescued] = ""
    kept = table[reasons == ""].reset_index(drop=True)
    dropped = table.assign(reason=reasons)[reasons != ""]
    return manifest.grow(kept, least, seed), dropped


def refusals(
    judges: dict[str, float],
    dropped_share: float,
    estimate: float | None,
    min_judge_map: float,
    max_dropped_share: float | None,
) -> list[str]:
    """Why a cleaning is not to be trusted, [] if nothing speaks against it.

    judges: the cross-fitted MAP of every model that judges, by its name; dropped_share: of the photographs;
    estimate: the share of wrong labels where one is known; max_dropped_share: None for `estimate` and SPARE more, or
    MOST_DROPPED.
    """
    reasons = [
        f"judge {name} has a MAP of {score:.4f}, cross-fitted, below min_judge_map {min_judge_map:g}"
        for name, score in judges.items()
        if not score >= min_judge_map
    ]
    most, origin = max_dropped_share, ""
    if most is None:
        most = MOST_DROPPED if estimate is None else min(1.0, estimate + SPARE)
        origin = "" if estimate is None else f" ({estimate:.3f} of the labels are estimated to be wrong)"
    if dropped_share > most:
        reasons.append(
            f"{dropped_share:.3f} of the photographs dropped, more than max_dropped_share {most:.3g}{origin}"
        )
    return reasons


def detection(table: pd.DataFrame, dropped: pd.DataFrame, truth: pd.DataFrame) -> dict[str, float]:
    """precision, recall and f1 of `dropped` as a search for wrong labels, each in [0, 1].

    truth: split, class_id, image_id, true_class_id. A score that is 0 / 0 is 0.
    """
    known = table.merge(truth, on=manifest.COLUMNS, how="left", validate="many_to_one")
    wrong = (known["class_id"] != known["true_class_id"]).to_numpy()
    found = table.index.isin(dropped.index)
    hits = float((wrong & found).sum())
    precision, recall = (hits / max(1, total.sum()) for total in (found, wrong))
    return {"precision": precision, "recall": recall, "f1": 2 * hits / max(1, found.sum() + wrong.sum())}
