"""Eight epochs of training a linear head on a frozen tf_efficientnet_lite0, without validation."""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from aliprod import assembly
from aliprod.model import Recogniser
from aliprod.prediction import predict
from aliprod.recipe import Round
from benchmarks.finetune import Task, epoch, task
from benchmarks.images import peers_opened, seed_opened
from benchmarks.stopwatch import race

ROUND = Round(name="frozen", freeze="all", epochs=8, batch_size=32, lr=3e-3, lr_step=8, weight_decay=0.01)


def measure(data: Path, limit: int = 256) -> Iterator[str]:
    """Yields one table, for a round of `limit` train photographs from an empty cache."""
    work = task(ROUND, data, limit)
    ways = {
        "ours, bf16": lambda: work.ours("bf16")[0],
        "ours, fp32": lambda: work.ours("fp32")[0],
        "peers': embeddings in a TensorDataset, fp32": lambda: peers(work),
        "seed's: the backbone every epoch, in training mode, fp32": lambda: seed(work),
    }
    training = race(ways)
    trained = list(training.results.values())
    scores = [
        *(_our_accuracy(work, model) for model in trained[:2]),
        _accuracy(work, trained[2], peers_opened),
        _accuracy(work, trained[3], seed_opened),
    ]
    assert max(scores[:3]) - min(scores[:3]) < 0.1, scores
    notes = {way: f"val accuracy {score:.1%}" for way, score in zip(ways, scores, strict=True)}
    yield training.table(f"frozen: a round of 8 epochs of {len(work.train):,} photographs", notes)


def peers(work: Task) -> nn.Sequential:
    """Embeds every photograph once, then trains the head on what is kept in memory."""
    network = work.network().eval()
    backbone, head = network
    loader = work.loader(work.train, peers_opened)
    with torch.inference_mode():
        batches = [(backbone(images.to(work.model.device)).cpu(), labels) for images, labels in loader]
    embeddings, labels = (torch.cat(parts).clone() for parts in zip(*batches, strict=True))
    loader = DataLoader(TensorDataset(embeddings, labels), ROUND.batch_size, shuffle=True, drop_last=True)
    optimizer = work.optimizer(head)
    for _ in range(ROUND.epochs):
        epoch(head, loader, optimizer)
    return network


def seed(work: Task) -> nn.Sequential:
    """Runs the backbone on BGR anew every epoch, without gradients but with batch statistics that drift."""
    network = work.network().train()
    backbone, head = network
    backbone.requires_grad_(False)
    loader, optimizer = work.loader(work.train, seed_opened, shuffle=True), work.optimizer(head)
    for _ in range(ROUND.epochs):
        epoch(network, loader, optimizer)
    return network


def _our_accuracy(work: Task, model: Recogniser) -> float:
    with tempfile.TemporaryDirectory() as folder:
        answers = predict(model, assembly.inputs(model, ROUND, work.val, work.classes, work.data, folder, "none"))
    return (answers["label"] == answers["pred"]).mean()


@torch.inference_mode()
def _accuracy(work: Task, network: nn.Sequential, opened: Callable) -> float:
    network.eval()
    hits = [
        network(images.to(work.model.device)).argmax(dim=1).cpu() == labels
        for images, labels in work.loader(work.val, opened)
    ]
    return torch.cat(hits).float().mean().item()
