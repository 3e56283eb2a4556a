"""Products are recognised from a few photographs, can be withdrawn again, and each time is a version of the model."""

import base64
import copy
import dataclasses
import functools
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
import scipy.optimize
import torch
from mlflow import MlflowClient

from aliprod import InputError, assembly, enrolment, features, manifest, model, recipe, taxonomy
from aliprod.gallery import USES, Gallery, Index
from aliprod.images import Images
from aliprod.model import Saved
from aliprod.prediction import recognise
from entrypoints import enroll, predict, rollback, withdraw
from tracking import models, registry, runs

ROOT = Path(__file__).parents[1]
ROW = recipe.Round(name="tiny", init="imagenet", backbone="efficientnet_lite0", image_size=96)
HELD = ("00003", "00006")  # never trained on
DEVICE = torch.device("cpu")


@dataclasses.dataclass(frozen=True)
class Shop:
    """A model of all but the held classes of `data` in `folder`, and what its gallery was made of."""

    data: Path
    folder: Path
    stored: features.Features
    val: features.Features

    def saved(self) -> Saved:
        return model.load(self.folder)

    def photographs(self, split: str = "train", classes: tuple[str, ...] = HELD) -> pd.DataFrame:
        table = manifest.read(self.data, split)
        table = table[table["class_id"].isin(classes)].reset_index(drop=True)
        return table.assign(file=manifest.paths(table, self.data), name="", path="")[enrolment.COLUMNS]


@pytest.fixture(scope="module")
def shop_(shop, tmp_path_factory) -> Shop:
    work = tmp_path_factory.mktemp("gallery")
    whole = taxonomy.read(shop / "product_tree.json")
    parts = [manifest.read(shop, split) for split in ("train", "val")]
    train, val = (table[~table["class_id"].isin(HELD)].reset_index(drop=True) for table in parts)
    classes = assembly.describe(manifest.class_index(train), whole)
    paths = dict(zip(classes["class_id"], classes["path"].str.split(" > "), strict=True))
    (work / "product_tree.json").write_text(json.dumps(paths))
    tree = taxonomy.read(work / "product_tree.json")  # which the held classes are not in
    made = assembly.model(ROW, len(classes), ROW.init).eval()
    given = (shop, work / "features", "fp32")
    gallery = enrolment.gallery(made, classes, *parts, *given)
    made.save(work / "model", classes, tree, {})
    gallery.save(work / "model")

    def embedded(table: pd.DataFrame) -> features.Features:
        images = Images(manifest.paths(table, shop), manifest.labels(table, classes), made.preprocessing)
        return features.compute(made, images, *given[1:])

    return Shop(shop, work / "model", embedded(train), embedded(val))


def embeddings(source: features.Features) -> np.ndarray:
    return source.store.take(source.codes)


def filled(saved: Saved, photographs: pd.DataFrame) -> Saved:
    return dataclasses.replace(saved, gallery=enrolment.enroll(saved, photographs)[0])


def slow(shop: Shop, new: dict[str, np.ndarray], asked: np.ndarray) -> np.ndarray:
    """Similarities (N, C + E) by the definitions, one class and one photograph at a time, in double precision."""
    vectors, labels = embeddings(shop.stored).astype(np.float64), shop.stored.labels
    directions = np.array([vector / np.linalg.norm(vector) for vector in vectors])
    groups = [directions[labels == label] for label in range(labels.max() + 1)]
    deviations = np.concatenate([group - group.mean(axis=0) for group in groups])
    within = deviations.T @ deviations / (len(directions) - len(groups))
    variances, axes = np.linalg.eigh(0.7 * within + 0.3 * np.trace(within) / len(within) * np.eye(len(within)))
    center = np.mean([group.mean(axis=0) for group in groups], axis=0)

    def place(vector: np.ndarray) -> np.ndarray:
        return (vector / np.linalg.norm(vector) - center) @ axes / np.sqrt(variances)

    spread = np.trace((axes / np.sqrt(variances)).T @ within @ (axes / np.sqrt(variances)))
    means = [np.mean([place(vector) for vector in group], axis=0) for group in groups]
    lengths = [mean @ mean - spread / len(group) for mean, group in zip(means, groups, strict=True)]
    noise = min(10, spread / np.mean(lengths))
    means += [np.mean([place(vector) for vector in group], axis=0) for group in new.values()]
    counts = [len(group) for group in (*groups, *new.values())]
    answers = np.empty((len(asked), len(means)))
    for row, vector in enumerate(asked):
        for column, (mean, count) in enumerate(zip(means, counts, strict=True)):
            cosine = place(vector) @ mean / np.linalg.norm(place(vector)) / np.linalg.norm(mean)
            answers[row, column] = cosine * np.sqrt(1 + noise / count)
    return answers


