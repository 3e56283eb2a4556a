"""Tables as CSV: one reader and one writer, so that whatever text stands in a table comes back as it was."""

import io
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from aliprod import InputError, textfile
from aliprod.atomic import replacing

BLOCK = 1 << 24  # bytes parsed at a time; no row may be longer
# A field in quotes: its closing mark, if there is one, and what follows but is not the end of the field.
QUOTED = re.compile(rb'"(?<![^,\r\n]")(?:[^"]+|"")*+("?)(?=([^,\r\n]?))')


def read(
    path: str | Path, needed: Sequence[str], perhaps: Sequence[str] = (), *, by_hand: bool = False
) -> pd.DataFrame:
    """Columns of a CSV file as text, exactly as it stands there; those of `perhaps` that are not there are "".

    InputError names the file, the line or record and what is wrong: another encoding, quotation marks that do not
    match, rows of different lengths, a column that is missing or there twice; and in a table made `by_hand`, a text
    that holds what looks like another row, as a forgotten quotation mark would make it.
    """
    columns = [*needed, *perhaps]
    data = textfile.utf8(path)
    _refuse_quotes(path, data)
    try:
        parsed = _parse(data, columns)
        names = parsed.column_names
    except (pa.ArrowInvalid, UnicodeDecodeError) as error:
        textfile.refuse_other_encodings(path, data)
        raise InputError(f"{path}: not a CSV table: {_with_row(data, columns) or error}") from None

    if missing := [column for column in needed if column not in names]:
        raise InputError(f"{path}: no column {', '.join(missing)}; found {', '.join(names)}")
    if twice := [column for column in columns if names.count(column) > 1]:
        raise InputError(f"{path}: column {twice[0]} is there twice")

    table = parsed.select([column for column in columns if column in names]).to_pandas()
    breaks = data.count(b"\n") + data.count(b"\r") - data.count(b"\r\n")
    if by_hand and breaks > len(table) + 1:  # there may be some within texts
        _refuse_swallowed(path, table, len(names))
    return table.reindex(columns=columns, fill_value="").astype("str")


def write(table: pd.DataFrame, path: str | Path) -> None:
    """Writes a table as CSV, beside the target first, so that no half-written file is ever seen.

    Its texts are read back and compared before the file takes its place. InputError if one differs.
    """
    ours = _arrow(table)
    with replacing(Path(path)) as beside:
        beside.write_bytes(_written(ours))
        _compare(ours, beside.read_bytes(), path)


def to_bytes(table: pd.DataFrame) -> bytes:
    """A table as `write` writes it."""
    return _written(_arrow(table))


def _arrow(table: pd.DataFrame) -> pa.Table:
    return pa.Table.from_pandas(table, preserve_index=False)


def _written(table: pa.Table) -> bytes:
    buffer = io.BytesIO()
    pa.csv.write_csv(table, buffer, pa.csv.WriteOptions(quoting_style="needed"))
    return buffer.getvalue()


def _compare(table: pa.Table, data: bytes, path: str | Path) -> None:
    names = [field.name for field in table.schema if field.type in (pa.string(), pa.large_string())]
    try:
        again = _parse(data, names) if names else table
    except pa.ArrowInvalid as error:
        raise InputError(f"{path}: it would not come back from a CSV file: {error}") from None

    for name in names:
        ours, theirs = (column.cast(pa.large_string()) for column in (table[name], again[name]))
        if not theirs.equals(pc.fill_null(ours, "")):
            raise InputError(f"{path}: column {name} would not come back from a CSV file as it is")


def _parse(data: bytes, columns: Iterable[str], threads: bool = True) -> pa.Table:
    return pa.csv.read_csv(
        pa.BufferReader(data),
        pa.csv.ReadOptions(use_threads=threads, block_size=BLOCK),
        pa.csv.ParseOptions(newlines_in_values=True),
        pa.csv.ConvertOptions(column_types=dict.fromkeys(columns, pa.string())),
    )


def _with_row(data: bytes, columns: Iterable[str]) -> str:
    """What the parser finds wrong, with the row's number, which it knows where it reads in order."""
    try:
        _parse(data, columns, threads=False)
    except (pa.ArrowInvalid, UnicodeDecodeError) as error:
        return str(error)
    return ""


def _refuse_quotes(path: str | Path, data: bytes) -> None:
    """The parser takes a mark that is never closed to the end of the file, and drops one that is closed too early."""
    place = -1 if _well_quoted(data) else data.find(b'"')
    while place >= 0:
        field = QUOTED.match(data, place)
        if field and not field[1]:
            raise _misquoted(path, data, place, place, "the quotation mark that opens here is never closed")
        if field and field[2]:
            why = "text follows a closing quotation mark; one that belongs to the text is written twice"
            raise _misquoted(path, data, place, field.end(), why)
        place = data.find(b'"', field.end() if field else place + 1)


def _well_quoted(data: bytes) -> bool:
    """Whether marks open and close in turn, each at an end of a field or beside the other half of a doubled one.

    It is quick and true of what `write` writes; a mark within a field that is not in quotes makes it false as well.
    """
    text = np.frombuffer(b"\n" + data + b"\n", dtype=np.uint8)
    marks = np.flatnonzero(text == ord('"'))
    beside = np.isin(np.arange(256), list(b'",\r\n'))  # what may stand before an opening mark and after a closing one
    return len(marks) % 2 == 0 and bool(beside[text[marks[::2] - 1]].all() and beside[text[marks[1::2] + 1]].all())


def _misquoted(path: str | Path, data: bytes, start: int, place: int, why: str) -> InputError:
    shown = data[start : start + 60].decode(errors="replace")
    return InputError(f"{path}: line {textfile.line_of(data, place)}: {why}: {shown!r}")


def _refuse_swallowed(path: str | Path, table: pd.DataFrame, width: int) -> None:
    for name, column in table.items():
        for record, text in column[column.str.contains(r"[\r\n]", regex=True)].items():
            if width > 1 and any(line.count(",") >= width - 1 for line in text.splitlines()[1:]):
                why = "it holds what looks like another row; is its quotation mark closed where it should be?"
                raise InputError(f"{path}: record {record}: {name} {text[:80]!r}: {why}")
