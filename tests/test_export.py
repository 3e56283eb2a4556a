"""Exported models: the same answers as torch's from one file that needs neither torch nor the saved model."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pandas as pd
import pytest
import torch

from aliprod import InputError, assembly, export, manifest, prediction, training
from aliprod.exported import Exported
from aliprod.model import Saved, load, weights_digest
from entrypoints import export as entry
from entrypoints.command import command

HEADS = ["linear", "cosine", "arcface", "subcenter_arcface"]
MODELS = [
    *({"head": head} for head in HEADS),
    *({"head": head, "hierarchy": "paths"} for head in HEADS),
    {"hierarchy": "branches", "level_weights": {"1": 0.5}},
    {"hierarchy": "branches", "level_weights": {"2": 0.5}, "branch_stage": 2},
]
SIZE = 64  # pixels


@pytest.fixture
def made(row, shop, tmp_path):
    """Saves an untrained model of a round that differs from `row` in some fields; gives what was loaded again."""

    def make(calibration: dict | None = None, **fields) -> Saved:
        changed = row.model_copy(update=fields)
        tables = assembly.tables(changed, shop)
        model = assembly.model(changed, len(tables.classes), "random", tables.levels)
        with torch.no_grad():
            for parameter in model.head.parameters():  # the nodes' start at 0
                parameter.add_(torch.randn_like(parameter) / 4)
        about = {"recipe": "small", "round": changed.model_dump(), "run_id": "0123"}
        about |= {"calibration": calibration} if calibration else {}
        model.save(tmp_path / "model", tables.classes, tables.tree, about)
        return load(tmp_path / "model")

    return make


@pytest.fixture(scope="module")
def trained(shop, tmp_path_factory) -> Saved:
    """A small network that has learnt the shop's train photographs."""
    from aliprod.recipe import Round

    fields = {"init": "random", "backbone": "test_resnet", "batch_size": 16, "lr": 3e-3, "image_size": SIZE}
    row = Round(name="trained", epochs=15, schedule="cosine", **fields)
    folder = tmp_path_factory.mktemp("trained")
    tables = assembly.tables(row, shop)
    model = assembly.model(row, len(tables.classes), "random", tables.levels)
    source = assembly.inputs(model, row, tables.train, tables.classes, shop, folder, "none")
    list(training.train(model, row, source, None, folder / "run", levels=tables.levels))
    model.save(folder / "model", tables.classes, tables.tree, {})
    return load(folder / "model")


def photographs(count: int) -> np.ndarray:
    return np.random.default_rng(count).integers(0, 256, (count, 3, SIZE, SIZE), dtype=np.uint8)


