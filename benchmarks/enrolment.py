"""What a few photographs of a product teach without training: classes held out of training, then enrolled.

Heads and galleries are made of the other classes' train photographs; enrolled are train photographs of those held out,
chosen by chance; scored are val photographs of both kinds, each among all classes. The temperature of the head and the
scale of the gallery, two numbers, come from the val photographs of the trained classes, as in a round.
"""

import copy
import dataclasses
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch.nn.functional import normalize

from aliprod import assembly, calibration, enrolment, manifest, recipe, taxonomy, training
from aliprod.features import Features
from aliprod.gallery import EXACT, NEAREST, Gallery, Index
from aliprod.model import Recogniser, Saved
from aliprod.prediction import recognise
from aliprod.recipe import Round
from benchmarks.hierarchy import material
from benchmarks.stopwatch import race
from benchmarks.tables import titled
from entrypoints.command import recipe_path

SHARE = 0.2  # of the classes, held out of training
DRAWS = 5  # of them
REPEATS = 4  # choices of photographs to enrol, a draw
SHOTS = (1, 2, 4, 8, 16)  # photographs of each enrolled class
WAYS = {
    "gallery": "gallery",
    "both": "both",
    "one": "both, one class enrolled at a time",
    "flat": "both, not whitened",
    "even": "both, not corrected for few photographs",
}
FIGURE = Path("docs/enrolment.png")
MANY = 120_000  # prototypes to search among


@dataclasses.dataclass(frozen=True)
class Draw:
    """One choice of classes: embeddings (N, D), their labels (N,), the trained classes before those held out, whether
    each row is of the train split, the head's log-probabilities (N, C), and the galleries of the trained classes."""

    embeddings: torch.Tensor
    labels: np.ndarray
    train: np.ndarray
    logits: torch.Tensor
    galleries: dict[str, Gallery]
    held: list[str]


def measure(data: Path, limit: int = MANY) -> Iterator[str]:
    """Yields top-1 by photographs a class, what the gallery's parts are worth, what an enrolment costs, and FAISS
    against the exact search; draws the first as docs/enrolment.png. `limit`: of the prototypes searched."""
    row = recipe.read(recipe_path("grocery")).row("frozen")
    model, source, _ = material(row, data)
    tree = taxonomy.read(data / "product_tree.json")
    classes = assembly.describe(manifest.class_index(manifest.read(data, "train")), tree)
    train = np.arange(len(source.paths)) < classes["num_train"].sum()
    records = []
    for seed in range(DRAWS):
        one = draw(seed, row, model, source, classes, train, tree)
        records += [{"draw": seed} | record for record in score(one)]
    table = pd.DataFrame(records)
    FIGURE.parent.mkdir(exist_ok=True)
    figure(table).savefig(FIGURE, dpi=110)
    yield by_shots(table)
    yield parts(table)
    yield cost(model, one, classes, tree, data)
    yield searching(limit)


def draw(
    seed: int,
    row: Round,
    model: Recogniser,
    source: Features,
    classes: pd.DataFrame,
    train: np.ndarray,
    tree: taxonomy.Taxonomy,
) -> Draw:
    """Holds classes out, trains the head of `row` on the others and makes their galleries."""
    order = np.random.default_rng(seed).permutation(len(classes))
    split = round(SHARE * len(classes))
    held, seen = np.sort(order[:split]), np.sort(order[split:])
    labels = np.argsort(np.concatenate([seen, held]))[source.labels]
    trained = classes.iloc[seen].reset_index(drop=True)
    stored, val = copy.copy(source), copy.copy(source)
    stored.labels = val.labels = np.where(labels < len(seen), labels, -1)
    stored.rows, val.rows = (np.flatnonzero(part & (labels < len(seen))) for part in (train, ~train))
    levels = tree.levels(trained["class_id"])
    fresh = Recogniser(model.backbone_name, len(seen), hierarchy={"kind": row.hierarchy}, levels=levels)
    fresh.to(model.device)
    with tempfile.TemporaryDirectory() as folder:
        for _ in training.train(fresh, row, stored, None, folder, levels=levels):
            continue
    embeddings = torch.from_numpy(source.store.take(source.codes)).to(model.device)
    with torch.inference_mode():
        logits = fresh.eval().head(embeddings).float()
    known = torch.from_numpy(val.rows)
    temperature = calibration.temperature(lambda: [(logits[known], torch.from_numpy(labels[val.rows]))])
    make = partial(enrolment.of_embeddings, stored, val, trained, model.width, model.device)
    whole = make()
    galleries = {"gallery": whole, "flat": make(shrinkage=1.0), "even": dataclasses.replace(whole, noise=0.0)}
    return Draw(embeddings, labels, train, logits / temperature, galleries, classes["class_id"].iloc[held].tolist())