def test_probabilities_are_those_of_a_slow_implementation_and_sum_to_1(shop_):
    saved = shop_.saved()
    new = {class_id: embed(saved, shop_.photographs(classes=(class_id,))) for class_id in HELD}
    gallery = filled(saved, shop_.photographs()).gallery
    asked = embeddings(shop_.val)
    expected = slow(shop_, new, asked)
    np.testing.assert_allclose(gallery.similarities(torch.from_numpy(asked)), expected, atol=2e-3)
    logits = torch.randn(len(asked), 6, generator=torch.Generator().manual_seed(0))
    head = logits.softmax(dim=1).numpy()
    shares = np.exp(gallery.scale * expected)
    shares /= shares.sum(axis=1, keepdims=True)
    for row, probabilities in enumerate(gallery.fused(torch.from_numpy(asked), logits).exp().numpy()):
        assert probabilities.sum() == pytest.approx(1, abs=1e-5)
        for label in range(6):
            assert probabilities[label] == pytest.approx(shares[row, :6].sum() * head[row, label], abs=0.01)
        assert probabilities[6:] == pytest.approx(shares[row, 6:], abs=0.01)
    alone = gallery.alone(torch.from_numpy(asked), logits).exp().numpy()
    np.testing.assert_allclose(alone, shares, atol=0.01)


def embed(saved: Saved, photographs: pd.DataFrame) -> np.ndarray:
    ((batch, _),) = Images(photographs["file"].tolist(), None, saved.model.preprocessing).batches(
        [np.arange(len(photographs))]
    )
    with torch.inference_mode():
        return saved.model.embed(batch).numpy()


def test_the_scale_makes_vals_labels_likeliest(shop_):
    gallery = shop_.saved().gallery
    similarities = gallery.similarities(torch.from_numpy(embeddings(shop_.val))).double()
    labels = torch.from_numpy(shop_.val.labels)

    def loss(scale: float) -> float:
        return torch.nn.functional.cross_entropy(scale * similarities, labels).item()

    best = scipy.optimize.minimize_scalar(loss, bounds=(1, 1000), method="bounded")
    assert loss(gallery.scale) < best.fun + 0.05 < loss(1) - 0.1  # of so few labels calibration is wary


@pytest.mark.parametrize("repeats", [1, 3])
def test_one_photograph_a_class_is_enough_however_often_it_is_listed(shop_, repeats):
    one, saved = copy.copy(shop_.stored), shop_.saved()
    first = np.unique(one.labels, return_index=True)[1]
    one.rows = np.repeat(first, repeats)
    gallery = enrolment.of_embeddings(one, shop_.val, saved.classes, saved.model.width, DEVICE)
    directions = torch.nn.functional.normalize(torch.from_numpy(one.store.take(one.codes[first])))
    places = torch.nn.functional.normalize(directions - directions.mean(dim=0))
    torch.testing.assert_close(gallery.prototypes, places, atol=1e-3, rtol=0)  # no spread: nothing is whitened
    assert 1 < gallery.scale < 1000 and gallery.scale != pytest.approx(1000**0.5, rel=1e-4)


