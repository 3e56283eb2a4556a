"""Classifiers on embeddings: what a head calls a logit is what it is scored by, in training and after."""

from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear, normalize
from torch.nn.utils.parametrize import register_parametrization

from aliprod import InputError
from aliprod.hierarchy import PathSum
from aliprod.taxonomy import Levels


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

    @torch.no_grad()
    def follow(self, embeddings: torch.Tensor, labels: torch.Tensor, counts: torch.Tensor) -> None:
        """Moves centers to the running means of their classes' normalised embeddings (B, D), in place of learning.

        Each of a class's counts (C,) photographs an epoch moves its center by 1 / count of the way, so the mean is over
        about the last epoch, however rare the class. From a center of 0 the first batch gives the direction.
        """
        ways = normalize(embeddings.float()) - self.weight[labels]  # (B, D)
        self.weight.index_add_(0, labels, ways / counts[labels, None])


class Branches(nn.Module):
    """The seed's hierarchy: a classifier of its own for some levels of the tree, sizes: level -> nodes.

    They take the embeddings, or, pooled, what stage number `stage` (from 1) of the backbone gives out.
    """

    def __init__(self, backbone: Any, width: int, sizes: dict[int, int], stage: int | None):
        super().__init__()
        self.stage = stage
        if stage:
            stages = backbone.feature_info
            if stage > len(stages):
                raise InputError(f"branch_stage {stage}: the backbone has {len(stages)} stages")
            width = stages[stage - 1]["num_chs"]
            backbone.get_submodule(stages[stage - 1]["module"]).register_forward_hook(self._note)
        self.levels = nn.ModuleDict({str(level): nn.Linear(width, size) for level, size in sizes.items()})

    def forward(self, embeddings: torch.Tensor) -> dict[int, torch.Tensor]:
        """embeddings (B, D), just computed -> logits (B, n) by level."""
        given = self._given if self.stage else embeddings
        return {int(level): branch(given) for level, branch in self.levels.items()}

    def _note(self, module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        self._given = output.mean(dim=(2, 3))  # (B, D)


def head(
    kind: str, width: int, num_classes: int, scale: float = 30.0, centers: int = 3, levels: Levels | None = None
) -> nn.Module:
    """The head called "linear", "cosine", "arcface" or "subcenter_arcface"; only the last has `centers`.

    With `levels` its weights are sums over the classes' paths in the tree.
    """
    centers = centers if kind == "subcenter_arcface" else 1
    made = nn.Linear(width, num_classes) if kind == "linear" else Cosine(width, num_classes, scale, centers)
    if levels:
        register_parametrization(made, "weight", PathSum(levels, width, centers), unsafe=True)
    return made
