"""A round of training under a run: assembled, trained, evaluated, and all of it recorded."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import pandas as pd

from aliprod import InputError, assembly, enrolment, interruption, manifest, recipe, report, training, yardstick
from aliprod.atomic import replacing
from aliprod.features import Features
from aliprod.images import CorruptImages, Images
from aliprod.model import load_head
from aliprod.recipe import Round
from tracking import models, steps
from tracking.runs import Run, close_abandoned


@dataclasses.dataclass(frozen=True)
class Job:
    """What a run was asked to do; kept in its folder, so that its id is enough to resume it.

    `done` has the runs of earlier steps, recipe/step -> run id; others are looked for in the store.
    """

    recipe: str
    row: Round
    data: str
    done: dict[str, str] = dataclasses.field(default_factory=dict)

    def save(self, folder: Path) -> None:
        """Writes job.json."""
        with replacing(folder / "job.json") as path:
            path.write_text(json.dumps(dataclasses.asdict(self) | {"row": self.row.model_dump()}))

    @staticmethod
    def load(run_id: str, work: Path) -> "Job":
        """The job of an earlier run on this machine. InputError where there is none."""
        path = work / "runs" / run_id / "job.json"
        if not path.exists():
            raise InputError(f"resume {run_id!r}: no run of this name left anything to resume in {work / 'runs'}")
        job = json.loads(path.read_text())
        return Job(**job | {"row": Round(**job["row"])})


def train(run: Run, job: Job, work: Path, resume: str = "") -> report.Evaluation:
    """Trains and evaluates a round and logs its model.

    `resume` is the id of the run to go on from. Raises KeyboardInterrupt when stopped, its state saved.
    """
    row, checkpoints = job.row, run.folder / "checkpoints"
    job.save(run.folder)
    if resume:
        _take_over(work / "runs" / resume / "checkpoints", checkpoints)
    path = steps.table(row.manifest, job.recipe, Path(job.data), job.done)
    tables = assembly.tables(row.model_copy(update={"manifest": path}), job.data)
    digest = tables.data_digest
    run.tags({"recipe": job.recipe, "round": row.name, "data": digest, "val": manifest.digest(tables.queries)})
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
    run.figure(report.curves(reports), "figures/curves.png")
    folder = run.folder / "model"
    evaluation = report.evaluate(
        made, tables.classes, tables.queries, job.data, work / "features", tree=tables.tree, precision=row.precision
    )
    about = {"recipe": job.recipe, "round": row.model_dump(), "data": digest, "run_id": run.id}
    made.save(folder, tables.classes, tables.tree, about | {"calibration": evaluation.calibration})
    shown = (tables.gallery, tables.queries, job.data, work / "features", row.precision)
    nearest = yardstick.answers(made, *shown)
    evaluation.scores.update(yardstick.scores(nearest))
    run.table(nearest, "yardstick.parquet")
    enrolment.gallery(made, tables.classes, *shown).save(folder)
    example = manifest.paths(evaluation.predictions.head(1), job.data)[0]
    log_evaluation(run, evaluation, step=row.epochs)
    run.model(folder, example, step=row.epochs)
    shutil.rmtree(checkpoints)
    return evaluation


def log_evaluation(run: Run, evaluation: report.Evaluation, step: int = 0) -> None:
    """Scores as metrics and in the run's description, tables and figures as artifacts."""
    run.metrics(evaluation.scores, step)
    scores = pd.DataFrame(evaluation.scores.items(), columns=["score", "value"])
    run.tags({"mlflow.note.content": report.markdown(scores)})
    run.table(evaluation.predictions, "predictions.parquet")
    run.table(evaluation.per_class, "per_class.csv")
    run.table(evaluation.select_list, "select_list.csv")
    for name, figure in evaluation.figures.items():
        run.figure(figure, f"figures/{name}.png")
    for name, table in evaluation.tables.items():
        run.table(table, f"{name}.csv")
    for name, page in evaluation.pages.items():
        run.text(page, f"figures/{name}.html")


def log_corrupt(run: Run, *sources: Images | Features) -> None:
    """How many images could not be read, and which, as corrupt.csv."""
    rows = [(source.paths[row], reason) for source in sources for row, reason in source.corrupt.items()]
    run.metrics({"num_corrupt": len(rows)}, 0)
    if rows:
        run.table(pd.DataFrame(rows, columns=["file", "reason"]), "corrupt.csv")
        print(f"{len(rows)} images could not be read and were left out: corrupt.csv lists them", flush=True)


def summary(run: Run, evaluation: report.Evaluation) -> str:
    """What a person wants to read at the end."""
    scores = evaluation.scores
    values = "  ".join(
        f"{name.upper()} {scores[name]:.4f}"
        for name in ("gap", "map", "accuracy") + tuple(k for k in scores if k.startswith("top"))
    )
    classes = int((evaluation.per_class["num_val"] > 0).sum())
    return (
        f"{values}  ({len(evaluation.predictions)} photographs of {classes} classes)\n"
        f"per class: {(run.folder / 'artifacts' / 'per_class.csv').resolve()}\n"
        f"run:       {run.id}"
    )


def source_of(job: Job, digest: str) -> str:
    """What load_backbone reads for the round's init: a word or path as it is; a step, a run or a URI fetched."""
    init = steps.resolve(job.row.init, job.recipe, digest, job.done)
    if init in steps.WORDS or Path(init).exists():
        return init
    try:
        return str(models.fetch(init))
    except InputError as error:
        raise InputError(f"init {init!r}: no finished round of recipe {job.recipe} on this data; {error}") from None


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
        shutil.copytree(earlier, folder, copy_function=os.link, ignore=lambda *_: {file.name for file in broken})


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
