"""Drops the photographs that models hold to be filed wrongly, into a new manifest."""

import re
from pathlib import Path
from typing import Literal

from aliprod import InputError, recipe
from aliprod.parameters import paths
from entrypoints.command import command, data_folder_of
from tracking import cleanings, copies, runs, steps, storage
from tracking.models import load


def main(
    models: str, data: str, manifest: str, rule: str, min_accuracy: float, votes: int, folds: int, least: int,
    max_dropped_share: float | Literal[""], min_judge_map: float, precision: str, output: str, seed: int, work: Path,
) -> None:  # fmt: skip
    """models: one or more; data: a folder, or demo, else the one that they were trained on; manifest: of it, what to
    clean; rule: misclassified (with min_accuracy), disagreement (with votes) or confident; folds: of cross-fitting;
    least: rows small classes grow to; max_dropped_share, min_judge_map: what would drop more, or is judged by a weaker
    model, is refused; precision, output (a path or s3:// address), seed, work."""
    base = output.removesuffix(".csv")
    name = re.sub(r"[^\w.-]+", "-", base.rpartition("/")[2])  # of the artifacts: MLflow takes no other characters
    if name in ("", ".", "..", "dropped"):
        raise InputError(f"output {output!r}: must name a table, other than dropped.csv, which lists what was dropped")
    row = recipe.cleaning(
        name=name, models=paths("models", models), manifest=manifest, rule=rule, min_accuracy=min_accuracy, votes=votes,
        folds=folds, least=least, max_dropped_share=None if max_dropped_share == "" else max_dropped_share,
        min_judge_map=min_judge_map, precision=precision, seed=seed,
    )  # fmt: skip
    judges = [] if data else [load(steps.resolve(name, "", "", {})) for name in row.models]
    folder = data_folder_of(judges, data, work)  # what is given is compared with the judges by the cleaning itself
    with runs.start(f"clean {rule}", work) as run:
        scores = cleanings.clean(run, "", copies.tables_here(row, work), folder, work, {})
    files = (run.folder / "artifacts" / f"{row.name}{suffix}" for suffix in (".json", ".csv"))
    *_, placed = [storage.place(file, base + file.suffix) for file in files]
    print("  ".join(f"{name} {value:g}" for name, value in scores.items()), placed, sep="\n")


if __name__ == "__main__":
    command(main)
