"""Turns a data folder's JSON into tables."""

from pathlib import Path
from typing import Annotated

from pydantic import NonNegativeInt

from aliprod import csvfile, manifest, taxonomy
from entrypoints.command import command, data_folder
from entrypoints.places import Within
from tracking import runs


def main(data: str, output: Annotated[Path, Within("tables")], seed: NonNegativeInt, work: Path) -> None:
    """data: a folder with train.json, val.json and perhaps test.json and product_tree.json, or demo; output: the
    folder for the tables; seed: of the choice that balances; work: for what waits to be sent."""
    folder = data_folder(data, work)
    splits = [split for split in ("train", "val", "test") if split != "test" or (folder / "test.json").exists()]
    manifests = {split: manifest.read(folder, split) for split in splits}
    manifests["balanced_train"] = manifest.balance(manifests["train"], seed)
    tree = folder / "product_tree.json"
    output.mkdir(parents=True, exist_ok=True)
    trees = {"product_tree": taxonomy.read(tree).to_frame()} if tree.exists() else {}

    with runs.start("prepare", work, {name: manifest.digest(table) for name, table in manifests.items()}) as run:
        for name, table in manifests.items():
            run.dataset(table, str(folder), name, name)

        for name, table in (manifests | trees).items():
            csvfile.write(table, output / f"{name}.csv")
            run.table(table, f"{name}.csv")
            classes = table["class_id"].nunique() - (name == "product_tree")
            print(f"{output / name}.csv: {len(table)} rows, {classes} classes")


if __name__ == "__main__":
    command(main)
