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
import yaml
from PIL import Image

from aliprod import InputError, assembly, crossfit, manifest, metrics, model, recipe, training
from entrypoints import clean, evaluate, export, predict, prepare, send, train
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
    work = tmp_path / 'what? now #1 100%41 $HOME `x` "Lay\'s"\nplace'  # a name that is as it is for all who see it
    overrides = "epochs=3 lr = 2e-3 samples_per_class=[1, 999]"
    parameters = {"recipe": tiny, "data": shop, "work": work, "overrides": overrides}
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
    assert len(model.load(models.fetch(run.info.run_id)).classes) == 8
    folder = work / "runs" / run.info.run_id
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


@pytest.fixture
def trained(row, shop, store, tmp_path) -> Path:
    """A saved model, trained on `shop` as its configuration says."""
    tables = assembly.tables(row, shop)
    network = assembly.model(row, len(tables.classes), "random")
    network.save(tmp_path / "model", tables.classes, tables.tree, {"data_folder": str(shop)})
    return tmp_path / "model"


@pytest.fixture
def other_shop(shop, tmp_path, request) -> Path:
    """A data folder of the same class ids, of which one has another name, or stands elsewhere in the tree, or all."""
    shutil.copytree(shop, tmp_path / "other")
    tree = json.loads((shop / "product_tree.json").read_text())
    leaf = above = tree[0]
    while "children" in leaf:
        above, leaf = leaf, leaf["children"][0]
    if request.param == "one name":
        leaf["name"] = "Something else"
    elif request.param == "one path":
        above["name"] = "Elsewhere"
    else:
        for root in tree:
            root["name"] += " of another catalogue"
    (tmp_path / "other" / "product_tree.json").write_text(json.dumps(tree))
    return tmp_path / "other"


def test_a_model_is_evaluated_on_what_it_was_trained_on(trained, shop, store, capsys):
    evaluate.main(str(trained), "", "val", "fp32", Path("work"))
    assert f"data:      {shop} (what the model was trained on)" in capsys.readouterr().out
    (run,) = store.search_runs(["1"])
    assert run.data.params["data_folder"] == str(shop)
    assert not Path("work/demo").exists()


def test_the_run_says_what_a_model_of_before_was_trained_on(trained, shop, store, capsys):
    run = store.create_run(store.create_experiment("before"))
    store.log_param(run.info.run_id, "data_folder", str(shop))
    config = json.loads((trained / "config.json").read_text())
    config |= {"run_id": run.info.run_id, "data_folder": ""}
    (trained / "config.json").write_text(json.dumps(config))
    evaluate.main(str(trained), "", "val", "fp32", Path("work"))
    assert f"data:      {shop} (what" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("folder", "why"),
    [("", "data: it is not known what the model was trained on"), ("/nowhere", "trained on /nowhere")],
)
def test_where_nobody_knows_what_a_model_was_trained_on_no_data_is_taken_for_it(trained, folder, why):
    config = json.loads((trained / "config.json").read_text())
    (trained / "config.json").write_text(json.dumps(config | {"data_folder": folder, "run_id": "0" * 32}))
    with pytest.raises(InputError, match=f"{why}.*; give a folder"):
        evaluate.main(str(trained), "", "val", "fp32", Path("work"))


@pytest.mark.parametrize("other_shop", ["one name", "one path", "all"], indirect=True)
def test_data_whose_ids_are_of_other_products_is_refused(trained, other_shop, store):
    why = f"data '{other_shop}': . of the model's 8 classes are other products there; the (name|path) of '0000"
    with pytest.raises(InputError, match=why):
        evaluate.main(str(trained), str(other_shop), "val", "fp32", Path("work"))
    cleaned = ("train", "misclassified", 0.92, 2, 0, 5, 1.0, 0.0, "fp32", "out.csv", 0, Path("work"))
    with pytest.raises(InputError, match=why):
        clean.main(str(trained), str(other_shop), *cleaned)
    with pytest.raises(InputError, match=why):
        export.main(str(trained), str(other_shop), Path("out.onnx"), 10, 1e-3, Path("work"))
    assert not Path("out.csv").exists() and not Path("out.onnx").exists()


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
    given = (rule, 0.92, 2, folds, 5, 1.0, 0.0, "fp32", str(output), 0, Path("work"))
    clean.main("newest newest", str(shop), "train", *given)
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


