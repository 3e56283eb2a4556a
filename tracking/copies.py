"""Copies of what is in an S3 store, fetched before anything reads it, as a folder here that processes share.

`<work>/s3/<bucket>` has the objects, their keys as paths. Beside it lie an index of what each was when it was fetched,
what was cut off in the middle, and a lock: one process fetches, the others of this machine wait and find it there.
"""

import contextlib
import hashlib
import random
import shutil
import sqlite3
import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from aliprod import InputError
from aliprod.progress import progress
from aliprod.recipe import Cleaning, Round
from aliprod.sharing import locked
from tracking import storage

Row = TypeVar("Row", Round, Cleaning)
CHUNK = 1 << 20  # bytes read at a time
ATTEMPTS = 6  # at an object of which nothing more arrives
LONGEST_PAUSE = 20.0  # seconds between two of them
TABLES = """
CREATE TABLE IF NOT EXISTS here (key TEXT PRIMARY KEY, size INTEGER, etag TEXT, mtime INTEGER) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS complete (name TEXT PRIMARY KEY, since REAL) WITHOUT ROWID;
"""
WANTED = """
CREATE TEMP TABLE wanted AS SELECT key, there.size, there.etag FROM there LEFT JOIN here USING (key)
WHERE here.size IS NOT there.size OR here.etag IS NOT there.etag
"""


class Object(NamedTuple):
    """An object as the store lists it."""

    key: str
    size: int
    etag: str


def local(name: str, work: Path) -> str:
    """The path of what has this name: of its copy in `work` if it is an s3:// address, else the name itself."""
    return str(fetch(name, work)) if storage.is_address(name) else name


def tables_here(row: Row, work: Path) -> Row:
    """A row whose manifest and select list, where they are at s3://, are named by their copies in `work`."""
    names = {field: name for field in ("manifest", "select_list") if (name := getattr(row, field, None))}
    return row.model_copy(update={field: local(name, work) for field, name in names.items()})


def fetch(address: str, work: Path) -> Path:
    """The copy of the folder, or else of the object, at an s3:// address, as it is there now.

    Asked for is only what is new or changed there (by size and ETag) or here (by size and time of change); what was cut
    off goes on where it was. Each object is compared with the checksum that the store gives (storage.intact); where it
    gives none, its size alone is known to be right. What has gone there goes here too. If the store does not answer and
    all was fetched before, that is taken, and a line says so. InputError names the address and what is wrong.
    """
    asked = time.time()
    bucket, name = storage.parts(address)
    root = (work / "s3").resolve()
    with storage.explained(address), _locked(root, bucket, address) as index:
        copies = _Copies(root, bucket, index)
        if copies.complete_since(name) < asked:  # otherwise another process saw to it while this one waited
            copies.forget_broken(name)
            now = time.time()
            try:
                found = storage.note_there(copies.client, bucket, name, index)
            except storage.FAILURES as error:
                if not (storage.is_away(error) and copies.complete_since(name)):
                    raise
                print(f"{address}: the store does not answer; taken as it was fetched before", flush=True)
            else:
                if not found:
                    raise InputError(f"{address}: nothing is there")
                copies.refresh(name, now)
    return root / bucket / name


@contextlib.contextmanager
def _locked(root: Path, bucket: str, address: str) -> Iterator[sqlite3.Connection]:
    """The index of a bucket's copies, for this process alone."""
    root.mkdir(parents=True, exist_ok=True)
    database = root / f".{bucket}.db"
    with locked(root / f".{bucket}.lock", address):
        database.touch()  # SQLite itself would make it for its owner alone
        with contextlib.closing(sqlite3.connect(database)) as index:
            index.executescript(TABLES)
            yield index


