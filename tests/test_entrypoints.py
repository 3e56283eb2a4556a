"""The commands people type, run for real: what they leave in the store, and what they say to a mistake."""

import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch

from aliprod import assembly, manifest, model, recipe, training
from entrypoints import clean, evaluate, predict, prepare, send, train
from entrypoints.command import command
from tracking import models, rounds

ROOT = Path(__file__).parents[1]


@pytest.fixture
def tiny(row, tmp_path) -> Path:
    """A recipe of two small rounds, the second from the first."""
    second = row.model_copy(update={"name": "second", "init": "tiny", "freeze": "all", "epochs": 1})
    path = tmp_path / "small.toml"
    path.write_text(recipe.to_toml(row) + recipe.to_toml(second))
    return path


def arguments(**given: object) -> dict:
    defaults = {
        "recipe": "demo",
        "round": "",
        "data": "demo",
        "init": "",
        "overrides": "",
        "resume": "",
        "minutes": 0.0,
    }
    return defaults | {"work": Path("work")} | given


def options(**given: object) -> list[str]:
    return [word for name, value in given.items() for word in (f"--{name}", str(value))]


def test_mlflow_run_trains_a_round_end_to_end(tiny, shop, store, tmp_path):
    parameters = {"recipe": tiny, "data": shop, "work": tmp_path / "work", "overrides": "epochs=3 lr=2e-3"}
    pairs = [word for name, value in parameters.items() for word in ("-P", f"{name}={value}")]
    command = ["mlflow", "run", str(ROOT), "-e", "train", "--env-manager", "local", "--experiment-name", "shop", *pairs]
    done = subprocess.run([sys.executable, "-m", *command], check=True, capture_output=True, text=True)
    (run,) = store.search_runs([store.get_experiment_by_name("shop").experiment_id])
    assert run.info.status == "FINISHED" and run.info.run_name == "small/tiny"
    assert f"run:       {run.info.run_id}" in done.stdout
    assert run.data.params["round.lr"] == "0.002" and run.data.params["num_classes"] == "8"
    assert run.data.tags["aliprod.data"] == manifest.digest(manifest.read(shop, "train"))
    assert len(store.get_metric_history(run.info.run_id, "val/map")) == 3
    steps = store.get_metric_history(run.info.run_id, "step/loss")
    assert [metric.step for metric in steps] == list(range(1, len(steps) + 1))
    names = {file.path for file in store.list_artifacts(run.info.run_id)}
    assert names >= {"per_class.csv", "predictions.parquet", "select_list.csv", "recipe.toml", "figures"}
    figures = {Path(file.path).stem for file in store.list_artifacts(run.info.run_id, "figures")}
    assert figures == {"curves", "map_by_frequency", "confusion", "mistakes", "reliability", "trade_off", "tree"}
    folder = tmp_path / "work" / "runs" / run.info.run_id
    assert not (folder / "refused.jsonl").exists() and not (folder / "checkpoints").exists()
    per_class = pd.read_csv(folder / "artifacts" / "per_class.csv", dtype={"class_id": str})
    assert per_class["accuracy"].mean() == pytest.approx(run.data.metrics["map"])
    assert per_class["path"].str.count(" > ").eq(3).all()
    assert recipe.read(folder / "artifacts" / "recipe.toml").row("tiny").epochs == 3