def test_a_cleaning_by_a_weak_judge_is_refused_and_leaves_no_manifest(row, shop, store, tmp_path, capsys):
    tables, judge = assembly.tables(row, shop), str(tmp_path / "judge")
    made = assembly.model(row, len(tables.classes), "random")
    made.save(Path(judge), tables.classes, tables.tree, {"round": row.model_dump()})
    fitted = crossfit.answers(model.load(judge), tables.train, tables.classes, shop, "work/features", "fp32", 5, 0)
    score = metrics.mean_class_accuracy(fitted["label"].to_numpy(), fitted["pred"].to_numpy())

    output = tmp_path / "reliable train.csv"
    given = {"models": judge, "data": str(shop), "manifest": "train", "rule": "misclassified", "min_accuracy": 0.92}
    given |= {"votes": 2, "folds": 5, "least": 5, "precision": "fp32", "output": str(output), "seed": 0, "work": "work"}
    with pytest.raises(SystemExit) as stopped:
        run_command("clean", options(**given, max_dropped_share=0.0, min_judge_map=score + 0.01))
    said = capsys.readouterr()
    assert stopped.value.code == 2 and f"MAP of the judges, cross-fitted: {judge} {score:.4f}" in said.out
    assert f"judge {judge} has a MAP of {score:.4f}, cross-fitted, below min_judge_map" in said.err
    assert "of the photographs dropped, more than max_dropped_share 0" in said.err
    run = store.search_runs(["1"])[0]
    assert run.info.status == "FAILED" and "below min_judge_map" in run.data.tags["aliprod.error"]
    assert run.data.metrics["judge_map"] == pytest.approx(score)
    share = run.data.metrics["num_dropped"] / len(tables.train)
    assert run.data.metrics["dropped_share"] == pytest.approx(share)
    assert {file.path for file in store.list_artifacts(run.info.run_id)} == {"dropped.csv", "figures"}
    assert not output.exists() and not output.with_suffix(".json").exists()

    run_command("clean", options(**given, max_dropped_share=share, min_judge_map=score - 0.01))
    assert "\nreliable_train: " in capsys.readouterr().out and output.exists()
    assert store.search_runs(["1"])[0].info.status == "FINISHED"


def test_a_round_that_is_right_on_all_of_val_is_finished_its_model_logged_first(row, store, tmp_path):
    records = {"train": [], "val": []}
    for split, count in {"train": 6, "val": 2}.items():
        for class_id, colour in {"001": "red", "002": "blue"}.items():
            folder = tmp_path / "two" / split / class_id
            folder.mkdir(parents=True)
            for number in range(count):
                Image.new("RGB", (64, 64), colour).save(folder / f"{number}.png")
                records[split].append({"class_id": class_id, "image_id": f"{number}.png"})
        (tmp_path / "two" / f"{split}.json").write_text(json.dumps({"images": records[split]}))
    (tmp_path / "two.toml").write_text(
        recipe.to_toml(row.model_copy(update={"init": "random", "lr": 1e-2, "epochs": 4}))
    )
    train.main(**arguments(recipe=str(tmp_path / "two.toml"), data=str(tmp_path / "two")))
    (run,) = store.search_runs(["1"])
    assert run.info.status == "FINISHED" and run.data.metrics["map"] == 1
    assert "aliprod.report_errors" not in run.data.tags
    lines = Path("work", "runs", run.info.run_id, "spool.jsonl").read_text().splitlines()
    kinds = ["figure" if "/figures/" in line else json.loads(line)["kind"] for line in lines]
    assert kinds.index("model") < kinds.index("figure")
    assert models.load(run.info.run_id).classes["class_id"].tolist() == ["001", "002"]


