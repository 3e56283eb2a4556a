"""One champion per name at any time, replaced only by what is better, and put back in one command."""

import json
import os
import re
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

from aliprod import InputError, assembly, features, manifest, metrics, model, recipe, yardstick
from aliprod.images import Images
from aliprod.prediction import recognise
from entrypoints import predict, promote, rollback, train
from tracking import models, promotions, registry, runs, steps

ROOT = Path(__file__).parents[1]
NAMES = registry.NAMES
ROW = recipe.Round(name="tiny", init="imagenet", backbone="efficientnet_lite0", image_size=96)
LENIENT = {"max_tail_loss": 1.0, "max_severity_ratio": 10.0, "max_latency_ratio": 100.0}
KINDS = ("blind", "seeing", "headless", "half", "dim")


def log(kind: str, shop: Path, work: Path) -> str:
    """Run id of a logged model of one of five kinds, whose heads are the class means, unless they are left as they
    begin: one that sees nothing, one that sees, one that sees without a head, one that knows half of the classes, one
    that hardly sees; what else there is to a round is none of promotion's business."""
    row = ROW.model_copy(update={"samples_quantile": (0.5, 1.0)} if kind == "half" else {})
    if kind == "dim":
        row = row.model_copy(update={"image_size": 48})
    tables = assembly.tables(row, shop)
    network = assembly.model(row, len(tables.classes), row.init)
    if kind == "blind":
        for parameter in network.backbone.parameters():
            torch.nn.init.zeros_(parameter)
    elif kind != "headless":
        labels = manifest.labels(tables.train, tables.classes)
        images = Images(manifest.paths(tables.train, shop), labels, network.preprocessing)
        stored = features.compute(network, images, work / "features")
        vectors = torch.from_numpy(stored.store.take(stored.codes))
        means = torch.stack([vectors[labels == label].mean(dim=0) for label in range(len(tables.classes))])
        network.head.weight.data, network.head.bias.data = means, -means.square().sum(dim=1) / 2
    with runs.start(kind, work) as run:
        run.tags({"recipe": "small", "round": kind, "data": tables.data_digest})
        run.params({"data_folder": shop})
        network.save(run.folder / "model", tables.classes, tables.tree, {"run_id": run.id})
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
        return folder, {kind: log(kind, shop, folder / "work") for kind in KINDS}


@pytest.fixture
def kinds(logged, store, tmp_path, monkeypatch) -> dict[str, str]:
    """The runs of `logged`, in a store of this test's own."""
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    shutil.copy(logged[0] / "mlflow.db", tmp_path / "mlflow.db")
    return logged[1]


def offer(candidates: str, data: Path | str = "", **given: object) -> dict:
    """What promotion.json says of promoting them."""
    defaults = {"confidence": 0.95, "max_coverage_loss": 0.0, "max_size_ratio": 2.0, "dry_run": False}
    promote.main(**defaults | LENIENT | {"work": Path("work")} | given, candidates=candidates, data=str(data))
    client = MlflowClient()
    (newest,) = client.search_runs(["1"], "tags.mlflow.runName = 'promote'", max_results=1)
    assert newest.info.status == "FINISHED"
    return json.loads(Path(client.download_artifacts(newest.info.run_id, "promotion.json")).read_text())


def decisions(record: dict) -> tuple[str, str]:
    return record["extractor"]["decision"], record["classifier"]["decision"]


