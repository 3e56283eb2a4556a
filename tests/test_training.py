"""A round: resumed it equals one never stopped, frozen and cached it equals the slow way."""

import dataclasses
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from aliprod import InputError, assembly, features, manifest, training
from aliprod.images import CorruptImages, Images
from aliprod.model import Recogniser, load, weights_digest
from aliprod.prediction import predict
from aliprod.recipe import Round


def material(row: Round, data: Path) -> tuple[Recogniser, Images, Images]:
    tables = assembly.tables(row, data)
    model = assembly.model(row, len(tables.classes), row.init)

    def images(table, augment):
        labels = manifest.labels(table, tables.classes)
        return Images(manifest.paths(table, data), labels, model.preprocessing, augment=augment, seed=row.seed)

    return model, images(tables.train, row.augment), images(tables.val, "none")


def changed(row: Round, **fields) -> Round:
    return row.model_copy(update=fields)


def trained(row: Round, data: Path, folder: Path, **options) -> tuple[Recogniser, list[training.Report]]:
    model, source, val = material(row, data)
    return model, list(training.train(model, row, source, val, folder, **options))


ROUNDS = {
    "everything": {"augment": "light", "ema_decay": 0.9, "optimizer": "adamw", "schedule": "cosine"},
    "sgd": {"optimizer": "sgd", "warmup_epochs": 0.5},
    "half precision": {"precision": "bf16", "optimizer": "adam_gc", "freeze": 2, "loss": "focal"},
    "metric": {"head": "subcenter_arcface", "triplet_weight": 0.5, "images_per_class": 4, "logit_adjustment": 1.0},
}


@pytest.mark.parametrize("fields", ROUNDS.values(), ids=ROUNDS)
def test_a_round_stopped_and_resumed_ends_with_the_same_weights(row, shop, tmp_path, fields):
    row = changed(row, **fields)
    straight, reports = trained(row, shop, tmp_path / "straight")
    stop = threading.Event()
    model, source, val = material(row, shop)
    last = 0
    for report in training.train(model, row, source, val, tmp_path / "stopped", stop=stop, checkpoint_steps=3):
        stop.set()
        last = report.step
    assert last < reports[-1].step
    resumed, seen = trained(row, shop, tmp_path / "stopped", resume=True)
    assert weights_digest(resumed) == weights_digest(straight)
    epochs = [dataclasses.replace(report, curve=[]) for report in seen if report.train]
    assert epochs == [dataclasses.replace(report, curve=[]) for report in reports]
    assert sum((report.curve for report in seen), []) == sum((report.curve for report in reports), [])


