"""Recognisers of products in photographs: a plain library, free of MLflow, S3 and command lines."""


class InputError(ValueError):
    """A mistake in what the user gave; entry points print it as one line and exit with 2."""


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or what it is called if it says nothing."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
