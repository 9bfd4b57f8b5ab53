"""How a run is started, and the parts of a running job that the loop and its reporting share."""

import dataclasses
from typing import Any, Callable, Mapping

import numpy as np
from etils import epath

from research.schema import METRICS_PREFIX, Config
from research.training.checkpoint import Checkpointer
from research.training.goodput import Clock, Goodput
from research.training.metrics import Recorder
from research.training.program import Program
from research.training.workdir import Ledger, read_rows


@dataclasses.dataclass(frozen=True)
class Launch:
    """How a run is started, apart from its config. `minutes`: stop cleanly after so long, to go on with the next call.

    `webhook`: an address that is told the end of the run; `wandb`: a Weights & Biases project to mirror it in. `fault`: for
    tests and tools.chaos: (step, number of its first sample, this process's batch) -> the batch that is trained on instead;
    called once for each step that is dispatched, so a passing fault goes by the call, one of the data by the sample.
    """

    workdir: str
    preset: Config
    minutes: float | None = None
    prediction: str | None = None
    profile_steps: int = 0
    quiet: bool = False
    webhook: str | None = None
    wandb: str | None = None
    fault: Callable[[int, int, Mapping[str, np.ndarray]], Mapping[str, np.ndarray]] | None = None


@dataclasses.dataclass
class Session:
    """The parts of a running job that its functions share."""

    launch: Launch
    program: Program
    data: Any
    workdir: epath.Path
    recorder: Recorder | None  # on the first process only
    ledger: Ledger | None
    checkpointer: Checkpointer
    clock: Clock
    goodput: Goodput
    nll: Any
    peak_flops: float
    bar: Any
    averaged: Any  # state -> the parameters to evaluate
    evaluated: dict[tuple[int, str], tuple[float, float]]  # (step, set) -> (loss, se)

    def note(self, event: str, step: int, **details: Any) -> None:
        """A line of the ledger, on the process that keeps it."""
        if self.ledger:
            self.ledger.write(event, step, **details)


def evaluated_until(workdir: epath.Path, step: int) -> dict[tuple[int, str], tuple[float, float]]:
    """(step, set) -> (loss, se) of the evaluations that an earlier launch recorded up to `step`."""
    return {(row["step"], row["set"]): (float(row["loss"]), float(row["se"])) for row in read_rows(workdir, METRICS_PREFIX)
            if "set" in row and row["step"] <= step}
