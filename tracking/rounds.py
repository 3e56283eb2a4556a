"""A round of training under a run: assembled, trained, evaluated, and all of it recorded."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import pandas as pd
from PIL import Image

from aliprod import InputError, assembly, enrolment, interruption, manifest, recipe, report, training, yardstick
from aliprod.atomic import replacing
from aliprod.features import Features
from aliprod.images import CorruptImages, Images
from aliprod.model import load_head
from aliprod.recipe import Round
from tracking import models, steps
from tracking.runs import Run, close_abandoned

WORK = "{work}/"  # what a path in job.json begins with that lies in the folder `work`


@dataclasses.dataclass(frozen=True)
class Job:
    """What a run was asked to do; kept in its folder, so that its id is enough to resume it.

    `done` has the runs of earlier steps, recipe/step -> run id; others are looked for in the store. `digests` are those
    of the data's manifests, so that the same data is known wherever it lies.
    """

    recipe: str
    row: Round
    data: str
    done: dict[str, str] = dataclasses.field(default_factory=dict)
    digests: dict[str, str] = dataclasses.field(default_factory=dict)

    def save(self, folder: Path, work: Path) -> None:
        """Writes job.json, in which what lies in `work` is named from there: it may be moved."""
        job = dataclasses.asdict(self) | {"row": self.row.model_dump()}
        for table, field in ((job, "data"), (job["row"], "manifest"), (job["row"], "select_list")):
            path = Path(table[field] or "").resolve()
            if path.exists() and path != work.resolve() and path.is_relative_to(work.resolve()):
                table[field] = f"{WORK}{path.relative_to(work.resolve())}"
        with replacing(folder / "job.json") as beside:
            beside.write_text(json.dumps(job))

    @staticmethod
    def load(run_id: str, work: Path, data: str = "") -> "Job":
        """The job of an earlier run on this machine, its data in the folder `data`, if that is given. InputError where
        there is none, or no data."""
        path = work / "runs" / run_id / "job.json"
        if not run_id or not path.exists():
            raise InputError(f"resume {run_id!r}: no run of this name left anything to resume in {work / 'runs'}")

        job = json.loads(path.read_text())
        for table, field in ((job, "data"), (job["row"], "manifest"), (job["row"], "select_list")):
            if (table[field] or "").startswith(WORK):
                table[field] = str(work.resolve() / table[field].removeprefix(WORK))
        job["data"] = data or job["data"]
        if not Path(job["data"]).is_dir():
            raise InputError(f"resume {run_id!r}: its data is no more at {job['data']}; give data, where it is now")
        return Job(**job | {"row": Round(**job["row"])})

    def checked(self, digests: dict[str, str]) -> "Job":
        """The job with its data's digests; InputError if they are not those it was begun with."""
        changed = [name for name, digest in self.digests.items() if digests[name] != digest]
        if changed:
            raise InputError(
                f"data {self.data!r}: {' and '.join(changed)} not as in the run to resume; train anew, init its id"
            )
        return dataclasses.replace(self, digests=digests)


def train(run: Run, job: Job, work: Path, resume: str = "") -> report.Evaluation:  # noqa: PLR0915 - one step after another
    """Trains and evaluates a round and logs its model.

    `resume` is the id of the run to go on from. Raises KeyboardInterrupt when stopped, its state saved.
    """
    row, checkpoints = job.row, run.folder / "checkpoints"
    path = steps.table(row.manifest, job.recipe, Path(job.data), job.done)
    tables = assembly.tables(row.model_copy(update={"manifest": path}), job.data)
    digest = tables.data_digest
    digests = {"data": digest, "val": manifest.digest(tables.queries)}
    job.checked(digests).save(run.folder, work)
    if resume:
        _take_over(work / "runs" / resume / "checkpoints", checkpoints)
    run.tags({"recipe": job.recipe, "round": row.name, **digests})
    run.tags({"resumed_from": resume} if resume else {})
    if resume:
        close_abandoned(resume)
    run.text(recipe.to_toml(row), "recipe.toml")
    run.dataset(tables.train, job.data, row.manifest, "training")
    run.dataset(tables.val, job.data, "val", "validation")
    run.params({f"round.{name}": value for name, value in row.model_dump().items() if value is not None})
    sizes = {"num_classes": len(tables.classes), "num_train": len(tables.train), "num_val": len(tables.val)}
    checkpoint = training.newest_checkpoint(checkpoints)
    init = "random" if checkpoint else source_of(job, digest)
    made = assembly.model(row, len(tables.classes), init, tables.levels)
    run.tags({"head": "from init" if load_head(made, init, tables.classes) else "fresh"})
    if checkpoint:  # before anything is embedded: what `init` names may be another model by now
        training.load_weights(made, checkpoint)
    run.params(sizes | {"data_folder": job.data, "device": made.device.type})
    print(f"{job.recipe}/{row.name}: {len(tables.train)} photographs of {len(tables.classes)} classes, run {run.id}")
    try:
        source = assembly.inputs(made, row, tables.train, tables.classes, job.data, work / "features", row.augment)
        val = assembly.inputs(made, row, tables.val, tables.classes, job.data, work / "features", "none")
        reports = []
        with interruption.deferred() as stop:
            for made_report in training.train(
                made, row, source, val, checkpoints, resume=checkpoint is not None, stop=stop, levels=tables.levels
            ):
                reports.append(made_report)
                _log_report(run, reports, row)
    except CorruptImages as error:
        run.table(pd.DataFrame(error.reasons.items(), columns=["file", "reason"]), "corrupt.csv")
        raise
    log_corrupt(run, source, val)
    if stop.is_set():
        raise KeyboardInterrupt

    folder = run.folder / "model"
    evaluation = report.evaluate(
        made, tables.classes, tables.queries, job.data, work / "features", tree=tables.tree, precision=row.precision
    )
    about = {"recipe": job.recipe, "round": row.model_dump(), "data": digest, "run_id": run.id}
    about["data_folder"] = job.data
    made.save(folder, tables.classes, tables.tree, about | {"calibration": evaluation.calibration})
    shown = (tables.gallery, tables.queries, job.data, work / "features", row.precision)
    nearest = yardstick.answers(made, *shown)
    evaluation.scores.update(yardstick.scores(nearest))
    enrolment.gallery(made, tables.classes, *shown).save(folder)

    # The model before all that only describes it; its scores first, which MLflow shows beside it.
    run.metrics(evaluation.scores, row.epochs)
    run.model(folder, _example(run, evaluation, job.data), step=row.epochs)
    run.reports({"yardstick.parquet": lambda: nearest, "figures/curves.png": lambda: report.curves(reports)})
    log_evaluation(run, evaluation)
    shutil.rmtree(checkpoints)
    return evaluation


