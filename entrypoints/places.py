"""Which files and folders parameters mean: `work`, what lies in it, and paths that must be given in full."""

import dataclasses
import os
import re
import typing
from pathlib import Path
from typing import Any

import platformdirs

from aliprod import InputError, parameters, surroundings

ROOT = Path(__file__).resolve().parents[1]
WORK = "ALIPROD_WORK"  # the variable that says where `work` is
# Parameters in which a path may stand, and what in them is none; in some, several words.
PATHS = {
    "work": "",
    "data": "demo",
    "images": r"newest|[0-9a-f]{32}",
    "source": "",
    "select_list": "",
    "recipe": r"[\w-]*",
    "split": r"[\w-]*",
    "model": r"[\w-]*",
    "models": r"\w[\w./-]*",
    "init": r"\w[\w./-]*(?<!\.safetensors)",
    "manifest": r"\w[\w./-]*(?<!\.csv)",
    "output": "",
}
SEVERAL = ("images", "recipe", "models")


@dataclasses.dataclass(frozen=True)
class Within:
    """Annotates a path that, where none is given, is that of this name in `work`."""

    name: str


def work() -> str:
    """The folder that `work` is unless given: $ALIPROD_WORK; else `work` in the project's folder, or, where MLflow has
    fetched that for one run alone, the user's data folder for aliprod. InputError if there can be no such folder."""
    if named := os.environ.get(WORK):
        if not Path(named).is_absolute():
            raise InputError(f"{WORK} {named!r}: give the path in full")
        return named
    if not fetched_from():
        return "work"

    folder = platformdirs.user_data_path("aliprod", appauthor=False)
    try:
        if not surroundings.has_home():
            raise FileNotFoundError("this user has no home folder")
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"no place for work: {error}; set {WORK} to a folder that stays") from None
    return str(folder)


def fetched_from() -> str:
    """The address that MLflow has fetched the project from for this run alone; "" otherwise."""
    if "MLFLOW_RUN_ID" not in os.environ:
        return ""
    from tracking import origin  # imports MLflow, which takes seconds

    return origin.address()


def place(values: dict[str, Any], annotations: dict[str, Any]) -> dict[str, Any]:
    """The parameters with the paths that were left open put in their place. InputError if one is no path, or none that
    would be found again."""
    values = dict(values)
    if values.get("work") == "":
        values["work"] = work()
        if values["work"] != "work":
            print(f"work:      {values['work']}", flush=True)
    for name, annotation in annotations.items():
        within = next((about for about in typing.get_args(annotation) if isinstance(about, Within)), None)
        if within and values[name] == "":
            values[name] = str(Path(values.get("work") or work(), within.name))

    if fetched_from():
        _refuse_relative(values)
    return values


def _refuse_relative(values: dict[str, Any]) -> None:
    fields = parameters.fields("overrides", values.get("overrides") or "")
    for name, value in [(name, value) for name, value in [*values.items(), *fields.items()] if name in PATHS and value]:
        for word in parameters.paths(name, value) if name in SEVERAL else [str(value)]:
            if not (Path(word).is_absolute() or re.match(r"\w+:/", word) or re.fullmatch(PATHS[name], word)):
                raise InputError(
                    f"{name} {word!r}: give the path in full; a relative one starts at {ROOT}, "
                    f"where MLflow fetched {fetched_from()} for this run alone"
                )
