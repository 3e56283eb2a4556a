"""Writes a model as ONNX, for fp32 and with a data folder for int8, checked against torch on photographs."""

from pathlib import Path
from typing import Annotated

from pydantic import PositiveFloat, PositiveInt

from entrypoints.command import command, data_folder_of
from entrypoints.places import Within
from tracking import models, runs


def main(
    model: str,
    data: str,
    output: Annotated[Path, Within("model.onnx")],
    limit: PositiveInt,
    tolerance: PositiveFloat,
    work: Path,
) -> None:
    """model: newest, a run id, an MLflow URI or a saved folder; data: a folder, or demo, else no int8: it is calibrated
    on train photographs, and both are compared with torch on val photographs; output: the .onnx to write; limit: of the
    photographs compared; tolerance: the largest difference from torch that fp32 may have; work: for what waits to be
    sent."""
    from aliprod import export  # takes seconds: a mistake in the command line need not wait for it

    saved = models.load(model)
    folder = data_folder_of([saved], data, work) if data else None
    output.parent.mkdir(parents=True, exist_ok=True)
    with runs.start("export", work, {"model": model}) as run:
        files, scores = export.export(saved, output, folder, limit, tolerance)
        for name, values in scores.items():
            run.metrics(values, 0, f"{name}/")
        for file in files.values():
            run.file(file, file.name)
    for name, file in files.items():
        cells = "  ".join(f"{key} {value:.4g}" for key, value in scores[name].items())
        print(f"{name}: {file.resolve()}, {file.stat().st_size / 1e6:.1f} MB\n  {cells}")
    print(f"run: {run.id}")


if __name__ == "__main__":
    command(main)
