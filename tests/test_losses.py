"""Losses and heads against torch, the papers' own formulas written out slowly, and what must not change."""

import math

import pytest
import torch
from torch.nn.functional import cross_entropy, normalize

from aliprod import heads
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


def slow_triplet(embeddings: torch.Tensor, labels: torch.Tensor, margin: float) -> float:
    units = [e / e.norm() for e in embeddings.double()]
    terms = []
    for i, anchor in enumerate(units):
        own = [(anchor - u).norm() for j, u in enumerate(units) if j != i and labels[j] == labels[i]]
        other = [(anchor - u).norm() for j, u in enumerate(units) if labels[j] != labels[i]]
        if own and other:
            terms.append(max(0.0, (margin + max(own) - min(other)).item()))
    return sum(terms) / len(terms) if terms else 0.0


@pytest.mark.parametrize("classes", [2, 6, 24])
def test_batch_hard_is_the_slow_search(classes):
    generator = torch.Generator().manual_seed(classes)
    embeddings = torch.randn(B, D, generator=generator)
    labels = torch.randint(0, classes, (B,), generator=generator)
    assert batch_hard_triplet(embeddings, labels, 0.3).item() == pytest.approx(
        slow_triplet(embeddings, labels, 0.3), abs=1e-5
    )


@pytest.mark.parametrize("labels", [[0] * 4, [0, 1, 2, 3]])
def test_a_batch_without_triplets_has_no_loss_but_a_gradient(labels):
    embeddings = torch.randn(4, D, requires_grad=True)
    value = batch_hard_triplet(embeddings, torch.tensor(labels), 0.3)
    value.backward()
    assert value.item() == 0.0 and embeddings.grad.isfinite().all()


def test_the_triplet_is_added_with_its_weight(batch):
    triplet = batch_hard_triplet(batch[2], batch[1], 0.3).item()
    assert loss(batch, triplet_weight=0.5) == pytest.approx(loss(batch) + 0.5 * triplet, rel=1e-5)


def slow_arcface(cosines: torch.Tensor, labels: torch.Tensor, margin: float, scale: float, easy: bool) -> torch.Tensor:
    logits = cosines.clone()
    for row, label in enumerate(labels.tolist()):
        cosine = cosines[row, label].item()
        angle = math.acos(cosine)
        if easy:
            moved = math.cos(angle + margin) if cosine > 0 else cosine
        else:
            moved = math.cos(angle + margin) if angle + margin < math.pi else cosine - margin * math.sin(margin)
        logits[row, label] = moved
    return scale * logits


@pytest.mark.parametrize("easy", [False, True])
@pytest.mark.parametrize("margin", [0.0, 0.3, 1.2])
def test_the_margin_is_arcfaces(easy, margin):
    cosines = torch.linspace(-0.999, 0.999, 50 * C).view(50, C)
    labels = torch.arange(50) % C
    ours = with_margin(20 * cosines, labels, torch.full((50,), margin), 20.0, easy)
    torch.testing.assert_close(ours, slow_arcface(cosines, labels, margin, 20.0, easy), atol=1e-3, rtol=1e-4)
    if not easy:
        assert (ours <= 20 * cosines + 1e-3).all(), "a margin never makes a class easier"


def test_margins_grow_with_rarity():
    row = Round(name="a", head="arcface", margin=0.2, margin_range=0.3)
    values = margins(row, torch.tensor([10000, 16, 1]))
    assert values[0].item() == pytest.approx(0.2) and values[2].item() == pytest.approx(0.5)
    expected = 0.2 + 0.3 * (16**-0.25 - 0.1) / (1 - 0.1)
    assert values[1].item() == pytest.approx(expected)
    assert margins(row, torch.tensor([5, 5])).tolist() == pytest.approx([0.2, 0.2])


def test_the_margin_is_for_training_only(batch):
    embeddings = batch[2]
    plain, arcface = (heads.head(kind, D, C) for kind in ("cosine", "arcface"))
    arcface.load_state_dict(plain.state_dict())
    assert torch.equal(arcface(embeddings), plain(embeddings))
    cosines = normalize(embeddings) @ normalize(plain.weight).T
    torch.testing.assert_close(plain(embeddings), 30 * cosines)
    logits = plain(embeddings).detach()
    assert loss([logits, *batch[1:]], head="arcface") > loss([logits, *batch[1:]], head="cosine")


def test_the_nearest_center_counts(batch):
    head = heads.head("subcenter_arcface", D, C, scale=10.0, centers=4)
    slow = torch.stack([(normalize(batch[2]) @ normalize(center).T) for center in head.weight.view(C, 4, D)])
    torch.testing.assert_close(head(batch[2]), 10 * slow.amax(dim=2).T)


@pytest.mark.parametrize("kind", ["cosine", "arcface", "subcenter_arcface"])
def test_gradients_are_finite_at_a_perfect_match(kind):
    head = heads.head(kind, D, C)
    embeddings = head.weight[: C * 3 : 3].detach().clone().requires_grad_()
    labels = torch.arange(len(embeddings)) % C
    row = Round(name="a", head=kind)
    Criterion(row, torch.ones(C))(head(embeddings), labels, embeddings).backward()
    assert embeddings.grad.isfinite().all() and head.weight.grad.isfinite().all()
