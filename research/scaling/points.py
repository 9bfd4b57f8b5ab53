"""What a law is fitted to: finished runs as (parameters, tokens, FLOPs, loss), read from any CSV.

What can't be fitted is left out by name (`Points.left_out`), never in silence and never as a number.
"""

import dataclasses
import math
import operator
import re
from typing import Callable, Mapping, Sequence

import numpy as np
from scipy import stats

from research.errors import InputError
from research.scaling.table import Row, check_commas, read_table, to_number

EXTRA = ("unique_tokens", "total_params", "bits", "state")  # what further laws regress on (research/scaling/extended.py)
FIELDS = ("params", "tokens", "flops", "loss", *EXTRA)
COUNTS = ("params", "tokens", "flops", "unique_tokens", "total_params", "state")  # 70B is a number of these
LADDERS_OWN = ("run", "diverged")  # columns of a ladder's CSV (research/scaling/ladder.py)
DIVERGED = "diverged, as its file says"
FLOPS_PER_WEIGHT_TOKEN = 6.0  # C = 6ND: 2 forward, 4 backward (Kaplan et al. 2020, section 2.1)
MOST_RUNS = 20_000
FEWEST = 8  # runs that say whether a column rises
_COMPARE = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge, "==": operator.eq, "!=": operator.ne}


@dataclasses.dataclass(frozen=True)
class Points:
    """P runs, float64: parameters, training tokens, training FLOPs, final loss (any unit; positive)."""

    params_P: np.ndarray
    tokens_P: np.ndarray
    flops_P: np.ndarray
    loss_P: np.ndarray
    names: tuple[str, ...]  # what a report calls each run, e.g. "line 17"
    extra: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)  # of EXTRA, each (P,)
    left_out: tuple[tuple[str, str], ...] = ()  # (run, why) of those that aren't here

    def __len__(self) -> int:
        return len(self.loss_P)

    def take(self, index: np.ndarray) -> "Points":
        """The runs at these indices, or where a mask is true."""
        index = np.arange(len(self))[index]
        return Points(self.params_P[index], self.tokens_P[index], self.flops_P[index], self.loss_P[index],
                      tuple(self.names[i] for i in index), {name: a_P[index] for name, a_P in self.extra.items()},
                      self.left_out)

    @property
    def flops_per_weight_token(self) -> float:
        """k of C = kND; 6 unless the runs have tokens and FLOPs of their own."""
        return float(np.median(self.flops_P / (self.params_P * self.tokens_P)))


def make(params: Sequence[float], loss: Sequence[float], tokens: Sequence[float] | None = None,
         flops: Sequence[float] | None = None, names: Sequence[str] | None = None,
         extra: Mapping[str, Sequence[float]] | None = None) -> Points:
    """Points from numbers; of tokens and FLOPs, the missing one follows from C = 6ND.

    Raises:
      InputError: neither tokens nor FLOPs, or a value that isn't positive and finite (names the first few).
    """
    columns = {"params": params, "loss": loss}
    columns |= {name: values for name, values in (("tokens", tokens), ("flops", flops)) if values is not None}
    if len(columns) == 2:
        raise InputError("points", "neither tokens nor FLOPs", "give one of the two")
    columns |= extra or {}
    arrays = {name: np.asarray(values, np.float64) for name, values in columns.items()}
    names = tuple(names) if names is not None else tuple(f"run {i}" for i in range(len(arrays["loss"])))
    for field, values_P in arrays.items():
        bad = np.flatnonzero(~(np.isfinite(values_P) & (values_P > 0)))
        if len(bad):
            shown = ", ".join(f"{names[i]} has {values_P[i]:g}" for i in bad[:3])
            raise InputError(field, f"{len(bad)} of {len(values_P)} runs aren't positive and finite: {shown}", "leave them out")
    if flops is None:
        arrays["flops"] = FLOPS_PER_WEIGHT_TOKEN * arrays["params"] * arrays["tokens"]
    if tokens is None:
        arrays["tokens"] = arrays["flops"] / (FLOPS_PER_WEIGHT_TOKEN * arrays["params"])
    return Points(arrays["params"], arrays["tokens"], arrays["flops"], arrays["loss"], names,
                  {name: arrays[name] for name in EXTRA if name in arrays})


