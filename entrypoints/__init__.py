"""One thin script per MLproject entry: read parameters, call aliprod, hand results to tracking.

What runs here, at import, has to be done before the libraries that a script imports look around.
"""

import importlib.util
import sys
from pathlib import Path


def _refuse_others() -> None:
    """Exits with a line where a user's own file of the same name is found before a package of this project."""
    root = Path(__file__).resolve().parents[1]
    for name in ("aliprod", "tracking"):
        spec = importlib.util.find_spec(name)
        place = spec.origin if spec and spec.origin else name
        if Path(place).resolve() != root / name / "__init__.py":
            print(
                f"the package {name!r} that Python finds is {place}, not this project's {root / name}: "
                "rename it, or start from another folder",
                file=sys.stderr,
            )
            sys.exit(2)


_refuse_others()

from aliprod import surroundings  # noqa: E402

surroundings.prepare()
