"""A ladder of small runs: which sizes at which budgets, cut from one trunk a size, and what came out of them.

A trunk trains a size at a constant learning rate; a rung leaves it at some step and decays to zero (WSD: Hu et al. 2024), so a
rung is bitwise the run that warms up, stays and decays by itself, for the price of its decay. Sizes meet budgets on an isoFLOP grid.
"""

import csv
import dataclasses
import math
from typing import Any, Mapping, Sequence

from research.errors import InputError

COLUMNS = ("params", "non_embedding", "tokens", "flops", "loss", "loss_se", "seed", "run", "diverged")
DECAY = 0.2  # of a rung's steps
TOKENS_PER_PARAM = 1.5, 250.0  # of the sizes that a budget takes


@dataclasses.dataclass(frozen=True)
class Size:
    """A model of the ladder. `overrides`: of the family's preset; `step_seconds`: on this machine."""

    dim: int
    overrides: Mapping[str, Any]
    params: int
    non_embedding: int
    flops_per_token: float
    tokens_per_step: int
    step_seconds: float


@dataclasses.dataclass(frozen=True)
class Rung:
    """A run of `steps` steps; the last `decay_steps` lower the learning rate to zero."""

    size: Size
    steps: int
    decay_steps: int

    @property
    def tokens(self) -> int:
        return self.steps * self.size.tokens_per_step

    @property
    def flops(self) -> float:
        return self.tokens * self.size.flops_per_token

    @property
    def branch_step(self) -> int:
        return self.steps - self.decay_steps


def rung_at(size: Size, flops: float) -> Rung:
    """The run of `size` that costs `flops`, to a step."""
    steps = max(round(flops / (size.flops_per_token * size.tokens_per_step)), 1)
    return Rung(size, steps, max(math.ceil(DECAY * steps), 1))


def grid(sizes: Sequence[Size], budgets: Sequence[float], warmup_steps: int,
         ratios: tuple[float, float] = TOKENS_PER_PARAM) -> list[Rung]:
    """At each budget the sizes whose tokens per parameter lie in `ratios`, smallest first.

    Raises:
      InputError: a budget with fewer than 3 sizes (no parabola), or one whose run would decay before it has warmed up.
    """
    found = []
    for flops in sorted(budgets):
        at_budget = [rung for rung in (rung_at(size, flops) for size in sizes)
                     if ratios[0] <= rung.tokens / rung.size.params <= ratios[1]]
        if len(at_budget) < 3:
            raise InputError("--budgets", f"{flops:g} FLOPs give {len(at_budget)} of {len(sizes)} sizes between {ratios[0]:g} and "
                             f"{ratios[1]:g} tokens a parameter", "a budget needs 3: change --budgets, --dims or --ratios")
        short = [rung for rung in at_budget if rung.branch_step <= warmup_steps]
        if short:
            raise InputError("--budgets", f"{flops:g} FLOPs are {short[0].steps} steps at width {short[0].size.dim}, "
                             f"of which {warmup_steps} warm up", "raise the budget")
        found += at_budget
    return found


def write_csv(path: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """One row a rung, the columns of COLUMNS; a diverged run's loss is nan."""
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
