"""A promotion under a run: candidates and champion asked the same question, the better one crowned, the reasons kept.

Each registered name is a question of its own. The extractor's is how well its embeddings tell all classes apart, and
nothing of a model's head counts. The classifier's is how right its answers are as they are served, on the classes that
both know. The guards keep what the question does not see from getting worse.
"""

import functools
import json
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from aliprod import InputError, assembly, first_line, manifest, metrics, report, taxonomy, yardstick
from aliprod.model import Saved
from aliprod.parameters import words
from aliprod.prediction import recognise
from tracking import models, registry, search
from tracking.runs import Run

ATTEMPTS = 5  # at a comparison whose champion changes meanwhile
TIMINGS = 9  # photographs recognised by each, in turn
SMOKED = 4  # photographs that the model as served has to answer as its weights do


@dataclass(frozen=True)
class Limits:
    """How sure a promotion has to be, and how much worse than the champion the candidate may be elsewhere."""

    confidence: float = 0.95  # that the candidate's MAP is higher, in [0.5, 1)
    max_tail_loss: float = 0.01  # of MAP over the rarest third of the classes
    max_coverage_loss: float = 0.0  # of the share of the photographs' classes that it can answer
    max_severity_ratio: float = 1.1  # of the mean distance of wrong answers in the tree
    max_size_ratio: float = 2.0  # of the weights' bytes
    max_latency_ratio: float = 2.0  # of the seconds for one photograph on this machine


@dataclass(frozen=True)
class Ground:
    """The photographs that all are measured on.

    gallery, queries: as of assembly.Tables; classes: those of both, with class_id and num_train, the gallery's first;
    tree: the product tree, if there is one; digests: of both splits whole.
    """

    data: Path
    gallery: pd.DataFrame
    queries: pd.DataFrame
    classes: pd.DataFrame
    tree: taxonomy.Taxonomy | None
    digests: dict[str, str]

    @staticmethod
    def read(data: Path) -> "Ground":
        """The whole train split of a folder, balanced, its whole val split, and its tree if there is one."""
        train, queries = manifest.read(data, "train"), manifest.read(data, "val")
        gallery = manifest.balance(train, seed=0)
        classes = manifest.class_index(gallery)
        others = manifest.class_index(queries[manifest.labels(queries, classes) < 0]).assign(num_train=0)
        classes = pd.concat([classes, others], ignore_index=True)
        digests = {"data": manifest.digest(train), "val": manifest.digest(queries)}
        return Ground(data, gallery, queries, classes, assembly.tree(data), digests)

    @functools.cached_property
    def levels(self) -> taxonomy.Levels | None:
        """Where `classes` stand in the tree."""
        return self.tree.levels(self.classes["class_id"]) if self.tree else None

    @functools.cached_property
    def asked(self) -> np.ndarray:
        """Which of `classes` (C,) the queries are of."""
        return np.bincount(manifest.labels(self.queries, self.classes), minlength=len(self.classes)) > 0

    def distances(self, labels: np.ndarray, answers: np.ndarray) -> np.ndarray:
        """Levels (N,) from classes to answers in the tree; an answer that is none of `classes` is as far as can be."""
        assert self.levels
        there = answers < len(self.classes)
        distances = np.full(len(labels), len(self.levels.ancestors))
        distances[there] = self.levels.distances(labels[there], answers[there])
        return distances


@dataclass(frozen=True)
class Contender:
    """A model and its answers to a question.

    answers: a row per photograph of a class it knows, with its key, `label` and `answer`, rows of the ground's classes,
    the answer perhaps beyond them; knows: which of the ground's classes (C,) it can answer; more: what else there is to
    say of it in numbers.
    """

    id: str
    run_id: str
    answers: pd.DataFrame
    knows: np.ndarray
    more: dict[str, float]

    def only(self, classes: np.ndarray) -> pd.DataFrame:
        """Its answers to the photographs of some classes, chosen by a mask (C,)."""
        return self.answers[classes[self.answers["label"]]]

    def map(self, classes: np.ndarray) -> float:
        """Its MAP over the classes chosen by a mask (C,)."""
        answers = self.only(classes)
        return metrics.mean_class_accuracy(answers["label"].to_numpy(), answers["answer"].to_numpy())


