"""One MLflow run, from start to end: what it is called, what it records, how it closes."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import mlflow
import pandas as pd
import psutil
from mlflow import MlflowClient, entities
from mlflow.data.pandas_dataset import from_pandas
from mlflow.exceptions import MlflowException
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

from aliprod import InputError, csvfile, first_line, interruption, manifest
from aliprod.lettering import Figure
from aliprod.streams import plain
from tracking import origin, reach, store
from tracking.spool import Spool, insistent, send_waiting
from tracking.store import away

if TYPE_CHECKING:  # it needs torch, and most of the commands that open a run do not
    from aliprod.report import Reports

EXPERIMENT = "aliprod"  # for runs that `mlflow run` did not start
DESCRIPTION = "mlflow.note.content"  # shown at the head of a run's page
RUNS_FIRST = {"mlflow.experimentKind": "custom_model_development"}  # the kind whose page opens at the runs


class Cut(Exception):
    """Raised within a run that is given up on purpose: it ends KILLED, the reason in a tag, and nothing is raised."""


class Run:
    """A run that records through its spool; `folder` is its own place on this machine."""

    def __init__(self, run_id: str, folder: Path):
        self.id = run_id
        self.folder = folder
        self.spool = Spool(folder, run_id, mlflow.get_tracking_uri())
        self._report_errors: dict[str, str] = {}  # report's name -> why it is missing

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
            csvfile.write(table, path)
        else:
            table.to_parquet(path, index=False)
        self.spool.put("artifact", path=self.spool.path(path), folder=_folder(name))

    def figure(self, figure: Figure, name: str) -> None:
        """A figure as a PNG artifact."""
        path = self._artifact_path(name)
        figure.savefig(path, dpi=110)
        self.spool.put("artifact", path=self.spool.path(path), folder=_folder(name))

    def reports(self, reports: "Reports") -> None:
        """What people read, as artifacts: each made and written by itself.

        None of them ends a run, whose work is done by then: what fails is said in the terminal and kept, with its
        reason, in report_errors.txt and in the tag report_errors.
        """
        for name, make in reports.items():
            try:
                report = make()
                if isinstance(report, Figure):
                    self.figure(report, name)
                elif isinstance(report, pd.DataFrame):
                    self.table(report, name)
                else:
                    self.text(report, name)
            except Exception as error:  # of whatever kind
                if self.spool.lost:
                    raise  # this machine keeps nothing any more, which is no report's fault
                reason = " ".join(f"{name}: {type(error).__name__}: {error}".split())[:500]
                self._report_errors[name] = reason
                print(f"warning: left out {reason}", flush=True)

        if self._report_errors:
            self.text("\n".join(self._report_errors.values()) + "\n", "report_errors.txt")
            self.tags({"report_errors": "; ".join(self._report_errors.values())[:5000]})

    def text(self, text: str, name: str) -> None:
        """A text as an artifact."""
        path = self._artifact_path(name)
        path.write_text(text, encoding="utf-8")
        self.spool.put("artifact", path=self.spool.path(path), folder=_folder(name))

    def file(self, file: Path, name: str) -> None:
        """A file as an artifact; a copy waits to be sent, so the file itself may change."""
        path = self._artifact_path(name)
        shutil.copyfile(file, path)
        self.spool.put("artifact", path=self.spool.path(path), folder=_folder(name))

    def files(self, folder: Path) -> None:
        """A folder with all in it as artifacts; it lies among the run's own."""
        self.spool.put("artifact", path=self.spool.path(folder), folder=None)

    def dataset(self, table: pd.DataFrame, source: str, name: str, context: str) -> None:
        """A manifest as an input of the run; its digest is that of the table written as CSV."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a local path could be read by more than one kind of source
            dataset = from_pandas(table, source=source, name=name, digest=manifest.digest(table))
        self.spool.put("dataset", values=dict(dataset._to_mlflow_entity()), context=context)

    def model(self, folder: Path, example: str, step: int) -> None:
        """The saved model in `folder` as the run's logged model, described by the metrics of `step`."""
        kept = shutil.copyfile(example, self.folder / f"example{Path(example).suffix}")
        self.spool.put("model", folder=self.spool.path(folder), example=self.spool.path(kept), step=step)

    def end(self, status: str) -> None:
        """Closes the run as FINISHED, FAILED or KILLED."""
        self.spool.put("end", status=status, time=_now())
        if not self.spool.close():
            send = origin.again("send", work=self.folder.parents[1])
            print(f"the tracking server is away: run {self.id} waits in {self.folder} for `{send}`")

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
    beside: str = "",
    monitored: bool = True,
) -> Iterator[Run]:
    """A run, within `parent`, or else made or taken over from `mlflow run`, that is closed whatever happens.

    `join` is the id of one to go on recording, perhaps together with other processes; `beside` that of one whose
    experiment the run is made in. FINISHED, or FAILED with the reason in a tag and as its description, or KILLED by an
    interruption or a Cut. What earlier runs in `work` could not send is sent first. Unless `monitored`, the system is
    not sampled. InputError if the tracking server does not answer or refuses, or if MLFLOW_RUN_ID is not ours.
    """
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    store.ready()
    send_waiting(work)
    run_id, status = "", "FAILED"
    run: Run | None = None
    why: dict[str, Any] = {}
    try:
        with interruption.deferred() as stop:  # or a run could be made whose id nobody knows
            run_id = _opened(name, parent, join, beside)
        if stop.is_set():
            raise KeyboardInterrupt

        run = Run(run_id, work / "runs" / (f"{run_id}-{uuid.uuid4().hex[:8]}" if join else run_id))
        run.tags({"git": git_state(), **(tags or {})})
        with _SystemMetrics(run) if monitored else contextlib.nullcontext():
            yield run
        if run.spool.lost:
            raise InputError(run.spool.lost[0])
        status = "FINISHED"
    except Cut as reason:
        status, why = "KILLED", {"cut": reason, DESCRIPTION: reason}
    except KeyboardInterrupt as stopped:
        status, why = "KILLED", {DESCRIPTION: line(stopped)}
        raise
    except BaseException as error:
        why = {"error": reach.shown(f"{type(error).__name__}: {error}")[:500], DESCRIPTION: line(error)}
        raise
    finally:
        if run_id:
            _close(run_id, run, status, why)


