"""A cleaning under a run: models asked, suspects dropped, what is left logged as a new manifest with its lineage."""

import json
from pathlib import Path

import pandas as pd

from aliprod import InputError, assembly, cleaning, crossfit, csvfile, manifest, report
from aliprod.lettering import Figure
from aliprod.prediction import predict_table
from aliprod.recipe import Cleaning
from tracking import models, steps
from tracking.runs import Run


def clean(run: Run, recipe: str, row: Cleaning, data: Path, work: Path, done: dict[str, str]) -> dict[str, float]:
    """Cleans a manifest of `data` and logs what is left as `<name>.csv`; the scores, with those of the detection where
    `truth.csv` is known. `recipe` and `done`: see steps.resolve.

    InputError, what would be dropped logged and no manifest, where a judge is too weak or too much goes (see
    cleaning.refusals).
    """
    table = manifest.read(data, row.manifest, row.seed)
    whole = manifest.digest(manifest.read(data, "train"))
    sources = [steps.resolve(name, recipe, whole, done) for name in row.models]
    run.tags({"recipe": recipe, "round": row.name, "data": whole})
    run.params({f"clean.{name}": value for name, value in row.model_dump().items()} | {"data_folder": data})
    run.dataset(table, str(data), row.manifest, "source")
    classes = manifest.class_index(table)
    title = "/".join(filter(None, (recipe, row.name)))
    print(f"{title}: {len(table)} photographs of {len(classes)} classes, run {run.id}", flush=True)

    answers, judges = [], {}
    for name, source in zip(row.models, sources, strict=True):
        saved = models.load(source)
        assembly.refuse_other_products(saved.classes, data)
        saved.model.to(assembly.device())
        given = (saved, table, classes, data, work / "features", row.precision)
        # What the model has learnt says nothing of how well it judges; heads that never saw the labels do.
        fitted = crossfit.answers(*given, row.folds or crossfit.folds_for(table), row.seed)
        judges[name] = crossfit.judge_map(fitted, table)
        answers.append(fitted if row.folds else predict_table(*given))

    rules = {
        "misclassified": cleaning.misclassified(row.min_accuracy),
        "disagreement": cleaning.disagreement(row.votes),
        "confident": cleaning.confident(),
    }
    kept, dropped = cleaning.clean(table, answers, rules[row.rule], least=row.least, seed=row.seed)
    share = len(dropped) / len(table)
    scores = {"judge_map": min(judges.values()), "dropped_share": share, "num_dropped": len(dropped)}
    estimate = cleaning.wrong_share(answers[0]) if row.rule == "confident" else None
    scores |= {} if estimate is None else {"estimated_share": estimate}
    if (truth := data / "truth.csv").exists():
        scores |= cleaning.detection(table, dropped, csvfile.read(truth, [*manifest.COLUMNS, "true_class_id"]))
    run.metrics(scores, 0)
    words = ", ".join(f"{name} {score:.4f}" for name, score in judges.items())
    print(f"{title}: MAP of the judges, cross-fitted: {words}", flush=True)
    print(f"{title}: {len(dropped)} of {len(table)} photographs dropped, a share of {share:.3f}", flush=True)

    run.table(dropped, "dropped.csv")
    run.reports({"figures/dropped.png": lambda: _thumbnails(table, dropped, classes, data)})
    if reasons := cleaning.refusals(judges, share, estimate, row.min_judge_map, row.max_dropped_share):
        raise InputError(
            f"{title}: refused, no manifest is written: {'; '.join(reasons)}; "
            f"look at dropped.csv of run {run.id}, and set the named limit to clean nevertheless"
        )

    run.table(kept, f"{row.name}.csv")
    lineage = {"source": manifest.digest(table), "digest": manifest.digest(kept), "models": sources}
    run.text(json.dumps(row.model_dump() | lineage, indent=2), f"{row.name}.json")
    run.metrics({"num_train": len(kept)}, 0)
    return scores | {"num_train": len(kept)}


def _thumbnails(table: pd.DataFrame, dropped: pd.DataFrame, classes: pd.DataFrame, data: Path) -> Figure:
    names = assembly.describe(classes, assembly.tree(data)).set_index("class_id")["name"]
    return report.thumbnails(dropped, pd.Series(manifest.paths(table, data)), names)
