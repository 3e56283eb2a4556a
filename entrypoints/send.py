"""Sends what runs recorded while the tracking server was away."""

from pathlib import Path

from aliprod import InputError
from entrypoints.command import command
from tracking.spool import SENT, WAITS, send_waiting


def main(work: Path) -> None:
    """work: the folder of the runs. What waits for another server is passed over; what this one did not take is a
    mistake."""
    results = send_waiting(work)
    for run_id, outcome in results.items():
        print(f"run {run_id}: {outcome}")
    print(f"{len(results)} runs had something to send")
    failed = [outcome for outcome in results.values() if outcome != SENT and not outcome.startswith(WAITS)]
    if failed:
        raise InputError(f"send: of {len(results)} runs {len(failed)} could not be sent whole: {failed[0]}")


if __name__ == "__main__":
    command(main)
