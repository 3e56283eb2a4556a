"""What a search may try: a [[tune]] table of a recipe, beside the round whose fields it varies.

[[tune]]
round = "frozen"
objective = "map"                             # of val, at the epoch that the round would keep
first = [{ schedule = "step", lr_step = [10, 15] }] # tried first; a list stands for each of its values
lr = { low = 1e-4, high = 1e-1, log = true }
schedule = ["step", "cosine"]
lr_step = { low = 5, high = 20 }              # epochs; varied only where schedule is step
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, model_validator

# Fields of a round that change neither its data nor its network, so that all trials share both.
TUNABLE = (
    *("lr", "backbone_lr_factor", "schedule", "lr_step", "lr_factor", "warmup_epochs", "epochs", "batch_size"),
    *("optimizer", "weight_decay", "ema_decay", "loss", "focal_gamma", "logit_adjustment", "label_smoothing"),
    *("margin", "margin_range", "augment"),
)
# Field -> another field and its values with which the field means nothing.
MEANINGLESS: dict[str, tuple[str, tuple[str, ...]]] = {
    "lr_step": ("schedule", ("cosine",)),
    "lr_factor": ("schedule", ("cosine",)),
    "backbone_lr_factor": ("freeze", ("all",)),
    "focal_gamma": ("loss", ("cross_entropy", "triplet")),
    "margin": ("head", ("linear", "cosine")),
    "margin_range": ("head", ("linear", "cosine")),
}
AXIS = "a list of values, or { low = , high = } and perhaps log = true"


class Axis(BaseModel):
    """The values one field may take: those of `choices`, or all from low to high, both included."""

    model_config = ConfigDict(frozen=True)

    choices: tuple[Any, ...] = ()
    low: Any = 0
    high: Any = 0
    log: bool = False

    def __str__(self) -> str:
        if self.choices:
            return ", ".join(map(str, self.choices))
        return f"{self.low:g} to {self.high:g}{', log' if self.log else ''}"

    def __contains__(self, value: Any) -> bool:
        if self.choices:
            return value in self.choices
        return isinstance(value, int | float) and self.low <= value <= self.high

    @property
    def extremes(self) -> tuple[Any, ...]:
        """What has to be possible for all of it to be: every choice, or both ends."""
        return self.choices or (self.low, self.high)


class Tuning(BaseModel):
    """One [[tune]] table: a round of the recipe, what is sought, and the space, field by field."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)

    round: str
    """Name of the round that is tuned."""
    objective: Literal["map", "gap", "accuracy", "top5", "loss"] = "map"
    """Score on val to raise (loss: to lower), at the epoch of the highest MAP, which is the one a round keeps."""
    first: tuple[dict[str, Any], ...] = ()
    """Rows to try first, other fields being the round's own; the round as written comes before them."""
    space: dict[str, Axis]
    """The axes: every other field of the table."""

    @model_validator(mode="before")
    @classmethod
    def _gathered(cls, table: Any) -> Any:
        if not isinstance(table, dict):
            return table
        own = {name: value for name, value in table.items() if name in ("round", "objective")}
        axes = {name: _axis(name, value) for name, value in table.items() if name not in ("first", *own)}
        if not axes:
            raise ValueError(f"needs fields to vary, of {', '.join(TUNABLE)}: {AXIS}")
        return own | {"space": axes, "first": tuple(_grid(table.get("first", [])))}

    def check(self, row: BaseModel, changed: Callable[[dict[str, Any]], BaseModel]) -> None:
        """Raises ValueError where the space does not fit the round `row`, which has to lie in it.

        `changed` gives the round with some fields replaced, or raises ValueError. The extremes of every two fields are
        put together, as no rule on a round's fields is on more than two of these.
        """
        for name in (name for name in self.space if name in MEANINGLESS):
            other, values = MEANINGLESS[name]
            possible = self.space[other].extremes if other in self.space else (getattr(row, other),)
            if set(possible) <= set(values):
                raise ValueError(f"{name} means nothing where {other} is {' or '.join(map(repr, possible))}")
        ends = [[{name: value} for value in axis.extremes] for name, axis in self.space.items()]
        pairs = (itertools.product(one, another) for one, another in itertools.combinations(ends, 2))
        for changes in itertools.chain(*ends, (one | another for one, another in itertools.chain(*pairs))):
            try:
                changed(changes)
            except ValueError as error:
                axes = " and ".join(f"{name} {self.space[name]}" for name in changes)
                raise ValueError(f"{error}; the [[tune]] table has {axes}, the other fields are the round's") from None
        for name in self.active(row.model_dump()):
            if (value := getattr(row, name)) not in self.space[name]:
                raise ValueError(
                    f"{name} {value!r} of the round is not in its own space, {self.space[name]}: "
                    "a search begins with the round as written"
                )
        for number, start in enumerate(self.first, start=1):
            for name, value in start.items():
                if name not in self.space:
                    raise ValueError(f"first {number}: {name} is no field of this space: {', '.join(self.space)}")
                if value not in self.space[name]:
                    raise ValueError(f"first {number}: {name} {value!r} is not in its space, {self.space[name]}")
            changed(start)

    def active(self, fields: dict[str, Any]) -> Iterator[str]:
        """Fields of the space that mean something in a round of these `fields`, as they are when each one's turn comes:
        those that others hang on come first."""
        for name in sorted(self.space, key=lambda name: name in MEANINGLESS):
            other, values = MEANINGLESS.get(name, ("", ()))
            if not other or fields[other] not in values:
                yield name

    def draw(self, row: BaseModel, trial: Any) -> dict[str, Any]:
        """Values of the active fields as `trial` (Optuna's, or what has its suggest_... methods) suggests them."""
        fields, changes = row.model_dump(), {}
        for name in self.active(fields):
            axis = self.space[name]
            if axis.choices:
                fields[name] = trial.suggest_categorical(name, axis.choices)
            else:
                whole = type(row).model_fields[name].annotation is int
                suggest = trial.suggest_int if whole else trial.suggest_float
                fields[name] = suggest(name, axis.low, axis.high, log=axis.log)
            changes[name] = fields[name]
        return changes

    def starts(self, row: BaseModel) -> list[dict[str, Any]]:
        """Values of the active fields, each row once: of `row` as written, then of what `first` asks for."""
        rows = []
        for changes in ({}, *self.first):
            fields = row.model_dump() | changes
            start = {name: fields[name] for name in self.active(fields)}
            if start not in rows:
                rows.append(start)
        return rows


