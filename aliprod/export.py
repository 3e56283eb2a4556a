"""The exported form of a model: one ONNX file that says all that is needed to use it, and one in int8 for processors.

What goes in is uint8, so that nobody normalises twice or not at all; what comes out are confidences, the temperature
applied, and embeddings. The metadata hold the rest: preprocessing, classes, where the model comes from, and how far its
answers are from torch's. `aliprod.exported` runs the files.
"""

import contextlib
import dataclasses
import json
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnx
import pandas as pd
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import nn
from torch.nn.utils import parametrize

from aliprod import InputError, manifest, metrics
from aliprod.atomic import replacing
from aliprod.exported import Exported, batches
from aliprod.images import Images
from aliprod.model import Recogniser, Saved, weights_digest

LIMIT = 2_000_000_000  # bytes of weights; protobuf holds 2 GiB in all
CALIBRATION = 256  # train photographs that int8's ranges are read from
NOISE = 17  # generated pictures that answers are compared on where there are no photographs

Scores = dict[str, dict[str, float]]  # by file, by name


class _Answers(nn.Module):
    """What the file computes. Of a head that sums over paths it has the sums; branches are left out, for the
    confidences, summed over the tree, answer every level of it and never contradict themselves."""

    def __init__(self, saved: Saved):
        super().__init__()
        model, self.temperature = saved.model, saved.temperature
        self.model = Recogniser(
            model.backbone_name, model.num_classes, preprocessing=model.preprocessing, head=model.head_options
        )
        self.model.backbone.load_state_dict(model.backbone.state_dict())
        self.model.head.load_state_dict({name: getattr(model.head, name) for name in self.model.head.state_dict()})
        self.model.backbone.to(memory_format=torch.contiguous_format)  # or its strides would be in the graph

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """images (B, 3, S, S) uint8 -> confidences (B, C), embeddings (B, D)."""
        embeddings = self.model.embed(images)
        return (self.model.head(embeddings) / self.temperature).softmax(dim=1), embeddings


def export(
    saved: Saved, output: Path, data: Path | None = None, limit: int = 1000, tolerance: float = 1e-4
) -> tuple[dict[str, Path], Scores]:
    """Writes a model on the processor to `output`, ending in .onnx, and with a data folder also to one in .int8.onnx.

    Returns the files and their scores, as of `compare`: on at most `limit` photographs of the folder's val split whose
    classes the model knows, chosen by chance, or else on generated pictures. InputError, and no file, where the answers
    in fp32 are further than `tolerance` from torch's, or the weights are more than one file holds.
    """
    if output.suffix != ".onnx":
        raise InputError(f"output {output}: must end in .onnx")
    weights = sum(value.nbytes for value in saved.model.state_dict().values())
    if weights > LIMIT:
        raise InputError(f"{weights / 1e9:.1f} GB of weights: one ONNX file holds {LIMIT / 1e9:g} GB")
    targets = {"fp32": output} | ({"int8": output.with_suffix(".int8.onnx")} if data else {})
    images = photographs(saved, data, "val", limit) if data else _generated(saved)
    calibration = photographs(saved, data, "train", CALIBRATION) if data else None
    with contextlib.ExitStack() as stack:
        files = {name: stack.enter_context(replacing(path)) for name, path in targets.items()}
        _write(saved, files["fp32"])
        if calibration:
            _quantise(files["fp32"], files["int8"], calibration)
        scores = compare(saved, files, images)
        worst = max(scores["fp32"][name] for name in ("difference", "embedding_difference"))
        if not worst <= tolerance:
            raise InputError(
                f"{output}: not written: its answers are {worst:.1e} from torch's; tolerance {tolerance:g}"
            )
        for name, path in files.items():
            _describe(path, {"precision": name, "scores": json.dumps(scores[name])})
    return targets, scores


@torch.inference_mode()
def compare(saved: Saved, files: Mapping[str, Path], images: Images) -> Scores:
    """How the answers of exported files, and of torch as fp32 on the processor, compare on the same images.

    For each: photographs, their number; difference, the largest of any confidence to torch's; embedding_difference,
    that of any value of the embeddings, as a share of torch's largest of its batch; agreement, the share of equal first
    answers; and where the images have labels loss, gap, map and accuracy.
    """
    assert saved.model.device.type == "cpu", "a GPU rounds otherwise"
    ways = {name: Exported(path) for name, path in files.items()}
    answers: dict[str, list[pd.DataFrame]] = defaultdict(list)
    with parametrize.cached():
        for batch, rows in batches(images):
            embeddings = saved.model.embed(torch.from_numpy(batch))
            confidences = (saved.model.head(embeddings) / saved.temperature).softmax(dim=1)
            ours = confidences.numpy(), embeddings.numpy()
            labels = ours[0].argmax(axis=1) if images.labels is None else images.labels[rows]
            for name, theirs in {"torch": ours, **{name: way(batch) for name, way in ways.items()}}.items():
                answers[name].append(_answers(theirs, ours, labels))
    if not answers:
        raise InputError(f"none of the {len(images.paths)} photographs can be read; the first: {images.corrupt[0]}")
    tables = {name: pd.concat(parts) for name, parts in answers.items()}
    scores: Scores = {}
    for name, table in tables.items():
        scores[name] = {
            "photographs": len(table),
            "difference": float(table["difference"].max()),
            "embedding_difference": float(table["embedding_difference"].max()),
            "agreement": float((table["pred"] == tables["torch"]["pred"]).mean()),
        }
        if images.labels is not None:
            summary = metrics.summary(table)
            scores[name] |= {key: summary[key] for key in ("loss", "gap", "map", "accuracy")}
    return scores


