"""Processes that are parts of one server: each awaited until it is healthy, and ended with all that it started."""

import contextlib
import ctypes
import dataclasses
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from aliprod import interruption

DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class Died(Exception):
    """A part has ended by itself."""


@dataclasses.dataclass(frozen=True)
class Part:
    """A running part, where it is reached, and its log."""

    name: str
    process: subprocess.Popen[bytes]
    where: str
    log: Path

    def check(self) -> None:
        """Raises Died if it runs no more."""
        if (status := self.process.poll()) is not None:
            raise Died(f"{self.name} ended with status {status}: see {self.log}")


@contextlib.contextmanager
def part(
    name: str, command: list[str], healthy: Callable[[], bool], where: str, folder: Path, **options: Any
) -> Iterator[Part]:
    """A part, healthy; ended when left. `options` are Popen's; its log is `folder`/logs/<name>.log."""
    log = folder / "logs" / f"{name}.log"
    log.parent.mkdir(mode=0o700, exist_ok=True)
    with log.open("ab") as file:  # in sessions of their own: Ctrl-C reaches them in turn, from here
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,
            cwd=folder,
            preexec_fn=_follow,
            **options,
        )
    started = Part(name, process, where, log)
    try:
        while not healthy():
            started.check()
            time.sleep(0.2)
        print(f"{name}: up at {where}, log {log}", flush=True)
        yield started
    finally:
        with interruption.deferred():
            _end(process)


def _follow() -> None:
    """In a part to be: has Linux interrupt it when this process dies without having stopped it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGINT)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Asks a part to end, waits, and kills what is left of it and of all it started."""
    descendants = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    process.send_signal(signal.SIGINT)  # to PostgreSQL: without waiting for its clients
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(20)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    for left in psutil.wait_procs(descendants, timeout=2)[1]:
        with contextlib.suppress(psutil.NoSuchProcess):
            left.kill()
    process.wait()


def answers(url: str) -> bool:
    """Whether an HTTP server of this machine is there, past any proxy; being refused is an answer too."""
    try:
        with DIRECT.open(url, timeout=5):
            return True
    except urllib.error.HTTPError as error:
        return error.code < 500
    except OSError:
        return False


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port
