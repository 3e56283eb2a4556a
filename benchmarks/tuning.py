"""What tuning a round finds: Optuna's TPE and random search of equal budget, held against the seed's schedule."""

import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd

from aliprod import assembly, recipe, report, training, tuning
from aliprod.material import Material
from aliprod.recipe import Round
from aliprod.tuning import Study
from benchmarks.finetune import task
from benchmarks.stopwatch import race
from entrypoints.command import recipe_path

TRIALS = 60  # a search
SEEDS = range(1, 6)  # of the rounds that are scored; the searches' rounds have 0
SEED = {"schedule": "step", "lr": 1e-3, "lr_step": 3, "lr_factor": 0.4}  # of the seed's frozen rounds
SEARCHES = {f"{sampler}, search {seed}": (sampler, seed) for sampler in ("tpe", "random") for seed in (1, 2, 3)}


def measure(data: Path, limit: int = 256) -> Iterator[str]:
    """Yields a table of what was found, and one of what a trial on `limit` photographs costs, with the cache or not."""
    rows = recipe.read(recipe_path("grocery"))
    table, row = rows.tuning("frozen")
    tables = assembly.tables(row, data)
    made = assembly.model(row, len(tables.classes), row.init, tables.levels)
    material = Material(row, table, tables, made, data, Path("work/features"))
    found = {"the seed's schedule": (recipe.replaced(row, SEED, "seed"), {}), "the recipe's": (row, {})}
    for title, (sampler, seed) in SEARCHES.items():
        with tempfile.TemporaryDirectory() as folder:
            study = tuning.join(f"sqlite:///{folder}/studies.db", title, row, table, {})
            study.open("none")
            trials = search(study, material, sampler, seed)
            number, score, best = study.best()
            epochs = trials["epochs"].sum() / row.epochs
            note = {"val MAP found": score, "trial": str(number), "rounds' worth of epochs": f"{epochs:.1f}"}
            found[title] = best, note
    yield (
        report.markdown(pd.DataFrame([scores(title, *each, tables, material) for title, each in found.items()])) + "\n"
    )
    yield cost(row, data, limit)


def search(study: Study, material: Material, sampler: str, seed: int) -> pd.DataFrame:
    """The study's trials, all run here."""
    for trial in study.search(TRIALS, sampler, "hyperband", seed * TRIALS):  # a draw has its search's seed and number
        for _ in trial.reports(material, threading.Event()):
            continue
        study.tell(trial)
    return study.table()


def scores(title: str, row: Round, note: dict, tables: assembly.Tables, material: Material) -> dict[str, object]:
    """A row of the table: mean and standard deviation of the highest val MAP over SEEDS."""
    best = []
    for seed in SEEDS:
        fresh = row.model_copy(update={"seed": seed})
        model = assembly.model(fresh, len(tables.classes), "random", tables.levels)  # its backbone is not asked
        with tempfile.TemporaryDirectory() as folder:
            source, val = material.inputs[row.augment]
            reports = list(training.train(model, fresh, source, val, folder, levels=tables.levels))
        best.append(max(made.val["map"] for made in reports))
    fields = ("lr", "schedule", "warmup_epochs") + (("lr_step", "lr_factor") if row.schedule == "step" else ())
    said = ", ".join(f"{name} {getattr(row, name):.3g}" if name != "schedule" else row.schedule for name in fields)
    return {"schedule": title, "MAP": f"{np.mean(best):.3f} ± {np.std(best):.3f}", "is": said, **note}


def cost(row: Round, data: Path, limit: int) -> str:
    """A trial of `limit` photographs on embeddings that the study keeps, and on photographs embedded for it alone."""
    work = task(row.model_copy(update={"hierarchy": "none", "tree_smoothing": 0.0}), data, limit)
    with tempfile.TemporaryDirectory() as kept:
        inputs = (work.row, work.train, work.classes, work.data)
        source = assembly.inputs(work.model, *inputs, kept, "none")

        def trial() -> None:
            with tempfile.TemporaryDirectory() as folder:
                for _ in training.train(work.model, work.row, source, None, folder):
                    continue

        ways = {"embeddings kept by the study": trial, "embeddings computed for each trial": lambda: work.ours("bf16")}
        title = f"tuning: a trial of {work.row.epochs} epochs of {len(work.train):,} photographs, the head alone"
        return race(ways).table(title, dict.fromkeys(ways, ""))
