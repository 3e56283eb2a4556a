"""The served form of a model, logged as code: image bytes in, classes with confidences out."""

import mlflow
import pandas as pd
from mlflow.pyfunc import PythonModel, PythonModelContext

from aliprod import model, prediction


class ServedRecogniser(PythonModel):
    """A table with a column `image` of bytes -> class_ids, names, paths, confidences (surest first), answer, certainty,
    error, as of prediction.recognise."""

    def load_context(self, context: PythonModelContext) -> None:
        """Reads the saved model that was logged with this file."""
        self.saved = model.load(context.artifacts["model"])

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict | None = None
    ) -> pd.DataFrame:
        """One row an image; one that cannot be read has empty lists and says why in `error`, the others none."""
        return prediction.recognise(self.saved, list(model_input["image"]), **(params or {}))


mlflow.models.set_model(ServedRecogniser())
