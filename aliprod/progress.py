"""Progress of long work: a bar on a terminal, elsewhere a plain line every half minute."""

import sys
from collections.abc import Callable
from typing import Any

from tqdm import tqdm


class progress(tqdm):
    """tqdm, with its rate and remaining time, that reads well in a log file too."""

    def __init__(self, *args: Any, **kwargs: Any):
        file = sys.stderr
        if file is None or file.closed:
            super().__init__(*args, disable=True, **kwargs)
            return
        patience = 0.1 if file.isatty() else 30  # seconds before the first line and between two
        super().__init__(*args, file=file, mininterval=patience, delay=patience, leave=False, **kwargs)

    @staticmethod
    def status_printer(file: Any) -> Callable[[str], None]:
        """As tqdm's on a terminal; elsewhere whole lines instead of one that is written over."""
        if file.isatty():
            return tqdm.status_printer(file)
        return lambda line: print(line.strip(), file=file, flush=True) if line.strip() else None
