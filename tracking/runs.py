"""One MLflow run, from start to end: what it is called, what it records, how it closes."""

import contextlib
import logging
import os
import shutil
import subprocess
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
from matplotlib.figure import Figure
from mlflow import MlflowClient
from mlflow.data.pandas_dataset import from_pandas
from mlflow.exceptions import MlflowException
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

from aliprod import InputError, manifest
from aliprod.streams import plain
from tracking import origin
from tracking.spool import Spool, away, insistent, send_waiting

EXPERIMENT = "aliprod"  # for runs that `mlflow run` did not start
RUNS_FIRST = {"mlflow.experimentKind": "custom_model_development"}  # the kind whose page opens at the runs


class Cut(Exception):
    """Raised within a run that is given up on purpose: it ends KILLED, the reason in a tag, and nothing is raised."""


class Run:
    """A run that records through its spool; `folder` is its own place on this machine."""

    def __init__(self, run_id: str, folder: Path):
        self.id = run_id
        self.folder = folder
        self.spool = Spool(folder, run_id, mlflow.get_tracking_uri())

    def tags(self, values: dict[str, Any]) -> None:
        """Tags; keys without a dot of their own get the project's prefix."""
        self.spool.put("tags", values={_key(key): plain(str(value)) for key, value in values.items()})

    def params(self, values: dict[str, Any]) -> None:
        """Parameters."""
        self.spool.put("params", values={key: str(value) for key, value in values.items()})

    def metrics(self, values: dict[str, float], step: int, prefix: str = "") -> None:
        """Metrics of one step; a key is `prefix` and the name."""
        now = _now()
        self.spool.put("metrics", values=[[prefix + key, value, now, step] for key, value in values.items()])

    def curve(self, points: list[dict[str, float]], prefix: str) -> None:
        """Metrics of many steps in one batch; each point has its `step`."""
        now = _now()
        rows = [
            [prefix + key, value, now, point["step"]]
            for point in points
            for key, value in point.items()
            if key != "step"
        ]
        self.spool.put("metrics", values=rows)

    def table(self, table: pd.DataFrame, name: str) -> None:
        """A table as an artifact, .csv or .parquet by its name."""
        path = self._artifact_path(name)
        if path.suffix == ".csv":
            manifest.write_csv(table, path)
        else:
            table.to_parquet(path, index=False)
        self.spool.put("artifact", path=str(path), folder=_folder(name))

    def figure(self, figure: Figure, name: str) -> None:
        """A figure as a PNG artifact."""
        path = self._artifact_path(name)
        figure.savefig(path, dpi=110)
        self.spool.put("artifact", path=str(path), folder=_folder(name))

    def text(self, text: str, name: str) -> None:
        """A text as an artifact."""
        path = self._artifact_path(name)
        path.write_text(text, encoding="utf-8")
        self.spool.put("artifact", path=str(path), folder=_folder(name))

    def file(self, file: Path, name: str) -> None:
        """A file as an artifact; a copy waits to be sent, so the file itself may change."""
        path = self._artifact_path(name)
        shutil.copyfile(file, path)
        self.spool.put("artifact", path=str(path), folder=_folder(name))

    def files(self, folder: Path) -> None:
        """A folder with all in it as artifacts; it lies among the run's own."""
        self.spool.put("artifact", path=str(folder), folder=None)

    def dataset(self, table: pd.DataFrame, source: str, name: str, context: str) -> None:
        """A manifest as an input of the run; its digest is that of the table written as CSV."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a local path could be read by more than one kind of source
            dataset = from_pandas(table, source=source, name=name, digest=manifest.digest(table))
        self.spool.put("dataset", values=dict(dataset._to_mlflow_entity()), context=context)

    def model(self, folder: Path, example: str, step: int) -> None:
        """The saved model in `folder` as the run's logged model, described by the metrics of `step`."""
        kept = shutil.copyfile(example, self.folder / f"example{Path(example).suffix}")
        self.spool.put("model", folder=str(folder), example=str(kept), step=step)

    def end(self, status: str) -> None:
        """Closes the run as FINISHED, FAILED or KILLED."""
        self.spool.put("end", status=status, time=_now())
        if not self.spool.close():
            command = origin.again("send", work=self.folder.parents[1])
            print(f"the tracking server is away: run {self.id} waits in {self.folder} for `{command}`")

    def _artifact_path(self, name: str) -> Path:
        path = self.folder / "artifacts" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


