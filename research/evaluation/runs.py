"""Run directories side by side: what differs in their configs, and what the difference of their losses is worth."""

import dataclasses
import json
import math
import os
from typing import Any, Iterable, Mapping, Sequence

import numpy as np
from etils import epath

from research.config import flatten
from research.data.mixture import Skips, sample_at, with_skip
from research.errors import InputError
from research.evaluation import statistics
from research.schema import CONFIG_FILE, EVALUATION_PREFIX, LEDGER_PREFIX, METRICS_PREFIX, RESULT_FILE, Config, evaluation_file
from research.training.workdir import read_config, read_rows

AXES = ("steps", "tokens", "flops", "seconds")
MOST_RUNS = 50
LEAST_STEPS = 8  # that an interval over steps needs
SHARED = ("seed", "model.vocab_size", "train.batch_size", "data.")  # what decides which token is seen at which step
NOT_SHARED = ("data.cache_dir", "data.validation")


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run directory tells.

    Attributes:
      rows: training rows with a finite loss, by step.
      evaluations: set -> its last evaluation row.
      documents: set (as its file is called) -> document -> (tokens, nll) of the last evaluation.
      asked: set (as its file is called) -> sha256 of what that evaluation asked; none in runs from before it was kept.
      skips: samples of the order that the guard left out.
    """

    path: str
    label: str
    config: Config
    corpus: str
    rows: dict[int, dict[str, Any]]
    evaluations: dict[str, dict[str, Any]]
    documents: dict[str, dict[int, tuple[int, float]]]
    asked: dict[str, str]
    skips: Skips
    result: dict[str, Any] | None

    def curves(self) -> dict[str, np.ndarray]:
        """The training loss and what it can be read against; seconds are of training alone."""
        rows = [self.rows[step] for step in sorted(self.rows)]
        tokens = np.array([row["tokens"] for row in rows], np.float64)
        speed = np.array([row["tokens_per_second"] for row in rows], np.float64)
        return {"steps": np.array(sorted(self.rows), np.float64), "tokens": tokens,
                "flops": np.array([row["flops"] for row in rows], np.float64),
                "seconds": np.cumsum(np.diff(tokens, prepend=0.0) / np.maximum(speed, 1e-9)),
                "loss": np.array([row["loss"] for row in rows], np.float64)}


@dataclasses.dataclass(frozen=True)
class Difference:
    """ours - base, in nats per token. `what`: "training" or a set's name; `estimate` is None where `note` says why not."""

    run: str
    base: str
    what: str
    estimate: statistics.Estimate | None
    note: str = ""


def expand(paths: Sequence[str]) -> list[str]:
    """Run directories as they are, sweeps' directories as their cells; each once, in order.

    Raises:
      InputError: one is neither, or there are fewer than two runs in all.
    """
    found: dict[str, str] = {}
    for given in paths:
        path = epath.Path(given).expanduser()
        cells = []
        if path.is_dir() and not (path / CONFIG_FILE).exists():
            cells = sorted(os.fspath(p) for p in path.iterdir() if p.name.startswith("cell-") and (p / CONFIG_FILE).exists())
        if not cells and not (path / CONFIG_FILE).exists():
            raise InputError("RUN", f"{given} is not a run directory, it has no {CONFIG_FILE}",
                             "name directories that experiments.train or experiments.sweep has written")
        for run in cells or [os.fspath(path)]:
            found[run if "://" in run else os.path.realpath(run)] = run
    if len(found) < 2:
        raise InputError("RUN", f"{len(found)} run{'s' * (len(found) != 1)} to compare", "name at least two run directories")
    if len(found) > MOST_RUNS:
        raise InputError("RUN", f"{len(found)} runs are too many for one table", f"name at most {MOST_RUNS}")
    return list(found.values())


def labels(paths: Sequence[str]) -> list[str]:
    """The shortest ends of the paths that tell them apart."""
    parts = [path.rstrip("/").split("/") for path in paths]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-count:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return list(paths)


def load(path: str, label: str) -> Run:
    """Raises:
      InputError: the config is of another schema, or no training step was logged.
    """
    where = epath.Path(path)
    config = read_config(where)
    rows, evaluations = {}, {}
    for row in read_rows(where, METRICS_PREFIX):
        if "set" in row:
            evaluations[row["set"]] = row
        elif isinstance(row["loss"] if "loss" in row else None, (int, float)):
            rows[row["step"]] = row
    if not rows:
        raise InputError("RUN", f"{path} has logged no training step", "let it run until train.log_every steps are done")
    documents = {}
    for file in sorted(where.iterdir(), key=lambda p: p.name):
        if file.name.startswith(EVALUATION_PREFIX) and file.name.endswith(".jsonl"):
            lines = [json.loads(line) for line in file.read_text().splitlines()]
            documents[set_of(file.name)] = {line["document"]: (line["tokens"], float(line["nll"])) for line in lines}
    result = json.loads((where / RESULT_FILE).read_text()) if (where / RESULT_FILE).exists() else None
    hashes = result["validation_sha256"] if result and "validation_sha256" in result else {}
    asked = {set_of(evaluation_file(name)): found for name, found in hashes.items()}
    corpus = json.loads((where / CONFIG_FILE).read_text())["corpus_sha256"]
    return Run(path, label, config, corpus, rows, evaluations, documents, asked, skips_of(where, config), result)


def set_of(file: str) -> str:
    """What a set is called in its file's name: evaluation-heldout.average.jsonl -> heldout.average."""
    return file[len(EVALUATION_PREFIX):-len(".jsonl")]