def test_the_rounds_follow_one_another_and_are_evaluated_and_used(tiny, shop, store, tmp_path, capsys):
    train.main(**arguments(recipe=str(tiny), data=str(shop)))
    train.main(**arguments(recipe=str(tiny), data=str(shop), round="second"))
    first, second = (models.newest({"aliprod.round": name}) for name in ("tiny", "second"))
    saved = [model.load(models.fetch(run_id)).model for run_id in (first, second)]
    assert model.weights_digest(saved[0].backbone) == model.weights_digest(saved[1].backbone)
    evaluate.main("newest", str(shop), "val", "fp32", Path("work"))
    (evaluation,) = store.search_runs(["1"], "tags.mlflow.runName = 'evaluate val'")
    trained = store.get_run(second).data.metrics
    for name in ("gap", "map", "loss", "top5", "coverage_classes"):
        assert evaluation.data.metrics[name] == pytest.approx(trained[name], abs=1e-5)
    capsys.readouterr()
    predict.main(second, str(shop / "val" / "00000"), 3, 0.0, "both", Path("out.csv"), Path("work"))
    answers = pd.read_csv("out.csv", dtype=str, keep_default_na=False)
    assert len(answers) == 2 and {"file", "class_id", "name", "path", "confidence_3", "error"} <= set(answers)
    assert answers["class_id"][0] in capsys.readouterr().out
    send.main(Path("work"))
    assert capsys.readouterr().out == "0 runs had something to send\n"


@pytest.mark.parametrize("kind", ["csv", "files"])
def test_predict_takes_a_csv_or_files_and_lists_the_unreadable(row, shop, store, tmp_path, kind):
    tables = assembly.tables(row, shop)
    assembly.model(row, len(tables.classes), "random").save(tmp_path / "model", tables.classes, tables.tree, {})
    photograph = manifest.paths(tables.val, shop)[0]
    (tmp_path / "bad one.jpg").write_bytes(b"")
    pd.DataFrame({"file": [photograph, "bad one.jpg"]}).to_csv(tmp_path / "list.csv", index=False)
    images = str(tmp_path / "list.csv") if kind == "csv" else f"{photograph} '{tmp_path}/bad one.jpg'"
    predict.main(str(tmp_path / "model"), images, 2, 0.0, "both", Path("out.csv"), Path("work"))
    answers = pd.read_csv("out.csv", keep_default_na=False)
    assert answers["error"].tolist() == ["", "the file is empty"]
    assert [Path(file).name for file in answers["file"]] == [Path(photograph).name, "bad one.jpg"]


def test_prepare_writes_the_tables_and_logs_them(shop, store, tmp_path):
    prepare.main(str(shop), tmp_path / "tables", 0, Path("work"))
    (run,) = store.search_runs(["1"])
    logged = {used.dataset.name: used.dataset.digest for used in run.inputs.dataset_inputs}
    assert set(logged) == {"train", "val", "balanced_train"}
    for name in logged:
        assert logged[name] == manifest.digest(manifest.read_csv(tmp_path / "tables" / f"{name}.csv"))
    assert (tmp_path / "tables" / "product_tree.csv").exists()


