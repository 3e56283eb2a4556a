"""A folder that several processes, machines and people write to: locks in it, and who may write what."""

import contextlib
import errno
import fcntl
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from aliprod import InputError

# What a file system answers that knows no locks, or has none left.
LOCKLESS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)

WRITTEN = ("runs", "features", "features/*", "s3", "studies.db")  # in `work`, by whichever command


class Busy(InputError):
    """Raised in place of waiting: another process holds the lock."""


@contextlib.contextmanager
def locked(path: Path, purpose: str = "", *, wait: bool = True) -> Iterator[None]:
    """Holds the lock that the file `path`, made where there is none, stands for: one process at a time has it.

    Who has to wait is told so in a line that begins with `purpose` (else the path); unless `wait`, Busy is raised.
    InputError names path and cause where the file system knows no locks.
    """
    descriptor = _opened(path)
    try:
        _lock(descriptor, path, purpose or str(path), wait)
        yield
    finally:
        os.close(descriptor)


def open_to_group(folder: Path) -> None:
    """Lets this process make files as open to the group as `folder`, where it is there, is.

    Of a folder that a group may write to, what one member makes the others can use, whatever their umask. InputError
    names what this user may not write in it.
    """
    if not folder.is_dir():
        return
    group = stat.S_IRWXG & folder.stat().st_mode
    if group & stat.S_IWGRP:
        os.umask(os.umask(0o077) & ~group)
    for path in (folder, *(each for pattern in WRITTEN for each in folder.glob(pattern))):
        if not os.access(path, os.W_OK):
            raise InputError(
                f"{path}: you may not write to it; whoever owns it can share all of {folder} with a group by"
                f" `chgrp -R GROUP {folder}; chmod -R g+rwX {folder}; find {folder} -type d -exec chmod g+s {{}} +`"
            )


def _opened(path: Path) -> int:
    """A descriptor of a file; where somebody else made it, reading it is enough to lock it."""
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except PermissionError:
        if not path.exists():
            raise
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)


def _lock(descriptor: int, path: Path, purpose: str, wait: bool) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if not wait:
            raise Busy(f"{path}: another process holds it") from None
        print(f"{purpose}: waiting for another process", flush=True)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in LOCKLESS:
            raise
        raise InputError(f"{path}: cannot be locked ({error.strerror}): its file system knows no locks") from None
