"""What is recorded arrives once, whatever the server does; what is logged can be loaded and served."""

import base64
import json
import os
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import mlflow
import pandas as pd
import pytest
import requests
import sqlalchemy
from botocore.exceptions import EndpointConnectionError
from conftest import Server
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException, RestException
from mlflow.protos import databricks_pb2

from aliprod import InputError, assembly, manifest, model
from aliprod.prediction import recognise
from tracking import models, runs, search, spool
from tracking import store as store_room


@pytest.fixture
def logged(row, shop, store, tmp_path):
    """A run with the model of an untrained round logged, and the folder that was logged."""
    tables = assembly.tables(row, shop)
    made = assembly.model(row, len(tables.classes), "random")
    with runs.start("logged", tmp_path / "work") as run:
        made.save(run.folder / "model", tables.classes, tables.tree, {})
        run.model(run.folder / "model", manifest.paths(tables.val, shop)[0], step=1)
    return run


def test_a_report_that_fails_ends_no_run_and_is_named_with_its_reason(store, tmp_path, capsys):
    def broken() -> str:
        raise ValueError("no rows\nat all")

    whole, unwritable = pd.DataFrame({"a": [1]}), pd.DataFrame({"a": [object()]})
    with runs.start("reports", tmp_path / "work") as run:
        run.reports({"broken.html": broken, "whole.csv": lambda: whole})
        run.reports({"figures/unwritable.parquet": lambda: unwritable, "note.md": lambda: "text"})
        run.reports({"broken.html": broken})  # as every round of a pipeline draws its table again
    found = store.get_run(run.id)
    assert found.info.status == "FINISHED"
    first, second = found.data.tags["aliprod.report_errors"].split("; ", 1)
    assert first == "broken.html: ValueError: no rows at all" and second.startswith("figures/unwritable.parquet: Arrow")
    names = {file.path for file in store.list_artifacts(run.id)}
    assert names == {"whole.csv", "note.md", "report_errors.txt"}
    lines = Path(store.download_artifacts(run.id, "report_errors.txt")).read_text().splitlines()
    assert lines == [first, second] and f"warning: left out {first}" in capsys.readouterr().out


def test_a_stop_while_reports_are_made_is_no_failed_report(store, tmp_path):
    def stopped() -> str:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), runs.start("stopped", tmp_path / "work") as run:
        run.reports({"page.html": stopped})
    assert store.get_run(run.id).info.status == "KILLED"


def test_a_server_killed_in_mid_run_misses_nothing_and_gets_nothing_twice(server, tmp_path, monkeypatch):
    monkeypatch.setattr(spool, "PATIENCE", 0.0)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)
    mlflow.set_tracking_uri(server.uri)
    with runs.start("killed", tmp_path / "work") as run:
        for step in range(12):
            if step == 4:
                server.kill()
            if step == 8:
                server.start()
            run.metrics({"loss": 1 / (step + 1)}, step)
            run.text(f"step {step}", f"notes/{step}.txt")
        server.kill()
        run.dataset(pd.DataFrame({"class_id": ["00001"]}), str(tmp_path), "train", "training")
        run.curve([{"step": step, "lr": 0.1 * step} for step in range(1500)], "step/")
    sent = (run.folder / "spool.sent").read_text()
    assert int(sent) < (run.folder / "spool.jsonl").stat().st_size
    server.start()
    assert spool.send_waiting(tmp_path / "work") == {run.id: "sent"}
    assert spool.send_waiting(tmp_path / "work") == {}
    client = MlflowClient()
    losses = client.get_metric_history(run.id, "loss")
    assert [(metric.step, metric.value) for metric in losses] == [(step, 1 / (step + 1)) for step in range(12)]
    assert len(client.get_metric_history(run.id, "step/lr")) == 1500
    assert len(client.list_artifacts(run.id, "notes")) == 12
    ended = client.get_run(run.id)
    assert ended.info.status == "FINISHED" and len(ended.inputs.dataset_inputs) == 1


