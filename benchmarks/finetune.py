"""One epoch of training all of tf_efficientnet_lite0 on photographs, without validation."""

import copy
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import timm
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from aliprod import assembly, manifest, training
from aliprod.model import Recogniser
from aliprod.recipe import Round
from benchmarks.images import WORKERS, Photographs, peers_opened
from benchmarks.stopwatch import race


@dataclass(frozen=True)
class Task:
    """What every way is given: a round, the network it starts from, and the photographs."""

    row: Round
    model: Recogniser
    classes: pd.DataFrame
    train: pd.DataFrame
    val: pd.DataFrame
    data: Path

    def ours(self, precision: str) -> tuple[Recogniser, float]:
        """The network trained by the library, on an empty cache, and the last epoch's loss."""
        row, model = self.row.model_copy(update={"precision": precision}), copy.deepcopy(self.model)
        with tempfile.TemporaryDirectory() as folder:
            source = assembly.inputs(model, row, self.train, self.classes, self.data, folder, row.augment)
            *_, last = training.train(model, row, source, None, folder)
        return model, last.train["loss"]

    def network(self) -> nn.Sequential:
        """The same network and weights, as timm and torch make them: backbone and head, contiguous."""
        backbone = timm.create_model(self.model.backbone_name, num_classes=0)
        backbone.load_state_dict(self.model.backbone.state_dict())
        return nn.Sequential(backbone, copy.deepcopy(self.model.head)).to(self.model.device)

    def optimizer(self, network: nn.Module) -> torch.optim.Optimizer:
        """The round's, as torch makes it."""
        return torch.optim.AdamW(network.parameters(), self.row.lr, weight_decay=self.row.weight_decay)

    def loader(self, table: pd.DataFrame, opened: Callable, shuffle: bool = False) -> DataLoader:
        """A DataLoader of a table's photographs; a shuffled one leaves out the last, smaller batch, as ours does."""
        photographs = Photographs(manifest.paths(table, self.data), manifest.labels(table, self.classes), opened)
        return DataLoader(photographs, self.row.batch_size, shuffle=shuffle, drop_last=shuffle, num_workers=WORKERS)


def task(row: Round, data: Path, limit: int) -> Task:
    """The task of training by `row` on `limit` random train photographs of the folder `data`."""
    tables = assembly.tables(row, data)
    model = assembly.model(row, len(tables.classes), row.init)
    return Task(row, model, tables.classes, tables.train.sample(frac=1, random_state=0)[:limit], tables.val, data)


def measure(data: Path, limit: int = 256) -> Iterator[str]:
    """Yields one table, for an epoch of `limit` train photographs."""
    work = task(Round(name="finetune", batch_size=32, weight_decay=0.01), data, limit)
    ways = {
        "ours, bf16": lambda: work.ours("bf16")[1],
        "ours, fp32": lambda: work.ours("fp32")[1],
        "peers': timm, DataLoader, AdamW, fp32": lambda: peers(work),
    }
    tuning = race(ways)
    losses = tuning.results
    assert max(losses.values()) < 1.1 * min(losses.values()), losses
    notes = {way: f"mean loss {loss:.3f}" for way, loss in losses.items()}
    yield tuning.table(f"finetune: an epoch of {len(work.train):,} photographs", notes)


def peers(work: Task) -> float:
    """The loop that everyone writes; returns the mean loss."""
    network = work.network().train()
    return epoch(network, work.loader(work.train, peers_opened, shuffle=True), work.optimizer(network))


def epoch(network: nn.Module, loader: DataLoader, optimizer: torch.optim.Optimizer) -> float:
    """Trains by every batch once; returns their mean loss."""
    device, total = next(network.parameters()).device, 0.0
    for inputs, labels in loader:
        loss = cross_entropy(network(inputs.to(device)), labels.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item()
    return total / len(loader)