def test_the_scale_is_fitted_to_all_classes_even_where_faiss_finds_a_few(shop_, monkeypatch):
    saved = shop_.saved()
    monkeypatch.setattr("aliprod.gallery.NEAREST", 2)
    monkeypatch.setattr(enrolment, "Gallery", functools.partial(Gallery, exact=4))
    made = enrolment.of_embeddings(shop_.stored, shop_.val, saved.classes, saved.model.width, DEVICE)
    assert made.index(DEVICE).faiss and made.scale == pytest.approx(saved.gallery.scale, rel=1e-3)


def test_a_class_never_trained_on_is_recognised_and_one_trained_on_still(shop_):
    saved = shop_.saved()
    photographs = shop_.photographs().groupby("class_id").head(8)
    began = time.process_time()
    taught = filled(saved, photographs)
    assert time.process_time() - began < 4  # processor seconds of two classes
    truth = manifest.read(shop_.data, "val")
    answers = recognise(taught, manifest.paths(truth, shop_.data), using="both")
    right = answers["class_ids"].str[0] == truth["class_id"]
    new = truth["class_id"].isin(HELD)
    assert right[new].mean() >= 0.75
    before = recognise(saved, manifest.paths(truth, shop_.data))
    assert not before["class_ids"].explode().isin(HELD).any()
    pd.testing.assert_frame_equal(before, recognise(saved, manifest.paths(truth, shop_.data), using="head"))
    by_gallery = recognise(taught, manifest.paths(truth, shop_.data), using="gallery")
    assert (by_gallery["class_ids"].str[0] == truth["class_id"])[new].mean() >= 0.75
    pd.testing.assert_frame_equal(before, recognise(taught, manifest.paths(truth, shop_.data), using="head"))


def test_enrolling_again_changes_nothing_and_more_photographs_refine(shop_):
    saved, photographs = shop_.saved(), shop_.photographs()
    once = filled(saved, photographs)
    again, table = enrolment.enroll(once, pd.concat([photographs, photographs]), "another run")
    assert (table["outcome"] == "known").all()
    pd.testing.assert_frame_equal(again.enrolled, once.gallery.enrolled)
    assert torch.equal(again.places, once.gallery.places)
    few = filled(saved, photographs.groupby("class_id").head(2))
    more, table = enrolment.enroll(few, photographs)
    assert table["outcome"].value_counts().to_dict() == {"enrolled": len(photographs) - 4, "known": 4}
    assert not torch.allclose(few.gallery.prototypes, more.prototypes)
    pd.testing.assert_frame_equal(more.enrolled, once.gallery.enrolled)
    torch.testing.assert_close(more.prototypes, once.gallery.prototypes, atol=1e-4, rtol=0)


def test_neither_order_nor_batches_matter(shop_, monkeypatch):
    saved, photographs = shop_.saved(), shop_.photographs()
    expected = filled(saved, photographs).gallery
    monkeypatch.setattr(enrolment, "BATCH_SIZE", 3)
    monkeypatch.setattr(enrolment, "CHUNK", 7)
    shuffled = filled(saved, photographs.sample(frac=1, random_state=0)).gallery
    pd.testing.assert_frame_equal(shuffled.enrolled, expected.enrolled)
    torch.testing.assert_close(shuffled.prototypes, expected.prototypes, atol=1e-4, rtol=0)
    pieces = enrolment.of_embeddings(shop_.stored, shop_.val, saved.classes, saved.model.width, DEVICE)
    torch.testing.assert_close(pieces.prototypes, saved.gallery.prototypes, atol=2e-3, rtol=0)
    assert pieces.scale == pytest.approx(saved.gallery.scale, rel=1e-3)


