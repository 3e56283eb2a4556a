"""The product tree: three ways to write it are one tree, and what is no tree is refused with the reason."""

import itertools
import json
import re
import time

import numpy as np
import pandas as pd
import pytest

from aliprod import InputError, taxonomy
from aliprod.taxonomy import Taxonomy

# A class's name is its id here, since edges know no other. Depth is 2 to 4.
PATHS = {
    "00012": ["Food", "Fruit", "Apple", "00012"],
    "12": ["Food", "Fruit", "Apple", "12"],
    "NA": ["Food", "Fruit", "NA"],
    "x-1": ["Food", "x-1"],
    "été": ["Toys", "Bälle, groß", "été"],
}
NESTED = [
    {
        "name": "Food",
        "children": [
            {
                "name": "Fruit",
                "children": [
                    {
                        "name": "Apple",
                        "children": [{"name": "00012", "class_id": "00012"}, {"name": "12", "class_id": "12"}],
                    },
                    {"name": "NA", "class_id": "NA"},
                ],
            },
            {"name": "x-1", "class_id": "x-1"},
        ],
    },
    {"name": "Toys", "children": [{"name": "Bälle, groß", "children": [{"name": "été", "class_id": "été"}]}]},
]
EDGES = [
    ["Food", "Fruit"],
    ["Toys", "Bälle, groß"],
    ["Fruit", "Apple"],
    ["Fruit", "NA"],
    ["Apple", "00012"],
    ["Apple", "12"],
    ["Food", "x-1"],
    ["Bälle, groß", "été"],
]
SCHEMATA = {
    "nested": NESTED,
    "edges": EDGES,
    "edges as objects": [{"parent": parent, "child": child, "weight": 1} for parent, child in EDGES],
    "paths": PATHS,
    "paths as objects": [{"class_id": class_id, "path": path} for class_id, path in PATHS.items()],
}


@pytest.fixture
def read(tmp_path):
    """Writes a tree as JSON, or a text as it is, and reads it."""

    def read(tree: object) -> Taxonomy:
        path = tmp_path / "product_tree.json"
        path.write_text(tree if isinstance(tree, str) else json.dumps(tree), encoding="utf-8")
        return taxonomy.read(path)

    return read


def walk(tree: Taxonomy, node: int) -> list[int]:
    """The nodes from the root down to `node`, one step at a time."""
    return ([] if tree.parents[node] < 0 else walk(tree, tree.parents[node])) + [node]


def random_paths(seed: int, num_classes: int = 200) -> dict[str, list[str]]:
    """Classes at depths 1 to 6 of a tree whose inner nodes are named after their place."""
    rng = np.random.default_rng(seed)
    paths = {}
    for label in range(num_classes):
        places = [str(place) for place in rng.integers(0, 3, rng.integers(0, 6))]
        paths[f"{label:05d}"] = ["/".join(places[:end]) for end in range(1, len(places) + 1)] + [f"product {label}"]
    return paths


@pytest.mark.parametrize("schema", SCHEMATA)
def test_every_schema_gives_the_same_tree(read, schema):
    tree = read(SCHEMATA[schema])
    names = ["Food", "Fruit", "Apple", "00012", "12", "NA", "x-1", "Toys", "Bälle, groß", "été"]
    assert tree.names.tolist() == names
    assert tree.parents.tolist() == [-1, 0, 1, 2, 2, 1, 0, -1, 7, 8]
    assert tree.class_ids.tolist() == ["", "", "", "00012", "12", "NA", "x-1", "", "", "été"]
    assert tree.depths().tolist() == [1, 2, 3, 4, 4, 3, 2, 1, 2, 3]


def test_a_single_root_needs_no_list(read):
    alone, listed = read(NESTED[0]), read(NESTED[:1])
    pd.testing.assert_frame_equal(alone.to_frame(), listed.to_frame())


def test_an_edge_listed_again_changes_nothing(read):
    pd.testing.assert_frame_equal(read(EDGES + EDGES[:3]).to_frame(), read(EDGES).to_frame())


@pytest.mark.parametrize("seed", range(3))
def test_depths_and_paths_equal_a_slow_walk(read, seed):
    paths = random_paths(seed)
    tree = read(paths)
    assert (tree.parents < np.arange(len(tree))).all(), "parents stand before their children"
    assert tree.depths().tolist() == [len(walk(tree, node)) for node in range(len(tree))]
    walked = {tree.class_ids[node]: [str(tree.names[up]) for up in walk(tree, node)] for node in range(len(tree))}
    assert {class_id: path for class_id, path in walked.items() if class_id} == paths


@pytest.mark.parametrize("seed", range(3))
def test_describe_gives_name_and_path_in_the_order_asked(read, seed):
    paths = random_paths(seed)
    asked = np.random.default_rng(seed).permutation([*paths, "unknown", "", "0"]).tolist()
    described = read(paths).describe(pd.Series(asked, dtype="str"))
    assert described["name"].tolist() == [paths.get(class_id, [""])[-1] for class_id in asked]
    assert described["path"].tolist() == [" > ".join(paths.get(class_id, [""])) for class_id in asked]


@pytest.mark.parametrize("paths", [PATHS, random_paths(4), {"null": ["NaN", ""]}], ids=["small", "random", "odd names"])
def test_a_tree_survives_its_table(read, tmp_path, paths):
    tree = read(paths)
    frame = tree.to_frame()
    assert frame.columns.tolist() == ["node", "parent", "depth", "name", "class_id"]
    frame.to_csv(tmp_path / "tree.csv", index=False)
    again = taxonomy.read_csv(tmp_path / "tree.csv")
    pd.testing.assert_frame_equal(again.to_frame(), frame)
    pd.testing.assert_frame_equal(again.describe(pd.Series([*paths])), tree.describe(pd.Series([*paths])))