def log_evaluation(run: Run, evaluation: report.Evaluation) -> None:
    """Scores in the run's description; tables, figures and pages as artifacts, as far as they can be made."""
    scores = pd.DataFrame(evaluation.scores.items(), columns=["score", "value"])
    run.tags({"mlflow.note.content": report.markdown(scores)})
    run.reports(evaluation.reports)


def _example(run: Run, evaluation: report.Evaluation, data: str) -> str:
    """A photograph to show how the model is asked, a white one where none can be read any more."""
    for photograph in manifest.paths(evaluation.predictions, data):
        if os.access(photograph, os.R_OK):
            return photograph

    white = run.folder / "white.png"
    Image.new("RGB", (64, 64), "white").save(white)
    return str(white)


def log_corrupt(run: Run, *sources: Images | Features) -> None:
    """How many images could not be read, and which, as corrupt.csv."""
    rows = [(source.paths[row], reason) for source in sources for row, reason in source.corrupt.items()]
    run.metrics({"num_corrupt": len(rows)}, 0)
    if rows:
        run.reports({"corrupt.csv": lambda: pd.DataFrame(rows, columns=["file", "reason"])})
        print(f"{len(rows)} images could not be read and were left out: corrupt.csv lists them", flush=True)


def summary(run: Run, evaluation: report.Evaluation) -> str:
    """What a person wants to read at the end."""
    scores = evaluation.scores
    values = "  ".join(
        f"{name.upper()} {scores[name]:.4f}"
        for name in ("gap", "map", "accuracy") + tuple(k for k in scores if k.startswith("top"))
    )
    classes = int((evaluation.per_class["num_val"] > 0).sum())
    table = (run.folder / "artifacts" / "per_class.csv").resolve()
    return (
        f"{values}  ({len(evaluation.predictions)} photographs of {classes} classes)\n"
        f"per class: {table if table.exists() else 'left out, see report_errors.txt'}\n"
        f"run:       {run.id}"
    )


def source_of(job: Job, digest: str) -> str:
    """What load_backbone reads for the round's init: a word or path as it is; a step, a run or a URI fetched."""
    init = steps.resolve(job.row.init, job.recipe, digest, job.done)
    if init in recipe.WEIGHTS or Path(init).exists():
        return init
    try:
        return str(models.fetch(init))
    except InputError as error:
        raise InputError(f"init {init!r}: no finished round of recipe {job.recipe} on this data; {error}") from None


def _link(source: str, to: str) -> None:
    """The same file under a second name, or a copy where the disk knows no such thing, or another user owns it."""
    try:
        os.link(source, to)
    except OSError:
        shutil.copy(source, to)


def _take_over(earlier: Path, folder: Path) -> None:
    """Links the files of an earlier run's checkpoints into `folder`, but for those that are not whole, and names them.

    InputError where there are checkpoints and none is whole.
    """
    broken = [file for file in sorted(earlier.glob("*.pt")) if not training.is_whole(file)]
    if list(earlier.glob("step-*.pt")) and not training.newest_checkpoint(earlier):
        raise InputError(
            f"resume: {', '.join(map(str, broken))} cut off or damaged, none is whole; train the round anew"
        )
    for file in broken:
        print(f"{file} is cut off or damaged: the run goes on without it", flush=True)
    if earlier.exists():
        shutil.copytree(earlier, folder, copy_function=_link, ignore=lambda *_: {file.name for file in broken})


def _log_report(run: Run, reports: list[training.Report], row: Round) -> None:
    """Records the last of a round's reports so far."""
    made = reports[-1]
    run.curve(made.curve, "step/")
    if made.train:
        run.metrics(made.train, made.epoch, "train/")
        run.metrics(made.val, made.epoch, "val/")
        scores = "  ".join(f"{name} {value:.4f}" for name, value in made.val.items())
        left = sum(report.seconds for report in reports) / made.epoch * (row.epochs - made.epoch)
        line = f"epoch {made.epoch}/{row.epochs}  train loss {made.train['loss']:.4f}  val {scores}  {left:.0f} s left"
        print(line, flush=True)