def test_a_record_sent_but_not_noted_is_not_counted_twice(store, tmp_path):
    with runs.start("twice", tmp_path / "work") as run:
        run.metrics({"loss": 0.5}, 1)
    (run.folder / "spool.sent").unlink()  # as if the process had died before noting anything
    assert spool.send_waiting(tmp_path / "work") == {run.id: "sent"}
    assert len(store.get_metric_history(run.id, "loss")) == 1


def test_a_line_cut_off_by_a_crash_is_not_sent(store, tmp_path):
    with runs.start("cut", tmp_path / "work") as run:
        run.metrics({"loss": 0.5}, 1)
    with (run.folder / "spool.jsonl").open("ab") as file:
        file.write(b'{"kind": "metri')
    spool.send_waiting(tmp_path / "work")
    assert len(store.get_metric_history(run.id, "loss")) == 1


def test_a_refused_record_is_kept_and_does_not_hold_up_the_others(store, tmp_path, capsys):
    with runs.start("refused", tmp_path / "work") as run:
        run.params({"lr": 0.1})
        run.params({"lr": 0.2})
        run.metrics({"loss": 0.5}, 1)
    assert "refused a record" in capsys.readouterr().out
    assert json.loads((run.folder / "refused.jsonl").read_text()) == {"kind": "params", "values": {"lr": "0.2"}}
    assert store.get_run(run.id).data.metrics["loss"] == 0.5


@pytest.mark.parametrize(
    ("raised", "status"), [(None, "FINISHED"), (KeyboardInterrupt, "KILLED"), (ValueError("no"), "FAILED")]
)
def test_a_run_is_closed_whatever_happens(store, tmp_path, raised, status):
    try:
        with runs.start("closed", tmp_path / "work") as run:
            if raised:
                raise raised
    except (KeyboardInterrupt, ValueError):
        pass
    finished = store.get_run(run.id)
    assert finished.info.status == status
    assert finished.data.tags.get("aliprod.error") == ("ValueError: no" if status == "FAILED" else None)


def test_a_dead_server_is_refused_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)
    mlflow.set_tracking_uri("http://127.0.0.1:9")
    with pytest.raises(InputError, match=r"tracking server http://127.0.0.1:9 does not answer"):
        runs.start("dead", tmp_path).__enter__()


def test_a_run_that_is_not_there_is_refused_in_one_line(store, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_RUN_ID", "0" * 32)
    with pytest.raises(InputError, match=r"MLFLOW_RUN_ID=0{32}: Run with id=0{32} not found; no run that"):
        runs.start("lost", tmp_path).__enter__()


def wrapped(error: Exception) -> MlflowException:
    """An error of something else, as MLflow raises it."""
    try:
        try:
            raise error
        except Exception:
            raise MlflowException("something failed")  # noqa: B904
    except MlflowException as raised:
        return raised


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (wrapped(requests.ConnectionError()), "away"),
        (wrapped(OSError(28, "No space left on device")), "local"),
        (wrapped(ConnectionRefusedError(111, "Connection refused")), "away"),
        (wrapped(sqlalchemy.exc.OperationalError("", {}, sqlite3.OperationalError("database is locked"))), "away"),
        (wrapped(ValueError("a fault in the code")), "refused"),
        (MlflowException("failures: [Errno 28] No space left on device: 'x'"), "local"),
        (MlflowException("failures: [Errno 111] Connection refused"), "away"),
        (OSError(113, "No route to host"), "away"),
        (RestException({"error_code": "INTERNAL_ERROR", "message": "[Errno 28] No space left there"}), "away"),
        (MlflowException("", error_code=databricks_pb2.TEMPORARILY_UNAVAILABLE), "away"),
        (MlflowException("", error_code=databricks_pb2.BAD_REQUEST), "refused"),
        (requests.ConnectionError(), "away"),
        (requests.HTTPError(response=SimpleNamespace(status_code=503)), "away"),
        (requests.HTTPError(response=SimpleNamespace(status_code=413)), "refused"),
        (EndpointConnectionError(endpoint_url="http://s3"), "away"),
        (FileNotFoundError("gone.png"), "local"),
    ],
    ids=str,
)
def test_away_is_who_does_not_answer_and_local_what_this_machine_refuses(error, expected):
    kinds = {"away": store_room.away(error), "local": store_room.local(error)}
    assert [kind for kind, holds in kinds.items() if holds] == [kind for kind in kinds if kind == expected]


