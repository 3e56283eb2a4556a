"""Teaches a model new products from a few photographs, without training; registered models get a new version."""

from pathlib import Path

from entrypoints.command import command
from tracking import enrolments, runs


def main(model: str, images: str, class_id: str, name: str, path: str, work: Path) -> None:
    """model: newest, a run id, an MLflow URI or a saved folder; images: a folder with a subfolder a class, a .csv with
    the columns file, class_id and perhaps name and path, a model whose enrolled photographs to take over, or files of
    class_id; name, path: of that class, as "Fruit > Apple > Gala"; work: for what waits to be sent."""
    with runs.start("enroll", work, {"model": model}) as run:
        table, made = enrolments.enroll(run, model, enrolments.listed(images, class_id, name, path), work)
    counts = table["outcome"].value_counts()
    unreadable = table[~table["outcome"].isin(["enrolled", "known"])]
    for row in unreadable.itertuples():
        print(f"{row.file}: {row.outcome}")
    classes = table["class_id"][table["outcome"] == "enrolled"].nunique()
    enrolled, known = counts.get("enrolled", 0), counts.get("known", 0)
    print(f"{enrolled} photographs of {classes} classes enrolled, {known} known before, {len(unreadable)} unreadable")
    print(f"model: {made or f'{model}, as it was'}")


if __name__ == "__main__":
    command(main)
