"""From the SQLite file of one person to the team's server: every table, every artifact, nothing lost.

The file is read from a copy and left as it is. The server must not be running; its store must hold no runs yet.
"""

import argparse
import shutil
import sqlite3
import sys
from pathlib import Path

import sqlalchemy
from mlflow.store.db.utils import _is_empty_database, _safe_initialize_tables, _upgrade_db
from mlflow.utils.file_utils import local_file_uri_to_path
from sqlalchemy import Connection, Engine, MetaData, Table, func, insert, inspect, select, text, update

from aliprod import InputError, streams
from tracking import server, storage
from tracking.parts import Died

# Where MLflow notes where artifacts lie.
PLACES = {
    "experiments": "artifact_location",
    "runs": "artifact_uri",
    "logged_models": "artifact_location",
    "model_versions": "source storage_location",
    "trace_tags": "value",
}
KEPT = "alembic_version"
BATCH = 5000  # rows


def move(database: str, artifacts: list[Path], folder: Path) -> dict[str, int]:
    """Copies an SQLite store and its folders of artifacts into the team's server in `folder`; rows by table.

    InputError if something is not where it should be: then nothing has been written to the database.
    """
    source = Path(sqlalchemy.make_url(database).database or "" if database.startswith("sqlite:") else database)
    if not source.is_file():
        raise InputError(f"{database}: no such file")
    with server.postgresql(folder) as (_, uri):
        new = sqlalchemy.create_engine(uri.format("mlflow"))
        old = _copy(source, folder / "moved.db")
        try:
            for engine in (old, new):
                _safe_initialize_tables(engine) if _is_empty_database(engine) else _upgrade_db(engine)
            with old.connect() as reading, new.begin() as writing:
                tables = MetaData()
                tables.reflect(writing)
                if writing.scalar(select(func.count()).select_from(tables.tables["runs"])):
                    raise InputError(f"the server in {folder} holds runs already: moving needs an empty one")
                counts = _rows(reading, writing, tables)
                _locations(writing, tables, artifacts)
                _files(artifacts, folder / "s3" / server.BUCKET / "artifacts")
        finally:
            old.dispose()
            new.dispose()
            (folder / "moved.db").unlink()
    return counts


def _copy(source: Path, to: Path) -> Engine:
    to.unlink(missing_ok=True)
    with sqlite3.connect(f"{source.resolve().as_uri()}?mode=ro", uri=True) as old, sqlite3.connect(to) as new:
        old.backup(new)  # consistent, even while somebody writes
    return sqlalchemy.create_engine(sqlalchemy.URL.create("sqlite", database=str(to.resolve())))


def _rows(old: Connection, new: Connection, tables: MetaData) -> dict[str, int]:
    moved = [table for table in tables.sorted_tables if table.name != KEPT]
    strange = set(inspect(old).get_table_names()) ^ set(tables.tables)
    if strange:
        raise InputError(f"the two stores differ in their tables: {', '.join(sorted(strange))}")
    new.execute(text("SET session_replication_role = replica"))  # rows need no order among the tables
    new.execute(text("TRUNCATE " + ", ".join(f'"{table.name}"' for table in moved)))
    counts = {}
    for table in moved:
        for rows in old.execute(select(table)).mappings().partitions(BATCH):
            new.execute(insert(table), [dict(row) for row in rows])
        counts[table.name] = new.scalar(select(func.count()).select_from(table)) or 0
        expected = old.scalar(select(func.count()).select_from(table))
        assert counts[table.name] == expected, f"{table.name}: {counts[table.name]} of {expected} rows"
        _sequences(new, table)
    return counts


def _sequences(new: Connection, table: Table) -> None:
    """Lets each counter of the table go on after the rows that came with their numbers."""
    for column in table.columns:
        if column.server_default is not None and "nextval" in str(getattr(column.server_default, "arg", "")):
            name = new.scalar(text("SELECT pg_get_serial_sequence(:t, :c)"), {"t": f'"{table.name}"', "c": column.name})
            if (highest := new.scalar(select(func.max(column)))) is not None:
                new.execute(text("SELECT setval(:name, :highest)"), {"name": name, "highest": highest})


def _locations(new: Connection, tables: MetaData, artifacts: list[Path]) -> None:
    """Rewrites where artifacts lie: below one of the folders becomes mlflow-artifacts:/, the server's own."""
    for name, columns in PLACES.items():
        table = tables.tables[name]
        for column in (table.c[each] for each in columns.split()):
            chosen = table.c.key == "mlflow.artifactLocation" if name == "trace_tags" else column.is_not(None)
            for (value,) in new.execute(select(column).where(chosen).distinct()).all():
                if (moved := _location(value, artifacts, f"{name}.{column.name}")) != value:
                    new.execute(update(table).where(chosen, column == value).values({column: moved}))


def _location(value: str, artifacts: list[Path], where: str) -> str:
    if ":/" in value and not value.startswith("file:/"):
        return value  # s3://, models:/, or a server's mlflow-artifacts:/ already
    path = Path(local_file_uri_to_path(value) if value.startswith("file:") else value).resolve()
    for folder in artifacts:
        if path.is_relative_to(folder.resolve()):
            return f"mlflow-artifacts:/{path.relative_to(folder.resolve())}"
    raise InputError(f"{where} {value!r} lies in none of {', '.join(map(str, artifacts))}: name its folder too")


def _files(artifacts: list[Path], to: Path) -> None:
    """Copies files into the folder that the S3 store serves, and compares them."""
    for folder in artifacts:
        shutil.copytree(folder, to, dirs_exist_ok=True)
        for path in (path for path in folder.rglob("*") if path.is_file()):
            copied = to / path.relative_to(folder)
            assert storage.digest(copied) == storage.digest(path), f"{path} changed while it was copied"


def main() -> None:
    """Moves and says what was moved."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from", dest="database", default="sqlite:///mlflow.db")
    parser.add_argument("--artifacts", type=Path, nargs="+", default=[Path("mlruns")], help="perhaps also mlartifacts")
    parser.add_argument("--folder", type=Path, required=True, help="of the server")
    asked = parser.parse_args()
    try:
        counts = move(asked.database, asked.artifacts, asked.folder)
    except (InputError, Died, OSError) as error:
        sys.exit(str(error))
    print(", ".join(f"{count} {name}" for name, count in counts.items() if count))


if __name__ == "__main__":
    with streams.unfailing():
        main()
