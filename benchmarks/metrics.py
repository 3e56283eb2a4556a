"""GAP and MAP of a whole validation set: 150,000 predictions of 50,030 classes."""

from collections.abc import Iterator

import numpy as np
from sklearn.metrics import average_precision_score, recall_score

from aliprod import metrics
from benchmarks.stopwatch import race

NUM_CLASSES = 50_030
BATCH_SIZE = 96  # the seed's, which scored every batch by itself and averaged the scores


def measure(limit: int = 150_000) -> Iterator[str]:
    """Yields a table for GAP and one for MAP of `limit` predictions."""
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.arange(limit) % NUM_CLASSES)
    confidence = rng.random(limit, dtype=np.float32)
    preds = np.where(rng.random(limit) < confidence, labels, rng.integers(NUM_CLASSES, size=limit))
    correct, classes = labels == preds, np.unique(labels)

    gap = race(
        {
            "ours": lambda: metrics.gap(correct, confidence),
            "peers': scikit-learn": lambda: average_precision_score(correct, confidence) * correct.mean(),
            "seed's: a loop a batch": lambda: seed_gap(labels, preds, confidence),
        },
        rounds=5,
    )
    yield gap.table(f"metrics: GAP of {limit:,} predictions", _values(gap.results))

    accuracy = race(
        {
            "ours": lambda: metrics.mean_class_accuracy(labels, preds),
            "peers': scikit-learn": lambda: recall_score(labels, preds, labels=classes, average="macro"),
            "peers': a loop over classes": lambda: np.mean(
                [(preds[labels == label] == label).mean() for label in classes]
            ),
            "seed's: a loop a batch": lambda: seed_map(labels, preds),
        },
        rounds=5,
    )
    yield accuracy.table(f"metrics: MAP over {len(classes):,} classes", _values(accuracy.results))


def seed_gap(labels: np.ndarray, preds: np.ndarray, confidence: np.ndarray) -> float:
    """The mean GAP of the batches: another number than GAP, and one that changes with their size."""
    gaps = []
    for start in range(0, len(labels), BATCH_SIZE):
        order = start + np.argsort(-confidence[start : start + BATCH_SIZE])
        hits, total = 0, 0.0
        for place, (label, pred) in enumerate(zip(labels[order], preds[order], strict=True), start=1):
            hit = int(label == pred)
            hits += hit
            total += hits / place * hit
        gaps.append(total / len(order))
    return sum(gaps) / len(gaps)


def seed_map(labels: np.ndarray, preds: np.ndarray) -> float:
    """The mean over all pairs of a batch and a class in it, every class being visited for every batch."""
    total, pairs = 0.0, 0
    for start in range(0, len(labels), BATCH_SIZE):
        batch = slice(start, start + BATCH_SIZE)
        hits, counts = [0] * NUM_CLASSES, [0] * NUM_CLASSES
        for label, pred in zip(labels[batch], preds[batch], strict=True):
            hits[label] += int(label == pred)
            counts[label] += 1
        for label in range(NUM_CLASSES):
            if counts[label] > 0:
                total += hits[label] / counts[label]
                pairs += 1
    return total / pairs


def _values(results: dict[str, float]) -> dict[str, str]:
    """What each way found; all but the seed's must agree."""
    ours = results["ours"]
    assert all(np.isclose(value, ours) for way, value in results.items() if not way.startswith("seed's"))
    return {way: f"{value:.4f}" + ("" if np.isclose(value, ours) else ", wrong") for way, value in results.items()}