def stopped(command: list[str], number: int, work: Path, **options: object) -> tuple[int, str]:
    """Exit status and last line of a command that gets a signal when its first checkpoint is there."""
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True, **options)
    while process.poll() is None and not list(work.glob("runs/*/checkpoints/step-*")):
        time.sleep(0.02)
    os.killpg(process.pid, number)  # as a terminal does it
    said = process.communicate(timeout=60)[1].strip().splitlines()[-1]
    return process.returncode, said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_saves_says_how_to_go_on_and_does(tiny, shop, store, tmp_path, number):
    work = tmp_path / "my work"
    given = options(**arguments(recipe=tiny, data=shop, work=work, overrides="epochs=15"))
    environment = os.environ | {"MLFLOW_EXPERIMENT_NAME": "shop"}
    status, said = stopped([sys.executable, "-m", "entrypoints.train", *given], number, work, env=environment)
    assert status == 130
    experiment = store.get_experiment_by_name("shop").experiment_id
    (killed,) = store.search_runs([experiment])
    assert killed.info.status == "KILLED" and killed.data.tags["mlflow.note.content"] == said
    command = f"mlflow run . -e train --env-manager local --experiment-name shop -P resume={killed.info.run_id}"
    assert said == f"stopped; go on with: {command} -P 'work={work}'"
    train.main(**arguments(resume=killed.info.run_id, work=work))
    resumed = store.search_runs([experiment])[0]
    assert resumed.info.status == "FINISHED" and resumed.data.tags["aliprod.resumed_from"] == killed.info.run_id
    assert [metric.step for metric in store.get_metric_history(resumed.info.run_id, "val/map")] == list(range(1, 16))


def test_a_run_goes_on_where_its_data_and_work_lie_by_now(tiny, shop, store, tmp_path):
    shutil.copytree(shop, tmp_path / "data")
    given = options(**arguments(recipe=tiny, data=tmp_path / "data", work=tmp_path / "work", overrides="epochs=15"))
    command = [sys.executable, "-m", "entrypoints.train", *given]
    assert stopped(command, signal.SIGHUP, tmp_path / "work")[0] == 130
    (killed,) = store.search_runs(["1"])
    assert killed.info.status == "KILLED"
    (tmp_path / "data").rename(tmp_path / "data now")
    (tmp_path / "work").rename(tmp_path / "work now")
    given = arguments(resume=killed.info.run_id, work=tmp_path / "work now")
    with pytest.raises(InputError, match="its data is no more at .*/data; give data, where it is now"):
        train.main(**given)
    shutil.copytree(tmp_path / "data now", tmp_path / "other")
    images = json.loads((shop / "val.json").read_text())["images"]
    (tmp_path / "other" / "val.json").write_text(json.dumps({"images": images[1:]}))
    with pytest.raises(InputError, match="data '.*/other': val not as in the run to resume"):
        train.main(**given | {"data": str(tmp_path / "other")})
    train.main(**given | {"data": str(tmp_path / "data now")})
    resumed = store.search_runs(["1"])[0]
    assert resumed.info.status == "FINISHED" and resumed.data.tags["aliprod.resumed_from"] == killed.info.run_id


@pytest.mark.slow
def test_ctrl_c_reaches_a_project_run_and_its_last_line_can_be_pasted(tiny, shop, store, tmp_path):
    work = tmp_path / "my work"
    pairs = {"recipe": tiny, "data": shop, "work": work, "overrides": "epochs=15"}
    words = [word for name, value in pairs.items() for word in ("-P", f"{name}={value}")]
    command = ["run", str(ROOT), "-e", "train", "--env-manager", "local", "--experiment-name", "my shop", *words]
    stopped([sys.executable, "-m", "mlflow", *command], signal.SIGINT, work)
    experiment = store.get_experiment_by_name("my shop").experiment_id
    (killed,) = store.search_runs([experiment])
    assert killed.info.status == "KILLED"
    _, _, pasted = killed.data.tags["mlflow.note.content"].partition("go on with: ")
    place = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    subprocess.run(["bash", "-c", pasted], check=True, cwd=ROOT, env=os.environ | place)
    resumed, _ = store.search_runs([experiment])
    assert resumed.info.status == "FINISHED" and resumed.data.tags["aliprod.resumed_from"] == killed.info.run_id
    assert not store.search_runs(["0"])


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
    rounds.Job("small", row, str(shop)).save(folder.parent, tmp_path / "work")
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
    ("name", "given"), [("reap", {"minutes": 1, "experiment": "", "dry_run": False}), ("rollback", {"model": ""})]
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


