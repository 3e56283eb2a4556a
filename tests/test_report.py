"""Figures: small whatever the photographs are, true whatever the classes are called."""

import io
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from PIL import Image

from aliprod import report, taxonomy

NAMES = ["50 % $x^$", "Crème & $\\frac$", "plain"]
CLASSES = pd.DataFrame({"class_id": ["1", "2", "3"], "name": NAMES, "num_train": 5})


@pytest.fixture
def files(tmp_path) -> pd.Series:
    """Photographs of several thousand pixels a side, the last a small one."""
    for row, (width, height) in enumerate([(4000, 500), (300, 5000), (40, 30)]):
        Image.new("RGB", (width, height), (250, 10, 20)).save(tmp_path / f"{row}.png")
    return pd.Series([str(tmp_path / f"{row}.png") for row in range(3)])


def drawn(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, dpi=20)
    return file.getvalue()


def largest(figure: Figure) -> int:
    return max(max(image.get_array().shape) for axes in figure.axes for image in axes.images)


def test_photographs_in_figures_are_small_and_names_are_no_formulas(files):
    predictions = pd.DataFrame({"label": [0, 1, 2], "pred": [1, 0, 0], "confidence": [0.9, 0.8, 0.7]})
    mistakes = report.mistakes(predictions, CLASSES, files)
    assert drawn(mistakes) and largest(mistakes) <= 256
    assert mistakes.axes[0].get_title() == f"is {NAMES[0]}\nsaid {NAMES[1]}, 90%"
    dropped = pd.DataFrame({"class_id": CLASSES["class_id"], "reason": "misclassified"})
    thumbnails = report.thumbnails(dropped, files, CLASSES.set_index("class_id")["name"])
    assert drawn(thumbnails) and largest(thumbnails) <= 256
    assert [axes.get_title() for axes in thumbnails.axes] == NAMES
    per_class = CLASSES.assign(num_val=1, num_correct=0, accuracy=0.0)
    confusion = report.confusion(predictions, per_class)
    assert drawn(confusion)
    assert sorted(label.get_text() for label in confusion.axes[0].get_yticklabels()) == [
        f"{number} {name}" for number, name in enumerate(NAMES, start=1)
    ]


def test_every_group_of_classes_has_a_bar_of_its_own():
    per_class = pd.DataFrame({"num_train": 7, "accuracy": np.linspace(0, 1, 12)})  # all groups are called alike
    (axes,) = report.map_by_frequency(per_class, groups=4).axes
    assert [bar.get_x() + bar.get_width() / 2 for bar in axes.patches] == pytest.approx([0, 1, 2, 3])
    assert [bar.get_height() for bar in axes.patches] == pytest.approx(per_class["accuracy"].to_numpy()[1::3])
    assert {label.get_text() for label in axes.get_xticklabels()} == {"7-7\n(3 classes)"}


@pytest.mark.parametrize("seen", [0, 1, 2, 3])
def test_the_whole_of_the_tree_takes_no_classes_place(tmp_path: Path, seen):
    (tmp_path / "product_tree.json").write_text('{"1": ["A", "a"], "2": ["A", "b"], "3": ["B", "c"], "4": ["B", "d"]}')
    levels = taxonomy.read(tmp_path / "product_tree.json").levels(pd.Series(list("1234")))
    labels = np.array([seen, seen])
    (data,) = report.icicle(pd.DataFrame({"label": labels, "pred": labels}), levels).data
    assert sorted(data.labels) == sorted(["all", "AABB"[seen], "abcd"[seen]]) and list(data.values) == [2, 2, 2]
