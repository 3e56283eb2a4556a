"""Manifests: ids stay what they are, wrong records are named, and every choice of rows equals a slow loop's."""

import hashlib
import json
import re
import resource
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from aliprod import InputError, csvfile, enrolment, manifest, parameters, prediction

GOOD = {"class_id": "00012", "image_id": "a.jpg"}
HEADER = b"split,class_id,image_id\n"


def images(*records: object) -> str:
    return json.dumps({"images": records})


def table_of(class_ids: list[str], split: str = "train") -> pd.DataFrame:
    names = [f"{number}.jpg" for number in range(len(class_ids))]
    return pd.DataFrame({"split": split, "class_id": class_ids, "image_id": names}).astype("str")


def table_with_counts(counts: list[int], seed: int = 0) -> pd.DataFrame:
    class_ids = np.repeat([f"{number:05d}" for number in range(len(counts))], counts)
    return table_of(np.random.default_rng(seed).permutation(class_ids).tolist())


def write_long_tail(path: Path, num_images: int, num_classes: int) -> list[str]:
    """A train.json in which every class has a photograph and the frequent ones thousands; returns the class ids."""
    rng = np.random.default_rng(0)
    weights = 1 / np.sqrt(np.arange(1, num_classes + 1))
    more = rng.choice(num_classes, num_images - num_classes, p=weights / weights.sum())
    class_ids = [f"{code:05d}" for code in rng.permutation(np.append(np.arange(num_classes), more)).tolist()]
    records = (f'{{"class_id":"{class_id}","image_id":"{row}.jpg"}}' for row, class_id in enumerate(class_ids))
    path.write_text(f'{{"images":[{",".join(records)}]}}')
    return class_ids


def kept_by_the_seed(count: int) -> int:
    for cap in (400, 200, 100):
        if count >= cap:
            return cap
    return count


def test_json_becomes_a_table_of_strings_in_the_order_of_the_file(tmp_path):
    path = tmp_path / "val.json"
    ids = [("00012", "x.jpg"), ("12", "x.jpg"), ("0", "été, 漢.jpg"), ("1e5", "NA"), ("null", "00012")]
    path.write_text(images(*({"class_id": c, "image_id": i, "width": 9} for c, i in ids)))
    table = manifest.read_json(path)
    assert table.columns.tolist() == manifest.COLUMNS
    assert table.to_numpy().tolist() == [["val", *pair] for pair in ids]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("nope", "JSON is malformed"),
        ("", "truncated"),
        (images(GOOD)[:-9], "truncated"),
        ("[]", "Expected `object`, got `array`"),
        ("{}", "missing required field `images`"),
        ('{"images": {}}', "Expected `array`, got `object`"),
        (images(), "it lists no photographs"),
        (images(GOOD, "a.jpg"), "Expected `object`, got `str` - at `$.images[1]`"),
        (images(GOOD, {"class_id": 12, "image_id": "b.jpg"}), "Expected `str`, got `int` - at `$.images[1].class_id`"),
        (images(GOOD, {"class_id": None, "image_id": "b"}), "Expected `str`, got `null` - at `$.images[1].class_id`"),
        (images(GOOD, {"class_id": "1"}), "missing required field `image_id` - at `$.images[1]`"),
        (images(GOOD, {"class_id": "1", "image_id": ""}), "record 1 (class_id '1', image_id ''): image_id is missing"),
        (images(GOOD, {"image_id": "b.jpg"}), "record 1 (class_id '', image_id 'b.jpg'): class_id is missing"),
        (images(GOOD, {**GOOD, "image_id": "b"}, GOOD), "record 2 (class_id '00012', image_id 'a.jpg'): this photogr"),
        (b'{"images": [{"class_id": "\xff", "image_id": "x"}]}', "line 1: byte 0xff is not UTF-8; save it as"),
    ],
)
def test_a_wrong_list_is_refused_naming_file_and_record(tmp_path, text, words):
    path = tmp_path / "train.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=f"^{re.escape(str(path))}: .*{re.escape(words)}"):
        manifest.read_json(path)


