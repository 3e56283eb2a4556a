"""A promotion under a run: candidates and champion measured by one yardstick, the better one crowned, the reasons kept.

Nothing of a model's own head or classes counts, only its embeddings of one folder's photographs; the guards keep what
the yardstick does not see from getting worse.
"""

import json
import re
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from aliprod import InputError, assembly, first_line, manifest, metrics, model, report, taxonomy, yardstick
from aliprod.parameters import words
from aliprod.prediction import recognise
from tracking import models, registry
from tracking.runs import Run

ATTEMPTS = 5  # at a comparison whose champion changes meanwhile
TIMINGS = 9  # photographs recognised by each, in turn


@dataclass(frozen=True)
class Limits:
    """How sure a promotion has to be, and how much worse than the champion the candidate may be elsewhere."""

    confidence: float = 0.95  # that the candidate's embeddings are better, in (0.5, 1)
    max_tail_loss: float = 0.01  # of MAP over the rarest third of the classes
    max_coverage_loss: float = 0.0  # of the share of the photographs' classes that its head knows
    max_severity_ratio: float = 1.1  # of the mean distance of wrong answers in the tree
    max_size_ratio: float = 2.0  # of the weights' bytes
    max_latency_ratio: float = 2.0  # of the seconds for one photograph on this machine


@dataclass(frozen=True)
class Ground:
    """The photographs that all are measured on: as of assembly.Tables."""

    data: Path
    gallery: pd.DataFrame
    queries: pd.DataFrame
    levels: taxonomy.Levels | None
    digests: dict[str, str]  # of both splits whole

    @staticmethod
    def read(data: Path) -> "Ground":
        """The whole train split of a folder, balanced, its whole val split, and its tree if there is one."""
        train, queries = manifest.read(data, "train"), manifest.read(data, "val")
        gallery = manifest.balance(train, seed=0)
        path = data / "product_tree.json"
        levels = taxonomy.read(path).levels(manifest.class_index(gallery)["class_id"]) if path.exists() else None
        digests = {"data": manifest.digest(train), "val": manifest.digest(queries)}
        return Ground(data, gallery, queries, levels, digests)


@dataclass(frozen=True)
class Contender:
    """A model, its answers by the yardstick, and what there is to say of it in numbers."""

    id: str
    run_id: str
    saved: model.Saved
    answers: pd.DataFrame
    figures: dict[str, float]


def promote(run: Run, candidates: str, ground: Ground, limits: Limits, work: Path, dry_run: bool) -> dict[str, Any]:
    """Crowns the best of the candidates if it is better than the champion, and logs why or why not.

    Returns what promotion.json holds: decision (promoted or refused), reasons, figures of both, the difference of
    nearest-class-mean MAP and the interval in which it lies. If the champion changes meanwhile, all is compared again.
    """
    found = _candidates(candidates)
    run.dataset(ground.gallery, str(ground.data), "gallery", "gallery")
    run.dataset(ground.queries, str(ground.data), "val", "queries")
    run.params({f"promotion.{name}": value for name, value in asdict(limits).items()})
    if not dry_run:
        registry.follow()
    for attempt in range(ATTEMPTS):
        version = registry.champion()
        verdict = _judge(found, version, ground, limits, work) | {"dry_run": dry_run, "run": run.id}
        if verdict["decision"] == "refused" or dry_run:
            break
        chosen = verdict["candidate"]["model"]
        crowned = registry.crown(chosen, version, _tags(verdict), markdown(verdict), work)
        if crowned:
            verdict["version"] = str(crowned.version)
            break
        print("the champion changed, or another promotion was first: comparing again", flush=True)
        time.sleep(attempt)
    else:
        raise InputError(f"promote: other promotions came first {ATTEMPTS} times; try again in some minutes")
    run.text(json.dumps(verdict, indent=2), "promotion.json")
    run.reports({"promotion.md": lambda: markdown(verdict)})
    run.tags(_figures(verdict) | {key: verdict[key] for key in ("decision", "dry_run")})
    run.tags({"mlflow.note.content": markdown(verdict)})
    run.metrics({name: value for name, value in verdict["candidate"].items() if not isinstance(value, str)}, 0)
    return verdict


