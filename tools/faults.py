"""The faults of tools.chaos: what happens to a run, when, and how to see from outside that it has recovered."""

import contextlib
import dataclasses
import json
import os
import pathlib
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from typing import Any, Callable, Mapping, Sequence

import numpy as np

from research.errors import is_full
from research.schema import CHECKPOINTS, LEDGER_PREFIX, METRICS_PREFIX, RESULT_FILE
from research.training.workdir import read_rows

_POLL = 0.002  # seconds
LAUNCHES = 4  # of a job that goes on ending with 75


@dataclasses.dataclass(frozen=True)
class Moment:
    """When a fault comes: once `step` is reported or, `in_save`, `delay` seconds after the save of `step` has begun."""

    step: int
    in_save: bool = False
    delay: float = 0.0

    def __str__(self) -> str:
        return f"step {self.step}" + (f", {1000 * self.delay:.0f} ms into its save" if self.in_save else "")


def draw_moment(rng: random.Random, steps: int, every: int, first: int = 1) -> Moment:
    """Any step from `first` on but the last ones; one time in three in the middle of a save."""
    saves = [step for step in range(every, steps - 1, every) if step >= first]
    if saves and rng.random() < 1 / 3:
        return Moment(rng.choice(saves), True, rng.uniform(0.0, 0.05))
    return Moment(rng.randrange(first, max(first + 1, steps - 1)))


class Watch:
    """Looks at a run directory, as it grows, from a thread: the last step of the metrics, and when training went on."""

    def __init__(self, workdir: pathlib.Path):
        self._workdir, self._done = workdir, threading.Event()
        self.step = 0  # the last one that was reported
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._since: float | None = None
        self._starts = 0
        self.resumed: int | None = None  # the step that the run went on from after `hit`
        self.recover_seconds: float | None = None

    def hit(self) -> None:
        """A fault is done to the run now; a new start in the ledger, and then a step, are the recovery from it."""
        self._starts, self.resumed, self.recover_seconds = len(starts(self._workdir)), None, None
        self._since = time.monotonic()

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._done.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._done.wait(_POLL):
            self.step = last_step(self._workdir)
            if self._since is not None and self.recover_seconds is None:
                begun = starts(self._workdir)
                if len(begun) > self._starts:
                    self.resumed = begun[-1]
                    if self.step > self.resumed:
                        self.recover_seconds = time.monotonic() - self._since


def starts(workdir: pathlib.Path) -> list[int]:
    """The step of each launch (and return to an earlier step) that the ledger tells of."""
    if not workdir.exists():
        return []
    return [row["step"] for row in read_rows(workdir, LEDGER_PREFIX) if row["event"] in ("started", "resumed")]


def last_step(workdir: pathlib.Path) -> int:
    """The step of the last whole training row, by the end of the newest metrics file."""
    parts = sorted(workdir.glob(f"{METRICS_PREFIX}*.jsonl")) if workdir.exists() else []
    for path in reversed(parts):
        try:
            with open(path, "rb") as file:
                file.seek(max(0, os.path.getsize(path) - 16384))
                lines = file.read().splitlines()
        except OSError:  # it was just replaced
            continue
        for line in reversed(lines):
            with contextlib.suppress(ValueError):
                row = json.loads(line)
                if isinstance(row, dict) and "set" not in row and "step" in row:
                    return row["step"]
    return 0


def steps_once(workdir: pathlib.Path, steps: int) -> bool:
    """Do the metrics show every step once, in order?"""
    return [row["step"] for row in read_rows(workdir, METRICS_PREFIX) if "set" not in row] == list(range(1, steps + 1))


class Process:
    """A command in the background, its output in `log`."""

    def __init__(self, words: Sequence[str], environment: Mapping[str, str], log: pathlib.Path):
        self._log = log
        with open(log, "ab") as file:
            self._process = subprocess.Popen(words, stdout=file, stderr=file, env=environment, start_new_session=True)
        self.pid = self._process.pid

    def running(self) -> bool:
        return self._process.poll() is None

    def wait(self, seconds: float) -> int | None:
        """The exit code; None if it had to be killed."""
        try:
            return self._process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            return None

    def kill(self) -> None:
        """And then what a supervisor has started, by their ids."""
        for pid in [self.pid, *self.members()]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()

    def members(self) -> list[int]:
        """The newest processes of a supervised job, in order, as the supervisor's log tells."""
        found: dict[int, int] = {}
        for line in self._log.read_text(errors="replace").splitlines():
            words = line.split()
            if words[:1] == ["process"] and words[2:4] == ["is", "pid"]:
                found[int(words[1])] = int(words[4])
        return [found[index] for index in sorted(found)]


def until(moment: Moment, watch: Watch, workdir: pathlib.Path, running: Callable[[], bool], seconds: float) -> bool:
    """Waits for the moment; False if the run was over before, or it didn't come in time."""
    deadline, saves = time.monotonic() + seconds, workdir / CHECKPOINTS
    while running() and time.monotonic() < deadline:
        if moment.in_save:
            names = [path.name for path in saves.iterdir()] if saves.exists() else []
            if any(name.split(".")[0] == str(moment.step) for name in names):  # STEP itself, or STEP.unfinished
                time.sleep(moment.delay)
                return running()
        elif watch.step >= moment.step:
            return True
        time.sleep(_POLL)
    return False


