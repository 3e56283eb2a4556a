"""Schedules against torch's own; what decays and what does not."""

import pytest
import torch

from aliprod import InputError, optim
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


def published(rule: str, weights: torch.Tensor, gradients: list[torch.Tensor]) -> torch.Tensor:
    """Adam_GC and SGD_GC as published, without weight decay, written out for one matrix at rate 0.1."""
    weights, m, v = weights.clone(), torch.zeros_like(weights), torch.zeros_like(weights)
    for step, gradient in enumerate(gradients, start=1):
        g = gradient - gradient.mean(dim=tuple(range(1, gradient.ndim)), keepdim=True)
        if rule == "sgd":
            m = 0.9 * m + g if step > 1 else g
            weights -= 0.1 * m
        else:
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
            weights -= 0.1 * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
    return weights


@pytest.mark.parametrize("rule", ["adam", "sgd", "adamw"])
@pytest.mark.parametrize("shape", [(5, 4), (5, 3, 2, 2)])
def test_gradient_centralization_is_the_published_one(rule, shape):
    model = Recogniser("test_resnet", 3, 64)
    model.freeze("all")
    model.head = torch.nn.Linear(2, 2, bias=False)
    model.head.weight = torch.nn.Parameter(torch.randn(shape))
    start = model.head.weight.detach().clone()
    optimizer = optim.optimizer(model, Round(name="a", optimizer=f"{rule}_gc", lr=0.1))
    gradients = [torch.randn(shape) for _ in range(5)]
    for gradient in gradients:
        model.head.weight.grad = gradient.clone()
        optimizer.step()
    torch.testing.assert_close(model.head.weight.detach(), published(rule, start, gradients))


def test_biases_are_not_centralized():
    model = Recogniser("test_resnet", 3, 64)
    model.freeze("all")
    optimizer = optim.optimizer(model, Round(name="a", optimizer="sgd_gc", lr=0.1))
    before = model.head.bias.detach().clone()
    model.head.bias.grad = torch.ones(3)
    optimizer.step()
    torch.testing.assert_close(model.head.bias.detach(), before - 0.1)


def test_a_round_that_insists_on_apex_is_refused_without_it():
    model = Recogniser("test_resnet", 3, 64)
    with pytest.raises(InputError, match=r"fused 'apex': NVIDIA Apex is not installed, or cpu is no GPU"):
        optim.optimizer(model, Round(name="a", fused="apex"))
    assert isinstance(optim.optimizer(model, Round(name="a", fused="auto")), torch.optim.AdamW)


@pytest.mark.parametrize("rule", ["adam", "adamw", "sgd", "adam_gc", "adamw_gc", "sgd_gc"])
def test_a_step_whose_gradients_overflow_is_skipped_and_nothing_else(rule):
    heads = [torch.nn.Linear(4, 3) for _ in range(2)]
    heads[1].load_state_dict(heads[0].state_dict())
    start = heads[0].weight.detach().clone()
    optimizers = []
    for head in heads:
        model = Recogniser("test_resnet", 3, 64)
        model.freeze("all")
        model.head = head
        optimizers.append(optim.optimizer(model, Round(name="a", optimizer=rule, lr=0.1)))
    scaler = torch.amp.GradScaler("cpu")
    for number in range(4):
        gradients = [torch.randn(3, 4), torch.randn(3)]
        overflows = number in (0, 2)  # the first step is where momentum begins
        for head, scale in zip(heads, (scaler.scale(torch.ones(())).item(), 1.0), strict=True):
            for parameter, gradient in zip(head.parameters(), gradients, strict=True):
                parameter.grad = scale * (torch.full_like(gradient, torch.inf) if overflows else gradient)
        scaler.step(optimizers[0])
        scaler.update()
        if not overflows:
            optimizers[1].step()
        assert number or torch.equal(heads[0].weight, start)
    for ours, expected in zip(heads[0].parameters(), heads[1].parameters(), strict=True):
        torch.testing.assert_close(ours, expected)
