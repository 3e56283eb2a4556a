"""Runs all rounds of one or more recipes in order, each from the ones before, and tables them."""

from pathlib import Path

from aliprod import interruption, report
from aliprod.parameters import paths
from aliprod.recipe import override, read, scaled
from entrypoints.command import Minutes, command, data_folder, recipe_path
from tracking import copies, origin, pipeline, runs


def main(recipe: str, data: str, scale: float, overrides: str, promote: bool, minutes: Minutes, work: Path) -> None:
    """recipe: names or .toml files, in their order; data: a folder, or demo; scale: the data's size, as a share of the
    competition's 2.5 million photographs, to which classes, batches and epochs are fitted (1: as written); overrides:
    fields of every round, as "lr=3e-4 epochs=2"; promote: whether the best extractor is offered to the registry in the
    end; minutes: to stop after, 0 for none; work."""
    recipes = [
        recipe.model_copy(
            update={
                "rounds": tuple(
                    copies.tables_here(override(scaled(row, scale), overrides), work) for row in recipe.rounds
                ),
                "cleanings": tuple(copies.tables_here(row, work) for row in recipe.cleanings),
            }
        )
        for recipe in map(read, map(recipe_path, paths("recipe", recipe)))
    ]
    folder = data_folder(data, work)
    with runs.start("+".join(recipe.name for recipe in recipes), work) as parent:
        try:
            interruption.raise_on_signals(minutes)
            table = pipeline.run(parent, recipes, folder, work, promote)
        except KeyboardInterrupt:
            raise KeyboardInterrupt("; the same command goes on, and reuses what is finished") from None
    print(report.markdown(table.drop(columns="Run")))
    print(f"run:       {parent.id}\nbrowse:    {origin.pages()}")


if __name__ == "__main__":
    command(main)