@pytest.mark.parametrize("column", ["class_id", "image_id"])
@pytest.mark.parametrize("name", ["../x", "a/b", "/etc/passwd", "a\\b", "..", ".", "a\0b"])
def test_names_that_leave_their_folder_are_refused(tmp_path, column, name):
    record = GOOD | {column: name}
    (tmp_path / "train.json").write_text(images(GOOD, record))
    table = pd.DataFrame([{"split": "train", **GOOD}, {"split": "train", **record}])
    csvfile.write(table, tmp_path / "train.csv")
    for read, file in ((manifest.read_json, "train.json"), (manifest.read_csv, "train.csv")):
        with pytest.raises(InputError, match=rf"{file}: record 1 \(.*: {column} must be a plain name") as caught:
            read(tmp_path / file)
        assert repr(name) in str(caught.value)


def test_one_image_id_may_stand_in_several_classes(tmp_path):
    path = tmp_path / "train.json"
    path.write_text(images(GOOD, {**GOOD, "class_id": "13"}))
    assert len(manifest.read_json(path)) == 2


def test_test_json_needs_no_classes(tmp_path):
    (tmp_path / "test.json").write_text(images({"image_id": "a.jpg"}, {"image_id": "b.jpg"}))
    table = manifest.read(tmp_path, "test")
    assert table.to_numpy().tolist() == [["test", "", "a.jpg"], ["test", "", "b.jpg"]]
    csvfile.write(table, tmp_path / "test.csv")
    pd.testing.assert_frame_equal(manifest.read_csv(tmp_path / "test.csv"), table)


@pytest.mark.parametrize(("name", "file"), [("train", "train.json"), ("balanced", "train.json"), ("val", "val.json")])
def test_a_missing_split_is_named(tmp_path, name, file):
    with pytest.raises(InputError, match=f"{re.escape(str(tmp_path / file))} not found"):
        manifest.read(tmp_path, name)


def test_a_round_gets_the_manifest_it_names(tmp_path):
    class_ids = write_long_tail(tmp_path / "train.json", 3000, 10)
    train = manifest.read(tmp_path, "train")
    assert train["class_id"].tolist() == class_ids
    pd.testing.assert_frame_equal(manifest.read(tmp_path, "balanced", seed=3), manifest.balance(train, 3))
    csvfile.write(train, tmp_path / "mine.csv")
    pd.testing.assert_frame_equal(manifest.read("elsewhere", str(tmp_path / "mine.csv")), train)


def test_the_real_manifests_are_read_whole(grocery):
    for split in ("train", "val"):
        records = json.loads((grocery / f"{split}.json").read_text())["images"]
        table = manifest.read(grocery, split)
        assert table.to_dict("records") == [{"split": split, **record} for record in records]
        assert all(Path(path).is_file() for path in manifest.paths(table, grocery))


def test_a_table_survives_csv_unchanged(tmp_path):
    names = ["NA", "null", "nan", "None", "", "true", "1e5", "00012", " a ", 'say "x"', "a,b", "'", "#x", "=1", "é漢🛒"]
    names += ["two\nlines", "two\r\nlines"]
    table = table_of(names).assign(split="test")
    table["image_id"] = table["class_id"].where(table["class_id"] != "", "x")
    csvfile.write(table, tmp_path / "x.csv")
    pd.testing.assert_frame_equal(manifest.read_csv(tmp_path / "x.csv"), table)