def _answers(
    theirs: tuple[np.ndarray, np.ndarray], ours: tuple[np.ndarray, np.ndarray], labels: np.ndarray
) -> pd.DataFrame:
    confidences, embeddings = theirs
    return pd.DataFrame(
        {
            "label": labels,
            "pred": confidences.argmax(axis=1),
            "confidence": confidences.max(axis=1),
            "loss": -np.log(confidences[np.arange(len(labels)), labels].clip(1e-30)),
            "difference": np.abs(confidences - ours[0]).max(axis=1),
            "embedding_difference": np.abs(embeddings - ours[1]).max(axis=1) / np.abs(ours[1]).max(),
        }
    )


def photographs(saved: Saved, data: Path, split: str, limit: int) -> Images:
    """At most `limit` photographs of a split, chosen by chance among the classes the model knows."""
    table = manifest.read(data, split)
    table = table[manifest.labels(table, saved.classes) >= 0]
    if table.empty:
        raise InputError(f"{data}: the model knows no class of {split}")
    table = table.sample(min(limit, len(table)), random_state=0)
    labels = manifest.labels(table, saved.classes)
    return Images(manifest.paths(table, data), labels, saved.model.preprocessing)


def _generated(saved: Saved) -> Images:
    """Pictures of noise, as the bytes of files."""
    size = saved.model.preprocessing.image_size
    noise = np.random.default_rng(0).integers(0, 256, (NOISE, size, size, 3), dtype=np.uint8)
    return Images([cv2.imencode(".png", each)[1].tobytes() for each in noise], None, saved.model.preprocessing)


def _write(saved: Saved, path: Path) -> None:
    size = saved.model.preprocessing.image_size
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of the exporter about itself
        program = torch.onnx.export(
            _Answers(saved).eval(),
            (torch.zeros(2, 3, size, size, dtype=torch.uint8),),  # of one image the batch would be taken for a constant
            dynamo=True,
            input_names=["images"],
            output_names=["confidences", "embeddings"],
            dynamic_shapes=({0: "batch"},),
            verbose=False,
        )
    assert program
    made = program.model_proto
    for part in [*made.graph.node, *made.graph.input, *made.graph.output, *made.graph.value_info]:
        part.ClearField("metadata_props")  # lines of code and folders of whoever exported
    onnx.save(made, path)
    _describe(path, _metadata(saved))
    onnx.checker.check_model(path, full_check=True)


def _metadata(saved: Saved) -> dict[str, str]:
    preprocessing, config = saved.model.preprocessing, saved.config
    values: dict[str, Any] = {
        "preprocessing": dataclasses.asdict(preprocessing)
        | {"fill": preprocessing.fill, "channels": "RGB", "fit": "letterbox", "shrinking": "area"},
        "classes": saved.classes[["class_id", "name", "path"]].to_dict("list"),
    }
    values = {name: json.dumps(value, ensure_ascii=False) for name, value in values.items()}
    return values | {
        "temperature": str(saved.temperature),
        "unknown_below": str(saved.unknown_below),
        "backbone": saved.model.backbone_name,
        "head": saved.model.head_options["kind"],
        "round": "/".join([config.get("recipe", ""), config.get("round", {}).get("name", "")]).strip("/"),
        "run_id": config.get("run_id", ""),
        "weights": weights_digest(saved.model),
    }


def _describe(path: Path, values: dict[str, str]) -> None:
    """Adds to the metadata of a file."""
    made = onnx.load(path)
    known = {entry.key: entry.value for entry in made.metadata_props}
    onnx.helper.set_model_props(made, known | values)
    onnx.save(made, path)


class _Reader(CalibrationDataReader):
    def __init__(self, images: Images):
        self.batches = batches(images)

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(({"images": batch} for batch, _ in self.batches), None)


def _quantise(path: Path, output: Path, images: Images) -> None:
    """Writes the file `path` in int8, its activations' ranges those that `images` show.

    Unlike that of the other layers the first convolution costs more accuracy than it saves time; activations
    are clipped within their convolution, so both have to be quantised for their ranges to be the clipped ones.
    """
    with tempfile.TemporaryDirectory() as folder:
        ready = Path(folder) / "ready.onnx"
        quant_pre_process(path, ready, skip_symbolic_shape=True)  # the exporter has inferred the shapes
        quantize_static(
            ready,
            output,
            _Reader(images),
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=_delicate(onnx.load(ready).graph),
            extra_options={"OpTypesToExcludeOutputQuantization": ["Gemm", "MatMul"]},  # 256 logits would make ties
        )
    _describe(output, {entry.key: entry.value for entry in onnx.load(path).metadata_props})


def _delicate(graph: onnx.GraphProto) -> list[str]:
    """The names of nodes that stay fp32: all up to the first convolution, every softmax, and of what follows the
    embeddings all but the head's product."""
    names, after = [], {"embeddings"}
    first = next((place for place, node in enumerate(graph.node) if node.op_type == "Conv"), -1)
    for place, node in enumerate(graph.node):
        if head := bool(after & set(node.input)):
            after |= set(node.output)
        product = node.op_type in ("Gemm", "MatMul")
        if place <= first or node.op_type == "Softmax" or (head and not product):
            names.append(node.name)
    return names
