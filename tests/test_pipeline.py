"""Rounds one after the other: nested, tabled, reused when finished, continued when cut off, scaled to small data."""

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from aliprod import InputError, assembly, catalogue, features, manifest, metrics, model, recipe, report, yardstick
from aliprod.images import Images
from entrypoints import main, train
from entrypoints.command import recipe_path
from tracking import models, pipeline, registry, rounds, steps
from tracking import runs as tracked

ROOT = Path(__file__).parents[1]
CLEAN = '\n[[clean]]\nname = "reliable"\nmodels = ["head"]\nmanifest = "train"\nleast = 3\n'
CLEAN += "min_judge_map = 0.0 # it has seen eight photographs of a class twice\nmax_dropped_share = 1.0\n"


@pytest.fixture
def recipes(row, tmp_path) -> str:
    """Two recipes: a round and a head from it; a cleaning by that head and a round on what it left."""
    head = {"name": "head", "init": "tiny", "freeze": "all", "reported": {"gap": 0.5, "map": 0.6}}
    first = recipe.to_toml(row) + recipe.to_toml(row.model_copy(update=head)) + CLEAN
    last = row.model_copy(update={"name": "last", "init": "first/tiny", "manifest": "first/reliable", "freeze": "all"})
    (tmp_path / "first.toml").write_text(first)
    (tmp_path / "second.toml").write_text(recipe.to_toml(last))
    return f"{tmp_path / 'first.toml'} {tmp_path / 'second.toml'}"


def run(recipes: str, data: Path, **given: object) -> None:
    defaults = {"scale": 1.0, "overrides": "", "promote": False, "minutes": 0.0, "work": Path("work")}
    main.main(**defaults | given, recipe=recipes, data=str(data))


def test_rounds_and_cleanings_run_in_order_under_one_parent(recipes, shop, store, tmp_path, capsys):
    run(recipes, shop)
    runs = {run.info.run_name: run for run in store.search_runs(["1"])}
    assert set(runs) == {"first+second", "first/tiny", "first/head", "first/reliable", "second/last"}
    parent = runs.pop("first+second")
    assert all(run.data.tags["mlflow.parentRunId"] == parent.info.run_id for run in runs.values())
    started = sorted(runs.values(), key=lambda run: run.info.start_time)
    assert [run.info.run_name for run in started] == ["first/tiny", "first/head", "first/reliable", "second/last"]
    table = pd.read_csv(store.download_artifacts(parent.info.run_id, "rounds.csv"))
    assert table["R"].tolist() == ["first/tiny", "first/head", "second/last"]
    best = table.loc[table["MAP"].idxmax()]  # the parent's own scores are the best round's, whichever came last
    assert (parent.data.metrics["gap"], parent.data.metrics["map"]) == (best["GAP"], best["MAP"])
    assert parent.data.tags["aliprod.classifier"] == best["Run"]
    curve = store.get_metric_history(parent.info.run_id, "rounds/map")
    assert [(point.step, point.value) for point in curve] == list(zip((1, 2, 4), table["MAP"], strict=True))
    for shown in table.to_dict("records"):
        found = runs[shown["R"]].data
        assert shown["Run"] == runs[shown["R"]].info.run_id
        assert (shown["GAP"], shown["MAP"]) == (found.metrics["gap"], found.metrics["map"])
        assert (shown["NCM"], shown["1-NN"]) == (found.metrics["ncm_accuracy"], found.metrics["nn_accuracy"])
    assert table["Reported MAP"].tolist()[1] == 0.6 and np.isnan(table["Reported MAP"][0])
    text = Path(store.download_artifacts(parent.info.run_id, "rounds.md")).read_text()
    assert text.splitlines()[0].startswith(
        "| R | Precision | Models | Loss | Opt | Freeze | Epochs | Base LR | LR_STEP |"
    )
    assert len(text.splitlines()) == 5
    shown = parent.data.tags["mlflow.note.content"].splitlines()
    assert shown[0].startswith("| R | Class Number | GAP | MAP |") and len(shown) == 5
    assert {file.path for file in store.list_artifacts(parent.info.run_id, "figures")} == {"figures/rounds.png"}
    saved = [model.load(models.fetch(table["Run"][number])).model for number in range(3)]
    assert len({model.weights_digest(one.backbone) for one in saved}) == 1  # both heads are on the first's extractor
    heads = {name: run.data.tags["aliprod.head"] for name, run in runs.items() if name != "first/reliable"}
    assert heads == {"first/tiny": "fresh", "first/head": "from init", "second/last": "from init"}
    kept = pd.read_csv(store.download_artifacts(runs["first/reliable"].info.run_id, "reliable.csv"))
    assert runs["second/last"].data.params["num_train"] == str(len(kept)) != runs["first/tiny"].data.params["num_train"]

    # What is finished is reused; what changed runs again, as does what stands on it; a round alone finds it all.
    before = {run.info.run_id for run in store.search_runs(["1"])}
    capsys.readouterr()
    run(recipes, shop)
    (again,) = [run for run in store.search_runs(["1"]) if run.info.run_id not in before]
    assert again.info.run_name == "first+second"
    assert capsys.readouterr().out.count("finished before, reused from run") == 4
    second = tmp_path / "second.toml"
    second.write_text(second.read_text().replace("epochs = 2", "epochs = 3"))
    before.add(again.info.run_id)
    run(recipes, shop)
    names = [run.info.run_name for run in store.search_runs(["1"]) if run.info.run_id not in before]
    assert sorted(names) == ["first+second", "second/last"]
    train.main(str(second), "", str(shop), "", "epochs=1", "", 0.0, Path("work"))
    assert store.search_runs(["1"])[0].data.params["num_train"] == str(len(kept))