def test_what_cannot_be_sent_stops_neither_the_run_nor_the_next(store, tmp_path, capsys):
    with runs.start("lost", tmp_path / "work") as run:
        run.spool.put("artifact", path=str(tmp_path / "gone.png"), folder=None)
        run.metrics({"loss": 0.5}, 1)
    assert "refused a record" in capsys.readouterr().out
    with runs.start("next", tmp_path / "work") as later:
        later.metrics({"loss": 0.25}, 1)
    ended = [store.get_run(run_id) for run_id in (run.id, later.id)]
    assert [(one.info.status, one.data.metrics["loss"]) for one in ended] == [("FINISHED", 0.5), ("FINISHED", 0.25)]


def test_what_waits_for_another_server_goes_to_that_one_alone(server, empty_store, tmp_path, monkeypatch, capfd):
    """And the password in the server's address is shown and stored nowhere, and may change meanwhile."""
    monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    mlflow.set_tracking_uri(server.uri.replace("//", "//ann:s3cret@"))
    with runs.start("waits", tmp_path / "work", monitored=False) as run:
        server.kill()
        run.params({"lr": 0.1})
    mlflow.set_tracking_uri(f"sqlite:///{empty_store}")
    shown = server.uri.replace("//", "//ann:***@")
    waiting = {run.id: f"waits for MLFLOW_TRACKING_URI={shown}"}
    assert spool.send_waiting(tmp_path / "work") == waiting
    server.start()
    assert spool.send_waiting(tmp_path / "work") == waiting
    mlflow.set_tracking_uri(server.uri.replace("//", "//ann:another@"))
    assert spool.send_waiting(tmp_path / "work") == {run.id: "sent"}
    assert MlflowClient().get_run(run.id).data.params == {"lr": "0.1"}
    mlflow.set_tracking_uri("http://ann:s3cret@127.0.0.1:9")
    with pytest.raises(InputError, match="does not answer") as refused:
        runs.start("dead", tmp_path / "work").__enter__()
    texts = [str(refused.value), *capfd.readouterr()]
    texts += [path.read_text(errors="replace") for path in (tmp_path / "work").rglob("*") if path.is_file()]
    assert not [text for text in texts if "s3cret" in text or "another@" in text]