def project_run() -> entities.Run | None:
    """The run that `mlflow run` has just made for this command; None without MLFLOW_RUN_ID.

    InputError, naming it, if the variable names any other: whatever that has recorded would be overwritten. Ours is
    RUNNING, was made for the entry point that this process is, and nothing of a command's is in it yet.
    """
    run_id = os.environ.get("MLFLOW_RUN_ID")
    if not run_id:
        return None
    try:
        run = MlflowClient().get_run(run_id)
    except MlflowException as error:
        if away(error):
            raise
        about = first_line(error)
    else:
        tags = run.data.tags
        entry = f"entrypoints.{tags.get('mlflow.project.entryPoint')}"
        new = not run.data.metrics and not any(key.startswith("aliprod.") for key in tags)
        here = getattr(sys.modules["__main__"].__spec__, "name", "") == entry
        if here and new and run.info.status == "RUNNING" and tags.get("mlflow.source.type") == "PROJECT":
            return run
        about = f"that is {run.info.run_name!r}, {run.info.status}"
    raise InputError(f"MLFLOW_RUN_ID={run_id}: {about}; no run that `mlflow run` has just made for this: unset it")


def claim(name: str) -> None:
    """Names the run that `mlflow run` has made for this command, if it has, before anything can fail."""
    with contextlib.suppress(InputError, MlflowException):
        store.ready()
        if run := project_run():
            MlflowClient().update_run(run.info.run_id, name=name)


def close_unopened(reason: str, status: str) -> None:
    """Ends, with the reason as its description, the run of `mlflow run` that a command did not come to open."""
    with contextlib.suppress(InputError, MlflowException):
        if run := project_run():
            client = MlflowClient()
            client.set_tag(run.info.run_id, DESCRIPTION, reason)
            if status == "FAILED":
                client.set_tag(run.info.run_id, "aliprod.error", reason[:500])
            client.set_terminated(run.info.run_id, status)


def stay_killed() -> None:
    """Leaves a child behind that sees to it that a stopped run of `mlflow run` stays KILLED.

    When this process has ended, MLflow marks the run, by that alone, as FAILED: it compares the status it finds, a
    name, with numbers, and so takes no run for one that has ended. The child ends with it, or after half a minute.
    """
    run_id, client = os.environ["MLFLOW_RUN_ID"], MlflowClient()
    with contextlib.suppress(MlflowException):
        if client.get_run(run_id).info.status != "KILLED":
            return
        shells = ("bash", "sh", "dash")
        launcher = next((one for one in psutil.Process().parents() if one.name() not in shells), None)
        if not launcher or os.fork():
            return
        _outlast(client, run_id, launcher)


def expected(error: Exception) -> bool:
    """Whether an error is one that a person can do something about, rather than a fault in the code."""
    return isinstance(error, InputError | OSError | MlflowException) or away(error)


def line(error: BaseException) -> str:
    """What the terminal gets of an error, or of a stop, as one line; no password in it."""
    if isinstance(error, Exception) and (away(error) or isinstance(error, MlflowException)):
        error = store.refusal(error)
    if isinstance(error, KeyboardInterrupt):
        text = f"stopped{error}"
    else:
        text = str(error) if isinstance(error, InputError | OSError) else f"{type(error).__name__}: {error}"
    return reach.shown(" ".join(text.split()))


