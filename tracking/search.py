"""This project's runs in the store, found by their tags: the one place where a search for runs is put into words."""

import re
from collections.abc import Iterator
from typing import Any

import mlflow
from mlflow import MlflowClient
from mlflow.entities import Run

from tracking import store

OURS = "aliprod.git"  # the tag that every run of this project has had from the first
PAGE = 50  # runs in one request; not all at once: the trials of a study may be thousands, with all they logged


def runs(tags: dict[str, Any], status: str = "", experiments: list[str] | None = None) -> Iterator[Run]:
    """This project's runs that carry all of these tags, newest first; of all experiments, unless some ids are given.

    `status`, such as FINISHED, is the runs' if given. Keys without a dot of their own are the project's.
    """
    wanted = {key if "." in key else f"aliprod.{key}": str(value) for key, value in tags.items()}
    clauses = [f"attributes.status = '{status}'"] * bool(status) + [f"tags.`{OURS}` LIKE '%'"]
    clauses += [f"tags.`{key}` {_matches(value)}" for key, value in wanted.items()]
    store.ready()
    if experiments is None:
        experiments = [experiment.experiment_id for experiment in mlflow.search_experiments()]

    order, token = ["attributes.start_time DESC"], None
    while True:
        page = MlflowClient().search_runs(experiments, " and ".join(clauses), max_results=PAGE, order_by=order,
                                          page_token=token)  # fmt: skip
        yield from (run for run in page if wanted.items() <= run.data.tags.items())
        token = page.token
        if not token:
            return


def _matches(value: str) -> str:
    """The clause for a tag's value. MLflow's grammar has no way to write a quote within quotes, so any character that
    might be read otherwise stands as _, which is any one, and `runs` compares again."""
    plain = re.sub(r"[^\w ./:+-]", "_", value)
    return f"= '{value}'" if plain == value else f"LIKE '{plain}'"
