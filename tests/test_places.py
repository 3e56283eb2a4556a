"""Where files are: `work` and what lies in it, projects that MLflow fetches from an address, names of two things."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import pytest
from mlflow import MlflowClient

from aliprod import InputError, recipe
from entrypoints import places
from entrypoints.command import data_folder
from entrypoints.places import Within
from tracking import models, origin, runs, steps
from tracking.parts import free_port

ROOT = Path(__file__).parents[1]
PROJECT = ("MLproject", "conda.yaml", "aliprod", "entrypoints", "tracking")


@pytest.fixture
def fetched(store, monkeypatch) -> Iterator[str]:
    """The run that `mlflow run` makes for a project from an address, which this process is now in."""
    origin._tags.cache_clear()
    origin.address.cache_clear()
    experiment = store.create_experiment("shop")
    tags = {"mlflow.source.type": "PROJECT", "mlflow.source.name": "https://token@host/team/aliprod.git#sub"}
    run_id = store.create_run(experiment, tags=tags).info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", run_id)
    monkeypatch.setattr(tempfile, "tempdir", str(ROOT.parent))
    yield run_id
    origin._tags.cache_clear()
    origin.address.cache_clear()


@pytest.mark.parametrize(
    ("source", "address"),
    [
        ("git://127.0.0.1:9418/aliprod", "git://127.0.0.1:9418/aliprod"),
        ("git@host:team/aliprod.git", "git@host:team/aliprod.git"),
        ("ssh://me:secret@host/aliprod.git#sub", "ssh://me@host/aliprod.git#sub"),
        ("https://me:secret@host/aliprod.git", "https://host/aliprod.git"),
        ("https://host/aliprod.zip", "https://host/aliprod.zip"),
        (str(ROOT), ""),
        (f"file://{ROOT}", ""),
        (f"file://{ROOT.parent}#{ROOT.name}", ""),
    ],
)
def test_a_fetched_project_is_told_from_one_in_its_place(fetched, store, source, address):
    store.set_tag(fetched, "mlflow.source.name", source)
    assert places.fetched_from() == address


def test_a_run_that_is_no_projects_says_nothing_of_where_the_project_is(fetched, store):
    store.set_tag(fetched, "mlflow.source.type", "NOTEBOOK")
    assert places.fetched_from() == ""


def test_how_to_go_on_names_the_address_the_version_and_the_environment(fetched, store):
    store.set_tag(fetched, "mlflow.source.git.branch", "next")
    store.set_tag(fetched, "mlflow.project.env", "uv")
    said = shlex.split(origin.again("train", resume="0123", work="/a folder/work"))
    assert said == [
        *("mlflow", "run", "https://host/team/aliprod.git#sub", "-v", "next", "-e", "train", "--env-manager", "uv"),
        *("-P", "resume=0123", "-P", "work=/a folder/work"),
    ]
    assert origin.pages().startswith("mlflow server --backend-store-uri sqlite:///")


RELATIVE = {
    "data": "shop",
    "images": "/x/1.jpg 2.jpg",
    "source": "shop",
    "recipe": "demo mine/own.toml",
    "split": "val.csv",
    "model": "work/model",
    "models": "newest ./model",
    "init": "../model",
    "manifest": "clean.csv",
    "output": "out.csv",
    "work": "work",
    "overrides": "lr=1 select_list=few.csv",
}


@pytest.mark.parametrize("name", RELATIVE)
def test_a_relative_path_is_refused_where_the_project_was_fetched(fetched, name):
    wrong = RELATIVE[name].split()[-1].rpartition("=")[2]
    with pytest.raises(InputError, match=f"{wrong}': give the path in full; .* MLflow fetched https://host/team"):
        places.place({name: RELATIVE[name]}, {})


def test_words_addresses_and_full_paths_are_taken_where_the_project_was_fetched(fetched, tmp_path):
    (tmp_path / "a folder").mkdir()
    values = {
        "data": "demo",
        "images": f"{tmp_path}/a folder",
        "recipe": f"v1 {tmp_path}/own.toml",
        "split": "val",
        "model": "models:/aliprod-classifier@champion",
        "models": "newest v1/v1.1",
        "init": "v1/v1.1",
        "manifest": "v2/reliable",
        "output": "s3://bucket/out.csv",
        "work": str(tmp_path),
        "overrides": "manifest=balanced init=imagenet",
    }
    assert places.place(values, {}) == values
    for data in ("s3://bucket/shop", str(tmp_path)):
        assert places.place({"data": data, "images": "newest"}, {})["data"] == data


def test_work_is_where_it_is_found_again_and_outputs_lie_in_it(fetched, store, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "share"))
    lies_in_it = {"output": Annotated[Path, Within("tables")]}
    values = places.place({"work": "", "output": ""}, lies_in_it)
    assert values == {"work": f"{tmp_path}/share/aliprod", "output": f"{tmp_path}/share/aliprod/tables"}
    assert capsys.readouterr().out == f"work:      {tmp_path}/share/aliprod\n"

    monkeypatch.setenv("ALIPROD_WORK", str(tmp_path / "mine"))
    assert places.place({"work": "", "output": ""}, lies_in_it)["output"] == f"{tmp_path}/mine/tables"
    assert places.place({"output": ""}, lies_in_it)["output"] == f"{tmp_path}/mine/tables"
    monkeypatch.setenv("ALIPROD_WORK", "mine")
    with pytest.raises(InputError, match="ALIPROD_WORK 'mine': give the path in full"):
        places.work()
    monkeypatch.delenv("ALIPROD_WORK")
    (tmp_path / "share").rename(tmp_path / "moved")
    (tmp_path / "share").write_text("in the way")
    with pytest.raises(InputError, match="no place for work: .*; set ALIPROD_WORK"):
        places.work()

    store.set_tag(os.environ["MLFLOW_RUN_ID"], "mlflow.source.name", str(ROOT))
    origin.address.cache_clear()
    origin._tags.cache_clear()
    assert places.place({"work": "", "output": ""}, lies_in_it) == {"work": "work", "output": "work/tables"}


@pytest.fixture
def address(tmp_path) -> Iterator[str]:
    """Where a `git daemon` of this machine has the project, as it is here, committed."""
    if not Path(subprocess.check_output(["git", "--exec-path"], text=True).strip(), "git-daemon").exists():
        pytest.skip("this machine's git comes without git-daemon")
    project = tmp_path / "srv" / "aliprod"
    project.mkdir(parents=True)
    for name in PROJECT:
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, project / name)
    as_someone = ["-c", "user.name=someone", "-c", "user.email=someone@localhost"]
    for command in (["init", "-q"], ["add", "."], [*as_someone, "commit", "-q", "-m", "all of it"]):
        subprocess.run(["git", *command], cwd=project, check=True)
    port = free_port()
    command = ["git", "daemon", "--export-all", f"--base-path={tmp_path / 'srv'}", "--listen=127.0.0.1"]
    daemon = subprocess.Popen([*command, f"--port={port}"], start_new_session=True)
    yield f"git://127.0.0.1:{port}/aliprod"
    os.killpg(daemon.pid, signal.SIGKILL)
    daemon.wait()


@pytest.mark.slow
def test_what_runs_from_a_git_address_goes_on_with_the_same_command(address, row, shop, empty_store, tmp_path):
    long = row.model_copy(update={"epochs": 25})
    (tmp_path / "long.toml").write_text(recipe.to_toml(long))
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    (tmp_path / "tmp").mkdir()
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW", "ALIPROD"))}
    environment |= {"XDG_DATA_HOME": str(tmp_path / "share"), "TMPDIR": str(tmp_path / "tmp")}
    command = [sys.executable, "-m", "mlflow", "run", address, "--env-manager", "local"]
    command += ["-P", f"data={shop}", "-P", "promote=false"]

    def start(recipe: str) -> subprocess.Popen:
        options = {"cwd": tmp_path, "env": environment, "text": True, "start_new_session": True}
        return subprocess.Popen(
            [*command, "-P", f"recipe={recipe}"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options
        )

    first = start(f"{tmp_path}/long.toml")
    work = tmp_path / "share" / "aliprod"
    while first.poll() is None and not list(work.glob("runs/*/checkpoints/step-*")):
        time.sleep(0.05)
    os.killpg(first.pid, signal.SIGINT)
    out, err = first.communicate()
    assert f"work:      {work}\n" in out and "stopped; the same command goes on" in err
    (stopped,) = {folder.parent.name for folder in work.glob("runs/*/checkpoints")}

    again = start(f"{tmp_path}/long.toml")
    out, err = again.communicate()
    assert again.returncode == 0, err
    assert f"long/tiny: goes on where run {stopped} was cut off" in out
    store = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    experiments = [experiment.experiment_id for experiment in store.search_experiments()]
    resumed, before = store.search_runs(experiments, "tags.`aliprod.round` = 'tiny'")
    assert before.info.run_id == stopped and before.info.status == "KILLED"
    assert resumed.info.status == "FINISHED" and resumed.data.tags["aliprod.resumed_from"] == stopped
    assert not list((tmp_path / "tmp").glob("*/mlflow.db")) and not list((tmp_path / "tmp").glob("*/work"))

    refused = start("long.toml")
    _, err = refused.communicate()
    assert f"recipe 'long.toml': give the path in full; a relative one starts at {tmp_path}/tmp/" in err
    assert "Traceback" not in err.partition("give the path in full")[0]


def test_a_step_is_preferred_to_a_folder_of_its_name_and_a_line_says_so(store, tmp_path, capsys):
    steps._say_preferred.cache_clear()
    with runs.start("mine/tiny", tmp_path / "work", {"recipe": "mine", "round": "tiny", "data": "0123"}) as run:
        pass
    for name in ("tiny", "other"):
        Path(name).mkdir()
    assert steps.resolve("tiny", "mine", "0123", {}) == run.id
    assert steps.resolve("tiny", "mine", "4567", {"mine/tiny": "89ab"}) == "89ab"
    assert capsys.readouterr().out == "'tiny' is the step mine/tiny; what lies here and is called so is ./tiny\n"
    assert steps.resolve("other", "mine", "0123", {}) == "other", "no step is called so: it is the folder"
    assert steps.resolve("./tiny", "mine", "0123", {}) == "./tiny"


def test_the_demo_catalogue_is_preferred_to_a_folder_of_its_name_and_a_line_says_so(store, tmp_path, capsys):
    for folder in (tmp_path / "demo", tmp_path / "work" / "demo"):
        folder.mkdir(parents=True)
        (folder / "train.json").write_text("{}")
    with pytest.raises(InputError, match="work/demo"):  # which is not this catalogue: nothing is rendered
        data_folder("demo", tmp_path / "work")
    assert capsys.readouterr().out == "data: demo is the demo catalogue; the folder here that is called so is ./demo\n"


def test_the_newest_model_is_preferred_to_a_folder_of_that_name(store, tmp_path):
    for name in ("newest", "0123456789abcdef0123456789abcdef"):
        Path(name).mkdir()
        Path(name, "config.json").write_text("{}")
        with pytest.raises(InputError, match=f"model '{name}' not found"):
            models.fetch(name)
        assert models.fetch(f"./{name}") == Path(name)