def train_command(config_name: str, assignments: Sequence[str], workdir: pathlib.Path, processes: int = 1,
                  heartbeat: float | None = None) -> list[str]:
    words = [sys.executable, "-m", "experiments.train", f"--config={config_name}", f"--workdir={workdir}"]
    words += [f"--set={assignment}" for assignment in assignments] + ([f"--heartbeat={heartbeat}"] if heartbeat else [])
    if processes == 1:
        return words
    return [sys.executable, "-m", "tools.supervise", f"--processes={processes}", f"--max_restarts={LAUNCHES}", "--", *words]


def damage(kind: str, step: pathlib.Path, rng: random.Random) -> str:
    """Flips a bit of, cuts, or deletes one file of a checkpoint; says which."""
    files = sorted(path for path in step.rglob("*") if path.is_file() and path.stat().st_size)
    path = rng.choice(files)
    name, size = path.relative_to(step), path.stat().st_size
    if kind == "delete":
        path.unlink()
        return f"{name} deleted"
    if kind == "truncate":
        kept = rng.randrange(size)
        os.truncate(path, kept)
        return f"{name} cut to {kept} of {size} bytes"
    byte, bit = rng.randrange(size), rng.randrange(8)
    with open(path, "r+b") as file:
        file.seek(byte)
        value = file.read(1)[0]
        file.seek(byte)
        file.write(bytes([value ^ (1 << bit)]))
    return f"{name}, bit {bit} of byte {byte} flipped"


@dataclasses.dataclass
class BadBatches:
    """For Launch.fault: makes the batches of steps `first` ... `first + steps - 1` bad.

    `kind`: nan (weights that are NaN: the loss is) or spike (targets that have nothing to do with the text). A passing fault
    comes once; one of the data (`lasting`) whenever a batch begins with these samples.
    """

    kind: str
    first: int
    steps: int
    batch_size: int
    lasting: bool
    seed: int
    done: int = 0
    recover_seconds: float | None = None  # from the first bad batch until the run goes on from an earlier step
    _began: float | None = None
    _step: int = 0

    def __call__(self, step: int, sample: int, batch: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        if self._began is not None and self.recover_seconds is None and step <= self._step:
            self.recover_seconds = time.monotonic() - self._began
        self._step = step
        if self.lasting:
            hit = 0 <= sample // self.batch_size - (self.first - 1) < self.steps
        else:
            hit = 0 <= step - self.first < self.steps and self.done < self.steps
        if not hit:
            return batch
        self.done += 1
        self._began = time.monotonic() if self._began is None else self._began
        if self.kind == "nan":
            return {**batch, "weights_BxL": np.full_like(batch["weights_BxL"], np.nan)}
        targets = batch["targets_BxL"]
        drawn = np.random.default_rng(self.seed + step).integers(0, targets.max() + 1, targets.shape, targets.dtype)
        return {**batch, "targets_BxL": drawn}


class Disk:
    """Room that can run out: a tmpfs where mounting is allowed, else a limit on the size of a file (RLIMIT_FSIZE).

    A save that begins while it is full fails half-way, with ENOSPC or EFBIG; what logs need is left.
    """

    def __init__(self, place: pathlib.Path, save_bytes: int):
        self._place, self._save_bytes = place, save_bytes
        self._limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        self.kind = "limit"

    def __enter__(self) -> "Disk":
        self._place.mkdir(parents=True)
        room = 16 * self._save_bytes + (64 << 20)
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={room}", "tmpfs", str(self._place)], capture_output=True)
        self.kind = "tmpfs" if mounted.returncode == 0 else "limit"
        return self

    def fill(self) -> None:
        """Leaves half of what a save needs; call it at every step, as older checkpoints may go and make room."""
        if self.kind == "limit":
            resource.setrlimit(resource.RLIMIT_FSIZE, (max(1, self._save_bytes // 20), self._limits[1]))
            return
        free = shutil.disk_usage(self._place).free
        if free > self._save_bytes // 2:
            ballast = self._place / "ballast"
            size = ballast.stat().st_size if ballast.exists() else 0
            with open(ballast, "ab") as file:
                try:
                    os.posix_fallocate(file.fileno(), size, free - self._save_bytes // 2)
                except OSError as error:  # a save took that room between the two calls: then it's full already
                    if not is_full(error):
                        raise

    def free(self) -> None:
        if self.kind == "limit":
            resource.setrlimit(resource.RLIMIT_FSIZE, self._limits)
        else:
            (self._place / "ballast").unlink(missing_ok=True)

    def __exit__(self, *_: Any) -> None:
        self.free()
        if self.kind == "tmpfs":
            subprocess.run(["umount", "--lazy", str(self._place)], check=True)


def size_of(directory: pathlib.Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def result_of(workdir: pathlib.Path) -> dict[str, Any] | None:
    path = workdir / RESULT_FILE
    return json.loads(path.read_text()) if path.exists() else None
