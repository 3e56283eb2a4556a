"""Scores of predictions over a whole set, never averaged over batches.

Pure functions of arrays: labels (N,), preds (N,) and confidences (N,), or of the table of predictions.
"""

import numpy as np
import pandas as pd

from aliprod.taxonomy import Levels

BINS = 15  # of the calibration error
THRESHOLDS = np.append(np.linspace(0, 0.95, 20), [0.98, 0.99])  # of the trade-off of depth against correctness


def gap(correct: np.ndarray, confidence: np.ndarray) -> float:
    """Global average precision of the top-1 predictions, in [0, 1]; 0 for an empty set.

    correct (N,) bool, confidence (N,) in [0, 1]. With predictions sorted by falling confidence,
    GAP = 1/N * sum over correct ones of the precision down to them; predictions of equal confidence are
    taken together, as scikit-learn does: GAP = average_precision_score(correct, confidence) * accuracy.
    """
    if len(correct) == 0:
        return 0.0
    # The bits of a non-negative float32 order like the float: one integer sort carries both columns.
    bits = np.ascontiguousarray(confidence, dtype=np.float32).view(np.uint32).astype(np.uint64)
    packed = np.sort(bits << np.uint64(1) | np.asarray(correct, dtype=np.uint64))[::-1]
    hits = np.cumsum(packed & np.uint64(1), dtype=np.int64)
    ends = np.append(np.flatnonzero(np.diff(packed >> np.uint64(1))), len(packed) - 1)  # last row of each tie
    hits = hits[ends]
    return float(np.sum(np.diff(hits, prepend=0) * (hits / (ends + 1))) / len(correct))


def class_accuracy(labels: np.ndarray, preds: np.ndarray, num_classes: int) -> np.ndarray:
    """Share of each class's photographs that were recognised (C,); NaN for classes without any."""
    counts = np.bincount(labels, minlength=num_classes)
    hits = np.bincount(labels[labels == preds], minlength=num_classes)
    return np.divide(hits, counts, out=np.full(num_classes, np.nan), where=counts > 0)


def mean_class_accuracy(labels: np.ndarray, preds: np.ndarray) -> float:
    """MAP as the competition means it: 1 - mean class error over the classes present, in [0, 1].

    Equal to scikit-learn's balanced_accuracy_score; 0 for an empty set.
    """
    if len(labels) == 0:
        return 0.0
    return float(np.nanmean(class_accuracy(labels, preds, int(labels.max()) + 1)))


def summary(predictions: pd.DataFrame) -> dict[str, float]:
    """loss (mean, in nats), gap, map, accuracy, and the accuracy within the k answers kept (top5 when k is 5)."""
    labels, preds = predictions["label"].to_numpy(), predictions["pred"].to_numpy()
    answers = predictions.filter(regex=r"^pred(_\d+)?$")
    correct = labels == preds
    return {
        "loss": float(predictions["loss"].mean()),
        "gap": gap(correct, predictions["confidence"].to_numpy()),
        "map": mean_class_accuracy(labels, preds),
        "accuracy": float(correct.mean()),
        f"top{answers.shape[1]}": float((answers.to_numpy() == labels[:, None]).any(axis=1).mean()),
    }


def by_level(predictions: pd.DataFrame, levels: Levels) -> dict[str, float]:
    """Scores of predictions (with `safe` and `path_*`, as of prediction.predict) in the product tree.

    level_<l>_accuracy and level_<l>_map, levels from the root, of what the model says at that level: its branch's node,
    or the ancestor of its answer. consistency: share of photographs whose levels all lie on one path. severity: mean
    distance, in levels up to the nearest common ancestor, of the wrong answers, 0 if there are none; distance: the same
    over all answers. safe_accuracy, safe_severity and safe_distance: those of `safe`.
    """
    labels = predictions["label"].to_numpy()
    scores: dict[str, float] = {}
    agree = np.ones(len(predictions), dtype=bool)
    for level, ancestors in enumerate(levels.ancestors[:-1], start=1):
        below = ancestors[predictions["pred"].to_numpy()]
        said = predictions.get(f"level_{level}", pd.Series(below)).to_numpy()
        agree &= said == below
        scores[f"level_{level}_accuracy"] = float(np.mean(said == ancestors[labels]))
        scores[f"level_{level}_map"] = mean_class_accuracy(ancestors[labels], said)
    scores["consistency"] = float(agree.mean())
    for prefix, answer in {"": "pred", "safe_": "safe"}.items():
        distances = levels.distances(labels, predictions[answer].to_numpy())
        scores[f"{prefix}severity"] = severity(distances)
        scores[f"{prefix}distance"] = float(distances.mean())
    scores["safe_accuracy"] = float(np.mean(predictions["safe"] == labels))
    return scores


def severity(distances: np.ndarray) -> float:
    """Mean distance in the tree (N,) of the wrong answers, those further than 0; 0 if there are none."""
    return float(distances.sum() / max(1, (distances > 0).sum()))