def test_system_metrics_are_recorded(store, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.2")
    with runs.start("system", tmp_path / "work") as run:
        deadline = time.monotonic() + 60
        while not store.get_run(run.id).data.metrics and time.monotonic() < deadline:
            time.sleep(0.1)
    assert "system/cpu_utilization_percentage" in store.get_run(run.id).data.metrics


def test_a_dataset_is_an_input_with_its_digest(store, tmp_path, shop):
    table = manifest.read(shop, "train")
    with runs.start("inputs", tmp_path / "work") as run:
        run.dataset(table, str(shop), "train", "training")
    (used,) = store.get_run(run.id).inputs.dataset_inputs
    assert (used.dataset.name, used.dataset.digest) == ("train", manifest.digest(table))


def test_of_runs_that_start_at_once_none_is_refused(server, tmp_path, monkeypatch):
    """They are the first to name an experiment and its datasets, each of them; MLflow's database takes one alone."""
    monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)
    mlflow.set_tracking_uri(server.uri)
    tables = [pd.DataFrame({"class_id": [str(number)]}) for number in range(20)]
    together, ended = threading.Barrier(4, timeout=60), []

    def record(number: int) -> None:
        together.wait()
        with runs.start(f"run {number}", tmp_path / f"work {number}", monitored=False) as run:
            for table in tables:
                together.wait()
                run.dataset(table, str(tmp_path), "train", "training")
        ended.append(run.id)

    threads = [threading.Thread(target=record, args=(number,)) for number in range(together.parties)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    client = MlflowClient()
    assert [experiment.name for experiment in client.search_experiments()] == [runs.EXPERIMENT, "Default"]
    inputs = [client.get_run(run_id).inputs.dataset_inputs for run_id in ended]
    digests = {manifest.digest(table) for table in tables}
    assert [{used.dataset.digest for used in of_run} for of_run in inputs] == [digests] * len(threads)


def test_a_model_is_found_by_every_name_it_has(logged, store, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    (output,) = store.get_run(logged.id).outputs.model_outputs
    mlflow.register_model(f"models:/{output.model_id}", "recogniser")
    store.set_registered_model_alias("recogniser", "champion", 1)
    expected = model.weights_digest(model.load(logged.folder / "model").model)
    names = ["newest", logged.id, f"runs:/{logged.id}/model", f"models:/{output.model_id}"]
    for name in [*names, "models:/recogniser/1", "models:/recogniser@champion", str(logged.folder / "model")]:
        assert model.weights_digest(model.load(models.fetch(name)).model) == expected, name


def test_newest_is_this_projects_newest(logged, store):
    """Another project on the same server logs a model of the same name after ours, and ends another run."""
    with mlflow.start_run() as theirs:
        mlflow.pyfunc.log_model(name="model", python_model=lambda model_input: model_input, pip_requirements=[])
    assert models.logged(store.get_run(theirs.info.run_id))
    assert models.newest({}, of_model=True) == logged.id


def test_a_deleted_model_is_no_runs_model(logged, store):
    (output,) = store.get_run(logged.id).outputs.model_outputs
    store.delete_logged_model(output.model_id)
    assert models.newest({}, of_model=True) is None


@pytest.mark.parametrize(
    "name", ["o'brien", 'say "so"', 'o\'brien says "so"', "back\\", "100% _", "a; --b", "`tick`", "line\nbreak", "果物"]
)
def test_a_run_is_found_by_a_tag_of_any_text_and_not_by_one_that_looks_like_it(store, tmp_path, name):
    ids = {}
    for text in (name, f"{name}x", "".join("x" if one in "'\"\\%_;`\n" else one for one in name) + " "):
        with runs.start("tagged", tmp_path / "work", {"recipe": text}, monitored=False) as run:
            ids[text] = run.id
    assert [run.info.run_id for run in search.runs({"recipe": name}, "FINISHED")] == [ids[name]]
    assert models.newest({"aliprod.recipe": name}) == ids[name]


def test_all_pages_of_runs_are_searched(store, tmp_path, monkeypatch):
    monkeypatch.setattr(search, "PAGE", 2)
    ids = []
    for _ in range(5):
        with runs.start("one of many", tmp_path / "work", {"recipe": "many"}, monitored=False) as run:
            ids.append(run.id)
    assert [run.info.run_id for run in search.runs({"recipe": "many"})] == ids[::-1]


@pytest.mark.parametrize("name", ["nowhere", "0" * 32, "models:/none@champion", "runs:/x/model", "newest"])
def test_a_model_that_is_not_there_is_refused(store, name):
    with pytest.raises(InputError, match=f"model '.*{name[:5]}.*not found"):
        models.fetch(name)


def test_a_model_whose_upload_broke_off_is_sent_again(logged, store, tmp_path, monkeypatch):
    upload = MlflowClient.log_model_artifacts

    def cut(*given: object) -> None:
        monkeypatch.setattr(MlflowClient, "log_model_artifacts", upload)
        raise MlflowException("it went away", error_code=databricks_pb2.TEMPORARILY_UNAVAILABLE)

    monkeypatch.setattr(spool, "PATIENCE", 0.0)
    monkeypatch.setattr(MlflowClient, "log_model_artifacts", cut)
    with runs.start("cut", tmp_path / "work") as run:
        run.model(logged.folder / "model", str(next(logged.folder.glob("example.*"))), step=0)
        assert models.logged(store.get_run(run.id)) is None
    assert len(store.get_run(run.id).outputs.model_outputs) == 2
    expected = model.weights_digest(model.load(logged.folder / "model").model)
    assert model.weights_digest(models.load(run.id).model) == expected


@pytest.mark.parametrize(("number", "name"), [(0, ""), (0, "none"), (2, "two")])
def test_a_folder_of_no_or_of_several_models_is_refused(store, tmp_path, number, name):
    for count in range(number):
        (tmp_path / "two" / str(count)).mkdir(parents=True)
        (tmp_path / "two" / str(count) / "config.json").touch()
    (tmp_path / "none").mkdir()
    expected = f"model '{name}' is no single model of this project's: it holds {number} config.json"
    with pytest.raises(InputError, match=expected if name else "model '' not found: give a saved folder, a run id"):
        models.fetch(name)


def test_sending_a_model_again_logs_no_second_one(logged, store):
    (logged.folder / "spool.sent").unlink()
    spool.send_waiting(logged.folder.parents[1])
    assert len(store.get_run(logged.id).outputs.model_outputs) == 1


def test_the_pyfunc_answers_as_the_saved_model(logged, shop, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    files = manifest.paths(manifest.read(shop, "val"), shop)
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"not an image")
    contents = [Path(file).read_bytes() for file in [*files, bad]]
    served = mlflow.pyfunc.load_model(f"runs:/{logged.id}/model").predict(
        pd.DataFrame({"image": contents}), params={"top": 3}
    )
    expected = recognise(model.load(logged.folder / "model"), [*files, str(bad)], top=3)
    pd.testing.assert_frame_equal(served, expected)
    assert served["error"].iloc[-1] == "not an image but text" and served["class_ids"].iloc[-1] == []
    assert served["class_ids"].str.len().iloc[:-1].eq(3).all()


def test_the_served_model_answers_http_and_the_command_line(logged, shop, tmp_path):
    files = manifest.paths(manifest.read(shop, "val"), shop)[:5]
    expected = recognise(model.load(logged.folder / "model"), files)
    images = [[base64.b64encode(Path(file).read_bytes()).decode()] for file in files]
    request = {"dataframe_split": {"columns": ["image"], "data": images}}
    environment = os.environ | {
        "MLFLOW_TRACKING_URI": mlflow.get_tracking_uri(),
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        "PYTHONPATH": "",
    }
    os.environ.update(environment)
    serving = Server(
        ["mlflow", "models", "serve", "-m", f"runs:/{logged.id}/model", "--env-manager", "local"], "/ping", tmp_path
    )
    serving.start()
    try:
        answer = urllib.request.urlopen(
            urllib.request.Request(
                serving.uri + "/invocations", json.dumps(request).encode(), {"Content-Type": "application/json"}
            ),
            timeout=60,
        )
        over_http = pd.DataFrame(json.load(answer)["predictions"])
    finally:
        serving.kill()
    (tmp_path / "request.json").write_text(json.dumps(request))
    command = ["models", "predict", "-m", f"runs:/{logged.id}/model", "--env-manager", "local", "-t", "json"]
    paths = ["-i", str(tmp_path / "request.json"), "-o", str(tmp_path / "answer.json")]
    subprocess.run([sys.executable, "-m", "mlflow", *command, *paths], check=True, env=environment, cwd=tmp_path)
    by_command = pd.DataFrame(json.loads((tmp_path / "answer.json").read_text())["predictions"])
    for answers in (over_http, by_command):
        pd.testing.assert_frame_equal(answers[expected.columns], expected, check_exact=False, atol=1e-5)
