"""Real photographs: the grocery data set, where it is at hand."""

import pytest

from aliprod import assembly, manifest, recipe, report, training
from aliprod.images import Images
from entrypoints.command import recipe_path


@pytest.fixture
def frozen() -> recipe.Round:
    return recipe.read(recipe_path("grocery")).row("frozen")


def test_its_tables_are_as_its_authors_say(grocery, frozen):
    tables = assembly.tables(frozen, grocery)
    assert (len(tables.train), len(tables.val), len(tables.classes)) == (2640, 296, 81)
    assert tables.classes["num_train"].min() == 16 and tables.classes["num_train"].max() == 70
    assert tables.val["class_id"].nunique() == 60
    assert len(set(tables.train["image_id"]) & set(tables.val["image_id"])) > 0  # the split is part of the key
    assert tables.classes["path"].str.count(" > ").eq(2).all()
    assert tables.classes["path"][0] == "Fruit > Apple > Golden-Delicious"


def test_its_photographs_are_all_readable(grocery, frozen):
    model = assembly.model(frozen, 81, "random", assembly.tables(frozen, grocery).levels)
    table = manifest.read(grocery, "val")
    images = Images(manifest.paths(table, grocery), None, model.preprocessing)
    assert sum(len(rows) for _, rows in images.batches([images.rows])) == len(table) and not images.corrupt


@pytest.mark.slow
def test_the_frozen_round_recognises_two_of_three(grocery, frozen, tmp_path):
    tables = assembly.tables(frozen, grocery)
    model = assembly.model(frozen, 81, frozen.init, tables.levels)
    source, val = (
        assembly.inputs(model, frozen, table, tables.classes, grocery, tmp_path, "none")
        for table in (tables.train, tables.val)
    )
    list(training.train(model, frozen, source, val, tmp_path / "run", levels=tables.levels))
    scores = report.evaluate(model, tables.classes, tables.val, grocery, tmp_path, precision="fp32").scores
    assert scores["map"] > 0.69 and scores["accuracy"] > 0.69
    assert scores["coverage_classes"] == 1.0