def markdown(verdict: dict[str, Any]) -> str:
    """A verdict for people."""
    ours, theirs = verdict["candidate"], verdict["champion"] or {}
    word = f"would be {verdict['decision']} (dry run)" if verdict["dry_run"] else verdict["decision"]
    sides = pd.DataFrame({"candidate": ours, "champion": {name: theirs.get(name) for name in ours}})
    table = report.markdown(sides.reset_index(names=""))
    return f"run {ours['run']} {word}: {'; '.join(verdict['reasons'])}\n\n{table}"


def _judge(found: list[str], version: Any, ground: Ground, limits: Limits, work: Path) -> dict[str, Any]:
    """The verdict on the best of the candidates: one that passes the guards, then by the yardstick."""
    cache = work / "features"
    theirs = _measure(registry.model_id(version), ground, cache) if version else None
    best: Contender | None = None
    best_rank: tuple | None = None
    refusals: list[str] = []
    seconds: list[float] = []
    for id in found:
        same = theirs is not None and theirs.id == id
        ours = theirs if theirs and same else _measure(id, ground, cache)
        spent = _seconds([ours] + ([theirs] if theirs else []), ground)
        ours.figures["seconds"] = spent[0]
        reasons = _guard(ours.figures, theirs.figures | {"seconds": spent[1]}, limits) if theirs and not same else []
        figures = (ours.figures[name] for name in ("coverage", "logged_map"))
        rank = (not reasons, ours.figures["ncm_map"], same, *figures)
        if best_rank is None or rank > best_rank:
            best, best_rank, refusals, seconds = ours, rank, reasons, spent
    assert best
    if theirs:
        theirs.figures["seconds"] = seconds[1]
    compared: dict[str, Any] = {}
    if theirs and theirs.id == best.id:
        refusals.append("it is the champion")
    elif theirs:
        compared = _compare(theirs, best, limits.confidence, len(found))
        if compared["interval"][0] <= 0:
            refusals.append(f"not better with {limits.confidence:.0%} confidence: {compared['says']}")
    if not refusals and (broken := _smoke(best, ground)):
        refusals.append(f"smoke test: {broken}")
    chosen = [f"best of {len(found)} by nearest class mean MAP, {best.figures['ncm_map']:.4f}"] * (len(found) > 1)
    return {
        "decision": "refused" if refusals else "promoted",
        "reasons": chosen + (refusals or [f"better: {compared['says']}" if theirs else "there is no champion yet"]),
        "candidate": {"run": best.run_id, "model": best.id} | best.figures,
        "champion": {"run": theirs.run_id, "model": theirs.id, **theirs.figures} if theirs else None,
        "over": str(version.version) if version else "",
        "candidates": found,
        **ground.digests,
    } | compared  # fmt: skip


def _compare(theirs: Contender, ours: Contender, confidence: float, candidates: int) -> dict[str, Any]:
    """The difference of MAP and its interval. The best of several candidates has to be as many times surer, for it
    was chosen on the photographs that it is compared on."""
    both = theirs.answers.merge(ours.answers, on=[*manifest.COLUMNS, "label"])
    labels = both["label"].to_numpy()
    compared: dict[str, Any] = {}
    for kind in ("nn", "ncm"):
        answers = (both[f"{kind}_x"].to_numpy(), both[f"{kind}_y"].to_numpy())
        difference, drawn = yardstick.paired_bootstrap(*answers, labels)
        doubt = (1 - confidence) / candidates
        low, high = (float(value) for value in np.quantile(drawn, [doubt, 1 - doubt]))
        compared[kind] = {"difference": difference, "interval": [low, high]}
    num = len(np.unique(labels))
    says = f"nearest class mean MAP {difference:+.4f}, [{low:+.4f}, {high:+.4f}] over {num} classes"
    if candidates > 1:
        says += f", as the best of {candidates} candidates"
    return {"says": says, "nn": compared["nn"], **compared["ncm"]}


