"""What people read: an evaluation's scores, tables and figures."""

import functools
import html
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.axes
import numpy as np
import pandas as pd

from aliprod import InputError, features, manifest, metrics, reliability
from aliprod.features import Features
from aliprod.images import UNREAD, Images, Preprocessing, load, read, reason
from aliprod.lettering import Figure, caption
from aliprod.model import Recogniser
from aliprod.prediction import predict
from aliprod.recipe import Round
from aliprod.reliability import Reliability
from aliprod.taxonomy import Levels, Taxonomy
from aliprod.training import Report

SMALL = Preprocessing(256, (1, 1, 1), (1, 1, 1), "bilinear")  # photographs in figures; bars are white
WIDEST = 60  # inches of a figure; matplotlib draws none of 600

# What is read beside the scores, by its file's name (.png a figure, .csv or .parquet a table, .html a page), and how it
# is made: not before it is wanted, each by itself, so that one that fails takes nothing else with it.
Reports = Mapping[str, Callable[[], Figure | pd.DataFrame | str]]


@dataclass(frozen=True)
class Evaluation:
    """A model on a split: what to log as metrics, what a saved model keeps, and what to show people.

    Confidences in `predictions` are as the network gives them, which compare rounds; those that people read, in
    `reports` and in the column `calibrated`, are calibrated, as those of `recognise` are.
    """

    scores: dict[str, float]
    predictions: pd.DataFrame  # one row per photograph: its key, and the columns of `predict`
    per_class: pd.DataFrame  # see metrics.per_class
    corrupt: pd.DataFrame  # split, class_id, image_id, reason
    calibration: dict[str, float]  # see reliability.Reliability's scores: what a saved model's config keeps of it
    reports: Reports


def evaluate(
    model: Recogniser,
    classes: pd.DataFrame,
    table: pd.DataFrame,
    data: str | Path,
    cache: str | Path,
    *,
    tree: Taxonomy | None = None,
    precision: str = "fp32",
    max_corrupt_share: float = 1.0,
) -> Evaluation:
    """Scores `model` on the rows of `table` whose class it knows.

    scores: those of metrics.summary, and of metrics.by_level where there is a tree, all of confidences as the network
    gives them, so that rounds compare whatever was fitted afterwards; those of reliability.measure, the other rows
    being its unknown products; with the temperature it fitted, ece and calibrated_loss, without it ece_before and loss;
    coverage_classes and coverage_rows, the shares of the table's classes and rows that the model knows. InputError if
    it knows none. Embeddings are kept in `cache`.
    """
    labels = manifest.labels(table, classes)
    known = table[labels >= 0].reset_index(drop=True)
    if known.empty:
        raise InputError(f"none of the {table['class_id'].nunique()} classes of this split is known to the model")
    paths = manifest.paths(known, data)
    images = Images(paths, labels[labels >= 0], model.preprocessing, max_corrupt_share=max_corrupt_share)
    early = model.branches is not None and model.branches.stage  # it needs more than embeddings
    vectors = features.compute(model, images, cache, precision)
    source = images if early else vectors
    levels = tree.levels(classes["class_id"]) if tree else None
    predictions = known.join(predict(model, source, precision, levels=levels), how="inner")
    if predictions.empty:
        raise InputError(f"none of the {len(known)} photographs can be read; the first: {source.corrupt[0]}")

    others = manifest.paths(table[(labels < 0) & (table["class_id"] != "")], data)
    strangers = Images(others, None, model.preprocessing, max_corrupt_share=max_corrupt_share)
    unknown = features.compute(model, strangers, cache, precision) if others else None
    trust = reliability.measure(model, vectors, unknown, known, precision)
    served = predict(model, source, precision, levels=levels, temperature=trust.temperatures)
    # Cross-fitted. Photographs are read again where there is more than embeddings: some may be gone by now.
    predictions = predictions.join(served["confidence"].rename("calibrated"), how="inner")
    served = served.loc[predictions.index]
    if isinstance(source, Features):
        predictions["embedding"] = source.codes[predictions.index]
        predictions.attrs["embeddings"] = source.store.digest  # whose rows `embedding` counts

    correct = (predictions["label"] == predictions["pred"]).to_numpy()
    before, after = (predictions[name].to_numpy() for name in ("confidence", "calibrated"))
    per_class = metrics.per_class(predictions, classes, levels)
    scores = metrics.summary(predictions) | trust.scores
    scores |= {
        "ece_before": metrics.calibration_error(correct, before),
        "ece": metrics.calibration_error(correct, after),
        "calibrated_loss": float(served["loss"].mean()),
        "coverage_classes": known["class_id"].nunique() / table["class_id"].nunique(),
        "coverage_rows": len(known) / len(table),
    }
    if levels:
        scores |= metrics.by_level(predictions, levels)

    return Evaluation(
        scores=scores,
        predictions=predictions,
        per_class=per_class,
        corrupt=known.iloc[list(source.corrupt)].assign(reason=list(source.corrupt.values())),
        calibration=trust.scores,
        reports=_reports(predictions, served, per_class, classes, pd.Series(paths), trust, levels),
    )


