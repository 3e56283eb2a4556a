"""Cross-fitting: nobody's own label has a say in what is answered about it."""

import copy
import dataclasses
from collections import Counter

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from aliprod import InputError, assembly, catalogue, crossfit, features, manifest, metrics, training
from aliprod.images import Images
from aliprod.model import Recogniser, Saved, weights_digest
from aliprod.prediction import predict, predict_table
from aliprod.recipe import Round

FOLDS = 4


@dataclasses.dataclass(frozen=True)
class Shop:
    """A catalogue with wrong labels, as cleaning is given it."""

    data: str
    cache: str
    table: pd.DataFrame
    classes: pd.DataFrame
    wrong: np.ndarray
    saved: Saved

    @property
    def images(self) -> Images:
        labels = manifest.labels(self.table, self.classes)
        return Images(manifest.paths(self.table, self.data), labels, self.saved.model.preprocessing)

    @property
    def source(self) -> features.Features:
        return features.compute(self.saved.model, self.images, self.cache)

    def answers(self, **changes) -> pd.DataFrame:
        given = {name: getattr(self, name) for name in ("saved", "table", "classes", "data", "cache")}
        return crossfit.answers(**given | {"precision": "fp32", "folds": FOLDS, "seed": 0} | changes)


@pytest.fixture(scope="module")
def noisy(tmp_path_factory) -> Shop:
    """160 photographs of 8 classes, a quarter filed wrongly, and an ImageNet network that knows their classes."""
    data = tmp_path_factory.mktemp("noisy") / "data"
    truth = catalogue.render(
        data, departments=2, categories=1, brands=2, products=2, images=28, imbalance=2, val_images=1, noise=0.25,
        size=128,
    )  # fmt: skip
    table = manifest.read(data, "train")
    classes = assembly.describe(manifest.class_index(table), None)
    known = table.merge(truth, on=manifest.COLUMNS)
    row = Round(name="frozen", freeze="all", image_size=128, seed=3)
    saved = Saved(assembly.model(row, len(classes), "imagenet"), classes, None, {"round": row.model_dump(mode="json")})
    wrong = (known["class_id"] != known["true_class_id"]).to_numpy()
    return Shop(str(data), str(data.parent / "cache"), table, classes, wrong, saved)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("folds", [2, 5, 20])
def test_parts_are_even_in_every_class_and_repeated_rows_stay_together(seed, folds):
    rng = np.random.default_rng(seed)
    labels = (60 * rng.random(400) ** 3).astype(int)  # some classes have one photograph, some a hundred
    table = pd.DataFrame({"split": "train", "class_id": [f"{label:05d}" for label in labels]})
    table["image_id"] = [f"{rng.integers(300)}.jpg" for _ in labels]  # the same name in several classes
    table = table.iloc[rng.integers(len(table), size=700)].reset_index(drop=True)
    parts = crossfit.parts(table, folds, seed)
    assert len(parts) == len(table) and set(parts) == set(range(folds))
    of_photograph: dict[tuple, set[int]] = {}
    for key, part in zip(table.itertuples(index=False, name=None), parts, strict=True):
        of_photograph.setdefault(key, set()).add(int(part))
    assert all(len(where) == 1 for where in of_photograph.values())
    counts: dict[str, Counter] = {}
    for (_, class_id, _), (part,) in of_photograph.items():
        counts.setdefault(class_id, Counter())[part] += 1
    for sizes in [*counts.values(), sum(counts.values(), Counter())]:
        every = [sizes[part] for part in range(folds)]
        assert max(every) - min(every) <= 1
    assert np.array_equal(parts, crossfit.parts(table, folds, seed))
    assert not np.array_equal(parts, crossfit.parts(table, folds, seed + 1))


def test_more_parts_than_photographs_are_refused():
    table = pd.DataFrame({"split": "train", "class_id": ["a", "b", "b"], "image_id": ["1", "2", "2"]})
    with pytest.raises(InputError, match="folds 3: there are only 2 photographs"):
        crossfit.parts(table, 3, 0)


def test_every_readable_row_is_answered_once_as_a_model_would(noisy, tmp_path):
    (tmp_path / "train").symlink_to(f"{noisy.data}/train")
    missing = pd.DataFrame([["train", noisy.classes["class_id"][0], "missing.jpg"]], columns=manifest.COLUMNS)
    table = pd.concat([noisy.table[:50], missing, noisy.table[50:], noisy.table[:9]], ignore_index=True)
    given = (noisy.saved, table, noisy.classes, tmp_path, noisy.cache, "fp32")
    digest = weights_digest(noisy.saved.model)
    answers, expected = crossfit.answers(*given, FOLDS, 0), predict_table(*given)
    assert answers.index.tolist() == [row for row in range(len(table)) if row != 50] == expected.index.tolist()
    assert answers.columns.tolist() == expected.columns.tolist()
    assert answers.dtypes.tolist() == expected.dtypes.tolist()
    assert answers["label"].equals(expected["label"])
    repeated = answers.loc[len(table) - 9 :].reset_index(drop=True)
    pd.testing.assert_frame_equal(repeated, answers.loc[:8], rtol=1e-4)
    pd.testing.assert_frame_equal(answers, crossfit.answers(*given, FOLDS, 0))
    assert not np.array_equal(answers["confidence"], crossfit.answers(*given, FOLDS, 1)["confidence"])
    assert weights_digest(noisy.saved.model) == digest


