"""Classifiers on embeddings: what a head calls a logit is what it is scored by, in training and after."""

import torch
from torch import nn
from torch.nn.functional import linear, normalize


class Cosine(nn.Module):
    """embeddings (B, D) -> logits (B, C): scale times the cosine to the nearest of each class's K centers.

    One center a class is a cosine classifier, and ArcFace's (Deng et al., CVPR 2019) once `losses.with_margin`
    is applied in training; several are sub-center ArcFace (Deng et al., ECCV 2020).
    """

    def __init__(self, width: int, num_classes: int, scale: float, centers: int):
        super().__init__()
        self.scale = scale
        self.centers = centers
        self.weight = nn.Parameter(torch.empty(num_classes * centers, width))
        nn.init.xavier_uniform_(self.weight)

    def forward(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Logits (B, C) in [-scale, scale]."""
        cosines = linear(normalize(embeddings), normalize(self.weight))  # (B, C * K)
        if self.centers > 1:
            cosines = cosines.unflatten(1, (-1, self.centers)).amax(dim=2)
        return self.scale * cosines


def head(kind: str, width: int, num_classes: int, scale: float = 30.0, centers: int = 3) -> nn.Module:
    """The head called "linear", "cosine", "arcface" or "subcenter_arcface"; only the last has `centers`."""
    if kind == "linear":
        return nn.Linear(width, num_classes)
    return Cosine(width, num_classes, scale, centers if kind == "subcenter_arcface" else 1)
