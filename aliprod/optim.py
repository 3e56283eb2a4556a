"""Optimizers and schedules of a round."""

import importlib
import math
from typing import Any

import torch

from aliprod import InputError
from aliprod.model import Recogniser
from aliprod.recipe import Round

TORCH: dict[str, Any] = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}


def optimizer(model: Recogniser, row: Round) -> torch.optim.Optimizer:
    """The round's optimizer over what is not frozen; each group's `scale` is its share of the base rate.

    Weight decay acts on matrices and kernels; biases and norms, which only shift and scale, are spared. InputError
    where the round insists on NVIDIA Apex and there is none, or no GPU for it.
    """
    groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            scale = row.backbone_lr_factor if name.startswith("backbone.") else 1.0
            decay = row.weight_decay if parameter.ndim > 1 else 0.0
            groups.setdefault((scale, decay), []).append(parameter)
    parts = [{"params": params, "scale": scale, "weight_decay": decay} for (scale, decay), params in groups.items()]
    rule, _, centralized = row.optimizer.partition("_")
    options = {"momentum": 0.9} if rule == "sgd" else {}
    if apex := _apex(row, model.device):
        options |= {"adam_w_mode": rule == "adamw"} if rule != "sgd" else {}
        made = getattr(apex, "FusedSGD" if rule == "sgd" else "FusedAdam")(parts, lr=row.lr, **options)
    else:
        made = TORCH[rule](parts, lr=row.lr, fused=True, **options)
    if rule == "sgd":
        # torch's makes these in its first step, and leaves them unwritten where the gradients of that step overflow.
        for parameter in (parameter for params in groups.values() for parameter in params):
            made.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    if centralized:
        made.register_step_pre_hook(centralize)
    return made


def centralize(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Takes from each output's gradient its mean, in place; biases and norms are left as they are.

    Gradient centralization (Yong et al., ECCV 2020), as a step's pre-hook: it goes with any optimizer, and is linear,
    so it commutes with the scaling of gradients. Equal to the published Adam_GC and SGD_GC without weight decay.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None and parameter.ndim > 1:
                gradient = parameter.grad
                gradient.sub_(gradient.mean(dim=tuple(range(1, gradient.ndim)), keepdim=True))


def _apex(row: Round, device: torch.device) -> Any:
    """NVIDIA's apex.optimizers, if the round may use them here; PyPI's package apex is another and does not count."""
    if row.fused == "torch":
        return None
    try:
        apex: Any = importlib.import_module("apex.optimizers")
    except ImportError:
        apex = None
    if hasattr(apex, "FusedAdam") and device.type == "cuda":
        return apex
    if row.fused == "apex":
        raise InputError(
            f"fused 'apex': NVIDIA Apex is not installed, or {device.type} is no GPU; "
            "build it from its source (PyPI's apex is an unrelated package), or give auto or torch"
        )
    return None


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
