"""A small Baseline, three rounds of training one on another: the competition entry's own algorithm against ours.

Both ways have the same photographs, rounds, epochs and rates, go on with a head where the classes stay, and are scored
by the same metrics on val, by which ours also chooses the epoch it keeps.
"""

import copy
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader

from aliprod import assembly, csvfile, manifest, metrics, optim, training
from aliprod.model import load_head
from aliprod.recipe import Round
from benchmarks.finetune import Task
from benchmarks.images import seed_opened
from benchmarks.metrics import seed_gap, seed_map
from benchmarks.stopwatch import Race, race
from benchmarks.tables import titled

FREQUENT = (0.5, 1.0)  # quantiles of the classes by their photographs: the more frequent half
ROUNDS = (
    Round(name="1", samples_quantile=FREQUENT, freeze="all", optimizer="adam", precision="bf16", epochs=2),
    Round(name="2", samples_quantile=FREQUENT, optimizer="adam", epochs=2),  # a bigger run: 10 epochs, as the seed's
    Round(
        name="3",
        freeze="all",
        loss="focal",
        optimizer="adam_gc",
        precision="bf16",
        epochs=8,
        lr_step=3,
        lr_factor=0.4,
    ),
)
BATCH_SIZE = 32
FIGURE = Path("work/benchmarks/rounds.png")


@dataclass(frozen=True)
class Course:
    """How a round went; the lists have a place an epoch."""

    weights: Path  # what the next round starts from
    seconds: list[float]  # since the round began
    claims: list[dict[str, float]]  # gap and map on val, as the way itself reports them
    scores: Callable[[], list[dict[str, float]]]  # those of metrics.summary, for whose time no way pays
    kept: int  # place of the epoch whose weights are kept


def measure(data: Path, limit: int = 256) -> Iterator[str]:
    """Yields one table, for `limit` train photographs and all of val, and where the figure is."""
    inits, races = dict.fromkeys(WAYS, "imagenet"), []
    with tempfile.TemporaryDirectory() as folder:
        chosen = Path(folder) / "train.csv"
        csvfile.write(manifest.read(data, "train").sample(frac=1, random_state=0)[:limit], chosen)
        for row in ROUNDS:
            row = row.model_copy(update={"manifest": str(chosen), "batch_size": BATCH_SIZE})
            tables = assembly.tables(row, data)
            ways: dict[str, Callable[[], Course]] = {}
            for way, learn in WAYS.items():
                own = row.model_copy(update={"init": inits[way]})
                model = assembly.model(own, len(tables.classes), own.init)
                load_head(model, own.init, tables.classes)
                task = Task(own, model, tables.classes, tables.train, tables.val, data)
                ways[way] = partial(learn, task, Path(folder))
            races.append(race(ways))
            inits = {way: str(course.weights) for way, course in races[-1].results.items()}
    courses: dict[str, Course] = races[-1].results
    scores = {way: course.scores() for way, course in courses.items()}
    size = f"{len(tables.train):,} photographs of {len(tables.classes):,} classes, {len(tables.val):,} of val"
    yield table(f"rounds: {size}", races, scores)
    FIGURE.parent.mkdir(parents=True, exist_ok=True)
    figure(races, scores).savefig(FIGURE, dpi=150)
    yield f"![MAP by cost]({FIGURE})\n"


def ours(work: Task, folder: Path) -> Course:
    """The library's: a frozen backbone embeds every photograph once, from an empty cache; the best epoch is kept."""
    start, seconds, reports = time.perf_counter(), [], []
    row, model = work.row, copy.deepcopy(work.model)
    with tempfile.TemporaryDirectory() as cache:
        train, val = (
            assembly.inputs(model, row, rows, work.classes, work.data, cache, "none") for rows in (work.train, work.val)
        )
        for report in training.train(model, row, train, val, cache):
            if report.val:  # an epoch's end
                seconds.append(time.perf_counter() - start)
                reports.append(report)
    model.save(folder / f"ours-{row.name}", work.classes, None, {})
    scores = [report.val for report in reports]
    kept = max(place for place, report in enumerate(reports) if report.best)
    return Course(folder / f"ours-{row.name}", seconds, scores, lambda: scores, kept)


