"""What a round needs, put together from its recipe row and a data folder: rows, classes, model, inputs."""

from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch

from aliprod import InputError, features, manifest, taxonomy
from aliprod.features import Features
from aliprod.images import Images
from aliprod.model import Recogniser, load_backbone
from aliprod.recipe import Round
from aliprod.taxonomy import Levels


@dataclass(frozen=True)
class Tables:
    """The rows a round trains and validates on; `classes` has class_id, name, path, num_train, by label.

    The same for every round on this data: `gallery`, the whole train split balanced, and `queries`, the whole val
    split, for the yardstick; `data_digest`, that of the whole train split.
    """

    train: pd.DataFrame
    val: pd.DataFrame
    classes: pd.DataFrame
    tree: taxonomy.Taxonomy | None
    gallery: pd.DataFrame
    queries: pd.DataFrame
    data_digest: str

    @property
    def levels(self) -> Levels | None:
        """Where the classes stand in the product tree, if there is one."""
        return self.tree.levels(self.classes["class_id"]) if self.tree else None


def tables(row: Round, data: str | Path) -> Tables:
    """Reads and selects the rows of `row` in the folder `data`; of val, those whose class is trained on."""
    whole = manifest.read(data, "train")
    derived = {"train": lambda: whole, "balanced": lambda: manifest.balance(whole, row.seed)}
    train = derived.get(row.manifest, lambda: manifest.read_csv(row.manifest))()
    gallery = manifest.balance(whole, seed=0)
    if row.samples_per_class:
        train = manifest.select(train, *row.samples_per_class)
    elif row.samples_quantile:
        train = manifest.select_quantile(train, *row.samples_quantile)
    if row.select_list:
        train = manifest.select_listed(train, row.select_list, row.min_confidence)
    if row.class_holdout:
        train = manifest.hold_out(train, manifest.class_index(whole), row.class_holdout, row.seed)
    products = tree(data)
    classes = describe(manifest.class_index(train), products)
    if len(classes) < 2:
        raise InputError(f"{data}: {row.manifest} holds {len(classes)} class; at least 2 are needed")
    queries = manifest.read(data, "val")
    val = queries[manifest.labels(queries, classes) >= 0].reset_index(drop=True)
    if val.empty:
        raise InputError(f"{data}: val.json holds no photograph of the {len(classes)} classes trained on")
    return Tables(train, val, classes, products, gallery, queries, manifest.digest(whole))


def tree(data: str | Path) -> taxonomy.Taxonomy | None:
    """The product tree of a data folder, if it has one."""
    path = Path(data) / "product_tree.json"
    return taxonomy.read(path) if path.exists() else None


def contradictions(classes: pd.DataFrame, products: taxonomy.Taxonomy | None) -> pd.DataFrame:
    """The rows of a model's `classes` whose name or path is another in the product tree, with the tree's as name_there
    and path_there: the ids are of other products. What either side leaves open is no contradiction."""
    there = describe(classes, products)
    differs = pd.Series(False, index=classes.index)
    for column in ("name", "path"):
        ours, theirs = classes[column], there[column]
        differs |= (ours != theirs) & (ours != "") & (theirs != "")
    return classes.assign(name_there=there["name"], path_there=there["path"])[differs]


def refuse_other_products(classes: pd.DataFrame, data: str | Path) -> None:
    """InputError if the product tree of a data folder says of some of a model's `classes` that they are others."""
    others = contradictions(classes, tree(data))
    if len(others):
        first = others.iloc[0]
        column = "name" if first["name"] and first["name_there"] not in ("", first["name"]) else "path"
        raise InputError(
            f"data {str(data)!r}: {len(others)} of the model's {len(classes)} classes are other products there; "
            f"the {column} of {first['class_id']!r} is {first[f'{column}_there']!r}, in the model {first[column]!r}"
        )


def describe(classes: pd.DataFrame, tree: taxonomy.Taxonomy | None) -> pd.DataFrame:
    """`classes` with the name and path of each in the tree, "" where unknown."""
    known = tree.describe(classes["class_id"]).set_index(classes.index) if tree else {"name": "", "path": ""}
    return classes.assign(**known)[["class_id", "name", "path", "num_train"]]


def device() -> torch.device:
    """The accelerator, if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def model(row: Round, num_classes: int, init: str, levels: Levels | None = None) -> Recogniser:
    """A fresh head on the backbone that `init` gives (as of load_backbone), on the device; `levels` as of Tables."""
    if not levels and (row.hierarchy != "none" or row.level_weights or row.tree_smoothing):
        raise InputError(f"round {row.name}: hierarchy, level_weights and tree_smoothing need product_tree.json")
    torch.manual_seed(row.seed)
    head = {"kind": row.head, "scale": row.scale, "centers": row.centers}
    weighted = [level for level in map(int, row.level_weights or {}) if levels and level < len(levels.sizes)]
    hierarchy = {"kind": row.hierarchy, "levels": weighted, "stage": row.branch_stage}
    made = Recogniser(row.backbone, num_classes, row.image_size, head=head, hierarchy=hierarchy, levels=levels)
    load_backbone(made, init)
    return made.to(device())


def inputs(
    made: Recogniser,
    row: Round,
    table: pd.DataFrame,
    classes: pd.DataFrame,
    data: str | Path,
    cache: str | Path,
    augment: str,
) -> Images | Features:
    """The rows of `table` as the round feeds them: embeddings from the cache where the backbone is frozen and
    nothing is augmented, photographs otherwise."""
    images = Images(
        manifest.paths(table, data),
        manifest.labels(table, classes),
        made.preprocessing,
        augment=augment,
        seed=row.seed,
        max_corrupt_share=row.max_corrupt_share,
    )
    cached = row.freeze == "all" and row.augment == "none"
    return features.compute(made, images, cache, row.precision) if cached else images
