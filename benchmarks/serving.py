"""200 requests at once to a model that MLflow serves, over loopback, against the model itself called in a loop."""

import base64
import json
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd

from aliprod import assembly, manifest
from aliprod.model import load
from aliprod.prediction import recognise
from aliprod.recipe import Round
from benchmarks.tables import titled
from tracking import models, parts

REQUESTS = 200
BATCH = 16  # images in each of the larger requests
ROW = Round(name="serving", init="imagenet")


def measure(data: Path, limit: int = 296) -> Iterator[str]:
    """Yields a table for requests of one image and one for requests of 16, out of `limit` val photographs."""
    tables = assembly.tables(ROW, data)
    images = [Path(file).read_bytes() for file in manifest.paths(tables.val, data)[:limit]]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        network = assembly.model(ROW, len(tables.classes), ROW.init, tables.levels)
        network.save(folder / "saved", tables.classes, tables.tree, {})
        example = manifest.paths(tables.val, data)[0]
        mlflow.pyfunc.save_model(folder / "served", **models.form(str(folder / "saved"), example))
        port = parts.free_port()
        where = f"http://127.0.0.1:{port}"
        command = f"-m mlflow models serve -m {folder / 'served'} --env-manager local --port {port}"
        saved = load(folder / "saved")
        with parts.part(
            "serving", [sys.executable, *command.split()], lambda: parts.answers(where + "/ping"), where, folder
        ):
            for size, repeats in ((1, 3), (BATCH, 1)):
                rows = np.arange(REQUESTS * size).reshape(REQUESTS, size) % len(images)
                batches = [[images[row] for row in batch] for batch in rows]
                bodies = [body(batch) for batch in batches]
                expected = [recognise(saved, batch)["class_ids"].tolist() for batch in batches]
                rounds = []
                for _ in range(repeats):
                    alone, _ = timed(lambda batch: recognise(saved, batch), batches, 1)
                    served, answers = timed(lambda text: ask(where, text), bodies, 1)
                    crowd, crowded = timed(lambda text: ask(where, text), bodies, REQUESTS)
                    assert answers == crowded == expected, "an answer is lost, or another's"
                    rounds.append({"bare": alone, "served": served, "crowd": crowd})
                yield table(rounds, size)


def body(images: list[bytes]) -> bytes:
    """The JSON that asks what these images show."""
    rows = [[base64.b64encode(image).decode()] for image in images]
    return json.dumps({"dataframe_split": {"columns": ["image"], "data": rows}}).encode()


def ask(where: str, text: bytes) -> list[list[str]]:
    """The classes of each image of a request, surest first."""
    request = urllib.request.Request(where + "/invocations", text, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=600) as answer:
        return [row["class_ids"] for row in json.load(answer)["predictions"]]


def timed(work: Callable[[Any], Any], requests: list[Any], at_once: int) -> tuple[np.ndarray, list[Any]]:
    """When each request began and ended (N, 2), seconds, with so many under way at a time; and the answers."""
    start = time.perf_counter()

    def one(request: Any) -> tuple[float, float, Any]:
        began = time.perf_counter() - start
        answer = work(request)
        return began, time.perf_counter() - start, answer

    with ThreadPoolExecutor(at_once) as pool:
        began, ended, answers = zip(*pool.map(one, requests), strict=True)
    return np.column_stack([began, ended]), list(answers)


def table(rounds: list[dict[str, np.ndarray]], size: int) -> str:
    """Markdown: images a second and seconds a request, in brackets the median over the rounds of their ratios to the
    bare model's. It answers requests that come at once one after the other, so the last of them waits for all."""
    rows = {}
    for way, served, since in (("one by one", "served", 1), (f"{REQUESTS} at once", "crowd", 0)):
        bare, ours = (
            np.array(
                [
                    [len(times) * size / times[:, 1].max(), *np.percentile(times @ [-since, 1], (50, 99))]
                    for times in (spans[name] for spans in rounds)
                ]
            )
            for name in ("bare", served)
        )
        plain, medians, ratios = np.median(bare, axis=0), np.median(ours, axis=0), np.median(ours / bare, axis=0)
        rows[f"the bare model, {way}"] = [f"{value:.3g}" for value in plain]
        rows[f"served, {way}"] = [f"{value:.3g} ({ratio:.2f})" for value, ratio in zip(medians, ratios, strict=True)]
    notes = f"median of {len(rounds)} rounds; in brackets times the bare model's"
    title = f"**serving: {REQUESTS} requests, none lost** ({notes})"
    cells = pd.DataFrame.from_dict(rows, orient="index", columns=["images/s", "p50, s", "p99, s"])
    return titled(title, cells.rename_axis(f"requests of {size}"))
