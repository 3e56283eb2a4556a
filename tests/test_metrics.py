"""Scores equal scikit-learn's and slow loops, whatever the ties and whatever is missing."""

from collections import Counter

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import average_precision_score, balanced_accuracy_score

from aliprod import metrics

pytestmark = pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true", "ignore:A single label")

RNG = np.random.default_rng(0)
SOME = RNG.random(500).astype(np.float32)


def predictions(num_images: int, num_classes: int, seed: int, top: int = 5, levels: int = 20) -> pd.DataFrame:
    """A table as `predict` gives it: logits of few levels, so that confidences tie; the later classes lack labels."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, max(1, num_classes * 3 // 4), num_images)
    logits = rng.integers(0, levels, (num_images, num_classes)) * (5 / levels)
    logits[np.arange(num_images), labels] += 2
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    order = np.argsort(-probabilities, axis=1, kind="stable")[:, :top]
    table = pd.DataFrame({"label": labels, "loss": -np.log(probabilities[np.arange(num_images), labels])})
    for place in range(order.shape[1]):
        suffix = f"_{place + 1}" if place else ""
        table[f"pred{suffix}"] = order[:, place]
        table[f"confidence{suffix}"] = np.take_along_axis(probabilities, order, 1)[:, place].astype(np.float32)
    return table


def classes(num_classes: int) -> pd.DataFrame:
    ids = [f"{label:05d}" for label in range(num_classes)]
    return pd.DataFrame({"class_id": ids, "name": [f"p{i}" for i in ids], "path": "Shop", "num_train": 3})


@pytest.mark.parametrize(
    ("correct", "confidence"),
    [
        (RNG.random(500) < SOME, SOME),
        (RNG.random(500) > SOME, SOME),
        (RNG.random(500) < 0.5, np.round(SOME, 1)),
        (RNG.random(500) < 0.01, np.round(SOME, 2)),
        (RNG.random(500) < 0.5, np.full(500, 0.25)),
        (RNG.random(500) < 0.5, np.zeros(500)),
        (RNG.random(500) < 0.5, np.sort(SOME)),
        (RNG.random(500) < 0.5, 1 - SOME * 2e-7),
        (np.ones(500, dtype=bool), SOME),
        (np.array([True]), np.array([0.0])),
        (np.array([True, False]), np.array([1.0, 0.0])),
        (np.array([False, True]), np.array([1.0, 0.0])),
    ],
)
def test_gap_is_average_precision_times_accuracy(correct, confidence):
    single = confidence.astype(np.float32)
    assert metrics.gap(correct, single) == pytest.approx(average_precision_score(correct, single) * correct.mean())


def test_gap_of_no_right_answer_and_of_no_answer_is_zero():
    assert metrics.gap(np.zeros(500, dtype=bool), SOME) == 0
    assert metrics.gap(np.array([False]), np.array([0.9])) == 0
    assert metrics.gap(np.array([], dtype=bool), np.array([])) == 0


def test_gap_does_not_depend_on_the_order_even_where_confidences_tie():
    correct, confidence = RNG.random(500) < 0.6, np.round(SOME, 1)
    expected = metrics.gap(correct, confidence)
    for seed in range(20):
        order = np.random.default_rng(seed).permutation(500)
        assert metrics.gap(correct[order], confidence[order]) == expected


def test_gap_takes_any_layout_and_type():
    correct, confidence = RNG.random(500) < 0.6, SOME.astype(np.float64)
    both = np.stack([correct.astype(float), confidence], axis=1)
    assert metrics.gap(both[:, 0], both[:, 1]) == metrics.gap(correct, SOME)


@pytest.mark.parametrize(("num_images", "num_classes"), [(1, 1), (1, 5), (40, 3), (400, 50), (2000, 7)])
def test_mean_class_accuracy_is_balanced_accuracy_over_the_classes_present(num_images, num_classes):
    table = predictions(num_images, num_classes, seed=num_images)
    labels, preds = table["label"].to_numpy(), table["pred"].to_numpy()
    assert metrics.mean_class_accuracy(labels, preds) == pytest.approx(balanced_accuracy_score(labels, preds))


def test_mean_class_accuracy_of_nothing_is_zero():
    assert metrics.mean_class_accuracy(np.array([], dtype=np.int64), np.array([], dtype=np.int64)) == 0


@pytest.mark.parametrize(("num_images", "num_classes"), [(0, 3), (1, 4), (300, 40)])
def test_class_accuracy_is_each_classes_share_and_nan_without_photographs(num_images, num_classes):
    table = predictions(num_images, num_classes, seed=1)
    labels, preds = table["label"].to_numpy(), table["pred"].to_numpy()
    slow = [
        (preds[labels == label] == label).mean() if (labels == label).any() else np.nan for label in range(num_classes)
    ]
    np.testing.assert_array_equal(metrics.class_accuracy(labels, preds, num_classes), slow)


@pytest.mark.parametrize(("num_classes", "top"), [(40, 5), (8, 3), (3, 3), (4, 1)])
def test_summary_holds_every_score_of_the_whole_set(num_classes, top):
    table = predictions(300, num_classes, seed=2, top=top, levels=10**6)
    found = metrics.summary(table)
    labels, preds = table["label"].to_numpy(), table["pred"].to_numpy()
    answers = table[["pred", *(f"pred_{place}" for place in range(2, top + 1))]].to_numpy().tolist()
    assert found == pytest.approx(
        {
            "loss": np.mean(table["loss"]),
            "gap": average_precision_score(labels == preds, table["confidence"]) * np.mean(labels == preds),
            "map": balanced_accuracy_score(labels, preds),
            "accuracy": np.mean(labels == preds),
            f"top{top}": np.mean([label in kept for label, kept in zip(labels, answers, strict=True)]),
        }
    )
    assert all(type(value) is float for value in found.values())


@pytest.mark.parametrize(("num_images", "num_classes", "seed"), [(0, 3, 0), (1, 2, 0), (60, 30, 1), (900, 6, 2)])
def test_per_class_equals_a_slow_loop(num_images, num_classes, seed):
    table, known = predictions(num_images, num_classes, seed), classes(num_classes)
    found = metrics.per_class(table, known)
    pd.testing.assert_frame_equal(found[known.columns], known)
    for label, row in enumerate(found.itertuples()):
        answers = table.loc[table["label"] == label, "pred"].tolist()
        wrong = Counter(answer for answer in answers if answer != label)
        most = min((answer for answer in wrong if wrong[answer] == max(wrong.values())), default=None)
        assert row.num_val == len(answers)
        assert row.num_correct == answers.count(label)
        np.testing.assert_equal(row.accuracy, answers.count(label) / len(answers) if answers else np.nan)
        assert row.most_often_taken_for == ("" if most is None else known["class_id"][most])


def test_per_class_settles_ties_by_the_lower_label_and_leaves_perfect_classes_without():
    table = pd.DataFrame({"label": [0, 0, 0, 0, 1, 2, 2], "pred": [3, 1, 3, 1, 1, 0, 3]})
    found = metrics.per_class(table, classes(4))
    assert found["most_often_taken_for"].tolist() == ["00001", "", "00000", ""]
    assert found["accuracy"].tolist()[:3] == [0, 1, 0]
    assert np.isnan(found["accuracy"][3])


@pytest.mark.parametrize(("num_images", "num_classes", "seed"), [(0, 3, 0), (1, 2, 0), (60, 30, 1), (900, 6, 2)])
def test_select_list_equals_a_slow_loop_surest_first(num_images, num_classes, seed):
    table = predictions(num_images, num_classes, seed)
    found = metrics.select_list(table, classes(num_classes))
    slow = {}
    for label in sorted(set(table["label"])):
        rows = table[table["label"] == label].itertuples()
        slow[f"{label:05d}"] = np.mean([row.confidence if row.pred == label else 0.0 for row in rows])
    assert found.columns.tolist() == ["class_id", "confidence"]
    assert dict(zip(found["class_id"], found["confidence"], strict=True)) == pytest.approx(slow)
    assert found["confidence"].is_monotonic_decreasing
    assert found["confidence"].between(0, 1).all()