def trade_off(predictions: pd.DataFrame, levels: Levels, thresholds: np.ndarray = THRESHOLDS) -> pd.DataFrame:
    """How right answers get by being less exact: one row a threshold with its depth, correct and information.

    The answer is the deepest node on the path to `pred` whose probability passes the threshold, else the root. depth:
    its mean level, the root's 0, the classes' L; correct: share of answers that hold the truth; answered: share of
    answers below the root.
    """
    labels, preds = (predictions[name].to_numpy() for name in ("label", "pred"))
    inner = predictions.filter(regex=r"^path_").to_numpy()
    path = np.column_stack([inner, predictions["confidence"]])  # (N, L), falling along a row
    right = np.column_stack(
        [np.ones(len(labels), dtype=bool), (levels.ancestors[:, labels] == levels.ancestors[:, preds]).T]
    )
    rows = []
    for threshold in thresholds:
        depth = (path >= threshold).sum(axis=1)
        correct = right[np.arange(len(depth)), depth]
        rows.append((threshold, depth.mean(), correct.mean(), (depth > 0).mean()))
    return pd.DataFrame(rows, columns=["threshold", "depth", "correct", "answered"])


def per_class(predictions: pd.DataFrame, classes: pd.DataFrame, levels: Levels | None = None) -> pd.DataFrame:
    """One row a class: class_id, name, path, num_train, num_val, num_correct, accuracy, most_often_taken_for.

    With `levels` also level_<l>_accuracy, the share of its photographs whose answer is under its ancestor there, and
    distance, the mean one in the tree from its answers to it. `classes` has class_id, name, path, num_train, by
    label. Accuracy is NaN and the confusion "" where there is nothing to count.
    """
    labels, preds = predictions["label"].to_numpy(), predictions["pred"].to_numpy()
    wrong = predictions.loc[labels != preds, ["label", "pred"]]
    pairs = wrong.value_counts(sort=False).reset_index(name="count")
    worst = pairs.sort_values(["count", "pred"], ascending=[False, True]).drop_duplicates("label")
    taken_for = pd.Series("", index=classes.index, dtype="str")
    taken_for.loc[worst["label"]] = classes["class_id"].to_numpy()[worst["pred"]]
    hierarchy = {}
    if levels:
        counts = np.bincount(labels, minlength=len(classes)).astype(float)
        counts[counts == 0] = np.nan
        for level, nodes in enumerate(levels.ancestors[:-1], start=1):
            right = labels[nodes[labels] == nodes[preds]]
            hierarchy[f"level_{level}_accuracy"] = np.bincount(right, minlength=len(classes)) / counts
        distances = levels.distances(labels, preds)
        hierarchy["distance"] = np.bincount(labels, weights=distances, minlength=len(classes)) / counts
    return classes.assign(
        num_val=np.bincount(labels, minlength=len(classes)),
        num_correct=np.bincount(labels[labels == preds], minlength=len(classes)),
        accuracy=class_accuracy(labels, preds, len(classes)),
        most_often_taken_for=taken_for,
        **hierarchy,
    )


def reliability(correct: np.ndarray, confidence: np.ndarray, bins: int = BINS) -> pd.DataFrame:
    """What confidences are worth: one row a bin with its count, mean confidence and accuracy, surest last.

    correct (N,) bool, confidence (N,) in [0, 1]. The bins' edges are quantiles, so that bins are of about one size
    (scikit-learn's calibration_curve with strategy "quantile"); equal confidences share one, empty ones are left out.
    """
    edges = np.quantile(confidence, np.linspace(0, 1, bins + 1)[1:-1]) if len(confidence) else np.empty(0)
    place = np.searchsorted(edges, confidence)
    table = pd.DataFrame({"confidence": np.asarray(confidence, dtype=np.float64), "accuracy": correct})
    return table.groupby(place).agg(
        count=("accuracy", "size"), confidence=("confidence", "mean"), accuracy=("accuracy", "mean")
    )


def calibration_error(correct: np.ndarray, confidence: np.ndarray, bins: int = BINS) -> float:
    """Expected calibration error in [0, 1]: the mean over photographs of their bin's |accuracy - mean confidence|.

    The measure of Naeini et al. (AAAI 2015) and Guo et al. (ICML 2017), in the bins of equal mass of `reliability`,
    which estimate it with less bias than those of equal width (Roelofs et al., AISTATS 2022). 0 for an empty set.
    """
    table = reliability(correct, confidence, bins)
    gaps = (table["accuracy"] - table["confidence"]).abs()
    return float((gaps * table["count"]).sum() / max(1, len(correct)))


def auroc(known: np.ndarray, unknown: np.ndarray) -> float:
    """How often a known product (N,) scores higher than an unknown one (M,), ties counted half; 0.5 is chance.

    Equal to scikit-learn's roc_auc_score. Neither may be empty.
    """
    ordered = np.sort(unknown)
    below = [np.searchsorted(ordered, known, side=side) for side in ("left", "right")]
    return float(np.mean(below) / len(unknown))


def select_list(predictions: pd.DataFrame, classes: pd.DataFrame) -> pd.DataFrame:
    """The competition entry's list to choose stable classes by: class_id, confidence in [0, 1], surest first.

    A class's confidence is the mean over its photographs of the confidence, counted 0 where the answer is wrong; it is
    a probability where those are calibrated.
    """
    earned = predictions["confidence"].where(predictions["label"] == predictions["pred"], 0.0)
    mean = earned.groupby(predictions["label"]).mean().sort_values(ascending=False, kind="stable")
    return pd.DataFrame({"class_id": classes["class_id"].to_numpy()[mean.index], "confidence": mean.to_numpy()})
