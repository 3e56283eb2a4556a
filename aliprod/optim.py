"""Optimizers and schedules of a round."""

import math

import torch

from aliprod.model import Recogniser
from aliprod.recipe import Round

OPTIMIZERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}


def optimizer(model: Recogniser, row: Round) -> torch.optim.Optimizer:
    """The round's optimizer over what is not frozen; each group's `scale` is its share of the base rate.

    Weight decay acts on matrices and kernels; biases and norms, which only shift and scale, are spared.
    """
    groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            scale = row.backbone_lr_factor if name.startswith("backbone.") else 1.0
            decay = row.weight_decay if parameter.ndim > 1 else 0.0
            groups.setdefault((scale, decay), []).append(parameter)
    options = {"momentum": 0.9} if row.optimizer == "sgd" else {}
    return OPTIMIZERS[row.optimizer](
        [{"params": params, "scale": scale, "weight_decay": decay} for (scale, decay), params in groups.items()],
        lr=row.lr,
        fused=True,
        **options,
    )


def rate(row: Round, epoch: float, step: float) -> float:
    """Base learning rate at `epoch` (in fractions, from 0) where one step lasts `step` epochs.

    A linear warm-up times StepLR, lr * lr_factor ** floor(epoch / lr_step), or times a half cosine over what
    is left after the warm-up. A pure function: a resumed run needs no scheduler state.
    """
    warmup = min(1.0, (epoch + step) / row.warmup_epochs) if row.warmup_epochs else 1.0
    if row.schedule == "step":
        return row.lr * warmup * row.lr_factor ** (int(epoch + 1e-9) // row.lr_step)
    left = max(row.epochs - row.warmup_epochs, step)
    return row.lr * warmup * 0.5 * (1 + math.cos(math.pi * max(0.0, epoch - row.warmup_epochs) / left))


def set_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Sets the base rate; every group gets its share."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["scale"]
