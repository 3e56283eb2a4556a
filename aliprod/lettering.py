"""Names in figures: whatever script they are in, some font draws them, and what no font has is spelt out.

matplotlib's own font knows neither Chinese nor Thai. Noto Sans SC comes with this project, for Chinese and Japanese;
any other script is looked for among the fonts of the machine.
"""

import functools
import importlib.util
import unicodedata
from pathlib import Path

from matplotlib import figure, font_manager, rcParams
from matplotlib.backend_bases import RendererBase
from matplotlib.font_manager import FontProperties
from matplotlib.text import Text

LETTERLESS = ("Cc", "Cn", "Cs", "Zl", "Zp")  # categories of characters that are none: control codes, broken halves


class Figure(figure.Figure):
    """A figure whose texts are drawn in fonts that have their characters."""

    def draw(self, renderer: RendererBase) -> None:
        """Draws it, as matplotlib does."""
        texts = [text for text in self.findobj(Text) if isinstance(text, Text)]
        holders = {_holder(character) for text in texts for character in text.get_text()}
        families = [family for family in _families() if family in holders or family in rcParams["font.family"]]
        for text in texts:
            text.set_fontfamily(families)

        super().draw(renderer)


def caption(name: str, most: int = 1000, instead: str = "") -> str:
    """A name as one line of at most `most` characters, for a figure; what no font has becomes its escape, \\u0e41.

    Where escapes make it longer than that, or nothing is left of it, `instead` is taken, the class's id.
    """
    line = " ".join(name.split())
    short = line if len(line) <= most else line[: most - 1] + "…"

    parts, family = [], ""
    for character in short:
        if not unicodedata.category(character).startswith("M"):
            family = _holder(character)
        drawn = ord(character) in _characters(family)  # an accent by the same font as the letter below it
        parts.append(character if drawn else character.encode("unicode_escape").decode())
    line = "".join(parts)
    return caption(instead) if instead and not 0 < len(line) <= most else line


@functools.cache
def _holder(character: str) -> str:
    """The first family of fonts that has a character, the usual one before all others; "" where none has."""
    if unicodedata.category(character) in LETTERLESS:
        return ""
    return next((family for family in _families() if ord(character) in _characters(family)), "")


@functools.cache
def _families() -> tuple[str, ...]:
    """All families to look in: what matplotlib is set to, the one that comes with this project, the machine's own."""
    package = importlib.util.find_spec("zhplot")  # not imported: it would change matplotlib's settings
    for folder in (package.submodule_search_locations or ()) if package else ():
        for font in Path(folder).glob("fonts/*.ttf"):
            font_manager.fontManager.addfont(font)

    installed = [
        font.name
        for font in font_manager.fontManager.ttflist
        if font.weight == 400 and font.style == "normal" and not font.name.startswith("Last Resort")  # boxes for all
    ]
    return tuple(dict.fromkeys([*rcParams["font.family"], "Noto Sans SC", *sorted(installed)]))


@functools.cache
def _characters(family: str) -> frozenset[int]:
    """Code points that a family has; none where it is not installed."""
    if not family:
        return frozenset()
    try:
        path = font_manager.findfont(FontProperties(family=[family]), fallback_to_default=False)
        return frozenset(font_manager.get_font(path).get_charmap())
    except (ValueError, OSError, RuntimeError):  # not there, or no font that can be read
        return frozenset()
