"""Scores a logged or saved model on a split of a data folder."""

from pathlib import Path
from typing import Literal

from aliprod import manifest, report
from aliprod.assembly import device
from entrypoints.command import command, data_folder_of
from tracking import copies, models, rounds, runs


def main(model: str, data: str, split: str, precision: Literal["fp32", "bf16", "fp16", "mixed"], work: Path) -> None:
    """model: newest, a run id, an MLflow URI or a saved folder; data: a folder, or demo, else the one that the model
    was trained on; split: its <split>.json, or a .csv; precision: of the arithmetic; work: for cached embeddings."""
    saved = models.load(model)
    folder = data_folder_of([saved], data, work)
    table = manifest.read(folder, copies.local(split, work))
    with runs.start(f"evaluate {split}", work, {"model": model, "data": manifest.digest(table)}) as run:
        run.params({"data_folder": folder})
        run.dataset(table, str(folder), split, "evaluation")
        evaluation = report.evaluate(
            saved.model.to(device()),
            saved.classes,
            table,
            folder,
            work / "features",
            tree=saved.tree,
            precision=precision,
        )
        run.metrics(evaluation.scores, 0)
        rounds.log_evaluation(run, evaluation)
    print(rounds.summary(run, evaluation))


if __name__ == "__main__":
    command(main)
