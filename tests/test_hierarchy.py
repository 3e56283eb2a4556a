"""Heads, losses, decisions and scores that use the product tree, against slow versions that walk its paths."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn.functional import cross_entropy

from aliprod import (
    InputError,
    assembly,
    features,
    heads,
    manifest,
    metrics,
    model,
    prediction,
    recipe,
    report,
    taxonomy,
    training,
)
from aliprod.hierarchy import Tree
from aliprod.losses import Criterion

PATHS = {
    "a": ["Fruit", "Apple", "Gala"],
    "b": ["Fruit", "Apple", "Fuji"],
    "c": ["Fruit", "Mango"],
    "d": ["Milk", "Whole", "Arla"],
    "e": ["Milk", "Whole", "Garant"],
    "f": ["Milk", "Oat", "Oatly"],
    "g": ["Bag"],
}
CLASSES = pd.Series([*PATHS, "nowhere"])
LABELS = torch.tensor([0, 2, 3, 7, 5, 5])


@pytest.fixture
def levels(tmp_path) -> taxonomy.Levels:
    """Eight classes in a tree of uneven depth, the last of them absent from it."""
    path = tmp_path / "product_tree.json"
    path.write_text(json.dumps(PATHS))
    return taxonomy.read(path).levels(CLASSES)


def slow_node(label: int, level: int) -> tuple:
    """The ancestor of a class at a level, as the path down to it; the class itself where its path ends above."""
    path = PATHS.get(CLASSES[label], [])
    return tuple(path[:level]) if level < len(path) else ("class", label)


def slow_distance(first: int, second: int) -> int:
    return sum(slow_node(first, level) != slow_node(second, level) for level in (1, 2, 3))


def test_levels_are_the_paths_with_classes_standing_in(levels):
    assert levels.sizes == [4, 6, 8]  # Fruit, Milk, g, nowhere; Apple, c, Whole, Oat, g, nowhere
    for level in (1, 2, 3):
        nodes = levels.ancestors[level - 1]
        for first in range(8):
            for second in range(8):
                assert (nodes[first] == nodes[second]) == (slow_node(first, level) == slow_node(second, level))
    assert levels.names[0].tolist() == ["Fruit", "Milk", "Bag", "nowhere"]
    assert levels.names[2].tolist()[0] == "Fruit > Apple > Gala"
    for level, parents in enumerate(levels.parents):
        assert (parents[levels.ancestors[level + 1]] == levels.ancestors[level]).all()
    first, second = (grid.ravel() for grid in np.meshgrid(np.arange(8), np.arange(8)))
    expected = [slow_distance(a, b) for a, b in zip(first, second, strict=True)]
    assert levels.distances(first, second).tolist() == expected


def test_levels_of_fifty_thousand_classes_take_memory_of_the_nodes():
    classes = np.array([f"{label:05d}" for label in range(50_030)], dtype=object)
    names = np.concatenate([np.array([f"n{node}" for node in range(1111)], dtype=object), classes])
    inner = np.concatenate([np.full(11, -1), np.arange(100) % 11, 11 + np.arange(1000) % 100])
    parents = np.concatenate([inner, 111 + np.arange(50_030) % 1000]).astype(np.int32)
    tree = taxonomy.Taxonomy(names, parents, np.where(np.arange(len(names)) < 1111, "", names))
    levels = tree.levels(pd.Series(classes))
    assert levels.sizes == [11, 100, 1000, 50_030] and levels.ancestors.nbytes == 4 * 50_030 * 8


@pytest.mark.parametrize("kind", ["linear", "cosine", "arcface", "subcenter_arcface"])
def test_a_class_weighs_what_its_path_does(levels, kind):
    torch.manual_seed(0)
    flat = heads.head(kind, 5, 8)
    torch.manual_seed(0)
    made = heads.head(kind, 5, 8, levels=levels)
    batch = torch.randn(6, 5)
    assert torch.equal(made(batch), flat(batch))  # the nodes start at 0
    nodes = made.parametrizations.weight[0].nodes
    for weights in nodes:
        torch.nn.init.normal_(weights)
    centers = 3 if kind == "subcenter_arcface" else 1
    for label in range(8):
        shared = sum(nodes[level][levels.ancestors[level][label]] for level in (0, 1))
        for center in range(label * centers, (label + 1) * centers):
            torch.testing.assert_close(made.weight[center], flat.weight[center] + shared)
    made(batch).square().sum().backward()
    assert all(weights.grad.abs().sum() > 0 for weights in nodes)


def test_probabilities_of_nodes_are_sums_and_the_safe_answer_has_the_least_expected_distance(levels):
    torch.manual_seed(0)
    probabilities = (3 * torch.randn(400, 8)).softmax(dim=1)
    tree = Tree(levels, torch.device("cpu"))
    marginals = tree.sums(probabilities)
    for level in (1, 2, 3):
        for label in range(8):
            below = [other for other in range(8) if slow_node(other, level) == slow_node(label, level)]
            node = levels.ancestors[level - 1][label]
            torch.testing.assert_close(marginals[level - 1][:, node], probabilities[:, below].sum(dim=1))
    distances = torch.tensor([[float(slow_distance(a, b)) for a in range(8)] for b in range(8)])
    expected = probabilities @ distances
    safe = tree.least_risk(marginals)
    torch.testing.assert_close(expected.gather(1, safe[:, None])[:, 0], expected.min(dim=1).values)
    assert (safe != probabilities.argmax(dim=1)).any()


def criterion(levels, counts=None, **fields) -> Criterion:
    row = recipe.Round(name="tree", **fields)
    return Criterion(row, torch.ones(8) if counts is None else counts, Tree(levels, torch.device("cpu")))


@pytest.mark.parametrize("loss", ["cross_entropy", "focal"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_levels_losses_are_those_of_summed_probabilities(levels, loss, smoothing):
    torch.manual_seed(0)
    logits, counts = torch.randn(6, 8), torch.arange(1.0, 9)
    fields = {"loss": loss, "label_smoothing": smoothing, "logit_adjustment": 1.0}
    found = criterion(levels, counts, level_weights={"1": 0.5, "2": 0.3, "3": 2.0}, **fields)(logits, LABELS, None)
    adjusted = logits + (counts / counts.sum()).log()
    plain = criterion(levels, loss=loss, label_smoothing=smoothing)
    expected = 2.0 * plain(adjusted, LABELS, None)
    for level, weight in {1: 0.5, 2: 0.3}.items():
        nodes = levels.ancestors[level - 1]
        summed = torch.stack([adjusted.softmax(1)[:, nodes == node].sum(1) for node in range(max(nodes) + 1)], dim=1)
        expected = expected + weight * plain(summed.log(), torch.from_numpy(nodes)[LABELS], None)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("adjustment", [0.0, 0.5])
def test_tree_smoothing_is_cross_entropy_with_soft_labels(levels, adjustment):
    torch.manual_seed(0)
    logits, counts = torch.randn(6, 8), torch.arange(1.0, 9)
    frequency = (counts / counts.sum()) ** adjustment
    target = torch.zeros(6, 8)
    for at, label in enumerate(LABELS.tolist()):
        target[at, label] += 1 - 0.3 - 0.1
        target[at] += 0.1 / 8
        for level in (1, 2):
            below = [other for other in range(8) if slow_node(other, level) == slow_node(label, level)]
            target[at, below] += 0.3 / 2 * frequency[below] / frequency[below].sum()
    fields = {"tree_smoothing": 0.3, "label_smoothing": 0.1, "logit_adjustment": adjustment}
    found = criterion(levels, counts, **fields)(logits, LABELS, None)
    torch.testing.assert_close(target.sum(dim=1), torch.ones(6))
    torch.testing.assert_close(found, cross_entropy(logits + frequency.log(), target))


def test_branches_have_losses_of_their_own(levels):
    torch.manual_seed(0)
    logits, branch = torch.randn(6, 8), torch.randn(6, 6)
    found = criterion(levels, hierarchy="branches", level_weights={"2": 0.6, "3": 1.0})(
        logits, LABELS, None, {2: branch}
    )
    nodes = torch.from_numpy(levels.ancestors[1])[LABELS]
    torch.testing.assert_close(found, cross_entropy(logits, LABELS) + 0.6 * cross_entropy(branch, nodes))
    with pytest.raises(InputError, match="level_weights 4: the product tree has 3 levels"):
        criterion(levels, level_weights={"4": 1.0})
    with pytest.raises(InputError, match="level_weights {'1': 0.0, '3': 0.0}: nothing is left to learn"):
        criterion(levels, level_weights={"1": 0.0, "3": 0.0})


KINDS = {
    "paths": {"hierarchy": "paths", "level_weights": {"2": 0.3}},
    "paths, arcface": {"hierarchy": "paths", "head": "arcface", "loss": "focal"},
    "smoothing": {"tree_smoothing": 0.2, "logit_adjustment": 1.0},
    "branches": {"hierarchy": "branches", "level_weights": {"3": 0.6, "4": 1.0}},
    "branches early": {"hierarchy": "branches", "level_weights": {"1": 0.5, "3": 0.6}, "branch_stage": 2},
}


@pytest.mark.parametrize("fields", KINDS.values(), ids=KINDS)
def test_every_kind_trains_scores_saves_and_resumes(fields, row, shop, tmp_path):
    row = recipe.override(row, "epochs=3 ema_decay=0.5").model_copy(update=fields)
    tables = assembly.tables(row, shop)

    def train(folder: str, steps: int | None, resume: bool = False) -> model.Recogniser:
        made = assembly.model(row, len(tables.classes), "random", tables.levels)
        source, val = (
            assembly.inputs(made, row, table, tables.classes, shop, tmp_path, "none")
            for table in (tables.train, tables.val)
        )
        rounds = training.train(made, row, source, val, tmp_path / folder, resume=resume, levels=tables.levels)
        for number, _ in enumerate(rounds, start=1):
            if number == steps:
                break
        return made

    made = train("whole", None)
    train("parts", 1)
    resumed = train("parts", None, resume=True)
    for name, value in made.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    made.save(tmp_path / "saved", tables.classes, tables.tree, {})
    saved = model.load(tmp_path / "saved")
    given = {"precision": "fp32", "tree": tables.tree}
    before, after = (
        report.evaluate(one, tables.classes, tables.val, shop, tmp_path, **given) for one in (made, saved.model)
    )
    pd.testing.assert_frame_equal(before.predictions, after.predictions)
    assert set(before.scores) >= {"level_1_accuracy", "level_3_map", "consistency", "severity", "safe_distance"}
    branched = row.hierarchy == "branches"
    assert branched == any(name.startswith("level_") for name in before.predictions)
    assert branched or before.scores["consistency"] == 1.0


def test_the_tree_works_on_cached_embeddings_and_is_asked_for_where_missing(row, shop, tmp_path):
    row = row.model_copy(update={"freeze": "all", "hierarchy": "paths", "level_weights": {"1": 0.5}, "epochs": 4})
    tables = assembly.tables(row, shop)
    made = assembly.model(row, 8, "random", tables.levels)
    source = assembly.inputs(made, row, tables.train, tables.classes, shop, tmp_path, "none")
    assert isinstance(source, features.Features)
    reports = list(training.train(made, row, source, None, tmp_path / "run", levels=tables.levels))
    assert reports[-1].train["loss"] < reports[0].train["loss"]
    with pytest.raises(InputError, match="need product_tree.json"):
        assembly.model(row, 8, "random", None)


def predictions(levels, rows: int = 3000, branch: bool = False) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet(np.full(8, 0.3), rows)
    labels = np.array([rng.choice(8, p=row) for row in probabilities])
    tree = Tree(levels, torch.device("cpu"))
    marginals = tree.sums(torch.from_numpy(probabilities))
    pred = probabilities.argmax(axis=1)
    table = pd.DataFrame({"label": labels, "pred": pred, "confidence": probabilities.max(axis=1)})
    table["safe"] = tree.least_risk(marginals).numpy()
    for level in (1, 2):
        table[f"path_{level}"] = marginals[level - 1].numpy()[np.arange(rows), levels.ancestors[level - 1][pred]]
        if branch:
            table[f"level_{level}"] = rng.integers(0, levels.sizes[level - 1], rows)
    return table


@pytest.mark.parametrize("branch", [False, True])
def test_scores_by_level_equal_the_slow_ones(levels, branch):
    table = predictions(levels, branch=branch)
    scores = metrics.by_level(table, levels)
    distances = [slow_distance(row.label, row.pred) for row in table.itertuples()]
    safe = [slow_distance(row.label, row.safe) for row in table.itertuples()]
    assert scores["severity"] == pytest.approx(np.mean([distance for distance in distances if distance]))
    assert scores["distance"] == pytest.approx(np.mean(distances))
    assert scores["safe_distance"] == pytest.approx(np.mean(safe)) and np.mean(safe) < np.mean(distances)
    agree = np.ones(len(table), dtype=bool)
    for level in (1, 2):
        nodes = levels.ancestors[level - 1]
        said = table[f"level_{level}"] if branch else nodes[table["pred"]]
        assert scores[f"level_{level}_accuracy"] == pytest.approx(np.mean(said == nodes[table["label"]]))
        agree &= np.asarray(said == nodes[table["pred"]])
    assert scores["consistency"] == pytest.approx(agree.mean()) and (agree.mean() == 1) != branch


def test_every_class_has_its_accuracy_at_every_level(levels):
    table = predictions(levels)
    classes = pd.DataFrame({"class_id": CLASSES, "name": "", "path": "", "num_train": 1})
    rows = metrics.per_class(table[table["label"] != 4], classes, levels)
    assert rows.loc[4, ["level_1_accuracy", "level_2_accuracy", "distance"]].isna().all()
    for label in (0, 2, 7):
        own = table[table["label"] == label]
        for level in (1, 2):
            right = [slow_node(pred, level) == slow_node(label, level) for pred in own["pred"]]
            assert rows.loc[label, f"level_{level}_accuracy"] == pytest.approx(np.mean(right))
        distances = [slow_distance(label, pred) for pred in own["pred"]]
        assert rows.loc[label, "distance"] == pytest.approx(np.mean(distances))


def test_less_exact_answers_are_more_often_right(levels):
    table = predictions(levels)
    curve = metrics.trade_off(table, levels, np.array([0.0, 0.6, 1.1]))
    accuracy = (table["label"] == table["pred"]).mean()
    assert curve["depth"].tolist()[0] == 3 and curve["correct"][0] == pytest.approx(accuracy)
    assert curve["depth"].tolist()[2] == 0 and curve["correct"][2] == 1 and curve["answered"][2] == 0
    right = []
    for row in table.itertuples():
        path = [row.path_1, row.path_2, row.confidence]
        depth = max([level for level, share in enumerate(path, start=1) if share >= 0.6], default=0)
        right.append(depth == 0 or slow_node(row.label, depth) == slow_node(row.pred, depth))
    assert curve["correct"][1] == pytest.approx(np.mean(right)) and accuracy < curve["correct"][1] < 1


def test_the_page_of_the_tree_has_every_node_once_with_its_photographs(levels):
    table = predictions(levels)
    (data,) = report.icicle(table, levels).data
    assert len(set(data.ids)) == len(data.ids) == 1 + 4 + 4 + 5  # the root, then what does not stand in
    counts = pd.Series(data.values, data.ids)
    for node, parent in zip(data.ids, data.parents, strict=True):
        children = [child for child, above in zip(data.ids, data.parents, strict=True) if above == node]
        assert not children or counts[children].sum() == counts[node]
        assert parent == "" or parent in set(data.ids)
    assert counts["all"] == len(table)


def test_an_answer_goes_up_the_tree_until_it_is_sure(row, shop, tmp_path):
    tables = assembly.tables(row, shop)
    saved = model.Saved(assembly.model(row, 8, "random").eval(), tables.classes, tables.tree, {})
    files = manifest.paths(tables.val, shop)
    for sure in (0.0, 0.3, 0.7, 0.9999):
        found = prediction.recognise(saved, files, top=8, sure=sure)
        for row in found.itertuples():
            shares = pd.Series(row.confidences, row.paths)
            nodes = [" > ".join(row.paths[0].split(" > ")[:depth]) for depth in (4, 3, 2, 1)]
            sums = {
                node: shares[[path == node or path.startswith(node + " > ") for path in shares.index]].sum()
                for node in nodes
            }
            expected = next((node for node in nodes if sums[node] >= sure), "")
            assert row.answer == expected
            assert row.certainty == pytest.approx(sums.get(expected, 1.0), abs=1e-5)
    alone = model.Saved(saved.model, tables.classes, None, {})
    found = prediction.recognise(alone, files, sure=0.0)
    assert (found["answer"] == found["class_ids"].str[0]).all()