def test_what_is_withdrawn_leaves_no_trace(shop_, tmp_path):
    saved, photographs = shop_.saved(), shop_.photographs()
    files = manifest.paths(manifest.read(shop_.data, "val"), shop_.data)
    one = photographs[photographs["class_id"] == HELD[0]]
    first = filled(saved, one)
    both = filled(first, photographs)
    gallery, gone = enrolment.withdraw(both, [HELD[1]], [])
    assert set(gone["class_id"]) == {HELD[1]}
    for using in USES:
        left = recognise(dataclasses.replace(both, gallery=gallery), files, using=using)
        pd.testing.assert_frame_equal(left, recognise(first, files, using=using), check_exact=True)
    copy = tmp_path / "the same bytes.jpg"
    shutil.copy(one["file"].iloc[0], copy)
    fewer, gone = enrolment.withdraw(first, [], [str(copy)])
    assert len(gone) == 1 and len(fewer.enrolled) == len(one) - 1
    pd.testing.assert_frame_equal(fewer.enrolled, filled(saved, one.iloc[1:]).gallery.enrolled)
    empty, _ = enrolment.withdraw(first, [HELD[0]], [])
    nothing = recognise(dataclasses.replace(first, gallery=empty), files)
    pd.testing.assert_frame_equal(nothing, recognise(saved, files), check_exact=True)
    for given in (["00000"], []), ([], [files[0]]), ([], ["nowhere.jpg"]):
        with pytest.raises(InputError, match="00000.*no photograph|not enrolled|No such file"):
            enrolment.withdraw(first, *given)


def test_a_gallery_is_saved_without_pickles_and_read_again(shop_, tmp_path):
    taught = filled(shop_.saved(), shop_.photographs().assign(name='Téa, "green"', path=""))
    shutil.copytree(shop_.folder, tmp_path / "model")
    taught.gallery.save(tmp_path / "model")
    again = model.load(tmp_path / "model")
    files = manifest.paths(manifest.read(shop_.data, "val"), shop_.data)
    for using in USES:
        found, expected = (recognise(one, files, using=using) for one in (again, taught))
        pd.testing.assert_frame_equal(found, expected, check_exact=True)
    assert {file.suffix for file in (tmp_path / "model").iterdir()} == {".json", ".csv", ".safetensors"}
    twice, table = enrolment.enroll(again, shop_.photographs())
    assert (table["outcome"] == "known").all() and twice.enrolled.equals(again.gallery.enrolled)


def test_a_trained_class_learns_from_more_photographs(shop_):
    saved = shop_.saved()
    more = shop_.photographs("val", ("00000",))
    gallery, _ = enrolment.enroll(saved, more)
    assert gallery.new.empty and len(gallery.prototypes) == 6
    expected = enrolment.of_embeddings(shop_.stored, shop_.val, saved.classes, saved.model.width, DEVICE)
    places = expected.means[0].float() * expected.counts[0] + gallery.places.float().sum(dim=0)
    cosine = torch.nn.functional.cosine_similarity(gallery.prototypes[0], places, dim=0)
    assert cosine.item() == pytest.approx(1, abs=1e-4)
    torch.testing.assert_close(gallery.prototypes[1:], saved.gallery.prototypes[1:])
    taught = dataclasses.replace(saved, gallery=gallery)
    files = more["file"].tolist()
    pd.testing.assert_frame_equal(recognise(taught, files), recognise(saved, files, using="head"))
    assert recognise(taught, files, using="gallery")["class_ids"].str[0].eq("00000").all()
    with pytest.raises(InputError, match="class '00000' is known, its name is '.+' and not 'Else'"):
        enrolment.enroll(saved, more.assign(name="Else"))


def test_an_enrolled_class_stands_in_the_tree(shop_):
    saved = shop_.saved()
    sibling = saved.classes["path"].iloc[0].split(" > ")
    path = " > ".join([*sibling[:-1], "Newcomer"])
    photographs = shop_.photographs(classes=HELD[:1]).assign(name="Newcomer", path=path)
    taught = filled(saved, pd.concat([photographs, shop_.photographs(classes=HELD[1:])]))
    files = photographs["file"].tolist()
    answers = recognise(taught, files, sure=0.0)
    assert answers["names"].str[0].eq("Newcomer").mean() > 0.7
    named = answers[answers["class_ids"].str[0] == HELD[0]]
    assert (named["answer"] == path).all()
    np.testing.assert_allclose(named["certainty"], named["confidences"].str[0], atol=1e-6)
    surer = recognise(taught, files, sure=1.0)["answer"]
    assert surer.isin(["", *(" > ".join(path.split(" > ")[:depth]) for depth in range(1, 9))]).all()
    nameless = recognise(taught, shop_.photographs("val", HELD[1:])["file"].tolist())
    assert nameless["answer"].eq(HELD[1]).any()


