"""Makes the best of the candidates champions of the registry, as extractor and as classifier, if they are better."""

from pathlib import Path
from typing import Annotated

from pydantic import Field, NonNegativeFloat, PositiveFloat

from entrypoints.command import command, data_folder_of
from tracking import origin, promotions, runs
from tracking.models import load


def main(
    candidates: str, data: str, confidence: Annotated[float, Field(ge=0.5, lt=1)], max_tail_loss: NonNegativeFloat,
    max_coverage_loss: NonNegativeFloat, max_severity_ratio: PositiveFloat, max_size_ratio: PositiveFloat,
    max_latency_ratio: PositiveFloat, dry_run: bool, work: Path,
) -> None:  # fmt: skip
    """candidates: run ids, newest, or an experiment's name; data: whose photographs to compare on, a folder, or demo,
    else the one that they were trained on; confidence: that the candidate is better; max_tail_loss, max_coverage_loss,
    max_severity_ratio, max_size_ratio, max_latency_ratio: by which it may be worse; dry_run: only say what would be
    done; work. A candidate that is not better is refused with the reason: no mistake, so the run is FINISHED, its tag
    decision refused, and the exit status 0."""
    limits = promotions.Limits(
        confidence, max_tail_loss, max_coverage_loss, max_severity_ratio, max_size_ratio, max_latency_ratio
    )
    ids = promotions.candidates(candidates)
    ground = promotions.Ground.read(data_folder_of((load(f"models:/{id}") for id in ids), data, work))
    with runs.start("promote", work, {"candidates": candidates}) as run:
        verdicts = promotions.promote(run, ids, ground, limits, work, dry_run)
    print(promotions.markdown(verdicts, dry_run))
    print(f"run:       {run.id}\nbrowse:    {origin.pages()}")


if __name__ == "__main__":
    command(main)