def seed(work: Task, folder: Path) -> Course:
    """The competition entry's, with its faults; an epoch's last, smaller batch is left out, as ours does."""
    start, seconds, claims, answers = time.perf_counter(), [], [], []
    row, weights = work.row, folder / f"seed-{work.row.name}.pt"
    torch.manual_seed(row.seed)
    network = work.network()
    backbone, head = network
    before = Path(row.init).with_suffix(".head")
    trained = torch.load(before) if before.exists() else head.state_dict()
    if trained["weight"].shape == head.weight.shape:  # the same classes: it goes on with the head, too
        head.load_state_dict(trained)
    backbone.requires_grad_(row.freeze == "none")  # wrong: batch norm's statistics are no parameters
    criterion = seed_focal if row.loss == "focal" else cross_entropy
    optimizer = torch.optim.Adam(network.parameters(), row.lr)  # fp32 throughout
    if row.optimizer == "adam_gc":
        optimizer.register_step_pre_hook(optim.centralize)  # equal to its Adam_GC
    schedule = StepLR(optimizer, row.lr_step, row.lr_factor)
    # Wrong: OpenCV's BGR goes to a network that was pretrained on RGB, and shrinking skips pixels.
    train, val = work.loader(work.train, seed_opened, shuffle=True), work.loader(work.val, seed_opened)
    for _ in range(row.epochs):
        network.train()  # wrong: so the statistics of a frozen backbone drift
        for images, labels in train:
            # Wrong: a frozen backbone is run anew every epoch, though its output should never change.
            loss = criterion(network(images.to(work.model.device)), labels.to(work.model.device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
        torch.save(backbone.state_dict(), weights)  # wrong: over the last epoch's, be that better or not
        torch.save(head.state_dict(), weights.with_suffix(".head"))
        logits, labels = seed_answers(network, val)
        claims.append(seed_claims(logits, labels))
        answers.append(logits)
        seconds.append(time.perf_counter() - start)
    return Course(weights, seconds, claims, lambda: [true_scores(each, labels) for each in answers], row.epochs - 1)


WAYS: dict[str, Callable[[Task, Path], Course]] = {"ours": ours, "seed's": seed}


def seed_focal(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Wrong: the weight is that of the batch's mean loss, so within a batch easy photographs count like hard ones."""
    loss = cross_entropy(logits, labels)
    return (1 - torch.exp(-loss)) ** 2 * loss


@torch.inference_mode()
def seed_answers(network: nn.Module, loader: DataLoader) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (N, C) and labels (N,) of all photographs, the network in evaluation mode."""
    network.eval()
    device = next(network.parameters()).device
    batches = [(network(images.to(device)).cpu(), labels) for images, labels in loader]
    logits, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    return logits, labels


def seed_claims(logits: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """Wrong: gap and map are averaged over batches, and confidence is the largest logit, whatever the others are."""
    confidence, preds = (values.numpy() for values in logits.max(dim=1))
    return {"gap": seed_gap(labels.numpy(), preds, confidence), "map": seed_map(labels.numpy(), preds)}


def true_scores(logits: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """What the library's metrics say of logits (N, C), their confidence being a probability."""
    confidence, preds = logits.softmax(dim=1).max(dim=1)
    loss = cross_entropy(logits, labels, reduction="none")
    columns = {"label": labels, "pred": preds, "confidence": confidence, "loss": loss}
    return metrics.summary(pd.DataFrame({name: values.numpy() for name, values in columns.items()}))


def table(title: str, races: list[Race], scores: dict[str, list[dict[str, float]]]) -> str:
    """Markdown: a row a way with its cost, each round's and all rounds', and its scores after the last round."""
    seconds = [*(held.seconds for held in races), sum(held.seconds for held in races)]
    ratios = [frame.div(frame.iloc[:, 0], axis=0).median() for frame in seconds]
    names = [f"round {row.name}" for row in ROUNDS]
    rows = pd.DataFrame(dict(zip([*names, "times ours"], ratios, strict=True))).map("{:.2f}".format)
    rows["seconds"] = seconds[-1].median().map("{:.1f}".format)
    for way, course in races[-1].results.items():
        for claim, values in {"": scores[way], " as claimed": course.claims}.items():
            for name in ("map", "gap"):
                rows.loc[way, f"{name.upper()}{claim}"] = f"{values[course.kept][name]:.3f}"
    return titled(f"**{title}** (median of {len(seconds[0])} races)", rows.rename_axis("way"))


def figure(races: list[Race], scores: dict[str, list[dict[str, float]]]) -> Figure:
    """True MAP by cost through the last round, of the last race."""
    drawn = Figure(figsize=(7, 4), layout="constrained")
    axes = drawn.subplots()
    last = pd.DataFrame([held.seconds.iloc[-1] for held in races])  # a row a round, a column a way
    whole = last.iloc[:, 0].sum()
    for colour, (way, course) in enumerate(races[-1].results.items()):
        begin = last[way].iloc[:-1].sum()
        cost = [(begin + seconds) / whole for seconds in course.seconds]
        maps = [each["map"] for each in scores[way]]
        axes.plot(cost, maps, "o-", color=f"C{colour}", markersize=4, label=way)
        axes.plot(cost[course.kept], maps[course.kept], "o", color=f"C{colour}", markersize=10, fillstyle="none")
        axes.axvline(begin / whole, color=f"C{colour}", linewidth=0.8, linestyle="--")
    axes.set(
        title=f"Round {ROUNDS[-1].name}, an epoch a point; dashes: where it begins; ring: kept",
        xlabel="cost of all rounds, times ours",
        ylabel="val MAP over all classes",
        xlim=(0, None),
        ylim=(0, None),
    )
    axes.legend()
    return drawn
