"""A CSV as people have them: commas, semicolons or tabs between cells, comments, counts such as 1,000,000 or 70B.

What can be read in two ways is refused: 1,234 is a thousand and more here, and little more than one elsewhere.
"""

import csv
import io
import itertools
import math
import re
from typing import Iterable, Iterator, Sequence

from research.errors import InputError

Row = tuple[int, list[str]]  # number of its last line, cells

_DELIMITERS = ",;\t"
_GROUPED = re.compile(r"[+-]?[1-9]\d{0,2}([,'\s])\d{3}(\1\d{3})*(\.\d*)?")  # 1,000,000 or 1 000 000.5
_ONE_COMMA = re.compile(r"[+-]?\d*,\d+([eE][+-]?\d+)?")
_POINT = re.compile(r"\.(?!\d{3}$)\d")  # for sure a decimal one; 1.000 may be a thousand
_SCALES = {"k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12, "thousand": 1e3, "million": 1e6, "billion": 1e9, "trillion": 1e12}
_SCALED = re.compile(rf"(.*\d\.?)\s*({'|'.join(_SCALES)})", re.IGNORECASE)


def read_table(path: str) -> tuple[list[str], list[Row]]:
    """The head's names and every row that is neither blank nor a comment: a line that begins with # and isn't as long as the
    head. The delimiter is the one by which most rows are as long as the head.

    Raises:
      InputError: a file that can't be read, or a row that isn't as long as the head.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            text = file.read()
        text = re.sub(r"\Asep=.\r?\n", "\n", text, flags=re.IGNORECASE)  # Excel's own first line
        delimiter = max(_DELIMITERS, key=lambda found: _fit(itertools.islice(_rows(text, found), 200)))
        head, rows = _split(list(_rows(text, delimiter)))
    except UnicodeDecodeError as error:
        raise InputError("--csv", f"{path} can't be read as UTF-8 ({error.reason}, byte {error.start})", "save it so") from None
    except (OSError, csv.Error) as error:
        raise InputError("--csv", f"{path} can't be read ({error})", "give a CSV file with a head line") from None
    for number, row in rows:
        if len(row) != len(head):
            raise InputError("--csv", f"line {number} of {path} has {len(row)} cells, the head {len(head)}",
                             "correct it; a cell that holds the delimiter needs quotes")
    return head, rows


def _rows(text: str, delimiter: str) -> Iterator[Row]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True)
    return ((reader.line_num, row) for row in reader if any(cell.strip() for cell in row))


def _fit(rows: Iterable[Row]) -> tuple[float, int]:
    """How well a delimiter fits: the share of the rows that are as long as the head, then the head's length."""
    head, rows = _split(list(rows))
    if len(head) < 2:
        return 0.0, len(head)
    return sum(len(row) == len(head) for _, row in rows) / max(len(rows), 1), len(head)


def _split(rows: Sequence[Row]) -> tuple[list[str], list[Row]]:
    """(head, rows below it). A head may begin with #, as NumPy writes it: where what follows begins with numbers."""
    comment = lambda row: row[0].lstrip().startswith("#")
    top = next((i for i, (_, row) in enumerate(rows) if not comment(row)), 0)
    if top and any(math.isfinite(to_number(cell)) for cell in rows[top][1]):
        top -= 1
    if not rows:
        return [], []
    head = [name.strip() for name in rows[top][1]]
    head[0] = head[0].lstrip("# ") or head[0]
    below = [(number, row[:len(head)] if not any(cell.strip() for cell in row[len(head):]) else row)
             for number, row in rows[top + 1:]]
    return head, [(number, row) for number, row in below if len(row) == len(head) or not comment(row)]


def to_number(cell: str, count: bool = False) -> float:
    """What a cell holds; NaN where that's no number. A `count` may have a scale: 70B, 1.4 trillion."""
    scaled = _SCALED.fullmatch(cell.strip()) if count else None
    cell, scale = (scaled[1], _SCALES[scaled[2].lower()]) if scaled else (cell.strip(), 1.0)
    if _GROUPED.fullmatch(cell):
        cell = re.sub(r"[,'\s]", "", cell)
    try:
        return scale * float(cell)
    except ValueError:
        return math.nan


def check_commas(path: str, head: Sequence[str], rows: Sequence[Row], places: Iterable[int]) -> None:
    """Raises InputError where the columns at `places` have numbers whose commas aren't surely thousands separators."""
    unclear, point = None, False
    for place in places:
        for number, row in rows:
            scaled = _SCALED.fullmatch(row[place].strip())
            cell = scaled[1].rstrip() if scaled else row[place].strip()
            where = f"{path}: {row[place].strip()!r} in {head[place]!r}, line {number},"
            grouped, one = _GROUPED.fullmatch(cell), _ONE_COMMA.fullmatch(cell)
            if one and not grouped:
                raise InputError("--csv", f"{where} has a decimal comma", "write decimal points, 2.5 for 2,5")
            if one:
                unclear = unclear or where
            point = point or bool(grouped and not one) or bool(_POINT.search(cell) and math.isfinite(to_number(cell)))
    if unclear and not point:
        raise InputError("--csv", f"{unclear} may be thousands or have a decimal comma", "write 1234 or 1.234 for 1,234")
