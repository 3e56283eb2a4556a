"""Drops the photographs that models hold to be filed wrongly, into a new manifest."""

import re
from pathlib import Path
from typing import Annotated

from aliprod import InputError, recipe
from aliprod.parameters import paths
from entrypoints.command import command, data_folder_of
from entrypoints.places import Within
from tracking import cleanings, copies, runs, storage
from tracking.models import load


def main(
    models: str, data: str, manifest: str, rule: str, min_accuracy: float, votes: int, folds: int, least: int,
    precision: str, output: Annotated[str, Within("reliable_train.csv")], seed: int, work: Path,
) -> None:  # fmt: skip
    """models: one or more; data: a folder, or demo, else the one that they were trained on; manifest: of it, what to
    clean; rule: misclassified (with min_accuracy), disagreement (with
    votes) or confident; folds: of cross-fitting; least: rows small classes grow to; precision, output (a path or
    s3:// address), seed, work."""
    base = output.removesuffix(".csv")
    if base.endswith("/") or Path(base).name in ("", ".", "..", "dropped"):
        raise InputError(f"output {output!r}: must end in a file's name, and that not be dropped.csv")
    name = re.sub(r"[^\w.-]", "_", Path(base).name)  # of the artifacts: MLflow takes no other characters
    row = recipe.cleaning(
        name=name, models=paths("models", models), manifest=manifest, rule=rule, min_accuracy=min_accuracy,
        votes=votes, folds=folds, least=least, precision=precision, seed=seed,
    )  # fmt: skip
    folder = data_folder_of(map(load, row.models), data, work)
    with runs.start(f"clean {rule}", work) as run:
        scores = cleanings.clean(run, "", copies.tables_here(row, work), folder, work, {})
    files = (run.folder / "artifacts" / f"{row.name}{suffix}" for suffix in (".json", ".csv"))
    *_, placed = [storage.place(file, base + file.suffix) for file in files]
    print("  ".join(f"{name} {value:g}" for name, value in scores.items()), placed, sep="\n")


if __name__ == "__main__":
    command(main)
