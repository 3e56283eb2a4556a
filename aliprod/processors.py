"""How many processors a process may use, which in a container or a batch job are fewer than the machine has."""

import math
import os
from collections.abc import Iterator
from pathlib import Path


def available_cpus(root: Path = Path("/")) -> int:
    """How many threads can run at once: the processors that this process is bound to, and no more than the quota of its
    control groups pays for, a begun one counted whole. `root` is where /proc and /sys are looked for."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min([bound, *(max(1, math.ceil(quota)) for quota in _quotas(root))])


def _quotas(root: Path) -> Iterator[float]:
    """The limits, in processors, of the control groups that this process is in, of either version of Linux's."""
    for folder in _control_groups(root):
        try:
            yield _quota(folder)
        except (OSError, ValueError):
            continue  # no limit is set here, and above the root of a container there is no file


def _control_groups(root: Path) -> Iterator[Path]:
    """The folders of the groups, up to the topmost: within a container the path is the host's, which only its root is.

    A line of the list is number:controllers:path; version 2 has neither number nor controllers.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue

        places = [controllers, "cpu"] if controllers else ["", "unified"]
        for place in places:
            top = root / "sys/fs/cgroup" / place
            group = top / path.strip("/")
            yield group
            yield from (folder for folder in group.parents if folder == top or top in folder.parents)


def _quota(folder: Path) -> float:
    """Time on processors per time that passes. OSError or ValueError where a group has no limit."""
    if (limit := folder / "cpu.max").exists():
        quota, period = limit.read_text(encoding="ascii").split()
    else:
        quota, period = (
            (folder / f"cpu.cfs_{name}_us").read_text(encoding="ascii").strip() for name in ("quota", "period")
        )
    if int(quota) <= 0 or int(period) <= 0:
        raise ValueError("-1 means none")
    return int(quota) / int(period)
