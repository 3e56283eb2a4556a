"""The product tree: departments down to products, as flat arrays.

Parents stand before their children, so one pass over the arrays in order visits the tree from its roots.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from aliprod import InputError, csvfile, textfile

_FORMATS = (
    'nested nodes [{"name": ..., "children": [...]} or {"name": ..., "class_id": ...}], '
    'edges [{"parent": ..., "child": ...}] or [[parent, child]], '
    'or a path a class {"class_id": [names from the root]}'
)


@dataclass(frozen=True)
class Taxonomy:
    """A forest of M nodes: names (M,), parents (M,) int32 with -1 at roots, class_ids (M,) with "" inside."""

    names: np.ndarray
    parents: np.ndarray
    class_ids: np.ndarray

    def __len__(self) -> int:
        return len(self.names)

    def depths(self) -> np.ndarray:
        """Level of every node (M,) int32; roots are at 1."""
        depths = np.ones(len(self), dtype=np.int32)
        above = self.parents
        while (above >= 0).any():  # once a level, not once a node
            depths += above >= 0
            above = np.where(above >= 0, self.parents[above], -1)
        return depths

    def to_frame(self) -> pd.DataFrame:
        """The tree as a table: node, parent (-1: none), depth (1: root), name, class_id ("": inner node)."""
        return pd.DataFrame(
            {
                "node": np.arange(len(self), dtype=np.int32),
                "parent": self.parents,
                "depth": self.depths(),
                "name": pd.array(self.names, dtype="str"),
                "class_id": pd.array(self.class_ids, dtype="str"),
            }
        )

    def levels(self, class_ids: pd.Series) -> "Levels":
        """Where classes stand, level by level; classes that the tree lacks stand by themselves."""
        leaves = np.flatnonzero(self.class_ids != "")
        found = pd.Index(self.class_ids[leaves]).get_indexer(class_ids)
        labels = np.arange(len(found))
        itself = len(self) + labels  # stands in at levels that a class's path does not reach
        node = np.where(found >= 0, leaves[found] if len(leaves) else -1, -1)
        depths, paths = self.depths(), self._paths()
        ancestors = np.tile(itself, (max(2, int(depths.max())), 1))
        for level in range(len(ancestors), 0, -1):
            inside = (node >= 0) & (depths[node] == level)
            if level < len(ancestors):
                ancestors[level - 1] = np.where(inside & (self.class_ids[node] == ""), node, itself)
            node = np.where(inside, self.parents[node], node)
        known = np.where(found >= 0, paths[leaves[found]] if len(leaves) else "", class_ids.to_numpy())
        everything = np.concatenate([paths, known])
        codes, names = [], []
        for row in ancestors:
            code, nodes = pd.factorize(row)
            codes.append(code)
            names.append(everything[nodes])
        return Levels(np.array(codes, dtype=np.int64), names)

    def _paths(self) -> np.ndarray:
        paths, depths = self.names.astype(object), self.depths()
        for level in range(2, depths.max() + 1):
            nodes = np.flatnonzero(depths == level)
            paths[nodes] = paths[self.parents[nodes]] + " > " + paths[nodes]
        return paths

    def grown(self, classes: pd.DataFrame) -> "Taxonomy":
        """The tree with more classes (class_id, path) at the ends of their paths "Fruit > Apple > Gala", inner nodes
        made where missing; a class without a path, or that has its place already, is left out."""
        placed = classes[(classes["path"] != "") & ~classes["class_id"].isin(self.class_ids)]
        items = list(zip(placed["class_id"], placed["path"].str.split(" > "), strict=True))
        rows = list(zip(self.names.tolist(), self.parents.tolist(), self.class_ids.tolist(), strict=True))
        return Taxonomy(*_arrays(_from_paths(items, rows)))

    def describe(self, class_ids: pd.Series) -> pd.DataFrame:
        """name and path ("Fruit > Apple > Gala") of classes, in their order; "" where the tree lacks one."""
        paths = self._paths()
        leaves = np.flatnonzero(self.class_ids != "")
        known = pd.DataFrame({"name": self.names[leaves], "path": paths[leaves]}, index=self.class_ids[leaves])
        return known.reindex(class_ids).fillna("").astype("str").reset_index(drop=True)


@dataclass(frozen=True)
class Levels:
    """The classes of a model in the tree: `ancestors` (L, C) int64, level by level from the root, the last the classes.

    A level's nodes are numbered from 0; `names` has their paths, an array a level. A class whose own path ends above a
    level, or that the tree lacks, stands in for itself there.
    """

    ancestors: np.ndarray
    names: list[np.ndarray]

    @property
    def sizes(self) -> list[int]:
        """Nodes of each level (L,); the last is the number of classes."""
        return [len(names) for names in self.names]

    @property
    def parents(self) -> list[np.ndarray]:
        """For each level but the first, which node of the level above each of its nodes is under: (n,) int64."""
        above = []
        for upper, lower, size in zip(self.ancestors, self.ancestors[1:], self.sizes[1:], strict=False):
            parent = np.empty(size, dtype=np.int64)
            parent[lower] = upper
            above.append(parent)
        return above

    def distances(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """Levels (N,) from two classes (N,), (N,) up to their nearest common ancestor, from 0, the same, to L."""
        return (self.ancestors[:, first] != self.ancestors[:, second]).sum(axis=0)


def read(path: str | Path) -> Taxonomy:
    """Reads product_tree.json in any of three schemata, told apart by what stands in it.

    Nested nodes, a list of edges (a node that is no parent is a class, its name the class id), or a path a
    class. InputError says what was found: another schema, a class placed twice, a node with two parents, a cycle.
    """
    path = Path(path)
    try:
        tree = textfile.read_json(path)
    except RecursionError:
        raise InputError(f"{path}: nested too deeply to be read; edges and paths may have any depth") from None
    try:
        nodes = _rows(tree)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    leaves = pd.Series([class_id for _, _, class_id in nodes if class_id])
    if (twice := leaves[leaves.duplicated()]).size:
        raise InputError(f"{path}: class_id {twice.iloc[0]!r} stands at more than one place in the tree")
    return Taxonomy(*_arrays(nodes))


def read_csv(path: str | Path) -> Taxonomy:
    """Reads the table that `Taxonomy.to_frame` gives."""
    table = csvfile.read(path, ["name", "parent", "class_id"])
    return Taxonomy(table["name"].to_numpy(), table["parent"].astype("int32").to_numpy(), table["class_id"].to_numpy())


Row = tuple[str, int, str]  # name, parent's row, class_id


def _arrays(rows: list[Row]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    names, parents, class_ids = zip(*rows, strict=True)
    return np.array(names, dtype=object), np.array(parents, dtype=np.int32), np.array(class_ids, dtype=object)


def _rows(tree: Any) -> list[Row]:
    if isinstance(tree, dict) and "name" in tree and "children" in tree:
        tree = [tree]
    items = list(tree.items()) if isinstance(tree, dict) else tree
    if not isinstance(items, list) or not items:
        raise InputError(f"found {_shape(tree)}; a product tree is {_FORMATS}")
    if isinstance(tree, dict):
        if all(_is_path(path) for path in tree.values()):
            return _from_paths(items)
    elif all(isinstance(item, dict) and "name" in item for item in items):
        return _from_nested(items)
    elif all(isinstance(item, dict) and {"class_id", "path"} <= item.keys() for item in items):
        if all(isinstance(item["class_id"], str) and _is_path(item["path"]) for item in items):
            return _from_paths([(item["class_id"], item["path"]) for item in items])
    elif all(isinstance(item, dict) and {"parent", "child"} <= item.keys() for item in items):
        return _from_edges([(item["parent"], item["child"]) for item in items])
    elif all(isinstance(item, list) and len(item) == 2 for item in items):
        return _from_edges(items)
    raise InputError(f"found {_shape(tree)}; a product tree is {_FORMATS}")


def _is_path(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(name, str) for name in value)


def _from_nested(roots: list[dict]) -> list[Row]:
    rows: list[Row] = []
    waiting = [(node, -1) for node in reversed(roots)]
    while waiting:
        node, parent = waiting.pop()
        children, class_id = node.get("children") or [], node.get("class_id", "")
        if not isinstance(node.get("name"), str) or not isinstance(class_id, str) or not isinstance(children, list):
            raise InputError(f"node {str(node)[:80]}: name and class_id must be strings, children a list")
        if bool(children) == bool(class_id):
            raise InputError(f"node {node['name']!r}: it needs either children or a class_id")
        rows.append((node["name"], parent, class_id))
        if not all(isinstance(child, dict) for child in children):
            raise InputError(f"node {node['name']!r}: each of its children must be a node with a name")
        waiting += [(child, len(rows) - 1) for child in reversed(children)]
    return rows


def _from_paths(items: list[tuple[str, list[str]]], rows: list[Row] | None = None) -> list[Row]:
    rows = rows or []
    inner = {(parent, name): row for row, (name, parent, class_id) in enumerate(rows) if not class_id}
    for class_id, path in items:
        if not class_id:
            raise InputError(f"path {path}: its class_id is empty")
        parent = -1
        for name in path[:-1]:
            if (parent, name) not in inner:
                inner[parent, name] = len(rows)
                rows.append((name, parent, ""))
            parent = inner[parent, name]
        rows.append((path[-1], parent, class_id))
    return rows


def _from_edges(edges: list[tuple[str, str]]) -> list[Row]:
    children: dict[str, dict[str, None]] = {}  # in their order, each once however often its edge is listed
    parents: dict[str, str] = {}
    for parent, child in edges:
        if not isinstance(parent, str) or not isinstance(child, str):
            raise InputError(f"edge {[parent, child]}: both ends must be strings")
        if parents.setdefault(child, parent) != parent:
            raise InputError(f"node {child!r} has two parents, {parents[child]!r} and {parent!r}")
        children.setdefault(parent, {})[child] = None
    rows: list[Row] = []
    waiting = [(root, -1) for root in reversed([node for node in children if node not in parents])]
    while waiting:
        node, above = waiting.pop()
        rows.append((node, above, "" if node in children else node))
        waiting += [(child, len(rows) - 1) for child in reversed(children.get(node, {}))]
    reached = {name for name, _, _ in rows}
    if lost := next((node for node in parents if node not in reached), None):
        raise InputError(f"node {lost!r} lies on a cycle")
    return rows


def _shape(tree: Any) -> str:
    if isinstance(tree, list) and tree:
        return f"a list whose first item is {_shape(tree[0])}"
    if isinstance(tree, dict) and tree:
        key, value = next(iter(tree.items()))
        return f"an object with the keys {', '.join(map(str, list(tree)[:5]))} ({key!r} holds a {type(value).__name__})"
    return f"{tree!r}"[:80]