def skips_of(where: epath.Path, config: Config) -> Skips:
    """The samples that the guard left out, as the ledger tells; before a branch as its trunk's does, if that is still there."""
    skips: Skips = ()
    trunk, _, step = (config.train.branch_from or "").rpartition("@")
    if trunk and (epath.Path(trunk) / CONFIG_FILE).exists():
        skips = skips_of(epath.Path(trunk), read_config(trunk))
        place = int(step) * config.train.batch_size
        skips = tuple(skip for i, skip in enumerate(skips) if skip[0] < sample_at(place, skips[:i]))
    for row in read_rows(where, LEDGER_PREFIX):
        if row["event"] == "skipped":
            skips = with_skip(skips, *row["samples"])
    return skips


def config_difference(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """Field -> its value in each run (None where it has no such field), of the fields that aren't the same in all."""
    flat = [flatten(run.config) for run in runs]
    paths = list(dict.fromkeys(path for fields in flat for path in fields))
    values = {path: [fields[path] if path in fields else None for fields in flat] for path in paths}
    return {path: found for path, found in values.items() if any(value != found[0] for value in found)}


def shares_data_order(ours: Run, base: Run, steps: Iterable[int] | None = None) -> bool:
    """Did both see the same tokens at `steps` (default: each one that both have done)?"""
    changed = config_difference([ours, base])
    if ours.corpus != base.corpus or any(path.startswith(SHARED) and not path.startswith(NOT_SHARED) for path in changed):
        return False
    steps = range(1, min(max(ours.rows), max(base.rows)) + 1) if steps is None else steps
    size = ours.config.train.batch_size  # batches are left out whole
    return ours.skips == base.skips or all(
        sample_at((step - 1) * size, ours.skips) == sample_at((step - 1) * size, base.skips) for step in steps)


def shares_documents(ours: Run, base: Run, name: str) -> bool:
    """Was the same asked of both in the set `name`? Where one doesn't tell: were they trained on the same corpus?"""
    if name in ours.asked and name in base.asked:
        return ours.asked[name] == base.asked[name]
    return ours.corpus == base.corpus


def difference_over_steps(ours: Run, base: Run, tail: float, confidence: float) -> Difference:
    """Of the training losses over the last share `tail` of the steps that both have logged, at least 8 of them.

    Raises:
      InputError: they have no step in common.
    """
    common = sorted(set(ours.rows) & set(base.rows))
    if not common:
        raise InputError("RUN", f"{ours.label} and {base.label} have no logged step in common",
                         "compare runs of the same train.log_every")
    steps = common[-max(LEAST_STEPS, math.ceil(tail * len(common))):]
    if len(steps) < LEAST_STEPS:
        return Difference(ours.label, base.label, "training", None, f"{len(steps)} common steps, {LEAST_STEPS} are needed")
    estimate = statistics.paired_steps([ours.rows[step]["loss"] for step in steps],
                                       [base.rows[step]["loss"] for step in steps], confidence)
    note = f"steps {steps[0]}-{steps[-1]}" + ("" if shares_data_order(ours, base, steps) else ", not the same data order")
    return Difference(ours.label, base.label, "training", estimate, note)


def differences_over_documents(ours: Run, base: Run, confidence: float) -> list[Difference]:
    """A row a set that both have evaluated at their end, paired by document."""
    found = []
    for name in [name for name in base.documents if name in ours.documents]:
        mine, theirs = ours.documents[name], base.documents[name]
        common = sorted(set(mine) & set(theirs))
        estimate, note = None, f"{len(common)} documents"
        if not shares_documents(ours, base, name) or any(mine[d][0] != theirs[d][0] for d in common):
            note = "other documents or tokens; compare bits per byte"
        elif len(common) < 2:
            note = f"{len(common)} documents in common, 2 are needed"
        elif not all(math.isfinite(mine[d][1]) and math.isfinite(theirs[d][1]) for d in common):
            note = "a loss is not finite"
        else:
            tokens = np.array([mine[d][0] for d in common])
            estimate = statistics.paired_documents(np.array([mine[d][1] for d in common]),
                                                   np.array([theirs[d][1] for d in common]), tokens, confidence)
        found.append(Difference(ours.label, base.label, name, estimate, note))
    return found


def differences(runs: Sequence[Run], tail: float, confidence: float) -> list[Difference]:
    """Every other run against the first."""
    found = []
    for run in runs[1:]:
        found += [difference_over_steps(run, runs[0], tail, confidence), *differences_over_documents(run, runs[0], confidence)]
    return found


def adjusted(rows: Sequence[Difference]) -> list[float | None]:
    """Holm's p value of each row, over the runs that were compared in the same thing."""
    out: list[float | None] = [None] * len(rows)
    for what in dict.fromkeys(row.what for row in rows):
        index = [i for i, row in enumerate(rows) if row.what == what and row.estimate]
        for i, p in zip(index, statistics.holm([rows[i].estimate.p for i in index])):
            out[i] = float(p)
    return out


def at_equal_budget(curves: Sequence[Mapping[str, np.ndarray]]) -> dict[str, dict[str, Any]]:
    """Axis -> the most of it that every run has spent, and each run's loss there (mean of the last tenth before it)."""
    out = {}
    for axis in AXES:
        budget = min(curve[axis][-1] for curve in curves)
        losses: list[float | None] = []
        for curve in curves:
            before = curve[axis] <= budget * (1 + 1e-9)
            near = before & (curve[axis] > 0.9 * budget)
            near = near if near.any() else before & (np.arange(len(before)) == before.sum() - 1)
            losses.append(float(curve["loss"][near].mean()) if near.any() else None)
        out[axis] = {"at": float(budget), "losses": losses}
    return out
