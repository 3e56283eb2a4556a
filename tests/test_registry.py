"""One champion at any time, replaced only by what is better, and put back in one command."""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion

from aliprod import InputError, assembly, manifest, metrics, model, recipe, yardstick
from entrypoints import predict, promote, rollback, train
from tracking import models, promotions, registry, runs, steps

ROOT = Path(__file__).parents[1]
NAMES = (registry.EXTRACTOR, registry.CLASSIFIER)
ROW = recipe.Round(name="tiny", init="imagenet", backbone="efficientnet_lite0", image_size=96)
LENIENT = {"max_tail_loss": 1.0, "max_severity_ratio": 10.0, "max_latency_ratio": 100.0}


def log(kind: str, shop: Path, work: Path) -> str:
    """Run id of a logged model of three kinds: one that sees nothing, one that sees, one that knows half the classes;
    what else there is to a round is none of promotion's business."""
    row = ROW.model_copy(update={"samples_quantile": (0.5, 1.0)} if kind == "half" else {})
    tables = assembly.tables(row, shop)
    made = assembly.model(row, len(tables.classes), row.init)
    if kind == "blind":
        for parameter in made.backbone.parameters():
            torch.nn.init.zeros_(parameter)
    with runs.start(kind, work) as run:
        run.tags({"recipe": "small", "round": kind, "data": tables.data_digest})
        made.save(run.folder / "model", tables.classes, tables.tree, {})
        run.model(run.folder / "model", manifest.paths(tables.val, shop)[0], step=1)
    return run.id


@pytest.fixture(scope="module")
def logged(shop, empty_store, tmp_path_factory) -> tuple[Path, dict[str, str]]:
    """A store with a run of each kind; the ids of the runs by their kinds."""
    folder = tmp_path_factory.mktemp("rounds")
    shutil.copy(empty_store, folder / "mlflow.db")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("MLFLOW_RUN_ID", raising=False)
        mlflow.set_tracking_uri(None)  # first, as it drops the variable
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
        return folder, {kind: log(kind, shop, folder / "work") for kind in ("blind", "seeing", "half")}


@pytest.fixture
def kinds(logged, store, tmp_path, monkeypatch) -> dict[str, str]:
    """The runs of `logged`, in a store of this test's own."""
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    shutil.copy(logged[0] / "mlflow.db", tmp_path / "mlflow.db")
    return logged[1]


def offer(candidates: str, data: Path, **given: object) -> dict:
    """What promotion.json says of promoting them."""
    defaults = {"confidence": 0.95, "max_coverage_loss": 0.0, "max_size_ratio": 2.0, "dry_run": False}
    promote.main(**defaults | LENIENT | {"work": Path("work")} | given, candidates=candidates, data=str(data))
    client = MlflowClient()
    (newest,) = client.search_runs(["1"], "tags.mlflow.runName = 'promote'", max_results=1)
    assert newest.info.status == "FINISHED"
    return json.loads(Path(client.download_artifacts(newest.info.run_id, "promotion.json")).read_text())


def crown(run: str) -> None:
    """Makes a run's model the first champion, without asking."""
    assert registry.crown(promotions._candidates(run)[0], None, {}, "", Path("work"))


def state() -> dict[str, dict[str, str]]:
    """For both names, which run's model each alias is at."""
    client = MlflowClient()
    found = {}
    for name in NAMES:
        aliases = client.get_registered_model(name).aliases
        found[name] = {alias: client.get_model_version(name, version).run_id for alias, version in aliases.items()}
    return found


def holds(champion: str, previous: str | None = None) -> dict[str, dict[str, str]]:
    wanted = {"champion": champion} | ({"previous": previous} if previous else {})
    return dict.fromkeys(NAMES, wanted)