@dataclass(frozen=True)
class Question:
    """What a registered model is promoted by: the MAP of answers that are got in a way of its own."""

    name: str  # of the question, in tags and tables
    model: str  # the registered one
    score: str  # what its MAP is called among the figures
    words: str  # and in sentences
    ask: Callable[[str, Ground, Path], Contender]  # a logged model's id, the ground, the folder for embeddings


@dataclass(frozen=True)
class Duel:
    """A candidate beside the champion, over the classes that both know: figures of both, and what speaks against it."""

    ours: Contender
    figures: dict[str, float]
    theirs: dict[str, float]  # {} where there is no champion
    same: bool  # it is the champion, or what that was before products were enrolled in it
    against: tuple[str, ...]


@dataclass(frozen=True)
class Comparison:
    """By how much a candidate's MAP is higher than the champion's, and the interval in which that lies."""

    difference: float
    interval: tuple[float, float]
    num_classes: int
    candidates: int  # among whom it was chosen on the same photographs

    def says(self, words: str) -> str:
        """The same in a sentence; `words` is what the MAP is called."""
        low, high = self.interval
        chosen = f", as the best of {self.candidates} candidates" if self.candidates > 1 else ""
        return f"{words} {self.difference:+.4f}, [{low:+.4f}, {high:+.4f}] over {self.num_classes} classes{chosen}"


@dataclass(frozen=True)
class Verdict:
    """What was decided on the best of the candidates for a registered name, and why."""

    question: Question
    candidate: Contender
    champion: Contender | None
    figures: dict[str, float]
    champion_figures: dict[str, float]
    compared: Comparison | None
    reasons: tuple[str, ...]
    promoted: bool
    candidates: tuple[str, ...]
    over: str  # number of the champion's version, "" where there is none
    version: str = ""  # number of the version that was made of it

    @property
    def decision(self) -> str:
        """promoted or refused."""
        return "promoted" if self.promoted else "refused"

    @property
    def about(self) -> dict[str, Any]:
        """As tags: the figures, the comparison, the reasons."""
        tags: dict[str, Any] = {name: f"{value:.6g}" for name, value in self.figures.items()}
        if self.compared:
            tags["difference"] = f"{self.compared.difference:.6g}"
            tags["interval"] = json.dumps(self.compared.interval)
        return tags | {"reasons": "; ".join(self.reasons)}

    @property
    def record(self) -> dict[str, Any]:
        """As promotion.json holds it."""
        sides = {"candidate": (self.candidate, self.figures), "champion": (self.champion, self.champion_figures)}
        return {
            "decision": self.decision,
            "reasons": list(self.reasons),
            **{
                side: {"run": contender.run_id, "model": contender.id} | figures if contender else None
                for side, (contender, figures) in sides.items()
            },
            **(asdict(self.compared) if self.compared else {}),
            "candidates": list(self.candidates),
            "over": self.over,
            "version": self.version,
        }


