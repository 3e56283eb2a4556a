"""The temperature that makes probabilities of logits: fitted where the network has not learnt.

Temperature scaling (Guo et al., ICML 2017): logits are divided by one number, the temperature, which makes held-out
labels most likely. It changes how sure answers are, never which comes first.
"""

from collections.abc import Callable, Iterable, Iterator

import torch

from aliprod import InputError

BOUNDS = (0.01, 100.0)  # of temperatures
STEPS = 50  # passes at most; Newton's method takes about 6


def temperature(
    batches: Callable[[], Iterable[tuple[torch.Tensor, torch.Tensor]]], bounds: tuple[float, float] = BOUNDS
) -> float:
    """The temperature, within `bounds`, that fits the labels best; 1 where there are none.

    `batches` gives a pass over logits (B, C) and labels (B,) each time it is called. InputError where logits are not
    finite.
    """

    def whole() -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        for logits, labels in batches():
            yield logits, labels, torch.full_like(labels, -1)

    return temperatures(whole, 0, bounds)[0]


@torch.inference_mode()
def temperatures(
    batches: Callable[[], Iterable[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]],
    num_parts: int,
    bounds: tuple[float, float] = BOUNDS,
) -> list[float]:
    """For each part the temperature fitted to all others, and last that fitted to everything: num_parts + 1 of them.

    `batches` as of `temperature`, with the part (B,) of each row, in [0, num_parts). Minimised is the negative
    log-likelihood, which is convex in the inverse temperature: for logits z, labels y and probabilities p its
    derivatives are sum(E_p[z] - z_y) and sum(Var_p[z]), and Newton's method, kept in the bracket that the signs of the
    first leave, takes a pass a step. Of N rows a label has 1 - 1 / (N + 2) of the target and all classes share the rest
    (as Platt's have, 1999), or a few rows, all named rightly, would make every answer certain. Only sums outlive a
    batch.
    """
    inverse = torch.ones(num_parts + 1, dtype=torch.float64)
    low, high = (torch.full_like(inverse, 1 / bound) for bound in reversed(bounds))
    for _ in range(STEPS):
        count, slope, curvature, spread = torch.zeros(4, num_parts + 1, dtype=torch.float64)
        for logits, labels, parts in batches():
            logits = logits.float()
            logits = logits - logits.gather(1, labels[:, None])  # z - z_y: small where it matters
            for place, scale in enumerate(inverse.tolist()):
                rows = logits[parts != place]
                probabilities = (scale * rows).softmax(dim=1)
                mean = (probabilities * rows).sum(dim=1)  # (B,)
                square = (probabilities * rows.square()).sum(dim=1)
                count[place] += len(rows)
                slope[place] += mean.double().sum().cpu()
                curvature[place] += (square - mean.square()).clamp_min(0).double().sum().cpu()
                spread[place] += rows.mean(dim=1).double().sum().cpu()
        slope -= spread / (count + 2)
        if not slope.isfinite().all():
            raise InputError("logits that are not finite numbers have no temperature: the network has diverged")
        low, high = torch.where(slope < 0, inverse, low), torch.where(slope > 0, inverse, high)
        step = inverse - slope / curvature.clamp_min(1e-12)
        inside = (step >= low) & (step <= high)
        step = torch.where(inside | (slope == 0), step, (low * high).sqrt())
        settled = (step / inverse - 1).abs().max() < 1e-4
        inverse = step
        if settled:
            break
    return (1 / inverse).tolist()
