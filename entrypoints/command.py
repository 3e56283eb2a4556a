"""What every entry point shares: parameters from the command line, mistakes as one line, stops that save."""

import argparse
import inspect
import os
import sys
import typing
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

from pydantic import ConfigDict, Field, ValidationError, validate_call

from aliprod import InputError, catalogue, interruption, sharing, streams
from entrypoints import places
from tracking import copies, reach, storage

if TYPE_CHECKING:
    from aliprod.model import Saved

RECIPES = Path(__file__).parent / "recipes"
FINITE = ConfigDict(allow_inf_nan=False)
Minutes = Annotated[float, Field(ge=0, le=366 * 24 * 60)]  # to stop after, a year at most; 0: never


class _Parser(argparse.ArgumentParser):
    names: list[str]

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; parameters are {', '.join(self.names)}")


def command(main: Callable[..., None]) -> None:
    """Runs `main` with --name value options as its signature has them, checked against its annotations.

    A user's mistake, or a server that is away, ends in one line and exit status 2, a stop in one line and 130; else 0
    or a traceback.
    """
    with streams.unfailing():
        _run(main)


def _run(main: Callable[..., None]) -> None:
    interruption.raise_on_signals()
    reach.prepare()
    try:
        if os.environ.get("MLFLOW_RUN_ID"):
            from tracking import runs  # of MLflow, which takes a second to import

            runs.claim(Path(sys.argv[0]).stem)
        values = _values(main)
        if "work" in values:
            sharing.open_to_group(Path(values["work"]))
        validate_call(config=FINITE)(main)(**values)
    except ValidationError as error:
        first = error.errors()[0]
        _exit(2, f"{first['loc'][0]} {first['input']!r}: {first['msg']}")
    except InputError as error:
        _exit(2, str(error))
    except Exception as error:
        from tracking import runs  # not every command needs it

        line = runs.line(error)
        if not runs.expected(error):
            _note(1, line)
            raise
        _exit(2, line)
    except KeyboardInterrupt as stop:
        _exit(130, f"stopped{stop}")


def _values(main: Callable[..., None]) -> dict[str, Any]:
    """The parameters of `main` as they stand on the command line, paths that were left open in their place."""
    parameters = inspect.signature(main).parameters
    parser = _Parser(description=inspect.getdoc(main), allow_abbrev=False)
    parser.names = list(parameters)
    for name, parameter in parameters.items():
        required = parameter.default is inspect.Parameter.empty
        parser.add_argument(f"--{name}", required=required, default=None if required else parameter.default)
    values = vars(parser.parse_args(_paired(sys.argv[1:], parser.names)))

    kinds = {name: parameter.annotation for name, parameter in parameters.items()}
    for name, kind in kinds.items():
        _check_text(name, values[name], kind)
    values = places.place(values, kinds)
    for name, kind in kinds.items():
        _check_path(name, values[name], kind)
    return values


def _paired(arguments: list[str], names: list[str]) -> list[str]:
    """The command line with each value joined to its name, as values may begin with a dash: ids, files, numbers."""
    joined, rest = [], iter(arguments)
    for word in rest:
        value = next(rest, None) if word.removeprefix("--") in names else None
        joined.append(word if value is None else f"{word}={value}")
    return joined


def _check_text(name: str, text: str | None, kind: Any) -> None:
    """InputError if a parameter's value is no text, as names of files need not be: photographs are read anyway."""
    if streams.plain(str(text)) != str(text) and (name, kind) != ("images", str):
        raise InputError(f"{name} {text!r}: must be UTF-8")


def _check_path(name: str, text: str | None, kind: Any) -> None:
    """InputError if the value of a parameter that is a path names no place on this machine."""
    kind = (typing.get_args(kind) or (kind,))[0]
    if kind is Path and not text:
        raise InputError(f"{name} {text!r}: must be the path of a file or folder")
    if kind is Path and storage.is_address(text):
        raise InputError(f"{name} {text!r}: must be on this machine; `upload` puts it there")


def refuse(why: str, **given: str) -> None:
    """InputError if any of these parameters was given."""
    if names := [name for name, value in given.items() if value]:
        raise InputError(f"{', '.join(names)}: not to be given here, {why}")


def recipe_path(name: str) -> Path:
    """The file of a recipe: a path, or the name of one that comes with the project."""
    shipped = RECIPES / f"{name}.toml"
    path = shipped if shipped.exists() else Path(name)
    if not path.is_file():
        names = ", ".join(sorted(file.stem for file in RECIPES.glob("*.toml")))
        raise InputError(f"recipe {name!r} not found: give a .toml file, or {names}")
    return path


def data_folder(data: str, work: Path) -> Path:
    """The data folder; "demo" is the demo catalogue, rendered into `work` when first asked for; s3://bucket/folder is
    fetched into it."""
    if data != "demo":
        path = Path(copies.local(data, work)).resolve()
        if not path.is_dir():
            raise InputError(f"data {data!r}: no folder {path} (relative paths start at the project's folder)")
        return path
    if Path("demo", "train.json").exists():
        print("data: demo is the demo catalogue; the folder here that is called so is ./demo", flush=True)
    catalogue.render(work / "demo")
    return (work / "demo").resolve()


def data_folder_of(saved: "Iterable[Saved]", data: str, work: Path) -> Path:
    """The data folder for these models: `data` as of data_folder, or "", the one that they were trained on; says which.

    InputError where they were trained on several, where nobody knows on which, and where the ids of their classes are
    of other products in it.
    """
    from aliprod import assembly  # these take seconds: not every command needs them
    from tracking import models

    trained = [(models.trained_on(one), one.classes) for one in saved]
    folders = sorted({folder for folder, _ in trained})
    if not data and folders == [""]:
        raise InputError("data: it is not known what the model was trained on; give a folder")
    if not data and len(folders) > 1:
        raise InputError(f"data: the models were trained on {', '.join(map(repr, folders))}; give one folder")
    if not data and not Path(folders[0]).is_dir():
        raise InputError(f"data: the model was trained on {folders[0]}, which is not here; give a folder")
    folder = data_folder(data or folders[0], work)
    for _, classes in trained:
        assembly.refuse_other_products(classes, folder)
    print(f"data:      {folder}" + " (what the model was trained on)" * (not data), flush=True)
    return folder


def _exit(status: int, line: str) -> NoReturn:
    line = streams.plain(reach.shown(" ".join(line.split())))
    _note(status, line)
    print(line, file=sys.stderr)
    sys.exit(status)


def _note(status: int, line: str) -> None:
    """Leaves the line with the run that `mlflow run` made, if it is open still."""
    if os.environ.get("MLFLOW_RUN_ID"):
        from tracking import runs

        runs.close_unopened(line, "KILLED" if status == 130 else "FAILED")
        if status == 130:
            runs.stay_killed()