def test_the_better_is_promoted_the_others_refused_and_a_rollback_takes_it_back(kinds, store, shop, capsys):
    with pytest.raises(InputError, match="has no champion"):
        rollback.main(Path("work"))
    assert offer(kinds["blind"], shop, dry_run=True)["decision"] == "promoted"
    assert store.search_registered_models() == []
    first = offer(kinds["blind"], shop)
    assert first["decision"] == "promoted" and first["reasons"] == ["there is no champion yet"]
    assert state() == holds(kinds["blind"])
    with pytest.raises(InputError, match="version 1 of aliprod-extractor replaced none, there is no previous"):
        rollback.main(Path("work"))

    assert offer(kinds["seeing"], shop, dry_run=True)["decision"] == "promoted"
    assert "would be promoted (dry run)" in capsys.readouterr().out
    assert state() == holds(kinds["blind"]) and len(store.search_model_versions()) == 2
    better = offer(kinds["seeing"], shop)
    assert better["decision"] == "promoted" and better["interval"][0] > 0
    assert better["difference"] == pytest.approx(better["candidate"]["ncm_map"] - better["champion"]["ncm_map"])
    assert state() == holds(kinds["seeing"], kinds["blind"])
    for name in NAMES:
        version = store.get_model_version_by_alias(name, "champion")
        tags = {key.removeprefix("aliprod."): value for key, value in version.tags.items()}
        assert json.loads(tags["interval"]) == better["interval"] and tags["promotion"] == better["run"]
        assert tags["reasons"] == better["reasons"][0] and tags["round"] == "seeing"
        assert float(tags["ncm_map"]) == better["candidate"]["ncm_map"]
        assert "| ncm_map |" in version.description

    for worse, why in {"blind": "not better with 95% confidence", "seeing": "it is the champion"}.items():
        refused = offer(kinds[worse], shop)
        assert steps.resolve(worse, "small", manifest.digest(manifest.read(shop, "train")), {}) == kinds[worse]
        assert refused["decision"] == "refused" and why in refused["reasons"][0]
        assert store.get_run(refused["run"]).data.tags["aliprod.decision"] == "refused"
    (half,) = offer(kinds["half"], shop, confidence=0.5)["reasons"][:1]
    assert "coverage" in half and "below the champion's 1.0000" in half
    assert state() == holds(kinds["seeing"], kinds["blind"]) and len(store.search_model_versions()) == 4

    began = time.process_time()
    rollback.main(Path("work"))
    assert time.process_time() - began < 5
    assert "champion is version 1 again, not 2" in capsys.readouterr().out
    assert state() == holds(kinds["blind"], kinds["blind"])  # who replaced none is its own previous
    assert store.get_model_version(registry.EXTRACTOR, "2").tags["aliprod.decision"] == "rolled back"
    again = offer("aliprod", shop)  # the experiment of all of them
    assert again["candidate"]["run"] == kinds["seeing"] and len(again["candidates"]) == 3
    assert "as the best of 3 candidates" in again["reasons"][1]
    assert state() == holds(kinds["seeing"], kinds["blind"])


def test_what_is_registered_is_trained_from_and_predicted_with(kinds, store, shop, tmp_path):
    offer(kinds["seeing"], shop)
    (tmp_path / "small.toml").write_text(recipe.to_toml(ROW))
    from_champion = "models:/aliprod-extractor@champion"
    given = {"round": "", "resume": "", "minutes": 0.0, "work": Path("work"), "overrides": "freeze=all epochs=1"}
    train.main(**given, recipe=str(tmp_path / "small.toml"), data=str(shop), init=from_champion)
    backbones = [model.load(models.fetch(name)).model.backbone for name in ("newest", kinds["seeing"])]
    assert len(set(map(model.weights_digest, backbones))) == 1
    photographs = str(shop / "val" / "00000")
    predict.main("models:/aliprod-classifier@champion", photographs, 3, 0.0, "both", Path("out.csv"), Path("work"))
    assert len(pd.read_csv("out.csv")) == 2
    assert "it is the champion" not in (same := offer("newest", shop))["reasons"][0]
    assert same["decision"] == "refused" and same["interval"] == [0, 0]  # another head on the same extractor


def test_what_does_not_load_as_served_is_refused(kinds, store, shop, monkeypatch):
    monkeypatch.setattr(mlflow.pyfunc, "load_model", lambda uri: (_ for _ in ()).throw(OSError("no such package")))
    verdict = offer(kinds["seeing"], shop)
    assert verdict["reasons"] == ["smoke test: OSError: no such package"]
    assert verdict["decision"] == "refused" and store.search_registered_models() == []


@pytest.mark.parametrize("candidates", ["", "nowhere", "0" * 32, "newest 1"])
def test_candidates_that_are_none_are_refused(store, shop, candidates):
    with pytest.raises(InputError, match=f"candidates '{candidates}'"):
        offer(candidates, shop)


