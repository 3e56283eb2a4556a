"""Where the project runs from: a folder that stays, or one that `mlflow run ADDRESS` has fetched it into.

MLflow fetches a git or ZIP address into a new temporary folder, runs there and never comes back to it.
"""

import functools
import os
import re
import shlex
import tempfile
from pathlib import Path

import mlflow
from mlflow import MlflowClient

ROOT = Path(__file__).resolve().parents[1]


@functools.cache
def address() -> str:
    """The address that this folder was fetched from, without a password; "" where the project stands in its place."""
    source = _tags().get("mlflow.source.name", "")
    place = Path(source.removeprefix("file://").replace("#", "/", 1)).resolve()
    if not source or place == ROOT:
        return ""
    web = re.sub(r"^(https?://)[^/@]*@", r"\1", source)  # a token may stand where the user's name does
    return re.sub(r"^(\w+://[^/@:]*):[^/@]*@", r"\1@", web)


def again(entry: str, experiment: str = "", **parameters: object) -> str:
    """The line that runs an entry point of the same project, at the same version, as it can be pasted into a shell;
    `experiment` is a name."""
    words = ["mlflow", "run", address() or ".", *_version(), "-e", entry]
    words += ["--env-manager", _tags().get("mlflow.project.env", "local")]
    words += ["--experiment-name", experiment] if experiment else []
    for name, value in parameters.items():
        words += ["-P", f"{name}={value}"]
    return shlex.join(words)


def pages() -> str:
    """The command that opens the pages of the runs, or their address."""
    if not address():
        return "make server"
    uri = mlflow.get_tracking_uri()
    return uri if uri.startswith("http") else shlex.join(["mlflow", "server", "--backend-store-uri", uri])


@functools.cache
def _tags() -> dict[str, str]:
    """What `mlflow run` has noted of the run that it made for this process; nothing where the project's folder is no
    temporary one, which spares most commands the question to the store."""
    run_id = os.environ.get("MLFLOW_RUN_ID")
    if not run_id or Path(tempfile.gettempdir()).resolve() not in ROOT.parents:
        return {}
    tags: dict[str, str] = MlflowClient().get_run(run_id).data.tags
    return tags if tags.get("mlflow.source.type") == "PROJECT" else {}


def _version() -> list[str]:
    """As it was asked for: a branch, or a commit; neither where it was the newest of the main branch."""
    if branch := _tags().get("mlflow.source.git.branch"):
        return ["-v", branch]
    heads = (folder / ".git" / "HEAD" for folder in (ROOT, *ROOT.parents))
    head = next((file.read_text(encoding="utf-8").strip() for file in heads if file.is_file()), "")
    return ["-v", head] if address() and re.fullmatch("[0-9a-f]{40,64}", head) else []