def promote(
    run: Run, candidates: list[str], ground: Ground, limits: Limits, work: Path, dry_run: bool
) -> dict[str, Verdict]:
    """For each registered name crowns the best of the candidates if it is better than its champion.

    `candidates` are logged models' ids. Returns the verdicts by the names of their questions, and logs them, with the
    reasons. If a champion changes meanwhile, the question is asked again.
    """
    run.dataset(ground.gallery, str(ground.data), "gallery", "gallery")
    run.dataset(ground.queries, str(ground.data), "val", "queries")
    run.params({f"promotion.{name}": value for name, value in asdict(limits).items()} | {"data_folder": ground.data})
    if not dry_run:
        registry.repair(work)
    verdicts = {
        question.name: _settle(question, run, candidates, ground, limits, work, dry_run) for question in QUESTIONS
    }

    text = markdown(verdicts, dry_run)
    records = {name: verdict.record for name, verdict in verdicts.items()}
    run.text(json.dumps(records | {"dry_run": dry_run, "run": run.id, **ground.digests}, indent=2), "promotion.json")
    run.text(text, "promotion.md")
    promoted = any(verdict.promoted for verdict in verdicts.values())
    run.tags({"decision": "promoted" if promoted else "refused", "dry_run": dry_run, "mlflow.note.content": text})
    for name, verdict in verdicts.items():
        tags = {"decision": verdict.decision, "run": verdict.candidate.run_id, **verdict.about}
        run.tags({f"aliprod.{name}.{key}": value for key, value in tags.items()})
        run.metrics(verdict.figures, 0, f"{name}/")
    return verdicts


def markdown(verdicts: dict[str, Verdict], dry_run: bool) -> str:
    """The verdicts for people."""
    return "\n\n".join(_markdown(verdict, dry_run) for verdict in verdicts.values())


def candidates(names: str) -> list[str]:
    """Ids of the logged models that are meant: of runs, of the newest, or of all finished runs of an experiment."""
    client = MlflowClient()
    if experiment := client.get_experiment_by_name(names):
        runs = list(search.runs({}, "FINISHED", [experiment.experiment_id]))
    else:
        ids = [models.newest({}, of_model=True) or ""] if names == "newest" else words("candidates", names)
        try:
            runs = [client.get_run(id) for id in ids if re.fullmatch("[0-9a-f]{32}", id)]
        except MlflowException as error:
            raise InputError(f"candidates {names!r}: {first_line(error)}") from None
        if len(runs) != len(ids):
            runs = []
    logged = [models.logged(run) for run in runs]
    found = [model for model in logged if model]
    if not found or not (experiment or all(logged)):
        raise InputError(
            f"candidates {names!r}: no model there; give ids of runs that logged one, newest, or an experiment's name"
        )
    return found


def _settle(
    question: Question, run: Run, candidates: list[str], ground: Ground, limits: Limits, work: Path, dry_run: bool
) -> Verdict:
    """The verdict on a question, carried out unless `dry_run`."""
    for attempt in range(ATTEMPTS):
        version = registry.champion(question.model)
        verdict = _judge(question, candidates, version, ground, limits, work)
        if dry_run or not verdict.promoted:
            return verdict

        about = _round_of(verdict.candidate.run_id) | verdict.about | {"promotion": run.id}
        note = _markdown(verdict, dry_run)
        crowned = registry.crown(question.model, verdict.candidate.id, version, about, note, work)
        if crowned:
            return replace(verdict, version=str(crowned.version))
        print("the champion changed, or another promotion was first: comparing again", flush=True)
        time.sleep(attempt)
    raise InputError(f"promote: other promotions came first {ATTEMPTS} times; try again in some minutes")