@pytest.mark.parametrize(
    ("name", "champion", "candidate", "limit"),
    [
        ("tail_map", 0.5, 0.48, {"max_tail_loss": 0.01}),
        ("coverage", 1.0, 0.9, {"max_coverage_loss": 0.05}),
        ("severity", 1.0, 1.2, {"max_severity_ratio": 1.1}),
        ("bytes", 10, 21, {"max_size_ratio": 2.0}),
        ("seconds", 0.1, 0.3, {"max_latency_ratio": 2.0}),
    ],
)
def test_each_guard_refuses_what_it_guards_against(name, champion, candidate, limit):
    usual = {"tail_map": 0.5, "coverage": 1.0, "severity": 1.0, "bytes": 10, "seconds": 0.1}
    limits = promotions.Limits(**{"confidence": 0.95, "max_coverage_loss": 0, "max_size_ratio": 9} | LENIENT | limit)
    assert promotions._guard(usual, usual, limits) == []
    (reason,) = promotions._guard(usual | {name: candidate}, usual | {name: champion}, limits)
    assert reason.startswith(f"{name} {candidate:.2g}"[:6])


def test_a_champion_that_changed_meanwhile_is_compared_with_again(kinds, shop, monkeypatch):
    crown(kinds["blind"])
    judge, overs = promotions._judge, []

    def slow(found, version, *given):
        verdict = judge(found, version, *given)
        overs.append(version.version)
        if len(overs) == 1:
            (seeing,) = promotions._candidates(kinds["seeing"])
            assert registry.crown(seeing, version, {}, "", Path("elsewhere"))
        return verdict

    monkeypatch.setattr(promotions, "_judge", slow)
    verdict = offer(kinds["seeing"], shop)
    assert list(map(int, overs)) == [1, 2] and verdict["reasons"] == ["it is the champion"]
    assert state() == holds(kinds["seeing"], kinds["blind"])


def test_of_claims_from_several_machines_one_wins(kinds, tmp_path):
    crown(kinds["blind"])
    ids = [promotions._candidates(kinds[kind])[0] for kind in ("seeing", "half", "seeing", "half")]
    over = registry.champion()
    start, won = threading.Barrier(len(ids)), []

    def claim(number: int) -> None:
        start.wait()
        won.append(registry.crown(ids[number], over, {}, "", tmp_path / f"machine {number}"))

    threads = [threading.Thread(target=claim, args=(number,)) for number in range(len(ids))]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert len(won) == len(ids)
    (winner,) = [version for version in won if version]
    assert state() == holds(winner.run_id, kinds["blind"])


def test_a_claim_that_a_dead_machine_left_does_not_last(kinds, monkeypatch):
    crown(kinds["blind"])
    (seeing,) = promotions._candidates(kinds["seeing"])
    registry._register(registry.EXTRACTOR, seeing, {"decision": "claimed", "over": 1}, "")
    assert registry.crown(seeing, registry.champion(), {}, "", Path("work")) is None
    monkeypatch.setattr(registry, "PATIENCE", 0)
    assert registry.crown(seeing, registry.champion(), {}, "", Path("work"))
    client = MlflowClient()
    client.delete_registered_model_alias(registry.CLASSIFIER, "champion")  # as if it had died before these
    client.delete_registered_model_alias(registry.EXTRACTOR, "previous")
    client.set_model_version_tag(registry.EXTRACTOR, "3", "aliprod.decision", "claimed")
    registry.follow()
    assert state() == holds(kinds["seeing"], kinds["blind"])
    assert registry.champion().tags["aliprod.decision"] == "promoted"
    client.delete_model_version(registry.EXTRACTOR, "1")
    with pytest.raises(InputError, match="rollback: .*version=1"):
        rollback.main(Path("work"))
    assert registry.champion().run_id == kinds["seeing"]


