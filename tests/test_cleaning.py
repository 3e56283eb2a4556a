"""Rules of cleaning against cleanlab and slow versions of them, and what a cleaned manifest must keep."""

import numpy as np
import pandas as pd
import pytest

from aliprod import InputError, cleaning, manifest


def material(seed: int = 0, rows: int = 400, classes: int = 6, top: int = 6, lean: float = 0.0):
    """A manifest, what a fair model answers on it, and the whole matrix of probabilities it answered from.

    The model leans to the later classes: its logits rise by so much from the first class to the last.
    """
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, rows)
    logits = rng.normal(size=(rows, classes))
    logits[np.arange(rows), labels] += rng.choice([3.0, -1.0], rows, p=[0.8, 0.2])
    logits += np.linspace(0, lean, classes)
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    order = np.argsort(-probabilities, axis=1)[:, :top]
    answers = {"label": labels, "loss": -np.log(probabilities[np.arange(rows), labels])}
    for place in range(top):
        suffix = f"_{place + 1}" if place else ""
        answers[f"pred{suffix}"] = order[:, place]
        answers[f"confidence{suffix}"] = probabilities[np.arange(rows), order[:, place]].astype(np.float32)
    ids = [f"{label:05d}" for label in labels]
    table = pd.DataFrame({"split": "train", "class_id": ids, "image_id": [f"{row}.jpg" for row in range(rows)]})
    return table, pd.DataFrame(answers), probabilities


def test_the_seeds_rule_spares_the_classes_that_are_well_recognised():
    _, predictions, _ = material()
    reasons = cleaning.misclassified(0.7)([predictions])
    for row, answer in enumerate(predictions.itertuples()):
        same = predictions[predictions["label"] == answer.label]
        well = (same["label"] == same["pred"]).mean() >= 0.7
        assert (reasons[row] != "") == (answer.label != answer.pred and not well)
    assert 0 < (reasons != "").sum() < (predictions["label"] != predictions["pred"]).sum()


def test_disagreement_counts_votes():
    tables = [material(seed)[1].assign(label=material(0)[1]["label"]) for seed in range(3)]
    reasons = cleaning.disagreement(2)(tables)
    votes = [sum(table["pred"][row] == table["label"][row] for table in tables) for row in range(len(tables[0]))]
    assert [reason != "" for reason in reasons] == [count < 2 for count in votes]
    with pytest.raises(InputError, match="votes 4: there are only 3 models"):
        cleaning.disagreement(4)(tables)


@pytest.mark.parametrize("lean", [0.0, 3.0])
@pytest.mark.parametrize("seed", range(4))
def test_confident_learning_is_cleanlabs(seed, lean):
    from cleanlab.count import get_confident_thresholds
    from cleanlab.filter import find_label_issues

    _, predictions, probabilities = material(seed, lean=lean)
    labels, preds = predictions["label"].to_numpy(), predictions["pred"].to_numpy()
    ours = cleaning.confident()([predictions]) != ""
    theirs = find_label_issues(labels, probabilities, filter_by="confident_learning", n_jobs=1)
    # They differ only where the surest class misses its threshold and another passes. The paper's equation 2 takes the
    # surest of those that pass, and so do we; cleanlab never suspects a row whose label is the surest class, and takes
    # the surest class wherever several others pass.
    passing = probabilities >= get_confident_thresholds(labels, probabilities)
    apart = passing.any(axis=1) & ~passing[np.arange(len(labels)), preds]
    assert np.array_equal(ours[~apart], theirs[~apart]) and 0 < ours.sum() < 200
    assert np.array_equal(ours[apart], np.where(passing, probabilities, 0).argmax(axis=1)[apart] != labels[apart])
    assert (preds == labels)[ours & ~theirs].all() and (lean or np.array_equal(ours, theirs))


@pytest.mark.parametrize("seed", range(4))
def test_the_share_of_wrong_labels_is_cleanlabs(seed):
    from cleanlab.count import compute_confident_joint, estimate_joint

    _, predictions, probabilities = material(seed)
    labels = predictions["label"].to_numpy()
    counted = compute_confident_joint(labels, probabilities, calibrate=False)
    joint = counted / counted.sum(axis=1, keepdims=True) * np.bincount(labels)[:, None] / len(labels)
    assert cleaning.wrong_share(predictions) == pytest.approx(1 - np.trace(joint)) != 0
    rounded = estimate_joint(labels, probabilities)  # to whole photographs, class by class
    assert cleaning.wrong_share(predictions) == pytest.approx(1 - np.trace(rounded), abs=6 / len(labels))
    sure = predictions.assign(loss=0.0, pred=predictions["label"], confidence=1.0)
    assert cleaning.wrong_share(sure) == 0