def test_a_class_that_the_tree_knows_is_called_as_there(shop_):
    tree = taxonomy.read(shop_.data / "product_tree.json")
    saved, photographs = dataclasses.replace(shop_.saved(), tree=tree), shop_.photographs()
    new = filled(saved, photographs).gallery.new
    pd.testing.assert_frame_equal(new[["name", "path"]], tree.describe(new["class_id"]))
    answers = recognise(filled(saved, photographs), photographs["file"].tolist())
    right = answers["class_ids"].str[0] == photographs["class_id"]
    assert right.any() and (answers["answer"] == answers["paths"].str[0]).all()
    with pytest.raises(InputError, match="class '00003' is known, its path is '.+' and not 'Else'"):
        enrolment.enroll(saved, photographs.assign(path="Else"))
    pathed = shop_.photographs(classes=HELD[:1]).assign(path="Drinks > Tea")
    assert filled(shop_.saved(), pathed).gallery.new["name"].tolist() == ["Tea"]


def test_a_grown_tree_is_that_read_with_all_its_classes(tmp_path):
    paths = {"1": ["Fruit", "Apple", "Gala"], "2": ["Fruit", "Pear"], "3": ["Milk", "Oat"]}
    more = {"4": ["Fruit", "Apple", "Fuji"], "5": ["Milk", "Sour", "Filmjölk"], "6": ["Bread"]}
    for name, table in {"old": paths, "all": paths | more}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(table))
    added = pd.DataFrame({"class_id": [*more, "7"], "path": [*(" > ".join(path) for path in more.values()), ""]})
    grown = taxonomy.read(tmp_path / "old.json").grown(added)
    expected = taxonomy.read(tmp_path / "all.json")
    ids = pd.Series([*paths, *more, "7"])
    pd.testing.assert_frame_equal(grown.describe(ids), expected.describe(ids))
    np.testing.assert_array_equal(grown.levels(ids).ancestors, expected.levels(ids).ancestors)


def test_faiss_finds_what_comparing_all_finds(shop_, tmp_path):
    rng = torch.Generator().manual_seed(0)
    families = torch.randn(60, 32, generator=rng)[torch.randint(60, (3000,), generator=rng)]
    vectors = torch.nn.functional.normalize(families + 0.5 * torch.randn(3000, 32, generator=rng))
    asked = torch.nn.functional.normalize(vectors[::30] + 0.1 * torch.randn(100, 32, generator=rng))
    exact, near = Index(vectors), Index(vectors, exact=1000)
    assert not exact.faiss and near.faiss
    similarities, rows = exact.search(asked, 10)
    found, near_rows = near.search(asked, 10)
    assert (near_rows[:, 0] == rows[:, 0]).float().mean() > 0.98
    recall = np.mean([np.isin(a, b).mean() for a, b in zip(rows, near_rows, strict=True)])
    assert recall > 0.97
    torch.testing.assert_close(found[:, 0], similarities[:, 0], atol=2e-3, rtol=0)
    scores, all_scores = near.scores(asked), exact.scores(asked)
    kept = scores.isfinite()
    assert scores.shape == (100, 3000) and (kept.sum(dim=1) == 256).all()
    torch.testing.assert_close(scores[kept], all_scores[kept], atol=2e-3, rtol=0)
    missed = 1 - ((30 * scores).logsumexp(dim=1) - (30 * all_scores).logsumexp(dim=1)).exp()
    assert missed.max() < 0.05
    near.save(tmp_path / "gallery.faiss")
    again = Index(vectors, exact=1000, path=tmp_path / "gallery.faiss")
    assert torch.equal(again.scores(asked), scores)
    few = Index(vectors[:40], exact=10)
    assert few.search(asked, 100)[0].shape == (100, 40)