def crown(run: str) -> None:
    """Makes a run's model the first champion under both names, without asking."""
    (model,) = promotions.candidates(run)
    assert all(registry.crown(name, model, None, {}, "", Path("work")) for name in NAMES)


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
    with pytest.raises(InputError, match="have no champion"):
        rollback.main("", Path("work"))
    crown(kinds["blind"])
    with pytest.raises(InputError, match="version 1 of aliprod-extractor replaced none, there is no previous"):
        rollback.main("", Path("work"))

    assert decisions(offer(kinds["seeing"], dry_run=True)) == ("promoted", "promoted")
    said = capsys.readouterr().out
    assert said.count("would be promoted (dry run)") == 2
    assert f"data:      {shop} (what the model was trained on)" in said
    assert state() == holds(kinds["blind"]) and len(store.search_model_versions()) == 2
    better = offer(kinds["seeing"], shop)
    assert state() == holds(kinds["seeing"], kinds["blind"])
    for question, name, score in zip(("extractor", "classifier"), NAMES, ("ncm_map", "map"), strict=True):
        verdict = better[question]
        assert verdict["decision"] == "promoted" and verdict["interval"][0] > 0 and verdict["version"] == "2"
        assert verdict["difference"] == pytest.approx(verdict["candidate"][score] - verdict["champion"][score])
        version = store.get_model_version_by_alias(name, "champion")
        tags = {key.removeprefix("aliprod."): value for key, value in version.tags.items()}
        assert json.loads(tags["interval"]) == verdict["interval"] and tags["promotion"] == better["run"]
        assert tags["reasons"] == verdict["reasons"][0] and tags["round"] == "seeing"
        assert float(tags[score]) == pytest.approx(verdict["candidate"][score], abs=1e-5)
        assert f"| {score} |" in version.description
        assert store.get_run(better["run"]).data.metrics[f"{question}/{score}"] == verdict["candidate"][score]

    for worse, why in {"blind": "not better with 95% confidence", "seeing": "it is the champion"}.items():
        refused = offer(kinds[worse], shop)
        assert steps.resolve(worse, "small", manifest.digest(manifest.read(shop, "train")), {}) == kinds[worse]
        assert decisions(refused) == ("refused", "refused")
        assert all(why in refused[question]["reasons"][0] for question in ("extractor", "classifier"))
        tags = store.get_run(refused["run"]).data.tags
        assert tags["aliprod.decision"] == tags["aliprod.classifier.decision"] == "refused"
        assert why in tags["aliprod.extractor.reasons"]
    (half,) = offer(kinds["half"], shop, confidence=0.5)["classifier"]["reasons"][:1]
    assert "coverage" in half and "below the champion's 1.0000" in half
    assert state() == holds(kinds["seeing"], kinds["blind"]) and len(store.search_model_versions()) == 4

    began = time.process_time()
    rollback.main("", Path("work"))
    assert time.process_time() - began < 5
    assert capsys.readouterr().out.count("champion is version 1 again, not 2") == 2
    assert state() == holds(kinds["blind"], kinds["blind"])  # who replaced none is its own previous
    assert store.get_model_version(registry.EXTRACTOR, "2").tags["aliprod.decision"] == "rolled back"
    again = offer("aliprod", shop, confidence=0.5)  # the experiment of all of them
    assert again["classifier"]["candidate"]["run"] == kinds["seeing"] and len(again["classifier"]["candidates"]) == 5
    assert "as the best of 5 candidates" in again["classifier"]["reasons"][1]
    assert state()[registry.CLASSIFIER] == {"champion": kinds["seeing"], "previous": kinds["blind"]}
    assert again["extractor"]["decision"] == "promoted"


def test_one_promotion_may_crown_two_rounds_and_each_name_is_rolled_back_alone(kinds, store, shop, capsys):
    crown(kinds["blind"])
    offered = f"{kinds['headless']} {kinds['dim']}"
    # Better embeddings below a head that knows nothing, and poor ones below one that makes the most of them.
    assert decisions(offer(offered, confidence=0.5)) == ("promoted", "promoted")
    crowned = {
        registry.EXTRACTOR: {"champion": kinds["headless"], "previous": kinds["blind"]},
        registry.CLASSIFIER: {"champion": kinds["dim"], "previous": kinds["blind"]},
    }
    assert state() == crowned
    third = offer(kinds["seeing"], confidence=0.5)
    assert decisions(third) == ("refused", "promoted")
    assert state()[registry.EXTRACTOR] == crowned[registry.EXTRACTOR]
    assert state()[registry.CLASSIFIER] == {"champion": kinds["seeing"], "previous": kinds["dim"]}

    rollback.main("", Path("work"))  # what the last promotion made champion
    assert state() == crowned | {registry.CLASSIFIER: {"champion": kinds["dim"], "previous": kinds["blind"]}}
    rollback.main("extractor", Path("work"))
    assert state()[registry.EXTRACTOR] == {"champion": kinds["blind"], "previous": kinds["blind"]}
    assert state()[registry.CLASSIFIER] == crowned[registry.CLASSIFIER]
    with pytest.raises(InputError, match="version 1 of aliprod-extractor replaced none"):
        rollback.main("both", Path("work"))
    assert state()[registry.CLASSIFIER] == crowned[registry.CLASSIFIER]
    rollback.main("classifier", Path("work"))
    assert state() == holds(kinds["blind"], kinds["blind"])


