"""Names the products in photographs; needs the model alone, not the data it was trained on."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from aliprod import csvfile
from aliprod.assembly import device
from aliprod.prediction import image_files, recognise, wide
from entrypoints.command import command
from entrypoints.places import Within
from tracking import models, runs


def main(
    model: str, images: str, top: PositiveInt, sure: Annotated[float, Field(ge=0, le=1)],
    using: Literal["head", "gallery", "both"], output: Annotated[Path, Within("predictions.csv")], work: Path,
) -> None:  # fmt: skip
    """model: newest, a run id, an MLflow URI or a saved folder; images: a folder, a .csv with a column file, or
    files, separated by spaces; top: answers an image; sure: the probability below which the answer is a node further up
    the tree; using: head (classes trained on), gallery (all, by similarity) or both (all); output: the CSV to write;
    work: for what waits to be sent."""
    saved = models.load(model)
    saved.model.to(device())
    files = image_files(images)
    with runs.start("predict", work, {"model": model}) as run:
        table = wide(files, recognise(saved, files, top, sure, using))
        output.parent.mkdir(parents=True, exist_ok=True)
        csvfile.write(table, output)
        run.table(table, "predictions.csv")
    print(table.head(50).to_string(max_colwidth=40, float_format="%.3f", index=False))
    print(f"{len(table)} images, {(table['error'] != '').sum()} of them unreadable: {output.resolve()}")


if __name__ == "__main__":
    command(main)