@contextlib.contextmanager
def start(
    name: str,
    work: Path,
    tags: dict[str, Any] | None = None,
    parent: Run | None = None,
    *,
    join: str = "",
    monitored: bool = True,
) -> Iterator[Run]:
    """A run, within `parent`, or else made or taken over from `mlflow run`, that is closed whatever happens within.

    `join` is the id of one to go on recording, perhaps together with other processes. FINISHED, or FAILED with the
    reason in a tag, or KILLED by an interruption or a Cut. What earlier runs in `work` could not send is sent first.
    Unless `monitored`, the system is not sampled. InputError if the tracking server does not answer or refuses.
    """
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    send_waiting(work)
    client = MlflowClient()
    try:
        run_id = join or (None if parent else os.environ.get("MLFLOW_RUN_ID"))
        experiment = _experiment(client, run_id or (parent.id if parent else None))
        nested = {"mlflow.parentRunId": parent.id} if parent else None
        run_id = run_id or client.create_run(experiment, tags=nested).info.run_id
        client.update_run(run_id, "RUNNING", name)
    except MlflowException as error:
        what = "does not answer" if away(error) else "opens no run"
        reason = str(error).splitlines()[0][:200]
        raise InputError(f"the tracking server {mlflow.get_tracking_uri()} {what}: {reason}") from None
    run = Run(run_id, work / "runs" / (f"{run_id}-{os.getpid()}" if join else run_id))
    run.tags({"git": git_state(), **(tags or {})})
    system_metrics = _SystemMetrics(run) if monitored else None
    if system_metrics:
        system_metrics.start()
    status = "FAILED"
    try:
        yield run
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    except Cut as reason:
        status = "KILLED"
        run.tags({"cut": reason})
    except BaseException as error:
        run.tags({"error": f"{type(error).__name__}: {error}"[:500]})
        raise
    finally:
        if system_metrics:
            system_metrics.finish()
        run.end(status)


def close_abandoned(run_id: str) -> None:
    """Marks a run, and the one it is nested in, as KILLED if a dead process left it RUNNING."""
    with contextlib.suppress(MlflowException):
        client = MlflowClient()
        run = client.get_run(run_id)
        if run.info.status == "RUNNING":
            client.set_terminated(run_id, "KILLED")
        if parent := run.data.tags.get("mlflow.parentRunId"):
            close_abandoned(parent)


def git_state() -> str:
    """The commit the code stands at, with "-dirty" if files differ from it; "unknown" outside a checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    place = Path(__file__).parent
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, errors="replace", check=False)
    return done.stdout.strip() or "unknown"


class _SystemMetrics(SystemMetricsMonitor):
    """MLflow's own monitor of processor, memory, disk, network and GPU, recording through the run's spool."""

    def __init__(self, run: Run):
        super().__init__(run.id, tracking_uri=mlflow.get_tracking_uri())
        self.run = run

    def monitor(self) -> None:
        while not self._shutdown_event.wait(self.sampling_interval):
            self.collect_metrics()
            self.run.metrics(self.aggregate_metrics(), self._logging_step, "system/")
            self._logging_step += 1
            for monitor in self.monitors:
                monitor.clear_metrics()

    def finish(self) -> None:
        self._shutdown_event.set()
        self._process.join()


@insistent
def _experiment(client: MlflowClient, run_id: str | None) -> str:
    """Id of the experiment of a run, or else of the one that the environment names, made where there is none."""
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT)
    experiment = (
        client.get_experiment(client.get_run(run_id).info.experiment_id)
        if run_id
        else client.get_experiment_by_name(name)
    )
    if not experiment:
        return client.create_experiment(name, tags=RUNS_FIRST)
    for key, value in RUNS_FIRST.items() - experiment.tags.items():
        client.set_experiment_tag(experiment.experiment_id, key, value)
    return experiment.experiment_id


def _key(key: str) -> str:
    return key if "." in key else f"aliprod.{key}"


def _folder(name: str) -> str | None:
    return str(Path(name).parent) if "/" in name else None


def _now() -> int:
    return int(time.time() * 1000)
