"""Sends what runs recorded while the tracking server was away."""

from pathlib import Path

from entrypoints.command import command
from tracking.spool import send_waiting


def main(work: Path) -> None:
    """work: the folder of the runs."""
    results = send_waiting(work)
    for run_id, outcome in results.items():
        print(f"run {run_id}: {outcome}")
    print(f"{len(results)} runs had something to send")


if __name__ == "__main__":
    command(main)
