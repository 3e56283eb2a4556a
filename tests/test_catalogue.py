"""The demo catalogue: reproducible to the byte, right about itself, and never half written."""

import json
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest

from aliprod import catalogue, packages

SMALL = {
    "departments": 2,
    "categories": 2,
    "brands": 1,
    "products": 2,
    "images": 8,
    "imbalance": 2.0,
    "val_images": 2,
    "noise": 0.2,
    "size": 96,
}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, pd.DataFrame]:
    folder = tmp_path_factory.mktemp("shop") / "new" / "catalogue"
    return folder, catalogue.render(folder, **SMALL, workers=1)


@pytest.fixture
def truth(rendered: tuple[Path, pd.DataFrame]) -> pd.DataFrame:
    return rendered[1]


def test_workers_change_no_byte_and_the_seed_changes_every_picture(rendered, tmp_path):
    catalogue.render(tmp_path / "again", **SMALL, workers=2)
    catalogue.render(tmp_path / "other", **SMALL, workers=2, seed=1)
    first = contents(rendered[0])
    assert contents(tmp_path / "again") == first
    pictures = {data for name, data in first.items() if name.endswith(".jpg")}
    assert not pictures & set(contents(tmp_path / "other").values())


def test_lists_truth_and_files_agree(rendered):
    folder, truth = rendered
    listed = []
    for split in ("train", "val"):
        images = json.loads((folder / f"{split}.json").read_text())["images"]
        assert all(image.keys() == {"class_id", "image_id"} for image in images)
        listed += [(split, image["class_id"], image["image_id"]) for image in images]
    assert listed == list(truth[["split", "class_id", "image_id"]].itertuples(index=False, name=None))
    assert not truth.duplicated(["split", "image_id"]).any()
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*.jpg")} == {
        "/".join(image) for image in listed
    }


def test_pictures_decode_within_the_promised_sizes(rendered):
    folder, _ = rendered
    shapes = [cv2.imread(str(path)).shape for path in folder.rglob("*.jpg")]
    assert all(0.6 * 96 <= max(shape) <= 1.2 * 96 for shape in shapes)
    assert {np.sign(height - width) for height, width, _ in shapes} == {-1, 0, 1}


def test_every_file_shows_its_true_class(tmp_path, monkeypatch):
    def plain(plan, label, rng):
        return np.full((16, 16, 3), 30 * label, np.uint8)

    monkeypatch.setattr(catalogue, "photograph", plain)
    truth = catalogue.render(tmp_path / "plain", **SMALL, workers=1)
    for row in truth.itertuples():
        picture = cv2.imread(str(tmp_path / "plain" / row.split / row.class_id / row.image_id))
        assert round(picture.mean() / 30) == int(row.true_class_id)


def test_noise_is_the_share_of_wrong_train_labels(truth):
    wrong = truth["class_id"] != truth["true_class_id"]
    train = truth["split"] == "train"
    assert wrong[train].sum() == round(SMALL["noise"] * train.sum())
    assert not wrong[~train].any()
    siblings = truth["class_id"].astype(int) // 2 == truth["true_class_id"].astype(int) // 2
    assert siblings[wrong].mean() > 0.5


def test_train_is_long_tailed_and_val_is_flat(truth):
    counts = truth.groupby(["split", "class_id"]).size()
    tail = counts["train"].sort_values(ascending=False).to_numpy()
    assert tail.tolist() == [round(8 * 2 ** (-rank / 7)) for rank in range(8)]
    assert not counts["train"].is_monotonic_decreasing, "the seed shuffles the classes"
    assert (counts["val"] == SMALL["val_images"]).all()


def test_the_rarest_class_keeps_two_photographs(tmp_path):
    truth = catalogue.render(tmp_path / "steep", **SMALL | {"imbalance": 1000, "size": 48})
    counts = Counter(truth.loc[truth["split"] == "train", "class_id"])
    assert (max(counts.values()), min(counts.values())) == (8, 2)


def test_the_tree_holds_every_class_four_levels_down(rendered):
    folder, truth = rendered
    level = json.loads((folder / "product_tree.json").read_text())
    for width in (2, 4, 4):
        assert len({node["name"] for node in level}) == len(level) == width
        level = [child for node in level for child in node["children"]]
    assert [leaf["class_id"] for leaf in level] == sorted(truth["class_id"].unique())
    assert len({leaf["name"] for leaf in level}) == 8


def test_no_two_products_look_the_same():
    plan = catalogue.Plan(5, 4, 2, 3, 2, 1.0, 1, 0.0, 48, 0)
    prints = {packages._package(plan, label)[2].tobytes() for label in range(plan.num_classes)}
    assert len(prints) == plan.num_classes


def test_a_second_call_returns_the_same_without_rendering(rendered, monkeypatch):
    folder, truth = rendered
    monkeypatch.delattr(catalogue, "photograph")
    pd.testing.assert_frame_equal(catalogue.render(folder, **SMALL | {"imbalance": 2}), truth)


@pytest.mark.parametrize("change", [{"seed": 1}, {"noise": 0.1}, {"size": 97}])
def test_a_folder_of_another_catalogue_is_refused(rendered, change):
    folder, _ = rendered
    with pytest.raises(ValueError, match=str(folder)):
        catalogue.render(folder, **SMALL | change)


def test_a_folder_of_other_things_is_refused_and_kept(tmp_path):
    (tmp_path / "holiday.txt").write_text("mine")
    with pytest.raises(ValueError, match=str(tmp_path)):
        catalogue.render(tmp_path, **SMALL)
    assert contents(tmp_path) == {"holiday.txt": b"mine"}


def test_an_empty_folder_is_filled(tmp_path):
    assert len(catalogue.render(tmp_path, **SMALL | {"val_images": 1, "images": 2, "size": 48})) == 24


@pytest.mark.parametrize("workers", [1, 2])
def test_an_interrupted_rendering_leaves_nothing(tmp_path, monkeypatch, workers):
    before, photograph = cv2.getNumThreads(), catalogue.photograph

    def jam(plan, label, rng):
        if label == 3:
            raise RuntimeError("the film is jammed")
        return photograph(plan, label, rng)

    monkeypatch.setattr(catalogue, "photograph", jam)
    with pytest.raises(RuntimeError, match="jammed"):
        catalogue.render(tmp_path / "catalogue", **SMALL, workers=workers)
    assert list(tmp_path.iterdir()) == []
    assert cv2.getNumThreads() == before


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("departments", 0),
        ("categories", 5),
        ("brands", 1.5),
        ("products", -1),
        ("images", 1),
        ("imbalance", 0.5),
        ("imbalance", float("nan")),
        ("val_images", 0),
        ("noise", 0.95),
        ("noise", -0.1),
        ("size", 16),
        ("seed", -1),
        ("workers", 0),
    ],
)
def test_impossible_values_are_refused_by_name(tmp_path, name, value):
    with pytest.raises(ValueError, match=f"^{name} is {value}, allowed"):
        catalogue.render(tmp_path / "catalogue", **SMALL | {name: value})
    assert list(tmp_path.iterdir()) == []


def test_wrong_labels_need_a_second_class(tmp_path):
    alone = {"departments": 1, "categories": 1, "brands": 1, "products": 1}
    with pytest.raises(ValueError, match="noise"):
        catalogue.render(tmp_path / "catalogue", **SMALL | alone)
