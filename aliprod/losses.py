"""Criteria: what a round minimises, and what is done to logits and in batches for its sake only."""

import torch
from torch.nn.functional import cross_entropy, normalize

from aliprod import InputError
from aliprod.hierarchy import Tree
from aliprod.recipe import Round


class Criterion:
    """The round's loss of a batch: logits (B, C), labels (B,), embeddings (B, D) -> loss (), in nats but for triplets.

    counts (C,) are the classes' photographs in the manifest, for what depends on a class's frequency; tree is needed
    for `level_weights` and `tree_smoothing`.
    """

    def __init__(self, row: Round, counts: torch.Tensor, tree: Tree | None = None):
        self.row = row
        self.tree = tree
        self.prior = row.logit_adjustment * (counts / counts.sum()).log() if row.logit_adjustment else None  # (C,)
        self.margins = margins(row, counts) if row.head in ("arcface", "subcenter_arcface") else None  # (C,)
        depth = len(tree.sizes) if tree else 0
        given = {int(level): weight for level, weight in (row.level_weights or {}).items()}
        if unknown := [level for level in given if level > depth]:
            raise InputError(f"level_weights {unknown[0]}: the product tree has {depth} levels")
        self.own_weight = given.pop(depth, 1.0)
        self.level_weights = given
        if not (self.own_weight or any(given.values()) or row.tree_smoothing or row.triplet_weight):
            raise InputError(f"level_weights {row.level_weights}: nothing is left to learn; one must be above 0")
        # Under a prior the share of a class goes by its frequency, or rare relatives would be made up for twice.
        self.shares = self.prior.exp() if self.prior is not None else torch.ones_like(counts, dtype=torch.float)  # (C,)
        smoothed = tree if row.tree_smoothing else None
        self.totals = smoothed.sums(self.shares[None])[:-1] if smoothed else []  # (1, n) each

    def __call__(
        self,
        logits: torch.Tensor,
        labels: torch.Tensor,
        embeddings: torch.Tensor,
        branches: dict[int, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """`branches` are the logits (B, n) of levels that have a classifier of their own."""
        row, logits = self.row, logits.float()
        if row.loss == "triplet":
            return batch_hard_triplet(embeddings.float(), labels, row.triplet_margin)
        if self.margins is not None:
            logits = with_margin(logits, labels, self.margins[labels], row.scale, row.easy_margin)
        if self.prior is not None:  # Menon et al., ICLR 2021; with a factor of 1 balanced softmax
            logits = logits + self.prior
        loss = self.own_weight * self._classification(logits, labels)
        if self.tree and self.level_weights:
            levels = branches or self._sums(logits)
            for level, weight in self.level_weights.items():
                nodes = self.tree.ancestors[level - 1][labels]
                loss = loss + weight * self._classification(levels[level].float(), nodes)
        if self.tree and row.tree_smoothing:
            loss = loss + row.tree_smoothing * self._relatives(logits, labels)
        if row.triplet_weight:
            loss = loss + row.triplet_weight * batch_hard_triplet(embeddings.float(), labels, row.triplet_margin)
        return loss

    def _classification(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        losses = cross_entropy(logits, labels, reduction="none", label_smoothing=self.row.label_smoothing)  # (B,)
        if self.row.loss == "focal":
            losses = focal_weights(logits, labels, self.row.focal_gamma) * losses
        return losses.mean()

    def _sums(self, logits: torch.Tensor) -> dict[int, torch.Tensor]:
        """Log-probabilities (B, n) of the nodes of each level above the classes."""
        assert self.tree
        marginals = self.tree.sums(logits.softmax(dim=1))[:-1]
        return {level: nodes.clamp_min(1e-30).log() for level, nodes in enumerate(marginals, start=1)}

    def _relatives(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """What moving all of the target from the class to its relatives adds to the loss.

        Soft labels by the tree (Bertinetto et al., CVPR 2020) of a kind that needs sums over levels only: each level
        above the classes has an equal share, spread over the classes under the label's ancestor: evenly, or by their
        frequency where the logits are adjusted by it.
        """
        assert self.tree
        means = []  # log-probabilities are logits less one normaliser, which cancels out
        weighted = logits if self.prior is None else logits * self.shares
        for level, (sums, totals) in enumerate(zip(self.tree.sums(weighted)[:-1], self.totals, strict=True)):
            node = self.tree.ancestors[level][labels]
            means.append(sums.gather(1, node[:, None])[:, 0] / totals[0, node])
        own = logits.gather(1, labels[:, None])[:, 0]
        return (own - torch.stack(means).mean(dim=0)).mean()


def focal_weights(logits: torch.Tensor, labels: torch.Tensor, gamma: float) -> torch.Tensor:
    """(1 - p) ** gamma of each sample (B,), p its label's probability (Lin et al., ICCV 2017); 1 at gamma 0."""
    return (1 - logits.softmax(dim=1).gather(1, labels[:, None])[:, 0]).clamp_min(1e-8) ** gamma


def margins(row: Round, counts: torch.Tensor) -> torch.Tensor:
    """Angle (C,) in radians added to each class's own: `margin` for the most frequent class, more for rare ones.

    The dynamic margins of Ha et al. (2020), a * n ** -1/4 + b for n photographs, with a and b such that they run
    from `margin` to `margin + margin_range`.
    """
    rarity = counts.double() ** -0.25
    span = (rarity.max() - rarity.min()).clamp_min(1e-12)
    return (row.margin + row.margin_range * (rarity - rarity.min()) / span).float()


def with_margin(
    logits: torch.Tensor, labels: torch.Tensor, margin: torch.Tensor, scale: float, easy: bool
) -> torch.Tensor:
    """ArcFace's logits: scale * cos(angle + margin) at the label, the others as they are.

    margin (B,) in radians. Where the angle and margin pass pi, the cosine would rise again: there it goes on falling
    in a straight line, cos(angle) - margin * sin(margin); with `easy` the margin is left out at angles over pi / 2.
    """
    cosine = (logits.gather(1, labels[:, None])[:, 0] / scale).clamp(-1 + 1e-7, 1 - 1e-7)
    moved = (cosine.acos() + margin).cos()
    if easy:
        target = torch.where(cosine > 0, moved, cosine)
    else:
        target = torch.where(cosine > (torch.pi - margin).cos(), moved, cosine - margin * margin.sin())
    return logits.scatter(1, labels[:, None], (scale * target)[:, None])


def batch_hard_triplet(embeddings: torch.Tensor, labels: torch.Tensor, margin: float) -> torch.Tensor:
    """Mean over anchors of max(0, margin + hardest positive - hardest negative), Hermans et al. (2017).

    Distances between normalised embeddings (B, D), in [0, 2]. Anchors that have no positive or no negative in the
    batch count for nothing; a batch without any has loss 0.
    """
    distances = torch.cdist(normalize(embeddings), normalize(embeddings))  # (B, B)
    same = labels[:, None] == labels
    itself = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    positive = distances.masked_fill(~same | itself, -torch.inf).amax(dim=1)
    negative = distances.masked_fill(same, torch.inf).amin(dim=1)
    usable = positive.isfinite() & negative.isfinite()
    return torch.where(usable, margin + positive - negative, 0.0).relu().sum() / usable.sum().clamp_min(1)
