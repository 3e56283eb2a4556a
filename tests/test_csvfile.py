"""Whatever text stands in a table comes back from its CSV as it was, or is refused with its line."""

import codecs
import json
import os
import random
import re
import unicodedata
from pathlib import Path

import pandas as pd
import pytest
import torch

from aliprod import (
    InputError,
    assembly,
    csvfile,
    enrolment,
    manifest,
    metrics,
    model,
    prediction,
    recipe,
    taxonomy,
    textfile,
)
from aliprod.gallery import ENROLLED, Gallery

NASTY = [
    *("\r", "\n", "\r\n", '"', '""', ",", ";", "\t", " ", "'", "\\", "#", "=", "-", "\0", "\ufeff", "\u2028", "\x85"),
    *("NA", "null", "nan", "None", "", "True", "1e5", "-1", "00012", "é", "e\u0301", "漢", "🛒", "a", "A", " > "),
]


def nasty_texts(count: int, seed: int) -> list[str]:
    """Each piece alone, then random strings of them, all different; the first is always an ordinary name."""
    drawn = random.Random(seed)
    strings = ["apple", *NASTY, *("".join(drawn.choices(NASTY, k=drawn.randint(1, 6))) for _ in range(3 * count))]
    return list(dict.fromkeys(strings))[:count]


def columns(names: list[str], count: int = 300) -> pd.DataFrame:
    return pd.DataFrame({name: nasty_texts(count, seed) for seed, name in enumerate(names)}).astype("str")


@pytest.mark.parametrize(
    "names",
    [
        *(["split", "class_id", "image_id"], ["class_id", "name", "path"], ENROLLED),
        *(
            ["class_id", "confidence"],
            ["split", "class_id", "image_id", "reason"],
            ["file", "class_id", "name", "path"],
        ),
    ],
    ids=["manifest", "classes", "enrolled", "select list", "dropped", "predictions"],
)
def test_every_table_comes_back_as_it_was(tmp_path, names):
    table = columns(names)
    csvfile.write(table, tmp_path / "x.csv")
    pd.testing.assert_frame_equal(csvfile.read(tmp_path / "x.csv", names), table)


def test_a_manifest_comes_back_with_every_id_that_it_may_have(tmp_path):
    table = columns(manifest.COLUMNS, 900)
    kept = ~table.apply(lambda column: column.str.contains(r"[/\\\x00]", regex=True) | (column == "")).any(axis=1)
    table = table[kept & ~table.apply(lambda column: column.str.contains("\n|\r")).any(axis=1)].reset_index(drop=True)
    csvfile.write(table, tmp_path / "x.csv")
    pd.testing.assert_frame_equal(manifest.read_csv(tmp_path / "x.csv"), table)
    assert len(table) > 100


def test_a_saved_model_has_the_names_that_it_was_given(row, tmp_path):
    texts = nasty_texts(200, 0)
    ids = sorted(set(nasty_texts(201, 1)) - {""})
    paths = {class_id: ["all", name] for class_id, name in zip(ids, texts, strict=True)}
    (tmp_path / "product_tree.json").write_text(json.dumps(paths))
    tree = taxonomy.read(tmp_path / "product_tree.json")
    classes = pd.DataFrame({"class_id": ids, "name": texts, "path": texts[::-1], "num_train": range(len(ids))})
    assembly.model(row, len(ids), "random").save(tmp_path / "model", classes, tree, {})

    saved = model.load(tmp_path / "model")
    pd.testing.assert_frame_equal(saved.classes, classes.astype({"class_id": "str", "name": "str", "path": "str"}))
    pd.testing.assert_frame_equal(saved.tree.to_frame(), tree.to_frame())


def test_a_gallery_has_the_texts_that_were_enrolled(tmp_path):
    table = columns(ENROLLED)
    width = 2
    trained = pd.DataFrame({"class_id": ["a"], "name": "", "path": ""})
    places = torch.zeros(len(table), width).half()
    means, counts = torch.zeros(1, width).half(), torch.ones(1, dtype=torch.int64)
    gallery = Gallery(torch.zeros(width), torch.eye(width), means, counts, places, 0.5, 1.0, trained, table)
    gallery.save(tmp_path)
    again = Gallery.load(tmp_path, gallery.trained)
    pd.testing.assert_frame_equal(again.enrolled, table)
    assert again.new["class_id"].tolist() == [text for text in table["class_id"] if text != "a"]


