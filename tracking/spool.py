"""What a run records, written to a file first and then sent, in order and each record once.

A tracking server may be away for a while, or for good: training goes on, and what it recorded stays in
`<folder>/spool.jsonl` until it can be sent, by the same run, by the next one, or by `send_waiting`.
Once only: how many bytes were sent is kept beside the file, and the operation that may have been cut off between
sending and noting it is harmless to repeat (metrics carry their time, a model is looked for first).
Files are named from the folder, so that it can be moved before they are sent.
"""

import contextlib
import functools
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import mlflow
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.exceptions import MlflowException

from aliprod import InputError
from aliprod.atomic import replacing
from aliprod.sharing import Busy, locked
from tracking import models, reach, store
from tracking.store import away

PATIENCE = 30  # seconds between two attempts to reach a server that did not answer
BATCH = 1000  # metrics in one request; MLflow's limit
SENT = "sent"
WAITS = "waits for MLFLOW_TRACKING_URI="
Given = ParamSpec("Given")
Answer = TypeVar("Answer")


def insistent(call: Callable[Given, Answer]) -> Callable[Given, Answer]:
    """The same call, made once more if it is refused; it must be harmless to repeat.

    Of two clients that are the first to name the same dataset, tag or experiment at the same time, MLflow's database
    refuses one, whose second attempt finds what the other has made. A server that is away is not asked again.
    """

    @functools.wraps(call)
    def calling(*args: Given.args, **kwargs: Given.kwargs) -> Answer:
        try:
            return call(*args, **kwargs)
        except MlflowException as error:
            if away(error) or store.local(error):
                raise
            return call(*args, **kwargs)

    return calling


class Spool:
    """The journal of one run in `folder`; a lock keeps a second process from sending it at the same time.

    `lost` says of each record that could not be kept, and without which the run is not what it claims to be, why: the
    model, and all that this machine, rather than the server, refused. Such a run ends as FAILED.
    """

    def __init__(self, folder: Path, run_id: str, tracking_uri: str):
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "spool.jsonl"
        with contextlib.ExitStack() as opened:
            opened.enter_context(locked(path, wait=False))
            self._file = opened.enter_context(path.open("a+b"))
            with replacing(folder / "run.json") as beside:
                beside.write_text(json.dumps({"run_id": run_id, "tracking_uri": reach.shown(tracking_uri)}))
            self._opened = opened.pop_all()

        self.folder = folder
        self.run_id = run_id
        self.client = MlflowClient(tracking_uri)
        self.lost: list[str] = []
        self.num_refused = 0
        self._next_attempt = 0.0
        self._mutex = threading.RLock()

    def put(self, kind: str, **record: Any) -> None:
        """Records one operation and sends all that waits, if the server answers; InputError if that adds to `lost`."""
        with self._mutex:
            self._file.write(json.dumps({"kind": kind, **record}).encode() + b"\n")
            self._file.flush()
            if time.monotonic() < self._next_attempt:
                return
            before = len(self.lost)
            self.send()
            if len(self.lost) > before:
                raise InputError(self.lost[before])

    def path(self, path: Path) -> str:
        """How a record names a file or folder: from the run's own folder where it lies in it."""
        own, path = self.folder.resolve(), path.resolve()
        return str(path.relative_to(own) if path.is_relative_to(own) else path)

    def send(self) -> bool:
        """Sends what waits; False if the server did not answer. What is refused is kept in refused.jsonl, and said."""
        with self._mutex:
            sent_path = self.folder / "spool.sent"
            sent = int(sent_path.read_text()) if sent_path.exists() else 0
            self._file.seek(sent)
            for line in self._file.read().splitlines(keepends=True):
                if not line.endswith(b"\n"):
                    break  # cut off by a crash while it was written
                try:
                    self._deliver(json.loads(line))
                except Exception as error:  # of whatever kind: it must not stop what is being recorded
                    if away(error):
                        self._next_attempt = time.monotonic() + PATIENCE
                        return False
                    self._refused(line, error)
                sent += len(line)
                with replacing(sent_path) as beside:
                    beside.write_text(str(sent))
            return True

    def close(self) -> bool:
        """Sends once more and lets go of the file; False if something still waits."""
        try:
            return self.send()
        finally:
            self._opened.close()

    def _refused(self, line: bytes, error: Exception) -> None:
        """Keeps a record that cannot be delivered, says so, and notes in `lost` what the run cannot do without."""
        path = self.folder / "refused.jsonl"
        with path.open("ab") as refused:
            refused.write(line)
        self.num_refused += 1
        record = json.loads(line)
        here = store.local(error)
        gone = isinstance(error, FileNotFoundError) and not self._found(record.get("path", ".")).exists()
        reason = reach.shown(" ".join(str(error).split()))
        if record["kind"] == "model" or (here and not gone):
            kept = f"; it is in {self._found(record['folder'])}" if record["kind"] == "model" else ""
            self.lost.append(f"run {self.run_id}: its {record['kind']} could not be kept: {reason}{kept}")
        who = "this machine" if here else "the tracking server"
        print(f"run {self.run_id}: {who} refused a record, kept in {path}: {reason}", flush=True)

    def _found(self, name: str) -> Path:
        """The file or folder that a record names; older ones name it absolutely, or from where the command ran."""
        path = self.folder / name
        return path if path.exists() or not Path(name).exists() else Path(name)

    @insistent
    def _deliver(self, record: dict[str, Any]) -> None:
        match record:
            case {"kind": "metrics", "values": values}:
                for start in range(0, len(values), BATCH):
                    self.client.log_batch(
                        self.run_id, metrics=[Metric(*value) for value in values[start : start + BATCH]]
                    )
            case {"kind": "params", "values": values}:
                self.client.log_batch(self.run_id, params=[Param(*value) for value in values.items()])
            case {"kind": "tags", "values": values}:
                self.client.log_batch(self.run_id, tags=[RunTag(*value) for value in values.items()])
            case {"kind": "dataset", "values": values, "context": context}:
                tags = [InputTag("mlflow.data.context", context)]
                self.client.log_inputs(self.run_id, [DatasetInput(Dataset(**values), tags)])
            case {"kind": "artifact", "path": path, "folder": folder}:
                self.client.log_artifact(self.run_id, str(self._found(path)), folder)
            case {"kind": "model", "folder": folder, "example": example, "step": step}:
                found = str(self._found(folder)), str(self._found(example))
                models.log(self.client, self.run_id, *found, step)
            case {"kind": "end", "status": status, "time": end_time}:
                if self.lost:
                    status = "FAILED"
                    self.client.set_tag(self.run_id, "mlflow.note.content", self.lost[0])
                self.client.set_terminated(self.run_id, status, end_time)
            case _:
                raise AssertionError(f"unknown record {record}")