def _reports(
    predictions: pd.DataFrame,
    served: pd.DataFrame,
    per_class: pd.DataFrame,
    classes: pd.DataFrame,
    files: pd.Series,
    trust: Reliability,
    levels: Levels | None,
) -> Reports:
    """The reports of an evaluation; `served` are the predictions with calibrated confidences."""
    correct = (served["label"] == served["pred"]).to_numpy()
    before, after = (table["confidence"].to_numpy() for table in (predictions, served))
    reports: dict[str, Callable[[], Figure | pd.DataFrame | str]] = {
        "predictions.parquet": lambda: predictions,
        "per_class.csv": lambda: per_class,
        "select_list.csv": lambda: metrics.select_list(served, classes),
        "figures/map_by_frequency.png": lambda: map_by_frequency(per_class),
        "figures/confusion.png": lambda: confusion(predictions, per_class),
        "figures/mistakes.png": lambda: mistakes(served, classes, files),
        "figures/reliability.png": lambda: reliability.diagram(correct, before, after),
    }
    if len(trust.unknown):
        reports["figures/unknown.png"] = lambda: reliability.known_or_not(after, trust)
    if levels:
        curve = functools.partial(metrics.trade_off, served, levels)
        reports["trade_off.csv"] = curve
        reports["figures/trade_off.png"] = lambda: trade_off(curve(), len(levels.sizes))
        reports["figures/tree.html"] = lambda: icicle(predictions, levels).to_html(include_plotlyjs=True)
    return reports


def rounds(
    results: list[tuple[Round, dict[str, Any]]], verdicts: dict[str, dict[str, str]] | None = None
) -> pd.DataFrame:
    """The table of rounds, its columns named as the competition entry names its own, beside what its authors reported.

    results: each round with its recipe, run, num_classes, gap, map and the yardstick's ncm_accuracy and nn_accuracy;
    verdicts: what was decided about a run as an Extractor and as a Classifier, by run.
    """
    said: dict[str, dict[str, str]] = {"Extractor": {}, "Classifier": {}} | (verdicts or {})
    return pd.DataFrame(
        {
            "R": f"{scores['recipe']}/{row.name}",
            "Precision": row.precision,
            "Models": row.backbone,
            "Loss": row.loss,
            "Opt": row.optimizer,
            "Freeze": str(row.freeze),
            "Epochs": row.epochs,
            "Base LR": f"{row.lr:g}",
            "LR_STEP": row.lr_step if row.schedule == "step" else row.schedule,
            "LR_FACTOR": row.lr_factor if row.schedule == "step" else "",
            "Batch Size": row.batch_size,
            "Class Number": scores["num_classes"],
            "Input": row.image_size,
            "GAP": scores["gap"],
            "MAP": scores["map"],
            "Reported GAP": (row.reported or {}).get("gap", math.nan),
            "Reported MAP": (row.reported or {}).get("map", math.nan),
            "NCM": scores["ncm_accuracy"],
            "1-NN": scores["nn_accuracy"],
            **{column: by_run.get(scores["run"], "") for column, by_run in said.items()},
            "Run": scores["run"],
        }
        for row, scores in results
    ).astype({"LR_STEP": "str", "LR_FACTOR": "str", "Base LR": "str"})


