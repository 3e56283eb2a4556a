"""What a promotion measures: embeddings alone, without their head, or answers as they are served; and what is chance.

GAP and MAP of rounds over different classes cannot be compared. How well embeddings tell all classes apart can, on the
same photographs; so can answers, on the classes that both models know. Embeddings are normalised, so the nearest is
that of the highest cosine.
"""

from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch.nn.functional import normalize

from aliprod import features, gallery, manifest, metrics
from aliprod.images import Images
from aliprod.model import Recogniser, Saved
from aliprod.prediction import predict

CHUNK = 16384  # embeddings of the gallery at a time


def served(saved: Saved, table: pd.DataFrame, data: str | Path, cache: str | Path) -> pd.DataFrame:
    """What a model that is served answers first to each photograph of `table`: its key and `answer`, a class id; those
    it can read. As prediction.recognise answers: in fp32, calibrated, what is enrolled fused with the head."""
    if table.empty:
        return table[manifest.COLUMNS].assign(answer="")
    whole, fuse = gallery.answering(saved, "both")
    images = Images(manifest.paths(table, data), None, saved.model.preprocessing)
    source = features.compute(saved.model, images, cache, "fp32")
    answers = predict(saved.model, source, top=1, temperature=saved.temperature, fuse=fuse)
    keys = table.iloc[answers.index][manifest.COLUMNS].reset_index(drop=True)
    return keys.assign(answer=whole.classes["class_id"].to_numpy()[answers["pred"]])


@torch.inference_mode()
def answers(
    model: Recogniser, gallery: pd.DataFrame, queries: pd.DataFrame, data: str | Path, cache: str | Path, precision: str
) -> pd.DataFrame:
    """What class each photograph of `queries` is nearest to: its key, label, ncm and nn; those it can read.

    ncm is the class of `gallery` with the nearest mean, nn that of the nearest single photograph; both, like label, are
    rows of gallery's class index. Queries of classes that the gallery lacks are left out. Memory is one chunk of the
    gallery, the queries and one embedding a class.
    """
    classes = manifest.class_index(gallery)
    known = queries[manifest.labels(queries, classes) >= 0].reset_index(drop=True)
    stored, asked = (
        features.compute(
            model,
            Images(manifest.paths(table, data), manifest.labels(table, classes), model.preprocessing),
            cache,
            precision,
        )
        for table in (gallery, known)
    )
    assert stored.labels is not None
    wanted = _normalised(asked, asked.rows, model)  # (Q, D)
    means = torch.zeros(len(classes), model.width, device=model.device)  # (C, D)
    best = torch.full((len(wanted),), -2.0, device=model.device)  # cosine of the nearest so far
    nearest = torch.zeros(len(wanted), dtype=torch.int64, device=model.device)  # its label
    for start in range(0, len(stored.rows), CHUNK):
        rows = stored.rows[start : start + CHUNK]
        chunk = _normalised(stored, rows, model)
        labels = torch.from_numpy(stored.labels[rows]).to(model.device)
        means.index_add_(0, labels, chunk)
        for at in range(0, len(wanted), CHUNK):
            here = slice(at, at + CHUNK)
            cosine, place = (wanted[here] @ chunk.T).max(dim=1)
            closer = cosine > best[here]
            best[here] = torch.where(closer, cosine, best[here])
            nearest[here] = torch.where(closer, labels[place], nearest[here])
    means = normalize(means)
    ncm = [(wanted[at : at + 1024] @ means.T).argmax(dim=1) for at in range(0, len(wanted), 1024)]
    table = known.iloc[asked.rows].reset_index(drop=True)
    table["label"] = asked.labels[asked.rows]  # type: ignore[index]
    table["ncm"] = torch.cat(ncm).cpu().numpy()
    table["nn"] = nearest.cpu().numpy()
    return table


def scores(table: pd.DataFrame) -> dict[str, float]:
    """Accuracy and MAP by the nearest class mean and by the nearest neighbour, each in [0, 1]."""
    labels = table["label"].to_numpy()
    return {
        f"{kind}_{name}": score
        for kind in ("ncm", "nn")
        for name, score in {
            "accuracy": float(np.mean(labels == table[kind].to_numpy())),
            "map": metrics.mean_class_accuracy(labels, table[kind].to_numpy()),
        }.items()
    }


def chance(
    labels: np.ndarray, answers: np.ndarray, confidence: float = 0.95, resamples: int = 1000, seed: int = 0
) -> float:
    """The MAP up to which answers (N,) are hardly better than chance, for labels (N,) of the same photographs.

    That is what the same answers reach, with `confidence`, given to the photographs in any order; and at least twice
    their mean then, or 0.05 more where that is less, as many photographs make the smallest difference sure.
    """
    rng = np.random.default_rng(seed)
    shuffled = [metrics.mean_class_accuracy(labels, rng.permutation(answers)) for _ in range(resamples)]
    mean = float(np.mean(shuffled))
    return max(float(np.quantile(shuffled, confidence)), min(2 * mean, mean + 0.05))


def _normalised(source: features.Features, rows: np.ndarray, model: Recogniser) -> torch.Tensor:
    return normalize(torch.from_numpy(source.store.take(source.codes[rows])).to(model.device))


def paired_bootstrap(
    first: np.ndarray, second: np.ndarray, labels: np.ndarray, resamples: int = 10_000, seed: int = 0
) -> tuple[float, np.ndarray]:
    """By how much MAP is higher with the answers `second` than with `first`, both to the same photographs (N,).

    Returns the difference, and what it is in each resample (R,): over as many classes as there are, drawn with
    replacement, each with its pair of accuracies. Classes of equal differences are drawn together, as one multinomial
    count, so that neither time nor memory grows with resamples times classes.
    """
    classes = int(labels.max()) + 1
    paired = [metrics.class_accuracy(labels, answers, classes) for answers in (first, second)]
    difference = paired[1] - paired[0]
    values, counts = np.unique(difference[~np.isnan(difference)], return_counts=True)
    drawn = np.random.default_rng(seed).multinomial(counts.sum(), counts / counts.sum(), size=resamples)  # (R, V)
    return float(values @ counts / counts.sum()), drawn @ values / counts.sum()