def score(draw: Draw) -> Iterator[dict]:
    """Top-1 of the val photographs of enrolled and of trained classes, by way and by photographs a class; with 0 of
    them that of the trained classes before: the head's, or the gallery's. No more than the rarest class has."""
    count = draw.logits.shape[1]
    asked = np.flatnonzero(~draw.train)
    embeddings, logits, labels = draw.embeddings[asked], draw.logits[asked], draw.labels[asked]
    new = labels >= count

    def shares(probabilities: torch.Tensor, labels: np.ndarray) -> dict[str, float]:
        right = probabilities.argmax(dim=1).numpy() == labels
        return {"enrolled": right[new].mean(), "trained": right[~new].mean()}

    for way, before in {"gallery": draw.galleries["gallery"].alone(embeddings, logits), "both": logits}.items():
        yield {"way": way, "shots": 0, "repeat": 0} | shares(before, labels)
    rarest = np.bincount(draw.labels[draw.train]).min()
    for shots in (shots for shots in SHOTS if shots <= rarest):  # whichever classes are held out, so in every draw
        for repeat in range(REPEATS):
            rng = np.random.default_rng(repeat)
            pools = [np.flatnonzero(draw.train & (draw.labels == count + place)) for place in range(len(draw.held))]
            rows = np.stack([rng.permutation(pool)[:shots] for pool in pools])  # (classes held out, shots)
            for way in WAYS:
                gallery = draw.galleries.get(way, draw.galleries["gallery"])
                if way == "one":
                    ones = [shares_of_one(draw, gallery, rows[place], place, asked) for place in range(len(rows))]
                    found = pd.DataFrame(ones).mean().to_dict()
                else:
                    filled = enrolled(gallery, draw, rows, range(len(rows)))
                    answer = filled.alone if way == "gallery" else filled.fused
                    found = shares(answer(embeddings, logits), labels)
                yield {"way": way, "shots": shots, "repeat": repeat} | found


def shares_of_one(draw: Draw, gallery: Gallery, rows: np.ndarray, place: int, asked: np.ndarray) -> dict[str, float]:
    """Top-1 where one of the classes held out, number `place`, is enrolled and nothing is known of the others."""
    count = draw.logits.shape[1]
    known = asked[(draw.labels[asked] < count) | (draw.labels[asked] == count + place)]
    filled = enrolled(gallery, draw, rows[None], [place])
    right = filled.fused(draw.embeddings[known], draw.logits[known]).argmax(dim=1).numpy()
    right = right == np.minimum(draw.labels[known], count)
    new = draw.labels[known] >= count
    return {"enrolled": right[new].mean() if new.any() else np.nan, "trained": right[~new].mean()}


def enrolled(gallery: Gallery, draw: Draw, rows: np.ndarray, places: list[int] | range) -> Gallery:
    """The gallery with these rows (E, S) of the classes held out at `places`."""
    ids = np.repeat([draw.held[place] for place in places], rows.shape[1])
    table = pd.DataFrame({"class_id": ids, "name": "", "path": "", "sha256": rows.ravel().astype(str)})
    return gallery.replace(table.assign(file="", run=""), gallery.place(draw.embeddings[rows.ravel()]).cpu())


def by_shots(table: pd.DataFrame) -> str:
    """Markdown: a row a number of photographs, means and standard deviations over the draws."""
    columns = {
        f"{WAYS[way]}: {kind}": [_cell(table, way, shots, kind) for shots in (0, *SHOTS)]
        for way in ("gallery", "both", "one")
        for kind in ("enrolled", "trained")
    }
    title = f"**enrolment: top-1 among all classes** ({DRAWS} draws of {SHARE:.0%} of the classes held out)"
    return titled(title, pd.DataFrame(columns, index=pd.Index([0, *SHOTS], name="photographs")))


def parts(table: pd.DataFrame) -> str:
    """Markdown: a row a way, with 1 and with 8 photographs a class."""
    ways = {way: WAYS[way] for way in ("both", "flat", "even")}
    columns = {
        f"{shots}: {kind}": [_cell(table, way, shots, kind) for way in ways]
        for shots in (1, 8)
        for kind in ("enrolled", "trained")
    }
    title = "**enrolment: what the gallery's parts are worth** (top-1 by photographs a class)"
    return titled(title, pd.DataFrame(columns, index=pd.Index(ways.values(), name="way")))


