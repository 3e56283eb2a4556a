"""Drops the photographs that models hold to be filed wrongly, into a new manifest."""

import json
from pathlib import Path
from typing import Annotated, Literal

import pandas as pd
from pydantic import Field, NonNegativeInt, PositiveInt

from aliprod import assembly, cleaning, report
from aliprod.manifest import class_index, digest, paths, read, write_csv
from aliprod.model import load
from aliprod.prediction import predict_table
from entrypoints.command import command, data_folder
from tracking.models import fetch
from tracking.runs import start


def main(
    models: str, data: str, manifest: str, rule: Literal["misclassified", "disagreement", "confident"],
    min_accuracy: Annotated[float, Field(ge=0, le=1)], votes: PositiveInt, least: PositiveInt,
    precision: Literal["fp32", "bf16", "fp16", "mixed"], output: Path, seed: NonNegativeInt, work: Path,
) -> None:  # fmt: skip
    """models: one or more; data, manifest: what to clean; rule: misclassified (with min_accuracy), disagreement (with
    votes) or confident; least: rows small classes grow to; precision, output, seed, work."""
    folder, device = data_folder(data, work), assembly.device()
    table = read(folder, manifest, seed)
    classes = class_index(table)
    rules = {"misclassified": cleaning.misclassified(min_accuracy), "disagreement": cleaning.disagreement(votes)}
    rules["confident"] = cleaning.confident()
    lineage = {"source": digest(table), "manifest": manifest, "models": models, "rule": rule, "seed": seed}
    with start(f"clean {rule}", work, lineage) as run:
        run.dataset(table, str(folder), manifest, "source")
        answers = []
        for saved in (load(fetch(name)) for name in models.split()):
            saved.model.to(device)
            answers.append(predict_table(saved, table, classes, folder, work / "features", precision))
        kept, dropped = cleaning.clean(table, answers, rules[rule], least=least, seed=seed)
        write_csv(kept, output)
        output.with_suffix(".json").write_text(json.dumps(lineage | {"digest": digest(kept)}, indent=2))
        run.table(kept, output.name)
        run.table(dropped, "dropped.csv")
        names = saved.classes.set_index("class_id")["name"].reindex(classes["class_id"])
        run.figure(report.thumbnails(dropped, pd.Series(paths(table, folder)), names), "figures/dropped.png")
        scores: dict[str, float] = {"num_dropped": len(dropped), "num_kept": len(kept)}
        if (truth := folder / "truth.csv").exists():
            scores |= cleaning.detection(table, dropped, pd.read_csv(truth, dtype="str"))
        run.metrics(scores, 0)
    print("  ".join(f"{name} {value:g}" for name, value in scores.items()), output.resolve(), sep="\n")


if __name__ == "__main__":
    command(main)
