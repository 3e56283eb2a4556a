"""What is said, and to whom: streams that cannot show it, or that nobody reads, end no work."""

import contextlib
import errno
import io
import select
import sys
from collections.abc import Iterator
from typing import Any


class _Unfailing(io.FileIO):
    """A stream's file that swallows what it cannot write, from the first failure on, which it keeps."""

    failure: OSError | None = None

    def write(self, data: Any) -> int:
        while self.failure is None:
            try:
                if (count := super().write(data)) is not None:
                    return count
                select.select([], [self], [])  # a stream that does not block, whose reader is behind
            except OSError as error:
                self.failure = error
        return len(data)


@contextlib.contextmanager
def unfailing() -> Iterator[None]:
    """Within, stdout and stderr escape what their encoding lacks, and take what they cannot pass on: a reader that has
    gone, a full disk, a terminal that was closed.

    The work is what counts: who printed its last line to a full disk has done it, and a script that looks at the exit
    status must not do it again. So that is left alone, and at the end one line on stderr says what was lost; not of a
    reader that has gone, as `| head` does when it has seen enough.
    """
    files = {}
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not getattr(sys, f"__{name}__"):  # somebody else's, as a test's
            continue
        stream.flush()
        files[name] = _Unfailing(stream.fileno(), "w", closefd=False)
        replacement = io.TextIOWrapper(
            io.BufferedWriter(files[name]),
            encoding=stream.encoding,
            errors="backslashreplace",
            line_buffering=stream.line_buffering,
            write_through=stream.write_through,
        )
        setattr(sys, name, replacement)

    try:
        yield
    finally:
        sys.stdout.flush()
        lost = files["stdout"].failure if "stdout" in files else None
        if lost and lost.errno != errno.EPIPE:
            print(f"what was printed is incomplete: {lost.strerror}", file=sys.stderr)
        sys.stderr.flush()


def plain(text: str) -> str:
    """Text that any file, table and database takes: bytes of a file's name that are not UTF-8 are escaped."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
