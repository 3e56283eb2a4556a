"""Figures: small whatever the photographs are, true whatever the classes are called and the answers are."""

import io
import json
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from PIL import Image

from aliprod import lettering, metrics, reliability, report, taxonomy

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


@pytest.mark.parametrize(
    ("labels", "preds", "confidence"),
    [
        ([0, 1, 2], [0, 1, 2], 0.9),
        ([0, 1, 2], [1, 2, 0], 0.9),
        ([0, 1, 2], [1, 1, 2], np.nan),
        ([2], [2], 1.0),
        ([2], [1], 0.0),
        ([0, 0, 0], [0, 0, 0], 0.5),
    ],
    ids=["none wrong", "all wrong", "no numbers", "one, right", "one, wrong", "one class"],
)
def test_an_evaluation_is_drawn_whatever_its_answers_are(files, labels, preds, confidence):
    predictions = pd.DataFrame({"label": labels, "pred": preds, "confidence": confidence})
    predictions.index += 3 - len(labels)  # rows of photographs, of which the first may be unreadable
    classes = CLASSES.assign(path="", name=["", "b", "c"])
    per_class = metrics.per_class(predictions, classes)
    mistakes = report.mistakes(predictions, classes, files)
    names, wrong = ["1", "b", "c"], predictions[predictions["label"] != predictions["pred"]]
    titles = [f"is {names[row.label]}\nsaid {names[row.pred]}" for row in wrong.itertuples()]
    assert sorted(axes.get_title().partition(",")[0] for axes in mistakes.axes) == sorted(titles)

    correct, confidences = (
        (predictions["label"] == predictions["pred"]).to_numpy(),
        predictions["confidence"].to_numpy(),
    )
    others = report.confusion(predictions, per_class), reliability.diagram(correct, confidences, confidences)
    assert all(map(drawn, (mistakes, *others)))
    assert len(metrics.select_list(predictions, classes)) == len(set(labels))
    assert len(report.map_by_frequency(per_class).axes[0].patches) == len(set(labels))


def test_photographs_lost_since_they_were_evaluated_have_the_reason_in_their_place(files):
    whole = Path(files[1]).read_bytes()
    Path(files[0]).unlink()
    Path(files[1]).write_bytes(whole[:100])
    Path(files[2]).unlink()
    Path(files[2]).mkdir()
    Path(files[2]).with_name("whole.png").write_bytes(whole)
    files = pd.Series([*files, str(Path(files[2]).with_name("whole.png"))])
    predictions = pd.DataFrame({"label": [0, 1, 2, 0], "pred": [1, 0, 0, 1], "confidence": [0.9, 0.8, 0.7, 0.6]})
    mistakes = report.mistakes(predictions, CLASSES, files)
    dropped = pd.DataFrame({"class_id": ["1", "2", "3", "3"], "reason": "misclassified"})
    thumbnails = report.thumbnails(dropped, files, CLASSES.set_index("class_id")["name"])
    for figure in (mistakes, thumbnails):
        assert [len(axes.images) for axes in figure.axes] == [0, 0, 0, 1]
        reasons = [axes.texts[0].get_text() for axes in figure.axes[:3]]
        assert len(set(reasons)) == 3 and all(reasons) and all(axes.get_title() for axes in figure.axes)
    assert drawn(mistakes)


SCRIPTS = ["红富士苹果", "蘋果", "リンゴ", "사과", "Яблоко", "تفاح أحمر", "แอปเปิ้ล", "सेब", "𠮷", "长" * 300, ""]
EMOJI = ["🍎☕", "👨\u200d👩\u200d👧"]
ODDITIES = ["e\u0301\u0323", "6\u20e3", "a\nb\tc", "$x^$ $", "\ud800\x00\x07", "\u202eabc"]