def torchs(saved: Saved, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    with torch.inference_mode():
        embeddings = saved.model.embed(torch.from_numpy(images))
        return (saved.model.head(embeddings) / saved.temperature).softmax(dim=1).numpy(), embeddings.numpy()


@pytest.mark.parametrize("fields", MODELS, ids=lambda fields: "-".join(map(str, fields.values())))
def test_every_head_answers_as_in_torch_whatever_the_batch(made, tmp_path, fields):
    saved = made(calibration={"temperature": 0.7}, **fields)
    before = weights_digest(saved.model)
    files, scores = export.export(saved, tmp_path / "model.onnx")
    onnx.checker.check_model(files["fp32"], full_check=True)
    exported = Exported(files["fp32"])
    for count in (1, 3, 17):
        images = photographs(count)
        for ours, theirs in zip(exported(images), torchs(saved, images), strict=True):
            assert ours.dtype == np.float32 and ours.shape == theirs.shape
            np.testing.assert_allclose(ours, theirs, atol=1e-4)
    assert scores["fp32"]["difference"] < 1e-4 and scores["fp32"]["agreement"] == 1 and list(files) == ["fp32"]
    assert weights_digest(saved.model) == before
    assert list(tmp_path.glob("*.onnx*")) == [files["fp32"]] and not list(tmp_path.glob(".*"))
    weights = sum(np.prod(value.dims) for value in onnx.load(files["fp32"]).graph.initializer)
    backbone = sum(value.numel() for value in saved.model.backbone.parameters())
    head = (saved.model.num_classes * (3 if fields.get("head") == "subcenter_arcface" else 1)) * saved.model.width
    assert weights < backbone + head + 100, "the tree and the branches are not in it"


def test_the_file_says_all_that_is_needed_to_use_it_and_nothing_of_the_machine(made, tmp_path):
    saved = made(calibration={"temperature": 2.0, "unknown_below": 0.3})
    files, scores = export.export(saved, tmp_path / "model.onnx")
    exported = Exported(files["fp32"])
    assert exported.preprocessing == saved.model.preprocessing
    pd.testing.assert_frame_equal(exported.classes, saved.classes[["class_id", "name", "path"]], check_dtype=False)
    told = exported.metadata
    assert (float(told["temperature"]), float(told["unknown_below"])) == (2.0, 0.3)
    assert (told["round"], told["run_id"], told["backbone"]) == ("small/tiny", "0123", "test_resnet")
    assert told["weights"] == weights_digest(saved.model) and told["precision"] == "fp32"
    assert json.loads(told["scores"]) == scores["fp32"]
    preprocessing = json.loads(told["preprocessing"])
    assert (preprocessing["channels"], tuple(preprocessing["fill"])) == ("RGB", saved.model.preprocessing.fill)
    content = files["fp32"].read_bytes()
    assert b".py" not in content and str(Path.cwd()).encode() not in content


def test_files_are_answered_as_by_the_saved_model_unreadable_ones_too(made, shop, tmp_path):
    saved = made(calibration={"temperature": 0.5, "unknown_below": 0.2})
    exported = Exported(export.export(saved, tmp_path / "model.onnx")[0]["fp32"], threads=1)
    files = [*prediction.image_files(str(shop / "val"))[:9], str(tmp_path / "nowhere.jpg")]
    contents = [Path(file).read_bytes() for file in files[:9]] + [b"", b"text"]
    for given in (files, contents, [b""] * 33, []):
        ours = exported.recognise(given, top=3)
        theirs = prediction.recognise(saved, given, top=3, using="head")
        assert (len(ours) == len(given)) and ours["error"].tolist() == theirs["error"].tolist()
        for name in ("class_ids", "names", "paths", "unknown"):
            assert ours[name].tolist() == theirs[name].tolist()
        confidences = [np.concatenate([[0.0], *table["confidences"]]) for table in (ours, theirs)]
        np.testing.assert_allclose(*confidences, atol=1e-4)
    assert exported.recognise(files, top=99)["class_ids"].str.len().max() == len(saved.classes)
    for top in (0, -1):
        with pytest.raises(InputError, match=f"top {top}: must be at least 1"):
            exported.recognise(files, top=top)


def test_a_file_is_used_where_there_is_no_torch(made, shop, tmp_path):
    saved = made()
    path = export.export(saved, tmp_path / "model.onnx")[0]["fp32"]
    photograph = prediction.image_files(str(shop / "val"))[0]
    code = (
        "import sys; sys.modules |= {'torch': None, 'timm': None}\n"
        "from aliprod.exported import Exported\n"
        f"print(Exported({str(path)!r}).recognise([{photograph!r}])['class_ids'][0][0])"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == prediction.recognise(saved, [photograph], using="head")["class_ids"][0][0]


def test_int8_is_smaller_states_its_loss_and_loses_little(trained, shop, tmp_path):
    files, scores = export.export(trained, tmp_path / "model.onnx", shop)
    assert scores["fp32"]["difference"] < 1e-4
    images = export.photographs(trained, shop, "train", 1000)  # what it knows, unlike val
    compared = export.compare(trained, files, images)
    assert compared["torch"]["map"] > 0.9
    assert compared["int8"]["map"] > compared["torch"]["map"] - 0.05 and compared["int8"]["agreement"] > 0.95
    small = Exported(files["int8"])
    assert json.loads(small.metadata["scores"]) == scores["int8"] and small.metadata["precision"] == "int8"
    assert small.classes.equals(Exported(files["fp32"]).classes)
    for count in (1, 17):
        confidences, embeddings = small(photographs(count))
        np.testing.assert_allclose(confidences.sum(axis=1), 1, atol=1e-5)
        assert embeddings.shape == (count, trained.model.width)
    assert files["int8"].stat().st_size < 0.5 * files["fp32"].stat().st_size
    graph = onnx.load(files["int8"]).graph
    integers = [
        value for value in graph.initializer if value.data_type == onnx.TensorProto.INT8 and len(value.dims) > 1
    ]
    products = [node for node in graph.node if node.op_type in ("Conv", "Gemm", "MatMul")]
    assert len(integers) == len(products) - 1, "the first convolution alone keeps its weights"


@pytest.mark.parametrize("head", ["cosine", "subcenter_arcface"])
def test_int8_keeps_to_the_head_what_no_byte_can_hold(made, shop, tmp_path, head):
    saved = made(head=head, hierarchy="paths")
    files, scores = export.export(saved, tmp_path / "model.onnx", shop)
    assert scores["int8"]["agreement"] > 0.5 and scores["int8"]["embedding_difference"] < 0.2
    confidences, _ = Exported(files["int8"])(photographs(3))
    assert len(np.unique(confidences)) == confidences.size, "probabilities in steps"


def test_compare_gives_the_scores_of_the_predictions_themselves(trained, shop, tmp_path):
    _, scores = export.export(trained, tmp_path / "model.onnx", shop)
    table = manifest.read(shop, "val")
    answers = prediction.predict_table(trained, table, trained.classes, shop, tmp_path / "cache", "fp32")
    from aliprod import metrics

    for name, value in metrics.summary(answers).items():
        assert scores["torch"].get(name, value) == pytest.approx(value, abs=1e-5)
        assert scores["fp32"].get(name, value) == pytest.approx(value, abs=1e-4)
    assert scores["fp32"]["photographs"] == len(table)


def test_what_differs_is_not_left_behind(made, tmp_path):
    with pytest.raises(InputError, match=r"model.onnx: not written: its answers are .* from torch's; tolerance 1e-20"):
        export.export(made(), tmp_path / "model.onnx", tolerance=1e-20)
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_more_than_a_file_holds_is_refused(made, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "LIMIT", 1000)
    with pytest.raises(InputError, match="GB of weights: one ONNX file holds 1e-06 GB"):
        export.export(made(), tmp_path / "model.onnx")


@pytest.mark.parametrize("content", [None, b"", b"text", "onnx"])
def test_what_is_no_exported_model_is_refused(tmp_path, content):
    path = tmp_path / "model.onnx"
    if content == "onnx":
        node = onnx.helper.make_node("Identity", ["a"], ["b"])
        values = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in "ab"]
        graph = onnx.helper.make_graph([node], "another", values[:1], values[1:])
        onnx.save(onnx.helper.make_model(graph, ir_version=10), path)
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=r"model.onnx: not an exported model: \S"):
        Exported(path)