def idle(folder: Path) -> bool:
    """Whether no process is recording the run of this folder: it ended, or died."""
    with contextlib.suppress(Busy), locked(folder / "spool.jsonl", wait=False):
        return True
    return False


def send_waiting(work: Path) -> dict[str, str]:
    """Sends what earlier runs in `work` left for the current server; run id -> SENT, or why it was not. Runs still
    alive are passed over."""
    reach.prepare()
    results = {}
    current = mlflow.get_tracking_uri()
    for note in sorted(work.glob("runs/*/run.json")):
        about, folder = json.loads(note.read_text()), note.parent
        sent = folder / "spool.sent"
        if (folder / "spool.jsonl").stat().st_size == (int(sent.read_text()) if sent.exists() else 0):
            continue

        if not _belongs(**about, current=current):
            results[about["run_id"]] = f"{WAITS}{reach.shown(about['tracking_uri'])}"
            continue
        try:
            spool = Spool(folder, about["run_id"], current)
            done = spool.close()
        except Busy:
            continue
        except OSError as error:  # a full disk, somebody else's folder
            results[about["run_id"]] = f"cannot be sent from here: {error}"
            continue
        if not done:
            results[about["run_id"]] = "the tracking server is still away"
        elif spool.num_refused:
            results[about["run_id"]] = f"{spool.num_refused} records were refused: {folder / 'refused.jsonl'}"
        else:
            results[about["run_id"]] = SENT
    return results


def _belongs(run_id: str, tracking_uri: str, current: str) -> bool:
    """Whether a run is of the current store, which may be an SQLite file that has been moved since."""
    if reach.shown(tracking_uri) == reach.shown(current):
        return True
    path = tracking_uri.removeprefix("sqlite:///")
    if path == tracking_uri or Path(path).exists():
        return False
    with contextlib.suppress(MlflowException):
        return bool(MlflowClient(current).get_run(run_id))
    return False