def test_names_of_any_script_are_drawn_without_a_warning(files):
    figure = lettering.Figure(figsize=(6, 6))
    for place, name in enumerate([*SCRIPTS, *EMOJI, *ODDITIES]):
        figure.text(0.1, place / 20, lettering.caption(name, 40, instead="00012"), parse_math=False)
    classes = CLASSES.assign(name=["红富士苹果", "แอปเปิ้ล 🍎 $x^$", "تفاح\tأحمر"])
    predictions = pd.DataFrame({"label": [0, 1, 2], "pred": [1, 0, 0], "confidence": [0.9, 0.8, 0.7]})
    dropped = pd.DataFrame({"class_id": CLASSES["class_id"], "reason": "misclassified"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert drawn(figure)
        assert drawn(report.mistakes(predictions, classes, files))
        assert drawn(report.confusion(predictions, classes.assign(num_val=1, num_correct=0, accuracy=0.0)))
        assert drawn(report.thumbnails(dropped, files, classes.set_index("class_id")["name"]))


def test_chinese_is_drawn_and_what_no_font_has_is_spelt_out():
    assert lettering.caption("红苹果 $x^$ a\nb") == "红苹果 $x^$ a b"
    shapes = set()
    for character in "红苹果雪梨":  # in place of what a font lacks all have the same box
        figure = lettering.Figure(figsize=(1, 1))
        figure.text(0.2, 0.2, character, fontsize=40)
        shapes.add(drawn(figure))
    assert len(shapes) == 5
    nowhere = "\U000e0fff"  # no character yet
    assert lettering.caption(f"a{nowhere}") == "a\\U000e0fff"
    assert lettering.caption(nowhere * 5, 30, instead="00012") == "00012" == lettering.caption("", 30, instead="00012")
    assert lettering.caption("x" * 50, 30) == "x" * 29 + "…"


def test_fonts_change_nothing_outside_of_figures():
    from matplotlib import rcParams

    before = dict(rcParams)
    figure = lettering.Figure()
    figure.text(0, 0, lettering.caption("红苹果"))
    drawn(figure)
    assert dict(rcParams) == before


TREE = [
    {
        "name": "Fruit",
        "children": [
            {"name": "Apple", "class_id": "1"},
            {"name": "Apple", "children": [{"name": "Gala", "class_id": "2"}, {"name": "Apple", "class_id": "3"}]},
            {"name": "Pear", "class_id": "4"},
            {"name": "Pear", "class_id": "5"},
        ],
    },
    {"name": "all", "class_id": "6"},
    {"name": "<b> > & c", "children": [{"name": "<b> > & c", "class_id": "7"}]},
]


def test_nodes_of_one_name_have_each_their_place_in_the_tree(tmp_path):
    (tmp_path / "product_tree.json").write_text(json.dumps(TREE))
    classes = pd.Series([*"1234567", "Fruit"])  # the last stands outside of the tree
    levels = taxonomy.read(tmp_path / "product_tree.json").levels(classes)
    labels = np.arange(len(classes))
    (data,) = report.icicle(pd.DataFrame({"label": labels, "pred": labels}), levels).data
    assert len(set(data.ids)) == len(data.ids) == 12
    names = ["all", "Fruit", "Apple", "Apple", "Gala", "Apple", "Pear", "Pear", "all", "Fruit"]
    assert Counter(data.labels) == Counter([*names, *["&lt;b&gt; &gt; &amp; c"] * 2])
    values, below = dict(zip(data.ids, data.values, strict=True)), Counter()
    for parent, value in zip(data.parents, data.values, strict=True):
        below[parent] += value
    assert all(below[node] == values[node] for node in below if node)  # else the page stays empty


def test_a_cell_of_markdown_cannot_end_its_row():
    table = pd.DataFrame({"a|b\n": ["x|y\nz", "plain"]})
    assert report.markdown(table).splitlines() == ["| a\\|b |", "| --- |", "| x\\|y z |", "| plain |"]


def test_the_legend_of_rounds_lists_what_there_is_and_stands_beside_the_points():
    columns = {"GAP": 0.9, "MAP": [0.95, 1.0], "Reported GAP": np.nan, "Reported MAP": [np.nan, 0.6]}
    table = pd.DataFrame({"R": ["苹|果/$x$", "first/second"], **columns, "NCM": 0.02, "1-NN": 0.0})
    figure = report.rounds_figure(table)
    figure.draw_without_rendering()
    (legend,) = figure.legends
    names = [text.get_text().partition(",")[0] for text in legend.get_texts()]
    assert names == ["GAP", "MAP", "MAP", "accuracy by the nearest class mean", "accuracy by the nearest neighbour"]
    assert not legend.get_window_extent().overlaps(figure.axes[0].get_window_extent())
    assert report.rounds_figure(pd.concat([table] * 500)).get_figwidth() * 110 < 2**16  # matplotlib draws no more
