"""Predictions: the one table that metrics, cleaning, reports and inference read."""

import contextlib
import os
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch.nn.utils import parametrize

from aliprod import InputError, features, folders, gallery, manifest, parameters
from aliprod.features import BATCH_SIZE, Features
from aliprod.hierarchy import Tree
from aliprod.images import Images
from aliprod.model import Recogniser, Saved, autocast
from aliprod.progress import progress
from aliprod.taxonomy import Levels

TOP = 5  # answers kept for each photograph


@torch.inference_mode()
def predict(
    model: Recogniser,
    source: Images | Features,
    precision: str = "fp32",
    top: int = TOP,
    levels: Levels | None = None,
    embedding: bool = False,
    temperature: float | np.ndarray = 1.0,
    fuse: gallery.Fuse | None = None,
) -> pd.DataFrame:
    """The model's answers for every readable row of `source`; the index is the row.

    `temperature`, one for all or one for each row of `source`, divides the logits before their softmax.

    Columns: pred and confidence (its softmax probability), pred_2, confidence_2 ... down to `top` or the number of
    classes; where the source has labels also label and loss (-log of its probability). With `levels` also safe, the
    class of least expected distance in the tree; path_1, path_2 ..., the probability of the answer's ancestor at each
    level above the classes; and level_1, level_2 ..., what the model's branches answer, if it has any. With `embedding`
    also a column of that name, of arrays (D,). `fuse` makes of embeddings (B, D) and divided logits (B, C) the
    log-probabilities (B, C + E) that all answers are then of; Gallery has two such methods. No more than one batch of
    logits exists at a time.
    """
    tree = Tree(levels, model.device) if levels else None
    temperatures = np.broadcast_to(np.asarray(temperature, dtype=np.float32), len(source.paths))
    extra: dict[str, list[np.ndarray]] = defaultdict(list)
    model.eval()
    chunks = [source.rows[start : start + BATCH_SIZE] for start in range(0, len(source.rows), BATCH_SIZE)]
    rows, answers, confidences, losses = [], [], [], []
    with progress(total=len(source.rows), desc="predicting", unit="img") as bar, parametrize.cached():
        for batch, batch_rows in source.batches(chunks):
            with autocast(model.device, precision):
                embeddings = source.embed(model, batch.to(model.device, non_blocking=True))
                logits = model.head(embeddings)
                branches = model.branches(embeddings) if tree and model.branches else {}
            logits = logits.float()  # (B, C)
            scale = torch.from_numpy(temperatures[batch_rows]).to(model.device)[:, None]  # (B, 1)
            if fuse:
                logits = scale * fuse(embeddings, logits / scale)
            best = logits.topk(min(top, logits.shape[1]), dim=1)  # before the division, which could make ties
            logits /= scale
            normaliser = logits.logsumexp(dim=1, keepdim=True)  # (B, 1)
            rows.append(batch_rows)
            answers.append(best.indices.cpu().numpy())
            confidences.append((best.values / scale - normaliser).exp().cpu().numpy())
            if source.labels is not None:
                labels = torch.from_numpy(source.labels[batch_rows]).to(model.device)
                losses.append((normaliser - logits.gather(1, labels[:, None]))[:, 0].cpu().numpy())
            if tree:
                marginals = tree.sums((logits - normaliser).exp())
                extra["safe"].append(tree.least_risk(marginals).cpu().numpy())
                for level, nodes in enumerate(marginals[:-1], start=1):
                    ancestor = tree.ancestors[level - 1][best.indices[:, :1]]
                    extra[f"path_{level}"].append(nodes.gather(1, ancestor)[:, 0].cpu().numpy())
            for level, answer in branches.items():
                extra[f"level_{level}"].append(answer.argmax(dim=1).cpu().numpy())
            if embedding:
                extra["embedding"].append(embeddings.float().cpu().numpy())
            bar.update(len(batch_rows))
    table = pd.DataFrame(index=np.concatenate(rows) if rows else np.empty(0, dtype=np.int64))
    if source.labels is not None:
        table["label"] = source.labels[table.index]
        table["loss"] = np.concatenate(losses) if losses else np.empty(0, dtype=np.float32)
    width = answers[0].shape[1] if answers else min(top, model.num_classes)
    preds = np.concatenate(answers) if answers else np.empty((0, width), dtype=np.int64)
    scores = np.concatenate(confidences) if confidences else np.empty((0, width), dtype=np.float32)
    for place in range(width):
        suffix = "" if place == 0 else f"_{place + 1}"
        table[f"pred{suffix}"], table[f"confidence{suffix}"] = preds[:, place], scores[:, place]
    whole = {name: np.concatenate(parts) for name, parts in extra.items()}
    return table.assign(**{name: list(values) if values.ndim > 1 else values for name, values in whole.items()})


def predict_table(
    saved: Saved, table: pd.DataFrame, classes: pd.DataFrame, data: str | Path, cache: str | Path, precision: str
) -> pd.DataFrame:
    """The answers of a saved model for the readable rows of `table`; the index is the row.

    Labels and answers are rows of `classes`; an answer that is not among them is len(classes). Embeddings are kept in
    `cache`. InputError if there are classes that the model does not know.
    """
    labels = manifest.labels(table, saved.classes)
    if (labels < 0).any():
        unknown = table.loc[labels < 0, "class_id"]
        raise InputError(f"the model does not know {unknown.nunique()} of the classes, such as {unknown.iloc[0]}")
    images = Images(manifest.paths(table, data), labels, saved.model.preprocessing)
    answers = predict(saved.model, features.compute(saved.model, images, cache, precision), precision)
    ours = manifest.labels(saved.classes, classes)
    ours = np.where(ours < 0, len(classes), ours)
    columns = answers.filter(regex="^(label|pred)").columns
    answers[columns] = ours[answers[columns].to_numpy()]
    return answers


