"""Runs are opened where they belong, say why they failed, and are closed on every way out; folders may be shared."""

import errno
import fcntl
import json
import multiprocessing
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import urllib.request
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import mlflow
import pytest
import requests

from aliprod import InputError, interruption, sharing
from aliprod.atomic import replacing
from entrypoints import send
from tracking import reach, rounds, runs, spool
from tracking import store as stores

ROOT = Path(__file__).parents[1]
PROJECT = {"mlflow.source.type": "PROJECT", "mlflow.project.entryPoint": "pytest"}


@pytest.fixture
def handlers():
    """Puts back what the signals meant before."""
    before = {number: signal.getsignal(number) for number in interruption.SIGNALS}
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("status", "tags", "metrics"),
    [
        ("FINISHED", PROJECT, {}),
        ("FAILED", PROJECT, {}),
        ("RUNNING", {}, {}),
        ("RUNNING", PROJECT | {"mlflow.source.type": "NOTEBOOK"}, {}),
        ("RUNNING", PROJECT | {"mlflow.project.entryPoint": "main"}, {}),
        ("RUNNING", PROJECT | {"aliprod.git": "0123"}, {}),
        ("RUNNING", PROJECT, {"loss": 1.0}),
    ],
    ids=["finished", "failed", "script", "notebook", "another entry point", "recorded before", "metrics"],
)
def test_a_run_that_mlflow_run_has_not_just_made_is_refused_and_left_as_it_is(
    store, tmp_path, monkeypatch, status, tags, metrics
):
    theirs = store.create_run("0", tags=tags, run_name="theirs").info.run_id
    for name, value in metrics.items():
        store.log_metric(theirs, name, value)
    store.update_run(theirs, status)
    before = store.get_run(theirs).to_dictionary()
    monkeypatch.setenv("MLFLOW_RUN_ID", theirs)
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", type("Spec", (), {"name": "entrypoints.pytest"}))
    with pytest.raises(InputError, match=rf"MLFLOW_RUN_ID={theirs}: that is 'theirs', {status}; no run that"):
        runs.start("mine", tmp_path / "work").__enter__()
    assert store.get_run(theirs).to_dictionary() == before and not (tmp_path / "work" / "runs").exists()
    runs.claim("mine")
    runs.close_unopened("a reason", "FAILED")
    assert store.get_run(theirs).to_dictionary() == before


def test_the_run_that_mlflow_run_has_just_made_is_taken_over_once(store, tmp_path, monkeypatch):
    ours = store.create_run("0", tags=PROJECT).info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", ours)
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", type("Spec", (), {"name": "entrypoints.pytest"}))
    with runs.start("mine", tmp_path / "work", monitored=False) as run:
        assert run.id == ours
    assert (store.get_run(ours).info.run_name, store.get_run(ours).info.status) == ("mine", "FINISHED")
    with pytest.raises(InputError, match="that is 'mine', FINISHED"):
        runs.start("again", tmp_path / "work").__enter__()


def test_a_flow_of_ones_own_has_the_entry_points_as_nested_runs_that_say_why_they_failed(store, shop, tmp_path):
    places = {"data": str(shop), "output": str(tmp_path / "tables"), "work": str(tmp_path / "work")}
    started = {"uri": str(ROOT), "entry_point": "prepare", "env_manager": "local"}
    mlflow.set_experiment("flows")
    with mlflow.start_run(run_name="flow") as flow:
        good = mlflow.projects.run(**started, parameters=places)
        with pytest.raises(mlflow.exceptions.ExecutionException):
            mlflow.projects.run(**started, parameters=places | {"seed": "-1"})
    nested = f"tags.`mlflow.parentRunId` = '{flow.info.run_id}'"
    failed, finished = store.search_runs([flow.info.experiment_id], nested)
    assert finished.info.run_id == good.run_id and len(finished.inputs.dataset_inputs) == 3
    assert [(run.info.run_name, run.info.status) for run in (finished, failed)] == [
        ("prepare", "FINISHED"),
        ("prepare", "FAILED"),
    ]
    assert failed.data.tags["mlflow.note.content"].startswith("seed '-1': Input should be greater than or equal to 0")
    assert store.get_run(flow.info.run_id).info.run_name == "flow"


