"""Takes the last promotion back."""

from pathlib import Path

from entrypoints.command import command
from tracking import registry, runs


def main(work: Path) -> None:
    """work: for what waits to be sent."""
    with runs.start("rollback", work) as run:
        left, back = registry.rollback(work)
        run.tags({"from": left.version, "to": back.version})
    print(f"{registry.EXTRACTOR}, {registry.CLASSIFIER}: champion is version {back.version} again, not {left.version}")


if __name__ == "__main__":
    command(main)
