"""Closes runs that dead machines left RUNNING."""

from pathlib import Path
from typing import Annotated

from pydantic import Field

from entrypoints.command import Minutes, command
from tracking import reaping
from tracking.spool import send_waiting


def main(minutes: Annotated[Minutes, Field(gt=0)], experiment: str, dry_run: bool, work: Path) -> None:
    """minutes: of silence after which a run counts as dead; experiment: its name, or all; dry_run: only list them;
    work: the folder of the runs of this machine, whose waiting records are sent first."""
    if not dry_run:
        send_waiting(work)
    found = reaping.silent(minutes, experiment, work)
    for run_id, heartbeat in found.items():
        done = "would be closed" if dry_run else "KILLED" if reaping.close(run_id, heartbeat) else "ended meanwhile"
        print(f"run {run_id}: {done}")
    print(f"{len(found)} runs were not heard of for {minutes:g} minutes")


if __name__ == "__main__":
    command(main)
