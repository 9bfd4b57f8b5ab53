"""What a sweep says: its cells grouped by seed, each group against the first, as tables and a picture (docs/statistics.md)."""

import dataclasses
import json
import math
import os
from typing import Any, Iterable, Mapping, Sequence

import numpy as np
from etils import epath

from experiments.cells import cost_in_words, total_cost
from research.errors import InputError
from research.evaluation import runs
from research.evaluation.comparison import difference_json
from research.evaluation.runs import Difference, Run
from research.evaluation.statistics import Estimate, minimum_detectable_effect, over_seeds, pairs_needed
from research.training.workdir import write_text

RESULTS_FILE = "results.jsonl"
FIGURES = ("final_eval_loss", "final_eval_loss_se", "bits_per_byte")
CONFIDENCE = 0.95
Cell = dict[str, Any]  # field path -> value, as research.config.override takes it
Row = dict[str, Any]  # of a cell, planned or finished


@dataclasses.dataclass(frozen=True)
class Group:
    """Cells that differ by their seed alone: one row a seed. `overrides` are without it."""

    label: str
    overrides: Cell
    rows: dict[int, Row]

    def losses(self) -> dict[int, float]:
        """Seed -> held-out loss in nats/token, of the cells that have one."""
        found = {seed: row["final_eval_loss"] for seed, row in self.rows.items()}
        return {seed: loss for seed, loss in found.items() if _is_finite(loss)}

    def estimate(self) -> Estimate | None:
        """The mean loss over seeds, or None where there are fewer than two."""
        losses = list(self.losses().values())
        return over_seeds(losses, CONFIDENCE) if len(losses) > 1 else None

    def to_json(self) -> dict[str, Any]:
        losses, estimate = self.losses(), self.estimate()
        bits = [row["bits_per_byte"] for row in self.rows.values() if _is_finite(row["bits_per_byte"])]
        return {"group": self.label, "overrides": self.overrides, "cells": [row["cell"] for row in self.rows.values()],
                "losses": {str(seed): loss for seed, loss in losses.items()},
                "loss": {"value": float(np.mean(list(losses.values()))) if losses else None,
                         "low": estimate.low if estimate else None, "high": estimate.high if estimate else None},
                "se": estimate.se if estimate else None, "bits_per_byte": float(np.mean(bits)) if bits else None}


def _is_finite(value: Any) -> bool:
    """False of None (no held-out set) and of a string (JSON's nan)."""
    return isinstance(value, (int, float)) and math.isfinite(value)


def varied_fields(rows: Sequence[Row]) -> list[str]:
    return sorted({key for row in rows for key in row["overrides"]
                   if len({json.dumps(r["overrides"][key]) if key in r["overrides"] else "" for r in rows}) > 1})


def grouped(rows: Sequence[Row]) -> list[Group]:
    """In the order of the groups' first rows; of two cells with the same settings and seed the first."""
    settings = [key for key in varied_fields(rows) if key != "seed"]
    groups: dict[str, Group] = {}
    for row in rows:
        label = " ".join(f"{key}={row['overrides'][key]}" for key in settings if key in row["overrides"]) or "preset"
        shared = {key: value for key, value in row["overrides"].items() if key != "seed"}
        groups.setdefault(label, Group(label, shared, {})).rows.setdefault(row["seed"], row)
    return list(groups.values())


def differences(groups: Sequence[Group]) -> list[Difference]:
    """Every other group's held-out loss (of the first set) against the first group's, in nats/token.

    Where several seeds are shared, a pair is a seed, and the interval says what the settings differ by; where one is, a pair
    is a document, and it says what the two trained models differ by.
    """
    return [_difference(group, groups[0]) for group in groups[1:]]