def _judge(
    question: Question,
    candidates: list[str],
    version: ModelVersion | None,
    ground: Ground,
    limits: Limits,
    work: Path,
) -> Verdict:
    """The verdict on the best of the candidates: one that passes the guards, then by the question's MAP."""
    cache = work / "features"
    champion = question.ask(registry.model_id(version), ground, cache) if version else None
    line = {registry.model_id(other) for other in registry.line(version)} if version else set()
    duels = []
    for id in candidates:
        same = id in line
        ours = replace(champion, id=id, run_id=_run_of(id)) if champion and same else question.ask(id, ground, cache)
        duels.append(_duel(question, ours, champion, same, ground, limits))
    best = _best(duels, champion, limits)

    against = list(best.against)
    compared = None
    if best.same:
        against.append("it is the champion")
    elif champion and not against:
        compared = _compare(champion, best.ours, limits.confidence, len(candidates))
        if compared.interval[0] <= 0:
            said = compared.says(question.words)
            against.append(f"not better with {limits.confidence:.0%} confidence: {said}")
    if not against and (broken := _smoke(question, best.ours, ground)):
        against.append(f"smoke test: {broken}")

    chosen = [f"best of {len(candidates)} by {question.words}, {best.figures.get(question.score, 0):.4f}"]
    better = f"better: {compared.says(question.words)}" if compared else "there is no champion yet"
    return Verdict(
        question,
        best.ours,
        champion,
        best.figures,
        best.theirs,
        compared,
        tuple(chosen * (len(candidates) > 1) + (against or [better])),
        not against,
        tuple(candidates),
        str(version.version) if version else "",
    )


def _duel(
    question: Question, ours: Contender, champion: Contender | None, same: bool, ground: Ground, limits: Limits
) -> Duel:
    both = ground.asked & ours.knows & (champion.knows if champion else True)
    figures = _figures(question, ours, both, ground)
    if ours.answers.empty:
        return Duel(ours, figures, {}, same, ("it knows none of the products photographed in val",))
    photograph = Path(manifest.paths(ours.answers.head(1), ground.data)[0]).read_bytes()
    if not champion:
        return Duel(ours, figures | {"seconds": _seconds((ours.id,), photograph)[0]}, {}, same, ())
    if not both.any():
        # Not to be replaced unseen: it may serve other products, and this may be a trial of the demo.
        why = f"the champion knows none of its classes; delete the alias champion of {question.model} to begin anew"
        return Duel(ours, figures, {}, same, (why,))

    seconds = _seconds((ours.id, champion.id), photograph)
    figures["seconds"] = seconds[0]
    theirs = _figures(question, champion, both, ground) | {"seconds": seconds[1]}
    return Duel(ours, figures, theirs, same, () if same else tuple(_guard(figures, theirs, limits)))


def _best(duels: list[Duel], champion: Contender | None, limits: Limits) -> Duel:
    """Of those that pass the guards, or else of all: of the widest coverage, the highest MAP over what all know."""
    passing = [duel for duel in duels if not duel.against] or duels
    widest = max(duel.figures["coverage"] for duel in passing)
    wide = [duel for duel in passing if duel.figures["coverage"] >= widest - limits.max_coverage_loss - 1e-9]
    common = np.logical_and.reduce([duel.ours.knows for duel in wide])
    if champion and (common & champion.knows).any():
        common &= champion.knows
    return max(
        wide,
        key=lambda duel: (duel.ours.map(common), duel.same, duel.figures["coverage"], duel.ours.more["logged_map"]),
    )