def _measure(id: str, ground: Ground, cache: Path) -> Contender:
    folder = models.fetch(f"models:/{id}")
    saved = model.load(folder)
    saved.model.to(assembly.device())
    run_id = str(MlflowClient().get_logged_model(id).source_run_id)
    run = MlflowClient().get_run(run_id)
    answers = _logged_answers(run, ground)
    if answers is None:
        answers = yardstick.answers(saved.model, ground.gallery, ground.queries, ground.data, cache, "fp32")
    if answers.empty:
        raise InputError(f"data {ground.data}: no photograph of val is of a class of train")
    labels, ncm = answers["label"].to_numpy(), answers["ncm"].to_numpy()
    counts = manifest.class_index(ground.gallery)["num_train"].to_numpy()
    present = np.unique(labels)
    rarest = present[np.argsort(counts[present], kind="stable")][: -(-len(present) // 3)]
    tail = np.isin(labels, rarest)
    figures = yardstick.scores(answers) | {"tail_map": metrics.mean_class_accuracy(labels[tail], ncm[tail])}
    if ground.levels:
        figures["severity"] = metrics.severity(ground.levels.distances(labels, ncm))
    known = manifest.labels(answers.drop_duplicates("class_id"), saved.classes) >= 0
    figures |= {"coverage": float(known.mean()), "bytes": float((folder / "model.safetensors").stat().st_size)}
    figures["logged_map"] = run.data.metrics.get("map", 0.0)  # of its head, on its classes
    return Contender(id, run_id, saved, answers, figures)


def _logged_answers(run: Any, ground: Ground) -> pd.DataFrame | None:
    """What a round logged of its own embeddings, if that was on the same photographs."""
    if any(run.data.tags.get(f"aliprod.{name}") != digest for name, digest in ground.digests.items()):
        return None
    path = models.download(run_id=run.info.run_id, artifact_path="yardstick.parquet")
    return pd.read_parquet(path)


def _seconds(contenders: list[Contender], ground: Ground) -> list[float]:
    """The median for one photograph of each; they take turns, for the machine may have other work."""
    photograph = [_photograph(contenders[0], ground)]
    spent = np.zeros((TIMINGS + 1, len(contenders)))
    for turn, place in np.ndindex(spent.shape):
        began = time.perf_counter()
        recognise(contenders[place].saved, photograph)
        spent[turn, place] = time.perf_counter() - began
    return np.median(spent[1:], axis=0).tolist()


def _guard(ours: dict[str, float], theirs: dict[str, float], limits: Limits) -> list[str]:
    """What of the candidate is too much worse than the champion's."""
    reasons = []
    for name, most in {"tail_map": limits.max_tail_loss, "coverage": limits.max_coverage_loss}.items():
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


def _smoke(contender: Contender, ground: Ground) -> str:
    """What is wrong with the model as a server would load it; "" if it answers as the weights do."""
    photograph = _photograph(contender, ground)
    try:
        served = mlflow.pyfunc.load_model(f"models:/{contender.id}").predict(pd.DataFrame({"image": [photograph]}))
        answer = served.iloc[0]
    except Exception as error:  # whatever its environment or code has against it
        return f"{type(error).__name__}: {error}"[:300]
    if answer["error"] or not np.isfinite(answer["confidences"]).all() or not answer["class_ids"]:
        return f"no answer to a photograph: {answer['error'] or answer['confidences']}"
    if not set(answer["class_ids"]) <= set(contender.saved.extended.classes["class_id"]):
        return f"it answers classes it does not have: {answer['class_ids']}"
    expected = recognise(contender.saved, [photograph]).iloc[0]["confidences"]
    return "" if np.allclose(answer["confidences"], expected, atol=1e-2) else "it answers otherwise than its weights"


def _photograph(contender: Contender, ground: Ground) -> bytes:
    return Path(manifest.paths(contender.answers.head(1), ground.data)[0]).read_bytes()


def _tags(verdict: dict[str, Any]) -> dict[str, Any]:
    """Of a version: which round it is of, and the figures. A run with the first of these would be taken for a round."""
    trained = MlflowClient().get_run(verdict["candidate"]["run"]).data.tags
    keys = [key for key in ("recipe", "round", "data") if f"aliprod.{key}" in trained]
    return {key: trained[f"aliprod.{key}"] for key in keys} | _figures(verdict)


def _figures(verdict: dict[str, Any]) -> dict[str, Any]:
    tags = {key: value for key, value in verdict["candidate"].items() if key not in ("run", "model")}
    tags |= {key: verdict[key] for key in ("difference", "interval") if key in verdict}
    tags = {key: f"{value:.6g}" if isinstance(value, float) else value for key, value in tags.items()}
    return tags | {"reasons": "; ".join(verdict["reasons"]), "promotion": verdict["run"]}


def _candidates(names: str) -> list[str]:
    """Ids of the logged models that are meant: of runs, of the newest, or of all finished runs of an experiment."""
    client = MlflowClient()
    if experiment := client.get_experiment_by_name(names):
        finished = "attributes.status = 'FINISHED'"
        runs = mlflow.search_runs([experiment.experiment_id], finished, output_format="list")
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
