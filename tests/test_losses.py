"""Losses and heads against torch, PyTorch Metric Learning, formulas written out slowly, and what must not change."""

import math
from functools import partial

import numpy as np
import pytest
import test_training
import torch
from pytorch_metric_learning import distances, losses, miners, reducers
from torch.nn.functional import cross_entropy, normalize

from aliprod import heads, training
from aliprod.losses import Criterion, batch_hard_triplet, focal_weights, margins, with_margin
from aliprod.recipe import Round

B, C, D = 24, 7, 16


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    logits = 4 * torch.randn(B, C, generator=generator)
    labels = torch.randint(0, C, (B,), generator=generator)
    return logits, labels, torch.randn(B, D, generator=generator), torch.tensor([100, 50, 9, 8, 4, 2, 1])


def loss(batch, **fields) -> float:
    logits, labels, embeddings, counts = batch
    return Criterion(Round(name="a", **fields), counts)(logits, labels, embeddings).item()


def test_the_plain_loss_is_torchs(batch):
    assert loss(batch) == pytest.approx(cross_entropy(batch[0], batch[1]).item())
    smooth = cross_entropy(batch[0], batch[1], label_smoothing=0.2).item()
    assert loss(batch, label_smoothing=0.2) == pytest.approx(smooth)


def test_focal_is_per_sample_and_cross_entropy_at_gamma_0(batch):
    logits, labels, *_ = batch
    expected = 0.0
    for row, label in zip(logits.double(), labels, strict=True):
        p = row.exp()[label] / row.exp().sum()
        expected -= (1 - p) ** 1.5 * p.log() / B
    assert loss(batch, loss="focal", focal_gamma=1.5) == pytest.approx(expected.item(), rel=1e-5)
    assert loss(batch, loss="focal", focal_gamma=0.0) == pytest.approx(loss(batch))
    halves = [
        loss([part[rows] for part in batch[:3]] + [batch[3]], loss="focal") for rows in (slice(12), slice(12, 24))
    ]
    assert loss(batch, loss="focal") == pytest.approx(sum(halves) / 2)  # of a batch: the mean of its samples


def test_focal_has_finite_gradients_where_it_is_sure():
    logits = torch.tensor([[200.0, 0.0], [0.0, 200.0]], requires_grad=True)
    labels = torch.tensor([0, 0])
    (focal_weights(logits, labels, 0.5) * cross_entropy(logits, labels, reduction="none")).mean().backward()
    assert logits.grad.isfinite().all()


def test_an_adjustment_of_1_is_balanced_softmax(batch):
    logits, labels, _, counts = batch
    expected = 0.0
    for row, label in zip(logits.double(), labels, strict=True):
        weighted = counts * row.exp()
        expected -= (weighted[label] / weighted.sum()).log() / B
    assert loss(batch, logit_adjustment=1.0) == pytest.approx(expected.item(), rel=1e-5)
    assert loss(batch, logit_adjustment=1e-9) == pytest.approx(loss(batch), rel=1e-5)


@pytest.mark.parametrize("classes", [2, 6, 24])
def test_batch_hard_is_the_librarys(classes):
    generator = torch.Generator().manual_seed(classes)
    embeddings = torch.randn(B, D, generator=generator)
    labels = torch.randint(0, classes, (B,), generator=generator)
    ours, same = (embeddings.clone().requires_grad_() for _ in range(2))
    distance = distances.LpDistance(normalize_embeddings=True)
    mined = miners.BatchHardMiner(distance=distance)(same, labels)
    theirs = losses.TripletMarginLoss(0.3, distance=distance, reducer=reducers.MeanReducer())(same, labels, mined)
    value = batch_hard_triplet(ours, labels, 0.3)
    torch.testing.assert_close(value, theirs)
    value.backward()
    theirs.backward()
    torch.testing.assert_close(ours.grad, same.grad)


@pytest.mark.parametrize("labels", [[0] * 4, [0, 1, 2, 3]])
def test_a_batch_without_triplets_has_no_loss_but_a_gradient(labels):
    embeddings = torch.randn(4, D, requires_grad=True)
    value = batch_hard_triplet(embeddings, torch.tensor(labels), 0.3)
    value.backward()
    assert value.item() == 0.0 and embeddings.grad.isfinite().all()


def test_the_triplet_is_added_with_its_weight(batch):
    triplet = batch_hard_triplet(batch[2], batch[1], 0.3).item()
    assert loss(batch, triplet_weight=0.5) == pytest.approx(loss(batch) + 0.5 * triplet, rel=1e-5)