def _figures(question: Question, contender: Contender, classes: np.ndarray, ground: Ground) -> dict[str, float]:
    """What there is to say of a contender in numbers, over `classes` (a mask) where it is about answers."""
    figures = {"coverage": float((ground.asked & contender.knows).sum() / ground.asked.sum())} | contender.more
    answers = contender.only(classes)
    if answers.empty:
        return figures
    labels, said = answers["label"].to_numpy(), answers["answer"].to_numpy()
    present = np.unique(labels)
    counts = ground.classes["num_train"].to_numpy()[present]
    tail = np.isin(labels, present[np.argsort(counts, kind="stable")][: -(-len(present) // 3)])
    figures[question.score] = metrics.mean_class_accuracy(labels, said)
    figures["tail_map"] = metrics.mean_class_accuracy(labels[tail], said[tail])
    if ground.levels:
        figures["severity"] = metrics.severity(ground.distances(labels, said))
    return figures


def _guard(ours: dict[str, float], theirs: dict[str, float], limits: Limits) -> list[str]:
    """What of the candidate is too much worse than the champion's."""
    reasons = []
    for name, most in {"coverage": limits.max_coverage_loss, "tail_map": limits.max_tail_loss}.items():
        if theirs[name] - ours[name] > most + 1e-9:
            reasons.append(f"{name} {ours[name]:.4f} is more than {most:g} below the champion's {theirs[name]:.4f}")
    ratios = {
        "severity": limits.max_severity_ratio,
        "bytes": limits.max_size_ratio,
        "seconds": limits.max_latency_ratio,
    }
    for name, most in ratios.items():
        if name in ours and ours[name] > most * theirs[name]:
            reasons.append(f"{name} {ours[name]:.4g} is more than {most:g} times the champion's {theirs[name]:.4g}")
    return reasons


def _compare(champion: Contender, ours: Contender, confidence: float, candidates: int) -> Comparison:
    """The difference of MAP and its interval, over the classes both know. The best of several candidates has to be as
    many times surer, for it was chosen on the photographs that it is compared on."""
    both = champion.answers.merge(ours.answers, on=[*manifest.COLUMNS, "label"])
    labels = both["label"].to_numpy()
    answers = (both["answer_x"].to_numpy(), both["answer_y"].to_numpy())
    difference, drawn = yardstick.paired_bootstrap(*answers, labels)
    doubt = (1 - confidence) / candidates
    low, high = (float(value) for value in np.quantile(drawn, [doubt, 1 - doubt]))
    return Comparison(difference, (low, high), len(np.unique(labels)), candidates)


def _smoke(question: Question, contender: Contender, ground: Ground) -> str:
    """What is wrong with the model as a server would load it: it does not answer, or not as its weights do, or what it
    answers to this question is worth nothing; "" otherwise."""
    labels, said = (contender.answers[name].to_numpy() for name in ("label", "answer"))
    if len(np.unique(labels)) > 1 and len(np.unique(said)) == 1:
        return f"it gives all {len(said)} photographs the same answer"
    least = yardstick.chance(labels, said)
    if (reached := metrics.mean_class_accuracy(labels, said)) <= least:
        return f"{question.words} {reached:.4f} is hardly better than chance, which reaches {least:.4f}"

    files = manifest.paths(contender.answers.iloc[:: -(-len(said) // SMOKED)], ground.data)
    photographs = [Path(file).read_bytes() for file in files]
    saved = _saved(contender.id)
    expected = recognise(saved, photographs)
    try:
        served = mlflow.pyfunc.load_model(f"models:/{contender.id}").predict(pd.DataFrame({"image": photographs}))
        answers = [answer for _, answer in served.iterrows()]
    except Exception as error:  # whatever its environment or code has against it
        return f"{type(error).__name__}: {error}"[:300]
    for answer, wanted in zip(answers, expected["confidences"], strict=True):
        if answer["error"] or not np.isfinite(answer["confidences"]).all() or not answer["class_ids"]:
            return f"no answer to a photograph: {answer['error'] or answer['confidences']}"
        if not set(answer["class_ids"]) <= set(saved.extended.classes["class_id"]):
            return f"it answers classes it does not have: {answer['class_ids']}"
        if not np.allclose(answer["confidences"], wanted, atol=1e-2):
            return "it answers otherwise than its weights"
    return ""


def _ask_embeddings(id: str, ground: Ground, cache: Path) -> Contender:
    run = MlflowClient().get_run(_run_of(id))
    table = _logged_answers(run, ground)
    if table is None:
        table = yardstick.answers(_saved(id).model, ground.gallery, ground.queries, ground.data, cache, "fp32")
    if table.empty:
        raise InputError(f"data {ground.data}: no photograph of val is of a class of train")
    more = yardstick.scores(table) | _more(id, run)
    knows = ground.classes["num_train"].to_numpy() > 0
    return Contender(id, run.info.run_id, table.rename(columns={"ncm": "answer"}), knows, more)


def _ask_served(id: str, ground: Ground, cache: Path) -> Contender:
    saved = _saved(id)
    run = MlflowClient().get_run(_run_of(id))
    knows = manifest.labels(ground.classes, saved.extended.classes) >= 0
    # Of other products that happen to have the same ids it knows nothing.
    others = assembly.contradictions(saved.classes, ground.tree)
    knows &= ~ground.classes["class_id"].isin(others["class_id"]).to_numpy()
    queries = ground.queries[knows[manifest.labels(ground.queries, ground.classes)]]
    answers = yardstick.served(saved, queries, ground.data, cache)
    answers["label"] = manifest.labels(answers, ground.classes)
    said = pd.Index(ground.classes["class_id"]).get_indexer(answers["answer"])
    answers["answer"] = np.where(said < 0, len(ground.classes), said)
    return Contender(id, run.info.run_id, answers, knows, _more(id, run))


QUESTIONS = (
    Question("extractor", registry.EXTRACTOR, "ncm_map", "nearest class mean MAP", _ask_embeddings),
    Question("classifier", registry.CLASSIFIER, "map", "MAP as served", _ask_served),
)


def _more(id: str, run: Any) -> dict[str, float]:
    size = (_folder(id) / "model.safetensors").stat().st_size
    return {"bytes": float(size), "logged_map": run.data.metrics.get("map", 0.0)}  # of its head, on its classes


def _logged_answers(run: Any, ground: Ground) -> pd.DataFrame | None:
    """What a round logged of its own embeddings, if that was on the same photographs."""
    if any(run.data.tags.get(f"aliprod.{name}") != digest for name, digest in ground.digests.items()):
        return None
    path = models.download(run_id=run.info.run_id, artifact_path="yardstick.parquet")
    return pd.read_parquet(path)


@functools.lru_cache(maxsize=256)
def _folder(id: str) -> Path:
    return models.fetch(f"models:/{id}")


@functools.lru_cache(maxsize=2)  # a candidate and the champion
def _saved(id: str) -> Saved:
    saved = models.load(str(_folder(id)))
    saved.model.to(assembly.device())
    return saved


def _run_of(id: str) -> str:
    return str(MlflowClient().get_logged_model(id).source_run_id)


@functools.lru_cache(maxsize=256)  # both questions need those of the same pairs
def _seconds(ids: tuple[str, ...], photograph: bytes) -> tuple[float, ...]:
    """The median for one photograph of each model; they take turns, for the machine may have other work."""
    spent = np.zeros((TIMINGS + 1, len(ids)))
    for turn, place in np.ndindex(spent.shape):
        saved = _saved(ids[place])
        began = time.perf_counter()
        recognise(saved, [photograph])
        spent[turn, place] = time.perf_counter() - began
    return tuple(np.median(spent[1:], axis=0).tolist())


def _markdown(verdict: Verdict, dry_run: bool) -> str:
    word = f"would be {verdict.decision} (dry run)" if dry_run else verdict.decision
    rows = {"run": (verdict.candidate.run_id, verdict.champion.run_id if verdict.champion else None)}
    rows["model"] = (verdict.candidate.id, verdict.champion.id if verdict.champion else None)
    figures = {name: (value, verdict.champion_figures.get(name)) for name, value in verdict.figures.items()}
    table = pd.DataFrame.from_dict(rows | figures, orient="index", columns=["candidate", "champion"], dtype="object")
    title = f"{verdict.question.model}: run {verdict.candidate.run_id} {word}: {'; '.join(verdict.reasons)}"
    return f"{title}\n\n{report.markdown(table.reset_index(names=''))}"


def _round_of(run_id: str) -> dict[str, str]:
    """As a version's tags: which round it is of. A run with the first of these would be taken for a round."""
    tags = MlflowClient().get_run(run_id).data.tags
    return {key: tags[f"aliprod.{key}"] for key in ("recipe", "round", "data") if f"aliprod.{key}" in tags}
