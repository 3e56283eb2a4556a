"""Files that are either whole or not there."""

import contextlib
import uuid
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a path beside `path` to write to, which takes its place when all went well and is removed otherwise.

    Nobody else has that path: two containers that share a disk may have the same process id.
    """
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}")
    try:
        yield beside
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
