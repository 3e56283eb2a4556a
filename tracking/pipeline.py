"""A recipe's steps in order, as runs nested in one parent: what is finished is reused, what was cut off goes on.

The last step offers the extractors of all rounds to the registry.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
from mlflow import MlflowClient

from aliprod import InputError, manifest, report
from aliprod.recipe import Cleaning, Recipe, Round
from tracking import cleanings, promotions, rounds, runs, steps
from tracking.runs import Run

RESULTS = ("R", "Class Number", "GAP", "MAP", "Reported GAP", "Reported MAP", "NCM", "1-NN", "Extractor")  # shown first


def plan(recipes: list[Recipe]) -> list[tuple[str, Round | Cleaning]]:
    """All steps with their recipe's name, in the order they run: a cleaning just before the first round to name it."""
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

    With `promote` the best of their extractors is then promoted if it is better than the champion, by the limits'
    defaults; the table says which it is, what was decided, and why.

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
        key = steps.key(row, base, [steps.resolve(name, recipe, digest, done) for name in _names(row)])
        run_id = steps.finished(key)
        if run_id:
            print(f"{title}: finished before, reused from run {run_id}", flush=True)
        else:
            run_id = _do(parent, recipe, row, key, data, work, done)
        done[title] = run_id
        if isinstance(row, Round):
            scores = _scores(run_id)
            results.append((row, {"recipe": recipe, "run": run_id} | scores))
            parent.metrics({name: scores[name] for name in ("gap", "map", "ncm_map", "nn_map")}, number)
            table = _log(parent, results, {})
    if promote:
        candidates = " ".join(scores["run"] for _, scores in results)
        with runs.start("promote", work, {"candidates": candidates}, parent) as child:
            ground = promotions.Ground.read(data)
            verdict = promotions.promote(child, candidates, ground, promotions.Limits(), work, dry_run=False)
        said = f"{verdict['decision']}: {'; '.join(verdict['reasons'])}"
        table = _log(parent, results, {verdict["candidate"]["run"]: said})
    return table


def _log(parent: Run, results: list[tuple[Round, dict[str, Any]]], verdict: dict[str, str]) -> pd.DataFrame:
    table = report.rounds(results, verdict)
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