def test_ids_that_look_alike_are_different_classes(tmp_path):
    ids = ["1", "01", "1.0", "1e0", "é", unicodedata.normalize("NFD", "é"), "a", "A", " a", "a ", "NA", "nan", "-1"]
    table = pd.DataFrame({"split": "train", "class_id": ids, "image_id": "x.jpg"}).astype("str")
    csvfile.write(table, tmp_path / "x.csv")
    again = manifest.read_csv(tmp_path / "x.csv")
    assert manifest.class_index(again)["class_id"].tolist() == sorted(ids)


def test_a_table_with_line_breaks_is_read_alike_however_long_it_is(tmp_path):
    rows = "".join(f'{number}.jpg,{number % 50},"Red\nApple {number}"\n' for number in range(60_000))
    for name, text in {"short": rows[:200].rpartition("\n")[0] + "\n", "long": rows}.items():
        (tmp_path / f"{name}.csv").write_text("file,class_id,name\n" + text)
        table = manifest.read_files(tmp_path / f"{name}.csv", ("class_id",), ("name",))
        assert table["name"].tolist() == [f"Red\nApple {number}" for number in range(len(table))]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_files_of_other_programs_are_read_or_refused_by_name(tmp_path, row, encoding):
    table = 'file,class_id,name\nä.jpg,1,"Ä\n漢"\n'
    tree = '{"1": ["Ä", "漢"]}'
    records = '{"images": [{"class_id": "1", "image_id": "ä.jpg"}]}'
    round_ = '[[round]]\nname = "ä"\n'
    mark = {"utf-16-le": codecs.BOM_UTF16_LE, "utf-16-be": codecs.BOM_UTF16_BE}.get(encoding, b"")
    for text, name, read in (
        (table, "x.csv", lambda path: manifest.read_files(path, ("class_id",), ("name",)).drop(columns="file")),
        (tree, "product_tree.json", lambda path: taxonomy.read(path).to_frame()),
        (records, "train.json", manifest.read_json),
        (round_, "x.toml", lambda path: pd.DataFrame([recipe.read(path).row("").model_dump()]).astype("str")),
    ):
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        expected = read(path)
        path.write_bytes(mark + text.encode(encoding))
        pd.testing.assert_frame_equal(read(path), expected)

        if mark:
            path.write_bytes(text.encode(encoding))
            with pytest.raises(InputError, match=f"{name}: looks like UTF-16 without a byte order mark"):
                read(path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('a.jpg,901,"12 inch pizza\nb.jpg,902,pie\nc.jpg,903,tart\n', "line 2: the quotation mark that opens here is"),
        ('a.jpg,900,"two\nlines"\nb.jpg,901,"12 inch\nc.jpg,903,tart\n', "line 4: the quotation mark that opens here"),
        ('a.jpg,901,"12 inch\nb.jpg,902,"14 inch\n', "line 3: text follows a closing quotation mark; .*12 inch"),
        ('a.jpg,901,"12" pizza\n', "line 2: text follows a closing quotation mark"),
        (
            'a.jpg,901,"12 inch\nb.jpg,902,pie\nc.jpg,903,8"\n',
            "record 0: name '12 inch.*it holds what looks like another",
        ),
        ('a.jpg,"901\nb.jpg,902,pie",tart\n', "record 0: class_id '901.*looks like another row"),
        ("a.jpg,901,pizza\nb.jpg,902\n", "Row #3: Expected 3 columns, got 2"),
        ("a.jpg,901,pizza\nb.jpg,902,pie,9\n", "Row #3: Expected 3 columns, got 4"),
    ],
)
def test_a_table_that_would_lose_rows_or_text_is_refused_with_its_line(tmp_path, text, words):
    path = tmp_path / "new.csv"
    path.write_text("file,class_id,name\n" + text, newline="")
    with pytest.raises(InputError, match=f"^{re.escape(str(path))}: .*{words}"):
        enrolment.listed(str(path))


