"""Stops: Ctrl-C, SIGTERM, a closed terminal and a time limit are one thing, an interruption, that some work defers to a
safe place."""

import contextlib
import signal
import threading
from collections.abc import Iterator

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGALRM, signal.SIGHUP)


def raise_on_signals(minutes: float = 0.0) -> None:
    """From now on each of the signals raises KeyboardInterrupt in the main thread, one of them after `minutes`.

    A closed terminal does not where it is ignored, as `nohup` has it.
    """
    for number in SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 60 * minutes)


@contextlib.contextmanager
def deferred() -> Iterator[threading.Event]:
    """Within, the signals set the event instead, however many come: `mlflow run` passes Ctrl-C on as SIGTERM, so one
    stop can arrive as two. Outside the main thread, where no signal arrives, nothing sets it."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    heeded = [number for number in SIGNALS if before[number] != signal.SIG_IGN]
    for number in heeded:
        signal.signal(number, lambda *_: stop.set())
    try:
        yield stop
    finally:
        for number in heeded:
            signal.signal(number, before[number])
