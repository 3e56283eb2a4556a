"""Text files as people's programs write them: UTF-8, with or without the mark at its beginning, and marked UTF-16."""

import codecs
import json
import re
from collections.abc import Callable, Container
from pathlib import Path
from typing import Any

from aliprod import InputError

MARKS = {  # the longer first: that of UTF-32 begins with that of UTF-16
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF8: "UTF-8",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def utf8(path: str | Path) -> bytes:
    """The bytes of a text file in UTF-8, without a mark; whether they are valid is for their reader to see.

    InputError where the file is in UTF-16 without a mark, or not in what its mark says.
    """
    data = Path(path).read_bytes()
    encoding = next((name for mark, name in MARKS.items() if data.startswith(mark)), "")

    if encoding == "UTF-8":
        return data.removeprefix(codecs.BOM_UTF8)
    if encoding:
        try:
            return data.decode(encoding).encode()
        except UnicodeError:
            raise InputError(f"{path}: begins as {encoding} does and goes on otherwise; save it as UTF-8") from None
    if 0 in data[:4]:
        raise InputError(f"{path}: looks like UTF-16 without a byte order mark; save it as UTF-8")
    return data


def read(path: str | Path) -> str:
    """The text of a file. InputError as of `utf8`, or naming the line that is not in UTF-8."""
    data = utf8(path)
    refuse_other_encodings(path, data)
    return data.decode()


def read_json(path: str | Path) -> Any:
    """What a JSON file holds. InputError: not JSON, a key twice in one object, or half a character, which no other file
    could hold. RecursionError where it is nested too deeply."""
    text = read(path)
    value = _json(path, text, _object)
    if re.search(r"\\u[dD][89a-fA-F]", text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            shown = error.object[max(0, error.start - 30) : error.end + 30]
            raise InputError(f"{path}: {shown!r} holds half a character (a lone surrogate)") from None
    return value


def refuse_twice(path: str | Path, data: bytes, keys: Container[str]) -> None:
    """InputError if one of `keys` stands twice in an object of this JSON."""
    _json(path, data.decode(), lambda pairs: _refuse_twice([pair for pair in pairs if pair[0] in keys]))


def _json(path: str | Path, text: str, of_pairs: Callable[[list[tuple[str, Any]]], Any]) -> Any:
    try:
        return json.loads(text, object_pairs_hook=of_pairs)
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: not JSON: {error}") from None
    except _Refusal as error:
        raise InputError(f"{path}: {error}") from None


def refuse_other_encodings(path: str | Path, data: bytes) -> None:
    """InputError naming line and byte where these bytes of a file are not UTF-8."""
    try:
        data.decode()
    except UnicodeDecodeError as error:
        line = line_of(data, error.start)
        raise InputError(f"{path}: line {line}: byte {data[error.start]:#x} is not UTF-8; save it as UTF-8") from None


def line_of(data: bytes, place: int) -> int:
    """The number, from 1, of the line in which a byte stands."""
    return len((data[:place] + b".").splitlines())


class _Refusal(Exception):
    pass


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    _refuse_twice(pairs)
    return dict(pairs)


def _refuse_twice(pairs: list[tuple[str, Any]]) -> None:
    if len(dict(pairs)) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        shown = ", ".join(f"{key!r}: {value!r}" for key, value in pairs)[:200]
        raise _Refusal(f"{twice!r} stands more than once in one object: {shown}")