def test_a_judge_is_measured_by_classes_that_a_head_could_learn(noisy):
    answers = noisy.answers()
    labels, preds = answers["label"].to_numpy(), answers["pred"].to_numpy()
    assert crossfit.judge_map(answers, noisy.table) == metrics.mean_class_accuracy(labels, preds) > 0.3
    alone = noisy.table["class_id"] == noisy.classes["class_id"][0]
    table = pd.concat([noisy.table[~alone], *[noisy.table[alone].head(1)] * 2], ignore_index=True)
    answers = noisy.answers(table=table)  # the only photograph of a class, twice: no head can know it
    several = (answers["label"] > 0).to_numpy()
    labels, preds = (answers[name].to_numpy()[several] for name in ("label", "pred"))
    assert crossfit.judge_map(answers, table) == metrics.mean_class_accuracy(labels, preds)
    assert [crossfit.folds_for(table.head(count)) for count in (1, 2, 3, 9)] == [2, 2, 3, 5]


def test_photographs_that_cannot_be_read_judge_nobody(noisy, tmp_path):
    with pytest.raises(InputError, match=r"only 0 of \d+ photographs can be read, too few to judge by: "):
        noisy.answers(data=str(tmp_path))


def test_each_part_is_answered_by_a_head_trained_on_a_manifest_without_it(noisy, tmp_path):
    parts, answers = crossfit.parts(noisy.table, FOLDS, 0), noisy.answers()
    row = crossfit.head_round(noisy.saved, "fp32")
    for part in range(FOLDS):
        torch.manual_seed(row.seed)
        model = Recogniser("efficientnet_lite0", len(noisy.classes), 128)
        model.backbone.load_state_dict(noisy.saved.model.backbone.state_dict())
        torch.manual_seed(row.seed)
        model.head = nn.Linear(model.width, len(noisy.classes))
        shops = [dataclasses.replace(noisy, table=noisy.table[chosen]) for chosen in (parts != part, parts == part)]
        list(training.train(model, row, shops[0].source, None, tmp_path / str(part)))
        expected = predict(model, shops[1].source).set_axis(np.flatnonzero(parts == part))
        pd.testing.assert_frame_equal(answers.loc[expected.index], expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("fields", [{}, {"head": "subcenter_arcface", "margin_range": 0.2, "logit_adjustment": 1.0}])
def test_no_answer_depends_on_the_rows_own_label(noisy, fields):
    model = copy.copy(noisy.saved.model)
    model.head_options = {"kind": fields.get("head", "linear")}
    row = crossfit.head_round(noisy.saved, "fp32").model_copy(update={"epochs": 5} | fields)
    source, parts = noisy.source, crossfit.parts(noisy.table, FOLDS, 0)
    before = crossfit.out_of_fold(model, row, source, len(noisy.classes), parts)
    flipped, at = copy.copy(source), 17
    flipped.labels = source.labels.copy()
    flipped.labels[at] = (flipped.labels[at] + 3) % len(noisy.classes)
    after = crossfit.out_of_fold(model, row, flipped, len(noisy.classes), parts)
    own = before.filter(regex="pred|confidence").columns
    pd.testing.assert_frame_equal(after.loc[parts == parts[at], own], before.loc[parts == parts[at], own])
    assert after.loc[at, "loss"] != before.loc[at, "loss"]
    others = parts != parts[at]  # their heads were trained on it
    assert (after.loc[others, "confidence"] != before.loc[others, "confidence"]).mean() > 0.9


def test_memorised_labels_are_confirmed_in_sample_only(noisy, tmp_path):
    row = Round(name="overfitted", freeze="all", epochs=60, batch_size=32, lr=1e-2, image_size=128)
    model = copy.deepcopy(noisy.saved.model)
    list(training.train(model, row, noisy.source, None, tmp_path))
    judged = {"in-sample": predict(model, noisy.source), "cross-fitted": noisy.answers()}
    agree = {way: (answers["pred"] == answers["label"]).to_numpy() for way, answers in judged.items()}
    assert agree["in-sample"][noisy.wrong].mean() > 0.9
    assert agree["cross-fitted"][noisy.wrong].mean() < 0.3
    assert agree["cross-fitted"][~noisy.wrong].mean() > 0.5  # by chance an eighth


def test_classes_and_labels_are_those_of_the_table_whatever_the_model_knows(noisy):
    stranger = dataclasses.replace(noisy.saved, classes=noisy.classes.iloc[::-1].reset_index(drop=True)[:5])
    pd.testing.assert_frame_equal(noisy.answers(saved=stranger), noisy.answers())
    alone = noisy.table["class_id"] == noisy.classes["class_id"][0]
    table = noisy.table[~alone | ~alone.duplicated()].reset_index(drop=True)  # one class is down to one photograph
    answers = noisy.answers(table=table)
    assert (answers["pred"] != 0)[answers["label"] == 0].all()


def test_heads_are_of_the_models_kind():
    about = {"head": "cosine", "loss": "triplet", "freeze": "none", "images_per_class": 4, "augment": "strong"}
    row = Round(name="metric", samples_per_class=(2, 9), seed=7, triplet_weight=0.5, **about)
    saved = Saved(None, None, None, {"round": row.model_dump(mode="json")})
    made = crossfit.head_round(saved, "bf16")
    assert (made.head, made.loss, made.freeze, made.augment, made.seed) == ("cosine", "cross_entropy", "all", "none", 7)
    assert made.precision == "bf16"
    other = Saved(None, None, None, {"round": Round(name="focal", loss="focal", focal_gamma=1.5).model_dump()})
    assert (crossfit.head_round(other, "fp32").loss, crossfit.head_round(other, "fp32").focal_gamma) == ("focal", 1.5)