@pytest.mark.parametrize("kind", ["cosine", "arcface", "subcenter_arcface"])
@pytest.mark.parametrize("margin", [0.0, 0.3, 1.2])
def test_heads_and_margins_are_the_librarys(kind, margin):
    torch.manual_seed(0)
    head = heads.head(kind, D, C, scale=20.0, centers=4)
    angle = {"margin": math.degrees(margin), "scale": 20.0}
    library = {
        "cosine": partial(losses.NormalizedSoftmaxLoss, temperature=1 / 20),
        "arcface": partial(losses.ArcFaceLoss, **angle),
        "subcenter_arcface": partial(losses.SubCenterArcFaceLoss, sub_centers=4, **angle),
    }[kind](num_classes=C, embedding_size=D)
    library.W.data = head.weight.detach().T.clone()
    labels = torch.arange(70) % C
    cosines = torch.linspace(-0.99, 0.99, 70)[:, None]  # to the label's first center: angles past pi - margin too
    aside = normalize(torch.randn(70, D)) * (1 - cosines**2).sqrt()
    embeddings = cosines * normalize(head.weight.detach())[labels * head.centers] + aside
    ours, same = (embeddings.clone().requires_grad_() for _ in range(2))
    torch.testing.assert_close(head(ours), library.get_logits(same), atol=1e-4, rtol=1e-4)
    value = Criterion(Round(name="a", head=kind, margin=margin, scale=20.0), torch.ones(C))(head(ours), labels, ours)
    theirs = library(same, labels)
    torch.testing.assert_close(value, theirs, atol=1e-4, rtol=1e-4)
    value.backward()
    theirs.backward()
    torch.testing.assert_close(ours.grad, same.grad, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(head.weight.grad, library.W.grad.T, atol=1e-4, rtol=1e-3)


def test_an_easy_margin_is_for_angles_under_a_right_one():
    cosines = torch.linspace(-0.999, 0.999, 50 * C).view(50, C)
    labels = torch.arange(50) % C
    easy, hard = (with_margin(20 * cosines, labels, torch.full((50,), 1.2), 20.0, on) for on in (True, False))
    over = cosines.gather(1, labels[:, None]) <= 0
    torch.testing.assert_close(easy, torch.where(over, 20 * cosines, hard))
    assert (hard <= 20 * cosines + 1e-3).all(), "a margin never makes a class easier"


def test_margins_grow_with_rarity():
    row = Round(name="a", head="arcface", margin=0.2, margin_range=0.3)
    values = margins(row, torch.tensor([10000, 16, 1]))
    assert values[0].item() == pytest.approx(0.2) and values[2].item() == pytest.approx(0.5)
    expected = 0.2 + 0.3 * (16**-0.25 - 0.1) / (1 - 0.1)
    assert values[1].item() == pytest.approx(expected)
    assert margins(row, torch.tensor([5, 5])).tolist() == pytest.approx([0.2, 0.2])


@pytest.mark.parametrize("kind", ["cosine", "arcface", "subcenter_arcface"])
def test_gradients_are_finite_at_a_perfect_match(kind):
    head = heads.head(kind, D, C)
    embeddings = head.weight[: C * 3 : 3].detach().clone().requires_grad_()
    labels = torch.arange(len(embeddings)) % C
    row = Round(name="a", head=kind)
    Criterion(row, torch.ones(C))(head(embeddings), labels, embeddings).backward()
    assert embeddings.grad.isfinite().all() and head.weight.grad.isfinite().all()


TRIPLET = {"loss": "triplet", "head": "cosine", "images_per_class": 4}


def test_triplets_alone_leave_the_logits_out(batch):
    expected = batch_hard_triplet(batch[2], batch[1], 0.4).item()
    assert loss(batch, **TRIPLET, triplet_margin=0.4) == expected
    assert loss([100 * batch[0], *batch[1:]], **TRIPLET, triplet_margin=0.4, logit_adjustment=1.0) == expected


def test_centers_follow_the_means_of_their_classes(batch):
    _, labels, embeddings, counts = batch
    head = heads.head("cosine", D, 50)
    counts, expected = torch.cat([counts, torch.ones(43)]), head.weight.detach().clone()
    for label in labels.unique():
        of_class = [e / e.norm() for e in embeddings[labels == label]]
        share = len(of_class) / counts[label]  # of an epoch's photographs
        expected[label] = (1 - share) * expected[label] + share * sum(of_class) / len(of_class)
    head.follow(embeddings, labels, counts)
    torch.testing.assert_close(head.weight.detach(), expected)
    assert torch.equal(head.weight[C:], expected[C:]), "classes that are not in the batch stay"


def test_a_whole_epoch_in_one_batch_gives_the_class_means(batch):
    _, labels, embeddings, _ = batch
    head = heads.head("cosine", D, C)
    torch.nn.init.zeros_(head.weight)
    head.follow(embeddings, labels, torch.bincount(labels, minlength=C).clamp_min(1))
    means = torch.stack([normalize(embeddings[labels == label]).mean(dim=0) for label in labels.unique()])
    torch.testing.assert_close(head.weight.detach()[labels.unique()], means)


@pytest.mark.parametrize("optimizer, precision", [("adamw", "fp32"), ("adam_gc", "mixed"), ("sgd", "fp16")])
def test_only_the_means_move_a_followers_head(row, shop, optimizer, precision):
    row = test_training.changed(row, **TRIPLET, optimizer=optimizer, precision=precision, weight_decay=0.5)
    model, source, _ = test_training.material(row, shop)
    learner = training._Learner(model, row, source, levels=None)
    backbone = next(model.backbone.parameters()).detach().clone()
    for label in (0, 1):
        before = model.head.weight.detach().clone()
        rows = np.concatenate([np.flatnonzero(source.labels == other)[:4] for other in (label, label + 2)])
        ((images, rows),) = source.batches([rows])
        learner.step(images, torch.from_numpy(source.labels[rows]), 0.1)
        moved = (model.head.weight != before).any(dim=1)
        assert moved.nonzero()[:, 0].tolist() == [label, label + 2]
        assert model.head.weight.grad is None
    assert not torch.equal(backbone, next(model.backbone.parameters()))


def test_triplets_teach_the_embeddings_and_the_head_follows(row, shop, tmp_path):
    row = test_training.changed(row, **TRIPLET, epochs=16, lr=3e-3, schedule="cosine", ema_decay=0.9)
    _, reports = test_training.trained(row, shop, tmp_path)
    assert reports[-1].train["loss"] < 0.7 * reports[0].train["loss"]
    assert max(report.val["accuracy"] for report in reports) > 0.3, "of 8 classes"


@pytest.mark.parametrize("fields", [{"ema_decay": 0.9, "augment": "light"}, {"precision": "mixed", "freeze": 2}])
def test_a_round_of_triplets_resumes(row, shop, tmp_path, fields):
    test_training.test_a_round_stopped_and_resumed_ends_with_the_same_weights(row, shop, tmp_path, TRIPLET | fields)
