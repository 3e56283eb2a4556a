"""What each rule of cleaning finds, and what it is worth, on catalogues of which a fifth is filed wrongly.

Photographs are judged in-sample, by models trained on the very labels they judge, and cross-fitted, by heads trained on
the other photographs. What is left trains the same frozen round, scored on val, where all labels are right.
"""

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from aliprod import assembly, catalogue, cleaning, crossfit, manifest, metrics, training
from aliprod.model import Saved
from aliprod.prediction import predict_table
from aliprod.recipe import Round, read
from benchmarks.tables import titled
from entrypoints.command import recipe_path

SEEDS, NOISE = (0, 1, 2), 0.2  # of the catalogues
FOLDS, LEAST = 5, 10
WORK = Path("work")
FROZEN = read(recipe_path("demo")).row("frozen")
VOTERS = [
    FROZEN,
    FROZEN.model_copy(update={"head": "cosine", "loss": "focal", "seed": 1}),
    FROZEN.model_copy(update={"head": "subcenter_arcface", "seed": 2}),
]
FINETUNED = Round(name="finetuned", precision="bf16", batch_size=32, schedule="cosine", warmup_epochs=0.5)
RULES = {  # and how many models judge
    "misclassified": (cleaning.misclassified(0.92), 1),
    "disagreement, 2 of 3": (cleaning.disagreement(2), 3),
    "confident": (cleaning.confident(), 1),
}


@dataclass(frozen=True)
class Shop:
    """A catalogue, the rows of it that are cleaned, and which of them are filed wrongly (N,)."""

    seed: int
    data: Path
    tables: assembly.Tables
    train: pd.DataFrame
    truth: pd.DataFrame
    wrong: np.ndarray

    def trained(self, row: Round, table: pd.DataFrame) -> Saved:
        """The model that a round makes of these rows."""
        levels = self.tables.levels
        model = assembly.model(row, len(self.tables.classes), row.init, levels)
        rows = (table, self.tables.classes, self.data, WORK / "features")
        source = assembly.inputs(model, row, *rows, row.augment)
        with tempfile.TemporaryDirectory() as folder:
            for _ in training.train(model, row, source, None, folder, levels=levels):
                pass
        return Saved(model, self.tables.classes, self.tables.tree, {"round": row.model_dump()})

    def answers(self, saved: Saved, table: pd.DataFrame, folds: int = 0) -> pd.DataFrame:
        """What a model says to these rows, or with `folds` what heads trained on the others say."""
        rows = (table, self.tables.classes, self.data, WORK / "features", FROZEN.precision)
        return crossfit.answers(saved, *rows, folds, self.seed) if folds else predict_table(saved, *rows)

    def judged(self, row: Round) -> tuple[Saved, pd.DataFrame]:
        """The model that a round makes of the wrong labels, and what it says to them."""
        saved = self.trained(row, self.train)
        return saved, self.answers(saved, self.train)

    def score(self, rule: cleaning.Rule, predictions: list[pd.DataFrame]) -> dict[str, float]:
        """How well a rule finds the wrong labels, and val's MAP after a frozen round on what it leaves."""
        kept, dropped = cleaning.clean(self.train, predictions, rule, least=LEAST, seed=self.seed)
        found = cleaning.detection(self.train, dropped, self.truth)
        answers = self.answers(self.trained(FROZEN, kept), self.tables.val)
        return found | {"dropped": len(dropped) / len(self.train), "MAP": metrics.summary(answers)["map"]}


def measure(limit: int = 100_000, finetuned: tuple[int, ...] = ()) -> Iterator[str]:
    """Yields one table. The judges are heads on a frozen network; and networks trained on the wrong labels for each of
    `finetuned` epochs, minutes each, in which cross-fitted heads too read embeddings that know these labels."""
    judges = {"frozen": VOTERS} | {
        f"finetuned, {epochs} epochs": [FINETUNED.model_copy(update={"epochs": epochs})] for epochs in finetuned
    }
    yield _table(pd.concat([_rows(_shop(seed, limit), judges) for seed in SEEDS]))


def _shop(seed: int, limit: int) -> Shop:
    data = WORK / f"noisy-{seed}"
    truth = catalogue.render(data, noise=NOISE, seed=seed)
    tables = assembly.tables(FROZEN, data)
    train = tables.train.sample(frac=1, random_state=0)[:limit].sort_index().reset_index(drop=True)
    known = train.merge(truth, on=manifest.COLUMNS)
    return Shop(seed, data, tables, train, truth, (known["class_id"] != known["true_class_id"]).to_numpy())


def _rows(shop: Shop, judges: dict[str, list[Round]]) -> pd.DataFrame:
    """A row a way of cleaning. Its cost is the processor's time for training its judges and judging, those who are
    frozen reading cached embeddings, as a multiple of the first way's."""
    unread = [pd.DataFrame(index=shop.train.index)]
    rows = {
        ("", "none", ""): {"dropped": 0.0, "MAP": shop.score(lambda _: np.full(len(shop.train), ""), unread)["MAP"]},
        ("", "the truth", ""): shop.score(lambda _: np.where(shop.wrong, "wrong", ""), unread),
    }
    for judge, rounds in judges.items():
        judged, costs = zip(*(_timed(partial(shop.judged, row)) for row in rounds), strict=True)
        models, answers = zip(*judged, strict=True)
        again = (_timed(partial(shop.answers, saved, shop.train, FOLDS)) for saved in models)
        fitted, extra = zip(*again, strict=True)
        ways = {"in-sample": (answers, costs), "cross-fitted": (fitted, np.add(costs, extra))}
        for name, (rule, count) in RULES.items():
            for way, (predictions, seconds) in ways.items():
                if count <= len(rounds):
                    scores = shop.score(rule, list(predictions[:count]))
                    rows[judge, name, way] = scores | {"cost": sum(seconds[:count])}
    table = pd.DataFrame.from_dict(rows, orient="index")
    return table.assign(gain=table["MAP"] - table["MAP"].iloc[0], cost=table["cost"] / table["cost"].iloc[2])


def _timed(work: Callable[[], Any]) -> tuple[Any, float]:
    start = time.process_time()  # other work on the machine does not count
    return work(), time.process_time() - start


def _table(rows: pd.DataFrame) -> str:
    """Markdown: a row a way with the mean of each score over the catalogues and its standard deviation."""
    columns = {"precision": 2, "recall": 2, "f1": 2, "dropped": 2, "MAP": 3, "gain": 3, "cost": 1}
    groups = rows.groupby(level=[0, 1, 2], sort=False)[list(columns)]
    means, spreads = groups.mean(), groups.std().fillna(0.0)
    shown = {name: f"{{:.{digits}f}}".format for name, digits in columns.items()}
    cells = pd.DataFrame({name: means[name].map(f) + " ± " + spreads[name].map(f) for name, f in shown.items()})
    title = f"cleaning: {NOISE:.0%} of the labels wrong"
    notes = f"(mean ± standard deviation over {len(SEEDS)} catalogues; gain is of MAP, by catalogue)"
    return titled(f"**{title}** {notes}", cells.mask(means.isna()).rename_axis(["judge", "rule", "judged"]))
