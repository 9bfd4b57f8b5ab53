"""The guard: is a step's loss sound, and, if not, where to go back to and what to leave out.

Pure: `Guard` sees one step's numbers at a time, `decide` sees what happened before. A fault is first taken for a passing
one: back to the newest checkpoint before it, the same data again. If it comes again at the same place, it is the data's:
back to about `rollback_steps` before it, without `skip_batches` batches from there on (Chowdhery et al. 2022, PaLM,
section 5.1: restart roughly 100 steps before the spike, skip roughly 200-500 batches). Some number of times; then it gives up.
"""

import collections
import dataclasses
import itertools
import math
from typing import Any, Mapping, Sequence

from research.schema import GuardConfig

CHECKED = ("objective", "grad_norm", "update_norm", "param_norm")  # must be finite
NORMAL_MAD = 1.4826  # standard deviations of a Gaussian in one median absolute deviation
NORMAL_95 = 1.6449  # ... and up to its 95th percentile
SMALLEST_SCALE = 0.01  # of the median: a curve without noise has no scale of its own


@dataclasses.dataclass(frozen=True)
class Alarm:
    """Something is wrong with steps `first` ... `step`."""

    first: int
    step: int
    reason: str


def spike_score(loss: float, losses: Sequence[float]) -> float:
    """Robust z-score of `loss` among recent `losses`: how many standard deviations it is above their median.

    The deviation is that of a Gaussian with their median absolute deviation (Iglewicz and Hoaglin 1993) or, where that is
    larger, their 95th percentile (noise is not symmetric, and some batches come from a harder source), and at least
    1% of the median.
    """
    ordered = sorted(losses)
    median = ordered[len(ordered) // 2]
    mad = sorted(abs(x - median) for x in ordered)[len(ordered) // 2]
    high = ordered[len(ordered) * 95 // 100] - median
    return (loss - median) / max(mad * NORMAL_MAD, high / NORMAL_95, SMALLEST_SCALE * abs(median), 1e-9)


class Guard:
    """Takes the steps in turn. Its memory (`saved`) belongs to the checkpoint: after a rollback it knows what it knew then."""

    def __init__(self, config: GuardConfig, saved: Mapping[str, Any] | None = None):
        self._config = config
        self._losses = collections.deque(saved["losses"] if saved else (), maxlen=config.window)
        self._high = list(saved["high"]) if saved else []  # of the last steps in a row that are above the threshold

    def check(self, step: int, values: Mapping[str, float]) -> Alarm | None:
        """`values`: of the metrics of `step`, those in CHECKED at least. Spikes are looked for once the window is full."""
        for name in CHECKED:
            if not math.isfinite(values[name]):
                return Alarm(step, step, f"{name} is {values[name]}")
        loss, config = values["objective"], self._config
        if config.spike_zscore and len(self._losses) == config.window:
            score = spike_score(loss, self._losses)
            if score > config.spike_zscore:
                self._high.append(loss)
                if len(self._high) < config.patience:
                    return None
                return Alarm(step - len(self._high) + 1, step, f"the loss is {loss:.4g}, {score:.1f} deviations high")
        self._losses.extend([*self._high, loss])  # not a spike: outliers belong to what is usual
        self._high = []
        return None

    def saved(self) -> dict[str, Any]:
        """For `__init__`, through JSON."""
        return {"losses": list(self._losses), "high": self._high}


@dataclasses.dataclass(frozen=True)
class Rollback:
    """After an alarm: on from step `to`; without the next `batches` batches of step `skip_from` where batches > 0.

    The fields of a `rolled_back` event of the ledger but for `to`, which is the event's step.
    """

    first: int
    at: int
    reason: str
    to: int
    skip_from: int = 0
    batches: int = 0

    def details(self) -> dict[str, Any]:
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "to"}

    def __str__(self) -> str:
        again = f"without {self.batches} batches after step {self.skip_from}" if self.batches else "with the same data"
        return f"step {self.at}: {self.reason}; back to step {self.to}, {again}"


def decide(config: GuardConfig, history: Sequence[Rollback], alarm: Alarm, kept: Sequence[int]) -> Rollback | None:
    """What to do about `alarm`: None to give up.

    `history`: the run's rollbacks in order. Those that were about the last `rollback_steps` steps, or later ones, count towards
    `max_rollbacks`: a run that gets ahead may go on, however long it is. `kept`: steps that can be restored, besides 0.
    """
    near = [past for past in history if past.at >= alarm.first - config.rollback_steps]
    if len(near) >= config.max_rollbacks:
        return None
    same_data = itertools.takewhile(lambda past: not past.batches, reversed(history))
    again = any(past.first <= alarm.step + config.patience and past.at >= alarm.first - config.patience for past in same_data)
    good = [step for step in kept if step < alarm.first]
    if not again:
        return Rollback(alarm.first, alarm.step, alarm.reason, max(good, default=0))
    before = alarm.first - 1 - config.rollback_steps
    far = [step for step in good if step <= before]
    to = max(far) if far else min(good, default=0)
    skip_from = max(to, before)
    return Rollback(alarm.first, alarm.step, alarm.reason, to, skip_from, max(config.skip_batches, alarm.step - skip_from))


def rollbacks_of(ledger: Sequence[Mapping[str, Any]]) -> list[Rollback]:
    """Those that a run's ledger tells of."""
    names = [field.name for field in dataclasses.fields(Rollback) if field.name != "to"]
    return [Rollback(to=row["step"], **{name: row[name] for name in names}) for row in ledger if row["event"] == "rolled_back"]


def story(history: Sequence[Rollback], alarm: Alarm) -> str:
    """What happened, a line each, for the one who has to look into it."""
    last = f"step {alarm.step}: {alarm.reason}; the guard gives up, nothing after step {alarm.first - 1} is kept"
    return "\n  ".join([last, *(f"before that, {past}" for past in reversed(history))])
