"""What every entry point shares: parameters from the command line, mistakes as one line, stops that save."""

import argparse
import inspect
import sys
import typing
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from pydantic import ValidationError, validate_call

from aliprod import InputError, catalogue, interruption, streams
from entrypoints import places
from tracking import copies, storage

RECIPES = Path(__file__).parent / "recipes"


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
    parser = _Parser(description=inspect.getdoc(main), allow_abbrev=False)
    parser.names = list(inspect.signature(main).parameters)
    parameters = inspect.signature(main).parameters
    for name, parameter in parameters.items():
        required = parameter.default is inspect.Parameter.empty
        parser.add_argument(f"--{name}", required=required, default=None if required else parameter.default)
    try:
        given = vars(parser.parse_args())
        given = places.place(given, {name: parameter.annotation for name, parameter in parameters.items()})
        for name, parameter in parameters.items():
            kind = typing.get_args(parameter.annotation) or (parameter.annotation,)
            if kind[0] is Path and storage.is_address(given[name]):
                raise InputError(f"{name} {given[name]!r}: must be on this machine; `upload` puts it there")
        validate_call(main)(**given)
    except ValidationError as error:
        first = error.errors()[0]
        _exit(2, f"{first['loc'][0]} {first['input']!r}: {first['msg']}")
    except (InputError, OSError) as error:
        _exit(2, str(error))
    except Exception as error:
        from tracking.spool import away  # of MLflow, which takes a second to import and not every command needs

        if not away(error):
            raise
        _exit(2, f"the tracking server does not answer: {str(error).splitlines()[0]}")
    except KeyboardInterrupt as stop:
        _exit(130, f"stopped{stop}")


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


def _exit(status: int, line: str) -> NoReturn:
    print(" ".join(line.split()), file=sys.stderr)
    sys.exit(status)