@pytest.mark.parametrize(
    ("judges", "share", "estimate", "limits", "words"),
    [
        ({"a": 0.3, "b": 0.9}, 0.5, None, (0.3, None), []),
        ({"a": 0.3}, 0.501, None, (0.3, None), ["0.501 of the photographs dropped, more than max_dropped_share 0.5"]),
        ({"a": 0.9}, 0.5, None, (0.3, 0.4), ["max_dropped_share 0.4"]),
        ({"a": 0.9}, 0.5, None, (0.3, 1.0), []),
        ({"a": 0.9}, 0.01, None, (0.3, 0.0), ["max_dropped_share 0"]),
        ({"a": 0.9}, 0.14, 0.05, (0.3, None), []),
        ({"a": 0.9}, 0.16, 0.05, (0.3, None), ["max_dropped_share 0.15 (0.050 of the labels are est"]),
        ({"a": 0.9}, 0.16, 0.05, (0.3, 0.2), []),
        ({"a": 0.9}, 1.0, 0.95, (0.3, None), []),
        ({"a": 0.29, "b": 0.9}, 0.1, None, (0.3, None), ["judge a has a MAP of 0.2900, cross-fitted, below min_j"]),
        ({"a": 0.9, "b": float("nan")}, 0.9, None, (0.0, None), ["judge b", "max_dropped_share"]),
        ({"a": 0.0}, 0.1, None, (0.0, None), []),
    ],
)  # fmt: skip
def test_a_weak_judge_and_too_many_dropped_are_refused(judges, share, estimate, limits, words):
    reasons = cleaning.refusals(judges, share, estimate, *limits)
    assert len(reasons) == len(words) and all(word in reason for word, reason in zip(words, reasons, strict=True))


def test_a_few_answers_do_for_confident_learning():
    reasons = [cleaning.confident()([material(top=top)[1]]) for top in (3, 6)]
    assert np.mean(reasons[0] == reasons[1]) > 0.98


def test_a_class_that_would_lose_all_keeps_one_and_unreadable_rows_go():
    table, predictions, _ = material(rows=120)
    lost = predictions["label"] == 2
    predictions.loc[lost, "pred"] = 3
    unread = [0, 7]
    kept, dropped = cleaning.clean(table, [predictions.drop(unread)], cleaning.misclassified(1.0), least=1, seed=0)
    assert (kept["class_id"] == "00002").sum() == 1 and set(kept["class_id"]) == set(table["class_id"])
    assert dropped.loc[unread, "reason"].tolist() == ["unreadable"] * 2
    assert len(kept) + len(dropped) == len(table)
    assert not set(kept["image_id"]) & set(dropped["image_id"])
    again, _ = cleaning.clean(table, [predictions.drop(unread)], cleaning.misclassified(1.0), least=1, seed=0)
    pd.testing.assert_frame_equal(kept, again)


@pytest.mark.parametrize("least", [1, 5, 10, 23])
def test_small_classes_grow_evenly(least):
    ids = [label for label, count in {"a": 1, "b": 4, "c": 9, "d": 30}.items() for _ in range(count)]
    table = pd.DataFrame({"split": "train", "class_id": ids, "image_id": [f"{row}.jpg" for row in range(len(ids))]})
    grown = manifest.grow(table, least, 0)
    before, after = table["class_id"].value_counts(), grown["class_id"].value_counts()
    assert after.to_dict() == before.clip(lower=least).to_dict()
    assert set(grown["image_id"]) == set(table["image_id"])
    for _, rows in grown.groupby("class_id"):
        times = rows["image_id"].value_counts()
        assert times.max() - times.min() <= 1


def test_detection_is_precision_recall_and_f1():
    from sklearn.metrics import precision_recall_fscore_support

    table, _, _ = material(rows=200)
    rng = np.random.default_rng(1)
    wrong, found = rng.random(200) < 0.2, rng.random(200) < 0.3
    truth = table.assign(true_class_id=np.where(wrong, "99999", table["class_id"]))
    scores = cleaning.detection(table, table[found], truth)
    expected = precision_recall_fscore_support(wrong, found, average="binary")[:3]
    assert list(scores.values()) == pytest.approx(expected)
    assert cleaning.detection(table, table[:0], truth)["f1"] == 0.0