def test_the_last_step_promotes_the_best_of_each_and_the_table_says_why(recipes, shop, store, monkeypatch, capsys):
    asked = []
    answers = yardstick.answers
    monkeypatch.setattr(yardstick, "answers", lambda *given: asked.append(given) or answers(*given))
    run(recipes, shop, promote=True)
    assert len(asked) == 3, "the promotion takes what the rounds logged of their extractors"
    runs = {run.info.run_name: run for run in store.search_runs(["1"])}
    parent = runs["first+second"].info.run_id
    assert runs["promote"].data.tags["mlflow.parentRunId"] == parent
    table = pd.read_csv(store.download_artifacts(parent, "rounds.csv"), keep_default_na=False).set_index("R")
    best = max(["first/tiny", "first/head", "second/last"], key=lambda name: runs[name].data.metrics["ncm_map"])
    said = f"promoted: best of 3 by nearest class mean MAP, {runs[best].data.metrics['ncm_map']:.4f}; "
    (where,) = np.flatnonzero(table["Extractor"] != "")
    (answering,) = np.flatnonzero(table["Classifier"] != "")
    assert table["Classifier"].iloc[answering].startswith("promoted: best of 3 by MAP as served, ")
    assert table["MAP"].iloc[answering] == pytest.approx(table["MAP"].max(), abs=1e-6)
    served = registry.champion(registry.CLASSIFIER)
    assert served.run_id == table["Run"].iloc[answering] == runs["first+second"].data.tags["aliprod.classifier"]
    own, round_ = runs["first+second"].data.metrics, store.get_run(served.run_id).data.metrics
    assert (own["gap"], own["map"]) == (round_["gap"], round_["map"])
    assert table["Extractor"].iloc[where] == said + "there is no champion yet"
    assert table["NCM"].iloc[where] == table["NCM"].max()  # several rounds may share the best extractor
    champion = registry.champion(registry.EXTRACTOR)
    assert champion.run_id == table["Run"].iloc[where]
    assert "there is no champion yet" in capsys.readouterr().out
    run(recipes, shop, promote=True)
    (again, _) = store.search_runs(["1"], "tags.mlflow.runName = 'first+second'")
    table = pd.read_csv(store.download_artifacts(again.info.run_id, "rounds.csv"), keep_default_na=False)
    (text,) = filter(None, table["Extractor"])
    assert text.startswith("refused: best of 3") and text.endswith("it is the champion")
    assert registry.champion(registry.EXTRACTOR).version == champion.version


def test_a_killed_pipeline_goes_on_to_the_result_of_one_that_was_not(recipes, shop, store, tmp_path, capsys):
    first = recipes.split()[0]
    given = {
        "recipe": first,
        "data": shop,
        "work": tmp_path / "work",
        "scale": 1,
        "minutes": 0,
        "promote": False,
        "overrides": "epochs=8",
    }
    options = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    for number in (signal.SIGTERM, signal.SIGKILL):
        before = {path.name for path in tmp_path.glob("work/runs/*/checkpoints/step-*")}
        process = subprocess.Popen(
            [sys.executable, "-m", "entrypoints.main", *options], cwd=ROOT, stderr=subprocess.PIPE, text=True
        )
        while process.poll() is None and before.issuperset(
            path.name for path in tmp_path.glob("work/runs/*/checkpoints/step-*")
        ):
            time.sleep(0.02)
        process.send_signal(number)
        said = process.communicate(timeout=60)[1].strip().splitlines()
        assert process.returncode == (130 if number == signal.SIGTERM else -9)
        assert number == signal.SIGKILL or said[-1] == "stopped; the same command goes on, and reuses what is finished"
    run(first, shop, work=tmp_path / "work", overrides="epochs=8")
    assert "first/tiny: goes on where run" in capsys.readouterr().out
    killed = [run for run in store.search_runs(["1"]) if run.info.status == "KILLED"]
    assert sorted(run.info.run_name for run in killed) == ["first", "first", "first/tiny", "first/tiny"]
    run(first, shop, work=tmp_path / "unstopped", overrides="epochs=8 max_corrupt_share=0.02")
    tables = [
        pd.read_csv(store.download_artifacts(found.info.run_id, "rounds.csv")).drop(columns="Run")
        for found in store.search_runs(["1"], "tags.mlflow.runName = 'first' and attributes.status = 'FINISHED'")
    ]
    assert len(tables) == 2
    pd.testing.assert_frame_equal(*tables)