@pytest.mark.parametrize(
    ("variables", "experiment"),
    [
        ({}, runs.EXPERIMENT),
        ({"MLFLOW_EXPERIMENT_NAME": "theirs"}, "theirs"),
        ({"MLFLOW_EXPERIMENT_ID": "0"}, "Default"),
        ({"MLFLOW_EXPERIMENT_ID": "99"}, "No Experiment with id=99 exists"),
    ],
    ids=str,
)
def test_a_run_is_made_in_the_experiment_that_the_environment_names(
    store, tmp_path, monkeypatch, variables, experiment
):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if experiment.startswith("No"):
        with pytest.raises(InputError, match=f"opens no run: {experiment}"):
            runs.start("lost", tmp_path / "work").__enter__()
        return
    with runs.start("here", tmp_path / "work", monitored=False) as run:
        assert runs.experiment_of(run.id) == experiment


def test_a_run_may_be_made_beside_another(store, tmp_path, monkeypatch):
    other = store.create_run(store.create_experiment("elsewhere")).info.run_id
    with runs.start("beside", tmp_path / "work", beside=other, monitored=False) as run:
        assert runs.experiment_of(run.id) == "elsewhere"
    ours = store.create_run("0", tags=PROJECT).info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", ours)
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", type("Spec", (), {"name": "entrypoints.pytest"}))
    with runs.start("beside", tmp_path / "work", beside=other, monitored=False) as run:
        assert runs.experiment_of(run.id) == "elsewhere"
    left = store.get_run(ours)
    assert left.info.status == "FINISHED" and f"recorded as run {run.id}" in left.data.tags["mlflow.note.content"]
    monkeypatch.delenv("MLFLOW_RUN_ID")
    with runs.start("lost", tmp_path / "work", beside="0" * 32, monitored=False) as run:
        assert runs.experiment_of(run.id) == runs.EXPERIMENT


@pytest.mark.parametrize("kind", ["artifact", "model", "part of a model"])
def test_what_this_machine_does_not_keep_fails_the_run_with_the_path(store, tmp_path, monkeypatch, kind, capsys):
    if kind == "artifact":
        (tmp_path / "mlruns").unlink(missing_ok=True)
        (tmp_path / "mlruns").touch()  # as a checkout that may only be read: no folder can be made there
        expected = f"its artifact could not be kept: .*{tmp_path}/mlruns"
    elif kind == "model":
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))  # as one that is full
        expected = f"its model could not be kept: .*{tmp_path}/gone.*; it is in .*/model$"
    else:
        expected = "its model could not be kept: .*/model/lost.*; it is in .*/model$"
    with (
        pytest.raises(InputError, match=expected) as raised,
        runs.start("unkept", tmp_path / "work", monitored=False) as run,
    ):
        (tmp_path / "x.png").touch()
        (run.folder / "model").mkdir()
        (run.folder / "model" / "lost").symlink_to(tmp_path / "lost")
        run.text("a note", "note.txt") if kind == "artifact" else run.model(run.folder / "model", tmp_path / "x.png", 0)
    ended = store.get_run(run.id)
    assert ended.info.status == "FAILED" and ended.data.tags["mlflow.note.content"] == str(raised.value)
    assert f"this machine refused a record, kept in {run.folder}/refused.jsonl" in capsys.readouterr().out


def test_a_run_whose_model_is_lost_when_it_is_sent_later_is_not_finished(store, tmp_path, monkeypatch):
    with runs.start("later", tmp_path / "work", monitored=False) as run:
        run.spool._next_attempt = float("inf")  # as while the server is away
        (tmp_path / "x.png").touch()
        run.model(run.folder / "model", tmp_path / "x.png", 0)
        monkeypatch.setattr(run.spool, "send", lambda: False)
    assert store.get_run(run.id).info.status == "RUNNING"
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    with pytest.raises(InputError, match="send: of 1 runs 1 could not be sent whole: 1 records were refused: /"):
        send.main(tmp_path / "work")
    ended = store.get_run(run.id)
    assert ended.info.status == "FAILED" and "its model could not be kept" in ended.data.tags["mlflow.note.content"]


