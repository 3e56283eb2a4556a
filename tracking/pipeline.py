"""A recipe's steps in order, as runs nested in one parent: what is finished is reused, what was cut off goes on.

The last step offers all rounds to the registry, as extractors and as classifiers.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
from mlflow import MlflowClient

from aliprod import InputError, manifest, report
from aliprod.recipe import NEWEST, Cleaning, Recipe, Round
from tracking import cleanings, models, promotions, rounds, runs, steps
from tracking.runs import Run

# The columns shown first.
RESULTS = (
    *("R", "Class Number", "GAP", "MAP", "Reported GAP", "Reported MAP", "NCM", "1-NN"),
    *("Extractor", "Classifier"),
)
# The scores of the parent, by whose they are; the first decides.
OWN = {"classifier": ("map", "gap"), "extractor": ("ncm_map", "nn_map")}


def plan(recipes: list[Recipe]) -> list[tuple[str, Round | Cleaning]]:
    """All steps with their recipe's name, in the order they run: a cleaning just before the first round to name it.

    InputError if two recipes have the same name, as their steps could not be told apart.
    """
    names = [recipe.name for recipe in recipes]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"recipe: {twice[0]!r} is the name of more than one of them")
    order: dict[str, tuple[str, Round | Cleaning]] = {}
    cleanings = {f"{recipe.name}/{row.name}": (recipe.name, row) for recipe in recipes for row in recipe.cleanings}
    for recipe in recipes:
        for row in recipe.rounds:
            needed = row.manifest if "/" in row.manifest else f"{recipe.name}/{row.manifest}"
            if needed in cleanings:
                order.setdefault(needed, cleanings[needed])
            order[f"{recipe.name}/{row.name}"] = (recipe.name, row)
    return list(order.values())


def run(parent: Run, recipes: list[Recipe], data: Path, work: Path, promote: bool) -> pd.DataFrame:
    """Runs every step and logs the table of rounds, as of report.rounds, under `parent` after each.

    With `promote` the best of them as an extractor and the best as a classifier are then promoted if they are better
    than the champions, by the limits' defaults; the table says which these are, what was decided, and why. Their scores
    are the parent's own; otherwise those of the rounds of the highest MAP and of the highest nearest class mean MAP.

    A finished run of the same key (steps.key) is taken instead of running a step again; one that was cut off and whose
    checkpoint lies in `work` is resumed. InputError, before anything runs, if a step names what is nowhere.
    """
    digest = manifest.digest(manifest.read(data, "train"))
    base = steps.data_key(data, digest)
    order = plan(recipes)
    _refuse_unknown(order, digest)
    done: dict[str, str] = {}
    results: list[tuple[Round, dict[str, Any]]] = []
    for number, (recipe, row) in enumerate(order, start=1):
        title = f"{recipe}/{row.name}"
        # One and the same newest for the key and for the step, whatever other runs end meanwhile.
        pinned = done | {NEWEST: models.newest({}, of_model=True) or ""} if NEWEST in _names(row) else done
        key = steps.key(row, base, [steps.resolve(name, recipe, digest, pinned) for name in _names(row)])
        run_id = steps.finished(key)
        if run_id:
            print(f"{title}: finished before, reused from run {run_id}", flush=True)
        else:
            run_id = _do(parent, recipe, row, key, data, work, pinned)
        done[title] = run_id
        if isinstance(row, Round):
            scores = _scores(run_id)
            results.append((row, {"recipe": recipe, "run": run_id} | scores))
            curves = {name: scores[name] for names in OWN.values() for name in names}
            parent.metrics(curves, number, "rounds/")
            table = _log(parent, results, {})

    of_rounds = {scores["run"]: scores for _, scores in results}
    best = {question: max(of_rounds, key=lambda id: of_rounds[id][names[0]]) for question, names in OWN.items()}
    if promote:
        offered = " ".join(of_rounds)
        with runs.start("promote", work, {"candidates": offered}, parent) as child:
            ground, limits = promotions.Ground.read(data), promotions.Limits()
            verdicts = promotions.promote(child, promotions.candidates(offered), ground, limits, work, dry_run=False)
        best = {question: verdict.candidate.run_id for question, verdict in verdicts.items()}
        table = _log(parent, results, verdicts)
    parent.tags(best)
    for question, names in OWN.items():
        parent.metrics({name: of_rounds[best[question]][name] for name in names}, 0)
    return table


def _log(
    parent: Run, results: list[tuple[Round, dict[str, Any]]], verdicts: dict[str, promotions.Verdict]
) -> pd.DataFrame:
    said = {
        question.capitalize(): {verdict.candidate.run_id: f"{verdict.decision}: {'; '.join(verdict.reasons)}"}
        for question, verdict in verdicts.items()
    }
    table = report.rounds(results, said)
    parent.table(table, "rounds.csv")
    parent.reports(
        {"rounds.md": lambda: report.markdown(table), "figures/rounds.png": lambda: report.rounds_figure(table)}
    )
    parent.tags({"mlflow.note.content": report.markdown(table[list(RESULTS)])})
    return table


def _do(parent: Run, recipe: str, row: Round | Cleaning, key: str, data: Path, work: Path, done: dict[str, str]) -> str:
    resume = steps.unfinished(key, work)
    if resume:
        print(f"{recipe}/{row.name}: goes on where run {resume} was cut off", flush=True)
    with runs.start(f"{recipe}/{row.name}", work, {"key": key}, parent) as child:
        if isinstance(row, Round):
            rounds.train(child, rounds.Job(recipe, row, str(data), done), work, resume)
        else:
            cleanings.clean(child, recipe, row, data, work, done)
    return child.id


def _scores(run_id: str) -> dict[str, Any]:
    """What the store has on a finished round."""
    found = MlflowClient().get_run(run_id).data
    if "num_classes" not in found.params:
        raise InputError(f"run {run_id} waits to be sent to the tracking server; the same command goes on after it")
    return found.metrics | {"num_classes": int(found.params["num_classes"])}


def _names(row: Round | Cleaning) -> Iterator[str]:
    yield row.manifest
    yield from (row.init,) if isinstance(row, Round) else row.models


def _refuse_unknown(order: list[tuple[str, Round | Cleaning]], digest: str) -> None:
    earlier: dict[str, str] = {}
    for recipe, row in order:
        for name in _names(row):
            if steps.is_step(name) and steps.resolve(name, recipe, digest, earlier) == name:
                raise InputError(
                    f"{recipe}/{row.name}: {name!r} is no step before it, no finished one on this data, and no file"
                )
        earlier[f"{recipe}/{row.name}"] = "to come"