def test_a_gallery_of_very_many_answers_as_one_of_few(shop_, tmp_path):
    taught = filled(shop_.saved(), shop_.photographs())
    many = dataclasses.replace(taught.gallery, exact=4)
    asked = torch.from_numpy(embeddings(shop_.val))
    logits = torch.zeros(len(asked), 6)
    for answer in ("alone", "fused"):
        found, expected = (getattr(gallery, answer)(asked, logits).exp() for gallery in (many, taught.gallery))
        torch.testing.assert_close(found, expected, atol=0.02, rtol=0)
    many.save(tmp_path)
    assert (tmp_path / "gallery.faiss").exists()
    again = dataclasses.replace(Gallery.load(tmp_path, taught.classes), exact=4)
    assert torch.equal(again.alone(asked, logits), many.alone(asked, logits))
    taught.gallery.save(tmp_path)
    assert not (tmp_path / "gallery.faiss").exists()


def test_photographs_that_cannot_be_read_are_named_and_left_out(shop_, tmp_path):
    saved, photographs = shop_.saved(), shop_.photographs(classes=HELD[:1])
    (tmp_path / "bad.jpg").write_bytes(b"not an image")
    bad = pd.DataFrame({"file": [str(tmp_path / "bad.jpg"), "nowhere.jpg"], "class_id": "new", "name": "", "path": ""})
    gallery, table = enrolment.enroll(saved, pd.concat([bad, photographs]))
    assert table["outcome"].tolist()[:2] == ["not an image but text", "No such file or directory"]
    assert gallery.classes["class_id"].tolist()[6:] == [HELD[0]]
    with pytest.raises(InputError, match="none of the 2 photographs can be read; .*bad.jpg: not an image"):
        enrolment.enroll(saved, bad)


def test_what_cannot_be_meant_is_refused(shop_, tmp_path):
    saved, photographs = shop_.saved(), shop_.photographs()
    with pytest.raises(InputError, match="cannot be enrolled as 00003 and else"):
        enrolment.enroll(
            saved,
            pd.concat(
                [photographs, photographs.tail(1).assign(class_id="else").assign(file=photographs["file"].iloc[0])]
            ),
        )
    with pytest.raises(InputError, match="cannot be enrolled as 00003 and else"):
        enrolment.enroll(filled(saved, photographs), photographs.head(1).assign(class_id="else"))
    with pytest.raises(InputError, match="class_id is missing"):
        enrolment.enroll(saved, photographs.assign(class_id=""))
    with pytest.raises(InputError, match="using 'all': must be head, gallery, both"):
        recognise(saved, [], using="all")
    bare = dataclasses.replace(saved, gallery=None)
    with pytest.raises(InputError, match="without one; train its round again"):
        recognise(bare, [], using="gallery")
    with pytest.raises(InputError, match="without a gallery; train its round again"):
        enrolment.enroll(bare, photographs)
    assert len(recognise(bare, [], using="both")) == 0
    (tmp_path / "table.csv").write_text("file,class\nx.jpg,1\n")
    (tmp_path / "loose.jpg").write_bytes(b"")
    for images, class_id, name, message in (
        (tmp_path / "table.csv", "", "", "no column class_id; found file, class"),
        (tmp_path, "", "", "loose.jpg: in no subfolder"),
        (tmp_path / "loose.jpg", "", "", "a subfolder a class, a .csv, or class_id too"),
        (tmp_path, "", "Tea", "name, path: they are of one class"),
        (tmp_path / "none.jpg", "9", "", "no such file"),
    ):
        with pytest.raises(InputError, match=message):
            enrolment.listed(str(images), class_id, name)