def markdown(table: pd.DataFrame) -> str:
    """A table as Markdown, fractional numbers with four decimals below 100 and none above, "" for what is not known.

    A column most of whose cells begin as numbers do, be they formatted already, is aligned to the right.
    """
    cells = table.map(_cell).mask(table.isna(), "")
    titles = [_cell(title) for title in table.columns]
    marks = [
        "---:" if column.str.match(r"[-+]?\d").sum() > (column != "").sum() / 2 else "---"
        for _, column in cells.items()
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in [titles, marks, *cells.to_numpy().tolist()])


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4f}" if abs(value) < 100 else f"{value:,.0f}"
    return " ".join(str(value).split()).replace("|", r"\|")  # either would end the cell


def rounds_figure(table: pd.DataFrame) -> Figure:
    """GAP and MAP by round, which are over different classes, beside the reported ones; and the yardstick over all.

    What no round has, such as reported scores, is left out.
    """
    lines = {
        "GAP": ("o-", "tab:blue", "GAP, over the round's classes"),
        "Reported GAP": ("x", "tab:blue", "GAP, reported by the competition entry"),
        "MAP": ("o-", "tab:orange", "MAP, over the round's classes"),
        "Reported MAP": ("x", "tab:orange", "MAP, reported by the competition entry"),
        "NCM": ("s--", "tab:green", "accuracy by the nearest class mean, over all classes"),
        "1-NN": ("s--", "tab:purple", "accuracy by the nearest neighbour, over all classes"),
    }
    figure = Figure(figsize=(min(WIDEST, 7.5 + 0.7 * len(table)), 4.2), layout="constrained")
    axes = figure.subplots()
    for name, (style, colour, label) in lines.items():
        if table[name].notna().any():
            axes.plot(range(len(table)), table[name], style, color=colour, label=label)

    names = [caption(name, 40) for name in table["R"]]
    axes.set_xticks(range(len(table)), names, rotation=30, ha="right", parse_math=False)
    axes.set(title="Rounds", ylim=(-0.02, 1.02), xlim=(-0.5, max(0.5, len(table) - 0.5)))
    axes.grid(alpha=0.3)
    figure.legend(fontsize=8, loc="outside right upper")  # beside the points, not over them
    return figure


def curves(reports: list[Report]) -> Figure:
    """Loss and learning rate by step; GAP and MAP by epoch."""
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    loss, lr, scores = figure.subplots(1, 3)
    points = pd.DataFrame([point for report in reports for point in report.curve])
    epochs = [report for report in reports if report.val or report.train]
    if not points.empty:
        loss.plot(points["step"], points["loss"], linewidth=0.8, label="train, a step")
        lr.plot(points["step"], points["lr"])
    loss.plot(
        [report.step for report in epochs], [report.train["loss"] for report in epochs], "o-", label="train, an epoch"
    )
    if validated := [report for report in epochs if report.val]:
        loss.plot(
            [report.step for report in validated], [report.val["loss"] for report in validated], "o-", label="val"
        )
        for name in ("gap", "map"):
            scores.plot(
                [report.epoch for report in validated],
                [report.val[name] for report in validated],
                "o-",
                label=f"val {name}",
            )
        scores.legend()
    loss.set(title="loss", xlabel="step", yscale="log")
    lr.set(title="learning rate", xlabel="step")
    scores.set(title="GAP and MAP", xlabel="epoch")
    loss.legend()
    return figure