def test_the_entry_point_leaves_files_artifacts_and_metrics(made, shop, store, tmp_path, capsys):
    made()
    entry.main(str(tmp_path / "model"), str(shop), Path("out/it.onnx"), 10, 1e-4, Path("work"))
    (run,) = store.search_runs(["1"])
    said = capsys.readouterr().out
    for name in ("it.onnx", "it.int8.onnx"):
        logged = Path(store.download_artifacts(run.info.run_id, name))
        assert logged.read_bytes() == Path("out", name).read_bytes() and name in said
    assert run.info.run_name == "export" and run.info.status == "FINISHED"
    metrics = run.data.metrics
    assert metrics["fp32/difference"] < 1e-4 and metrics["fp32/photographs"] == 10
    assert {"torch/map", "fp32/map", "int8/map", "int8/agreement"} <= set(metrics)


MISTAKES = {
    "model": ({"model": "nothing"}, "model 'nothing' not found: give a saved folder"),
    "data": ({"data": "nowhere"}, "data 'nowhere': no folder /"),
    "no train": ({"data": "empty"}, "train.json"),
    "other classes": ({"data": "other"}, "the model knows no class of val"),
    "suffix": ({"output": "model.pt"}, "output model.pt: must end in .onnx"),
    "unwritable": ({"output": "/proc/model.onnx"}, "/proc"),
    "a file as folder": ({"output": "model/config.json/model.onnx"}, "config.json"),
    "tolerance": ({"tolerance": "0"}, "tolerance '0': .*greater than 0"),
    "limit": ({"limit": "some"}, "limit 'some': .*integer"),
}


@pytest.mark.parametrize(("given", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line_and_exit_2(made, shop, store, tmp_path, monkeypatch, capsys, given, message):
    made()
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    for split in ("train", "val"):
        (tmp_path / "other" / f"{split}.json").write_text('{"images": [{"class_id": "9", "image_id": "a.jpg"}]}')
    options = {"model": "model", "data": "", "output": "model.onnx", "limit": 9, "tolerance": 1e-4, "work": "work"}
    words = [word for name, value in (options | given).items() for word in (f"--{name}", str(value))]
    monkeypatch.setattr(sys, "argv", ["export", *words])
    with pytest.raises(SystemExit) as stopped:
        command(entry.main)
    assert stopped.value.code == 2 and not list(tmp_path.glob("**/*.onnx"))
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line or __import__("re").search(message, line), line


@pytest.mark.slow
def test_real_photographs_are_recognised_as_in_torch(grocery, tmp_path):
    from aliprod import recipe
    from entrypoints.command import recipe_path

    frozen = recipe.read(recipe_path("grocery")).row("frozen")
    tables = assembly.tables(frozen, grocery)
    model = assembly.model(frozen, len(tables.classes), frozen.init, tables.levels)
    source = assembly.inputs(model, frozen, tables.train, tables.classes, grocery, tmp_path, "none")
    list(training.train(model, frozen, source, None, tmp_path / "run", levels=tables.levels))
    saved = Saved(model.cpu().eval(), tables.classes, tables.tree, {})
    _, scores = export.export(saved, tmp_path / "model.onnx", grocery)
    assert scores["fp32"]["photographs"] == 296 and scores["fp32"]["agreement"] == 1
    assert scores["fp32"]["difference"] < 1e-4 and scores["fp32"]["embedding_difference"] < 1e-4
    assert scores["int8"]["map"] > scores["torch"]["map"] - 0.02 and scores["int8"]["agreement"] > 0.9
