"""Where the seconds of a run went: of one launch by its clock, of the run's whole life in goodput.json."""

import contextlib
import json
import threading
import time
from typing import Iterator

from absl import logging
from etils import epath

from research.errors import is_full
from research.schema import GOODPUT_FILE
from research.training.workdir import is_remote, write_json

# A launch begins as `initialising`, and `training` is what the others take from. repeated: steps that had been done before, and
# were lost to a rollback or a restart. down: between launches, from the last sign of life of one to the start of the next. Only
# it is read off the wall clock.
CATEGORIES = ("initialising", "compiling", "training", "data_wait", "evaluating", "saving", "restoring", "repeated", "down")
WRITE_EVERY, WRITE_EVERY_REMOTE = 1.0, 60.0  # seconds


class Clock:
    """Seconds by category (monotonic), of which one always runs: the innermost that is measured, else `initialising`.

    `since`: when it began, by time.monotonic(); now where not given. One thread measures, any may read.
    """

    def __init__(self, since: float | None = None):
        now = time.monotonic()
        self._since = now if since is None else since
        self.began = time.time() - (now - self._since)  # by the wall clock
        self._seconds = dict.fromkeys(CATEGORIES, 0.0)
        self._stack = ["initialising"]
        self._lock = threading.Lock()  # never held for longer than a few lines

    def _charge(self) -> None:
        """Whoever calls holds the lock."""
        now = time.monotonic()
        self._seconds[self._stack[-1]] += now - self._since
        self._since = now

    @contextlib.contextmanager
    def measure(self, category: str) -> Iterator[None]:
        with self._lock:
            self._charge()
            self._stack.append(category)
        try:
            yield
        finally:
            with self._lock:
                self._charge()
                self._stack.pop()

    def current(self) -> str:
        """The innermost category now."""
        return self._stack[-1]

    def seconds(self) -> dict[str, float]:
        """By category, until now."""
        with self._lock:
            self._charge()
            return dict(self._seconds)

    def get(self, category: str) -> float:
        return self.seconds()[category]


class Goodput:
    """A run's life: the launches before, as goodput.json tells of them, and this one by `clock`.

    The file is {time, step, seconds, chip_seconds}. From `start` to `close` a thread of its own writes it, at once and then
    every second (every minute on object stores), whatever the run is busy with, so that a launch that is killed loses no
    more. `reached`, its `step`, is the furthest step that the run has ever been at.
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
        self._shown = -self._every
        self._writer, self._closing = threading.Thread(target=self._write_on, name="goodput", daemon=True), threading.Event()

    def category(self, step: int) -> str:
        """What training `step` counts as."""
        return "training" if step > self.reached else "repeated"

    def seconds(self) -> dict[str, float]:
        """By category, over the run's life."""
        return {name: self._before[name] + here for name, here in self._clock.seconds().items()}

    def shares(self) -> dict[str, float]:
        seconds = self.seconds()
        total = max(sum(seconds.values()), 1e-9)
        return {name: value / total for name, value in seconds.items()}

    def chip_seconds(self) -> float:
        """Of all launches, each with its chips; none while down."""
        return self._chip_seconds + sum(self._clock.seconds().values()) * self._chips

    def due(self) -> bool:
        """Whether the shares may be shown again: as rarely as the file is written."""
        now = time.monotonic()
        due = now - self._shown >= self._every
        self._shown = now if due else self._shown
        return due

    def write(self) -> None:
        """Where it can't, as on a full disk, the file of before stays: no run ends for its accounts."""
        try:
            write_json(self._path, {"time": time.time(), "step": self.reached, "seconds": self.seconds(),
                                    "chip_seconds": self.chip_seconds()})
        except OSError as error:
            if not is_full(error):
                logging.log_first_n(logging.WARNING, "%s can't be written: %s", 1, self._path, error)

    def start(self) -> None:
        """From here on this launch is accounted for, from the clock's beginning on."""
        self._writer.start()

    def _write_on(self) -> None:
        self.write()
        while not self._closing.wait(self._every):
            self.write()
        self.write()

    def close(self, patience: float | None = None) -> None:
        """The last line of a launch's log, however it ends. `patience`: seconds to wait for the file; None has no limit."""
        if self._closing.is_set():
            return
        self._closing.set()
        self._writer.join(patience)
        logging.info("%s", self)

    def __str__(self) -> str:
        shares = self.shares()
        others = sorted((name for name in shares if name != "training" and shares[name] >= 0.001), key=shares.get, reverse=True)
        words = [f"{100 * shares['training']:.1f}% training", *(f"{name} {100 * shares[name]:.1f}%" for name in others)]
        return f"goodput of {sum(self.seconds().values()):.0f} s: {', '.join(words)}"