def map_by_frequency(per_class: pd.DataFrame, groups: int = 6) -> Figure:
    """MAP of classes grouped by their number of training photographs, rare to frequent, each group as large."""
    seen = per_class.dropna(subset="accuracy")
    group = pd.qcut(seen["num_train"].rank(method="first"), min(groups, len(seen)), labels=False)
    bars = seen.groupby(group).agg(
        least=("num_train", "min"), most=("num_train", "max"), map=("accuracy", "mean"), size=("accuracy", "size")
    )
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    names = [f"{row.least}-{row.most}\n({row.size} classes)" for row in bars.itertuples()]
    axes.bar_label(axes.bar(range(len(bars)), bars["map"], tick_label=names), fmt="%.2f")
    axes.set(title="MAP by training photographs a class", ylim=(0, 1.08), ylabel="MAP")
    return figure


def confusion(predictions: pd.DataFrame, per_class: pd.DataFrame, worst: int = 15) -> Figure:
    """Where the photographs of the least recognised classes go: rows the truth, columns the answer, in shares."""
    seen = per_class[per_class["num_val"] > per_class["num_correct"]]
    wrong = seen.assign(errors=seen["num_val"] - seen["num_correct"])
    labels = wrong.sort_values(["accuracy", "errors"], ascending=[True, False]).index[:worst]
    rows = predictions[predictions["label"].isin(labels)]
    shares = pd.crosstab(rows["label"], rows["pred"], normalize="index").reindex(index=labels)
    columns = list(labels.intersection(shares.columns)) + [c for c in shares.columns if c not in labels]
    shares = shares[columns]
    ids, names = per_class["class_id"], per_class["name"]
    titles = {row: caption(f"{ids[row]} {names[row]}", 24, instead=ids[row]) for row in {*labels, *columns}}
    size = (min(WIDEST, 3 + 0.3 * max(4, len(columns))), 2.5 + 0.3 * max(4, len(labels)))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    if len(labels):
        axes.imshow(shares, cmap="magma", vmin=0, vmax=1, aspect="auto")
        axes.set_xticks(range(len(columns)), [titles[c] for c in columns], rotation=90, fontsize=7, parse_math=False)
        axes.set_yticks(range(len(labels)), [titles[c] for c in labels], fontsize=7, parse_math=False)
    axes.set(title="Least recognised classes", xlabel="taken for", ylabel="truth")
    return figure


def trade_off(table: pd.DataFrame, depth: int) -> Figure:
    """How right the answers are against how exact, as the threshold rises; `depth` is that of a class."""
    figure = Figure(figsize=(5.5, 3.8), layout="constrained")
    axes = figure.subplots()
    axes.plot(table["depth"], table["correct"], "o-", markersize=3)
    for row in table.iloc[::5].itertuples():
        axes.annotate(f"{row.threshold:.2f}", (row.depth, row.correct), fontsize=7)
    axes.set(title="Less exact, more often right", xlabel=f"mean level of the answer ({depth}: a class)")
    axes.set(ylabel="share of right answers", xlim=(0, depth * 1.05))
    axes.grid(alpha=0.3)
    return figure


