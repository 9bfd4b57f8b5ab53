"""Where the seconds of a run went: of one launch by its clock, of the run's whole life in goodput.json."""

import contextlib
import json
import time
from typing import Iterator

from absl import logging
from etils import epath

from research.errors import is_full
from research.schema import GOODPUT_FILE
from research.training.workdir import is_remote, write_json

# `training` is what the others take from. repeated: steps that had been done before, and were lost to a rollback or a restart.
# down: between launches, from the last sign of life of one to the start of the next. Only it is read off the wall clock.
CATEGORIES = ("initialising", "compiling", "training", "data_wait", "evaluating", "saving", "restoring", "repeated", "down")
WRITE_EVERY, WRITE_EVERY_REMOTE = 1.0, 60.0  # seconds


class Clock:
    """Seconds by category (monotonic); nested categories count for the inner one only."""

    def __init__(self):
        self.began = time.time()  # by the wall clock
        self.seconds: dict[str, float] = {}
        self._stack: list[str] = []
        self._since = time.monotonic()

    def _charge(self) -> None:
        now = time.monotonic()
        if self._stack:
            top = self._stack[-1]
            self.seconds[top] = (self.seconds[top] if top in self.seconds else 0.0) + now - self._since
        self._since = now

    @contextlib.contextmanager
    def measure(self, category: str) -> Iterator[None]:
        self._charge()
        self._stack.append(category)
        try:
            yield
        finally:
            self._charge()
            self._stack.pop()

    def current(self) -> str:
        """The innermost category now; any thread may ask."""
        inner = self._stack[-1:]
        return inner[0] if inner else ""

    def total(self) -> float:
        self._charge()
        return sum(self.seconds.values())

    def get(self, category: str) -> float:
        self._charge()
        return self.seconds[category] if category in self.seconds else 0.0


class Goodput:
    """A run's life: the launches before, as goodput.json tells of them, and this one by `clock`.

    The file is {time, step, seconds, chip_seconds}, written every second (every minute on object stores), so that a launch
    that is killed loses no more. `reached`, its `step`, is the furthest step that the run has ever been at.
    """

    def __init__(self, workdir: epath.Path, clock: Clock, chips: int):
        self._path, self._clock, self._chips = workdir / GOODPUT_FILE, clock, chips
        self._before, self._chip_seconds, self.reached = dict.fromkeys(CATEGORIES, 0.0), 0.0, 0
        if self._path.exists():
            try:
                past = json.loads(self._path.read_text())
                seconds = {name: float(past["seconds"][name]) for name in CATEGORIES}
                seconds["down"] += max(0.0, clock.began - past["time"])  # a clock that was set back tells nothing
                self._before, self._chip_seconds, self.reached = seconds, float(past["chip_seconds"]), int(past["step"])
            except (ValueError, KeyError, TypeError) as error:  # no run ends for its accounts
                logging.warning("%s can't be read (%s): the goodput of earlier launches is lost", self._path, error)
        self._every = WRITE_EVERY_REMOTE if is_remote(workdir) else WRITE_EVERY
        self._written = -self._every

    def category(self, step: int) -> str:
        """What training `step` counts as."""
        return "training" if step > self.reached else "repeated"

    def seconds(self) -> dict[str, float]:
        """By category, over the run's life."""
        self._clock.total()
        now = self._clock.seconds
        return {name: past + (now[name] if name in now else 0.0) for name, past in self._before.items()}

    def shares(self) -> dict[str, float]:
        seconds = self.seconds()
        total = max(sum(seconds.values()), 1e-9)
        return {name: value / total for name, value in seconds.items()}

    def chip_seconds(self) -> float:
        """Of all launches, each with its chips; none while down."""
        return self._chip_seconds + self._clock.total() * self._chips

    def due(self) -> bool:
        return time.monotonic() - self._written >= self._every

    def write(self) -> None:
        """A full disk keeps the file of before."""
        self._written = time.monotonic()
        try:
            write_json(self._path, {"time": time.time(), "step": self.reached, "seconds": self.seconds(),
                                    "chip_seconds": self.chip_seconds()})
        except OSError as error:
            if not is_full(error):
                raise

    def close(self) -> None:
        """The last line of a launch's log, however it ends."""
        self.write()
        logging.info("%s", self)

    def __str__(self) -> str:
        shares = self.shares()
        others = sorted((name for name in shares if name != "training" and shares[name] >= 0.001), key=shares.get, reverse=True)
        words = [f"{100 * shares['training']:.1f}% training", *(f"{name} {100 * shares[name]:.1f}%" for name in others)]
        return f"goodput of {sum(self.seconds().values()):.0f} s: {', '.join(words)}"