def test_a_table_edited_elsewhere_is_read(tmp_path):
    (tmp_path / "x.csv").write_bytes(b"\xef\xbb\xbfimage_id,note,class_id,split\r\nx.jpg,3,007,train\r\n")
    assert manifest.read_csv(tmp_path / "x.csv").to_numpy().tolist() == [["train", "007", "x.jpg"]]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"", "not a CSV table"),
        (b"\n\n", "not a CSV table"),
        (b"a,class_id\n1,2\n", "no column split, image_id; found a, class_id"),
        (b"split,class_id\ntrain,1\n", "no column image_id; found split, class_id"),
        (b"split,class_id,image_id,split\ntrain,1,x,val\n", "column split is there twice"),
        (b"n\xe4me,class_id\n1,2\n", "line 1: byte 0xe4 is not UTF-8"),
        (HEADER, "it lists no photographs"),
        (HEADER + b"train,1\n", "not a CSV table: CSV parse error: Row #2: Expected 3 columns, got 2"),
        (HEADER + b"train,1,\xff\n", "line 2: byte 0xff is not UTF-8; save it as UTF-8"),
        (HEADER + b"train,1,x\ntrain,1,\n", "record 1 (class_id '1', image_id ''): image_id is missing"),
        (HEADER + b"train,1,x\ntrain,,x\n", "record 1 (class_id '', image_id 'x'): class_id is missing"),
        (HEADER + b"train,1,x\n,1,x\n", "record 1 (class_id '1', image_id 'x'): split is missing"),
    ],
)
def test_a_wrong_table_is_refused_naming_the_file(tmp_path, text, words):
    path = tmp_path / "x.csv"
    path.write_bytes(text)
    with pytest.raises(InputError, match=f"^{re.escape(str(path))}: {re.escape(words)}"):
        manifest.read_csv(path)


def test_a_write_that_fails_half_way_leaves_the_old_file_and_nothing_else(tmp_path):
    path, table = tmp_path / "x.csv", table_with_counts([1000])
    csvfile.write(table[:3], path)
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            csvfile.write(table, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("x.csv", before)]


def test_the_digest_is_that_of_the_written_file_and_changes_with_one_cell(tmp_path):
    table = table_with_counts([5, 3]).assign(score=0.1)
    csvfile.write(table, tmp_path / "x.csv")
    digest = manifest.digest(table)
    assert digest == hashlib.sha256((tmp_path / "x.csv").read_bytes()).hexdigest()[:16]
    assert digest == manifest.digest(table.copy())
    for row in range(len(table)):
        for column in table.columns:
            changed = table.copy()
            changed.loc[row, column] = 0.2 if column == "score" else "y"
            assert manifest.digest(changed) != digest


@pytest.mark.parametrize(
    "counts",
    [
        [99, 100, 101, 199, 200, 201, 399, 400, 401, 1],
        [2000],
        np.random.default_rng(1).zipf(1.3, 60).clip(1, 900).tolist(),
        np.random.default_rng(2).zipf(1.1, 60).clip(1, 900).tolist(),
    ],
)
def test_balance_caps_classes_as_the_seed_does_and_keeps_the_order(counts):
    table = table_with_counts(counts)
    balanced = manifest.balance(table, seed=0)
    assert Counter(balanced["class_id"]) == {
        class_id: kept_by_the_seed(count) for class_id, count in Counter(table["class_id"]).items()
    }
    places = table.reset_index().set_index("image_id").loc[balanced["image_id"], "index"].to_numpy()
    assert (np.diff(places) > 0).all()
    pd.testing.assert_frame_equal(balanced, table.loc[places].reset_index(drop=True))


def test_balance_depends_on_the_seed_alone():
    table = table_with_counts([450, 120, 30])
    pd.testing.assert_frame_equal(manifest.balance(table, 7), manifest.balance(table, 7))
    assert not manifest.balance(table, 7).equals(manifest.balance(table, 8))


def test_balance_chooses_uniformly():
    table = table_with_counts([150])
    seeds = 300
    chosen = Counter(name for seed in range(seeds) for name in manifest.balance(table, seed)["image_id"])
    expected, deviation = seeds * 100 / 150, np.sqrt(seeds * (2 / 3) * (1 / 3))
    assert len(chosen) == 150
    assert max(abs(count - expected) for count in chosen.values()) < 4 * deviation


@pytest.mark.parametrize(("least", "most"), [(1, 1), (2, 5), (5, 5), (3, 10**9), (1, 10**9), (6, 900)])
def test_select_includes_both_borders_as_a_slow_loop_does(least, most):
    table = table_with_counts([1, 2, 3, 4, 5, 5, 6, 40, 900])
    counts = Counter(table["class_id"])
    rows = [row for row, class_id in enumerate(table["class_id"]) if least <= counts[class_id] <= most]
    pd.testing.assert_frame_equal(manifest.select(table, least, most), table.iloc[rows].reset_index(drop=True))