@pytest.mark.parametrize(
    ("kind", "extractor", "classifier"),
    [
        ("blind", "smoke test: it gives all 16 photographs the same answer", "the same answer"),
        ("headless", "there is no champion yet", "MAP as served 0.*is hardly better than chance, which reaches 0"),
    ],
)
def test_what_is_useless_does_not_even_become_the_first_champion(kinds, store, kind, extractor, classifier):
    verdicts = offer(kinds[kind])
    for question, why in {"extractor": extractor, "classifier": classifier}.items():
        assert re.search(why, verdicts[question]["reasons"][0]), verdicts[question]["reasons"]
    names = [model.name for model in store.search_registered_models()]
    assert names == [registry.EXTRACTOR] * (kind == "headless")


def test_a_classifier_is_compared_on_the_classes_that_both_know_each_answering_among_its_own(kinds, shop):
    crown(kinds["half"])
    verdict = offer(kinds["seeing"])["classifier"]
    known = models.load(kinds["half"]).classes["class_id"]
    queries = manifest.read(shop, "val")
    queries = queries[queries["class_id"].isin(known)]
    files = manifest.paths(queries, shop)
    for side, kind in {"candidate": "seeing", "champion": "half"}.items():
        first = recognise(models.load(kinds[kind]), files)["class_ids"].str[0]
        right = pd.Series(first.to_numpy() == queries["class_id"].to_numpy())
        assert verdict[side]["map"] == pytest.approx(right.groupby(queries["class_id"].to_numpy()).mean().mean())
    assert verdict["num_classes"] == len(known) and verdict["champion"]["coverage"] == len(known) / 8
    assert verdict["candidate"]["coverage"] == 1


def test_a_champion_of_other_products_is_not_replaced_unseen(kinds, shop, tmp_path):
    shutil.copytree(shop, tmp_path / "other")
    tree = (shop / "product_tree.json").read_text()
    (tmp_path / "other" / "product_tree.json").write_text(tree.replace('"name": "', '"name": "Other '))
    with pytest.raises(InputError, match="8 of the model's 8 classes are other products there"):
        offer(kinds["seeing"], tmp_path / "other")
    crown(kinds["dim"])
    theirs = log("seeing", tmp_path / "other", Path("work"))
    verdict = offer(theirs, confidence=0.5)["classifier"]
    assert verdict["reasons"] == [
        "the champion knows none of its classes; delete the alias champion of aliprod-classifier to begin anew"
    ]
    assert state()[registry.CLASSIFIER] == {"champion": kinds["dim"]}


def test_the_best_of_several_is_of_the_widest_coverage_first(kinds):
    verdict = offer(f"{kinds['half']} {kinds['dim']}", max_coverage_loss=0.0)["classifier"]
    assert verdict["candidate"]["run"] == kinds["dim"] and verdict["decision"] == "promoted"


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
    same = offer("newest", shop)["extractor"]
    assert "it is the champion" not in same["reasons"][0]
    assert same["decision"] == "refused" and same["interval"] == [0, 0]  # another head on the same extractor


def test_what_does_not_load_as_served_is_refused(kinds, store, shop, monkeypatch):
    monkeypatch.setattr(mlflow.pyfunc, "load_model", lambda uri: (_ for _ in ()).throw(OSError("no such package")))
    verdicts = offer(kinds["seeing"], shop)
    assert [verdicts[name]["reasons"] for name in ("extractor", "classifier")] == [
        ["smoke test: OSError: no such package"]
    ] * 2
    assert decisions(verdicts) == ("refused", "refused") and store.search_registered_models() == []