def _difference(ours: Group, base: Group) -> Difference:
    shared = sorted(ours.losses().keys() & base.losses().keys())
    estimate, note = None, "no seed with a held-out loss in common"
    try:
        pairs = [_over_documents(*(runs.load(group.rows[seed]["workdir"], group.label) for group in (ours, base)))
                 for seed in shared]
    except InputError as error:  # of a cell that is here in part: the rest is still a report
        pairs, note = [], error.problem
    if unlike := [pair for pair in pairs if not pair.estimate]:  # other documents or tokens: these losses don't compare
        note = unlike[0].note
    elif len(pairs) == 1:
        estimate, note = pairs[0].estimate, f"seed {shared[0]}, {pairs[0].note}"
    elif pairs:
        estimate, note = over_seeds([pair.estimate.value for pair in pairs], CONFIDENCE), f"{len(pairs)} seeds"
    return Difference(ours.label, base.label, "final_eval_loss", estimate, note)


def _over_documents(ours: Run, base: Run) -> Difference:
    first = base.config.data.validation[0].name
    missing = Difference(ours.label, base.label, first, None, f"no documents of {first} in common")
    return next((row for row in runs.differences_over_documents(ours, base, CONFIDENCE) if row.what == first), missing)


def detectable(rows: Sequence[Row], known: Sequence[Row], seed_sd: float | None) -> dict[str, Any] | None:
    """The difference to the first group that the planned seeds show with a chance of 80%, and the seeds for half of it.

    Args:
      rows: the planned cells'.
      known: finished cells'; pairs of them say how much a difference varies over seeds, in nats/token, or else single groups
        how much a loss does (a difference: sqrt(2) times that, at most).
      seed_sd: a loss's standard deviation, where no cells tell.

    Returns:
      None where there are fewer than two seeds, or nothing is known of their spread.

    Raises:
      InputError: seed_sd is no standard deviation.
    """
    if seed_sd is not None and not 0 < seed_sd < math.inf:
        raise InputError("--seed_sd", f"{seed_sd} is no standard deviation", "give one above 0, in nats/token")
    groups, losses = grouped(rows), [group.losses() for group in grouped(known)]
    seeds = min(len(group.rows.keys() & groups[0].rows.keys()) for group in groups)
    pairs = [[other[seed] - losses[0][seed] for seed in other if seed in losses[0]] for other in losses[1:]]
    spreads = {"pairs of finished cells": _pooled_sd(pairs),
               "finished cells": math.sqrt(2) * _pooled_sd([list(found.values()) for found in losses]),
               "--seed_sd": math.sqrt(2) * (seed_sd or 0.0)}
    source, sd = next(((source, sd) for source, sd in spreads.items() if sd), ("", 0.0))
    if seeds < 2 or not sd:
        return None
    comparisons = max(1, len(groups) - 1)
    confidence = 1 - (1 - CONFIDENCE) / comparisons  # what Holm asks of the smallest p value
    difference = minimum_detectable_effect(sd, seeds, confidence=confidence)
    return {"seeds": seeds, "difference": difference, "seeds_for_half": pairs_needed(difference / 2, sd, confidence=confidence),
            "comparisons": comparisons, "sd": sd, "sd_from": source}


def _pooled_sd(samples: Iterable[Sequence[float]]) -> float:
    """Around each sample's own mean; 0 where no sample has two numbers."""
    samples = [sample for sample in samples if len(sample) > 1]
    freedom = sum(len(sample) - 1 for sample in samples)
    return math.sqrt(sum(float(np.var(sample)) * len(sample) for sample in samples) / freedom) if samples else 0.0


def write(rows: Sequence[Row], workdir: str) -> dict[str, Any]:
    """WORKDIR/{results.jsonl (by loss), report.md, report.png} of finished cells in the grid's order, at least one.

    Returns:
      results, groups, differences (of the groups to the first of them, as in `tools.compare --json`) and the total cost.
    """
    groups = grouped(rows)
    compared = differences(groups)
    rows = sorted(rows, key=lambda row: row["final_eval_loss"] if _is_finite(row["final_eval_loss"]) else math.inf)
    write_text(epath.Path(workdir) / RESULTS_FILE, "".join(json.dumps(row) + "\n" for row in rows))
    summary = {"results": rows, "groups": [group.to_json() for group in groups],
               "differences": [difference_json(row, p) for row, p in zip(compared, runs.adjusted(compared))],
               "total": total_cost(rows)}
    varied = varied_fields(rows)
    tables = [*_group_table(summary, [key for key in varied if key != "seed"]), "", *_cell_table(rows, varied)]
    with open(os.path.join(workdir, "report.md"), "w") as file:
        file.write("\n".join([*tables, "", cost_in_words(summary["total"])]) + "\n")
    draw(groups, rows, varied, os.path.join(workdir, "report.png"))
    return summary


