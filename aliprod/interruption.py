"""Stops: Ctrl-C, SIGTERM and a time limit are one thing, an interruption, that some work defers to a safe place."""

import contextlib
import signal
import threading
from collections.abc import Iterator

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)


def raise_on_signals(minutes: float = 0.0) -> None:
    """From now on each of the signals raises KeyboardInterrupt in the main thread, one of them after `minutes`."""
    for number in SIGNALS:
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
    before = [signal.signal(number, lambda *_: stop.set()) for number in SIGNALS]
    try:
        yield stop
    finally:
        for number, handler in zip(SIGNALS, before, strict=True):
            signal.signal(number, handler)