def test_photographs_are_listed_from_folders_tables_and_files(shop, tmp_path):
    folder = enrolment.listed(str(shop / "train"))
    expected = manifest.read(shop, "train")
    assert sorted(folder["class_id"]) == sorted(expected["class_id"])
    assert set(folder["file"]) == set(manifest.paths(expected, shop))
    table = folder.head(3).assign(file=[os.path.relpath(file, tmp_path) for file in folder["file"].head(3)], name="N")
    table.to_csv(tmp_path / "table.csv", index=False)
    listed = enrolment.listed(str(tmp_path / "table.csv"))
    assert [Path(file).resolve() for file in listed["file"]] == [Path(file) for file in folder["file"].head(3)]
    assert listed["name"].eq("N").all() and list(listed) == enrolment.COLUMNS
    one = enrolment.listed(folder["file"][0], "42", "Tea", "Drinks > Tea")
    assert one.to_numpy().tolist() == [[folder["file"][0], "42", "Tea", "Drinks > Tea"]]


@pytest.fixture
def logged(shop_, store, tmp_path, monkeypatch) -> str:
    """Run id of the model, logged twice over and champion of the registry the second time."""
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    example = shop_.photographs()["file"][0]
    for _ in range(2):
        with runs.start("round", Path("work")) as run:
            shutil.copytree(shop_.folder, run.folder / "model")
            run.model(run.folder / "model", example, step=1)
        (output,) = store.get_run(run.id).outputs.model_outputs
        for name in registry.NAMES:
            over = registry.champion(name)
            assert registry.crown(name, output.model_id, over, {"round": "tiny"}, "", Path("work"))
    return run.id


CHAMPION = f"models:/{registry.CLASSIFIER}@champion"


def aliases() -> dict[str, dict[str, int]]:
    client = MlflowClient()
    found = {name: client.get_registered_model(name).aliases for name in (registry.EXTRACTOR, registry.CLASSIFIER)}
    return {name: {alias: int(version) for alias, version in one.items()} for name, one in found.items()}


def test_an_enrolment_is_the_champions_next_version(shop_, logged, store, capsys, tmp_path):
    assert aliases()[registry.CLASSIFIER] == {"champion": 2, "previous": 1}
    photographs = shop_.photographs()
    for class_id, rows in photographs.groupby("class_id"):
        (tmp_path / "new" / class_id).mkdir(parents=True)
        for file in rows["file"]:
            shutil.copy(file, tmp_path / "new" / class_id)
    (tmp_path / "new" / HELD[0] / "bad.jpg").write_bytes(b"")
    enroll.main(CHAMPION, str(tmp_path / "new" / HELD[0]), HELD[0], "Tea", "Drinks > Tea", Path("work"))
    said = capsys.readouterr().out
    assert "bad.jpg: the file is empty" in said and f"model: models:/{registry.CLASSIFIER}/3" in said
    assert aliases() == {registry.EXTRACTOR: {"champion": 2, "previous": 1},
                         registry.CLASSIFIER: {"champion": 3, "previous": 1}}  # fmt: skip
    version = store.get_model_version(registry.CLASSIFIER, "3")
    assert version.tags["aliprod.line"] == "2" and version.tags["aliprod.enrolled"] == "1"
    (output,) = store.search_runs(["1"], max_results=1)[0].outputs.model_outputs
    assert version.tags["aliprod.round"] == "tiny" and version.tags["aliprod.model"] == output.model_id

    enroll.main(CHAMPION, str(tmp_path / "new"), "", "", "", Path("work"))
    assert aliases()[registry.CLASSIFIER]["champion"] == 4
    enroll.main(CHAMPION, str(tmp_path / "new"), "", "", "", Path("work"))
    assert f"model: {CHAMPION}, as it was" in capsys.readouterr().out
    with pytest.raises(
        InputError, match="version 3 of aliprod-classifier was followed by 4.*models:/aliprod-class.*/4"
    ):
        enroll.main(f"models:/{registry.CLASSIFIER}/3", str(tmp_path / "new" / HELD[1]), "x", "", "", Path("work"))
    assert [int(one.version) for one in store.search_model_versions(f"name = '{registry.CLASSIFIER}'")] == [4, 3, 2, 1]

    asked = shop_.photographs("val")
    predict.main(CHAMPION, " ".join(asked["file"]), 3, 0.0, "both", tmp_path / "out.csv", Path("work"))
    found = pd.read_csv(tmp_path / "out.csv", dtype=str)
    assert (found["class_id"] == asked["class_id"]).mean() >= 0.75
    assert found["name"][found["class_id"] == HELD[0]].eq("Tea").all()
    check_served_elsewhere(asked["file"].tolist(), tmp_path)

    rollback.main("", Path("work"))
    assert aliases() == {name: {"champion": 1, "previous": 1} for name in aliases()}
    carried = f"models:/{registry.CLASSIFIER}/4"
    enroll.main(CHAMPION, carried, "", "", "", Path("work"))  # what was enrolled on the one on the other
    grown = aliases()[registry.CLASSIFIER]["champion"]
    assert grown > 4
    galleries = [models.load(name).gallery.enrolled.drop(columns=["run", "file"]) for name in (CHAMPION, carried)]
    pd.testing.assert_frame_equal(*galleries)

    withdraw.main(CHAMPION, HELD[0], "", Path("work"))
    shrunk = aliases()[registry.CLASSIFIER]["champion"]
    assert shrunk > grown
    assert models.load(CHAMPION).gallery.new["class_id"].tolist() == [HELD[1]]
    withdraw.main("newest", "", str(tmp_path / "new" / HELD[1]), Path("work"))
    assert models.load("newest").gallery.enrolled.empty
    assert aliases()[registry.CLASSIFIER]["champion"] == shrunk  # what was named was no registered version