class _Copies:
    """What is here of one bucket, for the process that holds its lock. Names are as of storage.parts."""

    def __init__(self, root: Path, bucket: str, index: sqlite3.Connection):
        self.bucket = bucket
        self.folder = root / bucket
        self.partial = root / f".{bucket}.partial"
        self.index = index
        self.client = storage.client()
        self.stop = threading.Event()

    def complete_since(self, name: str) -> float:
        """When all of this name was last known to be as in the store; 0.0: never, or no more."""
        row = self.index.execute("SELECT since FROM complete WHERE name = ?", (storage.slashed(name),)).fetchone()
        return row[0] if row else 0.0

    def forget_broken(self, name: str) -> None:
        """Strikes off the copies that are not as they were fetched."""
        query = "SELECT key, size, mtime FROM here WHERE instr(key || '/', ?) = 1"
        rows = self.index.execute(query, (storage.slashed(name),))
        self._forget([key for key, *fetched in rows if _state(self.folder / key) != fetched], name)

    def refresh(self, name: str, now: float) -> None:
        """Makes all of this name equal to what is there, by the table of storage.note_there."""
        query = "SELECT key FROM here WHERE instr(key || '/', ?) = 1 AND key NOT IN (SELECT key FROM there)"
        gone = [key for (key,) in self.index.execute(query, (storage.slashed(name),))]
        self._forget(gone, name)
        for key in gone:
            (self.folder / key).unlink(missing_ok=True)
        self.index.execute(WANTED)
        self._forget([key for (key,) in self.index.execute("SELECT key FROM wanted JOIN here USING (key)")], name)
        count, size = self.index.execute("SELECT count(*), sum(size) FROM wanted").fetchone()
        if count:
            self._get_wanted(size)
            print(f"s3://{self.bucket}/{name}: {count} objects fetched, {size / 1e6:.1f} MB", flush=True)
        self.index.execute("INSERT OR REPLACE INTO complete VALUES (?, ?)", (storage.slashed(name), now))
        self.index.commit()

    def _forget(self, keys: list[str], name: str) -> None:
        """Strikes off copies, and with them that what `name` lies in, or holds, is complete."""
        if keys:
            self.index.executemany("DELETE FROM here WHERE key = ?", ((key,) for key in keys))
            overlap = "instr(name, :name) = 1 OR instr(:name, name) = 1"
            self.index.execute(f"DELETE FROM complete WHERE {overlap}", {"name": storage.slashed(name)})
            self.index.commit()

    def _get_wanted(self, size: int) -> None:
        """Fetches the objects of the table `wanted`; which have arrived is kept every second."""
        self.partial.mkdir(exist_ok=True)
        wanted = map(Object._make, self.index.execute("SELECT key, size, etag FROM wanted"))
        kept = time.monotonic()
        with (
            progress(total=size, desc=f"s3://{self.bucket}", unit="B", unit_scale=True) as bar,
            contextlib.closing(storage.parallel(lambda each: self._get(each, bar), wanted, self.stop.set)) as arrived,
        ):
            try:
                for row in filter(None, arrived):
                    self.index.execute("INSERT OR REPLACE INTO here VALUES (?, ?, ?, ?)", row)
                    if time.monotonic() > kept + 1:
                        self.index.commit()
                        kept = time.monotonic()
            finally:
                self.index.commit()
        shutil.rmtree(self.partial)

    def _get(self, wanted: Object, bar: progress) -> tuple[str, int, str, int] | None:
        """Fetches one object, on from where it was cut off; its row of `here`, or None if it has gone meanwhile."""
        failures, why = 0, ""
        while failures < ATTEMPTS:
            if why:
                self.stop.wait(random.random() * min(2 ** (failures - 1), LONGEST_PAUSE))
            partial = self.partial / hashlib.sha256(f"{wanted.key}\0{wanted.etag}".encode()).hexdigest()
            have = partial.stat().st_size if partial.exists() else 0
            rest = {"Range": f"bytes={have}-"} if have else {}
            try:
                answer = self.client.get_object(Bucket=self.bucket, Key=wanted.key, **rest)
                if storage.etag(answer) == wanted.etag:
                    self._write(answer["Body"], partial, bar)
                    if partial.stat().st_size == wanted.size and storage.intact(partial, answer) is not False:
                        return self._keep(partial, wanted)
                    why = "what arrives has not the size or checksum that the store says"
                    partial.unlink()
                else:
                    why = "it changes while it is fetched"
                    size = int(answer.get("ContentRange", "").rpartition("/")[2] or answer["ContentLength"])
                    wanted = Object(wanted.key, size, storage.etag(answer))
            except storage.FAILURES as error:
                if storage.code(error) == "NoSuchKey":
                    return None
                if storage.code(error) == "InvalidRange":
                    partial.unlink()  # it was all there, or the object is a smaller one now
                elif not storage.is_away(error):
                    raise
                why = str(error)
            more = partial.exists() and partial.stat().st_size > have
            failures = 1 if more else failures + 1
        raise InputError(f"s3://{self.bucket}/{wanted.key}: {why}")

    def _write(self, body: Any, partial: Path, bar: progress) -> None:
        with partial.open("ab") as file:
            for chunk in body.iter_chunks(CHUNK):
                file.write(chunk)
                bar.update(len(chunk))
                if self.stop.is_set():
                    raise CancelledError

    def _keep(self, partial: Path, wanted: Object) -> tuple[str, int, str, int]:
        path = self.folder / wanted.key
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.replace(path)
        return (*wanted, path.stat().st_mtime_ns)


def _state(path: Path) -> list[int]:
    """Size in bytes and time of change of a file; [] if there is none."""
    try:
        about = path.stat()
    except OSError:
        return []
    return [about.st_size, about.st_mtime_ns]