@pytest.mark.parametrize("named", ["from the folder", "absolutely", "from where the command ran"])
def test_a_work_folder_that_was_moved_is_sent_from_where_it_is(store, tmp_path, named):
    with runs.start("moved", Path("work"), monitored=False) as run:
        run.text("a note", "notes/note.txt")
    (run.folder / "spool.sent").unlink()  # as if the server had been away
    shutil.rmtree(tmp_path / "mlruns")
    journal = run.folder / "spool.jsonl"
    assert "work" not in journal.read_text()
    if named == "from the folder":
        Path("work").rename("elsewhere")
    else:  # as before they were named from the folder
        prefix = Path("work/runs", run.id, "artifacts")
        prefix = prefix.resolve() if named == "absolutely" else prefix
        journal.write_text(journal.read_text().replace('"artifacts/', f'"{prefix}/'))
    assert spool.send_waiting(Path("elsewhere" if named == "from the folder" else "work")) == {run.id: "sent"}
    assert Path(store.download_artifacts(run.id, "notes/note.txt")).read_text() == "a note"


def test_a_job_finds_what_lay_in_a_work_folder_that_was_moved(row, tmp_path):
    for folder in ("work/demo", "data"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "work" / "clean.csv").touch()
    for data, manifest in (("work/demo", "work/clean.csv"), ("data", "train")):
        named = str(tmp_path / manifest) if "/" in manifest else manifest
        job = rounds.Job("r", row.model_copy(update={"manifest": named}), str(tmp_path / data))
        folder = tmp_path / "work" / "runs" / data.replace("/", "-")
        folder.mkdir(parents=True)
        job.save(folder, tmp_path / "work")
        assert rounds.Job.load(folder.name, tmp_path / "work") == job
    (tmp_path / "work").rename(tmp_path / "moved")
    (tmp_path / "data").rename(tmp_path / "data, renamed")
    moved = rounds.Job.load("work-demo", tmp_path / "moved")
    assert (moved.data, moved.row.manifest) == (str(tmp_path / "moved/demo"), str(tmp_path / "moved/clean.csv"))
    with pytest.raises(InputError, match=f"resume 'data': its data is no more at {tmp_path}/data; give data"):
        rounds.Job.load("data", tmp_path / "moved")
    assert rounds.Job.load("data", tmp_path / "moved", str(tmp_path / "data, renamed")).row.manifest == "train"


@pytest.mark.parametrize("broken", ["no git", "no folder", "no locks"])
def test_a_run_that_was_opened_is_closed_whatever_is_missing(store, tmp_path, monkeypatch, broken):
    if broken == "no git":
        monkeypatch.setenv("PATH", str(tmp_path))
    elif broken == "no folder":
        (tmp_path / "work").mkdir()
        (tmp_path / "work" / "runs").touch()
    else:  # no disk of the kind is at hand

        def refuse(*_: object) -> None:
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

        stores.ready()
        monkeypatch.setattr(fcntl, "flock", refuse)
    try:
        with runs.start("opened", tmp_path / "work", monitored=False):
            pass
        reason = ""
    except (InputError, OSError) as error:
        reason = str(error)
    (run,) = store.search_runs(["1"])
    assert run.info.status == ("FAILED" if reason else "FINISHED")
    assert run.data.tags.get("mlflow.note.content", "") == reason
    if broken == "no git":
        assert run.data.tags["aliprod.git"] == "unknown"
    else:
        assert str(tmp_path / "work" / "runs") in reason and "\n" not in reason
        assert broken != "no locks" or "spool.jsonl: cannot be locked (No locks available)" in reason


@pytest.mark.parametrize("raised", [KeyboardInterrupt(), ValueError("no"), None], ids=repr)
def test_a_stop_that_comes_while_a_run_is_closed_does_not_leave_it_open(store, tmp_path, monkeypatch, handlers, raised):
    interruption.raise_on_signals()
    end = runs.Run.end
    monkeypatch.setattr(runs.Run, "end", lambda run, status: (signal.raise_signal(signal.SIGTERM), end(run, status)))
    with pytest.raises(KeyboardInterrupt), runs.start("stopped", tmp_path / "work", monitored=False) as run:
        if raised:
            raise raised
    expected = {"KeyboardInterrupt": "KILLED", "ValueError": "FAILED", "NoneType": "FINISHED"}
    assert store.get_run(run.id).info.status == expected[type(raised).__name__]