def test_the_real_tree_is_read_whole(grocery):
    tree = taxonomy.read(grocery / "product_tree.json")
    depths = tree.depths()
    assert [(depths == level).sum() for level in (1, 2, 3)] == [3, 43, 81]
    assert (tree.class_ids[depths == 3] != "").all()
    images = json.loads((grocery / "train.json").read_text())["images"]
    assert {image["class_id"] for image in images} == set(tree.class_ids) - {""}


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ("nope", "not JSON: Expecting value: line 1 column 1"),
        ("[" * 100_000, "nested too deeply to be read; edges and paths may have any depth"),
        ([], "found []; a product tree is nested nodes"),
        ({}, "found {}; a product tree is nested nodes"),
        (3, "found 3; a product tree is nested nodes"),
        ('"fruit"', "found 'fruit'; a product tree is nested nodes"),
        ([1, 2], "found a list whose first item is 1; a product tree is nested nodes"),
        ([["a", "b", "c"]], "found a list whose first item is a list whose first item is 'a'"),
        ([{"id": 1, "up": 0}], "found a list whose first item is an object with the keys id, up ('id' holds a int)"),
        ({"a": {"b": {}}}, "found an object with the keys a ('a' holds a dict)"),
        ({"1": ["A", 2]}, "found an object with the keys 1 ('1' holds a list)"),
        ([{"class_id": 1, "path": ["A"]}], "found a list whose first item is an object with the keys class_id, path"),
        ([{"name": "A", "class_id": "1"}, ["A", "2"]], "found a list whose first item is an object"),
        ([{"name": "A"}], "node 'A': it needs either children or a class_id"),
        ({"name": "A", "children": []}, "node 'A': it needs either children or a class_id"),
        ([{"name": "A", "class_id": "1", "children": NESTED}], "node 'A': it needs either children or a class_id"),
        ([{"name": "A", "children": ["B"]}], "node 'A': each of its children must be a node with a name"),
        ([{"name": "A", "children": [{"nme": "B"}]}], "node {'nme': 'B'}: name and class_id must be strings"),
        ([{"name": "A", "class_id": 1}], "node {'name': 'A', 'class_id': 1}: name and class_id must be strings"),
        ([{"name": "A", "children": {"B": 1}}], "node {'name': 'A', 'children': {'B': 1}}: name and class_id must be"),
        ({"": ["A"]}, "path ['A']: its class_id is empty"),
        ([["A", 1]], "edge ['A', 1]: both ends must be strings"),
        ([{"parent": None, "child": "A"}], "edge [None, 'A']: both ends must be strings"),
        ([["A", "C"], ["B", "C"]], "node 'C' has two parents, 'A' and 'B'"),
        ([["A", "B"], ["B", "A"]], "node 'B' lies on a cycle"),
        ([["A", "A"]], "node 'A' lies on a cycle"),
        ([["R", "1"], ["A", "B"], ["B", "C"], ["C", "A"]], "node 'B' lies on a cycle"),
        (NESTED + NESTED[1:], "class_id 'été' stands at more than one place in the tree"),
        ([{"class_id": "1", "path": ["A"]}, {"class_id": "1", "path": ["B"]}], "class_id '1' stands at more than one"),
        ('{"1": ["A"], "1": ["B"]}', "'1' stands more than once in one object"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_is_no_tree_is_refused_with_what_was_found(read, tree, words):
    with pytest.raises(InputError, match=f"^.*{re.escape('product_tree.json: ' + words)}") as caught:
        read(tree)
    assert "\n" not in str(caught.value)


def test_bytes_that_are_no_text_are_refused(tmp_path):
    path = tmp_path / "product_tree.json"
    path.write_bytes(b"\xff\xfe[]")
    with pytest.raises(InputError, match=f"^{re.escape(str(path))}: not JSON"):
        taxonomy.read(path)


CHAIN = [f"level {level}" for level in range(5000)]
DEEP_PATHS = {str(label): [*CHAIN[: 4999 - label], f"leaf {label}"] for label in range(40)}
WIDE_PATHS = {str(label): [str(label // 3000), f"{label // 60}", "brand", "leaf"] for label in range(60_000)}


@pytest.mark.parametrize(
    ("tree", "num_nodes", "depth", "class_id", "path"),
    [
        (list(itertools.pairwise(CHAIN)), 5000, 5000, CHAIN[-1], CHAIN),
        (DEEP_PATHS, 4999 + 40, 5000, "39", DEEP_PATHS["39"]),
        (WIDE_PATHS, 20 + 1000 + 1000 + 60_000, 4, "59999", WIDE_PATHS["59999"]),
    ],
    ids=["5,000 levels of edges", "5,000 levels of paths", "60,000 classes"],
)
def test_deep_and_wide_trees_neither_recurse_nor_crawl(read, tmp_path, tree, num_nodes, depth, class_id, path):
    start = time.process_time()
    found = read(tree)
    assert (len(found), found.depths().max()) == (num_nodes, depth)
    assert found.describe(pd.Series([class_id]))["path"].item() == " > ".join(path)
    found.to_frame().to_csv(tmp_path / "tree.csv", index=False)
    pd.testing.assert_frame_equal(taxonomy.read_csv(tmp_path / "tree.csv").to_frame(), found.to_frame())
    assert time.process_time() - start < 10
