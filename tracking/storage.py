"""An S3 store: how it is reached, what is in it, whether what arrives is whole, what its errors mean; uploads to it.

Credentials and the region come from where boto3 looks for them; the address of a store other than AWS from
AWS_ENDPOINT_URL_S3 or MLFLOW_S3_ENDPOINT_URL.
"""

import contextlib
import hashlib
import itertools
import os
import re
import shutil
import sqlite3
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple, NoReturn, TypeVar

import boto3
from boto3.s3.transfer import TransferConfig, create_transfer_manager
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, IncompleteReadError, NoCredentialsError
from botocore.exceptions import ConnectionError as NoConnection
from botocore.exceptions import HTTPClientError as BrokenConnection

from aliprod import InputError
from aliprod.atomic import replacing
from aliprod.progress import progress
from aliprod.streams import plain
from tracking import reach

PARALLEL = 16  # objects at a time
PART = 8 << 20  # bytes in one request of an upload; smaller files go in one
ATTEMPTS = 6  # at a request, with growing pauses
FAILURES = (BotoCoreError, ClientError)
THERE = "CREATE TEMP TABLE there (key TEXT PRIMARY KEY, size INTEGER, etag TEXT) WITHOUT ROWID"
REASONS = {
    "NoSuchBucket": "no such bucket",
    "NoSuchKey": "nothing is there",
    "404": "nothing is there",
    "AccessDenied": "access denied to these credentials",
    "403": "access denied to these credentials",
    "InvalidAccessKeyId": "the store does not know this access key",
    "SignatureDoesNotMatch": "the secret key does not belong to the access key",
}
T = TypeVar("T")
R = TypeVar("R")


class Uploaded(NamedTuple):
    """How many files went to the store, their bytes, and how many were there already."""

    files: int
    size: int
    skipped: int


def is_address(name: object) -> bool:
    """Whether a name is one of a store."""
    return str(name).startswith("s3://")


def parts(address: str) -> tuple[str, str]:
    """Bucket, and key or folder (without a slash at its end; "" is the whole bucket), of s3://bucket/folder."""
    found = re.fullmatch(r"s3://([a-zA-Z0-9][\w.-]+)(?:/(.*?))?/?", address)
    if not found:
        raise InputError(f"{address!r}: not of the form s3://bucket/folder")
    name = found[2] or ""
    _refuse_strange(found[1], name)
    return found[1], name


def slashed(name: str) -> str:
    """What the keys of all objects in a folder begin with."""
    return f"{name}/" if name else ""


def client() -> Any:
    """A client of S3 that retries, and leaves out the checksums that not every store knows."""
    reach.prepare()
    return boto3.Session().client(
        "s3",
        endpoint_url=os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("MLFLOW_S3_ENDPOINT_URL"),
        config=Config(
            signature_version="s3v4",
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            retries={"mode": "standard", "total_max_attempts": ATTEMPTS},
            connect_timeout=10,
            read_timeout=60,
            tcp_keepalive=True,
            max_pool_connections=2 * PARALLEL,
        ),
    )


def note_there(client: Any, bucket: str, name: str, index: sqlite3.Connection) -> int:
    """Notes key, size and ETag of the objects in a folder, or else of the one of this name, in a new table `there`.

    How many there are. InputError at a key that could not be a path.
    """
    index.execute(THERE)
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=slashed(name))
    with progress(desc=f"s3://{bucket}/{name}", unit="obj") as bar:
        for page in pages:
            rows = [(each["Key"], each["Size"], etag(each)) for each in page.get("Contents", [])]
            files = [row for row in rows if not row[0].endswith("/")]  # what some programs mark folders with
            for key, *_ in files:
                _refuse_strange(bucket, key)
            index.executemany("INSERT OR REPLACE INTO there VALUES (?, ?, ?)", files)
            bar.update(len(files))
    found: int = index.execute("SELECT count(*) FROM there").fetchone()[0]
    if name and not found:
        try:
            answer = client.head_object(Bucket=bucket, Key=name)
        except ClientError as error:
            if code(error) == "404":
                return 0
            raise
        row = (name, answer["ContentLength"], etag(answer))
        found = index.execute("INSERT INTO there VALUES (?, ?, ?)", row).rowcount
    return found


