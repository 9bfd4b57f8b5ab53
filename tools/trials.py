"""The trials of tools.chaos: one function a kind of fault, which runs a job with the fault and says how it went."""

import dataclasses
import os
import pathlib
import random
import signal
import time
from typing import Any, Callable, Mapping

import jax
from absl import logging
from etils import epath

from research.errors import Diverged, InputError, Interrupted
from research.schema import CHECKPOINTS, EXIT_DONE, EXIT_INTERRUPTED, LEDGER_PREFIX, METRICS_PREFIX, Config
from research.training.loop import Launch, run
from research.training.manifest import BrokenStep, check_step, saved_steps
from research.training.workdir import read_rows
from tools import faults

LOSS_TOLERANCE = 1e-5  # nats/token, of a resize in float32
DRIFT = 3.0  # times what rounding does to undisturbed runs
PAIR = (2, 1)  # processes and devices each, of host_kill and host_hang
_FAILURES = (Diverged, InputError, OSError, RuntimeError, ValueError)


@dataclasses.dataclass(frozen=True)
class Job:
    """What is run: a config by its name and assignments, and where. `reference`: the undisturbed run in this process."""

    name: str
    preset: Config
    config: Config
    assignments: tuple[str, ...]
    home: pathlib.Path
    heartbeat: float
    seed: int

    @property
    def reference(self) -> pathlib.Path:
        return self.home / "reference"

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
    """(survived, bitwise equal). A run has survived that shows every step once and leaves a good checkpoint of the last."""
    result, wanted, steps = faults.result_of(workdir), faults.result_of(reference), job.config.train.steps
    survived = result is not None and faults.steps_once(workdir, steps)
    if survived:
        try:
            check_step(epath.Path(workdir) / CHECKPOINTS / str(steps), steps)
        except BrokenStep as error:
            logging.warning("%s: %s", workdir, error)
            survived = False
    equal = survived and all(result[name] == wanted[name] for name in ("params_sha256", "final_eval_loss", "steps"))
    return survived, equal


def undisturbed(job: Job, world: tuple[int, int]) -> pathlib.Path:
    """The undisturbed run of a job of (processes, devices each), which is made first where it isn't there yet."""
    workdir = job.home / "reference-{}x{}".format(*world)
    if faults.result_of(workdir) is None:
        logging.info("the undisturbed run of %d processes x %d devices", *world)
        log = job.home / f"{workdir.name}.log"
        process = faults.Process(job.command(workdir, world[0]), job.environment(world[1]), log)
        try:
            code = process.wait(job.seconds())
        finally:
            if process.running():
                process.kill()
        if code != EXIT_DONE:
            raise InputError("--config", f"the undisturbed run in {workdir} ended with {code}", f"see {log}")
    return workdir


def in_this_process(job: Job, workdir: pathlib.Path, fault: Any = None) -> str:
    """Runs the job to its end, again after each 75; what went wrong, or nothing."""
    for _ in range(faults.LAUNCHES):
        try:
            _launch(job, workdir, fault)
            return ""
        except Interrupted:
            if read_rows(workdir, LEDGER_PREFIX)[-1]["event"] == "preempted":  # the harness was asked to stop
                raise
        except _FAILURES as error:
            return f"{type(error).__name__}: {error}".splitlines()[0]
    return "interrupted too often"


