"""How a run is started, and the parts of a running job that the loop and its reporting share."""

import dataclasses
from typing import Any, Callable, Mapping

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from research.errors import Interrupted
from research.scaling.prediction import Prediction
from research.schema import HEARTBEAT, METRICS_PREFIX, Config
from research.training.checkpoint import Checkpointer
from research.training.gang import Gang
from research.training.goodput import Clock, Goodput
from research.training.metrics import Recorder
from research.training.program import Program
from research.training.workdir import Ledger, read_rows


@dataclasses.dataclass(frozen=True)
class Launch:
    """How a run is started, apart from its config. `minutes`: stop cleanly after so long, to go on with the next call.

    `webhook`: an address that is told alarms and the end of the run; `wandb`: a Weights & Biases project to mirror it in;
    `heartbeat`: seconds without a sign of life after which another process of the job is lost (gang.py). `began`: when the
    launch did, by time.monotonic(), where more than the call of `run` belongs to it (goodput.py). `fault`: for
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
    heartbeat: float = HEARTBEAT
    began: float | None = None
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
    gang: Gang
    prediction: Prediction | None = None  # what was registered at step 0
    left_band: bool = False  # whether the ledger has been told

    def note(self, event: str, step: int, **details: Any) -> None:
        """A line of the ledger, on the process that keeps it."""
        if self.ledger:
            self.ledger.write(event, step, **details)

    def note_checkpoints(self) -> None:
        """Enters what the checkpointer did since the last call. Raises Interrupted on a full disk, where that is asked for."""
        events = self.checkpointer.events()
        for event, step, details in events:
            self.note(event, step, **details)
        # One process alone can't stop the others here: they notice that it has gone.
        if any(event == "alarm" for event, _, _ in events) and self.program.config.checkpoint.on_full == "stop":
            raise Interrupted("the disk is full; make room, and the same command goes on from the last checkpoint")


def as_first(value: int) -> int:
    """The first process's value, on all: what lies in the workdir only it is sure to have read."""
    return value if jax.process_count() == 1 else int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def evaluated_until(workdir: epath.Path, step: int) -> dict[tuple[int, str], tuple[float, float]]:
    """(step, set) -> (loss, se) of the evaluations that an earlier launch recorded up to `step`."""
    return {(row["step"], row["set"]): (float(row["loss"]), float(row["se"])) for row in read_rows(workdir, METRICS_PREFIX)
            if "set" in row and row["step"] <= step}
