"""Command line of the benchmarks: runs those named, or all, and prints a Markdown table for each."""

import argparse
import inspect
from pathlib import Path

from aliprod import InputError
from benchmarks import (
    cleaning,
    enrolment,
    finetune,
    frozen,
    hierarchy,
    images,
    inference,
    manifest,
    metrics,
    rounds,
    serving,
    tuning,
    unknown,
)
from entrypoints.command import data_folder

BENCHMARKS = {
    "manifest": manifest.measure,
    "images": images.measure,
    "finetune": finetune.measure,
    "frozen": frozen.measure,
    "inference": inference.measure,
    "hierarchy": hierarchy.measure,
    "metrics": metrics.measure,
    "rounds": rounds.measure,
    "cleaning": cleaning.measure,
    "enrolment": enrolment.measure,
    "serving": serving.measure,
    "tuning": tuning.measure,
    "unknown": unknown.measure,
}


def main() -> None:
    """Parses the command line; a mistake in it ends in one line and exit status 2."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(BENCHMARKS)}; none: all")
    parser.add_argument("--data", default="demo", help="a folder laid out as AliProducts is; default: the demo's")
    parser.add_argument(
        "--limit", type=int, help="photographs, records or predictions used, at least 64; hierarchy and unknown use all"
    )
    options = parser.parse_args()
    if wrong := [name for name in options.names if name not in BENCHMARKS]:
        parser.exit(2, f"no benchmark {', '.join(wrong)}; there are {', '.join(BENCHMARKS)}\n")
    if options.limit is not None and options.limit < 64:
        parser.exit(2, f"--limit {options.limit}: must be at least 64, two batches\n")
    try:
        for name in options.names or BENCHMARKS:
            taken = inspect.signature(BENCHMARKS[name]).parameters
            arguments = {"data": data_folder(options.data, Path("work"))} if "data" in taken else {}
            if options.limit is not None and "limit" in taken:
                arguments["limit"] = options.limit
            for table in BENCHMARKS[name](**arguments):
                print(table, flush=True)
    except InputError as error:
        parser.exit(2, f"{error}\n")


if __name__ == "__main__":
    main()