@pytest.mark.parametrize(("rule", "folds"), [("misclassified", 0), ("disagreement", 0), ("confident", 3)])
def test_cleaning_writes_a_manifest_that_trains(tiny, shop, store, tmp_path, rule, folds):
    train.main(**arguments(recipe=str(tiny), data=str(shop)))
    output = tmp_path / "reliable.csv"
    clean.main("newest newest", str(shop), "train", rule, 0.92, 2, folds, 5, "fp32", str(output), 0, Path("work"))
    run = store.search_runs(["1"])[0]
    before, after = manifest.read(shop, "train"), manifest.read_csv(output)
    dropped = pd.read_csv(store.download_artifacts(run.info.run_id, "dropped.csv"), dtype=str)
    assert run.info.run_name == f"clean {rule}" and len(dropped) == run.data.metrics["num_dropped"] > 0
    assert set(after["class_id"]) == set(before["class_id"]) and after["class_id"].value_counts().min() >= 5
    assert len(after.drop_duplicates()) + len(dropped) == len(before)
    assert set(run.data.metrics) >= {"precision", "recall", "f1"}
    assert json.loads(output.with_suffix(".json").read_text())["source"] == manifest.digest(before)
    train.main(**arguments(recipe=str(tiny), data=str(shop), overrides=f"manifest={output} epochs=1"))
    assert store.search_runs(["1"])[0].data.params["num_train"] == str(len(after))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_saves_says_how_to_go_on_and_does(tiny, shop, store, tmp_path, number):
    given = arguments(recipe=tiny, data=shop, work=tmp_path / "work", overrides="epochs=15")
    process = subprocess.Popen(
        [sys.executable, "-m", "entrypoints.train", *options(**given)], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    while process.poll() is None and not list(tmp_path.glob("work/runs/*/checkpoints/step-*")):
        time.sleep(0.02)
    process.send_signal(number)
    said = process.communicate(timeout=60)[1].strip().splitlines()[-1]
    assert process.returncode == 130
    (killed,) = store.search_runs(["1"])
    assert killed.info.status == "KILLED"
    command = f"mlflow run . -e train --env-manager local -P resume={killed.info.run_id} -P work={tmp_path / 'work'}"
    assert said.endswith(command)
    train.main(**arguments(resume=killed.info.run_id, work=tmp_path / "work"))
    resumed = store.search_runs(["1"])[0]
    assert resumed.info.status == "FINISHED" and resumed.data.tags["aliprod.resumed_from"] == killed.info.run_id
    assert [metric.step for metric in store.get_metric_history(resumed.info.run_id, "val/map")] == list(range(1, 16))


@pytest.mark.parametrize("lost", ["newest", "all"])
def test_a_run_whose_checkpoints_are_cut_off_goes_on_from_a_whole_one(row, shop, store, tmp_path, capsys, lost):
    row = row.model_copy(update={"epochs": 3})
    folder = tmp_path / "work" / "runs" / "cut" / "checkpoints"
    tables = assembly.tables(row, shop)
    made = assembly.model(row, len(tables.classes), row.init)
    images = [
        assembly.inputs(made, row, table, tables.classes, shop, tmp_path, "none")
        for table in (tables.train, tables.val)
    ]
    reports = training.train(made, row, *images, folder)
    [next(reports) for _ in range(2)]
    rounds.Job("small", row, str(shop)).save(folder.parent)
    older, newest = sorted(folder.glob("step-*.pt"))
    checkpoint = torch.load(older, weights_only=True)
    checkpoint["state"]["reports"][0]["seconds"] = 1e6
    torch.save(checkpoint, older)
    broken = {"newest": [folder / "best.pt", newest], "all": [older, newest]}[lost]
    for file in broken:
        file.write_bytes(file.read_bytes()[:5000])

    given = options(**arguments(resume="cut", work=tmp_path / "work"))
    if lost == "all":
        with pytest.raises(SystemExit) as stopped:
            run_command("train", given)
        assert stopped.value.code == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert line == f"resume: {older}, {newest} cut off or damaged, none is whole; train the round anew"
        return
    run_command("train", given)
    said = capsys.readouterr().out
    for file in broken:
        assert f"{file} is cut off or damaged: the run goes on without it\n" in said
    assert re.search(r"epoch 1/3 .* 2000000 s left", said), "the time that the epochs took before the stop counts"
    assert "epoch 3/3" in said and store.search_runs(["1"])[0].info.status == "FINISHED"
    assert newest.exists(), "what another run left is not touched"


def test_a_time_limit_stops_cleanly(tiny, shop, store):
    with pytest.raises(KeyboardInterrupt, match="resume="):
        train.main(**arguments(recipe=str(tiny), data=str(shop), overrides="epochs=500", minutes=0.02))
    assert store.search_runs(["1"])[0].info.status == "KILLED"


def test_too_many_corrupt_images_stop_the_run_with_their_list(tiny, shop, store, tmp_path):
    shutil.copytree(shop, tmp_path / "bad")
    for file in list((tmp_path / "bad" / "train" / "00000").iterdir())[:3]:
        file.write_bytes(file.read_bytes()[:200])
    given = options(**arguments(recipe=tiny, data=tmp_path / "bad"))
    with pytest.raises(SystemExit) as stopped:
        run_command("train", given)
    assert stopped.value.code == 2
    (run,) = store.search_runs(["1"])
    assert run.info.status == "FAILED" and "cannot be read" in run.data.tags["aliprod.error"]
    listed = pd.read_csv(store.download_artifacts(run.info.run_id, "corrupt.csv"))
    assert len(listed) and listed["reason"].str.contains("cut short").all()
    train.main(**arguments(recipe=str(tiny), data=str(tmp_path / "bad"), overrides="max_corrupt_share=0.1"))
    run = store.search_runs(["1"])[0]
    assert run.info.status == "FINISHED" and run.data.metrics["num_corrupt"] == 3


def run_command(name: str, argv: list[str]) -> None:
    module = importlib.import_module(f"entrypoints.{name}")
    before, sys.argv = sys.argv, [name, *argv]
    try:
        command(module.main)
    finally:
        sys.argv = before


MISTAKES = {
    "recipe": (
        "train",
        {"recipe": "nowhere"},
        r"recipe 'nowhere' not found: give a .toml file, or baseline, demo, grocery",
    ),
    "round": ("train", {"round": "third"}, r"recipe demo: no round 'third'; it has frozen"),
    "data": ("train", {"data": "nowhere"}, r"data 'nowhere': no folder /"),
    "override": ("train", {"overrides": "lr=fast"}, r"overrides: lr 'fast': .*number"),
    "field": ("train", {"overrides": "epoch=3"}, r"overrides: epoch.* no such field; there are .*epochs"),
    "minutes": ("train", {"minutes": "long"}, r"minutes 'long': .*number"),
    "resume": ("train", {"resume": "0123"}, r"resume '0123': no run of this name"),
    "resume and more": ("train", {"resume": "0123", "overrides": "lr=1"}, r"overrides: not to be given here"),
    "undeclared": ("train", {"speed": "9"}, r"unrecognized arguments: --speed 9; parameters are recipe, round"),
    "init": ("train", {"init": "nothing"}, r"init 'nothing': no finished round"),
    "model": ("evaluate", {"model": "nothing"}, r"model 'nothing' not found: give a saved folder, a run id"),
    "precision": ("evaluate", {"precision": "fp8"}, r"precision 'fp8': .*'fp32', 'bf16', 'fp16' or 'mixed'"),
    "sure": ("predict", {"sure": "1.5"}, r"sure '1.5': .*less than or equal to 1"),
    "images": ("predict", {"images": "nothing.jpg"}, r"model 'newest' not found"),
    "number": ("demo_data", {"departments": "many"}, r"departments 'many': .*integer"),
    "range": ("demo_data", {"noise": "2"}, r"noise .*2.*0\.9"),
    "seed": ("prepare", {"seed": "-1"}, r"seed '-1': .*greater than or equal to 0"),
}
DEFAULTS = {
    "train": arguments(),
    "evaluate": {"model": "newest", "data": "demo", "split": "val", "precision": "fp32", "work": "work"},
    "predict": {"model": "newest", "images": "x.jpg", "top": 5, "sure": 0, "using": "both", "output": "out.csv",
                "work": "work"},
    "prepare": {"data": "demo", "output": "tables", "seed": 0, "work": "work"},
    "demo_data": {"output": "demo", "departments": 1, "categories": 1, "brands": 1, "products": 2, "images": 2,
                  "imbalance": 1, "val_images": 1, "noise": 0, "size": 48, "seed": 0},
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "given"), [("reap", {"minutes": 1, "experiment": "", "dry_run": False}), ("rollback", {})]
)
def test_a_server_that_is_away_is_one_line_and_exit_2(name, given, tmp_path):
    environment = os.environ | {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    command = [sys.executable, "-m", f"entrypoints.{name}", *options(**given, work=tmp_path)]
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ended.returncode == 2
    (line,) = ended.stderr.splitlines()
    assert re.match("the tracking server .*does not answer: API request", line)


@pytest.mark.parametrize(("name", "given", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line_and_exit_2(name, given, message, shop, store, capsys):
    base = DEFAULTS[name] | ({"data": str(shop)} if "data" in DEFAULTS[name] else {})
    with pytest.raises(SystemExit) as stopped:
        run_command(name, options(**base | given))
    assert stopped.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert re.search(message, lines[0]), lines[0]