def figure(table: pd.DataFrame) -> Figure:
    """Top-1 against the number of photographs."""
    made = Figure(figsize=(7, 4.2), layout="constrained")
    axes = made.subplots()
    lines = {
        ("one", "enrolled", "o-", "tab:green"): "new products, one enrolled at a time",
        ("both", "enrolled", "o-", "tab:blue"): "new products, a fifth of all classes enrolled",
        ("both", "trained", "s--", "tab:gray"): "trained classes beside them",
    }
    for (way, kind, style, colour), label in lines.items():
        draws = table[(table["way"] == way) & (table["shots"] > 0)].groupby(["shots", "draw"])[kind].mean().unstack()
        mean, spread = draws.mean(axis=1), draws.std(axis=1)
        axes.plot(mean.index, mean, style, color=colour, label=label)
        axes.fill_between(mean.index, mean - spread, mean + spread, color=colour, alpha=0.12, linewidth=0)
    before = table[(table["way"] == "both") & (table["shots"] == 0)]["trained"].mean()
    axes.axhline(before, color="tab:gray", linewidth=0.8, linestyle=":", label="trained classes before")
    axes.set_xscale("log", base=2)
    axes.set_xticks(SHOTS, [str(shots) for shots in SHOTS])
    axes.set(xlabel="photographs of each new product", ylabel="top-1 among all classes", ylim=(0, 1))
    axes.set_title(
        f"Recognised without training (bands: ± a standard deviation over {DRAWS} choices of products)", fontsize=9
    )
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", fontsize=8)
    return made


def cost(model: Recogniser, draw: Draw, classes: pd.DataFrame, tree: taxonomy.Taxonomy, data: Path) -> str:
    """Markdown: enrolling 8 photographs of a class from their files, against recognising them."""
    gallery = draw.galleries["gallery"]
    fresh = Recogniser(model.backbone_name, len(gallery.trained), preprocessing=model.preprocessing)
    fresh.backbone = model.backbone
    saved = Saved(fresh.to(model.device).eval(), gallery.trained, tree, {}, gallery)
    table = manifest.read(data, "train")
    table = table[table["class_id"] == draw.held[0]].head(8)
    photographs = table.assign(file=manifest.paths(table, data), name="", path="")
    files = photographs["file"].tolist()
    ways = {"enroll": lambda: enrolment.enroll(saved, photographs), "recognise": lambda: recognise(saved, files)}
    measured = race(ways, rounds=5)
    return measured.table("enrolment: 8 photographs of a new class", dict.fromkeys(ways, f"{len(classes)} classes"))


def searching(num: int, width: int = 1280, families: int = 3000, asked: int = 128) -> str:
    """Markdown: the nearest of `num` prototypes that come in families, by FAISS and by comparing all."""
    rng = torch.Generator().manual_seed(0)
    centers = torch.randn(families, width, generator=rng)
    vectors = torch.empty(num, width)
    for at in range(0, num, 10_000):
        size = min(10_000, num - at)
        family = centers[torch.randint(families, (size,), generator=rng)]
        vectors[at : at + size] = normalize(family + 0.7 * torch.randn(size, width, generator=rng))
    right = torch.randint(num, (asked,), generator=rng)
    queries = normalize(vectors[right] + 1.5 * torch.randn(asked, width, generator=rng) / width**0.5)
    indices = {"faiss": Index(vectors, exact=0), "exact": Index(vectors, exact=num)}
    measured = race({name: partial(index.search, queries, NEAREST) for name, index in indices.items()})
    (scores, nearest), (_, all_nearest) = measured.results["faiss"], measured.results["exact"]
    same = (nearest[:, 0] == all_nearest[:, 0]).float().mean()
    ten = torch.stack([torch.isin(a[:10], b).float().mean() for a, b in zip(all_nearest, nearest, strict=True)]).mean()
    whole = (30 * indices["exact"].scores(queries)).logsumexp(dim=1)
    missed = 1 - ((30 * scores).logsumexp(dim=1) - whole).exp().mean()
    notes = {
        "faiss": f"the nearest is the same: {same:.3f}; of the 10 nearest found: {ten:.3f}; neglected: {missed:.4f}",
        "exact": f"up to {EXACT:,} prototypes",
    }
    return measured.table(f"enrolment: the nearest of {num:,} prototypes, {asked} photographs", notes)


def _cell(table: pd.DataFrame, way: str, shots: int, kind: str) -> str:
    draws = table[(table["way"] == way) & (table["shots"] == shots)].groupby("draw")[kind].mean()
    if draws.empty or (shots == 0 and kind == "enrolled"):
        return ""
    return f"{draws.mean():.3f} ± {draws.std():.3f}"
