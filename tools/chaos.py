"""Does a run of yours survive? The job once undisturbed, then again and again with a fault at a random moment:

    python -m tools.chaos --config=quickstart --set train.steps=200 --trials=20 --minutes=60 --workdir=runs/chaos [--json]

  kill term            SIGKILL or SIGTERM to the process, at a step or in the middle of a save; started again
  flip truncate delete a bit, the end or the whole of a file of the newest checkpoint; started again
  nan spike            bad batches: passing ones (the end must be bitwise equal), in odd trials lasting ones (they are skipped)
  disk_full            no room for some saves (a tmpfs, or a limit on the size of files where mounting isn't allowed)
  resize               killed or stopped, then continued on other numbers of devices and processes: each of the next losses
                       within 1e-5 of the undisturbed run's
  host_kill host_hang  SIGKILL or SIGSTOP to one process of two; tools.supervise starts them again

Each trial is decided by --seed, its fault and its number, and is a line of WORKDIR/trials.jsonl: the same command goes on where it
stopped, with more --trials too. `survived`: the run finished and its metrics show every step once. bitwise_equal: also the
parameters and the final loss have the bits of the undisturbed run; bitwise_expected: they should. steps_lost and
recover_seconds (from the fault to the next step) are those of the worst trial. Faults that need no new process run in this one.
"""

import dataclasses
import json
import os
import pathlib
import random
import shutil
import signal
import sys
import time
from typing import Any, Callable, Mapping, Sequence

import jax
from absl import flags, logging
from tqdm import tqdm

from experiments import command_line
from research.config import nearest, override, parse_assignments
from research.errors import Diverged, InputError, Interrupted
from research.schema import CHECKPOINTS, EXIT_DONE, EXIT_INTERRUPTED, HEARTBEAT, LEDGER_PREFIX, METRICS_PREFIX, Config
from research.training.loop import Launch, run
from research.training.workdir import read_rows, write_json
from tools import faults

command_line.define_config_flags()
command_line.define_json_flag()
flags.DEFINE_string("workdir", "runs/chaos", "Directory of the undisturbed runs and of the trials.")
flags.DEFINE_list("faults", None, "Which faults; default: all.")
flags.DEFINE_integer("trials", 2, "Trials of each fault, with those that are there already.", lower_bound=1)
flags.DEFINE_float("minutes", None, "Begin no further trial after so long (exit code 75); the next call goes on.", lower_bound=0.0)
flags.DEFINE_integer("seed", 0, "Of the moments and places of the faults.")
flags.DEFINE_float("heartbeat", HEARTBEAT, "Of the jobs of two processes.", lower_bound=0.5)
flags.adopt_module_key_flags(command_line)
FLAGS = flags.FLAGS

TRIALS_FILE, JOB_FILE = "trials.jsonl", "job.json"
LOSS_TOLERANCE = 1e-5  # relative to losses above 1; of a resize, in float32
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
            others = [word for word in os.environ["XLA_FLAGS"].split() if "device_count" not in word] if "XLA_FLAGS" in os.environ else []
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
    """The run was over before the moment came."""


def cache_of(home: pathlib.Path) -> str:
    return os.environ["RUNG_CACHE"] if "RUNG_CACHE" in os.environ else str(home / "cache")