def upload(source: Path, address: str) -> Uploaded:
    """Puts a file, or all files of a folder, at an s3:// address, large ones in parts; what else is there stays.

    What is there already, equal in size and checksum, is passed over, so that the same command goes on where it was cut
    off. Files in sub-folders are all there before the others: who sees train.json finds the photographs. InputError as
    of `explained`.
    """
    bucket, name = parts(address)
    if not (source.is_dir() or (source.is_file() and name)):
        raise InputError(f"{source} to {address}: give a folder, or a file and the name it shall have")
    sent = size = skipped = 0
    with explained(address), contextlib.closing(sqlite3.connect("")) as index:
        store = client()
        note_there(store, bucket, name, index)
        query = "SELECT size, etag FROM there WHERE key = ?"
        items = ((path, key, index.execute(query, (key,)).fetchone()) for path, key in _files(source, name))
        config = TransferConfig(PART, PARALLEL, PART, preferred_transfer_client="classic")
        with create_transfer_manager(store, config) as manager:
            sending = _Transfers(manager, bucket)

            def put(item: tuple[Path, str, tuple[int, str] | None]) -> tuple[bool, int]:
                path, key, there = item
                size = path.stat().st_size
                if (
                    there
                    and there[0] == size
                    and (digest(path, "md5") == there[1] or intact(path, store.head_object(Bucket=bucket, Key=key)))
                ):
                    return False, size
                with explained(f"s3://{bucket}/{key}"):
                    sending.send(path, key)
                return True, size

            with progress(desc=address, unit="B", unit_scale=True) as bar:
                for _, group in itertools.groupby(items, lambda item: item[0].parent == source):
                    with contextlib.closing(parallel(put, group, sending.cancel)) as results:
                        for new, num_bytes in results:
                            sent, size, skipped = sent + new, size + new * num_bytes, skipped + (not new)
                            bar.update(num_bytes)
    return Uploaded(sent, size, skipped)


class _Transfers:
    """Files on their way to a bucket, that can be called back.

    The manager's own `shutdown(cancel=True)` cannot be used: it raises a TypeError, which would hide why.
    """

    def __init__(self, manager: Any, bucket: str):
        self.manager = manager
        self.bucket = bucket
        self.futures: set[Any] = set()
        self.cancelled = False
        self.lock = threading.Lock()

    def send(self, path: Path, key: str) -> None:
        """Sends a file with its SHA-256, and returns when it is there."""
        about = {"Metadata": {"sha256": digest(path)}}
        with self.lock:
            if self.cancelled:
                raise CancelledError
            future = self.manager.upload(str(path), self.bucket, key, about)
            self.futures.add(future)
        future.result()
        self.futures.discard(future)

    def cancel(self) -> None:
        """Calls back what has not arrived."""
        with self.lock:
            self.cancelled = True
            for future in self.futures:
                future.cancel()


def place(file: Path, name: str) -> str:
    """Copies a file to where `name` says, a path or an s3:// address; the address, or the absolute path."""
    if is_address(name):
        upload(file, name)
        return name
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    with replacing(Path(name)) as beside:
        shutil.copy(file, beside)
    return str(Path(name).resolve())


def parallel(work: Callable[[T], R], items: Iterable[T], stop: Callable[[], None]) -> Generator[R, None, None]:
    """Results in the order in which they are there, few items ahead of them; `stop` ends work that nobody wants."""
    with ThreadPoolExecutor(PARALLEL) as pool:
        done: SimpleQueue[Future[R]] = SimpleQueue()
        ahead = 0
        try:
            for item in items:
                pool.submit(work, item).add_done_callback(done.put)
                ahead += 1
                if ahead == 4 * PARALLEL:
                    yield done.get().result()
                    ahead -= 1
            for _ in range(ahead):
                yield done.get().result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            stop()
            raise


