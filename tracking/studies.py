"""A study under a run: each trial a run nested in it, and in the end what was found, drawn and ready to be trained."""

import contextlib
import dataclasses
import html
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import sqlalchemy
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from aliprod import InputError, assembly, interruption, manifest, recipe, report, tuning
from aliprod.atomic import replacing
from aliprod.material import Material
from aliprod.model import load_head
from aliprod.recipe import Round
from aliprod.space import Tuning
from aliprod.training import Diverged
from aliprod.tuning import Study, Trial
from tracking import copies, origin, rounds, runs, steps
from tracking.runs import Run

PAGE = """<!doctype html>
<meta charset="utf-8">
<title>{title}</title>
<style>body {{ font-family: sans-serif; margin: 2em; }} h2 {{ margin: 2em 0 0; }}</style>
<h1>{title}</h1>
<p>{line}</p>"""
EVERY = 5  # seconds between two batches of a trial's metrics; one alone costs as much as an epoch of a frozen round


@dataclasses.dataclass(frozen=True)
class Search:
    """What a worker was asked to do. Of one study these may differ from worker to worker: trials and how to search."""

    recipe: str
    row: Round
    tuning: Tuning
    data: str
    name: str  # of the study; "": from recipe, round and data
    storage: str  # as of tuning.join; "": a file in work
    trials: int
    sampler: str
    pruner: str
    seed: int

    def __post_init__(self) -> None:
        for field, choices in (("sampler", tuning.SAMPLERS), ("pruner", tuning.PRUNERS)):
            if getattr(self, field) not in choices:
                raise InputError(f"{field} {getattr(self, field)!r}: must be {' or '.join(choices)}")
        if self.trials < 1:
            raise InputError(f"trials {self.trials}: must be at least 1")


def tune(search: Search, work: Path) -> str:
    """Joins the study, or makes it, tries rounds until it is complete and records what came out; a summary of it.

    Raises KeyboardInterrupt when stopped, the trial given back, and InputError where no trial came to its end.
    """
    row, job = search.row, rounds.Job(search.recipe, search.row, search.data)
    here = copies.tables_here(row, work)
    path = steps.table(here.manifest, search.recipe, Path(search.data), {})
    tables = assembly.tables(here.model_copy(update={"manifest": path}), search.data)
    digest = tables.data_digest
    about = {
        "init": steps.resolve(row.init, search.recipe, digest, {}),
        "train": manifest.digest(tables.train),
        "val": manifest.digest(tables.val),
    }
    name = search.name or f"{search.recipe}-{row.name}-{digest[:8]}"
    work.mkdir(parents=True, exist_ok=True)
    storage = search.storage
    if not storage:
        (work / "studies.db").touch()  # SQLite itself would make it for its owner alone
        storage = str(sqlalchemy.URL.create("sqlite", database=str(work.resolve() / "studies.db")))
    study = tuning.join(storage, name, row, search.tuning, about)
    with _parent(study, search, digest, work) as parent:
        init = rounds.source_of(job, digest)
        made = assembly.model(row, len(tables.classes), init, tables.levels)
        load_head(made, init, tables.classes)
        material = Material(row, search.tuning, tables, made, search.data, work / "features")
        given = (search.trials, search.sampler, search.pruner, search.seed)
        with contextlib.closing(study.search(*given)) as trials:
            for trial in trials:
                _try(study, trial, material, parent, work)
        return _conclude(study, search, parent, work)


@contextlib.contextmanager
def _parent(study: Study, search: Search, digest: str, work: Path) -> Iterator[Run]:
    """The run of the study: a new one where nobody has opened it yet, else the one all workers share."""
    joined = study.run
    if joined and (own := runs.project_run()):  # `mlflow run` made one for this worker alone
        MlflowClient().set_tag(own.info.run_id, "mlflow.parentRunId", joined)
        MlflowClient().update_run(own.info.run_id, name="worker")
    title = f"{search.recipe}/{search.row.name}, tuned"
    tags = {"recipe": search.recipe, "round": f"{search.row.name}, tuned", "data": digest, "study": study.name}
    with runs.start(title, work, {} if joined else tags, join=joined, monitored=not joined) as parent:
        if not joined:
            space = {f"space.{field}": axis for field, axis in search.tuning.space.items()}
            parent.params({"objective": search.tuning.objective, "data_folder": search.data} | space)
            parent.text(recipe.to_toml(search.row), "round.toml")
            study.open(parent.id)
        print(f"study {study.name}: {'joined' if joined else 'new'}, run {parent.id}", flush=True)
        yield parent


