"""A recipe: rounds of training, and of cleaning between them, as rows of a table, read from TOML, frozen and validated.

A round states causes (the class range, the rate, the epochs); what follows from them (the number of
classes, the steps) is computed where the data is known.
"""

import json
import math
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from aliprod import InputError, parameters, textfile
from aliprod.refusal import validated
from aliprod.space import Tuning

Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]

# What may stand in place of a step's name, a vocabulary each: as weights to start from, as rows, and as a logged model.
WEIGHTS = ("imagenet", "random")
MANIFESTS = ("train", "balanced")
NEWEST = "newest"
SCORED = ("val", "test")  # splits that nothing is learnt from
RESERVED = (*WEIGHTS, *MANIFESTS, NEWEST, *SCORED)


class _Row(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    name: Annotated[str, Field(pattern=r"^[\w.-]+$")]
    """Name of the step, unique in its recipe."""


class Cleaning(_Row):
    """A step that drops photographs that are filed wrongly; rounds name it as their manifest."""

    models: Annotated[tuple[str, ...], Field(min_length=1, strict=False)]
    """Who judges: earlier rounds (round or recipe/round), newest, runs, URIs or saved folders; the first where one
    does."""
    manifest: Annotated[str, Field(pattern=r"^(train|balanced|.+\.csv)$")] = "balanced"
    """Rows to clean: train, balanced, or the path of a table. Val is never used to clean."""
    rule: Literal["misclassified", "disagreement", "confident"] = "misclassified"
    """What is dropped: the seed's rule, the agreement of several models, or confident learning."""
    min_accuracy: Share = 0.92
    """Accuracy from which on a class is kept whole, for misclassified."""
    votes: Count = 2
    """Models that must agree with the label, for disagreement."""
    folds: Annotated[int, Field(ge=0, le=20)] = 0
    """Parts each judged by heads trained on the others (cross-fitting); 0: the models judge as they are. It helps where
    the models' backbones have not learnt these labels themselves."""
    least: Count = 10
    """Photographs that smaller classes are grown to, by repeating some."""
    max_dropped_share: Share | None = None
    """Share of the photographs that may be dropped; more fails the step. Absent: 0.5; for confident, which estimates
    the share of wrong labels, that share and 0.1 more."""
    min_judge_map: Share = 0.3
    """MAP that each of the models needs to be believed: cross-fitted on the photographs to be cleaned (in 5 parts where
    folds is 0), by their labels as they are, over classes of at least 2; less fails the step."""
    precision: Literal["fp32", "bf16", "fp16", "mixed"] = "fp32"
    """Arithmetic, as of a round."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of everything random: balancing, folds, which photographs are kept or repeated."""

    @model_validator(mode="after")
    def _possible(self) -> "Cleaning":
        for model in self.models:
            if model in RESERVED and model != NEWEST:
                raise ValueError(f"models {model!r}: is no model; {NEWEST}, a round, a run, a URI or a saved folder")
        if self.rule == "disagreement" and self.votes > len(self.models):
            raise ValueError(f"votes {self.votes}: there are only {len(self.models)} models to vote")
        if self.name == "dropped":
            raise ValueError("name 'dropped': so is the table called of what was dropped")
        if self.folds == 1:
            raise ValueError("folds 1: one part has no others to learn from; 0, or at least 2")
        return self


class Round(_Row):
    """One row of the table: what is trained, from what, on what, and how."""

    init: Annotated[str, Field(min_length=1)] = "imagenet"
    """Backbone to start from: imagenet, random, an earlier round (round or recipe/round), newest, a run, a URI or a
    file; and its head, where that is of the same kind for the same classes."""
    manifest: Annotated[str, Field(pattern=r"^(.+\.csv|(.+/)?[\w.-]+)$")] = "train"
    """Rows to train on: train, balanced, a [[clean]] step (its name or recipe/name), or the path of a .csv table."""
    samples_per_class: Annotated[tuple[Count, Count] | None, Field(strict=False)] = None
    """Classes to train on, by their photographs in the manifest: [least, most], inclusive; absent: all."""
    samples_quantile: Annotated[tuple[Share, Share] | None, Field(strict=False)] = None
    """The same by quantiles of the classes' photographs: [0.5, 1] is the more frequent half; absent: all.
    Beside samples_per_class it is what that range becomes where the recipe is scaled to other data."""
    select_list: Annotated[str, Field(pattern=r"\.csv$")] | None = None
    """A CSV of class_id and confidence, as evaluate writes it, to choose stable classes by; absent: all."""
    min_confidence: Share = 0.0
    """Least confidence of a class in the select list: the mean over its photographs of the calibrated probability of
    the answer, 0 where it is wrong."""
    class_holdout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the data's classes, drawn by seed, left out of training, so that val has unknown products to measure by;
    init must not have learnt them either."""

    backbone: Annotated[str, Field(min_length=1)] = "efficientnet_lite0"
    """Feature extractor: any name timm knows, or the seed's."""
    head: Literal["linear", "cosine", "arcface", "subcenter_arcface"] = "linear"
    """Classifier on top of the embeddings."""
    scale: Annotated[float, Field(gt=0, le=100)] = 30.0
    """Logit of a perfect match, for the heads that measure angles."""
    centers: Annotated[int, Field(ge=2, le=10)] = 3
    """Centers a class, for subcenter_arcface."""
    margin: Annotated[float, Field(ge=0, lt=1.5)] = 0.3
    """Angle in radians by which ArcFace makes the right class harder, in training only."""
    margin_range: Annotated[float, Field(ge=0, lt=1.5)] = 0.0
    """What the rarest class has over that margin, in radians; 0: the same for all."""
    easy_margin: bool = False
    """Whether the margin is left out where the angle is over a right one."""
    loss: Literal["cross_entropy", "focal", "triplet"] = "cross_entropy"
    """Criterion; each sample's own, averaged. triplet trains the embeddings alone, the head follows their means."""
    focal_gamma: Annotated[float, Field(ge=0, le=10)] = 2.0
    """Power by which focal loss plays down what is known already; 0: cross-entropy."""
    logit_adjustment: Annotated[float, Field(ge=0, le=5)] = 0.0
    """Factor of the log class frequency added to logits in training; 1: balanced softmax; 0: none."""
    triplet_weight: Annotated[float, Field(ge=0, le=100)] = 0.0
    """Share of the batch-hard triplet loss of the embeddings that is added; 0: none."""
    triplet_margin: Annotated[float, Field(gt=0, le=2)] = 0.3
    """Distance by which a triplet wants the nearest other class to be further than the farthest of its own."""
    images_per_class: Count = 1
    """Photographs of one class that stand together in a batch, so that triplets have positives; 1: by chance. Below
    batch_size, so that they have negatives too."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the target spread evenly over all classes."""
    hierarchy: Literal["none", "paths", "branches"] = "none"
    """How the product tree shapes the head: class weights summed over their paths, or the seed's branch a level."""
    level_weights: Annotated[dict[str, Annotated[float, Field(ge=0, le=100)]], Field(strict=False)] | None = None
    """Weight of each level's loss, levels counted from the root, the last the classes': { 3 = 0.6, 4 = 1.0 }."""
    branch_stage: Count | None = None
    """Stage of the backbone that the branches leave it after; absent: its end."""
    tree_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the target spread over a class's relatives: evenly over its levels, within each over the classes."""
    freeze: Literal["none", "all"] | Count = "none"
    """What stays byte for byte as it was: nothing, the whole backbone, or its first N stages."""
    augment: Literal["none", "light", "strong"] = "none"
    """Random distortion: light is the seed's (crop up to 6 %, rotate up to 15 degrees, each half of the time)."""

    optimizer: Literal["adam", "adamw", "sgd", "adam_gc", "adamw_gc", "sgd_gc"] = "adamw"
    """Update rule, with gradient centralization where it ends in _gc; sgd has momentum 0.9."""
    fused: Literal["auto", "torch", "apex"] = "auto"
    """Whose fused optimizer: auto takes NVIDIA Apex's where it is installed with a GPU, else torch's."""
    weight_decay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Pull of the weights to zero, on matrices and kernels only."""
    precision: Literal["fp32", "bf16", "fp16", "mixed"] = "fp32"
    """Arithmetic: fp32, or automatic mixed precision with the named half type; mixed, Apex's O1: the device's own."""
    compile: bool = False
    """Whether torch.compile translates the model first."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Decay per step of the weights' moving average, which is then evaluated and kept; 0: no average. It rises to this
    from 0, being 0.9 after 31 steps, 0.99 after 1,000 and 0.999 after 31,600, so that short rounds average too."""

    epochs: Count = 1
    """Passes over the manifest."""
    batch_size: Annotated[int, Field(ge=2)] = 96
    """Photographs a step."""
    lr: Annotated[float, Field(gt=0, le=10)] = 1e-3
    """Base learning rate."""
    backbone_lr_factor: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Learning rate of the backbone as a share of the head's."""
    schedule: Literal["step", "cosine"] = "step"
    """Course of the rate after the warm-up: falling in steps, or along a half cosine to zero."""
    lr_step: Count = 4
    """Epochs between two falls of the step schedule."""
    lr_factor: Annotated[float, Field(gt=0, le=1)] = 0.5
    """What a fall of the step schedule multiplies the rate by."""
    warmup_epochs: Annotated[float, Field(ge=0)] = 0.0
    """Epochs, in fractions too, in which the rate rises linearly from zero."""

    image_size: Annotated[int, Field(ge=32, le=1024)] = 224
    """Side of the square that the network sees, in pixels."""
    max_corrupt_share: Share = 0.01
    """Share of photographs that cannot be read above which the run stops."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of everything random: balancing, order, augmentation, initial head."""
    reported: dict[str, float] | None = None
    """What the seed's authors reported for this row; for comparison only, never computed with."""

    @model_validator(mode="after")
    def _possible(self) -> "Round":
        if self.manifest in RESERVED and self.manifest not in MANIFESTS:
            why = "is for scoring" if self.manifest in SCORED else "is no manifest"
            raise ValueError(f"manifest {self.manifest!r}: {why}; train, balanced, a [[clean]] step or a .csv")
        if self.init in RESERVED and self.init not in (*WEIGHTS, NEWEST):
            choices = ", ".join((*WEIGHTS, NEWEST))
            raise ValueError(f"init {self.init!r}: is a manifest; {choices}, a round, a run, a URI or a file")
        for name in ("samples_per_class", "samples_quantile"):
            if (pair := getattr(self, name)) and pair[0] > pair[1]:
                raise ValueError(f"{name} {list(pair)}: least must not exceed most")
        if self.warmup_epochs > self.epochs:
            raise ValueError(f"warmup_epochs {self.warmup_epochs} must not exceed epochs {self.epochs}")
        if self.images_per_class > 1 and self.images_per_class >= self.batch_size:
            raise ValueError(
                f"images_per_class {self.images_per_class}: must be below batch_size {self.batch_size}, "
                "or all photographs of a batch would be of one class"
            )
        if self.triplet_weight and self.freeze == "all":
            raise ValueError(f"triplet_weight {self.triplet_weight} needs a backbone to train, but freeze is 'all'")
        for level in self.level_weights or {}:
            if not level.isdecimal() or int(level) < 1:
                raise ValueError(f"level_weights {level!r}: a level is a number from 1, the root's children")
        if self.label_smoothing + self.tree_smoothing >= 1:
            raise ValueError(f"label_smoothing and tree_smoothing {self.tree_smoothing:g} must be below 1 together")
        if self.hierarchy == "branches" and not self.level_weights:
            raise ValueError("hierarchy 'branches' needs level_weights, which say at what levels: { 3 = 0.6 }")
        if self.branch_stage and (self.hierarchy != "branches" or self.freeze == "all"):
            raise ValueError(f"branch_stage {self.branch_stage} needs hierarchy 'branches' and a backbone to train")
        if self.loss == "triplet" and (self.hierarchy != "none" or self.level_weights or self.tree_smoothing):
            raise ValueError("loss 'triplet' knows no tree: leave out hierarchy, level_weights and tree_smoothing")
        if self.loss == "triplet" and (self.head != "cosine" or self.freeze == "all"):
            raise ValueError(
                f"loss 'triplet' needs head 'cosine', which is {self.head!r}, and a backbone to train, "
                f"but freeze is {self.freeze!r}"
            )
        return self


class Recipe(BaseModel):
    """Rounds in the order they run, and cleanings, which run when a round first asks for them; each named once."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    name: str
    """Name of the recipe; absent: the file's."""
    rounds: Annotated[tuple[Round, ...], Field(alias="round", min_length=1)]
    """One [[round]] table a round."""
    cleanings: Annotated[tuple[Cleaning, ...], Field(alias="clean")] = ()
    """One [[clean]] table a cleaning."""
    tunings: Annotated[tuple[Tuning, ...], Field(alias="tune")] = ()
    """One [[tune]] table a round that can be tuned, as of aliprod.space."""

    @model_validator(mode="after")
    def _unique(self) -> "Recipe":
        tuned = [tuning.round for tuning in self.tunings]
        for names in ([row.name for row in (*self.rounds, *self.cleanings)], tuned):
            if twice := sorted({name for name in names if names.count(name) > 1}):
                raise ValueError(f"names must differ: {', '.join(twice)} stands more than once")
        for name in tuned:
            self.tuning(name)
        return self

    @model_validator(mode="after")
    def _named(self) -> "Recipe":
        rounds, cleanings = ({row.name for row in rows} for rows in (self.rounds, self.cleanings))
        if taken := sorted((rounds | cleanings) & set(RESERVED)):
            raise ValueError(
                f"name {taken[0]!r}: no step can be called so; it is one of the words {', '.join(RESERVED)}"
            )
        for row in self.rounds:
            if row.manifest in rounds:
                raise ValueError(f"round {row.name}: manifest {row.manifest!r}: is a [[round]], and leaves no manifest")
            if row.init in cleanings:
                raise ValueError(f"round {row.name}: init {row.init!r}: is a [[clean]] step, and leaves no weights")
        for cleaning in self.cleanings:
            if wrong := sorted(set(cleaning.models) & cleanings):
                raise ValueError(f"clean {cleaning.name}: models {wrong[0]!r}: is a [[clean]] step, and no model")
        return self

    def row(self, name: str) -> Round:
        """The round called `name`; "" means the first. InputError names the choices."""
        rows = {row.name: row for row in self.rounds} | {"": self.rounds[0]}
        if name not in rows:
            raise InputError(f"recipe {self.name}: no round {name!r}; it has {', '.join(filter(None, rows))}")
        return rows[name]

    def tuning(self, name: str, overrides: str = "") -> tuple[Tuning, Round]:
        """The [[tune]] table of the round called `name`, "" meaning the first there is, and that round, overridden.

        InputError names the choices, or says why table and round do not fit.
        """
        tables = {tuning.round: tuning for tuning in reversed(self.tunings)}
        if name not in tables and (name or not tables):
            choices = ", ".join(tables) or "none"
            raise InputError(f"recipe {self.name}: no [[tune]] table of round {name!r}; it has those of {choices}")
        found = tables.get(name, self.tunings[0])
        row = override(self.row(found.round), overrides)
        try:
            found.check(row, lambda changes: replaced(row, changes, ""))
        except ValueError as error:
            raise InputError(f"tune {found.round}: {error}") from None
        return found, row


def read(path: str | Path) -> Recipe:
    """Reads a recipe file: TOML with one [[round]] table a round. InputError names file, field and value."""
    path = Path(path)
    try:
        table = tomllib.loads(textfile.read(path))
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{path}: not TOML: {error}") from None
    parts: dict[str, type[BaseModel]] = {"round": Round, "clean": Cleaning, "tune": Tuning}
    return validated(Recipe, {"name": path.stem, **table}, str(path), parts)


def cleaning(**fields: Any) -> Cleaning:
    """A cleaning of these fields. InputError names the field and value."""
    return validated(Cleaning, fields, "clean")


def override(row: Round, overrides: str) -> Round:
    """A round with fields replaced, written as "lr=3e-4 epochs=2", as of parameters.fields. InputError names the field
    and value."""
    return replaced(row, parameters.fields("overrides", overrides), "overrides")


def replaced(row: Round, changes: dict[str, Any], source: str) -> Round:
    """A round with fields replaced. InputError, beginning with `source`, names the field and value."""
    return validated(Round, row.model_dump() | changes, source)


def scaled(row: Round, scale: float) -> Round:
    """A round of the competition's size for data of another: 2.5 million photographs are scale 1.

    The class range becomes its quantiles, and the batch `scale` as large, but for 16 photographs. Epochs that train the
    backbone become `scale` as many, at least 1; those of a frozen one, which read embeddings and cost next to nothing,
    1 / scale as many, to make up for small data's few steps; the schedule's steps go with them.
    """
    if not 0 < scale <= 1:
        raise InputError(f"scale {scale:g}: must be in (0, 1]")
    if scale == 1:
        return row
    factor = 1 / scale if row.freeze == "all" else scale
    changes: dict[str, Any] = {
        "batch_size": max(min(16, row.batch_size), round(row.batch_size * scale)),
        "epochs": math.ceil(row.epochs * factor),
        "lr_step": math.ceil(row.lr_step * factor),
        "warmup_epochs": row.warmup_epochs * factor,
    }
    if row.samples_quantile:
        changes["samples_per_class"] = None
    return row.model_copy(update=changes)


def to_toml(row: Round) -> str:
    """The round as a recipe file of its own, which `read` reads back to the same round."""
    lines = [f"{name} = {_toml(value)}" for name, value in row.model_dump(exclude_none=True).items()]
    return "\n".join(["[[round]]", *lines]) + "\n"


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{_toml(key)} = {_toml(number)}" for key, number in value.items()) + " }"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")  # TOML allows no other escapes of JSON's
