"""Enrolments under a run: photographs put into a model's gallery or taken out, the model logged and registered anew.

The photographs stay with the run, so that a later network can enrol them again.
"""

import dataclasses
import re
import shutil
import time
from pathlib import Path

import pandas as pd
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from PIL import Image

from aliprod import InputError, assembly, enrolment, prediction
from aliprod.gallery import Gallery
from aliprod.model import Saved, load
from tracking import models, registry
from tracking.runs import Run

PHOTOGRAPHS = "photographs"  # the folder of a run's artifacts that has them, named by their digests


def enroll(run: Run, model: str, photographs: pd.DataFrame, work: Path) -> tuple[pd.DataFrame, str]:
    """Enrols photographs (as of enrolment.listed) into a model: what became of each, as of enrolment.enroll, and the
    name of the new model, "" if all were there already."""
    version, source, saved = _source(model, work)
    began = time.perf_counter()
    gallery, table = enrolment.enroll(saved, photographs, run.id)
    seconds = time.perf_counter() - began
    run.metrics({"seconds": seconds, "num_enrolled": float(table["outcome"].eq("enrolled").sum())}, 0)
    run.table(table, "enrolled.csv")
    if gallery.enrolled.equals(saved.gallery.enrolled):  # type: ignore[union-attr]
        return table, ""
    kept = run.folder / "artifacts" / PHOTOGRAPHS
    kept.mkdir(parents=True, exist_ok=True)
    for row in table[table["outcome"] == "enrolled"].itertuples():
        shutil.copy(row.file, kept / _name(row.sha256, row.file))
    run.files(kept)
    example = table["file"][table["outcome"].isin(["enrolled", "known"])].iloc[0]
    return table, _log(run, source, gallery, version, example, work)


def withdraw(run: Run, model: str, class_ids: list[str], files: list[str], work: Path) -> tuple[pd.DataFrame, str]:
    """Takes what enrolment.withdraw says out of a model: the rows that went, and the name of the new model."""
    version, source, saved = _source(model, work)
    gallery, gone = enrolment.withdraw(saved, class_ids, files)
    run.table(gone, "withdrawn.csv")
    example = run.folder / "blank.png"
    side = saved.model.preprocessing.image_size
    Image.new("RGB", (side, side), saved.model.preprocessing.fill).save(example)
    return gone, _log(run, source, gallery, version, str(example), work)


def carried(model: str) -> pd.DataFrame:
    """All photographs enrolled in a model, fetched from the runs that enrolled them, as of enrolment.listed."""
    gallery = _source(model)[2].gallery
    assert gallery
    if gallery.enrolled.empty:
        raise InputError(f"images {model!r}: nothing is enrolled in this model")
    folders = {}
    for run in gallery.enrolled["run"].unique():
        try:
            folders[run] = models.download(run_id=run, artifact_path=PHOTOGRAPHS)
        except (MlflowException, OSError) as error:
            raise InputError(f"images {model!r}: run {run!r} has its photographs no more: {error}") from None
    rows = gallery.enrolled.itertuples()
    files = [str(folders[row.run] / _name(row.sha256, row.file)) for row in rows]
    return gallery.enrolled.assign(file=files)[enrolment.COLUMNS]


def listed(images: str, class_id: str, name: str, path: str) -> pd.DataFrame:
    """As enrolment.listed, but `images` may also name a model: then all that is enrolled there."""
    if prediction.kind(f"{images}/config.json") or re.fullmatch(r"newest|[0-9a-f]{32}|(runs|models):/.+", images):
        if class_id or name or path:
            raise InputError(f"class_id, name, path: not to be given with a model's photographs, {images!r}")
        return carried(images)
    return enrolment.listed(images, class_id, name, path)


def _source(model: str, work: Path | None = None) -> tuple[registry.ModelVersion | None, Path, Saved]:
    """The classifier's version that `model` names, if it does; the saved folder and what it holds. With `work` what an
    enrolment that died has left of the aliases is set right first."""
    version = registry.classifier(model)
    if version and work:
        registry.repair(work)
        version = registry.classifier(model)
    folder = models.fetch(f"models:/{registry.CLASSIFIER}/{version.version}" if version else model)
    saved = load(folder)
    saved.model.to(assembly.device())
    if not saved.gallery:
        raise InputError(f"model {model!r} was saved without a gallery; train its round again")
    return version, folder, saved


def _log(
    run: Run, source: Path, gallery: Gallery, version: registry.ModelVersion | None, example: str, work: Path
) -> str:
    """Logs the model in `source` with this gallery; where it is a registered version, registers its successor."""
    folder = run.folder / "model"
    shutil.copytree(source, folder)
    dataclasses.replace(gallery, folder=None).save(folder)
    run.model(folder, example, step=0)
    if not version:
        return run.id
    logged = models.logged(MlflowClient().get_run(run.id))
    if not logged:
        raise InputError(f"the tracking server is away: {registry.CLASSIFIER} stays at version {version.version}")
    count = gallery.enrolled["class_id"].nunique()
    made = registry.succeed(version, logged, {"enrolled": count}, work)
    return f"models:/{registry.CLASSIFIER}/{made.version}"


def _name(sha256: str, file: str) -> str:
    return sha256 + Path(file).suffix.lower()
