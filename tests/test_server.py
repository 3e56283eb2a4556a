"""The team's server, really started: PostgreSQL, S3 and MLflow, moved to from an SQLite file, logged to, stopped."""

import contextlib
import hashlib
import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import mlflow
import psutil
import pytest
import sqlalchemy
import yaml
from conftest import ROOT
from mlflow import MlflowClient
from mlflow.entities import LoggedModelOutput, Metric
from mlflow.server import get_app_client

from aliprod import InputError, recipe
from entrypoints import reap
from tracking import migration, reaping, registry, runs, server, spool

OLD = 1_700_000_000_000  # milliseconds


class Team:
    """The command in a process of its own."""

    def __init__(self, folder: Path):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.folder = folder
        self.uri = f"http://127.0.0.1:{self.port}"

    def start(self) -> "Team":
        command = [sys.executable, "-m", "tracking.server", "--folder", str(self.folder), "--workers", "1"]
        self.process = subprocess.Popen(
            [*command, "--port", str(self.port)], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        self.said = ""
        while "the team's server is up" not in self.said:
            line = self.process.stdout.readline()
            assert line, self.said + "".join(log.read_text() for log in self.folder.glob("logs/*"))
            self.said += line
        self.pids = psutil.Process(self.process.pid).children(recursive=True)
        return self

    def parts(self) -> list[psutil.Process]:
        """The processes it has started itself: those come and go with it alone."""
        return psutil.Process(self.process.pid).children()

    def kill(self) -> None:
        """As when the machine loses its power: nothing of it gets to end anything."""
        group = psutil.Process(self.process.pid).children(recursive=True)
        for process in [psutil.Process(self.process.pid), *group]:
            with contextlib.suppress(psutil.NoSuchProcess):  # its parent may have taken it along
                process.kill()
        psutil.wait_procs(group, timeout=30)
        self.process.wait()

    def wait(self) -> int:
        self.said += self.process.communicate(timeout=60)[0]
        return self.process.returncode


def sums(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("team")


@pytest.fixture(scope="module")
def old(tmp_path_factory) -> Path:
    """What one person has: mlflow.db and mlruns, with a run, its metrics and artifacts, and a registered version."""
    home = tmp_path_factory.mktemp("home")
    before = Path.cwd()
    os.chdir(home)
    try:
        client = MlflowClient("sqlite:///mlflow.db")
        run = client.create_run(client.create_experiment("alone"), run_name="first")
        client.log_batch(run.info.run_id, [Metric("loss", 1 / step, OLD + step, step) for step in range(1, 1201)])
        client.log_metric(run.info.run_id, "broken", float("nan"))
        client.log_param(run.info.run_id, "lr", "0.1")
        (home / "big.bin").write_bytes(os.urandom(6_000_000))
        client.log_artifact(run.info.run_id, str(home / "big.bin"), "deep/er")
        client.create_registered_model("aliprod-extractor")
        source = f"{run.info.artifact_uri}/deep"
        client.create_model_version("aliprod-extractor", source, run.info.run_id)
        client.set_registered_model_alias("aliprod-extractor", "champion", "1")
    finally:
        os.chdir(before)
    return home


@pytest.fixture(scope="module")
def moved(folder, old) -> dict[str, int]:
    return migration.move(f"sqlite:///{old}/mlflow.db", [old / "mlruns"], folder)


@pytest.fixture(scope="module")
def team(folder, moved) -> Iterator[Team]:
    running = Team(folder).start()
    yield running
    if running.process.poll() is None:
        running.process.terminate()
        running.wait()


@pytest.fixture
def client(team, monkeypatch) -> MlflowClient:
    """A client that knows the server's password and no key of the S3 store."""
    for name in [name for name in os.environ if name.startswith(("AWS_", "MLFLOW_S3"))] + ["MLFLOW_RUN_ID"]:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", server.read_secrets(team.folder)["MLFLOW_AUTH_ADMIN_PASSWORD"])
    mlflow.set_tracking_uri(None)  # first, as it drops the variable
    monkeypatch.setenv("MLFLOW_TRACKING_URI", team.uri)
    return MlflowClient()


def query(folder: Path, sql: str) -> list:
    data = folder.resolve() / "postgresql"
    engine = sqlalchemy.create_engine(f"postgresql+psycopg://postgres@/mlflow?host={data}")
    with engine.connect() as connection:
        return [tuple(row) for row in connection.execute(sqlalchemy.text(sql))]


def test_it_says_what_is_up_and_its_secrets_are_its_own(team):
    for part in ("postgresql", "s3", "mlflow"):
        assert re.search(rf"^{part}: up at \S+, log \S+{part}.log$", team.said, re.MULTILINE), team.said
    path = team.folder / "secrets.env"
    assert path.stat().st_mode & 0o777 == 0o600
    known = server.read_secrets(team.folder)
    assert len(set(known.values())) == len(known) == 5 and all(len(value) >= 48 for value in known.values())
    commands = " ".join(word for part in team.parts() for word in part.cmdline())
    assert not [name for name, value in known.items() if value in commands + team.said]


def test_nobody_gets_in_without_the_password_or_by_a_foreign_name(team):
    url = f"{team.uri}/api/2.0/mlflow/experiments/get?experiment_id=0"
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(url)
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(urllib.request.Request(url, headers={"Host": "evil.example"}))


def test_nobody_starts_the_database_a_second_time(team):
    with pytest.raises(InputError, match=r"folder \S+: its server is running"), server.postgresql(team.folder):
        raise AssertionError("it started")
    finished = subprocess.run(
        [sys.executable, "-m", "tracking.server", "--folder", "/dev/null/team"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert finished.returncode == 1 and finished.stderr == "[Errno 20] Not a directory: '/dev/null/team'\n"


def test_who_is_no_administrator_promotes_and_takes_back(team, client, monkeypatch, tmp_path):
    """In a registry of names of its own, as models.py knows two alone."""
    for name in ("EXTRACTOR", "CLASSIFIER"):
        monkeypatch.setattr(registry, name, f"{name.lower()}-of-users")
    names = registry.EXTRACTOR, registry.CLASSIFIER
    monkeypatch.setattr(registry, "NAMES", names)
    monkeypatch.setattr(registry, "USES", dict.fromkeys(names, ""))
    users = get_app_client("basic-auth", tracking_uri=team.uri)
    users.create_user("first", "first's password")
    users.create_user("second", "second's password")
    models = []
    for name in ("one", "other"):
        with runs.start(name, tmp_path / "work") as run:
            model = client.create_logged_model(client.get_run(run.id).info.experiment_id, source_run_id=run.id)
            client.log_outputs(run.id, [LoggedModelOutput(model.model_id, step=0)])
            (tmp_path / "saved").mkdir(exist_ok=True)
            (tmp_path / "saved" / "MLmodel").write_text("flavors: {}\n")
            client.log_model_artifacts(model.model_id, str(tmp_path / "saved"))
            client.finalize_logged_model(model.model_id, "READY")
        models.append(model.model_id)

    def become(user: str) -> None:
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", user)
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", f"{user}'s password")

    become("first")
    for name in names:
        assert registry.champion(name) is None
        registry.repair(tmp_path)
        assert registry.crown(name, models[0], None, {}, "", tmp_path)
        assert registry.crown(name, models[1], registry.champion(name), {}, "", tmp_path)

    become("second")
    for left, back in registry.rollback(names, tmp_path):
        assert (left.version, back.version) == ("2", "1") and registry.champion(left.name).version == "1"
        registry.repair(tmp_path)
        third = registry.crown(left.name, models[1], registry.champion(left.name), {}, "", tmp_path)
        assert third and registry.champion(left.name).version == third.version


def test_a_run_goes_to_postgresql_and_s3_and_comes_back_equal(team, client, tmp_path):
    (tmp_path / "files" / "below").mkdir(parents=True)
    (tmp_path / "files" / "below" / "large.bin").write_bytes(os.urandom(20_000_000))
    (tmp_path / "files" / "empty.txt").touch()
    with runs.start("team", tmp_path / "work") as run:
        for step in range(5):
            run.metrics({"loss": 1 / (step + 1)}, step)
        run.text("by the spool", "note.txt")
        client.log_artifacts(run.id, str(tmp_path / "files"))
    assert not [name for name in os.environ if name.startswith("AWS_")]
    back = Path(mlflow.artifacts.download_artifacts(run_id=run.id, dst_path=str(tmp_path / "back")))
    assert sums(back) == sums(tmp_path / "files") | sums(run.folder / "artifacts")
    rows = query(team.folder, f"SELECT step, value FROM metrics WHERE run_uuid = '{run.id}' AND key = 'loss'")
    assert sorted(rows) == [(step, 1 / (step + 1)) for step in range(5)]
    assert client.get_run(run.id).info.status == "FINISHED"
    assert list((team.folder / "s3" / "mlflow").glob(f"artifacts/*/{run.id}/artifacts/below/large.bin"))


def test_moving_loses_nothing(team, client, moved, old, tmp_path):
    with sqlite3.connect(old / "mlflow.db") as file:
        names = [name for (name,) in file.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        counts = {name: file.execute(f'SELECT count(*) FROM "{name}"').fetchone()[0] for name in names}
    assert moved == {name: count for name, count in counts.items() if name != "alembic_version"}
    assert moved["metrics"] == 1201 and moved["registered_model_aliases"] == 1
    (run,) = client.search_runs([client.get_experiment_by_name("alone").experiment_id])
    assert (run.info.run_name, run.data.params) == ("first", {"lr": "0.1"})
    history = client.get_metric_history(run.info.run_id, "loss")
    assert [(point.step, point.value, point.timestamp) for point in history] == [
        (step, 1 / step, OLD + step) for step in range(1, 1201)
    ]
    (missing,) = client.get_metric_history(run.info.run_id, "broken")
    assert missing.value != missing.value
    expected = sums(next(old.glob("mlruns/*/*/artifacts")))
    back = mlflow.artifacts.download_artifacts(run_id=run.info.run_id, dst_path=str(tmp_path / "run"))
    assert sums(Path(back)) == expected and expected
    named = mlflow.artifacts.download_artifacts("models:/aliprod-extractor@champion", dst_path=str(tmp_path / "model"))
    assert set(sums(Path(named)).values()) == set(expected.values())
    client.create_run(client.create_experiment("after"))  # the counters go on
    client.create_model_version("aliprod-extractor", f"runs:/{run.info.run_id}/deep", run.info.run_id)


def test_moving_twice_or_from_an_unnamed_folder_is_refused(moved, old, folder, tmp_path):
    with pytest.raises(InputError, match="experiments.artifact_location '.*mlruns/.*' lies in none of .*elsewhere"):
        migration._location(f"{old}/mlruns/1", [tmp_path / "elsewhere"], "experiments.artifact_location")
    with pytest.raises(InputError, match="no such file"):
        migration.move(f"sqlite:///{tmp_path}/none.db", [], folder)


def test_reaping_closes_the_dead_and_leaves_the_living(team, client, tmp_path, capsys):
    work, name = tmp_path / "work", "reaped"
    experiment = client.create_experiment(name)
    dead = client.create_run(experiment, start_time=OLD).info.run_id
    client.log_metric(dead, "system/cpu", 0.5, timestamp=OLD + 60_000)
    elsewhere = client.create_run(experiment, start_time=OLD).info.run_id
    client.log_metric(elsewhere, "system/cpu", 0.5, timestamp=int(time.time() * 1000))
    young = client.create_run(experiment).info.run_id
    here = client.create_run(experiment, start_time=OLD).info.run_id
    lock = runs.Run(here, work / "runs" / here)
    reap.main(30, name, True, work)
    assert f"run {dead}: would be closed\n1 runs" in capsys.readouterr().out
    assert client.get_run(dead).info.status == "RUNNING"
    reap.main(30, name, False, work)
    assert f"run {dead}: KILLED" in capsys.readouterr().out
    closed = client.get_run(dead)
    assert (closed.info.status, closed.info.end_time) == ("KILLED", OLD + 60_000)
    assert closed.data.tags["aliprod.reaped"] == "not heard of since 2023-11-14 22:14:20 UTC"
    assert {client.get_run(run_id).info.status for run_id in (elsewhere, young, here)} == {"RUNNING"}
    assert not reaping.close(elsewhere, OLD), "it was heard of meanwhile"
    lock.spool.put("metrics", values=[["loss", 0.5, OLD, 1]])
    lock.spool.close()
    reap.main(30, "", False, work)
    assert client.get_run(here).info.status == "KILLED"
    with pytest.raises(InputError, match="experiment 'none' not found"):
        reap.main(30, "none", False, work)


def test_a_round_is_trained_while_the_server_loses_its_power_and_comes_back(team, client, row, shop, tmp_path):
    (tmp_path / "tiny.toml").write_text(recipe.to_toml(row))
    command = [sys.executable, "-m", "entrypoints.train", "--recipe", str(tmp_path / "tiny.toml"), "--round", ""]
    given = {"data": shop, "init": "", "overrides": "epochs=60", "resume": "", "minutes": 0, "work": tmp_path / "work"}
    options = [text for name, value in given.items() for text in (f"--{name}", str(value))]
    training = subprocess.Popen(command + options, cwd=ROOT, text=True, stdout=subprocess.PIPE)
    said = ""
    while "epoch 5/60" not in said:
        line = training.stdout.readline()
        assert line, said
        said += line
    team.kill()
    while "epoch 30/60" not in said:
        line = training.stdout.readline()
        assert line, said
        said += line
    team.start()
    said += training.communicate()[0]
    assert training.returncode == 0 and "GAP" in said
    spool.send_waiting(tmp_path / "work")
    (home,) = (tmp_path / "work" / "runs").iterdir()
    found = client.get_run(home.name)
    assert found.info.status == "FINISHED"
    rows = query(team.folder, f"SELECT key, step FROM metrics WHERE run_uuid = '{home.name}' AND key NOT LIKE 'sys%'")
    assert len(rows) == len(set(rows)), "no metric is there twice"
    for key in ("train/loss", "val/map"):
        assert sorted(step for name, step in rows if name == key) == list(range(1, 61))
    updates = [step for name, step in rows if name == "step/loss"]
    assert sorted(updates) == list(range(1, max(updates) + 1)) and len(updates) >= 240
    assert {"gap", "map", "ncm_map"} <= set(found.data.metrics)
    logged = mlflow.artifacts.download_artifacts(f"runs:/{home.name}/model", dst_path=str(tmp_path / "back"))
    expected = sums(home / "model")
    assert expected.items() <= sums(next(Path(logged).glob("**/config.json")).parent).items()
    assert sums(home / "artifacts").items() <= sums(Path(mlflow.artifacts.download_artifacts(run_id=home.name))).items()


def test_a_part_that_dies_stops_all_with_one_line(team):
    (store,) = [process for process in team.parts() if process.name() == "rclone"]
    pids = psutil.Process(team.process.pid).children(recursive=True)
    store.kill()
    assert team.wait() == 1
    assert re.fullmatch(r"s3 ended with status -9: see \S+s3.log", team.said.splitlines()[-1])
    assert not psutil.wait_procs(pids + team.pids, timeout=30)[1]


def test_it_stops_as_a_group_and_starts_again_with_what_it_knew(folder, moved):
    before = server.read_secrets(folder)
    again = Team(folder).start()
    again.process.send_signal(signal.SIGTERM)
    assert again.wait() == 0 and again.said.endswith("stopped\n")
    assert not psutil.wait_procs(again.pids, timeout=30)[1]
    assert server.read_secrets(folder) == before
    assert not (folder / "postgresql" / "postmaster.pid").exists()
    with pytest.raises(InputError, match="holds runs already"):
        migration.move("sqlite:///" + str(next(folder.parent.glob("home*/mlflow.db"))), [], folder)


def test_a_port_in_use_is_refused(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with (
            pytest.raises(InputError, match=f"port {port}: Address already in use"),
            server.team(tmp_path, port, [], 1),
        ):
            pass


def test_compose_starts_the_same():
    text = (ROOT / "tracking" / "compose.yaml").read_text()
    compose = yaml.safe_load(text)
    services = compose["services"]
    assert set(services) == {"postgresql", "s3", "mlflow"}
    assert all("healthcheck" in service for service in services.values())
    assert set(services["mlflow"]["depends_on"]) == {"postgresql", "s3"}
    assert [name for name, service in services.items() if "ports" in service] == ["mlflow"]
    for image in re.findall(r"(?:image:|FROM) (\S+)", text):
        assert re.search(r":\d+\.\d+", image), image
    environment = yaml.safe_load((ROOT / "conda.yaml").read_text())
    listed = next(part["pip"] for part in environment["dependencies"] if isinstance(part, dict))
    (bounds,) = [line.removeprefix("mlflow") for line in listed if re.match("mlflow[<>=]", line)]
    assert f'"mlflow[auth]{bounds}"' in services["mlflow"]["build"]["dockerfile_inline"]
    for line in text.splitlines():
        secret = re.search(r"(PASSWORD|SECRET_KEY|ACCESS_KEY(?:_ID)?|AUTH_KEY)\s*[:=]\s*(\S+)", line)
        assert not secret or "${" in secret[2] or "${" in line, line
    made = re.findall(r"\$\{(\w+):\?\}", text)
    assert set(made) == set(server.SECRETS)


def test_a_store_may_lie_where_a_uri_would_end(tmp_path):
    folder = tmp_path / "what? now #1 100%41"
    folder.mkdir()
    with sqlite3.connect(folder / "mlflow.db") as file:
        file.execute("CREATE TABLE x (y)")
    engine = migration._copy(folder / "mlflow.db", folder / "moved.db")
    assert sqlalchemy.inspect(engine).get_table_names() == ["x"] and (folder / "moved.db").stat().st_size
    engine.dispose()

    place = folder / "mlruns" / "1"
    for value in (str(place), place.as_uri()):
        assert migration._location(value, [folder / "mlruns"], "runs") == "mlflow-artifacts:/1"
