"""Where a command runs, made fit for the libraries before they are imported.

Names of files are UTF-8 where the locale knows only ASCII, the three standard streams are there, caches go where
writing is possible, the user has a name, and threads are as many as there are processors for.
"""

import contextlib
import getpass
import os
import stat
import sys
import tempfile
from pathlib import Path

from aliprod.processors import available_cpus

# Where libraries keep what they could do without, and where that is unless the variable says so.
CACHES = {"XDG_CACHE_HOME": "~/.cache", "MPLCONFIGDIR": "~/.config/matplotlib"}
HOMELESS = "ALIPROD_HOMELESS"  # the variable that says that HOME is a temporary folder


def prepare() -> None:
    """Makes them so, for this process and those it starts; once, as early as can be.

    `python -m` of a command starts again where the locale is ASCII.
    """
    _open_streams()
    _speak_utf8()
    _name_user()
    _find_folders()
    if available_cpus() < (os.cpu_count() or 1):  # OpenMP, and with it torch, knows of no quota
        os.environ.setdefault("OMP_NUM_THREADS", str(available_cpus()))


def has_home() -> bool:
    """Whether the user has a home folder, be it one that cannot be written to."""
    try:
        return Path.home().is_absolute() and HOMELESS not in os.environ
    except RuntimeError:
        return False


def _open_streams() -> None:
    """Puts nothing in place of a closed stream: the next file would get its number, and what is printed."""
    for number, (name, mode) in enumerate({"stdin": "r", "stdout": "w", "stderr": "w"}.items()):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # gets the lowest number that is free
        if getattr(sys, name) is None:
            stream = open(number, mode, encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
            setattr(sys, name, stream)


def _speak_utf8() -> None:
    """Starts the same command again in Python's UTF-8 mode where the locale has nothing but ASCII, as containers often
    have: only an interpreter's start settles by which bytes a file's name is opened. What is shown keeps the encoding
    of the terminal. Another locale's encoding is left alone, as the user's files are named in it."""
    if sys.argv[0] != "-m" or sys.getfilesystemencoding() != "ascii":
        return
    os.environ["PYTHONUTF8"] = "1"
    os.environ.setdefault("PYTHONIOENCODING", sys.stdout.encoding)
    os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])


def _name_user() -> None:
    """Gives a user without a name in the password file one: MLflow, torch and PostgreSQL ask for it."""
    try:
        getpass.getuser()
    except (KeyError, OSError, ImportError):
        os.environ["LOGNAME"] = f"uid{os.getuid()}"


def _find_folders() -> None:
    """A temporary folder takes the place of a home that is nowhere, and of caches that cannot be written."""
    with contextlib.suppress(OSError):  # nowhere to write at all: the library that must will say so
        if not has_home():
            os.environ |= {"HOME": _temporary_folder(), HOMELESS: "1"}
        for name, usual in CACHES.items():
            if not _writable(Path(os.environ.get(name) or usual).expanduser()):
                os.environ[name] = _temporary_folder()


def _temporary_folder() -> str:
    """One that the next command finds again, unless somebody else has put something of that name there: what is in
    caches is run."""
    folder = Path(tempfile.gettempdir(), f"aliprod-{os.getuid()}")
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    about = folder.lstat()
    ours = stat.S_ISDIR(about.st_mode) and about.st_uid == os.getuid() and not about.st_mode & 0o022
    return str(folder) if ours else tempfile.mkdtemp(prefix="aliprod-")


def _writable(folder: Path) -> bool:
    """Whether a file could be put into a folder, which may have to be made first."""
    there = next((place for place in (folder, *folder.parents) if place.exists()), folder)
    return folder.is_absolute() and there.is_dir() and os.access(there, os.W_OK | os.X_OK)
