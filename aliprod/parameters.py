"""What people type as one text and mean as several: words as in a shell, and fields with values as in TOML."""

import contextlib
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

from aliprod import InputError

HINT = "what holds spaces, quotation marks or brackets must be in quotes, as in a shell"
# Something in quotes or after a backslash, a bracket, an equals sign, spaces, or other characters: all but a quotation
# mark that is never closed and a backslash at the end.
PIECE = re.compile(r""""(?:\\.|[^"\\])*"|'[^']*'|\\.|[\[{]|[\]}]|\s*=\s*|\s+|[^\s"'\[\]{}=\\]+""", re.DOTALL)


def words(name: str, text: str) -> list[str]:
    """The words of the parameter `name`, separated by spaces, quoted as in a shell. InputError if a quote is open."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise InputError(f"{name} {text!r}: {error}; {HINT}") from None


def paths(name: str, text: str) -> list[str]:
    """As `words`, at least one; but what is the name of a file or folder as a whole needs no quotes."""
    with contextlib.suppress(OSError):  # too long for one name: it may be many
        if Path(text).exists():
            return [text]
    return words(name, text) or [text]


def fields(name: str, text: str) -> dict[str, Any]:
    """The fields in the parameter `name`, written as "lr=3e-4 samples_per_class=[2, 5] select_list='a b.csv'".

    Values are TOML's, with spaces in quotes and brackets, or plain words; of a field given twice the last counts.
    InputError says what is ambiguous.
    """
    values: dict[str, Any] = {}
    for item in _items(name, text):
        whole = item[0] in "\"'"  # "select_list=a b.csv" rather than select_list="a b.csv"
        field, equals, value = (_unquoted(name, item) if whole else item).partition("=")
        if not equals or not re.fullmatch(r"[\w.-]+", field):
            raise InputError(f"{name}: {item!r} is not of the form field=value; {HINT}")

        plain = value if whole or not value else _unquoted(name, value)
        values[field] = _toml(value, plain)
    return values


def _items(name: str, text: str) -> list[str]:
    """The text cut at spaces outside quotes and brackets, other than those around a field's equals sign."""
    items, item, depth, end, spaced = [], "", 0, 0, False
    for piece in PIECE.finditer(text := text.strip()):
        if piece.start() > end:
            break
        word, end = piece[0], piece.end()
        depth += (word in "[{") - (word in "]}")

        if depth == 0 and (word.isspace() or ("=" in item and word[0].isspace())):
            items.append(item)
            item, spaced = word.strip(), False
        elif depth == 0 and word.strip() == "=":
            if "=" in item and (spaced or word != "="):  # lr= epochs=2
                raise InputError(f"{name}: {item + word!r} could be one field or two; {HINT}")
            item, spaced = item + "=", word != "="
        else:
            item += word
    if end < len(text) or depth:
        raise InputError(f"{name} {text!r}: a quotation mark or a bracket is not closed; {HINT}")
    return [item for item in [*items, item] if item]


def _toml(text: str, plain: str) -> Any:
    """The value that TOML sees in a text, or else `plain`."""
    if "#" in text and text[0] not in "\"'[{":
        return plain  # TOML would take the rest for a comment
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return plain


def _unquoted(name: str, text: str) -> str:
    """A word as a shell understands it; what begins with a bracket stays as it is, for TOML or its field to refuse."""
    if text[0] in "[{":
        return text
    found = words(name, text)
    if len(found) != 1:
        raise InputError(f"{name}: {text!r} could be one word or several; {HINT}")
    return found[0]