def _group_table(summary: Mapping[str, Any], settings: Sequence[str]) -> list[str]:
    """A line a group, the first of them what the others are compared to."""
    head = [*settings, "seeds", "loss", "se", "bits/byte", "difference", f"{CONFIDENCE:.0%} interval", "p (Holm)", ""]
    table, against = [head, ["---"] * len(head)], {row["run"]: row for row in summary["differences"]}
    for group in summary["groups"]:
        row = against[group["group"]] if group["group"] in against else None
        value = row["difference"] if row else None
        table.append([*(_setting(group, key) for key in settings), str(len(group["losses"])),
                      *map(_figure, (group["loss"]["value"], group["se"], group["bits_per_byte"])),
                      *((f"{value['value']:+.4f}", f"{value['low']:+.4f} to {value['high']:+.4f}", f"{row['p_holm']:.2g}")
                        if value else ["-"] * 3), row["note"] if row else "the base"])
    return [*_markdown(table), "", "se: over seeds here, over held-out documents below. Differences are to the first line, in "
            "nats/token, below 0 is better; a pair is a seed, or a document where one seed is shared (docs/statistics.md)."]


def _cell_table(rows: Sequence[Row], varied: Sequence[str]) -> list[str]:
    head = ["cell", *varied, "loss", "se", "bits/byte", "tokens/s"]
    return _markdown([head, ["---"] * len(head)] + [
        [row["cell"], *(_setting(row, key) for key in varied), *(_figure(row[name]) for name in FIGURES),
         f"{row['tokens_per_second']:,.0f}"] for row in rows])


def _markdown(table: Iterable[Iterable[str]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in table]


def _setting(row: Mapping[str, Any], key: str) -> str:
    return str(row["overrides"][key]) if key in row["overrides"] else "-"


def _figure(value: Any) -> str:
    return f"{value:.4f}" if _is_finite(value) else "-"


def draw(groups: Sequence[Group], rows: Sequence[Row], varied: Sequence[str], path: str) -> None:
    """Held-out loss against each varied field, one panel a field: a point a group, or a cell where only the seed varies.

    The bars are standard errors over seeds; over documents where a point is one cell.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = [key for key in varied if key != "seed"] or ["seed"]
    if panels == ["seed"]:
        groups = [Group(row["cell"], row["overrides"], {row["seed"]: row}) for row in rows]
    shown = [group for group in groups if group.losses()]
    means, bars = [np.mean(list(group.losses().values())) for group in shown], [_bar(group) for group in shown]
    figure, axes = plt.subplots(1, len(panels), figsize=(5 * len(panels), 4), squeeze=False, layout="constrained")
    for plot, key in zip(axes[0], panels):
        xs = [min(group.rows) if key == "seed" else group.overrides[key] if key in group.overrides else "preset"
              for group in shown]
        if not all(isinstance(x, (int, float)) for x in xs):
            xs = [str(x) for x in xs]
        elif xs and min(xs) > 0 and max(xs) / min(xs) > 5:
            plot.set_xscale("log")
        plot.errorbar(xs, means, yerr=bars, fmt="o", capsize=3)
        plot.set(xlabel=key, ylabel="held-out loss (nats/token)")
        plot.grid(alpha=0.3)
    over = " and ".join(sorted({"seeds" if group.estimate() else "documents" for group in shown}))
    figure.suptitle(f"bars: standard errors over {over}" if shown else "", fontsize="small")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _bar(group: Group) -> float:
    """The standard error of the group's mean: over seeds, or of its one evaluation over documents."""
    estimate = group.estimate()
    return estimate.se if estimate else float(group.rows[min(group.losses())]["final_eval_loss_se"])
