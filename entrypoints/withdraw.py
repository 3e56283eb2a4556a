"""Takes enrolled products or photographs out of a model again; registered models get a new version."""

from pathlib import Path

from aliprod import InputError
from aliprod.parameters import words
from aliprod.prediction import image_files
from entrypoints.command import command
from tracking import enrolments, runs


def main(model: str, classes: str, images: str, work: Path) -> None:
    """model: newest, a run id, an MLflow URI or a saved folder; classes: ids of those whose enrolled photographs go,
    separated by spaces; images: photographs that go, known by their bytes: a folder, a .csv with a column file, or
    files; work: for what waits to be sent."""
    if not classes and not images:
        raise InputError("withdraw: give classes, images or both")
    with runs.start("withdraw", work, {"model": model}) as run:
        files = image_files(images) if images else []
        gone, made = enrolments.withdraw(run, model, words("classes", classes), files, work)
    print(f"{len(gone)} photographs of {gone['class_id'].nunique()} classes withdrawn\nmodel: {made}")


if __name__ == "__main__":
    command(main)