def test_a_killed_process_resumes_to_the_same_weights(row, shop, tmp_path):
    row = changed(row, epochs=3, augment="light")
    script = (
        "import os, signal, sys; from pathlib import Path; sys.path.insert(0, 'tests')\n"
        "from test_training import material; from aliprod import training; from aliprod.recipe import Round\n"
        "row = Round.model_validate_json(sys.argv[1])\n"
        "model, source, val = material(row, Path(sys.argv[2]))\n"
        "for report in training.train(model, row, source, val, sys.argv[3], checkpoint_steps=1):\n"
        "    if report.step == 7: os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    folder = tmp_path / "killed"
    command = [sys.executable, "-c", script, row.model_dump_json(), str(shop), str(folder)]
    assert subprocess.run(command, cwd=Path(__file__).parents[1]).returncode == -signal.SIGKILL
    resumed, reports = trained(row, shop, folder, resume=True)
    straight, expected = trained(row, shop, tmp_path / "straight")
    assert weights_digest(resumed) == weights_digest(straight)
    assert reports[-1].val == expected[-1].val


def stopped(row: Round, data: Path, folder: Path, reports: int) -> list[Path]:
    """The checkpoints of a round that was stopped after so many reports, one per 3 updates and epoch, oldest first."""
    model, source, val = material(row, data)
    seen = training.train(model, row, source, val, folder, checkpoint_steps=3)
    [next(seen) for _ in range(reports)]
    return sorted(folder.glob("step-*.pt"))


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    middle = slice(len(data) // 2, len(data) // 2 + 500)  # more than what only aligns the tensors
    data[middle] = bytes(255 - value for value in data[middle])
    file.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "emptied": lambda file: file.write_bytes(b""),
    "cut off": lambda file: file.write_bytes(file.read_bytes()[:5000]),
    "a byte short": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "never written": lambda file: file.write_bytes(bytes(file.stat().st_size)),
    "garbage": lambda file: file.write_bytes(np.random.default_rng(0).bytes(5000)),
    "changed": flip,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_broken_checkpoint_is_known_by_its_bytes(tmp_path, damage):
    for step in (1, 2, 3):
        torch.save({"weights": torch.rand(100, 100)}, tmp_path / f"step-00000000{step}.pt")
    assert training.newest_checkpoint(tmp_path) == tmp_path / "step-000000003.pt"
    for step in (3, 2, 1):
        damage(tmp_path / f"step-00000000{step}.pt")
        assert training.newest_checkpoint(tmp_path) == (tmp_path / f"step-00000000{step - 1}.pt" if step > 1 else None)


@pytest.mark.parametrize("damage", [DAMAGES["emptied"], DAMAGES["cut off"]])
def test_the_whole_checkpoint_before_a_broken_one_is_resumed(row, shop, tmp_path, damage):
    row = changed(row, ema_decay=0.9, augment="light")
    straight, expected = trained(row, shop, tmp_path / "straight")
    before, newest = stopped(row, shop, tmp_path / "stopped", reports=3)
    damage(newest)
    assert training.newest_checkpoint(tmp_path / "stopped") == before
    resumed, reports = trained(row, shop, tmp_path / "stopped", resume=True)
    assert weights_digest(resumed) == weights_digest(straight)
    assert [report for report in reports if report.train][-1].val == expected[-1].val
    for file in (tmp_path / "stopped").glob("step-*.pt"):
        damage(file)
    with pytest.raises(InputError, match="holds no checkpoint that is whole"):
        trained(row, shop, tmp_path / "stopped", resume=True)


@pytest.mark.parametrize("damage", [DAMAGES["cut off"], Path.unlink])
def test_a_round_whose_best_weights_are_lost_keeps_the_best_of_what_follows(row, shop, tmp_path, damage):
    row = changed(row, epochs=3)
    for folder, epochs in (("goes on", 2), ("was done", 3)):  # then those of its last checkpoint are all there is
        model, source, val = material(row, shop)
        seen = training.train(model, row, source, val, tmp_path / folder)
        [next(seen) for _ in range(epochs)]
        damage(tmp_path / folder / "best.pt")
        last = weights_digest(model)
        resumed, reports = trained(row, shop, tmp_path / folder, resume=True)
        assert len(reports) == 3 and (folder == "goes on" or weights_digest(resumed) == last)
        assert folder == "was done" or reports[-1].best


def test_a_checkpoint_of_the_average_of_earlier_versions_is_resumed(row, shop, tmp_path):
    row = changed(row, ema_decay=0.9)
    *_, newest = stopped(row, shop, tmp_path, reports=2)
    checkpoint = torch.load(newest, weights_only=True)
    checkpoint["parts"]["average"]["n_averaged"] = torch.tensor(3)
    torch.save(checkpoint, newest)
    _, reports = trained(row, shop, tmp_path, resume=True)
    assert np.isfinite(reports[-1].val["loss"])


def test_the_time_that_a_round_took_before_it_was_stopped_is_kept(row, shop, tmp_path):
    *_, newest = stopped(row, shop, tmp_path, reports=2)
    before = [report["seconds"] for report in torch.load(newest, weights_only=True)["state"]["reports"]]
    _, reports = trained(row, shop, tmp_path, resume=True)
    assert min(before) > 0
    assert [report.seconds for report in reports[: len(before)]] == before
    assert all(report.seconds > 0 for report in reports)


def test_a_round_does_not_resume_on_other_data(row, shop, tmp_path):
    *_, newest = stopped(row, shop, tmp_path / "run", reports=2)
    model, source, val = material(row, shop)
    source.labels = source.labels[::-1].copy()
    with pytest.raises(InputError, match="belongs to other data: photographs or classes have changed since"):
        list(training.train(model, row, source, val, tmp_path / "run", resume=True))
    with pytest.raises(InputError, match="belongs to other data: the classes have changed since"):
        training.load_weights(Recogniser("test_resnet", 5, 64), newest)


def test_another_round_does_not_resume(row, shop, tmp_path):
    trained(changed(row, epochs=1), shop, tmp_path)
    with pytest.raises(InputError, match=r"another round: lr was 0\.001 and is 0\.5"):
        trained(changed(row, epochs=1, lr=0.5), shop, tmp_path, resume=True)
    with pytest.raises(InputError, match="holds no checkpoint"):
        trained(row, shop, tmp_path / "empty", resume=True)


@pytest.mark.parametrize("freeze", ["all", 3])
def test_frozen_stays_frozen_over_a_round(row, shop, tmp_path, freeze):
    row = changed(row, freeze=freeze, ema_decay=0.5)
    model, source, val = material(row, shop)
    model.freeze(freeze)
    before = {name: value.clone() for name, value in model.backbone.state_dict().items()}
    list(training.train(model, row, source, val, tmp_path))
    after = model.backbone.state_dict()
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert set(model.frozen) <= same
    modules = {name.rpartition(".")[0] for name in model.frozen}
    assert {name for name in before if name.rpartition(".")[0] in modules} <= same  # batch statistics too
    assert (same == set(before)) == (freeze == "all")


def test_cached_features_train_the_head_as_the_slow_way_does(row, shop, tmp_path):
    row = changed(row, freeze="all", epochs=3)
    slow, slow_reports = trained(row, shop, tmp_path / "slow")
    model, source, val = material(row, shop)
    source, val = (features.compute(model, images, tmp_path / "cache") for images in (source, val))
    reports = list(training.train(model, row, source, val, tmp_path / "fast"))
    torch.testing.assert_close(model.head.weight, slow.head.weight, atol=1e-5, rtol=1e-4)
    for fast, expected in zip(reports, slow_reports, strict=True):
        assert fast.train == pytest.approx(expected.train, abs=1e-4)
        assert fast.val == pytest.approx(expected.val, abs=1e-4)


def test_a_frozen_round_runs_the_backbone_once(row, shop, tmp_path, monkeypatch):
    row = changed(row, freeze="all", epochs=5)
    model, source, val = material(row, shop)
    seen = []
    monkeypatch.setattr(
        Recogniser, "embed", lambda self, x, embed=Recogniser.embed: seen.append(len(x)) or embed(self, x)
    )
    for _ in range(2):
        frozen = [features.compute(model, images, tmp_path / "cache") for images in (source, val)]
        list(training.train(model, row, *frozen, tmp_path / "run"))
    assert sum(seen) == len(source.paths) + len(val.paths)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_learns(row, shop, tmp_path, precision):
    _, reports = trained(changed(row, precision=precision, epochs=4, lr=3e-3), shop, tmp_path)
    assert reports[-1].train["loss"] < 0.9 * reports[0].train["loss"]


@pytest.mark.parametrize("head", ["cosine", "arcface", "subcenter_arcface"])
def test_every_head_learns_and_answers_alike_once_loaded(row, shop, tmp_path, head):
    row = changed(row, head=head, epochs=6, lr=3e-3, margin_range=0.2)
    model, reports = trained(row, shop, tmp_path)
    assert reports[-1].train["loss"] < 0.8 * reports[0].train["loss"]
    tables = assembly.tables(row, shop)
    model.save(tmp_path / "model", tables.classes, tables.tree, {})
    images = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8)
    assert torch.equal(load(tmp_path / "model").model(images), model.eval()(images))


def test_images_of_a_class_stand_together_when_asked(row):
    labels = np.random.default_rng(0).integers(0, 9, 200)
    rows = np.arange(200)
    batches = training._order(rows, labels, changed(row, images_per_class=4), 0)
    drawn = np.concatenate(batches)
    assert len(set(drawn)) == len(drawn) == 192
    pairs = [np.mean(labels[batch][1:] == labels[batch][:-1]) for batch in batches]
    assert np.mean(pairs) > 0.65  # 3 of 4 neighbours, but where a class runs out
    again = np.concatenate(training._order(rows, labels, changed(row, images_per_class=4), 1))
    assert not np.array_equal(drawn, again)


@pytest.mark.slow
def test_a_compiled_backbone_learns_the_same(row, shop, tmp_path):
    plain, compiled = (trained(changed(row, compile=on, epochs=1), shop, tmp_path / str(on)) for on in (False, True))
    assert compiled[1][-1].train["loss"] == pytest.approx(plain[1][-1].train["loss"], rel=1e-3)
    assert compiled[0].state_dict().keys() == plain[0].state_dict().keys()


def test_the_average_is_the_recursion(row, shop, tmp_path):
    """Its decay rises to the round's: 0.66 after 5 steps, 0.8 after 12."""
    row = changed(row, ema_decay=0.8, epochs=4)
    model, source, _ = material(row, shop)
    expected = torch.zeros_like(model.head.weight)
    for step, report in enumerate(training.train(model, row, source, None, tmp_path, checkpoint_steps=1), start=1):
        assert report.step == step
        decay = min(0.8, 1 - step ** (-2 / 3))
        expected = decay * expected + (1 - decay) * model.head.weight.detach()
    assert decay == 0.8
    torch.testing.assert_close(model.head.weight.detach(), expected, atol=1e-6, rtol=1e-5)


def test_a_short_round_with_an_average_is_no_worse_than_without(row, shop, tmp_path):
    row = changed(row, epochs=16, lr=3e-3, schedule="cosine", image_size=32)
    _, without = trained(row, shop, tmp_path / "without")
    _, averaged = trained(changed(row, ema_decay=0.999), shop, tmp_path / "averaged")
    assert averaged[-1].val["map"] >= without[-1].val["map"] > 0.3, "of 8 classes"
    assert averaged[-1].val["loss"] < 1.05 * without[-1].val["loss"]


def test_the_kept_weights_are_those_of_the_best_epoch(row, shop, tmp_path):
    row = changed(row, epochs=6, lr=3e-2)
    model, source, val = material(row, shop)
    digests, scores = [], []
    for report in training.train(model, row, source, val, tmp_path):
        digests.append(weights_digest(model))
        scores.append(report.val["map"])
    assert weights_digest(model) == digests[int(np.argmax(scores))]
    assert [report_map == max(scores[: i + 1]) and report_map not in scores[:i] for i, report_map in enumerate(scores)]


def test_unreadable_images_are_left_out_and_counted(row, shop, tmp_path):
    model, source, val = material(row, shop)
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no image")
    source.paths[3], source.paths[5] = str(broken), str(tmp_path / "missing.jpg")
    reports = list(training.train(model, row, source, val, tmp_path / "run"))
    assert set(source.corrupt) == {3, 5}
    assert np.isfinite(reports[-1].train["loss"])
    source.max_corrupt_share, source.corrupt = 0.01, {}
    with pytest.raises(CorruptImages, match=r"of \d+ images cannot be read, more than max_corrupt_share 0.01"):
        list(training.train(model, row, source, val, tmp_path / "again"))


@pytest.mark.parametrize("place", [1, -1])
@pytest.mark.parametrize("readable", [0, 1])
def test_a_batch_with_one_readable_image_or_none_is_passed_over(row, shop, tmp_path, readable, place):
    """ResNeSt's attention is normalised over the batch alone, which one image cannot be."""
    row = changed(row, backbone="resnest14d", image_size=32, batch_size=10, epochs=1)
    model, source, val = material(row, shop)
    for lost in training._order(source.rows, source.labels, row, 0)[place][readable:]:
        source.paths[lost] = str(tmp_path / "missing.jpg")
    val.rows = val.rows[:1]
    (report,) = training.train(model, row, source, val, tmp_path)
    assert report.step == len(source.rows) // 10 - 1
    assert np.isfinite([*report.train.values(), report.val["loss"]]).all()


@pytest.mark.parametrize("readable", [0, 1])
def test_an_epoch_without_a_batch_to_learn_from_ends_the_round(row, shop, tmp_path, readable):
    model, source, val = material(changed(row, batch_size=100), shop)
    source.paths = source.paths[:readable] + [str(tmp_path / "missing.jpg")] * (len(source.paths) - readable)
    with pytest.raises(InputError, match="epoch 1: no batch of its 1 has two photographs that can be read"):
        list(training.train(model, changed(row, batch_size=100), source, val, tmp_path))


@pytest.mark.parametrize("precision, optimizer", [("fp32", "adamw"), ("fp32", "sgd"), ("fp16", "sgd_gc")])
def test_a_round_that_diverges_ends_at_that_epoch(row, shop, tmp_path, precision, optimizer):
    fields = {"precision": precision, "optimizer": optimizer, "lr": 10.0, "weight_decay": 0.99}
    row = changed(row, **fields, epochs=30, image_size=32)
    model, source, val = material(row, shop)
    with pytest.raises(training.Diverged) as ended:
        list(training.train(model, row, source, val, tmp_path))
    saved = torch.load(file, weights_only=True) if (file := training.newest_checkpoint(tmp_path)) else {"state": {}}
    epoch = saved["state"].get("epoch", 0) + 1
    wider = ", or precision bf16 or fp32," if precision == "fp16" else ""
    what = "(loss is|weights are|optimizer's moments are|loss on val is)"
    expected = f"round tiny: in epoch {epoch} its {what} no longer finite; a lower lr than 10{wider} may help"
    assert epoch < 15 and re.fullmatch(expected, str(ended.value))


@pytest.mark.parametrize("place", ["weights", "statistics", "moments"])
def test_whatever_stops_being_finite_ends_the_round(row, shop, tmp_path, place):
    """Statistics of batches and an optimizer's moments can be spoilt while weights and loss are still finite."""
    model, source, _ = material(row, shop)
    learner = training._Learner(model, row, source, levels=None)
    ((images, rows),) = source.batches([source.rows[:8]])
    learner.step(images, torch.from_numpy(source.labels[rows]), 1e-3)
    learner.refuse_what_diverged(torch.tensor(1.0), epoch=1)
    moment = next(iter(learner.optimizer.state.values()))["exp_avg_sq"]
    with torch.no_grad():
        spoilt = {"weights": model.head.bias, "statistics": model.backbone.bn1.running_var, "moments": moment}[place]
        spoilt.fill_(torch.inf)
    with pytest.raises(training.Diverged, match="moments" if place == "moments" else "weights"):
        learner.refuse_what_diverged(torch.tensor(1.0), epoch=1)


TRIPLETS = {"loss": "triplet", "head": "cosine", "batch_size": 6}


@pytest.mark.parametrize("asked", [TRIPLETS, {"triplet_weight": 0.5, "batch_size": 6}], ids=["alone", "added"])
@pytest.mark.parametrize(
    "labels, images_per_class",
    [
        (np.arange(60), 1),  # one photograph of each class
        (np.arange(60), 4),
        (np.arange(60) // 2 % 30, 1),  # two of each, but hardly ever in one batch
        (np.repeat([0, 1], [59, 1]), 1),  # hardly a batch of more than one class
        (np.minimum(np.arange(60), 50), 4),  # one class alone has more than one
    ],
)
def test_a_round_of_triplets_without_any_is_refused_before_it_starts(
    row, shop, tmp_path, asked, labels, images_per_class
):
    row = changed(row, **asked, images_per_class=images_per_class)
    model, source, val = material(row, shop)
    source.rows, source.labels = np.arange(60), labels
    words = (
        rf"round tiny: \d of the 10 batches .* hold a triplet.* images_per_class from 2 \(it is {images_per_class}\)"
    )
    with pytest.raises(InputError, match=words):
        next(training.train(model, row, source, val, tmp_path))
    assert not list(tmp_path.iterdir())
    without = changed(row, loss="cross_entropy", triplet_weight=0.0)
    training._refuse_without_triplets(without, source)
    source.labels = np.arange(60) // 4
    training._refuse_without_triplets(changed(row, images_per_class=2), source)


@pytest.mark.slow
def test_a_round_that_cannot_be_compiled_says_so_at_its_first_step(row, shop, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("/nowhere/g++",))
    model, source, val = material(changed(row, compile=True), shop)
    with pytest.raises(InputError, match="compile true: nothing can be compiled here, .*compiler.*; must be false"):
        next(training.train(model, changed(row, compile=True), source, val, tmp_path / "run"))


def test_an_interrupted_embedding_goes_on_where_it_was(row, shop, tmp_path, monkeypatch):
    monkeypatch.setattr(features, "BATCH_SIZE", 8)
    monkeypatch.setattr(features, "SAVE_EVERY", 2)
    model, source, _ = material(row, shop)
    whole = features.compute(model, source, tmp_path / "whole")
    seen = 0

    def embed(self, images, embed=Recogniser.embed):
        nonlocal seen
        seen += len(images)
        if seen == 32:
            raise KeyboardInterrupt
        return embed(self, images)

    monkeypatch.setattr(Recogniser, "embed", embed)
    with pytest.raises(KeyboardInterrupt):
        features.compute(model, source, tmp_path / "parts")
    parts = features.compute(model, source, tmp_path / "parts")
    assert seen == 32 + len(source.paths) - 16
    assert np.array_equal(parts.store.take(parts.codes), whole.store.take(whole.codes))


def test_the_cache_notices_other_weights_sizes_and_files(row, shop, tmp_path):
    model, source, _ = material(row, shop)
    first = features.compute(model, source, tmp_path).store.digest
    assert features.compute(model, source, tmp_path, "bf16").store.digest != first
    with torch.no_grad():
        next(model.backbone.parameters()).add_(1e-3)
    assert features.compute(model, source, tmp_path).store.digest != first


def test_only_files_that_are_new_or_changed_are_embedded(row, shop, tmp_path, monkeypatch):
    model, source, _ = material(row, shop)
    seen = []
    monkeypatch.setattr(
        Recogniser, "embed", lambda self, x, embed=Recogniser.embed: seen.append(len(x)) or embed(self, x)
    )
    copies = [str(tmp_path / f"{number}.jpg") for number in range(20)]
    for path, copy in zip(source.paths, copies, strict=False):
        shutil.copy(path, copy)
    broken = copies[:6] + [str(tmp_path / "missing.jpg")]
    first = features.compute(model, source.replace(broken), tmp_path / "cache")
    assert sum(seen) == 6 and set(first.corrupt) == {6}
    shutil.copy(source.paths[20], copies[3])
    shutil.copy(source.paths[21], tmp_path / "missing.jpg")
    mixed = [copies[7], *broken, *copies[5:]]
    second = features.compute(model, source.replace(mixed), tmp_path / "cache")
    assert sum(seen) == 6 + 2 + 14 and not second.corrupt
    assert second.codes[1:4].tolist() == first.codes[:3].tolist()  # rows keep their place
    alone = features.compute(model, source.replace(mixed), tmp_path / "another")
    np.testing.assert_allclose(second.store.take(second.codes), alone.store.take(alone.codes), atol=1e-5)


def test_repeated_rows_are_embedded_once(row, shop, tmp_path):
    model, source, _ = material(row, shop)
    grown = Images(source.paths + source.paths[:7], np.append(source.labels, source.labels[:7]), model.preprocessing)
    cached = features.compute(model, grown, tmp_path)
    assert len(cached.store.keys) == len(source.paths)
    ((batch, _),) = cached.batches([np.array([3, len(source.paths) + 3])])
    assert torch.equal(batch[0], batch[1])


def test_predictions_do_not_depend_on_the_batch_size(row, shop, tmp_path, monkeypatch):
    model, _, val = material(row, shop)
    whole = predict(model, val)
    monkeypatch.setattr("aliprod.prediction.BATCH_SIZE", 3)
    parts = predict(model, val)
    assert (parts["pred"] == whole["pred"]).all()
    np.testing.assert_allclose(parts.to_numpy(), whole.to_numpy(), atol=1e-5)


def test_predictions_are_the_softmax(row, shop):
    model, _, val = material(row, shop)
    table = predict(model, val, top=3)
    with torch.inference_mode():
        batch, rows = next(val.batches([val.rows]))
        probabilities = model(batch).softmax(dim=1)
    best = probabilities.topk(3)
    assert table[["pred", "pred_2", "pred_3"]].to_numpy().tolist() == best.indices.tolist()
    np.testing.assert_allclose(table[["confidence", "confidence_2", "confidence_3"]], best.values, atol=1e-5)
    labels = torch.from_numpy(val.labels[rows])
    np.testing.assert_allclose(table["loss"], -probabilities[torch.arange(len(rows)), labels].log(), atol=1e-5)
