"""Runs that dead machines left RUNNING: found by their silence, closed as KILLED.

Every run records system metrics as long as it lives, so the time of its newest metric is its heartbeat; one that has
none yet is as old as its start. A run that lives but cannot reach the server looks the same: closing it loses nothing,
what its spool holds is still sent, its end as well.
"""

import time
from datetime import UTC, datetime
from pathlib import Path

import mlflow
from mlflow import MlflowClient
from mlflow.entities import Run

from aliprod import InputError
from tracking import reach, spool, store


def silent(minutes: float, experiment: str, work: Path) -> dict[str, int]:
    """Runs still RUNNING, of an experiment or of all (""), that were not heard of for so long; id -> last heartbeat,
    in milliseconds. A run that a process here is recording into `work` is alive."""
    store.ready()
    if experiment and not MlflowClient().get_experiment_by_name(experiment):
        raise InputError(f"experiment {experiment!r} not found at {reach.shown(mlflow.get_tracking_uri())}")
    running = mlflow.search_runs(
        experiment_names=[experiment] if experiment else None,
        search_all_experiments=not experiment,
        filter_string="attributes.status = 'RUNNING'",
        output_format="list",
    )
    beats = {run.info.run_id: _heartbeat(run) for run in running}
    oldest = 1000 * (time.time() - 60 * minutes)
    return {run_id: beat for run_id, beat in beats.items() if beat < oldest and not _recorded_here(run_id, work)}


def close(run_id: str, heartbeat: int) -> bool:
    """Ends a run as KILLED at its last heartbeat; False if meanwhile it ended or was heard of."""
    client = MlflowClient()
    run = client.get_run(run_id)
    if run.info.status != "RUNNING" or _heartbeat(run) > heartbeat:
        return False
    last = datetime.fromtimestamp(heartbeat / 1000, UTC)
    client.set_tag(run_id, "aliprod.reaped", f"not heard of since {last:%Y-%m-%d %H:%M:%S} UTC")
    client.set_terminated(run_id, "KILLED", heartbeat)
    return True


def _heartbeat(run: Run) -> int:
    newest = (metric.timestamp for metric in run.data._metric_objs)  # .metrics has the values alone
    return int(max([run.info.start_time, *newest]))


def _recorded_here(run_id: str, work: Path) -> bool:
    folder = work / "runs" / run_id
    return (folder / "spool.jsonl").exists() and not spool.idle(folder)