def check_falls(points: Points) -> None:
    """Raises InputError where what should be a loss clearly rises with compute, with parameters and with tokens: an accuracy.

    By ranks (Spearman), so neither a diverged run nor the scale matters; with parameters at the same tokens, and the reverse.
    Runs that repeat their data don't count: they may overfit.
    """
    once = np.ones(len(points), bool)
    if "unique_tokens" in points.extra:
        once = points.tokens_P <= 1.5 * points.extra["unique_tokens"]
    runs = int(once.sum())
    if runs < FEWEST or np.ptp(points.loss_P[once]) == 0:
        return
    ranks_P = stats.rankdata(points.loss_P[once])
    logs_PxF = np.log(np.stack([points.flops_P, points.params_P, points.tokens_P], 1))[once]
    logs_PxF = (logs_PxF - logs_PxF.mean(0)) / np.maximum(logs_PxF.std(0), 1e-9)
    rise = float(np.corrcoef(stats.rankdata(np.round(logs_PxF[:, 0], 6)), ranks_P)[0, 1])  # NaN where all have the same FLOPs
    each_F = np.linalg.lstsq(logs_PxF[:, 1:], ranks_P - ranks_P.mean())[0]
    clearly = min(0.9, max(0.5, 3 / math.sqrt(runs - 1)))  # 3 standard deviations of chance
    if rise > clearly and (each_F > 0).all():
        raise InputError("loss", f"it rises with compute (rank correlation {rise:.2f} over {runs} runs), parameters and tokens",
                         "name a column that falls as runs grow: a loss, not an accuracy")


def rungs(points: Points) -> np.ndarray:
    """Which rung each run is of, (P,) from 0: runs of the same parameters and tokens (and extras) differ by their seed."""
    keys = [points.params_P, points.tokens_P, *(points.extra[name] for name in EXTRA if name in points.extra)]
    return np.unique(np.round(np.log(np.stack(keys, 1)), 6), axis=0, return_inverse=True)[1].reshape(-1)


def parse_columns(text: str) -> dict[str, str]:
    """`params=Model Size,flops=C,loss=L` -> {"params": "Model Size", ...}; a column's name may hold commas and `=`."""
    fields = "|".join(FIELDS)
    named = {}
    for part in re.split(rf",\s*(?=(?:{fields})\s*=)", text) if text else []:
        field, equals, column = (piece.strip() for piece in part.partition("="))
        if field not in FIELDS or not column:
            raise InputError("--columns", f"{part!r} is not FIELD=NAME", f"fields are {', '.join(FIELDS)}")
        if field in named:
            raise InputError("--columns", f"{field} is named twice", "name each field once")
        named[field] = column
    return named


def read_csv(path: str, columns: Mapping[str, str], exclude: Sequence[str] = ()) -> tuple[Points, dict[str, int]]:
    """Points of a CSV with a head line (`table.read_table`), and how many rows each condition of `exclude` left out.

    A row in which a value isn't positive and finite is left out, too, and named in `Points.left_out`; so is one that a ladder's
    file calls diverged. A ladder's runs have their names, others their line's.

    Args:
      columns: field of FIELDS -> the column's name; an empty one takes columns named like the fields. Where no column has a
        name, the one that has it in other capitals is taken.
      exclude: `COLUMN OP NUMBER`, a field or a column's own name, < <= > >= == !=; `==nan` is a value that isn't finite or is
        no number. A row counts for the first condition that it meets.

    Raises:
      InputError: a file that can't be read, a column that isn't there (lists those that are), a malformed condition, numbers
        that can be read in two ways, or a column of which most cells aren't positive numbers.
    """
    head, rows = read_table(path)
    places = _places(path, head, columns)
    conditions = {text: _condition(text, places, head) for text in exclude}
    check_commas(path, head, rows, places.values())
    run, diverged = (head.index(name) if set(LADDERS_OWN) <= set(head) else None for name in LADDERS_OWN)
    name = lambda number, row: f"line {number}" if run is None else row[run]
    excluded, kept, good, left_out = dict.fromkeys(conditions, 0), [], [], []
    for number, row in rows:
        reason = next((text for text, met in conditions.items() if met(row)), None)
        if diverged is not None and row[diverged].strip() == "1":
            left_out.append((name(number, row), DIVERGED))
        elif reason is None:
            kept.append((number, row))
        else:
            excluded[reason] += 1
    if len(kept) > MOST_RUNS:
        raise InputError("--csv", f"{path} has {len(kept)} rows", f"give one row a run, not every step; at most {MOST_RUNS}")
    if not kept:
        raise InputError("--csv", f"{path} leaves no rows to fit ({sum(excluded.values())} excluded)", "give one row a run")
    _check_readable(path, places, head, kept)
    for number, row in kept:
        wrong = [f"{field} is {repr(row[place]) if row[place].strip() else 'empty'}" for field, place in places.items()
                 if not _usable(field, row[place])]
        if wrong:
            left_out.append((name(number, row), ", ".join(wrong)))
        else:
            good.append((number, row))
    values = {field: [to_number(row[place], field in COUNTS) for _, row in good] for field, place in places.items()}
    found = make(values["params"], values["loss"], values["tokens"] if "tokens" in values else None,
                 values["flops"] if "flops" in values else None, [name(number, row) for number, row in good],
                 {field: values[field] for field in EXTRA if field in values})
    return dataclasses.replace(found, left_out=tuple(left_out)), excluded


