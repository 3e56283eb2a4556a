"""Recognisers of products in photographs: a plain library, free of MLflow, S3 and command lines."""


class InputError(ValueError):
    """A mistake in what the user gave; entry points print it as one line and exit with 2."""