def recognise(
    saved: Saved,
    files: list[str] | list[bytes],
    top: int = TOP,
    sure: float = 0.0,
    using: str = "both",
    embedding: bool = False,
    max_pixels: int | None = None,
) -> pd.DataFrame:
    """What each image shows, for people and programs: one row an image, in order.

    files: paths, or the bytes of image files. Columns class_ids, names, paths, confidences: lists, surest first;
    answer and certainty: the deepest node of the product tree on the way to the first of them whose probability is at
    least `sure`, as a path, "" where not even the first level's is, and that probability; unknown: whether the first
    confidence is below the model's threshold for products that it knows; embedding: what the head's answer comes from,
    a list of floats, empty unless asked for; error: "" or why the image cannot be read, the lists then being empty.
    Without a tree the only node is the class. InputError if `top` or `sure` is out of range.
    """
    if top < 1:
        raise InputError(f"top {top}: must be at least 1")
    if not 0 <= sure <= 1:
        raise InputError(f"sure {sure}: must be from 0 to 1")
    saved, fuse = gallery.answering(saved, using)
    images = Images(files, None, saved.model.preprocessing, max_pixels=max_pixels)
    settings: dict[str, Any] = {"levels": saved.levels, "temperature": saved.temperature, "fuse": fuse}
    answers = predict(saved.model, images, top=top, embedding=embedding, **settings)
    preds = answers.filter(regex="^pred").to_numpy()
    columns = {
        column: list(saved.classes[source].to_numpy()[preds].tolist())
        for column, source in {"class_ids": "class_id", "names": "name", "paths": "path"}.items()
    }
    confidences = answers.filter(regex="^confidence").astype(float).to_numpy().tolist()
    table = pd.DataFrame({**columns, "confidences": confidences}, index=answers.index)
    table = table.join(_certain(saved, answers, sure))
    table["unknown"] = answers["confidence"] < saved.unknown_below
    table["embedding"] = [values.tolist() for values in answers["embedding"]] if "embedding" in answers else None
    table = table.reindex(range(len(files)))
    for column in (*columns, "confidences", "embedding"):
        table[column] = [value if isinstance(value, list) else [] for value in table[column]]
    table["unknown"] = table["unknown"].eq(True)  # not of what cannot be read
    return table.fillna({"answer": "", "certainty": 0.0}).assign(
        error=[images.corrupt.get(row, "") for row in range(len(files))]
    )


def _certain(saved: Saved, answers: pd.DataFrame, sure: float) -> pd.DataFrame:
    preds = answers["pred"].to_numpy()
    ancestors, names = np.arange(len(saved.classes))[None], [saved.classes["class_id"].to_numpy()]
    if saved.levels:
        ancestors, names = saved.levels.ancestors, saved.levels.names
    path = answers.filter(regex="^(path_|confidence$)").to_numpy(dtype=np.float64)
    path = np.column_stack([np.ones(len(preds)), path[:, 1:], path[:, :1]])  # (N, L + 1), the root first
    depth = (path[:, 1:] >= sure).sum(axis=1)
    answer = np.full(len(preds), "", dtype=object)
    for level, nodes in enumerate(names, start=1):
        here = depth == level
        answer[here] = nodes[ancestors[level - 1][preds[here]]]
    return pd.DataFrame({"answer": answer, "certainty": path[np.arange(len(preds)), depth]}, index=answers.index)


def image_files(images: str) -> list[str]:
    """The files meant by a folder (all pictures in it, at any depth), a .csv with a column `file` (relative to where
    the CSV lies), or paths separated by spaces (quoted as in a shell where they hold some). InputError if none.

    Prints a line on what a folder holds beside pictures.
    """
    left_out = ""
    if kind(images) == "folder":
        found, left_out = folders.photographs(images)
    elif images.endswith(".csv"):
        found = manifest.read_files(images)["file"].tolist()
    else:
        found = parameters.paths("images", images)
        if missing := [file for file in found if kind(file) != "file"]:
            raise InputError(f"images: no such file or folder: {missing[0]}")
    if not found:
        raise InputError("; ".join(filter(None, [f"images {images}: no images there", left_out])))
    if left_out:
        print(left_out, flush=True)
    if strange := [file for file in found if not file.isascii() and file != os.fsencode(file).decode(errors="replace")]:
        raise InputError(f"images: {strange[0]!r}: its name is not UTF-8, which no table could hold; rename it")
    return found


def kind(path: str) -> str:
    """What is there: "folder", "file", or "" for neither, be it that there can be no such name."""
    with contextlib.suppress(OSError):  # too long: it may be many names
        return "folder" if Path(path).is_dir() else "file" if Path(path).is_file() else ""
    return ""


def wide(files: list[str], answers: pd.DataFrame) -> pd.DataFrame:
    """What `recognise` gives as one flat row a file: file, class_id, name, path, confidence, class_id_2 ... error."""
    columns: dict[str, Any] = {"file": files}
    names = {"class_ids": "class_id", "names": "name", "paths": "path", "confidences": "confidence"}
    for place in range(answers["class_ids"].str.len().max()):
        for source, name in names.items():
            columns[f"{name}_{place + 1}" if place else name] = answers[source].str.get(place)
    return pd.DataFrame(columns | {name: answers[name] for name in ("answer", "certainty", "unknown", "error")})