def _axis(name: str, value: Any) -> Axis:
    if name not in TUNABLE:
        raise ValueError(f"{name} is nothing to tune; there are round, objective, first and {', '.join(TUNABLE)}")
    if isinstance(value, list) and len(value) > 1 and all(value.count(each) == 1 for each in value):
        return Axis(choices=tuple(value))
    if isinstance(value, dict) and {"low", "high"} <= value.keys() <= {"low", "high", "log"}:
        numbers = all(type(value[end]) in (int, float) for end in ("low", "high"))
        if not numbers or not value["low"] < value["high"] or not isinstance(value.get("log", False), bool):
            raise ValueError(f"{name} {value}: low and high must be numbers, low below high, log true or false")
        if value.get("log") and value["low"] <= 0:
            raise ValueError(f"{name} {value}: low must be above 0 for log")
        return Axis(**value)
    raise ValueError(f"{name} {value!r}: must be {AXIS}; at least two values, each once")


def _grid(rows: Any) -> Iterator[dict[str, Any]]:
    """Every row of single values that the rows stand for."""
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"first {rows!r}: must be a list of tables, such as {{ lr = 1e-3, lr_step = [3, 4] }}")
    for row in rows:
        listed = [value if isinstance(value, list) else [value] for value in row.values()]
        yield from (dict(zip(row, values, strict=True)) for values in itertools.product(*listed))
