"""Logged models: from a saved folder to MLflow, and from any way of naming a model back to a folder."""

import base64
import functools
import importlib.metadata
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlflow
import pandas as pd
from mlflow import MlflowClient
from mlflow.entities import LoggedModelStatus, Run
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
from mlflow.types.schema import Array

from aliprod import InputError, first_line
from tracking import search, store

if TYPE_CHECKING:
    from aliprod.model import Saved

NAME = "model"
ROOT = Path(__file__).parents[1]
# What aliprod.model, .images and .prediction import; a server installs these and nothing of training.
SERVING = (
    *("mlflow", "torch", "torchvision", "timm", "safetensors", "opencv-python-headless", "pillow"),
    *("numpy", "pandas", "pyarrow", "msgspec", "tqdm", "faiss-cpu"),
)
SIGNATURE = ModelSignature(
    # Text, which MLflow hands on as it is, bytes too. Base64 of a binary column it decodes itself, in two of the four
    # forms of JSON only, and refuses all images for one that is wrong.
    inputs=Schema([ColSpec(DataType.string, "image")]),
    outputs=Schema(
        [
            ColSpec(Array(DataType.string), "class_ids"),
            ColSpec(Array(DataType.string), "names"),
            ColSpec(Array(DataType.string), "paths"),
            ColSpec(Array(DataType.double), "confidences"),
            ColSpec(DataType.string, "answer"),
            ColSpec(DataType.double, "certainty"),
            ColSpec(DataType.boolean, "unknown"),
            ColSpec(Array(DataType.double), "embedding"),
            ColSpec(DataType.string, "error"),
        ]
    ),
    params=ParamSchema(
        [
            ParamSpec("top", DataType.long, 5),
            ParamSpec("sure", DataType.double, 0.0),
            ParamSpec("using", DataType.string, "both"),
            ParamSpec("embedding", DataType.boolean, False),
        ]
    ),
)


def log(client: MlflowClient, run_id: str, folder: str, example: str, step: int) -> None:
    """Logs the saved model in `folder` as the run's model, once, in its served form. `step` is the step of the run's
    metrics that describe the model."""
    run = client.get_run(run_id)
    if logged(run):
        return
    made = client.create_logged_model(run.info.experiment_id, NAME, run_id, params=run.data.params)
    Model.log(
        artifact_path=None,
        flavor=mlflow.pyfunc,
        model_id=made.model_id,
        run_id=run_id,
        step=step,
        **form(folder, example),
    )


def logged(run: Run) -> str | None:
    """Id of the model that a run has logged; one whose upload broke off, or that was deleted, does not count."""
    for output in run.outputs.model_outputs if run.outputs else ():
        try:
            model = MlflowClient().get_logged_model(output.model_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            continue
        if model.status == LoggedModelStatus.READY and model.name == NAME:
            return str(output.model_id)
    return None


def form(folder: str, example: str) -> dict[str, Any]:
    """What mlflow.pyfunc needs to save the served form of the model in `folder`; `example` is an image file.

    The code travels with it (models from code, no pickle), as do the versions of what serving needs.
    """
    return {
        "python_model": str(ROOT / "tracking" / "served.py"),
        "artifacts": {"model": Path(folder).resolve().as_uri()},  # of a path MLflow would take ? and # for a URI's
        "code_paths": [str(ROOT / "aliprod")],
        "signature": SIGNATURE,
        "input_example": pd.DataFrame({"image": [base64.b64encode(Path(example).read_bytes()).decode()]}),
        "pip_requirements": [f"{name}=={importlib.metadata.version(name)}" for name in SERVING],
    }


def load(name: str) -> "Saved":
    """The model named as for `fetch`, in evaluation mode; its `.model` is the torch module."""
    from aliprod import model  # takes seconds, which commands that load none do not wait for

    return model.load(fetch(name))


def fetch(name: str) -> Path:
    """The saved folder of a model named by a folder, a run id, runs:/..., models:/..., another MLflow URI or "newest".

    A folder that is called as a run, or newest, is ./newest. InputError says what was looked for and not found.
    """
    local = Path(name)
    if re.fullmatch("newest|[0-9a-f]{32}|", name) or not local.is_dir():
        store.ready()
        try:
            local = download(artifact_uri=_uri(name))
        except (MlflowException, OSError) as error:
            raise InputError(f"model {name!r} not found: {first_line(error)}") from None
    found = list(local.glob("**/config.json"))
    if len(found) != 1:
        raise InputError(f"model {name!r} is no single model of this project's: it holds {len(found)} config.json")
    return found[0].parent


def download(**what: str) -> Path:
    """An artifact, as of mlflow.artifacts.download_artifacts, in a folder that goes when this process ends."""
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", str(sys.stderr.isatty()))
    place = tempfile.mkdtemp(dir=_downloads().name)
    return Path(mlflow.artifacts.download_artifacts(dst_path=place, **what))


@functools.cache
def _downloads() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="aliprod-")


def _uri(name: str) -> str:
    run_id = newest({}, of_model=True) if name == "newest" else None
    if named := re.fullmatch(rf"(?:runs:/)?([0-9a-f]{{32}})(?:/{NAME})?", name):
        run_id = named[1]
    if run_id and (model := logged(MlflowClient().get_run(run_id))):
        return f"models:/{model}"  # by its own id: the path below the run need not hold any file
    if not re.match(r"\w+:/", name):
        choices = f"a saved folder, a run id, runs:/<run id>/{NAME}, models:/<name>@<alias> or newest"
        raise InputError(f"model {name!r} not found: give {choices}")
    return name


def newest(tags: dict[str, Any], of_model: bool = False) -> str | None:
    """Run id of this project's newest finished run, in any experiment, with these tags and, if asked, a model."""
    runs = (run for run in search.runs(tags, "FINISHED") if not of_model or logged(run))
    return next((str(run.info.run_id) for run in runs), None)


def trained_on(saved: "Saved") -> str:
    """The data folder that a model was trained on, "" where neither the model nor its run says it."""
    if folder := saved.config.get("data_folder"):
        return str(folder)
    if not (run_id := saved.config.get("run_id")):
        return ""
    try:
        return str(MlflowClient().get_run(run_id).data.params.get("data_folder", ""))
    except MlflowException:
        return ""