def _launch(job: Job, workdir: pathlib.Path, fault: Any) -> None:
    """Without a word: the trial's row says what happened."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        run(job.config, Launch(str(workdir), job.preset, quiet=True, fault=fault))
    finally:
        logging.set_verbosity(verbosity)


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
    """Goes on with other numbers of processes and devices each; compared with the undisturbed runs in both (`departure`)."""
    rows = job.config.train.batch_size // job.config.train.microbatches
    worlds = [(processes, devices) for processes, devices in ((1, 1), (1, 2), (1, 4), (2, 1), (2, 2))
              if rows % (processes * devices) == 0]
    if jax.default_backend() != "cpu" or len(worlds) < 2:
        raise InputError("--faults", "resize needs a CPU, and a batch that can be divided", "leave resize out")
    first, then = rng.sample(worlds, 2)
    number = rng.choice((signal.SIGKILL, signal.SIGTERM))
    before, after = undisturbed(job, first), undisturbed(job, then)
    outcome = _restarted(job, workdir, rng, number, first, then)
    note = outcome.note or departure(workdir, before, after, job.config.model.compute_dtype == "float32")
    return dataclasses.replace(
        outcome, what=f"{outcome.what}, processes x devices {first[0]} x {first[1]} -> {then[0]} x {then[1]}",
        survived=outcome.survived and not note, bitwise_expected=False, note=note)


def departure(workdir: pathlib.Path, before: pathlib.Path, after: pathlib.Path, exact: bool) -> str:
    """How a resized run departs from the undisturbed run `before`, of the world that it began in, at any step after its last
    start; nothing where it doesn't. `after` is the undisturbed run of the world that it went on in.

    Every step has as many counted tokens. Its loss, where `exact` (float32), is within LOSS_TOLERANCE or DRIFT times what has
    by then come between `before` and `after`: worlds round differently, and training amplifies that. As measured, 1 device and
    4 stay within 4e-6 over 300 steps of `debug`; on `quickstart` 1 and 2 do so for 55 steps and are 5e-4 apart at step 57 and
    5e-2 at 121 (another batch changes the loss by 0.2). A run that changes worlds later has had less time to come apart.
    """
    found, wanted, other = ({row["step"]: row for row in read_rows(path, METRICS_PREFIX) if "set" not in row}
                            for path in (workdir, before, after))
    begun, apart = faults.starts(workdir)[-1], 0.0
    for step in sorted(found.keys() & wanted.keys() & other.keys()):
        loss, tokens = float(wanted[step]["loss"]), wanted[step]["weight"]
        apart = max(apart, abs(float(other[step]["loss"]) - loss))
        far = abs(float(found[step]["loss"]) - loss)
        if step > begun and found[step]["weight"] != tokens:
            return f"step {step} counts {found[step]['weight']:.0f} tokens, {tokens:.0f} undisturbed"
        if step > begun and exact and not far <= max(LOSS_TOLERANCE, DRIFT * apart):
            return f"the loss of step {step} is off by {far:.1e}"
    return ""


def damaged(job: Job, workdir: pathlib.Path, kind: str, rng: random.Random) -> Outcome:
    """flip, truncate, delete: in a saved step, three times in four the newest, of a run that then starts again. It was stopped
    before, so that the newest is where it stopped; or it ends without another save, while one is being written.

    From the second save on: a run whose only step is broken rightly doesn't start.
    """
    steps, every = job.config.train.steps, job.config.checkpoint.every_steps
    moment, done = faults.draw_moment(rng, steps, every, first=every + 1), []

    def strike() -> None:
        *older, newest = saved_steps(epath.Path(workdir) / CHECKPOINTS)
        step = rng.choice(older) if older and rng.random() < 1 / 4 else newest
        try:
            done.append(f"checkpoint {step}: {faults.damage(kind, workdir / CHECKPOINTS / str(step), rng)}")
        except (FileNotFoundError, IndexError):  # just deleted by the save that is being written
            raise Missed from None

    def stop(step: int, _: int, batch: Mapping) -> Mapping:
        if moment.in_save and step == moment.step + 1:
            time.sleep(moment.delay)
            strike()
            raise Interrupted("by a fault")
        if not moment.in_save and step == moment.step:
            done.append("")
            os.kill(os.getpid(), signal.SIGTERM)
        return batch

    try:
        _launch(job, workdir, stop)
        raise Missed
    except Interrupted:
        if not done:  # the harness was asked to stop
            raise
    if not moment.in_save:
        strike()
    with faults.Watch(workdir) as watch:
        watch.hit()
        note = in_this_process(job, workdir)
    survived, equal = judge(job, workdir, job.reference)
    return Outcome(f"at {moment}: {done[-1]}", moment.step, survived and not note, equal, True,
                   _lost(moment.step, watch.resumed), watch.recover_seconds, note)


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
    ends = min(steps, begins + every * rng.choice((1, 2)))  # the last step is saved
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
            try:
                os.kill(process.members()[victim], signal.SIGKILL if kind == "host_kill" else signal.SIGSTOP)
            except ProcessLookupError:  # it has just ended, and its supervisor has seen that
                raise Missed from None
            code = process.wait(limit)
        finally:
            if process.running():
                process.kill()
    if watch.resumed is None and code == EXIT_DONE:
        raise Missed
    survived, equal = judge(job, workdir, undisturbed(job, PAIR))
    alarms = [row["reason"] for row in read_rows(workdir, LEDGER_PREFIX) if row["event"] == "alarm"]
    named = any(f"process {victim} (" in reason for reason in alarms)
    note = f"ended with {code}" if code != EXIT_DONE else "" if named else "the lost process was not named"
    return Outcome(f"process {victim} at {moment}", step, survived and not note, equal, True, _lost(step, watch.resumed),
                   watch.recover_seconds, note)


FAULTS: dict[str, Callable[[Job, pathlib.Path, str, random.Random], Outcome]] = {
    "kill": signalled, "term": signalled, "flip": damaged, "truncate": damaged, "delete": damaged, "nan": poisoned,
    "spike": poisoned, "disk_full": disk_full, "resize": resized, "host_kill": host, "host_hang": host,
}
