"""The served form of a model, logged as code: image files, base64 text or URLs in, classes with confidences out."""

import os
import threading

import mlflow
import pandas as pd
import torch
from mlflow.environment_variables import _MLFLOW_IS_IN_SERVING_ENVIRONMENT
from mlflow.exceptions import MlflowException
from mlflow.pyfunc import PythonModel, PythonModelContext

from aliprod import InputError, model, prediction
from aliprod.intake import Limits
from aliprod.processors import available_cpus


class ServedRecogniser(PythonModel):
    """A table with a column `image` -> one row an image, with the columns of prediction.recognise.

    An image is a file's bytes, those in base64, or a URL where ALIPROD_URL_HOSTS allows its host; intake.Limits has the
    limits and the variables that set them. One that cannot be read has empty lists and says why in `error`.
    """

    def load_context(self, context: PythonModelContext) -> None:
        """Reads the saved model that was logged with this file, and the limits from the environment."""
        torch.set_num_threads(min(torch.get_num_threads(), available_cpus()))  # a container's quota it does not know
        self.saved = model.load(context.artifacts["model"])
        self.limits = Limits.read(os.environ)
        self.turn = threading.Lock()

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict | None = None
    ) -> pd.DataFrame:
        """The answers; `params` are as of prediction.recognise. A mistake in them refuses the request."""
        images = list(model_input["image"])
        try:
            if nulls := [name for name, value in (params or {}).items() if value is None]:
                raise InputError(f"{nulls[0]} null: must have a value, or be left out for its default")
            if _MLFLOW_IS_IN_SERVING_ENVIRONMENT.get() and len(images) > self.limits.max_images:
                raise InputError(f"{len(images)} images; a request may have {self.limits.max_images}")
            files, refused = self.limits.take(images)
            with self.turn:  # decoding and network use all cores: two at a time would double the memory and win nothing
                answers = prediction.recognise(self.saved, files, **(params or {}), max_pixels=self.limits.max_pixels)
        except InputError as error:
            refusal = MlflowException.invalid_parameter_value(str(error))
            refusal.json_kwargs = {"message": str(error)}  # a server would put the whole table before it
            raise refusal from None
        return answers.assign(error=[refused.get(row, error) for row, error in enumerate(answers["error"])])


mlflow.models.set_model(ServedRecogniser())
