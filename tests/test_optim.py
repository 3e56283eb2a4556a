"""Schedules against torch's own; what decays and what does not."""

import pytest
import torch

from aliprod import optim
from aliprod.model import Recogniser
from aliprod.recipe import Round

STEPS = 5  # an epoch


def ours(row: Round) -> list[float]:
    return [optim.rate(row, epoch + step / STEPS, 1 / STEPS) for epoch in range(row.epochs) for step in range(STEPS)]


def theirs(row: Round, make, every: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=row.lr)
    scheduler, rates = make(optimizer), []
    for step in range(row.epochs * STEPS):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if (step + 1) % every == 0:
            scheduler.step()
    return rates


def test_the_step_schedule_is_torchs():
    row = Round(name="a", epochs=10, lr=0.1, lr_step=3, lr_factor=0.4)
    assert ours(row) == pytest.approx(theirs(row, lambda o: torch.optim.lr_scheduler.StepLR(o, 3, 0.4), STEPS))


def test_the_cosine_schedule_is_torchs():
    row = Round(name="a", epochs=4, lr=0.1, schedule="cosine")
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR
    assert ours(row) == pytest.approx(theirs(row, lambda o: cosine(o, 4 * STEPS), 1))


def test_the_warm_up_rises_to_the_rate_in_equal_steps():
    row = Round(name="a", epochs=2, lr=1.0, warmup_epochs=0.8)
    assert ours(row)[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])


def test_only_matrices_decay_and_the_backbone_has_its_own_rate():
    model = Recogniser("test_resnet", 3, 64)
    model.freeze(1)
    optimizer = optim.optimizer(model, Round(name="a", weight_decay=0.1, backbone_lr_factor=0.1))
    optim.set_rate(optimizer, 0.5)
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            assert id(parameter) not in groups
            continue
        assert groups[id(parameter)]["weight_decay"] == (0.1 if parameter.ndim > 1 else 0.0)
        assert groups[id(parameter)]["lr"] == (0.05 if name.startswith("backbone") else 0.5)