def test_a_closed_terminal_is_a_stop_unless_it_is_ignored(handlers):
    for ignored in (False, True):
        signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
        interruption.raise_on_signals()
        with interruption.deferred() as stop:
            signal.raise_signal(signal.SIGHUP)
        assert stop.is_set() != ignored
        try:
            signal.raise_signal(signal.SIGHUP)
            assert ignored
        except KeyboardInterrupt:
            assert not ignored


def test_a_checkpoint_is_copied_where_it_cannot_be_linked(tmp_path):
    shared = Path("/dev/shm")
    if not os.access(shared, os.W_OK) or shared.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("/dev/shm is no second file system")
    with tempfile.NamedTemporaryFile(dir=shared) as file:
        file.write(b"weights")
        file.flush()
        rounds._link(file.name, str(tmp_path / "copy"))
    assert (tmp_path / "copy").read_bytes() == b"weights"
    rounds._link(str(tmp_path / "copy"), str(tmp_path / "link"))
    assert (tmp_path / "link").samefile(tmp_path / "copy")


def test_who_waits_for_a_lock_says_so_and_then_has_it(tmp_path):
    lock = tmp_path / "lock"
    code = f"""
from pathlib import Path
from aliprod.sharing import locked
with locked(Path({str(lock)!r}), "the thing"):
    print("has it")
"""
    with sharing.locked(lock):
        with pytest.raises(sharing.Busy), sharing.locked(lock, wait=False):
            pass
        other = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert other.stdout.readline() == "the thing: waiting for another process\n"
    assert other.communicate(timeout=60)[0] == "has it\n" and other.returncode == 0


def test_what_replaces_a_file_is_as_open_as_the_umask_has_it(tmp_path):
    before = os.umask(0o027)
    try:
        with replacing(tmp_path / "new") as one, replacing(tmp_path / "new") as other:
            assert one != other, "two containers may have the same process id"
            other.touch()
            one.write_text("whole")
        assert (tmp_path / "new").stat().st_mode & 0o777 == 0o640
    finally:
        os.umask(before)


def use(work: Path, user: int, umask: int) -> str:
    """What a member of the group 54320 is told who makes in `work` what commands make there."""
    context = multiprocessing.get_context("fork")  # not everybody may run this Python anew
    said = context.SimpleQueue()

    def run() -> None:
        os.setgroups([])
        os.setgid(54320)
        os.setuid(user)
        os.umask(umask)
        try:
            sharing.open_to_group(work)
            with sharing.locked(work / "lock"), replacing(work / "note") as path:
                path.write_text("mine")
            (work / "features" / "0123").mkdir(parents=True, exist_ok=True)
            (work / "features" / "0123" / str(user)).touch()
            (work / "studies.db").touch()
            with sqlite3.connect(work / "studies.db") as database:
                database.execute("CREATE TABLE IF NOT EXISTS trials (number)")
                database.execute("INSERT INTO trials VALUES (1)")
            said.put("")
        except (InputError, OSError, sqlite3.Error) as error:
            said.put(str(error))

    process = context.Process(target=run)
    process.start()
    process.join()
    return said.get()


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be two users")
def test_members_of_a_group_share_a_work_folder_or_are_told_why_not(shared):
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        work = Path(folder) / "work"
        work.mkdir()
        os.chown(work, 54321, 54320)
        work.chmod(0o2770 if shared else 0o2750)
        said = [use(work, user, umask) for user, umask in ((54321, 0o077), (54322, 0o022), (54321, 0o077))]
        assert said[0] == said[2] == ""
        if shared:
            assert said[1] == "" and len(list(work.glob("features/0123/*"))) == 2
        else:
            assert said[1].startswith(f"{work}: you may not write to it; whoever owns it can share all of {work}")