PROJECT = yaml.safe_load((ROOT / "MLproject").read_text())["entry_points"]
NUMBERS = [
    (entry, name)
    for entry in PROJECT
    for name, about in PROJECT[entry]["parameters"].items()
    if about["type"] == "float"
]
NEEDED = {"images": "x.jpg", "source": ".", "to": "s3://bucket/x", "data": "demo"}
WORDS = [
    ("main", "recipe"), ("main", "overrides"), ("train", "overrides"), ("tune", "overrides"), ("clean", "models"),
    ("promote", "candidates"),
]  # fmt: skip


def refused(entry: str, given: dict[str, object], capsys: pytest.CaptureFixture) -> str:
    """The one line with which an entry point refuses these parameters, its others being the defaults."""
    defaults = {name: about.get("default", NEEDED.get(name)) for name, about in PROJECT[entry]["parameters"].items()}
    with pytest.raises(SystemExit) as stopped:
        run_command(entry, options(**defaults | given))
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize(("entry", "name"), NUMBERS)
def test_a_number_that_cannot_be_is_refused_by_its_name(entry, name, shop, store, capsys):
    for value in ("nan", "inf", "-inf", "1e400", "-1", "", "0x10", "1,5", "one"):
        given = {name: value} | ({"data": shop} if "data" in PROJECT[entry]["parameters"] else {})
        line = refused(entry, given, capsys)
        assert re.search(rf"\b{name}\b.* ('{re.escape(value)}'|-1)", line), line


@pytest.mark.parametrize(("entry", "name"), [("main", "minutes"), ("train", "minutes"), ("reap", "minutes")])
def test_a_time_limit_that_no_clock_has_is_refused(entry, name, capsys):
    assert re.match(r"minutes '1e308': .*less than or equal to 527040", refused(entry, {name: "1e308"}, capsys))


@pytest.mark.parametrize("entry", PROJECT)
def test_a_parameter_that_is_no_text_is_refused_by_its_name(entry, capsys):
    photographs = {"images"} if entry != "demo_data" else set()  # which are read whatever they are called
    for name in PROJECT[entry]["parameters"].keys() - photographs:
        assert refused(entry, {name: "a\udcff"}, capsys) == rf"{name} 'a\udcff': must be UTF-8"


def test_a_place_is_not_nowhere(capsys):
    assert refused("upload", {"source": ""}, capsys) == "source '': must be the path of a file or folder"


@pytest.mark.parametrize(("entry", "name"), WORDS)
def test_an_open_quote_is_refused_by_the_name_of_its_parameter(entry, name, shop, store, capsys):
    given = {name: "x=Lay's y=1"} | ({"data": shop} if "data" in PROJECT[entry]["parameters"] else {})
    assert re.match(
        rf"{name} .*Lay's.*(No closing quotation|not closed); what holds spaces", refused(entry, given, capsys)
    )


@pytest.mark.parametrize("output", ["work/", ".csv", "..", "s3://bucket/", "work/dropped.csv"])
def test_clean_writes_to_a_file_and_says_so_by_the_parameters_name(output, shop, store, capsys):
    line = refused("clean", {"output": output, "data": shop}, capsys)
    assert re.match(rf"output '{re.escape(output)}': must end in a file's name", line), line


def test_values_that_begin_with_a_dash_are_values(store, tmp_path, capsys):
    line = refused("evaluate", {"model": "--work", "split": "-x"}, capsys)
    assert line.startswith("model '--work' not found")
    with pytest.raises(SystemExit):
        run_command("evaluate", ["--model"])
    assert re.search("argument --model: expected one argument; parameters are model, data", capsys.readouterr().err)