@pytest.mark.parametrize("candidates", ["", "nowhere", "o'brien's", "0" * 32, "newest 1"])
def test_candidates_that_are_none_are_refused(store, shop, candidates):
    with pytest.raises(InputError, match=f"candidates [\"']{candidates}[\"']"):
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

    def slow(question, candidates, version, *given):
        verdict = judge(question, candidates, version, *given)
        overs.append(int(version.version))
        if len(overs) == 1:
            (seeing,) = promotions.candidates(kinds["seeing"])
            assert registry.crown(question.model, seeing, version, {}, "", Path("elsewhere"))
        return verdict

    monkeypatch.setattr(promotions, "_judge", slow)
    verdicts = offer(kinds["seeing"], shop)
    assert overs == [1, 2, 1] and verdicts["extractor"]["reasons"] == ["it is the champion"]
    assert verdicts["classifier"]["decision"] == "promoted"
    assert state() == holds(kinds["seeing"], kinds["blind"])


@pytest.mark.parametrize("name", NAMES)
def test_of_claims_from_several_machines_one_wins(kinds, tmp_path, name):
    crown(kinds["blind"])
    ids = [promotions.candidates(kinds[kind])[0] for kind in ("seeing", "half", "seeing", "half")]
    over = registry.champion(name)
    start, won = threading.Barrier(len(ids)), []

    def claim(number: int) -> None:
        start.wait()
        won.append(registry.crown(name, ids[number], over, {}, "", tmp_path / f"machine {number}"))

    threads = [threading.Thread(target=claim, args=(number,)) for number in range(len(ids))]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert len(won) == len(ids)
    (winner,) = [version for version in won if version]
    assert state() == holds(kinds["blind"]) | {name: {"champion": winner.run_id, "previous": kinds["blind"]}}


def test_a_claim_that_a_dead_machine_left_does_not_last(kinds, monkeypatch):
    crown(kinds["blind"])
    (seeing,) = promotions.candidates(kinds["seeing"])
    registry._register(registry.EXTRACTOR, seeing, {"decision": "claimed", "over": 1}, "")
    offered = (registry.EXTRACTOR, seeing, registry.champion(registry.EXTRACTOR), {}, "", Path("work"))
    assert registry.crown(*offered) is None
    monkeypatch.setattr(registry, "PATIENCE", 0)
    assert registry.crown(*offered)
    client = MlflowClient()
    client.delete_registered_model_alias(registry.EXTRACTOR, "previous")  # as if it had died before these
    client.set_model_version_tag(registry.EXTRACTOR, "3", "aliprod.decision", "claimed")
    registry.repair(Path("work"))
    assert state()[registry.EXTRACTOR] == {"champion": kinds["seeing"], "previous": kinds["blind"]}
    assert registry.champion(registry.EXTRACTOR).tags["aliprod.decision"] == "promoted"
    client.delete_model_version(registry.EXTRACTOR, "1")
    with pytest.raises(InputError, match="rollback: .*version=1"):
        rollback.main("extractor", Path("work"))
    assert registry.champion(registry.EXTRACTOR).run_id == kinds["seeing"]


class Killed(BaseException):
    """A machine's death, at a place that the test names."""


def dying(monkeypatch, number: int) -> None:
    """Lets this process die before its `number`th write to the registry from now on."""
    writes = ("create_model_version", "update_model_version", "set_model_version_tag", "set_registered_model_alias")
    count = 0

    def counted(write):
        def writing(*given, **named):
            nonlocal count
            count += 1
            if count == number:
                raise Killed
            return write(*given, **named)

        return writing

    client = mlflow.tracking._model_registry.client.ModelRegistryClient
    for name in writes:
        monkeypatch.setattr(client, name, counted(getattr(client, name)))


