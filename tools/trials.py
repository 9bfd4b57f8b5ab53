"""The trials of tools.chaos: one function a kind of fault, which runs a job with the fault and says how it went."""

import dataclasses
import os
import pathlib
import random
import shutil
import signal
from typing import Any, Callable, Mapping

import jax
from absl import logging

from research.errors import Diverged, InputError, Interrupted
from research.schema import CHECKPOINTS, EXIT_DONE, EXIT_INTERRUPTED, LEDGER_PREFIX, METRICS_PREFIX, Config
from research.training.loop import Launch, run
from research.training.workdir import read_rows
from tools import faults

LOSS_TOLERANCE = 1e-5  # relative for losses above 1; of a resize, in float32
_FAILURES = (Diverged, InputError, OSError, RuntimeError, ValueError)


@dataclasses.dataclass(frozen=True)
class Job:
    """What is run: a config by its name and assignments, and where. `reference`, `pair`: the undisturbed runs."""

    name: str
    preset: Config
    config: Config
    assignments: tuple[str, ...]
    home: pathlib.Path
    heartbeat: float

    @property
    def reference(self) -> pathlib.Path:
        return self.home / "reference"

    @property
    def pair(self) -> pathlib.Path:
        return self.home / "reference-pair"

    @property
    def stopped(self) -> pathlib.Path:
        """The undisturbed run as it was after about 70% of its steps."""
        return self.home / "stopped"

    def seconds(self) -> float:
        """How long a launch may take before it counts as hung."""
        result = faults.result_of(self.reference)
        return 180 + 10 * (sum(result["goodput"].values()) if result else 3600)

    def command(self, workdir: pathlib.Path, processes: int = 1) -> list[str]:
        return faults.train_command(self.name, self.assignments, workdir, processes, self.heartbeat if processes > 1 else None)

    def environment(self, devices: int | None = None) -> dict[str, str]:
        """`devices`: so many of the CPU's; None for those that this process has."""
        found = {**os.environ, "RUNG_CACHE": cache_of(self.home), "PYTHONUNBUFFERED": "1"}
        if devices is not None:
            given = os.environ["XLA_FLAGS"].split() if "XLA_FLAGS" in os.environ else []
            others = [word for word in given if "device_count" not in word]
            found["XLA_FLAGS"] = " ".join([*others, f"--xla_force_host_platform_device_count={devices}"])
        return found


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A line of trials.jsonl, but for the fault and the number of the trial."""

    what: str  # was done, and when
    step: int  # that the run was at
    survived: bool
    bitwise_equal: bool
    bitwise_expected: bool
    steps_lost: int
    recover_seconds: float | None
    note: str = ""


class Missed(Exception):
    """The fault did not hit: the run was over before the moment came, or no save fell into it."""


def cache_of(home: pathlib.Path) -> str:
    return os.environ["RUNG_CACHE"] if "RUNG_CACHE" in os.environ else str(home / "cache")


def judge(job: Job, workdir: pathlib.Path, reference: pathlib.Path) -> tuple[bool, bool]:
    """(survived, bitwise equal)."""
    result, wanted = faults.result_of(workdir), faults.result_of(reference)
    survived = result is not None and faults.steps_once(workdir, job.config.train.steps)
    equal = survived and all(result[name] == wanted[name] for name in ("params_sha256", "final_eval_loss", "steps"))
    return survived, equal


def in_this_process(job: Job, workdir: pathlib.Path, fault: Any = None) -> str:
    """Runs the job to its end, again after each 75; what went wrong, or nothing."""
    for _ in range(faults.LAUNCHES):
        verbosity = logging.get_verbosity()
        logging.set_verbosity(logging.ERROR)  # the row says what happened
        try:
            run(job.config, Launch(str(workdir), job.preset, quiet=True, fault=fault))
            return ""
        except Interrupted:
            if read_rows(workdir, LEDGER_PREFIX)[-1]["event"] == "preempted":  # the harness was asked to stop
                raise
        except _FAILURES as error:
            return f"{type(error).__name__}: {error}".splitlines()[0]
        finally:
            logging.set_verbosity(verbosity)
    return "interrupted too often"


def signalled(job: Job, workdir: pathlib.Path, kind: str, rng: random.Random) -> Outcome:
    """kill, term: of one process."""
    return _restarted(job, workdir, rng, signal.SIGKILL if kind == "kill" else signal.SIGTERM)


def _restarted(job: Job, workdir: pathlib.Path, rng: random.Random, number: int, first: tuple[int, int | None] = (1, None),
               then: tuple[int, int | None] = (1, None)) -> Outcome:
    """A signal to a job of (processes, devices each), which then goes on as another."""
    moment = faults.draw_moment(rng, job.config.train.steps, job.config.checkpoint.every_steps)
    log, limit = workdir.parent / f"{workdir.name}.log", job.seconds()
    with faults.Watch(workdir) as watch:
        process = faults.Process(job.command(workdir, first[0]), job.environment(first[1]), log)
        try:
            if not faults.until(moment, watch, workdir, process.running, limit):
                raise Missed
            step = watch.step
            watch.hit()
            if number == signal.SIGKILL:
                process.kill()
            else:
                os.kill(process.pid, number)
            code, codes = process.wait(limit), []
            if code == EXIT_DONE:
                raise Missed
            while len(codes) < faults.LAUNCHES and (not codes or codes[-1] == EXIT_INTERRUPTED):
                process = faults.Process(job.command(workdir, then[0]), job.environment(then[1]), log)
                codes.append(process.wait(limit))
        finally:
            if process.running():
                process.kill()
    survived, equal = judge(job, workdir, job.reference)
    clean = number == signal.SIGKILL or code == EXIT_INTERRUPTED
    note = "" if clean and codes[-1] == EXIT_DONE else f"ended with {code}, then {codes}"
    return Outcome(f"{signal.Signals(number).name} at {moment}", step, survived and not note, equal, True,
                   _lost(step, watch.resumed), watch.recover_seconds, note)


def _lost(step: int, resumed: int | None) -> int:
    return step if resumed is None else max(0, step - resumed)


def resized(job: Job, workdir: pathlib.Path, _: str, rng: random.Random) -> Outcome:
    """Goes on with other numbers of processes and devices each."""
    rows = job.config.train.batch_size // job.config.train.microbatches
    worlds = [(processes, devices) for processes, devices in ((1, 1), (1, 2), (1, 4), (2, 1), (2, 2))
              if rows % (processes * devices) == 0]
    if jax.default_backend() != "cpu" or len(worlds) < 2:
        raise InputError("--faults", "resize needs a CPU, and a batch that can be divided", "leave resize out")
    first, then = rng.sample(worlds, 2)
    number = rng.choice((signal.SIGKILL, signal.SIGTERM))
    outcome = _restarted(job, workdir, rng, number, first, then)
    far = _loss_difference(job, workdir)
    exact = job.config.model.compute_dtype == "float32"
    note = outcome.note or ("" if far <= LOSS_TOLERANCE or not exact else f"the losses differ by {far:.1e}")
    return dataclasses.replace(
        outcome, what=f"{outcome.what}, processes x devices {first[0]} x {first[1]} -> {then[0]} x {then[1]}",
        survived=outcome.survived and not note, bitwise_expected=False, note=note)


def _loss_difference(job: Job, workdir: pathlib.Path, steps: int = 5) -> float:
    """Of the first steps after the last start from the undisturbed run, the largest; relative where losses are above 1."""
    losses = [{row["step"]: float(row["loss"]) for row in read_rows(path, METRICS_PREFIX) if "set" not in row}
              for path in (workdir, job.reference)]
    begun = faults.starts(workdir)[-1]
    return max((abs(losses[0][step] - loss) / max(1.0, loss) for step, loss in losses[1].items()
                if begun < step <= begun + steps and step in losses[0]), default=0.0)


def damaged(job: Job, workdir: pathlib.Path, kind: str, rng: random.Random) -> Outcome:
    """flip, truncate, delete: in the newest checkpoint of a run that was stopped."""
    shutil.copytree(job.stopped, workdir)
    newest = max(int(path.name) for path in (workdir / CHECKPOINTS).iterdir() if path.name.isdigit())
    what = faults.damage(kind, workdir / CHECKPOINTS / str(newest), rng)
    with faults.Watch(workdir) as watch:
        watch.hit()
        note = in_this_process(job, workdir)
    survived, equal = judge(job, workdir, job.reference)
    return Outcome(f"checkpoint {newest}: {what}", newest, survived and not note, equal, True, _lost(newest, watch.resumed),
                   watch.recover_seconds, note)


def poisoned(job: Job, workdir: pathlib.Path, kind: str, rng: random.Random) -> Outcome:
    """nan, spike: bad batches that the guard must see; odd trials have lasting ones."""
    lasting, guard, steps = int(workdir.name.rsplit("-", 1)[1]) % 2 == 1, job.config.guard, job.config.train.steps
    count = guard.patience if kind == "spike" else 1
    earliest = max(guard.window + 1, int(0.6 * steps)) if kind == "spike" else 1  # where the loss is flat enough to see one
    if earliest > steps - count:
        raise InputError("train.steps", f"{steps} leaves no room for a {kind} after guard.window={guard.window}",
                         "set more steps")
    first = rng.randint(earliest, steps - count)
    bad = faults.BadBatches(kind, first, count, job.config.train.batch_size, lasting, rng.randrange(2**31))
    note = in_this_process(job, workdir, bad)
    back = [row for row in read_rows(workdir, LEDGER_PREFIX) if row["event"] == "rolled_back"]
    survived, equal = judge(job, workdir, job.reference)
    note = note or ("" if back else "the guard saw nothing")
    what = f"{'lasting' if lasting else 'passing'} {kind} in step {first}"
    lost = max((row["at"] - row["step"] for row in back), default=0)
    return Outcome(what, first, survived and not note, equal, not lasting, lost, bad.recover_seconds, note)


def disk_full(job: Job, workdir: pathlib.Path, _: str, rng: random.Random) -> Outcome:
    """The disk is full from some step on, over a save at least, and then has room again."""
    steps, every = job.config.train.steps, job.config.checkpoint.every_steps
    checkpoints = [path for path in (job.reference / CHECKPOINTS).iterdir() if path.name.isdigit()]
    begins = rng.randrange(1, max(2, steps - every))
    ends = begins + every * rng.choice((1, 2))
    with faults.Disk(workdir, max(map(faults.size_of, checkpoints))) as disk:

        def at(step: int, _: int, batch: Mapping) -> Mapping:
            if begins <= step < ends:
                disk.fill()
            else:
                disk.free()
            return batch

        note = in_this_process(job, workdir / "run", at)
        survived, equal = judge(job, workdir / "run", job.reference)
        alarms = [row for row in read_rows(workdir / "run", LEDGER_PREFIX) if row["event"] == "alarm"]
        resumed = faults.starts(workdir / "run")[1:]
    if survived and equal and not note and not alarms:
        raise Missed  # the one save in that time was written before the disk filled, or after it had room again
    return Outcome(f"no room ({disk.kind}) from step {begins} to {ends}", begins, survived and not note, equal, True,
                   max((begins - step for step in resumed), default=0), 0.0, note)


def host(job: Job, workdir: pathlib.Path, kind: str, rng: random.Random) -> Outcome:
    """host_kill, host_hang: one process of a supervised job of two."""
    moment = faults.draw_moment(rng, job.config.train.steps, job.config.checkpoint.every_steps)
    victim, limit = rng.randrange(2), job.seconds()
    with faults.Watch(workdir) as watch:
        process = faults.Process(job.command(workdir, 2), job.environment(1), workdir.parent / f"{workdir.name}.log")
        try:
            if not faults.until(moment, watch, workdir, process.running, limit):
                raise Missed
            step = watch.step
            watch.hit()
            os.kill(process.members()[victim], signal.SIGKILL if kind == "host_kill" else signal.SIGSTOP)
            code = process.wait(limit)
        finally:
            if process.running():
                process.kill()
    if watch.resumed is None and code == EXIT_DONE:
        raise Missed
    survived, equal = judge(job, workdir, job.pair)
    alarms = [row["reason"] for row in read_rows(workdir, LEDGER_PREFIX) if row["event"] == "alarm"]
    named = any(f"process {victim} (" in reason for reason in alarms)
    note = f"ended with {code}" if code != EXIT_DONE else "" if named else "the lost process was not named"
    return Outcome(f"process {victim} at {moment}", step, survived and not note, equal, True, _lost(step, watch.resumed),
                   watch.recover_seconds, note)


FAULTS: dict[str, Callable[[Job, pathlib.Path, str, random.Random], Outcome]] = {
    "kill": signalled, "term": signalled, "flip": damaged, "truncate": damaged, "delete": damaged, "nan": poisoned,
    "spike": poisoned, "disk_full": disk_full, "resize": resized, "host_kill": host, "host_hang": host,
}