def test_of_two_enrolments_at_once_the_second_is_overtaken(kinds, monkeypatch):
    crown(kinds["blind"])
    (source,) = MlflowClient().search_model_versions(f"name = '{registry.CLASSIFIER}'")
    model, register = registry.model_id(source), registry._register

    def late(*given: object) -> ModelVersion:
        """Another machine's comes first, and sees this one before it is known to be too late."""
        register(*given)
        made = register(*given)
        registry.follow()
        assert MlflowClient().get_model_version_by_alias(registry.CLASSIFIER, "champion").version == made.version
        return made

    monkeypatch.setattr(registry, "_register", late)
    with pytest.raises(InputError, match="version 1 of aliprod-classifier was followed by 2.* go on from .*/2"):
        registry.succeed(source, model, {"enrolled": 1}, Path("work"))
    versions = MlflowClient().search_model_versions(f"name = '{registry.CLASSIFIER}'")
    assert {version.version: version.tags.get("aliprod.decision") for version in versions} == {
        1: None, 2: None, 3: "overtaken"
    }  # fmt: skip
    assert MlflowClient().get_model_version_by_alias(registry.CLASSIFIER, "champion").version == 2
    monkeypatch.undo()


def together(offered: list[str], data: Path, work: Path) -> None:
    """Offers each run's model from a process of its own, all at the same time."""
    given = LENIENT | {"confidence": 0.95, "max_coverage_loss": 1, "max_size_ratio": 2, "dry_run": False, "work": work}
    options = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "entrypoints.promote", "--candidates", run, "--data", str(data), *options],
            cwd=ROOT,
            env=os.environ | {"MLFLOW_TRACKING_URI": mlflow.get_tracking_uri()},
        )
        for run in offered
    ]
    assert [process.wait() for process in processes] == [0] * len(processes)


def test_two_promotions_at_once_on_a_server_end_with_one_champion(server, shop, tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    monkeypatch.chdir(tmp_path)
    mlflow.set_tracking_uri(server.uri)
    kinds = {kind: log(kind, shop, tmp_path / "work") for kind in ("blind", "seeing")}
    crown(kinds["blind"])
    together([kinds["seeing"], kinds["seeing"]], shop, tmp_path / "work")
    assert state() == holds(kinds["seeing"], kinds["blind"])
    client = MlflowClient()
    decided = [
        run.data.tags["aliprod.decision"] for run in client.search_runs(["1"], "tags.mlflow.runName = 'promote'")
    ]
    assert sorted(decided) == ["promoted", "refused"]
    versions = client.search_model_versions(f"name = '{registry.EXTRACTOR}'")
    decisions = [version.tags["aliprod.decision"] for version in versions]
    assert decisions.count("promoted") == 2 and "claimed" not in decisions
    rollback.main(Path("work"))
    assert state() == holds(kinds["blind"], kinds["blind"])


def test_the_paired_bootstrap_is_that_of_a_loop_and_of_scipy():
    rng = np.random.default_rng(1)
    labels = rng.integers(40, size=300) * 2  # every other class has no photograph
    first = np.where(rng.random(300) < 0.5, labels, 1)
    second = np.where(rng.random(300) < 0.6, labels, 1)
    difference, drawn = yardstick.paired_bootstrap(first, second, labels)
    pairs = [
        np.array([np.mean(answers[labels == one] == one) for one in np.unique(labels)]) for answers in (first, second)
    ]
    assert difference == pytest.approx(pairs[1].mean() - pairs[0].mean())
    assert difference == pytest.approx(
        metrics.mean_class_accuracy(labels, second) - metrics.mean_class_accuracy(labels, first)
    )
    loop = []
    for _ in range(10_000):
        classes = rng.integers(len(pairs[0]), size=len(pairs[0]))
        loop.append(np.mean([pairs[1][one] - pairs[0][one] for one in classes]))
    expected = scipy.stats.bootstrap(
        pairs, lambda a, b, axis: (b - a).mean(axis=axis), paired=True, n_resamples=10_000, method="percentile",
        confidence_level=0.9, rng=2,
    ).confidence_interval  # fmt: skip
    for level, oracle in {0.05: expected.low, 0.95: expected.high}.items():
        assert np.quantile(drawn, level) == pytest.approx(oracle, abs=0.004)
        assert np.quantile(drawn, level) == pytest.approx(np.quantile(loop, level), abs=0.004)
    assert drawn.std() == pytest.approx(np.std(loop), rel=0.03) and len(drawn) == 10_000
    same, none = yardstick.paired_bootstrap(first, first, labels)
    assert same == 0 and not none.any()
    assert (yardstick.paired_bootstrap(first, second, labels)[1] == drawn).all()
