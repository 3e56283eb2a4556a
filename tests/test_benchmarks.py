"""The seed's algorithm as the benchmarks race it: wrong where it was wrong, right where it was right."""

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from aliprod import assembly, manifest, metrics, optim, taxonomy
from aliprod.losses import Criterion
from aliprod.recipe import Round
from benchmarks import enrolment, hierarchy, rounds

LABELS = torch.tensor([0, 1])
EASY_AND_HARD = torch.tensor([[4.0, 0.0], [2.0, 0.0]])


def test_the_seeds_focal_loss_weighs_the_batch_and_ours_each_photograph():
    ours = Criterion(Round(name="a", loss="focal"), torch.ones(2))(EASY_AND_HARD, LABELS, torch.empty(0))
    losses = cross_entropy(EASY_AND_HARD, LABELS, reduction="none")
    weights = (1 - torch.exp(-losses)) ** 2
    assert ours.item() == pytest.approx((weights * losses).mean().item())
    mean = losses.mean()
    assert rounds.seed_focal(EASY_AND_HARD, LABELS).item() == pytest.approx(((1 - torch.exp(-mean)) ** 2 * mean).item())
    assert rounds.seed_focal(EASY_AND_HARD[:1], LABELS[:1]).item() == pytest.approx((weights * losses)[0].item())
    assert rounds.seed_focal(EASY_AND_HARD, LABELS).item() < 0.7 * ours.item()


def test_the_seeds_claims_depend_on_the_batches_and_the_scores_do_not():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(8).repeat(36)  # three batches of the seed's
    logits = torch.randn(len(labels), 8, generator=generator) + nn.functional.one_hot(labels)
    # A batch that is all wrong and all confident: it spoils the whole set's GAP, but only its own batch's.
    logits[:96] = 10 * nn.functional.one_hot((labels[:96] + 1) % 8)
    mixed = torch.randperm(len(labels), generator=generator)
    claimed, elsewise = (rounds.seed_claims(logits[order], labels[order]) for order in (slice(None), mixed))
    true, again = (rounds.true_scores(logits[order], labels[order]) for order in (slice(None), mixed))
    assert true["gap"] == pytest.approx(again["gap"]) and true["map"] == pytest.approx(again["map"])
    assert abs(claimed["gap"] - elsewise["gap"]) > 0.05
    assert claimed["gap"] > true["gap"] + 0.05
    preds = logits.argmax(dim=1).numpy()
    assert true["map"] == pytest.approx(metrics.mean_class_accuracy(labels.numpy(), preds))


def test_the_seeds_claims_are_right_of_a_single_batch_with_equal_sums():
    generator = np.random.default_rng(0)
    labels = torch.from_numpy(generator.integers(4, size=90))
    logits = torch.from_numpy(generator.normal(size=(90, 4)).astype(np.float32)).log_softmax(dim=1)
    claimed, true = rounds.seed_claims(logits, labels), rounds.true_scores(logits, labels)
    assert claimed == pytest.approx({name: true[name] for name in claimed})


def test_our_centralisation_is_the_seeds():
    head = nn.Linear(6, 3)
    cross_entropy(head(torch.randn(4, 6)), torch.tensor([0, 1, 2, 0])).backward()
    gradient, bias = head.weight.grad.clone(), head.bias.grad.clone()
    optim.centralize(torch.optim.Adam(head.parameters()))
    assert torch.allclose(head.weight.grad, gradient - gradient.mean(dim=1, keepdim=True))
    assert torch.equal(head.bias.grad, bias)


def test_no_more_photographs_are_enrolled_than_the_rarest_class_has(row, shop, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    row = row.model_copy(update={"freeze": "all", "epochs": 1})
    model, source, _ = hierarchy.material(row, shop)
    tree = taxonomy.read(shop / "product_tree.json")
    classes = assembly.describe(manifest.class_index(manifest.read(shop, "train")), tree)
    assert classes["num_train"].min() == 6
    train = np.arange(len(source.paths)) < classes["num_train"].sum()
    table = pd.DataFrame(enrolment.score(enrolment.draw(0, row, model, source, classes, train, tree)))
    assert sorted(table["shots"].unique()) == [0, 1, 2, 4] and set(table["way"]) == set(enrolment.WAYS)
    assert table[["enrolled", "trained"]].stack().between(0, 1).all()
    rows = enrolment.by_shots(table.assign(draw=0)).splitlines()
    assert [line.count("±") for line in rows if line.startswith(("| 4 ", "| 8 "))] == [6, 0]
