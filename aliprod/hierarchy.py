"""Heads that know the product tree, and what a head's answers mean for the tree's inner nodes.

The probability of an inner node is the sum over the classes below it, so what is said at one level never contradicts
what is said at another.
"""

import torch
from torch import nn

from aliprod.taxonomy import Levels


class PathSum(nn.Module):
    """A class's weights as a sum over its path: its own, and those of each node above it, shared with its siblings.

    A parametrization (torch.nn.utils.parametrize) of the weights (C * K, D) of any head. The nodes' start at 0, so
    training starts where that of the flat head does; weight decay then draws rare classes to their siblings' mean, the
    hierarchical shrinkage of McCallum et al. (ICML 1998) and of Salakhutdinov et al. (CVPR 2011).
    """

    def __init__(self, levels: Levels, width: int, centers: int = 1):
        super().__init__()
        self.centers = centers
        self.nodes = nn.ParameterList(torch.zeros(size, width) for size in levels.sizes[:-1])
        for number, parents in enumerate(levels.parents):
            self.register_buffer(f"parents_{number}", torch.from_numpy(parents), persistent=False)

    def forward(self, own: torch.Tensor) -> torch.Tensor:
        """own (C * K, D) -> weights (C * K, D)."""
        total = self.nodes[0]
        for number, nodes in enumerate(list(self.nodes)[1:]):
            total = nodes + total.index_select(0, self.get_buffer(f"parents_{number}"))
        above = total.index_select(0, self.get_buffer(f"parents_{len(self.nodes) - 1}"))  # (C, D)
        if self.centers > 1:
            above = above.repeat_interleave(self.centers, dim=0)
        return above.add_(own)  # in place: the largest thing there is needs no third copy


class Tree:
    """The levels of the tree on a device: sums of class probabilities, and decisions from them."""

    def __init__(self, levels: Levels, device: torch.device):
        self.ancestors = torch.from_numpy(levels.ancestors).to(device)  # (L, C)
        self.parents = [torch.from_numpy(parents).to(device) for parents in levels.parents]
        self.sizes = levels.sizes

    def sums(self, probabilities: torch.Tensor) -> list[torch.Tensor]:
        """probabilities (B, C) of the classes, or what else is to be summed -> those of each level's nodes (B, n);
        the last are the classes'."""
        sums = [probabilities]
        for parents, size in zip(reversed(self.parents), reversed(self.sizes[:-1]), strict=True):
            sums.append(probabilities.new_zeros(len(probabilities), size).index_add_(1, parents, sums[-1]))
        return sums[::-1]

    def least_risk(self, marginals: list[torch.Tensor]) -> torch.Tensor:
        """The class (B,) of the least expected tree distance to the truth (Duda and Hart; Karthik et al., ICLR 2021).

        The distance counts the levels at which two classes have different ancestors, so its expectation is the sum over
        the levels of 1 - the probability of the class's ancestor: no C x C matrix.
        """
        shared = marginals[0]
        for parents, probabilities in zip(self.parents, marginals[1:], strict=True):
            shared = probabilities + shared[:, parents]
        return shared.argmax(dim=1)
