"""How products that a model does not know show: scores of a photograph, on classes held out of training.

Each draw holds a fifth of the classes out, trains grocery's frozen round on the others, and asks of every score how
often it is higher for a val photograph of a known class than for one of an unknown class (AUROC), and what share of the
unknown passes the threshold that refuses a twentieth of the known.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch.nn.functional import normalize

from aliprod import assembly, calibration, enrolment, features, manifest, metrics, recipe, training
from aliprod.images import Images
from aliprod.model import Recogniser
from aliprod.recipe import Round
from aliprod.reliability import REFUSED
from benchmarks.tables import titled
from entrypoints.command import recipe_path

DRAWS, SHARE = 8, 0.2
CACHE = Path("work/features")


def measure(data: Path) -> Iterator[str]:
    """Yields one table."""
    row = recipe.read(recipe_path("grocery")).row("frozen")
    rounds = [recipe.override(row, f"class_holdout={SHARE} seed={seed}") for seed in range(DRAWS)]
    groups = pd.concat([draw(row, data) for row in rounds]).groupby(level=0, sort=False)
    means, spreads = groups.mean(), groups.std()
    rows = means.map("{:.3f} ± ".format) + spreads.map("{:.3f}".format)
    title = f"**unknown: {SHARE:.0%} of the classes held out** (mean ± standard deviation over {DRAWS} draws)"
    yield titled(title, rows.rename_axis("score"))


def draw(row: Round, data: Path) -> pd.DataFrame:
    """One row a score: its AUROC and the share of the unknown that is accepted where REFUSED of the known is not."""
    tables = assembly.tables(row, data)
    model = assembly.model(row, len(tables.classes), row.init, tables.levels)
    learnt = assembly.inputs(model, row, tables.train, tables.classes, data, CACHE, "none")
    with tempfile.TemporaryDirectory() as folder:
        for _ in training.train(model, row, learnt, None, folder, levels=tables.levels):
            pass
    val = features.compute(model, Images(manifest.paths(tables.queries, data), None, model.preprocessing), CACHE,
                           row.precision)  # fmt: skip
    labels = manifest.labels(tables.queries, tables.classes)[val.rows]
    known = labels >= 0
    rows = {}
    for name, score in _scores(model.eval(), tables.classes, learnt, val, labels).items():
        ours, theirs = score[known], score[~known]
        accepted = theirs >= np.quantile(ours, REFUSED)
        rows[name] = {"AUROC": metrics.auroc(ours, theirs), "unknown accepted": float(accepted.mean())}
    return pd.DataFrame.from_dict(rows, orient="index")


@torch.inference_mode()
def _scores(
    model: Recogniser, classes: pd.DataFrame, learnt: features.Features, val: features.Features, labels: np.ndarray
) -> dict[str, np.ndarray]:
    """Scores (N,) of the photographs of `val`, higher where the product is likelier known."""
    embeddings, trained = (
        torch.from_numpy(source.store.take(source.codes[source.rows])).to(model.device) for source in (val, learnt)
    )
    logits = model.head(embeddings).float()
    places = torch.from_numpy(labels).to(model.device)
    temperature = calibration.temperature(lambda: [(logits[places >= 0], places[places >= 0])])
    calibrated = logits / temperature
    best = logits.topk(2, dim=1).values
    directions, photographs = normalize(embeddings), normalize(trained)
    sums = torch.zeros(logits.shape[1], model.width, device=model.device)
    means = normalize(sums.index_add_(0, torch.from_numpy(learnt.labels[learnt.rows]).to(model.device), photographs))
    gallery = enrolment.of_embeddings(learnt, learnt, classes, model.width, model.device)
    scores = {
        "largest probability, calibrated": calibrated.softmax(dim=1).amax(dim=1),
        "largest probability, as trained": logits.softmax(dim=1).amax(dim=1),
        "entropy, calibrated": -torch.special.entr(calibrated.softmax(dim=1)).sum(dim=1),
        "largest logit": best[:, 0],
        "largest logit less the mean": best[:, 0] - logits.mean(dim=1),
        "largest logit less the second": best[:, 0] - best[:, 1],
        "energy (log-sum-exp), calibrated": calibrated.logsumexp(dim=1),
        "energy (log-sum-exp), as trained": logits.logsumexp(dim=1),
        "cosine to the nearest class mean": (directions @ means.T).amax(dim=1),
        "the same, whitened: the gallery's similarity": gallery.similarities(embeddings).amax(dim=1),
        "cosine to the nearest photograph": (directions @ photographs.T).amax(dim=1),
    }
    return {name: score.cpu().numpy() for name, score in scores.items()}