def test_of_two_first_commands_one_makes_the_store_and_the_other_waits(tmp_path):
    environment = os.environ | {"MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/new/mlflow.db"}
    code = "from tracking import store; store.ready()"
    both = [
        subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    assert [(one.communicate()[1], one.returncode) for one in both] == [("", 0)] * 2
    with sqlite3.connect(tmp_path / "new" / "mlflow.db") as database:
        assert database.execute("SELECT count(*) FROM experiments").fetchone() == (1,)


BROKEN = {
    "locked": r"the tracking store sqlite:////.*mlflow.db does not answer: .*database is locked",
    "corrupt": r"the tracking store .* cannot be used: .*file is not a database",
    "old": r"cannot be used: Detected out-of-date database schema \(found version 0123, but expected",
    "no folder": r"cannot be used: .*(File exists|Not a directory).*",
    "a folder": r"cannot be used: .*unable to open database file",
    "file:": r"the tracking store file:///.* cannot be used: The filesystem tracking backend",
    "nonsense": r"the tracking store nonsense://there cannot be used: .*unsupported URI",
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_store_that_cannot_be_used_is_one_line(store, tmp_path, monkeypatch, kind):
    path = tmp_path / f"{kind.strip(':')} mlflow.db"
    shutil.copy(tmp_path / "mlflow.db", path)
    uri = f"sqlite:///{path}"
    with sqlite3.connect(path, isolation_level=None) as holder:
        match kind:
            case "locked":
                monkeypatch.setattr(stores, "BUSY", 0)
                holder.execute("BEGIN EXCLUSIVE")
            case "corrupt":
                path.write_bytes(b"no database at all" * 1000)
            case "old":
                holder.execute("UPDATE alembic_version SET version_num = '0123'")
            case "no folder":
                uri = f"sqlite:///{path}/below/mlflow.db"
            case "a folder":
                path.unlink()
                path.mkdir()
            case "file:":
                uri = f"file://{tmp_path}/mlruns"
            case "nonsense":
                uri = "nonsense://there"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        for _ in range(2):
            with pytest.raises(InputError, match=BROKEN[kind]) as refused:
                stores.ready()
            assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("http://ann:s3cret@host:5000/x", "http://ann:***@host:5000/x"),
        ("https://:s3cret@host", "https://:***@host"),
        ("postgresql+psycopg://ann:s3:c@ret@host/db", "postgresql+psycopg://ann:***@host/db"),
        ("postgresql://host/db?user=ann&password=s3cret&x=1", "postgresql://host/db?user=ann&password=***&x=1"),
        (
            "API request to http://a:s3cret@h/api failed: http://b@h",
            "API request to http://a:***@h/api failed: http://b@h",
        ),
        ("http://host:5000/a@b", "http://host:5000/a@b"),
        ("sqlite:////work/mlflow.db", "sqlite:////work/mlflow.db"),
    ],
)
def test_an_address_is_shown_without_its_password(text, expected):
    assert reach.shown(text) == expected


@pytest.fixture
def dead_proxy(monkeypatch) -> str:
    """A proxy, with a password, that nobody listens at."""
    for name in ("http_proxy", "https_proxy", "no_proxy", "all_proxy"):
        for variable in (name, name.upper()):
            monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("http_proxy", "http://ann:s3cret@127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "example.org")
    return "http://ann:***@127.0.0.1:9"


def test_what_is_on_this_machine_goes_past_a_proxy(dead_proxy):
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        with pytest.raises(requests.exceptions.ProxyError):
            requests.get(url, timeout=5)
        reach.prepare()
        assert requests.get(url, timeout=5).status_code == 200
        assert urllib.request.urlopen(url, timeout=5).status == 200
        server.shutdown()
    assert os.environ["NO_PROXY"].startswith("example.org,") and not reach.proxy(url)
    assert reach.proxy("http://tracking.test:5000") == dead_proxy and not reach.proxy("http://x.example.org")


def test_the_proxy_through_which_a_server_was_not_reached_is_named(dead_proxy, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    mlflow.set_tracking_uri(None)  # first, as it drops the variable
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://bob:hidden@tracking.test:5000")
    with pytest.raises(InputError, match=r"server http://bob:\*\*\*@tracking.test:5000 does not answer") as refused:
        stores.ready()
    assert str(refused.value).endswith(f"(asked through the proxy {dead_proxy})")
    assert "s3cret" not in str(refused.value) and "hidden" not in str(refused.value)


def test_a_store_that_was_moved_gets_what_waits_for_it(store, tmp_path, monkeypatch):
    with runs.start("moved", tmp_path / "work", monitored=False) as run:
        run.metrics({"loss": 0.5}, 1)
    (run.folder / "spool.sent").unlink()
    (tmp_path / "new").mkdir()
    (tmp_path / "mlflow.db").rename(tmp_path / "new" / "mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/new/mlflow.db")
    assert spool.send_waiting(tmp_path / "work") == {run.id: "sent"}
    assert json.loads((run.folder / "run.json").read_text())["tracking_uri"].endswith("/new/mlflow.db")
