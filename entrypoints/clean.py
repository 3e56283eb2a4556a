"""Drops the photographs that models hold to be filed wrongly, into a new manifest."""

import shutil
from pathlib import Path

from aliprod import recipe
from aliprod.atomic import replacing
from entrypoints.command import command, data_folder
from tracking import cleanings, runs


def main(
    models: str, data: str, manifest: str, rule: str, min_accuracy: float, votes: int, folds: int, least: int,
    precision: str, output: Path, seed: int, work: Path,
) -> None:  # fmt: skip
    """models: one or more; data, manifest: what to clean; rule: misclassified (with min_accuracy), disagreement (with
    votes) or confident; folds: of cross-fitting; least: rows small classes grow to; precision, output, seed, work."""
    row = recipe.cleaning(
        name=output.stem, models=models.split(), manifest=manifest, rule=rule, min_accuracy=min_accuracy, votes=votes,
        folds=folds, least=least, precision=precision, seed=seed,
    )  # fmt: skip
    with runs.start(f"clean {rule}", work) as run:
        scores = cleanings.clean(run, "", row, data_folder(data, work), work, {})
    output.parent.mkdir(parents=True, exist_ok=True)
    for suffix in (".csv", ".json"):
        with replacing(output.with_suffix(suffix)) as path:
            shutil.copy(run.folder / "artifacts" / f"{row.name}{suffix}", path)
    print("  ".join(f"{name} {value:g}" for name, value in scores.items()), output.resolve(), sep="\n")


if __name__ == "__main__":
    command(main)
