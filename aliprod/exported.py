"""An exported model at work: one ONNX file and ONNX Runtime are all it takes, neither torch nor the saved model.

The file's metadata say how a photograph becomes its input, and what its answers stand for (see `aliprod.export`).
"""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnxruntime
import pandas as pd

from aliprod import InputError, first_line
from aliprod.images import Images, Preprocessing
from aliprod.processors import available_cpus

BATCH_SIZE = 32  # images; larger ones are no faster on a processor


class Exported:
    """An exported file: images (B, 3, S, S) uint8 RGB -> confidences (B, C) and embeddings (B, D), float32.

    `classes` has class_id, name, path by label; `metadata` is what the file says of itself, name -> text. `threads` is
    their number, 0 for as many as can run at once. InputError if the file is none that this project exported.
    """

    def __init__(self, path: str | Path, threads: int = 0, providers: tuple[str, ...] = ("CPUExecutionProvider",)):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or available_cpus()
        try:
            self.session = onnxruntime.InferenceSession(str(path), options, providers=list(providers))
            self.metadata: dict[str, str] = self.session.get_modelmeta().custom_metadata_map
            self.classes = pd.DataFrame(json.loads(self.metadata["classes"]))
            known = json.loads(self.metadata["preprocessing"])
        except Exception as error:  # the runtime's have nothing in common
            raise InputError(f"{path}: not an exported model: {first_line(error)}") from None
        self.preprocessing = Preprocessing(
            known["image_size"], tuple(known["mean"]), tuple(known["std"]), known["interpolation"]
        )

    def __call__(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """images (B, 3, S, S) uint8 RGB -> confidences (B, C), embeddings (B, D)."""
        confidences, embeddings = self.session.run(["confidences", "embeddings"], {"images": images})
        return confidences, embeddings

    def recognise(self, files: list[str] | list[bytes], top: int = 5) -> pd.DataFrame:
        """What each image shows, one row an image, in order: class_ids, names, paths, confidences, unknown and error,
        as of prediction.recognise by the head. files: paths, or the bytes of image files. InputError if `top` is out of
        range."""
        if top < 1:
            raise InputError(f"top {top}: must be at least 1")
        images = Images(files, None, self.preprocessing)
        columns = [self.classes[name].to_numpy() for name in ("class_id", "name", "path")]
        unknown_below = float(self.metadata["unknown_below"])
        found: dict[int, list] = {}
        for batch, rows in batches(images):
            for row, scores in zip(rows, self(batch)[0], strict=True):
                best = np.argsort(-scores, kind="stable")[:top]
                answers = [column[best].tolist() for column in (*columns, scores)]
                found[int(row)] = [*answers, bool(scores[best[0]] < unknown_below)]
        nothing = [[], [], [], [], False]
        return pd.DataFrame(
            [[*found.get(row, nothing), images.corrupt.get(row, "")] for row in range(len(files))],
            columns=["class_ids", "names", "paths", "confidences", "unknown", "error"],
        )


def batches(images: Images) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Batches (B, 3, S, S) of what can be read, and their rows (B,), none empty."""
    chunks = np.split(images.rows, range(BATCH_SIZE, len(images.rows), BATCH_SIZE))
    yield from ((batch, rows) for batch, rows in images.arrays(chunks) if len(rows))
