"""Temperatures, reliability and unknown products: against slow oracles, and as a round leaves them in its model."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.optimize import minimize_scalar
from sklearn.calibration import calibration_curve
from sklearn.metrics import roc_auc_score
from torch.nn.functional import cross_entropy

from aliprod import (
    InputError,
    assembly,
    calibration,
    catalogue,
    features,
    manifest,
    metrics,
    model,
    prediction,
    recipe,
    reliability,
    report,
    training,
)
from aliprod.images import Images
from tracking import rounds, runs


def logits_and_labels(count: int, classes: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels drawn with the probabilities that the logits give: their temperature is 1."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(count, classes, generator=generator)
    return logits, torch.multinomial(logits.softmax(dim=1), 1, generator=generator)[:, 0]


def by_search(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """The temperature that a bounded search finds best by the definition."""
    logits = logits.double()
    smoothing = 1 / (len(labels) + 2)
    found = minimize_scalar(
        lambda log: cross_entropy(logits / np.exp(log), labels, label_smoothing=smoothing).item(),
        bounds=np.log(calibration.BOUNDS),
        method="bounded",
        options={"xatol": 1e-9},
    )
    return float(np.exp(found.x))


@pytest.mark.parametrize("factor", [0.05, 0.5, 1, 7])
@pytest.mark.parametrize(("count", "classes"), [(1, 3), (5, 2), (300, 60), (4000, 20)])
def test_newtons_temperature_is_what_a_search_finds(factor, count, classes):
    logits, labels = logits_and_labels(count, classes, seed=count)
    passes = 0

    def batches():
        nonlocal passes
        passes += 1
        return zip((factor * logits).split(7), labels.split(7), strict=True)

    assert calibration.temperature(batches) == pytest.approx(by_search(factor * logits, labels), rel=1e-3)
    assert passes <= (9 if count >= 300 else calibration.STEPS)


@pytest.mark.parametrize("factor", [0.2, 1, 5])
def test_the_temperature_of_scaled_logits_is_the_scale(factor):
    logits, labels = logits_and_labels(20_000, 30)
    found = calibration.temperature(lambda: [(factor * logits, labels)])
    assert found == pytest.approx(factor, rel=0.02)


def test_each_parts_temperature_is_fitted_on_the_others_whatever_the_batches():
    logits, labels = logits_and_labels(600, 10)
    parts = torch.arange(600) % 3
    logits *= 1 + parts[:, None]
    expected = [by_search(logits[parts != part], labels[parts != part]) for part in range(4)]
    for size in (1, 64, 600):
        chunks = [each.split(size) for each in (logits, labels, parts)]
        found = calibration.temperatures(lambda chunks=chunks: zip(*chunks, strict=True), 3)
        assert found == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("count", [1, 2, 30, 3000])
def test_all_right_or_all_wrong_stays_within_bounds(count):
    logits = logits_and_labels(count, 5)[0]
    right = calibration.temperature(lambda: [(logits, logits.argmax(dim=1))])
    wrong = calibration.temperature(lambda: [(logits, logits.argmin(dim=1))])
    assert calibration.BOUNDS[0] <= right < 5 and 50 < wrong <= calibration.BOUNDS[1]
    confidence = (logits / right).softmax(dim=1).amax(dim=1).mean()
    assert confidence < (count + 1) / (count + 2)  # no surer than the count allows
    assert calibration.temperature(lambda: []) == 1
    assert calibration.temperature(lambda: [(logits, logits.argmin(dim=1))], bounds=(0.5, 2)) == pytest.approx(2, 1e-3)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_logits_that_are_not_finite_are_refused(value):
    logits, labels = logits_and_labels(30, 5)
    logits[7, labels[7]] = value
    with pytest.raises(InputError, match="not finite"):
        calibration.temperature(lambda: [(logits, labels)])


@pytest.mark.parametrize("confidence", ["smooth", "tied", "equal", "sure"])
@pytest.mark.parametrize("count", [1, 2, 14, 500])
def test_calibration_error_and_bins_equal_slow_ones(confidence, count):
    rng = np.random.default_rng(count)
    values = {"smooth": rng.random(count), "tied": rng.integers(0, 5, count) / 4}
    values |= {"equal": np.full(count, 0.3), "sure": np.ones(count)}
    confidences = values[confidence].astype(np.float32)
    correct = rng.random(count) < confidences**2
    edges = np.quantile(confidences, np.linspace(0, 1, metrics.BINS + 1)[1:-1])
    slow: dict[int, list[int]] = {}
    for row, value in enumerate(confidences):
        slow.setdefault(sum(edge < value for edge in edges), []).append(row)
    expected = sum(abs(correct[rows].sum() - confidences[rows].sum(dtype=float)) for rows in slow.values()) / count
    order = rng.permutation(count)
    for rows in (slice(None), order):
        assert metrics.calibration_error(correct[rows], confidences[rows]) == pytest.approx(expected)
    table = metrics.reliability(correct, confidences)
    assert table["count"].tolist() == [len(slow[place]) for place in sorted(slow)]
    if confidence == "smooth" and count > 1:
        accuracy, mean = calibration_curve(correct, confidences, n_bins=metrics.BINS, strategy="quantile")
        np.testing.assert_allclose(table["accuracy"], accuracy)
        np.testing.assert_allclose(table["confidence"], mean, rtol=1e-6)


def test_calibration_error_of_nothing_is_zero():
    assert metrics.calibration_error(np.empty(0, dtype=bool), np.empty(0)) == 0


@pytest.mark.parametrize("levels", [3, 10**6])
@pytest.mark.parametrize(("known", "unknown"), [(1, 1), (30, 4), (200, 900)])
def test_auroc_is_scikit_learns(known, unknown, levels):
    rng = np.random.default_rng(known)
    ours, theirs = (rng.integers(0, levels, count) + shift for count, shift in ((known, levels // 3), (unknown, 0)))
    truth = np.repeat([1, 0], [known, unknown])
    assert metrics.auroc(ours, theirs) == pytest.approx(roc_auc_score(truth, np.concatenate([ours, theirs])))


def test_halves_go_by_the_key_and_are_even_in_every_class():
    counts = [1, 1, 2, 3, 8, 1]
    table = pd.DataFrame({"split": "val", "class_id": np.repeat([f"{i}" for i in range(6)], counts)})
    table["image_id"] = [f"{row}.jpg" for row in range(len(table))]
    halves = reliability.halves(table)
    per_class = pd.crosstab(table["class_id"], halves)
    assert (per_class[0] - per_class[1]).abs().max() <= 1 and halves.sum() == len(table) // 2
    order = np.random.default_rng(0).permutation(len(table))
    assert (reliability.halves(table.iloc[order]) == halves[order]).all()


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> Path:
    """A data folder of 12 classes with 8 val photographs each."""
    folder = tmp_path_factory.mktemp("data") / "many"
    shape = {"departments": 2, "categories": 1, "brands": 2, "products": 3}
    catalogue.render(folder, **shape, images=12, imbalance=2, val_images=8, size=96)
    return folder


def test_a_round_leaves_its_calibration_in_its_model(many, store, tmp_path):
    row = recipe.Round(name="tiny", freeze="all", epochs=15, batch_size=16, lr=1e-2, image_size=64, class_holdout=0.25)
    with runs.start("many/tiny", tmp_path / "work") as run:
        rounds.train(run, rounds.Job("many", row, str(many)), tmp_path / "work")
    saved = model.load(run.folder / "model")
    logged = store.get_run(run.id).data.metrics
    names = {"temperature", "unknown_below", "known_refused", "unknown_auroc", "unknown_accepted"}
    assert len(saved.classes) == 9 and set(saved.config["calibration"]) == names
    assert {name: logged[name] for name in names} == pytest.approx(saved.config["calibration"])
    assert logged["ece"] < logged["ece_before"] and logged["calibrated_loss"] < logged["loss"]
    assert logged["known_refused"] == pytest.approx(0.05, abs=0.05)
    assert logged["unknown_auroc"] > 0.5 and logged["coverage_classes"] == 0.75
    figures = {file.path for file in store.list_artifacts(run.id, "figures")}
    assert {"figures/reliability.png", "figures/unknown.png"} <= figures
    files = manifest.paths(manifest.read(many, "val"), many)
    images = Images(files, None, saved.model.preprocessing)
    answers = prediction.recognise(saved, files, using="head")
    raw = prediction.predict(saved.model, images)
    with torch.inference_mode():
        pixels = next(iter(images.batches([images.rows])))[0]
        expected = (saved.model(pixels) / saved.temperature).softmax(dim=1).amax(dim=1).numpy()
    first = answers["confidences"].str[0].to_numpy(dtype=float)
    np.testing.assert_allclose(first, expected, rtol=1e-4)
    ids = saved.classes["class_id"].to_numpy()[raw.filter(regex="^pred").to_numpy()]
    assert np.stack(answers["class_ids"].tolist()).tolist() == ids.tolist()  # T changes no answer
    assert answers["unknown"].tolist() == (first < saved.unknown_below).tolist()
    assert answers["unknown"].dtype == bool and answers["unknown"].any() and not answers["unknown"].all()


def test_what_people_read_of_an_evaluation_is_calibrated(many, tmp_path):
    row = recipe.Round(name="tiny", freeze="all", epochs=15, batch_size=16, lr=1e-2, image_size=64)
    tables = assembly.tables(row, many)
    made = assembly.model(row, len(tables.classes), "imagenet")
    source = assembly.inputs(made, row, tables.train, tables.classes, many, tmp_path, "none")
    list(training.train(made, row, source, None, tmp_path / "checkpoints"))
    found = report.evaluate(made, tables.classes, tables.val, many, tmp_path, tree=tables.tree)
    table = found.predictions.assign(confidence=found.predictions["calibrated"])
    assert (table["confidence"] - found.predictions["confidence"]).abs().max() > 0.01
    pd.testing.assert_frame_equal(
        found.reports["select_list.csv"](), metrics.select_list(table, tables.classes), check_dtype=False
    )
    wrong = table[table["label"] != table["pred"]].nlargest(20, "confidence")
    titles = [axes.get_title() for axes in found.reports["figures/mistakes.png"]().axes]
    assert [title.rpartition(", ")[2] for title in titles] == [f"{value:.0%}" for value in wrong["confidence"]]


def test_classes_held_out_are_drawn_by_seed_from_the_data_not_the_manifest(row, shop):
    whole = set(assembly.tables(row, shop).classes["class_id"])
    drawn = [
        whole - set(assembly.tables(row.model_copy(update=fields), shop).classes["class_id"])
        for fields in (
            {"class_holdout": 0.25},
            {"class_holdout": 0.25, "manifest": "balanced"},
            {"class_holdout": 0.25, "seed": 1},
        )
    ]
    assert [len(classes) for classes in drawn] == [2, 2, 2] and drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_a_handful_of_photographs_is_evaluated_too(row, shop, tmp_path, count):
    tables = assembly.tables(row, shop)
    made = assembly.model(row, len(tables.classes), "random").eval()
    val = tables.val.drop_duplicates("class_id").head(count)
    evaluation = report.evaluate(made, tables.classes, val, shop, tmp_path, tree=tables.tree)
    low, high = calibration.BOUNDS
    assert low <= evaluation.calibration.get("temperature", 1) <= high
    assert bool(evaluation.calibration) == (count > 1) and "unknown_auroc" not in evaluation.scores
    assert all(np.isfinite(value) for value in evaluation.scores.values())


def test_measures_are_of_the_other_half(monkeypatch):
    """Every number again, slowly, from logits that the head gives as they are."""
    logits, labels = logits_and_labels(400, 12)
    strangers = 0.5 * logits_and_labels(100, 12, seed=1)[0]
    known, unknown = (_Logits(4 * values) for values in (logits, strangers))
    known.labels = labels.numpy()
    table = pd.DataFrame(
        {"split": "val", "class_id": labels.numpy().astype(str), "image_id": np.arange(400).astype(str)}
    )
    found = reliability.measure(_Head(), known, unknown, table, "fp32")
    halves = reliability.halves(table)
    refused, accepted, auroc = [], [], []
    for half in (0, 1):
        other = halves != half
        temperature = by_search(4 * logits[other], labels[other])
        assert found.temperatures[halves == half] == pytest.approx(temperature, rel=1e-3)
        sure, unsure = ((4 * values / temperature).softmax(dim=1).amax(dim=1).numpy() for values in (logits, strangers))
        threshold = np.quantile(sure[other], 0.05)
        refused += (sure[~other] < threshold).tolist()
        accepted += (unsure >= threshold).tolist()
        truth = np.repeat([1, 0], [(~other).sum(), 100])
        auroc.append(roc_auc_score(truth, np.concatenate([sure[~other], unsure])))
    assert found.scores["known_refused"] == pytest.approx(np.mean(refused), abs=0.01)
    assert found.scores["known_refused"] == pytest.approx(0.05, abs=0.03)
    assert found.scores["unknown_accepted"] == pytest.approx(np.mean(accepted), abs=0.02)
    assert found.scores["unknown_auroc"] == pytest.approx(np.mean(auroc), abs=1e-3)
    whole = by_search(4 * logits, labels)
    assert found.scores["temperature"] == pytest.approx(whole, rel=1e-3)
    sure = (4 * logits / whole).softmax(dim=1).amax(dim=1).numpy()
    assert found.scores["unknown_below"] == pytest.approx(np.quantile(sure, 0.05), rel=1e-2)
    monkeypatch.setattr(reliability, "FITTED", 200)
    drawn = reliability.measure(_Head(), known, unknown, table, "fp32").scores["temperature"]
    assert drawn != found.scores["temperature"] and drawn == pytest.approx(4, rel=0.2)


class _Logits(features.Features):
    """Embeddings that are logits already."""

    def __init__(self, values: torch.Tensor):
        self.values, self.labels = values, None
        self.rows = np.arange(len(values))

    def batches(self, batches, epoch=0):
        for rows in batches:
            yield self.values[rows], rows


class _Head(torch.nn.Module):
    """A model whose head gives out what comes in."""

    device = torch.device("cpu")

    def __init__(self):
        super().__init__()
        self.head = torch.nn.Identity()
