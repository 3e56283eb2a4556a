"""A cleaning under a run: models asked, suspects dropped, what is left logged as a new manifest with its lineage."""

import json
from pathlib import Path

import pandas as pd

from aliprod import assembly, cleaning, crossfit, csvfile, manifest, report
from aliprod.prediction import predict_table
from aliprod.recipe import Cleaning
from tracking import models, steps
from tracking.runs import Run


def clean(run: Run, recipe: str, row: Cleaning, data: Path, work: Path, done: dict[str, str]) -> dict[str, float]:
    """Cleans a manifest of `data` and logs what is left as `<name>.csv`; the scores, with those of the detection where
    `truth.csv` is known. `recipe` and `done` as of steps.resolve."""
    table = manifest.read(data, row.manifest, row.seed)
    whole = manifest.digest(manifest.read(data, "train"))
    sources = [steps.resolve(name, recipe, whole, done) for name in row.models]
    run.tags({"recipe": recipe, "round": row.name, "data": whole})
    run.params({f"clean.{name}": value for name, value in row.model_dump().items()} | {"data_folder": data})
    run.dataset(table, str(data), row.manifest, "source")
    classes = manifest.class_index(table)
    print(f"{recipe}/{row.name}: {len(table)} photographs of {len(classes)} classes, run {run.id}", flush=True)
    answers = []
    for saved in map(models.load, sources):
        assembly.refuse_other_products(saved.classes, data)
        saved.model.to(assembly.device())
        given = (saved, table, classes, data, work / "features", row.precision)
        answers.append(crossfit.answers(*given, row.folds, row.seed) if row.folds else predict_table(*given))
    rules = {
        "misclassified": cleaning.misclassified(row.min_accuracy),
        "disagreement": cleaning.disagreement(row.votes),
        "confident": cleaning.confident(),
    }
    kept, dropped = cleaning.clean(table, answers, rules[row.rule], least=row.least, seed=row.seed)
    run.table(kept, f"{row.name}.csv")
    run.table(dropped, "dropped.csv")
    lineage = {"source": manifest.digest(table), "digest": manifest.digest(kept), "models": sources}
    run.text(json.dumps(row.model_dump() | lineage, indent=2), f"{row.name}.json")
    names = assembly.describe(classes, assembly.tree(data)).set_index("class_id")["name"]
    files = pd.Series(manifest.paths(table, data))
    run.figure(report.thumbnails(dropped, files, names.where(names != "", names.index)), "figures/dropped.png")
    scores: dict[str, float] = {"num_dropped": len(dropped), "num_train": len(kept)}
    if (truth := data / "truth.csv").exists():
        scores |= cleaning.detection(table, dropped, csvfile.read(truth, [*manifest.COLUMNS, "true_class_id"]))
    run.metrics(scores, 0)
    return scores