def test_a_step_that_names_nothing_is_refused_before_anything_runs(recipes, shop, store):
    with pytest.raises(InputError, match="second/last: 'first/reliable' is no step before it, no finished one"):
        run(recipes.split()[1], shop)
    assert [run.info.run_name for run in store.search_runs(["1"])] == ["second"]


def test_two_recipes_of_one_name_are_refused(recipes, tmp_path):
    (tmp_path / "other").mkdir()
    shutil.copy(tmp_path / "first.toml", tmp_path / "other" / "first.toml")
    with pytest.raises(InputError, match="recipe: 'first' is the name of more than one"):
        pipeline.plan([recipe.read(path) for path in tmp_path.rglob("first.toml")])


def log_model(row, shop: Path, name: str) -> str:
    """Run id of an untrained model of the round `name`."""
    tables = assembly.tables(row, shop)
    network = assembly.model(row, len(tables.classes), "random")
    with tracked.start(name, Path("work"), {"recipe": "o'brien", "round": name, "data": tables.data_digest}) as run:
        network.save(run.folder / "model", tables.classes, tables.tree, {"run_id": run.id})
        run.model(run.folder / "model", manifest.paths(tables.val, shop)[0], step=1)
    return run.id


def test_newest_is_what_it_stands_for_as_an_init_and_as_a_judge(row, shop, store):
    judge = recipe.Cleaning(name="reliable", models=("newest",))
    with pytest.raises(InputError, match="'newest': no finished run has logged a model yet"):
        steps.resolve("newest", "first", "data", {})
    keys = []
    for seed, name in enumerate(("one", "two")):
        run_id = log_model(row.model_copy(update={"seed": seed}), shop, name)
        assert steps.resolve("newest", "first", "data", {}) == run_id
        keys.append(steps.key(judge, "data", ["train", run_id]))
        assert keys[-1] == steps.key(judge, "data", ["train", steps.resolve("newest", "first", "data", {})])
        job = rounds.Job("first", row.model_copy(update={"init": "newest"}), str(shop))
        saved = [models.load(source).model for source in (rounds.source_of(job, "data"), run_id)]
        assert len(set(map(model.weights_digest, saved))) == 1
    assert len(set(keys)) == 2
    assert steps.resolve("newest", "first", "data", {"newest": "pinned"}) == "pinned"


def test_a_round_is_found_in_a_recipe_whose_name_has_an_apostrophe(row, shop, store):
    run_id, data = log_model(row, shop, "r"), manifest.digest(manifest.read(shop, "train"))
    assert steps.resolve("r", "o'brien", data, {}) == run_id
    assert steps.resolve("o'brien/r", "another", data, {}) == run_id
    assert steps.resolve("r", "o_brien", data, {}) == "r"


def test_the_order_is_that_of_the_recipes_with_cleanings_when_first_asked_for():
    recipes = [recipe.read(recipe_path(name)) for name in ("baseline", "v1", "v2", "v3")]
    names = [f"{name}/{row.name}" for name, row in pipeline.plan(recipes)]
    assert names[6:] == ["v1/v1.1", "v1/v1.2", "v1/v1.3", "v2/reliable_train", "v2/v2", "v3/v3.1", "v3/v3.2", "v3/v3.3"]


def test_a_key_depends_on_row_data_and_sources_but_not_on_names(row):
    key = steps.key(row, "data", ["train", "random"])
    renamed = row.model_copy(update={"name": "other", "reported": {"gap": 1.0}})
    assert steps.key(renamed, "data", ["train", "random"]) == key
    changed = [
        steps.key(row.model_copy(update={"lr": 0.5}), "data", ["train", "random"]),
        steps.key(row, "other", ["train", "random"]),
        steps.key(row, "data", ["train", "imagenet"]),
        steps.key(row, "data", ["balanced", "random"]),
    ]
    assert len({key, *changed}) == 5