def assignments_for(config: Config, given: Mapping[str, str]) -> dict[str, str]:
    """What the harness needs besides `given`, all of it free to change: every step logged, saves by steps, a guard that
    knows the loss before a short run ends."""
    steps = config.train.steps
    wanted = {"train.log_every": "1", "checkpoint.every_minutes": "0", "guard.window": str(min(128, max(8, steps // 4))),
              "guard.rollback_steps": str(min(100, steps // 8)), "guard.skip_batches": str(min(200, max(1, steps // 10)))}
    if not config.checkpoint.every_steps:
        wanted["checkpoint.every_steps"] = str(max(1, steps // 10))
    return {**wanted, **given}


def prepare(job: Job, wanted: Sequence[str]) -> None:
    """The undisturbed runs that the faults need, where they aren't there yet."""
    if faults.result_of(job.reference) is None:
        logging.info("the undisturbed run")
        run(job.config, Launch(str(job.reference), job.preset, quiet=True))
    if set(wanted) & {"host_kill", "host_hang"} and faults.result_of(job.pair) is None:
        logging.info("the undisturbed run of two processes")
        _finish(job, faults.Process(job.command(job.pair, 2), job.environment(1), job.home / "pair.log"), job.pair)
    if set(wanted) & {"flip", "truncate", "delete"} and not job.stopped.exists():
        logging.info("a run that stops after 70% of the steps")
        begun, target = job.home / "stopped-begun", max(1, int(0.7 * job.config.train.steps))
        shutil.rmtree(begun, ignore_errors=True)

        def stop(step: int, _: int, batch: Mapping) -> Mapping:
            if step == target:
                os.kill(os.getpid(), signal.SIGTERM)
            return batch

        try:
            run(job.config, Launch(str(begun), job.preset, quiet=True, fault=stop))
        except Interrupted:
            begun.rename(job.stopped)


def _finish(job: Job, process: faults.Process, workdir: pathlib.Path) -> None:
    code = process.wait(job.seconds())
    if code != EXIT_DONE:
        raise InputError("--config", f"the undisturbed run ended with {code}", f"see {workdir.with_suffix('.log')} and the ledger")


def judge(job: Job, workdir: pathlib.Path, reference: pathlib.Path) -> tuple[bool, bool]:
    """(survived, bitwise equal)."""
    result, wanted = faults.result_of(workdir), faults.result_of(reference)
    survived = result is not None and faults.steps_once(workdir, job.config.train.steps)
    equal = survived and all(result[name] == wanted[name] for name in ("params_sha256", "final_eval_loss", "steps"))
    return survived, equal


def in_this_process(job: Job, workdir: pathlib.Path, fault: Any = None) -> str:
    """Runs the job to its end, again after each 75; what went wrong, or nothing."""
    for _ in range(faults.LAUNCHES):
        try:
            run(job.config, Launch(str(workdir), job.preset, quiet=True, fault=fault))
            return ""
        except Interrupted:
            if read_rows(workdir, LEDGER_PREFIX)[-1]["event"] == "preempted":  # the harness was asked to stop
                raise
        except _FAILURES as error:
            return f"{type(error).__name__}: {error}".splitlines()[0]
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
            for pid in process.members() if first[0] > 1 and number == signal.SIGKILL else [process.pid]:
                os.kill(pid, number)
            if first[0] > 1 and number == signal.SIGKILL:
                os.kill(process.pid, signal.SIGTERM)  # the supervisor starts no others
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
    earliest = guard.window + 1 if kind == "spike" else 1
    if earliest > steps - count:
        raise InputError("train.steps", f"{steps} leaves no room for a {kind} after guard.window={guard.window}", "set more steps")
    first = rng.randint(earliest, steps - count)
    bad = faults.BadBatches(kind, first, count, job.config.train.batch_size, lasting, rng.randrange(2**31))
    note = in_this_process(job, workdir, bad)
    back = [row for row in read_rows(workdir, LEDGER_PREFIX) if row["event"] == "rolled_back"]
    survived, equal = judge(job, workdir, job.reference)
    note = note or ("" if back else "the guard saw nothing")
    return Outcome(f"{'lasting' if lasting else 'passing'} {kind} in step {first}", first, survived and not note, equal, not lasting,
                   max((row["at"] - row["step"] for row in back), default=0), bad.recover_seconds, note)


def disk_full(job: Job, workdir: pathlib.Path, _: str, rng: random.Random) -> Outcome:
    """The disk is full from some step on, over a save at least, and then has room again."""
    steps, every = job.config.train.steps, job.config.checkpoint.every_steps
    checkpoints = [path for path in (job.reference / CHECKPOINTS).iterdir() if path.name.isdigit()]
    begins = rng.randrange(1, max(2, steps - every))
    ends = begins + every * rng.choice((1, 2))
    with faults.Disk(workdir, max(map(faults.size_of, checkpoints))) as disk:

        def at(step: int, _: int, batch: Mapping) -> Mapping:
            if step == begins:
                disk.fill()
            if step == ends:
                disk.free()
            return batch

        note = in_this_process(job, workdir / "run", at)
        survived, equal = judge(job, workdir / "run", job.reference)
        alarms = [row for row in read_rows(workdir / "run", LEDGER_PREFIX) if row["event"] == "alarm"]
        resumed = faults.starts(workdir / "run")[1:]
    note = note or ("" if alarms else "no save failed")
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
    named = [row for row in read_rows(workdir, LEDGER_PREFIX) if row["event"] == "alarm" and f"process {victim} (" in row["reason"]]
    note = f"ended with {code}" if code != EXIT_DONE else "" if named else "the lost process was not named"
    return Outcome(f"process {victim} at {moment}", step, survived and not note, equal, True, _lost(step, watch.resumed),
                   watch.recover_seconds, note)


FAULTS: dict[str, Callable[[Job, pathlib.Path, str, random.Random], Outcome]] = {
    "kill": signalled, "term": signalled, "flip": damaged, "truncate": damaged, "delete": damaged, "nan": poisoned,
    "spike": poisoned, "disk_full": disk_full, "resize": resized, "host_kill": host, "host_hang": host,
}


def trial(job: Job, fault: str, number: int, seed: int) -> dict[str, Any]:
    """One row. The run's directory stays where something is wrong."""
    for attempt in range(10):
        workdir = job.home / f"{fault}-{number}"
        log = job.home / f"{workdir.name}.log"
        shutil.rmtree(workdir, ignore_errors=True)
        log.unlink(missing_ok=True)
        try:
            outcome = FAULTS[fault](job, workdir, fault, random.Random(f"{seed}/{fault}/{number}/{attempt}"))
            break
        except Missed:
            logging.info("%s %d: the run was over before the moment came; another moment", fault, number)
    else:
        raise InputError("train.steps", f"{job.config.train.steps} are over before a fault can come", "set more steps")
    if outcome.survived and (outcome.bitwise_equal or not outcome.bitwise_expected):
        shutil.rmtree(workdir, ignore_errors=True)
        log.unlink(missing_ok=True)
    return {"fault": fault, "trial": number, "seed": seed, "attempt": attempt, **dataclasses.asdict(outcome)}


def summary(rows: Sequence[Mapping[str, Any]], wanted: Sequence[str]) -> dict[str, dict[str, Any]]:
    """By fault: counts, and the worst trial's steps lost and seconds to recover."""
    table = {}
    for fault in wanted:
        found = [row for row in rows if row["fault"] == fault]
        counts = {name: sum(row[name] for row in found) for name in ("survived", "bitwise_equal", "bitwise_expected")}
        seconds = [row["recover_seconds"] for row in found if row["recover_seconds"] is not None]
        table[fault] = {"trials": len(found), **counts, "steps_lost": max((row["steps_lost"] for row in found), default=None),
                        "recover_seconds": round(max(seconds), 2) if seconds else None}
    return table


def make_job(name: str, preset: Config, given: Mapping[str, str], home: pathlib.Path, heartbeat: float) -> Job:
    """Raises InputError where `home` holds trials of another job."""
    assigned = assignments_for(override(preset, given), given)
    job = {"config": name, "set": assigned}
    if (home / JOB_FILE).exists() and (theirs := json.loads((home / JOB_FILE).read_text())) != job:
        raise InputError("--workdir", f"{home} holds trials of another job ({theirs})", "choose another --workdir")
    home.mkdir(parents=True, exist_ok=True)
    write_json(home / JOB_FILE, job)
    assignments = tuple(f"{key}={value}" for key, value in assigned.items())
    return Job(name, preset, override(preset, assigned), assignments, home, heartbeat)


def main(_: list[str]) -> int:
    wanted = FLAGS.faults or list(FAULTS)
    for fault in wanted:
        if fault not in FAULTS:
            raise InputError("--faults", f"unknown {fault!r}", nearest(fault, list(FAULTS)))
    deadline = time.monotonic() + 60 * FLAGS.minutes if FLAGS.minutes is not None else float("inf")
    _, preset = command_line.configured()
    home = pathlib.Path(FLAGS.workdir).expanduser().absolute()
    job = make_job(FLAGS.config, preset, parse_assignments(FLAGS["set"].value), home, FLAGS.heartbeat)
    jax.config.update("jax_compilation_cache_dir", os.path.join(cache_of(home), "xla"))
    prepare(job, wanted)
    rows = read_rows(home, TRIALS_FILE.removesuffix(".jsonl")) if (home / TRIALS_FILE).exists() else []
    done = {(row["fault"], row["trial"]) for row in rows}
    left = [(fault, number) for number in range(FLAGS.trials) for fault in wanted if (fault, number) not in done]
    with tqdm(total=len(left), desc="trials", disable=not sys.stderr.isatty()) as bar:
        while left and time.monotonic() < deadline:
            fault, number = left.pop(0)
            row = trial(job, fault, number, FLAGS.seed)
            rows.append(row)
            with open(home / TRIALS_FILE, "a") as file:
                file.write(json.dumps(row) + "\n")
            bar.update(1)
            logging.info("%s %d: %s; %s, bitwise %s, %d steps lost, %s s%s", fault, number, row["what"],
                         "survived" if row["survived"] else "DID NOT SURVIVE", "equal" if row["bitwise_equal"] else "different",
                         row["steps_lost"], row["recover_seconds"] and round(row["recover_seconds"], 1),
                         f" ({row['note']})" if row["note"] else "")
    table = summary(rows, wanted)
    if FLAGS.json:
        command_line.print_json({"faults": table})
    else:
        head = ["fault", *next(iter(table.values()))]
        command_line.print_table([head, *([fault, *map(str, figures.values())] for fault, figures in table.items())])
    if left:
        raise Interrupted(f"the minutes are over, {len(left)} trials to go; the same command goes on")
    return EXIT_DONE


if __name__ == "__main__":
    command_line.run(main)