def test_select_refuses_a_range_without_classes_and_says_what_there_is():
    with pytest.raises(InputError, match=re.escape("samples_per_class [7, 8]: no class is in this range; the classes")):
        manifest.select(table_with_counts([2, 9]), 7, 8)
    with pytest.raises(InputError, match="have 2 to 9 photographs"):
        manifest.select(table_with_counts([2, 9]), 10, 20)


def test_labels_are_the_places_of_the_classes_in_their_index():
    table = table_of(["b", "10", "9", "b", "00", "10", "b"])
    classes = manifest.class_index(table)
    assert classes.to_numpy().tolist() == [["00", 1], ["10", 2], ["9", 1], ["b", 3]]
    assert manifest.labels(table, classes).tolist() == [3, 1, 2, 3, 0, 1, 3]
    found = manifest.labels(table_of(["9", "unknown", "", "b"]), classes)
    assert (found.tolist(), found.dtype) == ([2, -1, -1, 3], np.int64)


def test_paths_are_split_class_image():
    table = pd.concat([table_of(["0", "1"]), table_of(["1"], "val")])
    expected = [Path("data", split, class_id, image_id) for split, class_id, image_id in table.to_numpy()]
    assert [Path(path) for path in manifest.paths(table, "data")] == expected
    assert [Path(path) for path in manifest.paths(table, Path("data"))] == expected


def test_a_hundred_thousand_records_are_counted_as_a_slow_loop_counts_them(tmp_path):
    class_ids = write_long_tail(tmp_path / "train.json", 100_000, 2_000)
    counts = Counter(class_ids)
    balanced = manifest.read(tmp_path, "balanced")
    capped = {class_id: kept_by_the_seed(count) for class_id, count in counts.items()}
    assert Counter(balanced["class_id"]) == capped
    assert len(manifest.select(balanced, 20, 100)) == sum(count for count in capped.values() if 20 <= count <= 100)
    assert manifest.class_index(balanced)["class_id"].tolist() == sorted(counts)


