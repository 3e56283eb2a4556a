"""A search over a round's schedule and the like: a study of trials, shared by as many workers as ask for it.

A study lives in a database: an SQLite file for the workers of one machine, PostgreSQL for those of many. It alone says
which trials there are and who has which: a trial that nobody hears of any more is lost, and tried again by another.
"""

import contextlib
import random
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Generator, Iterator
from typing import Any

import optuna
import pandas as pd
import sqlalchemy
from optuna import exceptions, pruners, samplers, storages
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from aliprod import InputError, first_line, recipe, training
from aliprod.material import Material
from aliprod.recipe import Round
from aliprod.space import Tuning
from aliprod.training import Report

HEARTBEAT = 15  # seconds between two signs of life of a trial; after four without one it is lost
RETRIES = 2  # of a lost trial
PATIENCE = 30  # seconds that a worker may take to open a study it has made
FIGURES = {
    "Score by trial": "optimization_history",
    "Score by epoch": "intermediate_values",
    "What mattered": "param_importances",
    "Complete trials, field by field": "parallel_coordinate",
    "Score by field": "slice",
}
FINISHED = {"complete": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "failed": TrialState.FAIL}
SAMPLERS: dict[str, Callable[[int], samplers.BaseSampler]] = {
    "tpe": lambda seed: samplers.TPESampler(multivariate=True, group=True, constant_liar=True, seed=seed),
    "random": lambda seed: samplers.RandomSampler(seed=seed),
}
PRUNERS: dict[str, Callable[[int], pruners.BasePruner]] = {
    "hyperband": lambda epochs: pruners.HyperbandPruner(min_resource=1, max_resource=epochs, reduction_factor=3),
    "median": lambda epochs: pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=epochs // 6),
    "none": lambda epochs: pruners.NopPruner(),
}


class Trial:
    """One round to be tried. `reports` trains it; `state` then says how that ended."""

    def __init__(self, trial: optuna.Trial, row: Round, tuning: Tuning):
        self.number = trial.number
        self.row = row
        self.values = {name: getattr(row, name) for name in tuning.active(row.model_dump())}
        self.attempts = trial.user_attrs.get("runs", [])  # runs that recorded it before: cut short, or dead
        self.state = "running"  # then complete, pruned, failed or lost
        self.epoch = 0  # whole epochs done
        self.scores: dict[str, float] = {}  # on val, at the epoch that the round would keep
        self.error = ""
        self.told = False
        self.asked = trial
        self._objective = tuning.objective

    @property
    def score(self) -> float:
        """The objective."""
        return self.scores[self._objective]

    def recorded(self, run: str) -> None:
        """Notes which run records it."""
        self.asked.set_user_attr("runs", [*self.attempts, run])

    def reports(self, material: Material, stop: threading.Event) -> Iterator[Report]:
        """Trains the round, yielding its reports, until it is done, pruned or another worker's, or `stop` is set.

        What fails is raised, as training raises it. Rows that a search begins with are never pruned.
        """
        source, val = material.inputs[self.row.augment]
        first = "first" in self.asked.user_attrs
        try:
            with tempfile.TemporaryDirectory() as folder:
                for report in training.train(
                    material.model(), self.row, source, val, folder,
                    stop=stop, checkpoint_steps=sys.maxsize, levels=material.levels,
                ):  # fmt: skip
                    yield report
                    if stop.is_set() and report.epoch < self.row.epochs:
                        return
                    self.epoch = report.epoch
                    if report.best:
                        self.scores = report.val
                    self.asked.report(self._value(), report.epoch)
                    if report.epoch < self.row.epochs and not first and self.asked.should_prune():
                        self.state = "pruned"
                        return
            self.state = "complete"
        except exceptions.UpdateFinishedTrialError:
            self.state = "lost"  # this worker was not heard of for too long
        except exceptions.StorageInternalError:
            raise  # the database is away, which says nothing of the trial
        except Exception as error:
            self.state, self.error = "failed", f"{type(error).__name__}: {error}"[:500]
            raise

    def _value(self) -> float:
        if self._objective not in self.scores:
            raise InputError(f"objective {self._objective!r}: val has no such score; it has {', '.join(self.scores)}")
        return self.score