def _try(study: Study, trial: Trial, material: Material, parent: Run, work: Path) -> None:
    """Trains a trial as a run of its own. What fails is that run's; the user's mistakes are raised."""
    for run_id in trial.attempts:
        _close(run_id, trial.number)
    values = ", ".join(f"{name} {_short(value)}" for name, value in trial.values.items())
    tags = {"trial": trial.number, "study": study.name}
    began = time.monotonic()
    try:
        with (
            interruption.deferred() as stop,
            runs.start(f"trial {trial.number}", work, tags, parent, monitored=trial.row.freeze != "all") as run,
        ):
            trial.recorded(run.id)
            run.params({f"round.{name}": value for name, value in trial.row.model_dump().items() if value is not None})
            _record(run, trial, material, stop)
            run.metrics(trial.scores, trial.epoch)
            if trial.state == "running":
                raise KeyboardInterrupt
            run.tags({"state": trial.state})
            if trial.state == "pruned":
                raise runs.Cut(f"pruned after epoch {trial.epoch} of {trial.row.epochs}")
            if trial.state == "lost":
                raise runs.Cut("not heard of for too long: another worker has it")
    except Exception as error:
        if not trial.error or (isinstance(error, InputError) and not isinstance(error, Diverged)):
            raise
    study.tell(trial)
    if stop.is_set():
        raise KeyboardInterrupt
    best = study.best()
    outcome = trial.error or f"{study.tuning.objective} {_short(trial.scores.get(study.tuning.objective))}"
    so_far = f"; best {best[1]:.4f}, trial {best[0]}" if best else ""
    print(
        f"trial {trial.number}: {values}: {trial.state}, {outcome}{so_far}  {time.monotonic() - began:.1f} s",
        flush=True,
    )
    with contextlib.suppress(MlflowException):  # another worker that was stopped may have closed it
        MlflowClient().update_run(parent.id, "RUNNING")
    if best:
        parent.metrics({f"best_{study.tuning.objective}": best[1]}, trial.number)


def _record(run: Run, trial: Trial, material: Material, stop: threading.Event) -> None:
    """Trains, and sends curves by epoch in batches."""
    curves: dict[str, list[dict[str, float]]] = {"train/": [], "val/": []}
    sent = time.monotonic()

    def send() -> None:
        for prefix, points in curves.items():
            if points:
                run.curve(points, prefix)
            points.clear()

    try:
        for made in trial.reports(material, stop):
            if made.train:
                rate = {"lr": made.curve[-1]["lr"]} if made.curve else {}
                curves["train/"].append({"step": made.epoch, **made.train, **rate})
                curves["val/"].append({"step": made.epoch, **made.val})
            if time.monotonic() - sent > EVERY:
                send()
                sent = time.monotonic()
    finally:
        send()


def _conclude(study: Study, search: Search, parent: Run, work: Path) -> str:
    """Records what was found, which every worker does alike; a summary."""
    table = study.table()
    parent.table(table, "trials.csv")
    counts = ", ".join(f"{count} {state}" for state, count in table["state"].value_counts().items())
    best, objective = study.best(), search.tuning.objective
    if not best:
        last = table["error"][table["error"] != ""].tail(1).to_list()
        raise InputError(
            f"study {study.name}: no trial came to its end ({counts}): {last[0] if last else 'all pruned'}"
        )
    number, score, row = best
    row = row.model_copy(update={name: _elsewhere(getattr(row, name), search.recipe) for name in ("init", "manifest")})
    title = f"{objective} {score:.4f} on val, trial {number} of study {study.name}"
    file = work / "best.toml"
    command = origin.again("train", recipe=file, data=search.data)
    command = "\n#   ".join(command.splitlines())  # a path may hold a line break
    text = f"# {search.recipe}/{row.name}, tuned: {title}.\n#\n#   {command}\n\n{recipe.to_toml(row)}"
    with replacing(file) as beside:
        beside.write_text(text, encoding="utf-8")
    parent.text(text, "best.toml")
    parent.reports({"figures/study.html": lambda: _page(study, f"{title}; {counts}")})
    parent.metrics({objective: score, "num_trials": int(table["state"].isin(tuning.FINISHED).sum())}, 0)
    values = {name: getattr(row, name) for name in search.tuning.active(row.model_dump())}
    run_id = table.set_index("number")["run"][number]
    parent.tags({f"best.{name}": value for name, value in values.items()} | {"best_trial": number, "best_run": run_id})
    written = study.written()
    sides = {
        "as written": ({objective: written} | study.tuning.starts(search.row)[0]),
        "best": {objective: score} | values,
    }
    lines = pd.DataFrame(sides).map(_short).reset_index(names="")
    parent.tags({"mlflow.note.content": f"{report.markdown(lines)}\n\n{title[0].upper() + title[1:]}; {counts}."})
    return (
        f"{objective.upper()} {score:.4f}, as written {_short(written)}  ({counts})\n"
        f"best:      {file.resolve()}\n"
        f"run:       {parent.id}"
    )


def _page(study: Study, line: str) -> str:
    """The figures as one page that needs no network."""
    parts = [PAGE.format(title=html.escape(study.name), line=html.escape(line))]
    for title, figure in study.figures().items():
        drawn = isinstance(figure, str) and html.escape(figure)
        if not drawn:
            figure.update_layout(title=None, width=None, margin={"t": 30})
        parts.append(f"<h2>{title}</h2>\n{drawn or figure.to_html(full_html=False, include_plotlyjs=len(parts) == 1)}")
    return "\n".join(parts)


def _close(run_id: str, number: int) -> None:
    """Ends the run of an attempt that came to nothing."""
    with contextlib.suppress(MlflowException):
        client = MlflowClient()
        if client.get_run(run_id).info.status != "KILLED":
            client.set_tag(run_id, "aliprod.cut", f"its worker fell silent: tried again as trial {number}")
            client.set_terminated(run_id, "KILLED")


def _elsewhere(name: str, of: str) -> str:
    """A step's name as other recipes say it."""
    return f"{of}/{name}" if steps.is_step(name) and "/" not in name else name


def _short(value: Any) -> str:
    known = value is not None and value == value
    return f"{value:.4g}" if isinstance(value, float) and known else str(value) if known else ""