def _named(head: Sequence[str], column: str) -> list[int]:
    """Where the columns of a name are, in other capitals if there is none in these."""
    exact = [i for i, name in enumerate(head) if name == column]
    return exact or [i for i, name in enumerate(head) if name.casefold() == column.casefold()]


def _places(path: str, head: Sequence[str], columns: Mapping[str, str]) -> dict[str, int]:
    """Field -> where its column is."""
    columns = dict(columns) or {field: field for field in FIELDS if _named(head, field)}
    places = {}
    for field, column in columns.items():
        found = _named(head, column)
        if not found:
            raise InputError("--columns", f"{field}: {path} has no column {column!r}", f"it has {', '.join(head)}")
        if len(found) > 1:
            raise InputError("--columns", f"{field}: {path} has {len(found)} columns {column!r}", "rename one")
        places[field] = found[0]
    for field in ("params", "loss"):
        if field not in places:
            raise InputError("--columns", f"no column for {field}", f"name one: {field}=NAME; {path} has {', '.join(head)}")
    if not {"tokens", "flops"} & set(places):
        raise InputError("--columns", "neither tokens nor flops has a column",
                         f"name one: tokens=NAME or flops=NAME; {path} has {', '.join(head)}")
    return places


def _usable(field: str, cell: str) -> bool:
    return 0 < to_number(cell, field in COUNTS) < math.inf


def _check_readable(path: str, places: Mapping[str, int], head: Sequence[str], rows: Sequence[Row]) -> None:
    """Raises InputError where most rows have no number in a column: it is another, or written in another way."""
    for field, place in places.items():
        bad = [(number, row[place]) for number, row in rows if not _usable(field, row[place])]
        if 2 * len(bad) > len(rows):
            raise InputError("--columns", f"{field}: {len(bad)} of {len(rows)} rows of {path} have no positive number in "
                             f"{head[place]!r}, e.g. {bad[0][1]!r} in line {bad[0][0]}",
                             f"name another column, write plain numbers, or leave them out: --exclude='{field}==nan'")


def _condition(text: str, places: Mapping[str, int], head: Sequence[str]) -> Callable[[Sequence[str]], bool]:
    """Does a row meet it?"""
    match = re.fullmatch(r"\s*(.+?)\s*(<=|>=|==|!=|<|>)\s*(\S+)\s*", text)
    name = match[1] if match else ""
    found = [places[name]] if name in places else _named(head, name)
    count = any(field in COUNTS for field, place in places.items() if [place] == found)
    limit = to_number(match[3], count) if match else math.nan
    if not match or (math.isnan(limit) and (match[3].lower() != "nan" or match[2] not in ("==", "!="))):
        raise InputError("--exclude", f"{text!r} is not COLUMN OP NUMBER", "e.g. --exclude='loss>4.5'; < <= > >= == !=")
    if len(found) != 1:
        raise InputError("--exclude", f"{len(found) or 'no'} column{'s' * (len(found) > 1)} {name!r}",
                         f"the file has {', '.join(head)}")
    return lambda row: _met(to_number(row[found[0]], count), match[2], limit)


def _met(value: float, op: str, limit: float) -> bool:
    if math.isnan(limit):
        return math.isfinite(value) == (op == "!=")
    return not math.isnan(value) and bool(_COMPARE[op](value, limit))


def budgets(points: Points, gap: float = 0.1, width: float = 0.25) -> list[np.ndarray]:
    """Indices of the runs of each budget, smallest first.

    Runs sorted by FLOPs are cut where one step is above `gap` (in log FLOPs). What is still wider than `width` gives up its
    densest window of that width, again and again: runs between two budgets don't cut a budget in the middle.
    """
    order_P = np.argsort(points.flops_P, kind="stable")
    log_flops_P = np.log(points.flops_P[order_P])
    found, waiting = [], np.split(np.arange(len(points)), np.flatnonzero(np.diff(log_flops_P) > gap) + 1)
    while waiting:
        chain = waiting.pop()
        x = log_flops_P[chain]
        if len(chain) and x[-1] - x[0] > width:
            end = np.searchsorted(x, x + width, side="right")
            begin = int((end - np.arange(len(x))).argmax())
            waiting += [chain[:begin], chain[end[begin]:]]
            chain = chain[begin:end[begin]]
        if len(chain):
            found.append(order_P[chain])
    return sorted(found, key=lambda index: points.flops_P[index].min())