def join(url: str, name: str, row: Round, tuning: Tuning, data: dict[str, str]) -> "Study":
    """The study called `name` in a database (sqlite:///file or postgresql://...), made where there is none.

    One that is new, or whose maker died, has no `run` and is to be opened; another worker's is waited for. InputError
    if it is about another round, space, objective or `data` (what else it hangs on, in words), with what differs.
    """
    warnings.filterwarnings("ignore", category=exceptions.ExperimentalWarning)
    warnings.filterwarnings("ignore", message="Heartbeat of storage is supposed to be used with")  # we give it
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = _storage(url)
    about = row.model_dump(mode="json", exclude={"name", "reported"}) | data | {"objective": tuning.objective}
    about |= {field: str(axis) for field, axis in tuning.space.items()}
    try:
        lower = tuning.objective == "loss"
        found = optuna.create_study(storage=storage, study_name=name, direction="minimize" if lower else "maximize")
    except exceptions.DuplicatedStudyError:
        found = optuna.load_study(study_name=name, storage=storage)
        for _ in range(PATIENCE):
            if "run" in found.user_attrs:
                break
            time.sleep(1)
    known = found.user_attrs.get("about", {})
    differences = [f"{key} was {known[key]} and is {about.get(key)}" for key in known if known[key] != about.get(key)]
    if differences:
        raise InputError(f"study {name!r} is about something else: {'; '.join(differences)}; give another name")
    if not known:
        found.set_user_attr("about", about)
    return Study(found, storage, row, tuning)


def _storage(url: str) -> storages.RDBStorage:
    lite = url.startswith("sqlite:///")
    if not lite and not url.startswith("postgresql"):
        raise InputError(f"storage {url!r}: must be postgresql://user@host/database, or sqlite:///file")
    for attempt in range(5):
        try:
            storage = storages.RDBStorage(
                url.replace("{", "{{").replace("}", "}}"),  # which Optuna would fill in
                engine_kwargs={"connect_args": {"timeout": 60}} if lite else {"pool_pre_ping": True},
                heartbeat_interval=HEARTBEAT,
                grace_period=4 * HEARTBEAT,
                heartbeat_stale_trial_callback=storages.RetryHeartbeatStaleTrialCallback(max_retry=RETRIES),
            )
            break
        except (SQLAlchemyError, exceptions.StorageInternalError) as error:
            if attempt == 4:
                reason = first_line(error.__cause__ or error)
                raise InputError(f"storage {url.rpartition('@')[2]}: {reason}") from None
            time.sleep(attempt + random.random())  # another worker may be making the tables
    if lite:  # or two workers could read that a trial waits before either takes it
        sqlalchemy.event.listen(storage.engine, "connect", lambda opened, _: setattr(opened, "isolation_level", None))
        sqlalchemy.event.listen(storage.engine, "begin", lambda opened: opened.exec_driver_sql("BEGIN IMMEDIATE"))
        storage.engine.dispose()
    return storage


def _state(trial: FrozenTrial) -> str:
    """waiting, running, complete, pruned, failed, or lost: failed by the silence of its worker, not by an error."""
    if trial.state == TrialState.FAIL:
        return "failed" if "error" in trial.user_attrs else "lost"
    return trial.state.name.lower()


