"""What all trials of a study share, made once: the rows as they are fed, and the model as it is before training."""

import copy
from pathlib import Path

from torch import nn

from aliprod import assembly
from aliprod.features import Features
from aliprod.images import Images
from aliprod.model import Recogniser
from aliprod.recipe import Round
from aliprod.space import Tuning


class Material:
    """Inputs by what they are augmented with, (train, val) each, levels of the classes, and the model."""

    def __init__(
        self, row: Round, tuning: Tuning, tables: assembly.Tables, made: Recogniser, data: str | Path, cache: str | Path
    ):
        self.levels = tables.levels
        self.inputs: dict[str, tuple[Images | Features, Images | Features]] = {}
        axis = tuning.space.get("augment")
        for augment in axis.choices if axis else (row.augment,):
            fed = row.model_copy(update={"augment": augment})
            source = assembly.inputs(made, fed, tables.train, tables.classes, data, cache, augment)
            val = assembly.inputs(made, fed, tables.val, tables.classes, data, cache, "none")
            self.inputs[augment] = source, val
        self._made = copy.deepcopy(made)
        if all(isinstance(source, Features) for pair in self.inputs.values() for source in pair):
            self._made.backbone = _Absent()  # or every trial would copy it, and save it every epoch

    def model(self) -> Recogniser:
        """A model of its own for each trial."""
        return copy.deepcopy(self._made)


class _Absent(nn.Module):
    """Stands where a backbone would that nobody asks, as all its embeddings are known."""

    def group_matcher(self, coarse: bool) -> dict[str, str]:
        """That there is nothing to freeze."""
        return {}
