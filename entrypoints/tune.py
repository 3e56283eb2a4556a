"""Searches the space of a round's [[tune]] table, alone or together with other workers, and writes the best round."""

from pathlib import Path
from typing import Annotated

from pydantic import Field

from aliprod import interruption
from aliprod.recipe import read
from entrypoints.command import Minutes, command, data_folder, recipe_path
from tracking import origin, studies


def main(
    recipe: str,
    round: str,
    data: str,
    trials: int,
    name: str,
    storage: str,
    sampler: str,
    pruner: str,
    overrides: str,
    minutes: Minutes,
    seed: Annotated[int, Field(ge=0, lt=2**32)],
    work: Path,
) -> None:
    """recipe: a name or a .toml file; round: of it, else the first with a [[tune]] table; data: a folder, or demo;
    trials: finished ones in all, whoever finishes them; name: of the study, else made of recipe, round and data;
    storage: postgresql://user@host/database for workers on many machines, its password in PGPASSWORD or ~/.pgpass, as
    parameters are logged; else a file in work; sampler: tpe or random; pruner: hyperband, median or none;
    overrides: fields of the round, as "epochs=10"; minutes: to stop after, 0 for none; seed: of the search; work."""
    rows = read(recipe_path(recipe))
    tuning, row = rows.tuning(round, overrides)
    search = studies.Search(
        rows.name, row, tuning, str(data_folder(data, work)), name, storage, trials, sampler, pruner, seed
    )
    interruption.raise_on_signals(minutes)
    try:
        print(studies.tune(search, work))
    except KeyboardInterrupt:
        raise KeyboardInterrupt("; the same command goes on where the study is") from None
    print(f"browse:    {origin.pages()}")


if __name__ == "__main__":
    command(main)