def check_served_elsewhere(files: list[str], folder: Path) -> None:
    """Another process, without this checkout, gives the answers that this one gives."""
    expected = recognise(models.load(CHAMPION), files, top=2, using="gallery")
    images = [base64.b64encode(Path(file).read_bytes()).decode() for file in files]
    (folder / "images.json").write_text(json.dumps(images))
    code = f"""
import json, mlflow, pandas
images = json.load(open("images.json"))
model = mlflow.pyfunc.load_model("{CHAMPION}")
answers = model.predict(pandas.DataFrame({{"image": images}}), params={{"top": 2, "using": "gallery"}})
answers.to_json("answers.json", orient="records")
"""
    environment = os.environ | {"PYTHONPATH": "", "MLFLOW_TRACKING_URI": mlflow.get_tracking_uri()}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=folder, env=environment)
    found = pd.DataFrame(json.loads((folder / "answers.json").read_text()))
    assert found["class_ids"].tolist() == expected["class_ids"].tolist()
    np.testing.assert_allclose(found["confidences"].tolist(), expected["confidences"].tolist(), atol=1e-4)


def test_a_round_leaves_a_gallery_of_its_classes(shop, store, tmp_path):
    from entrypoints import train

    small = ROW.model_copy(
        update={"backbone": "test_resnet", "init": "random", "epochs": 1, "samples_quantile": (0.5, 1.0)}
    )
    (tmp_path / "small.toml").write_text(recipe.to_toml(small))
    given = {"round": "", "init": "", "overrides": "", "resume": "", "minutes": 0.0, "work": Path("work")}
    train.main(recipe=str(tmp_path / "small.toml"), data=str(shop), **given)
    saved = models.load("newest")
    table = manifest.read(shop, "train")
    counts = table["class_id"].value_counts().reindex(saved.classes["class_id"])
    assert 2 <= len(saved.classes) < 8 and saved.gallery.counts.tolist() == counts.tolist()
    files = manifest.paths(manifest.read(shop, "val"), shop)
    assert recognise(saved, files, using="gallery")["class_ids"].explode().isin(saved.classes["class_id"]).all()
