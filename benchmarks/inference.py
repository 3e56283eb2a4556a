"""Answers to photographs that are decoded already: torch in its ways and what `export` writes, on two threads."""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from aliprod import export
from aliprod.exported import Exported
from aliprod.images import Images
from aliprod.metrics import mean_class_accuracy
from aliprod.model import Saved, autocast
from benchmarks.finetune import task
from benchmarks.frozen import ROUND
from benchmarks.stopwatch import race

THREADS = 2
BATCHES = {1: 8, 32: 1}  # size: of so many photographs only one is used


def measure(data: Path, limit: int = 256) -> Iterator[str]:
    """Yields a table a batch size, for at most `limit` val photographs; the model is a frozen round on so many."""
    torch.set_num_threads(THREADS)
    work = task(ROUND, data, limit)
    saved = Saved(work.ours("fp32")[0].cpu().eval(), work.classes, None, {})
    with tempfile.TemporaryDirectory() as folder:
        files, _ = export.export(saved, Path(folder) / "model.onnx", data, limit)
        exported = {name: Exported(path, THREADS) for name, path in files.items()}
    images = export.photographs(saved, data, "val", limit)
    for size, share in BATCHES.items():
        yield _table(saved, exported, images, size, share)


def _table(saved: Saved, exported: dict[str, Exported], images: Images, size: int, share: int) -> str:
    rows = images.rows[: len(images.rows) // share // size * size]
    batches = [batch for batch, _ in images.arrays(np.split(rows, len(rows) // size))]
    compiled = torch.compile(saved.model, dynamic=False)

    def torch_way(model: Callable, precision: str) -> Callable[[], np.ndarray]:
        @torch.inference_mode()
        def answers() -> np.ndarray:
            with autocast(saved.model.device, precision):
                logits = [model(torch.from_numpy(batch)) for batch in batches]
            return torch.cat(logits).float().softmax(dim=1).numpy()

        return answers

    ways = {
        "torch": torch_way(saved.model, "fp32"),
        "torch, compiled": torch_way(compiled, "fp32"),
        "torch, bf16": torch_way(saved.model, "bf16"),
        "torch, compiled, bf16": torch_way(compiled, "bf16"),
        "ONNX": lambda: np.concatenate([exported["fp32"](batch)[0] for batch in batches]),
        "ONNX, int8": lambda: np.concatenate([exported["int8"](batch)[0] for batch in batches]),
    }
    for way in ways.values():
        way()  # compiles
    answered = race(ways, rounds=5)
    preds = {way: confidences.argmax(axis=1) for way, confidences in answered.results.items()}
    labels = images.labels[rows]
    notes = {
        way: f"{len(rows) / answered.seconds[way].median():,.0f} photographs/s, MAP "
        f"{mean_class_accuracy(labels, pred):.3f}, answers as torch's {(pred == preds['torch']).mean():.1%}"
        for way, pred in preds.items()
    }
    assert (preds["ONNX"] == preds["torch"]).mean() > 0.99
    return answered.table(f"inference: {len(rows)} photographs, {size} at a time, {THREADS} threads", notes)
