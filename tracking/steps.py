"""Steps of a recipe in the store: which run an earlier step is, what it left, and what its result depends on."""

import functools
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.exceptions import MlflowException

import aliprod
from aliprod import InputError, manifest, training
from aliprod.recipe import MANIFESTS, NEWEST, RESERVED, WEIGHTS, Cleaning, Round
from tracking import models, search, spool, storage


def resolve(name: str, recipe: str, data: str, done: dict[str, str]) -> str:
    """What `name`, an init, manifest or model in a row of `recipe`, stands for: a run's id, or `name` itself.

    A step, `step` or `recipe/step`, is the run in `done` (recipe/step -> run id), else the newest finished one of that
    name on the data of digest `data`, "" being any; that is preferred to a file or folder here of that name, and a line
    says so. newest is the newest run that logged a model, unless `done` says which. InputError where there is none.
    """
    if name == NEWEST:
        run_id = done.get(NEWEST) or models.newest({}, of_model=True)
        if not run_id:
            raise InputError(f"{name!r}: no finished run has logged a model yet")
        return run_id
    if not _may_be_step(name):
        return name
    of, _, step = name.rpartition("/")
    of = of or recipe
    tags = {"aliprod.recipe": of, "aliprod.round": step} | ({"aliprod.data": data} if data else {})
    run_id = done.get(f"{of}/{step}") or models.newest(tags)
    if run_id and Path(name).exists():
        _say_preferred(name, f"{of}/{step}")
    return run_id or name


@functools.cache  # a step is asked for more than once
def _say_preferred(name: str, step: str) -> None:
    print(f"{name!r} is the step {step}; what lies here and is called so is ./{name}", flush=True)


def is_step(name: str) -> bool:
    """Whether `name` can only be a step's: it is no word, no file, no run's id and no URI."""
    return _may_be_step(name) and not Path(name).exists()


def _may_be_step(name: str) -> bool:
    known = name in RESERVED or re.fullmatch("[0-9a-f]{32}", name) or re.match(r"\w+:/", name)
    return not known and re.fullmatch(r"(.+/)?[\w.-]+", name) is not None


def table(name: str, recipe: str, data: Path, done: dict[str, str]) -> str:
    """The manifest that a round's `manifest` names, as manifest.read takes it: a [[clean]] step's is fetched."""
    if name in MANIFESTS or name.endswith(".csv"):
        return name
    run_id = resolve(name, recipe, manifest.digest(manifest.read(data, "train")), done)
    try:
        path = f"{name.rpartition('/')[2]}.csv"
        return str(models.download(run_id=run_id, artifact_path=path))
    except (MlflowException, OSError):
        raise InputError(f"manifest {name!r}: no finished [[clean]] step of this name on this data") from None


def data_key(data: Path, train: str) -> str:
    """Digest of what every step on a data folder depends on: the train split, whose digest is `train`, val, the tree,
    and this library's code."""
    tables = [train, manifest.digest(manifest.read(data, "val"))]
    code = sorted(Path(aliprod.__file__).parent.glob("*.py"))
    return _digest(tables + [storage.digest(path) for path in (*code, data / "product_tree.json") if path.exists()])


def key(step: Round | Cleaning, data: str, sources: list[str]) -> str:
    """Digest of all that a step's result depends on: its row, `data_key`, and what the names in it resolve to."""
    row = step.model_dump(mode="json", exclude={"name", "reported", "init", "manifest", "models"})
    listed = [storage.digest(Path(row["select_list"]))] if row.get("select_list") else []
    return _digest([row, data, [_identity(source) for source in sources], *listed])


def finished(key: str) -> str | None:
    """Id of the newest finished run of the step with this key."""
    return next((run.info.run_id for run in _runs(key) if run.info.status == "FINISHED"), None)


def unfinished(key: str, work: Path) -> str:
    """Id of the newest run of the step with this key that left a whole checkpoint in `work` and is not alive; "" if
    there is none."""
    folders = [work / "runs" / run.info.run_id for run in _runs(key) if run.info.status != "FINISHED"]
    left = (
        folder.name for folder in folders if training.newest_checkpoint(folder / "checkpoints") and spool.idle(folder)
    )
    return next(left, "")


def _runs(key: str) -> Iterator[Run]:
    return search.runs({"key": key})


def _identity(source: str) -> str:
    if source in (*WEIGHTS, *MANIFESTS):
        return source
    if re.fullmatch("[0-9a-f]{32}", source):
        return MlflowClient().get_run(source).data.tags.get("aliprod.key", source)
    path = Path(source) if Path(source).is_file() else models.fetch(source) / "model.safetensors"
    return storage.digest(path)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]