def icicle(predictions: pd.DataFrame, levels: Levels) -> Any:
    """The product tree as a Plotly figure: nodes as wide as their photographs, coloured by accuracy, opened by a click.

    A node's accuracy is the share of its photographs that are answered with it or something below it.
    """
    import plotly.graph_objects as go  # takes a second: only those who draw wait for it

    labels, preds = (predictions[name].to_numpy() for name in ("label", "pred"))
    whole = {"id": "all", "parent": "", "path": "all", "label": "all", "count": len(labels), "right": len(labels)}
    frames = [pd.DataFrame([whole])]
    for level, (nodes, paths) in enumerate(zip(levels.ancestors, levels.names, strict=True)):
        parents = levels.parents[level - 1] if level else np.zeros(len(paths), dtype=np.int64)
        above = levels.names[level - 1][parents] if level else np.full(len(paths), "")
        below = [path.removeprefix(f"{parent} > ") for path, parent in zip(paths, above, strict=True)]
        truth = nodes[labels]
        frame = pd.DataFrame(
            {
                "id": [f"{level}.{node}" for node in range(len(paths))],  # names need not differ
                "parent": [f"{level - 1}.{node}" if level else "all" for node in parents],
                "path": paths,
                "label": below,
                "count": np.bincount(truth, minlength=len(paths)),
                "right": np.bincount(truth[truth == nodes[preds]], minlength=len(paths)),
            }
        )
        frames.append(frame[(paths != above) & (frame["count"] > 0)])  # a class stands in for itself but once
    tree = pd.concat(frames)
    figure = go.Figure(
        go.Icicle(
            ids=tree["id"],
            labels=tree["label"].map(html.escape),  # Plotly reads tags in names
            customdata=tree["path"].map(html.escape),
            parents=tree["parent"],
            values=tree["count"],
            branchvalues="total",
            maxdepth=4,
            marker={"colors": tree["right"] / tree["count"], "colorscale": "RdYlGn", "cmin": 0, "cmax": 1,
                    "showscale": True},
            hovertemplate="%{customdata}<br>%{value} photographs, accuracy %{color:.3f}<extra></extra>",
        )
    )  # fmt: skip
    figure.update_layout(title="Accuracy down the product tree", margin={"l": 10, "r": 10, "b": 10})
    return figure


def thumbnails(dropped: pd.DataFrame, files: pd.Series, names: pd.Series, count: int = 60) -> Figure:
    """Photographs that cleaning dropped, chosen by chance, with the class they are filed under; `names` by class id."""
    rows = dropped[dropped["reason"] != "unreadable"]
    rows = rows.sample(min(count, len(rows)), random_state=0).sort_values("class_id")
    height = max(1, -(-len(rows) // 10))
    figure = Figure(figsize=(16, 1.9 * height), layout="constrained")
    for place, (row, class_id) in enumerate(rows["class_id"].items(), start=1):
        axes = figure.add_subplot(height, 10, place)
        _photograph(axes, files[row])
        axes.set_title(caption(str(names[class_id]), 22, instead=class_id), fontsize=7, parse_math=False)
    return figure


def mistakes(predictions: pd.DataFrame, classes: pd.DataFrame, files: pd.Series, count: int = 20) -> Figure:
    """The most confident wrong answers with their photographs; `files` has the path of every row of `predictions`."""
    wrong = predictions[predictions["label"] != predictions["pred"]].nlargest(count, "confidence")
    height = max(1, -(-len(wrong) // 5))
    figure = Figure(figsize=(14, 3.1 * height), layout="constrained")
    figure.suptitle("The most confident mistakes" if len(wrong) else "No mistakes")
    ids, names = classes["class_id"], classes["name"]
    titles = {row: caption(names[row], 30, instead=ids[row]) for row in {*wrong["label"], *wrong["pred"]}}
    for place, answer in enumerate(wrong.itertuples(), start=1):
        axes = figure.add_subplot(height, 5, place)
        _photograph(axes, files[answer.Index])
        title = f"is {titles[answer.label]}\nsaid {titles[answer.pred]}, {answer.confidence:.0%}"
        axes.set_title(title, fontsize=8, parse_math=False)
    return figure


def _photograph(axes: matplotlib.axes.Axes, file: str) -> None:
    """Draws a photograph, or why it cannot be read any more."""
    axes.set_axis_off()
    try:
        axes.imshow(load(read(file), SMALL))
    except UNREAD as error:
        why = caption(reason(error), 60)
        axes.text(0.5, 0.5, why, ha="center", va="center", fontsize=7, wrap=True, parse_math=False)