def intact(path: Path, answer: dict[str, Any]) -> bool | None:
    """Whether a file has the checksum that the store gives with an object; None if it gives none.

    It is the SHA-256 that `upload` leaves in the metadata, else the ETag where that is an MD5: not of objects that
    other programs put there in parts or encrypted with a key of one's own.
    """
    given = {name.lower(): value for name, value in answer["Metadata"].items()}.get("sha256", "")
    if re.fullmatch("[0-9a-f]{64}", given):
        return digest(path) == given
    encrypted = answer.get("ServerSideEncryption", "AES256") != "AES256" or "SSECustomerAlgorithm" in answer
    if re.fullmatch("[0-9a-f]{32}", etag(answer)) and not encrypted:
        return digest(path, "md5") == etag(answer)
    return None


def etag(answer: dict[str, Any]) -> str:
    """The ETag of an object, which changes whenever its content does."""
    return str(answer["ETag"]).strip('"')


def code(error: Exception) -> str:
    """What the store calls an error; "" if it is not the store's."""
    return str(error.response.get("Error", {}).get("Code", "")) if isinstance(error, ClientError) else ""


def is_away(error: Exception) -> bool:
    """Whether the store is at fault, not what it was asked: it does not answer, breaks off, or has too much to do."""
    if isinstance(error, ClientError):
        status = error.response["ResponseMetadata"].get("HTTPStatusCode", 0)
        return status >= 500 or status == 429
    return isinstance(error, NoConnection | BrokenConnection | IncompleteReadError)


@contextlib.contextmanager
def explained(address: str) -> Iterator[None]:
    """Within, what goes wrong with the store is an InputError: one line, the address first, no secret in it."""
    try:
        yield
    except InputError:
        raise
    except NoCredentialsError:
        raise InputError(f"{address}: no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY") from None
    except ClientError as error:
        reason = REASONS.get(code(error)) or error.response.get("Error", {}).get("Message") or str(error)
        raise InputError(f"{address}: {reason}") from None
    except (BotoCoreError, ValueError, sqlite3.DatabaseError) as error:
        raise InputError(f"{address}: {error}") from None


def digest(path: Path, algorithm: str = "sha256") -> str:
    """Hexadecimal digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.new(algorithm, usedforsecurity=False)).hexdigest()


def _files(source: Path, name: str) -> Iterator[tuple[Path, str]]:
    """The files of a folder, those of its sub-folders first, or the one file; each with its key.

    OSError where a folder cannot be listed; InputError where a link leads back to a folder that holds it.
    """
    if source.is_file():
        yield source, name
        return

    last: list[Path] = []
    for folder, _, files in os.walk(source, onerror=_raised, followlinks=True):
        here = Path(folder)
        if here.is_symlink() and here.resolve() in map(Path.resolve, here.absolute().parents):
            raise InputError(f"{here}: a link to a folder that it lies in itself")
        paths = [here / file for file in sorted(files)]
        if here == source:
            last = paths
        else:
            yield from ((path, slashed(name) + _utf8(path.relative_to(source).as_posix())) for path in paths)
    yield from ((path, slashed(name) + _utf8(path.relative_to(source).as_posix())) for path in last)


def _utf8(key: str) -> str:
    if plain(key) != key:
        raise InputError(f"'{plain(key)}': the name is not UTF-8, as names in a store must be")
    return key


def _raised(error: OSError) -> NoReturn:
    raise error


def _refuse_strange(bucket: str, key: str) -> None:
    if key and ("\0" in key or any(part in ("", ".", "..") for part in key.split("/"))):
        raise InputError(f"'s3://{bucket}/{key}': its parts must be plain names, for it becomes a path here")