def experiment_of(run_id: str) -> str:
    """The name of the experiment that a run is in; "" if there is no such run, or no server to say."""
    client = MlflowClient()
    with contextlib.suppress(MlflowException):
        return str(client.get_experiment(client.get_run(run_id).info.experiment_id).name)
    return ""


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
    """The commit the code stands at, with "-dirty" if files differ from it; "unknown" outside a checkout or without
    git."""
    words = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(words, cwd=Path(__file__).parent, capture_output=True, text=True, errors="replace")
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"


class _SystemMetrics(SystemMetricsMonitor):
    """MLflow's own monitor of processor, memory, disk, network and GPU, recording through the run's spool."""

    def __init__(self, run: Run):
        super().__init__(run.id, tracking_uri=mlflow.get_tracking_uri())
        self.run = run

    def monitor(self) -> None:
        while not self._shutdown_event.wait(self.sampling_interval):
            self.collect_metrics()
            with contextlib.suppress(InputError):  # in `lost`, where the run finds it
                self.run.metrics(self.aggregate_metrics(), self._logging_step, "system/")
            self._logging_step += 1
            for monitor in self.monitors:
                monitor.clear_metrics()

    def __enter__(self) -> None:
        self.start()

    def __exit__(self, *_: object) -> None:
        self._shutdown_event.set()
        if self._process:
            self._process.join()


def _opened(name: str, parent: Run | None, join: str, beside: str) -> str:
    """Id of a run that is RUNNING under its name: joined, of `mlflow run`, or made in the experiment it belongs to."""
    client = MlflowClient()
    try:
        own = None if join or parent else project_run()
        if join:
            client.update_run(join, "RUNNING", name)
            return join

        beside = beside if experiment_of(beside) else ""  # this server may not know it
        experiment = _experiment(client, parent.id if parent else beside or (own.info.run_id if own else ""))
        if own and own.info.experiment_id == experiment:
            client.update_run(own.info.run_id, "RUNNING", name)
            return str(own.info.run_id)

        nested = {"mlflow.parentRunId": parent.id} if parent else None
        run_id = str(client.create_run(experiment, tags=nested, run_name=name).info.run_id)
    except MlflowException as error:
        raise store.refusal(error, "opens no run") from None
    if own:
        close_unopened(f"recorded as run {run_id}, in the experiment of run {beside}", "FINISHED")
    return run_id


def _outlast(client: MlflowClient, run_id: str, launcher: psutil.Process) -> NoReturn:
    """In a child: ends the run as KILLED again when it is marked as FAILED, and then this process."""
    try:
        os.setsid()  # the terminal's next Ctrl-C is not for it
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(30)
        if engine := getattr(client._tracking_client.store, "engine", None):
            engine.dispose(close=False)  # its connections are the parent's
        running = True
        while running:
            running = _lives(launcher)
            if client.get_run(run_id).info.status == "FAILED":
                client.set_terminated(run_id, "KILLED")
                break
            time.sleep(0.1)
    finally:
        os._exit(0)


def _lives(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _close(run_id: str, run: Run | None, status: str, why: dict[str, Any]) -> None:
    """Ends a run, by its spool or, where that cannot be written, directly. A stop that comes meanwhile comes after."""
    with interruption.deferred() as stop:
        try:
            if run is None:
                raise OSError(f"run {run_id} has no folder")
            run.tags(why)
            run.end(status)
        except (OSError, InputError):
            with contextlib.suppress(MlflowException):
                client = MlflowClient()
                for key, value in why.items():
                    client.set_tag(run_id, _key(key), str(value))
                client.set_terminated(run_id, "KILLED" if status == "KILLED" else "FAILED")
            if status == "FINISHED":
                raise
    if stop.is_set() and status != "KILLED":
        signal.raise_signal(signal.SIGTERM)


@insistent
def _experiment(client: MlflowClient, run_id: str) -> str:
    """Id of the experiment of a run, or else of the one that the environment names, made where there is none."""
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME")
    number = os.environ.get("MLFLOW_EXPERIMENT_ID")
    experiment: entities.Experiment | None
    if run_id:
        experiment = client.get_experiment(client.get_run(run_id).info.experiment_id)
    elif number and not name:
        experiment = client.get_experiment(number)
    else:
        experiment = client.get_experiment_by_name(name or EXPERIMENT)

    if not experiment:
        return str(client.create_experiment(name or EXPERIMENT, tags=RUNS_FIRST))
    for key, value in RUNS_FIRST.items() - experiment.tags.items():
        client.set_experiment_tag(experiment.experiment_id, key, value)
    return str(experiment.experiment_id)


def _key(key: str) -> str:
    return key if "." in key else f"aliprod.{key}"


def _folder(name: str) -> str | None:
    return str(Path(name).parent) if "/" in name else None


def _now() -> int:
    return int(time.time() * 1000)
