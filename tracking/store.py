"""The tracking store, a server or a database: reached for the first time in one place, and who is at fault in one.

An error is of one of three kinds. The store is away: what it missed is sent later. It refuses: the same again would be
refused again. Or this machine refuses, whose disk is full or may not be written to, and only its user can mend it.
"""

import contextlib
import errno
import functools
import logging
import re
import socket
import sqlite3
from contextlib import AbstractContextManager
from pathlib import Path

import mlflow
import requests
import sqlalchemy
import urllib3
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException, RestException

from aliprod import InputError, first_line
from aliprod.sharing import locked
from tracking import reach, storage

BUSY = 20  # seconds that a database may be locked by others
UNREACHED = (
    *(requests.RequestException, urllib3.exceptions.HTTPError),
    *(ConnectionError, TimeoutError, socket.gaierror),
)
NO_NETWORK = (errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTDOWN, errno.EHOSTUNREACH)
# What SQLite says of its file, whoever asks: https://www.sqlite.org/rescode.html
BROKEN = (
    *(sqlite3.SQLITE_READONLY, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_FULL),
    *(sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_NOTADB),
)


def ready() -> None:
    """Sees to it that the store can be asked, before anything else of MLflow is: InputError in one line if not.

    An SQLite file is made, or brought up to date, by one process while the others wait.
    """
    reach.prepare()
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # the same again, with a traceback
    _first_contact(mlflow.get_tracking_uri())


def away(error: BaseException) -> bool:
    """Whether a server or a store could not be reached or could not do it now, rather than refused."""
    culprit = _culprit(error)
    if isinstance(culprit, MlflowException):
        return culprit.get_http_status_code() >= 500
    if isinstance(culprit, requests.HTTPError) and culprit.response is not None:
        return bool(culprit.response.status_code >= 500)
    if isinstance(culprit, sqlalchemy.exc.OperationalError):
        return not local(error)
    if isinstance(culprit, UNREACHED) or (isinstance(culprit, OSError) and culprit.errno in NO_NETWORK):
        return True
    return isinstance(culprit, Exception) and storage.is_away(culprit)


def local(error: BaseException) -> bool:
    """Whether this machine refused, which no server is to blame for: a full disk, a folder that may not be written."""
    culprit = _culprit(error)
    if isinstance(culprit, sqlalchemy.exc.DBAPIError):
        return getattr(culprit.orig, "sqlite_errorcode", 0) & 0xFF in BROKEN
    return isinstance(culprit, OSError) and not isinstance(culprit, UNREACHED) and culprit.errno not in NO_NETWORK


def refusal(error: BaseException, what: str = "refuses") -> InputError:
    """What went wrong with the store, as the line that a person reads; no password in it."""
    uri = mlflow.get_tracking_uri()
    server = uri.startswith(("http://", "https://"))
    culprit = _culprit(error)
    if isinstance(culprit, sqlalchemy.exc.DBAPIError):
        error = culprit
    reason = reach.shown(first_line(error))[:300]
    if away(error) and (server or isinstance(culprit, sqlalchemy.exc.OperationalError)):
        what = "does not answer"
        if server and (proxy := reach.proxy(uri)):
            reason += f" (asked through the proxy {proxy})"
    elif local(error):
        what = "cannot be used"
    return InputError(f"the tracking {'server' if server else 'store'} {reach.shown(uri)} {what}: {reason}")


@functools.cache
def _first_contact(uri: str) -> None:
    try:
        with _alone(uri):
            _reachable(uri)
            MlflowClient(uri).search_experiments(max_results=1)
    except InputError:
        raise
    except Exception as error:  # of MLflow, SQLAlchemy, Alembic, a driver: a database can be wrong in many ways
        raise refusal(error, "cannot be used") from None


def _alone(uri: str) -> AbstractContextManager[None]:
    """A lock beside an SQLite file; MLflow's own migration knows none, and two at once leave it half made."""
    database = _database(uri)
    if not database or database.drivername.partition("+")[0] != "sqlite" or not database.database:
        return contextlib.nullcontext()
    path = Path(database.database)
    if database.database == ":memory:" or path.name.startswith("file:"):
        return contextlib.nullcontext()
    path.parent.mkdir(parents=True, exist_ok=True)
    return locked(path.with_name(f"{path.name}.lock"), reach.shown(uri))


def _reachable(uri: str) -> None:
    """Raises what the database says; MLflow itself would ask ten times, for minutes."""
    database = _database(uri)
    if not database:
        return
    sqlite = database.drivername.partition("+")[0] == "sqlite"
    engine = sqlalchemy.create_engine(database, connect_args={"timeout": BUSY} if sqlite else {})
    try:
        sqlalchemy.inspect(engine).get_table_names()
    finally:
        engine.dispose()


def _database(uri: str) -> sqlalchemy.URL | None:
    """The URI as that of a database; None if it is a server's, or a folder's."""
    try:
        database = sqlalchemy.make_url(uri)
        return database if database.get_dialect() else None
    except (sqlalchemy.exc.ArgumentError, sqlalchemy.exc.NoSuchModuleError):
        return None


def _culprit(error: BaseException) -> BaseException:
    """Who is at fault: the error within those in which MLflow wraps whatever happens to it.

    What a server answered is its own word; anything else of 500 and above stands for the error that it came of.
    """
    while isinstance(error, MlflowException) and not isinstance(error, RestException):
        if error.get_http_status_code() < 500:
            break
        cause = error.__cause__ or error.__context__
        if cause is None:  # of files it copies in parallel MLflow hands on the text alone
            told = re.search(r"\[Errno (\d+)\]", str(error))
            return OSError(int(told[1]), str(error)) if told else error
        error = cause
    return error