@pytest.mark.parametrize("freeze", ["none", "all"])
@pytest.mark.parametrize("scale", [1.0, 0.25, 1 / 64])
def test_scaling_fits_batches_epochs_and_classes(row, freeze, scale):
    fields = {"batch_size": 512, "epochs": 10, "lr_step": 4, "freeze": freeze}
    row = row.model_copy(update=fields | {"samples_per_class": (80, 100), "samples_quantile": (0.85, 1.0)})
    made = recipe.scaled(row, scale)
    assert recipe.override(made, "") == made  # still a valid round
    if scale == 1:
        assert made == row
        return
    assert made.samples_per_class is None and made.samples_quantile == (0.85, 1.0)
    assert made.batch_size == max(16, 512 * scale)
    assert made.epochs == (10 / scale if freeze == "all" else max(1, np.ceil(10 * scale)))
    assert made.lr_step / made.epochs == pytest.approx(0.4, abs=0.6 if freeze == "none" else 0.01)


def test_a_scale_out_of_range_is_refused(row):
    for scale in (0.0, -1.0, 1.5):
        with pytest.raises(InputError, match=r"scale .*: must be in \(0, 1\]"):
            recipe.scaled(row, scale)


@pytest.mark.parametrize("chunk", [7, 10_000])
def test_the_yardstick_is_nearest_mean_and_nearest_neighbour(row, shop, tmp_path, monkeypatch, chunk):
    from sklearn.neighbors import KNeighborsClassifier

    monkeypatch.setattr(yardstick, "CHUNK", chunk)
    gallery, queries = manifest.read(shop, "train"), manifest.read(shop, "val")
    gallery = gallery[gallery["class_id"] != "00003"].reset_index(drop=True)
    made = assembly.model(row, 8, "random").eval()
    answers = yardstick.answers(made, gallery, queries, shop, tmp_path, "fp32")
    embeddings = []
    for table in (gallery, queries[queries["class_id"] != "00003"]):
        images = Images(manifest.paths(table, shop), None, made.preprocessing)
        found = features.compute(made, images, tmp_path)
        vectors = found.store.take(found.codes)
        embeddings.append(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))
    stored, asked = embeddings
    labels = pd.factorize(gallery["class_id"], sort=True)[0]
    neighbour = KNeighborsClassifier(1, metric="cosine").fit(stored, labels)
    assert (answers["nn"].to_numpy() == neighbour.predict(asked)).all()
    means = np.stack([stored[labels == label].mean(axis=0) for label in range(7)])
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    assert (answers["ncm"].to_numpy() == (asked @ means.T).argmax(axis=1)).all()
    assert "00003" not in set(answers["class_id"]) and len(answers) == 14
    scores = yardstick.scores(answers)
    assert scores["nn_accuracy"] == pytest.approx(np.mean(answers["nn"] == answers["label"]))
    assert scores["ncm_map"] == metrics.mean_class_accuracy(answers["label"].to_numpy(), answers["ncm"].to_numpy())


def test_markdown_shows_numbers_and_gaps():
    table = pd.DataFrame({"R": ["a", "b"], "MAP": [0.5, np.nan], "Epochs": [3, 40]})
    assert report.markdown(table).splitlines() == [
        "| R | MAP | Epochs |",
        "| --- | ---: | ---: |",
        "| a | 0.5000 | 3 |",
        "| b |  | 40 |",
    ]


@pytest.mark.slow
def test_all_the_seeds_recipes_run_on_the_demo_catalogue(store, tmp_path):
    catalogue.render(tmp_path / "demo")
    overrides = "backbone=efficientnet_lite0 image_size=64"
    run("baseline v1 v2 v3", tmp_path / "demo", scale=0.25, overrides=overrides)
    parent = store.search_runs(["1"], "tags.mlflow.runName = 'baseline+v1+v2+v3'")[0]
    table = pd.read_csv(store.download_artifacts(parent.info.run_id, "rounds.csv"))
    assert len(table) == 13 and parent.info.status == "FINISHED"
    assert table[["GAP", "MAP", "NCM", "1-NN"]].notna().all(axis=None)
    wholes = table["R"].str.endswith((".3", "v2"))
    assert (table.loc[wholes, "Class Number"] == 36).all() and (table.loc[~wholes, "Class Number"] < 36).all()
    (cleaned,) = store.search_runs(["1"], "tags.mlflow.runName = 'v2/reliable_train'")
    assert cleaned.data.metrics["recall"] > 0  # it knows truth.csv; how much is found, the benchmarks measure
