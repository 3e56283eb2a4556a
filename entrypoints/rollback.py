"""Takes the last promotion back."""

from pathlib import Path
from typing import Literal

from entrypoints.command import command
from tracking import registry, runs

MODELS = {
    "": (),
    "extractor": (registry.EXTRACTOR,),
    "classifier": (registry.CLASSIFIER,),
    "both": registry.NAMES,
}


def main(model: Literal["", "extractor", "classifier", "both"], work: Path) -> None:
    """model: extractor, classifier or both, else what the last promotion made champion; work: for what waits to be
    sent."""
    with runs.start("rollback", work) as run:
        steps = registry.rollback(MODELS[model], work)
        for left, back in steps:
            run.tags({f"{left.name}.from": left.version, f"{left.name}.to": back.version})
    for left, back in steps:
        print(f"{left.name}: {registry.CHAMPION} is version {back.version} again, not {left.version}")


if __name__ == "__main__":
    command(main)