def test_marks_within_a_text_that_is_not_in_quotes_are_text(tmp_path):
    (tmp_path / "x.csv").write_text('file,name\na.jpg,12" pizza\nb.jpg,8" and "9""\nc.jpg,"say ""x"""\nd.jpg, "y"\n')
    expected = ['12" pizza', '8" and "9""', 'say "x"', ' "y"']
    assert manifest.read_files(tmp_path / "x.csv", (), ("name",))["name"].tolist() == expected


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("train.json", '{"images": [{"class_id": "1", "class_id": "2", "image_id": "a.jpg"}]}'),
        ("train.json", '{"images": [{"class_id": "1", "image_id": "a.jpg"}, {"image_id": "b", "image_id": "c"}]}'),
        ("train.json", '{"images": [{"class_id": "1", "class\\u005fid": "2", "image_id": "a.jpg"}]}'),
        ("train.json", '{"images": [{"class_id": "1", "image_id": "a"}], "images": []}'),
        ("test.json", '{"images": [{"image_id": "a"}, {"class_id": "1", "class_id": "2", "image_id": "a.jpg"}]}'),
        ("product_tree.json", '{"1": ["a"], "1": ["b"]}'),
    ],
)
def test_a_key_twice_in_one_object_is_refused(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=rf"{name}: '\w+' stands more than once in one object"):
        (taxonomy.read if name == "product_tree.json" else manifest.read_json)(tmp_path / name)


def test_the_words_of_keys_may_stand_in_texts(tmp_path):
    (tmp_path / "train.json").write_text(
        '{"images": [{"class_id": "\\"class_id\\"", "image_id": "images", "é": "\\u00e9"}]}'
    )
    assert manifest.read_json(tmp_path / "train.json")["class_id"].tolist() == ['"class_id"']


def test_half_a_character_is_refused_before_anything_is_made_of_it(tmp_path):
    (tmp_path / "product_tree.json").write_text('{"1": ["a", "b\\ud800"]}')
    with pytest.raises(InputError, match=r"product_tree.json: '.*ud800.* holds half a character"):
        taxonomy.read(tmp_path / "product_tree.json")
    (tmp_path / "train.json").write_text('{"images": [{"class_id": "\\ud800x", "image_id": "a.jpg"}]}')
    with pytest.raises(InputError, match=r"train.json: .*"):
        manifest.read_json(tmp_path / "train.json")
    (tmp_path / "product_tree.json").write_text('{"1": ["a", "b\\ud83d\\uded2"]}')  # two halves are one
    assert taxonomy.read(tmp_path / "product_tree.json").names.tolist() == ["a", "b🛒"]


def test_a_photograph_whose_name_no_table_could_hold_is_refused_before_any_work(tmp_path):
    (tmp_path / "photographs" / "001").mkdir(parents=True)
    for name in (b"a.jpg", "漢.jpg".encode(), b"\xff.jpg"):
        Path(os.fsdecode(bytes(tmp_path) + b"/photographs/001/" + name)).touch()
    for read in (enrolment.listed, prediction.image_files):
        with pytest.raises(InputError, match=r"images: '.*udcff.jpg': its name is not UTF-8"):
            read(str(tmp_path / "photographs"))


def test_a_table_counts_as_written_only_if_it_comes_back(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("before")
    with pytest.raises(InputError, match=r"x.csv: it would not come back from a CSV file: straddling"):
        csvfile.write(pd.DataFrame({"name": ["a", "\n" * (2 * csvfile.BLOCK)]}), path)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("x.csv", "before")]


def test_scores_by_class_keep_their_classes(tmp_path):
    texts = nasty_texts(50, 0)
    classes = pd.DataFrame({"class_id": texts, "name": texts, "path": texts, "num_train": 3})
    answers = pd.DataFrame({"label": range(len(texts)), "pred": 0, "confidence": 0.5, "loss": 1.0})
    table = metrics.per_class(answers, classes, None)
    csvfile.write(table, tmp_path / "per_class.csv")
    again = csvfile.read(tmp_path / "per_class.csv", ["class_id", "name", "path"])
    assert again["class_id"].tolist() == texts and textfile.utf8(tmp_path / "per_class.csv").startswith(b'"class_id"')