@pytest.mark.slow
def test_the_size_of_the_competition_takes_less_than_two_gigabytes(tmp_path):
    class_ids = write_long_tail(tmp_path / "train.json", 2_500_000, 50_030)
    script = r"""
import re, sys, time
from pathlib import Path
from aliprod import manifest
start = time.perf_counter()
table = manifest.read(sys.argv[1], "train"); read = time.perf_counter()
balanced = manifest.balance(table, 0); balance = time.perf_counter()
chosen = manifest.select(balanced, 50, 200); select = time.perf_counter()
status = Path("/proc/self/status").read_text()  # getrusage's peak begins with that of whoever started this
peak = int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 2**20
print(f"read {read - start:.2f} s, balance {balance - read:.2f} s, select {select - balance:.2f} s, {peak:.2f} GiB")
print(len(table), len(balanced), len(chosen), peak)
"""
    command = [sys.executable, "-c", script, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    timing, numbers = done.stdout.splitlines()
    print(timing)
    capped = [kept_by_the_seed(count) for count in Counter(class_ids).values()]
    *sizes, peak = map(float, numbers.split())
    assert sizes == [2_500_000, sum(capped), sum(count for count in capped if 50 <= count <= 200)]
    assert peak < 2e9 / 2**30


def uneven() -> pd.DataFrame:
    """Classes "0" to "9" with 1 to 10 photographs."""
    ids = [str(number) for number in range(10) for _ in range(number + 1)]
    return pd.DataFrame({"split": "train", "class_id": ids, "image_id": [f"{row}.jpg" for row in range(len(ids))]})


@pytest.mark.parametrize(("low", "high", "expected"), [(0.0, 1.0, "0123456789"), (0.5, 1.0, "56789"), (0.0, 0.0, "0")])
def test_a_quantile_chooses_classes_by_their_photographs(low, high, expected):
    assert "".join(manifest.select_quantile(uneven(), low, high)["class_id"].unique()) == expected


def test_a_select_list_chooses_classes_by_their_confidence(tmp_path):
    listed = pd.DataFrame({"class_id": ["3", "7", "9", "absent"], "confidence": [0.9, 0.5, 0.8, 1.0]})
    csvfile.write(listed, tmp_path / "list.csv")
    chosen = manifest.select_listed(uneven(), tmp_path / "list.csv", 0.8)
    assert chosen["class_id"].value_counts().to_dict() == {"9": 10, "3": 4}
    with pytest.raises(InputError, match=r"list.csv: no class of this data has a confidence of 1 or more"):
        manifest.select_listed(uneven(), tmp_path / "list.csv", 1.0)
    csvfile.write(listed[["class_id"]], tmp_path / "list.csv")
    with pytest.raises(InputError, match=r"list.csv: no column confidence; found class_id"):
        manifest.select_listed(uneven(), tmp_path / "list.csv", 0.5)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"", "not a CSV table: Empty CSV file"),
        (
            b"class_id,confidence\n1,0.5\n2,0.5,3\n",
            "not a CSV table: CSV parse error: Row #3: Expected 2 columns",
        ),
        (b"class_id,confidence\nL\xe4mna,0.5\n", "line 2: byte 0xe4 is not UTF-8"),
        (b"class_id,confidence\n1,0.5\n2,high\n", "record 1 (class_id '2', confidence 'high'): confidence must be"),
        (b"class_id,confidence\n1,\n", "record 0 (class_id '1', confidence ''): confidence must be a number"),
    ],
)
def test_a_select_list_that_is_none_is_refused(tmp_path, text, words):
    path = tmp_path / "list.csv"
    path.write_bytes(text)
    with pytest.raises(InputError, match=f"^{re.escape(f'{path}: {words}')}"):
        manifest.select_listed(uneven(), path, 0.5)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"", "not a CSV table: Empty CSV file"),
        (b"file,class_id\na.jpg\n", "not a CSV table: CSV parse error: Row #2: Expected 2 columns, got 1: a.jpg"),
        (b"file,class_id\nl\xf6k.jpg,1\n", "line 2: byte 0xf6 is not UTF-8"),
        (b"photo,class_id\na.jpg,1\n", "no column file; found photo, class_id"),
        (b"file,class_id\n", "it lists no photographs"),
        (b"file,class_id\na.jpg,1\n,2\n", r"record 1 \(file ''.*\): file is missing"),
    ],
)
def test_a_list_of_files_that_is_none_is_refused_by_all_that_take_one(tmp_path, text, words):
    path = tmp_path / "files.csv"
    path.write_bytes(text)
    for read in (enrolment.listed, prediction.image_files):
        with pytest.raises(InputError, match=f"^{re.escape(str(path))}: {words}"):
            read(str(path))


def test_files_are_relative_to_their_list_and_other_columns_do_no_harm(tmp_path):
    (tmp_path / "files.csv").write_bytes(b"name,,file,\nNA,1,a.jpg,\xff\n,2,b/c.jpg,\n")
    listed = manifest.read_files(tmp_path / "files.csv", perhaps=("name", "path"))
    assert listed.to_numpy().tolist() == [[f"{tmp_path}/a.jpg", "NA", ""], [f"{tmp_path}/b/c.jpg", "", ""]]
    assert prediction.image_files(str(tmp_path / "files.csv")) == listed["file"].tolist()


def test_any_number_of_files_may_be_named_and_an_open_quote_is_refused(tmp_path):
    files = [str(tmp_path / f"{number:0100}.jpg") for number in range(60)]  # 60 of them are too long to be one name
    for file in files:
        Path(file).touch()
    assert prediction.image_files(" ".join(files)) == files
    (tmp_path / "Lay's.jpg").touch()
    assert prediction.image_files(f"{tmp_path}/Lay's.jpg") == [f"{tmp_path}/Lay's.jpg"]
    with pytest.raises(InputError, match=r"images \".+Lay's.jpg\": No closing quotation; what holds spaces"):
        prediction.image_files(f"{files[0]} {tmp_path}/Lay's.jpg")
    with pytest.raises(InputError, match="classes .*: No closing quotation"):
        parameters.words("classes", "Lay's")
    with pytest.raises(InputError, match="no such file or folder: x{300}"):
        prediction.image_files(f"{files[0]} {'x' * 300}")
    with pytest.raises(InputError, match="give a folder with a subfolder a class, a .csv, or class_id too"):
        enrolment.listed(" ".join(files))
