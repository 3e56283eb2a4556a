"""What a run records, written to a file first and then sent, in order and each record once.

A tracking server may be away for a while, or for good: training goes on, and what it recorded stays in
`<folder>/spool.jsonl` until it can be sent, by the same run, by the next one, or by `send_waiting`.
Once only: how many bytes were sent is kept beside the file, and the operation that may have been cut off between
sending and noting it is harmless to repeat (metrics carry their time, a model is looked for first).
"""

import contextlib
import fcntl
import functools
import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import mlflow
import requests
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.exceptions import MlflowException

from aliprod.atomic import replacing
from tracking import models, storage

PATIENCE = 30  # seconds between two attempts to reach a server that did not answer
BATCH = 1000  # metrics in one request; MLflow's limit
Given = ParamSpec("Given")
Answer = TypeVar("Answer")


def away(error: Exception) -> bool:
    """Whether a server or a store could not be reached or could not do it now, rather than refused."""
    if isinstance(error, MlflowException):
        return error.get_http_status_code() >= 500
    if isinstance(error, requests.HTTPError) and error.response is not None:
        return error.response.status_code >= 500
    return isinstance(error, requests.RequestException) or storage.is_away(error)


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
            if away(error):
                raise
            return call(*args, **kwargs)

    return calling


class Spool:
    """The journal of one run in `folder`; a lock keeps a second process from sending it at the same time."""

    def __init__(self, folder: Path, run_id: str, tracking_uri: str):
        folder.mkdir(parents=True, exist_ok=True)
        self._file = (folder / "spool.jsonl").open("a+b")
        fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with replacing(folder / "run.json") as beside:
            beside.write_text(json.dumps({"run_id": run_id, "tracking_uri": tracking_uri}))
        self.folder = folder
        self.run_id = run_id
        self.client = MlflowClient(tracking_uri)
        self._next_attempt = 0.0
        self._mutex = threading.RLock()

    def put(self, kind: str, **record: Any) -> None:
        """Records one operation and sends all that waits, if the server answers."""
        with self._mutex:
            self._file.write(json.dumps({"kind": kind, **record}).encode() + b"\n")
            self._file.flush()
            if time.monotonic() >= self._next_attempt:
                self.send()

    def send(self) -> bool:
        """Sends what waits; False if the server did not answer. What it refuses is kept in refused.jsonl, and said."""
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
                    with (self.folder / "refused.jsonl").open("ab") as refused:
                        refused.write(line)
                    print(f"run {self.run_id}: the tracking server refused a record, kept in {refused.name}: {error}")
                sent += len(line)
                with replacing(sent_path) as beside:
                    beside.write_text(str(sent))
            return True

    def close(self) -> bool:
        """Sends once more and lets go of the file; False if something still waits."""
        done = self.send()
        self._file.close()
        return done

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
                self.client.log_artifact(self.run_id, path, folder)
            case {"kind": "model", "folder": folder, "example": example, "step": step}:
                models.log(self.client, self.run_id, folder, example, step)
            case {"kind": "end", "status": status, "time": end_time}:
                self.client.set_terminated(self.run_id, status, end_time)
            case _:
                raise AssertionError(f"unknown record {record}")


def idle(folder: Path) -> bool:
    """Whether no process is recording the run of this folder: it ended, or died."""
    with (folder / "spool.jsonl").open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


def send_waiting(work: Path) -> dict[str, str]:
    """Sends what earlier runs in `work` left for the current server; run id -> what came of it. Runs still alive are
    passed over."""
    # A dead server would hold up training for minutes at every report; the spool waits instead.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    results = {}
    current = mlflow.get_tracking_uri()
    for note in sorted(work.glob("runs/*/run.json")):
        about = json.loads(note.read_text())
        folder = note.parent
        sent = folder / "spool.sent"
        if (folder / "spool.jsonl").stat().st_size == (int(sent.read_text()) if sent.exists() else 0):
            continue
        if about["tracking_uri"] != current:
            results[about["run_id"]] = f"waits for MLFLOW_TRACKING_URI={about['tracking_uri']}"
            continue
        with contextlib.suppress(BlockingIOError):
            done = Spool(folder, **about).close()
            results[about["run_id"]] = "sent" if done else "the tracking server is still away"
    return results
