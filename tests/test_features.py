"""The store of embeddings: of what cannot be read it remembers what the bytes say, and tries the rest again."""

import os
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from aliprod import assembly, features
from aliprod.features import Store, compute
from aliprod.images import CorruptImages, Images
from aliprod.model import Recogniser


@pytest.fixture
def network(row) -> Recogniser:
    return assembly.model(row, 8, "random").eval()


@pytest.fixture
def files(shop, tmp_path) -> list[str]:
    """Nine photographs."""
    for number, file in enumerate(sorted((shop / "val").rglob("*.jpg"))[:9]):
        shutil.copy(file, tmp_path / f"{number}.jpg")
    return [str(tmp_path / f"{number}.jpg") for number in range(9)]


@pytest.fixture
def embedded(network, tmp_path):
    """Computes the features of files and gives them with their store, read from disk again."""

    def embedded(files: list[str], **options) -> tuple[features.Features, Store]:
        computed = compute(network, Images(files, None, network.preprocessing, **options), tmp_path / "cache")
        return computed, Store(tmp_path / "cache" / computed.store.digest)

    return embedded


def parts(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache").glob("*/[0-9]*"))


def same(computed: features.Features, others: features.Features) -> None:
    vectors = [each.store.take(each.codes[each.rows]) for each in (computed, others)]
    np.testing.assert_allclose(*vectors, atol=1e-5)


def test_a_limit_that_is_raised_makes_a_photograph_readable(files, embedded, tmp_path):
    Image.new("RGB", (300, 300), "green").save(files[4], "PNG")
    first, store = embedded(files, max_pixels=300 * 300 - 1)
    assert list(first.corrupt) == [4] and len(store.keys) == 8
    again, _ = embedded(files, max_pixels=300 * 300 - 1)
    assert again.corrupt == first.corrupt and len(parts(tmp_path)) == 1, "nothing to add"
    repaired, store = embedded(files, max_pixels=300 * 300)
    assert not repaired.corrupt and len(repaired.rows) == 9 and len(store.keys) == 9
    shutil.rmtree(tmp_path / "cache")
    same(repaired, embedded(files)[0])


@pytest.mark.parametrize("broken", ["/proc/self/mem", "pipe", "nowhere", "folder"])
def test_what_only_the_machine_says_is_not_kept(broken, files, embedded, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    strange = str(tmp_path / broken)
    computed, store = embedded([files[0], strange, files[1], strange])
    assert list(computed.corrupt) == [1, 3] and computed.rows.tolist() == [0, 2]
    assert [key.split("\0")[0] for key in store.keys] == files[:2] and not store.reasons[:2].any()
    alone, store = embedded([strange])
    assert list(alone.corrupt) == [0] and len(parts(tmp_path)) == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_permission_that_is_given_back_makes_a_photograph_readable(files, embedded):
    Path(files[2]).chmod(0)
    assert embedded(files)[0].corrupt == {2: "Permission denied"}
    Path(files[2]).chmod(0o600)
    assert not embedded(files)[0].corrupt


def test_what_the_bytes_say_is_kept(files, embedded, monkeypatch):
    Path(files[1]).write_bytes(b"")
    Path(files[2]).write_bytes(Path(files[2]).read_bytes()[:-9])
    Path(files[3]).write_text("a page")
    first, _ = embedded(files)
    assert first.corrupt == {1: "the file is empty", 2: "the JPEG is cut short", 3: "not an image but text"}
    monkeypatch.setattr("aliprod.images.read", None)  # nothing is read again
    assert embedded(files)[0].corrupt == first.corrupt


def test_all_that_an_older_store_could_not_read_is_tried_again(files, embedded, tmp_path):
    Path(files[3]).write_text("a page")
    whole, _ = embedded(files)
    (part,) = parts(tmp_path)
    index = pd.read_parquet(part / "files.parquet").rename(columns={"unreadable": "reason"})
    index.loc[2, "reason"], index.loc[5, "reason"] = "Permission denied", "Input/output error"
    index.to_parquet(part / "files.parquet", index=False)
    again, store = embedded(files)
    assert again.corrupt == {3: "not an image but text"} and len(store.keys) == 9
    same(again, whole)
    assert embedded(files)[0].corrupt == again.corrupt and len(parts(tmp_path)) == 2


def test_what_could_not_be_read_before_an_interruption_is_tried_again_after_it(files, embedded, monkeypatch, tmp_path):
    monkeypatch.setattr(features, "BATCH_SIZE", 2)
    monkeypatch.setattr(features, "SAVE_EVERY", 1)
    pixels = {str(number): Image.open(file).size for number, file in enumerate(files)}
    Image.new("RGB", (300, 300), "green").save(files[1], "PNG")
    Path(files[2]).write_bytes(b"")
    seen = 0

    def embed(self, images, embed=Recogniser.embed):
        nonlocal seen
        seen += 1
        if seen == 4:
            raise KeyboardInterrupt
        return embed(self, images)

    monkeypatch.setattr(Recogniser, "embed", embed)
    most = max(width * height for width, height in pixels.values())
    with pytest.raises(KeyboardInterrupt):
        embedded(files, max_pixels=most)
    resumed, store = embedded(files)
    assert resumed.corrupt == {2: "the file is empty"} and len(store.keys) == 9
    shutil.rmtree(tmp_path / "cache")
    same(resumed, embedded(files)[0])


def test_more_than_the_share_stops_it_whatever_the_reason(files, embedded):
    Path(files[1]).write_bytes(b"")
    with pytest.raises(CorruptImages, match="2 of 10 images cannot be read"):
        embedded([*files, "nowhere.jpg"], max_corrupt_share=0.1)
    assert len(embedded([*files, "nowhere.jpg"], max_corrupt_share=0.2)[0].corrupt) == 2