@pytest.mark.parametrize("change", ["crown", "rollback", "rollback of both", "enrolment"])
def test_a_change_that_dies_at_any_step_is_completed_by_the_same_command(kinds, store, tmp_path, monkeypatch, change):
    """The store is a file: each death begins from the same one."""
    crown(kinds["blind"])
    (seeing,) = promotions.candidates(kinds["seeing"])
    for name in NAMES:
        registry.crown(name, seeing, registry.champion(name), {"promotion": 1}, "", Path("work"))
    shutil.copy(tmp_path / "mlflow.db", tmp_path / "before.db")

    def attempt() -> None:
        registry.repair(Path("work"))
        name = registry.CLASSIFIER
        champion = registry.champion(name)
        if change == "crown" and champion.run_id != kinds["dim"]:
            (dim,) = promotions.candidates(kinds["dim"])
            assert registry.crown(name, dim, champion, {}, "", Path("work"))
        if change.startswith("rollback"):
            registry.rollback([name] if change == "rollback" else [], Path("work"))
        if change == "enrolment" and "aliprod.enrolled" not in champion.tags:
            registry.succeed(champion, seeing, {"enrolled": 1}, Path("work"))

    def outcome() -> dict:
        versions = {
            (name, alias): store.get_model_version(name, number)
            for name in NAMES
            for alias, number in store.get_registered_model(name).aliases.items()
        }
        return {key: (version.run_id, version.tags.get("aliprod.enrolled")) for key, version in versions.items()}

    attempt()
    undisturbed = outcome()
    for number in range(1, 50):
        shutil.copy(tmp_path / "before.db", tmp_path / "mlflow.db")
        with monkeypatch.context() as patch:
            dying(patch, number)
            try:
                attempt()
            except Killed:
                pass
            else:
                break
        attempt()
        assert outcome() == undisturbed, f"died before write {number}"
        assert "claimed" not in {version.tags.get("aliprod.decision") for version in store.search_model_versions()}
    assert number > 3


def test_of_two_enrolments_at_once_the_second_is_overtaken(kinds, monkeypatch):
    crown(kinds["blind"])
    (source,) = MlflowClient().search_model_versions(f"name = '{registry.CLASSIFIER}'")
    model, register = registry.model_id(source), registry._register

    def late(*given: object) -> ModelVersion:
        """Another machine's comes first, and sees this one before it is known to be too late."""
        register(*given)
        version = register(*given)
        registry._follow(registry.CLASSIFIER)
        found = MlflowClient().get_model_version_by_alias(registry.CLASSIFIER, "champion").version
        assert found == version.version
        return version

    monkeypatch.setattr(registry, "_register", late)
    with pytest.raises(InputError, match="version 1 of aliprod-classifier was followed by 2.* go on from .*/2"):
        registry.succeed(source, model, {"enrolled": 1}, Path("work"))
    versions = MlflowClient().search_model_versions(f"name = '{registry.CLASSIFIER}'")
    assert {int(version.version): version.tags.get("aliprod.decision") for version in versions} == {
        1: "promoted", 2: None, 3: "overtaken"
    }  # fmt: skip
    assert int(MlflowClient().get_model_version_by_alias(registry.CLASSIFIER, "champion").version) == 2
    monkeypatch.undo()


def test_an_enrolment_does_not_undo_a_promotion_that_came_meanwhile(kinds, monkeypatch):
    crown(kinds["blind"])
    source = registry.champion(registry.CLASSIFIER)
    (seeing,) = promotions.candidates(kinds["seeing"])
    point, crowned = registry._point, []

    def late(name: str, alias: str, version: ModelVersion) -> None:
        """Another machine's promotion comes just before the alias is moved."""
        if not crowned:
            crowned.append(None)
            crowned.append(registry.crown(name, seeing, source, {}, "", Path("elsewhere")))
        point(name, alias, version)

    monkeypatch.setattr(registry, "_point", late)
    enrolled = registry.succeed(source, registry.model_id(source), {"enrolled": 1}, Path("work"))
    assert crowned[1]
    client = MlflowClient()
    aliases = {alias: int(version) for alias, version in client.get_registered_model(NAMES[1]).aliases.items()}
    assert aliases == {"champion": int(crowned[1].version), "previous": int(enrolled.version)}