class Study:
    """A study that this worker has joined."""

    def __init__(self, study: optuna.Study, storage: storages.RDBStorage, row: Round, tuning: Tuning):
        self.name = study.study_name
        self.row = row
        self.tuning = tuning
        self._study = study
        self._storage = storage
        self._awaited: set[int] = set()

    @property
    def run(self) -> str:
        """The run that records the study; "" until it is open."""
        return self._study.user_attrs.get("run", "")

    def open(self, run: str) -> None:
        """Enqueues the rows the study begins with and notes who records it; only then do other workers begin."""
        for start in self.tuning.starts(self.row):
            self._study.enqueue_trial(start, user_attrs={"first": True}, skip_if_exists=True)
        self._study.set_user_attr("run", run)

    def search(self, trials: int, sampler: str, pruner: str, seed: int) -> Generator[Trial, None, None]:
        """Yields trials to train, one after the other, until `trials` are finished, by whomever.

        Complete, pruned and failed ones count; lost ones do not, as they are tried again. Each draw has a seed of its
        own: a search that goes on draws as if it had never stopped. Close the generator to give a trial back.
        """
        axis = self.tuning.space.get("epochs")
        self._study.pruner = PRUNERS[pruner](max(axis.extremes) if axis else self.row.epochs)
        while True:
            storages.fail_stale_trials(self._study)
            if self._taken(finished=True) >= trials:
                return
            if self._taken() >= trials:
                self._await_others()
                continue
            asked = self._study.ask()
            if self._taken() > trials:  # another worker was as quick
                self._give_back(asked)
                time.sleep(random.random())
                continue
            with self._beating(asked):
                self._study.sampler = SAMPLERS[sampler](seed + asked.number)
                row = recipe.replaced(self.row, self.tuning.draw(self.row, asked), f"trial {asked.number}")
                made = Trial(asked, row, self.tuning)
                try:
                    yield made
                finally:
                    self.tell(made)

    def _taken(self, finished: bool = False) -> int:
        """Trials that count: finished ones and, if asked, those that somebody works at."""
        states = [_state(trial) for trial in self._study.get_trials(deepcopy=False)]
        return sum(state in FINISHED or (not finished and state == "running") for state in states)

    def _await_others(self) -> None:
        """A second's rest. A trial whose worker died before its first sign of life would never be found lost: every
        worker that waits gives it one."""
        for trial in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if trial._trial_id not in self._awaited:
                self._storage.record_heartbeat(trial._trial_id)
                self._awaited.add(trial._trial_id)
        time.sleep(1)

    def _give_back(self, asked: optuna.Trial) -> None:
        with contextlib.suppress(exceptions.UpdateFinishedTrialError):
            self._storage.set_trial_state_values(asked._trial_id, TrialState.WAITING)

    def tell(self, made: Trial) -> None:
        """Makes known how a trial ended, once all about it is recorded; one that has not ended is given back."""
        if made.told:
            return
        made.told = True
        if made.state == "running":
            self._give_back(made.asked)
        elif made.state != "lost":
            if made.error:
                made.asked.set_user_attr("error", made.error)
            score = made.score if made.state == "complete" else None
            with contextlib.suppress(exceptions.UpdateFinishedTrialError):
                self._study.tell(made.asked, score, FINISHED[made.state], skip_if_finished=True)

    @contextlib.contextmanager
    def _beating(self, asked: optuna.Trial) -> Iterator[None]:
        """Gives signs of life of a trial while something else works at it."""
        over = threading.Event()

        def beat() -> None:
            while not over.wait(self._storage.heartbeat_interval):
                with contextlib.suppress(exceptions.StorageInternalError):  # away; the next may get through
                    self._storage.record_heartbeat(asked._trial_id)

        self._storage.record_heartbeat(asked._trial_id)
        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def table(self) -> pd.DataFrame:
        """A row a trial: number, state, score (of a pruned one: so far), epochs, seconds, the fields varied, run and
        error."""
        rows = [
            {
                "number": trial.number,
                "state": _state(trial),
                self.tuning.objective: trial.value if trial.state.is_finished() else None,
                "epochs": trial.last_step or 0,
                "seconds": trial.duration and round(trial.duration.total_seconds(), 1),
                **{name: trial.params.get(name) for name in self.tuning.space},
                "first": "first" in trial.user_attrs,
                "run": (trial.user_attrs.get("runs") or [""])[-1],
                "error": trial.user_attrs.get("error", ""),
            }
            for trial in self._study.get_trials(deepcopy=False)
        ]
        return pd.DataFrame(rows)

    def best(self) -> tuple[int, float, Round] | None:
        """Number, score and round of the best of the complete trials; None where there is none."""
        try:
            trial = self._study.best_trial
        except ValueError:
            return None
        return trial.number, trial.values[0], recipe.replaced(self.row, trial.params, f"trial {trial.number}")

    def written(self) -> float | None:
        """Score of the round as written, once it is complete."""
        start = self.tuning.starts(self.row)[0]
        trials = self._study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        return next((trial.value for trial in trials if trial.params == start), None)

    def figures(self) -> dict[str, Any]:
        """Optuna's interactive figures (plotly), by title; a text where the trials do not suffice for one."""
        figures: dict[str, Any] = {}
        for title, name in FIGURES.items():
            named = {} if name == "intermediate_values" else {"target_name": self.tuning.objective}
            try:
                with warnings.catch_warnings(action="ignore"):  # that few trials make it inaccurate
                    figures[title] = getattr(optuna.visualization, f"plot_{name}")(self._study, **named)
            except (RuntimeError, ValueError) as error:
                figures[title] = f"these trials do not suffice: {error}"
        return figures