def old_registry(kinds: dict[str, str]) -> None:
    """A registry from when both names moved as one: blind, seeing over it, and after that a version with enrolments."""
    client = MlflowClient()
    tied = ((1, "blind", {"over": ""}), (2, "seeing", {"over": 1}))
    for number, kind, over in tied:
        (id,) = promotions.candidates(kinds[kind])
        shared = {"round": kind, "model": id, "promotion": f"promotion {number}"}
        registry._register(registry.EXTRACTOR, id, shared | over | {"decision": "promoted"}, "")
        registry._register(registry.CLASSIFIER, id, shared | {"extractor": number}, "")
    registry._register(registry.CLASSIFIER, id, shared | {"extractor": 2, "enrolled": 3}, "")
    for name, champion in zip(NAMES, (2, 3), strict=True):
        client.set_registered_model_alias(name, "champion", champion)
        client.set_registered_model_alias(name, "previous", 1)


def numbers() -> dict[str, dict[str, int]]:
    client = MlflowClient()
    return {
        name: {alias: int(number) for alias, number in client.get_registered_model(name).aliases.items()}
        for name in NAMES
    }


def test_a_registry_of_names_that_moved_as_one_goes_on(kinds, shop):
    old_registry(kinds)
    registry.repair(Path("work"))
    assert numbers() == {NAMES[0]: {"champion": 2, "previous": 1}, NAMES[1]: {"champion": 3, "previous": 1}}
    assert offer(kinds["seeing"])["classifier"]["reasons"] == ["it is the champion"]
    (dim,) = promotions.candidates(kinds["dim"])
    with pytest.raises(InputError, match="version 2 of aliprod-classifier was followed by 3"):
        registry.succeed(registry.classifier(f"models:/{NAMES[1]}/2"), dim, {}, Path("work"))
    source = registry.classifier(f"models:/{NAMES[1]}@champion")
    assert int(registry.succeed(source, dim, {"enrolled": 4}, Path("work")).version) == 4
    assert numbers()[NAMES[1]] == {"champion": 4, "previous": 1}
    assert registry.crown(NAMES[1], dim, registry.champion(NAMES[1]), {"promotion": "new"}, "", Path("work"))
    assert numbers() == {NAMES[0]: {"champion": 2, "previous": 1}, NAMES[1]: {"champion": 5, "previous": 4}}
    rollback.main("", Path("work"))
    assert numbers() == {NAMES[0]: {"champion": 2, "previous": 1}, NAMES[1]: {"champion": 4, "previous": 1}}
    rollback.main("", Path("work"))
    assert numbers() == {name: {"champion": 1, "previous": 1} for name in NAMES}


def together(offered: list[str], work: Path) -> None:
    """Offers each run's model from a process of its own, all at the same time."""
    given = LENIENT | {"confidence": 0.95, "max_coverage_loss": 1, "max_size_ratio": 2, "dry_run": False, "work": work}
    options = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "entrypoints.promote", "--candidates", run, "--data", "", *options],
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
    together([kinds["seeing"], kinds["seeing"]], tmp_path / "work")
    assert state() == holds(kinds["seeing"], kinds["blind"])
    client = MlflowClient()
    tags = [run.data.tags for run in client.search_runs(["1"], "tags.mlflow.runName = 'promote'")]
    for name in ("extractor", "classifier"):
        assert sorted(one[f"aliprod.{name}.decision"] for one in tags) == ["promoted", "refused"]
    decided = [version.tags["aliprod.decision"] for version in client.search_model_versions()]
    assert decided.count("promoted") == 4 and "claimed" not in decided
    rollback.main("both", Path("work"))
    assert state() == holds(kinds["blind"], kinds["blind"])


@pytest.mark.parametrize("classes", [2, 20, 1000])
def test_chance_is_what_answers_reach_that_know_nothing_of_the_photographs(classes):
    rng = np.random.default_rng(classes)
    labels = np.repeat(np.arange(classes), 5)
    knowing_nothing = [metrics.mean_class_accuracy(labels, rng.permutation(labels)) for _ in range(200)]
    least = yardstick.chance(labels, rng.permutation(labels))
    assert np.mean(np.array(knowing_nothing) <= least) >= 0.94
    assert least >= min(2 / classes, 1 / classes + 0.05) - 1e-3
    assert metrics.mean_class_accuracy(labels, np.where(rng.random(len(labels)) < 0.9, labels, 0)) > least
    assert yardstick.chance(labels, np.zeros_like(labels)) >= 1 / classes  # always the same


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
