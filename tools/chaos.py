"""Does a run of yours survive? The job once undisturbed, then again and again with a fault at a random moment:

    python -m tools.chaos --config=quickstart --set train.steps=200 --trials=20 --minutes=60 --workdir=runs/chaos [--json]

  kill term            SIGKILL or SIGTERM to the process, at a step or in the middle of a save; started again
  flip truncate delete a bit, the end or the whole of a file of a checkpoint, mostly the newest, after a stop at a step or
                       while the next is being written; started again
  nan spike            bad batches: passing ones (the end must be bitwise equal), in odd trials lasting ones (skipped)
  disk_full            no room for some saves (a tmpfs, or a limit on the size of files where mounting isn't allowed)
  resize               killed or stopped, then continued on other numbers of devices and processes: each later step counts
                       the undisturbed run's tokens, its loss within 1e-5 or what rounding does to whole runs
  host_kill host_hang  SIGKILL or SIGSTOP to one process of two; tools.supervise starts them again

Each trial is decided by --seed, its fault and its number, and is a line of WORKDIR/trials.jsonl: the same command goes on where
it stopped, with more --trials or other --faults too; what is shown is all that the workdir holds. `survived`: the run finished,
its metrics show every step once and the checkpoint of the last step is good. bitwise_equal: also the parameters and the final
loss have the bits of the undisturbed run; bitwise_expected: they should. steps_lost and recover_seconds (from the fault to the
next step) are those of the worst trial, recover_seconds_median the median one's. Faults that need no new process run in this
one.
"""

import dataclasses
import json
import os
import pathlib
import random
import shutil
import statistics
import sys
import time
from typing import Any, Mapping, Sequence

import jax
from absl import flags, logging
from tqdm import tqdm

from experiments import command_line
from research.config import nearest, override, parse_assignments
from research.errors import InputError, Interrupted
from research.schema import EXIT_DONE, HEARTBEAT, Config
from research.training.loop import Launch, run
from research.training.workdir import read_rows, write_json
from tools import faults
from tools.trials import FAULTS, PAIR, Job, Missed, cache_of, undisturbed

command_line.define_config_flags()
command_line.define_json_flag()
# allow_override: tests import this command beside others that have flags of the same names.
flags.DEFINE_string("workdir", "runs/chaos", "Directory of the undisturbed runs and of the trials.", allow_override=True)
flags.DEFINE_list("faults", None, "Which faults; default: all.")
flags.DEFINE_integer("trials", 2, "Trials of each fault, with those that are there already.", lower_bound=1)
flags.DEFINE_float("minutes", None, "Begin no further trial after so long (exit code 75); the next call goes on.",
                   lower_bound=0.0, allow_override=True)
flags.DEFINE_integer("seed", 0, "Of the moments and places of the faults.", allow_override=True)
flags.DEFINE_float("heartbeat", HEARTBEAT, "Of the jobs of two processes.", lower_bound=0.5)
flags.adopt_module_key_flags(command_line)
FLAGS = flags.FLAGS

TRIALS_FILE, JOB_FILE = "trials.jsonl", "job.json"


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
    if set(wanted) & {"host_kill", "host_hang"}:
        undisturbed(job, PAIR)


def trial(job: Job, fault: str, number: int) -> dict[str, Any]:
    """One row. The run's directory stays where something is wrong."""
    for attempt in range(10):
        workdir = job.home / f"{fault}-{number}"
        log = job.home / f"{workdir.name}.log"
        shutil.rmtree(workdir, ignore_errors=True)
        log.unlink(missing_ok=True)
        try:
            outcome = FAULTS[fault](job, workdir, fault, random.Random(f"{job.seed}/{fault}/{number}/{attempt}"))
            break
        except Missed:
            logging.info("%s %d: the run was over before the fault hit; another moment", fault, number)
    else:
        raise InputError("train.steps", f"{job.config.train.steps} are over before a fault can come", "set more steps")
    if outcome.survived and (outcome.bitwise_equal or not outcome.bitwise_expected):
        shutil.rmtree(workdir, ignore_errors=True)
        log.unlink(missing_ok=True)
    return {"fault": fault, "trial": number, "seed": job.seed, "attempt": attempt, **dataclasses.asdict(outcome)}


def summary(rows: Sequence[Mapping[str, Any]], wanted: Sequence[str]) -> dict[str, dict[str, Any]]:
    """By fault, of those that are wanted or have trials: counts, the worst trial's steps lost and seconds to recover, and the
    median of these."""
    table = {}
    for fault in FAULTS:
        found = [row for row in rows if row["fault"] == fault]
        if not found and fault not in wanted:
            continue
        counts = {name: sum(row[name] for row in found) for name in ("survived", "bitwise_equal", "bitwise_expected")}
        seconds = [row["recover_seconds"] for row in found if row["recover_seconds"] is not None]
        table[fault] = {"trials": len(found), **counts, "steps_lost": max((row["steps_lost"] for row in found), default=None),
                        "recover_seconds": round(max(seconds), 2) if seconds else None,
                        "recover_seconds_median": round(statistics.median(seconds), 2) if seconds else None}
    return table


def make_job(name: str, preset: Config, given: Mapping[str, str], home: pathlib.Path, heartbeat: float, seed: int) -> Job:
    """Raises InputError where `home` holds trials of another job, or of this one with another seed or heartbeat."""
    assigned = assignments_for(override(preset, given), given)
    job = {"config": name, "set": assigned, "seed": seed, "heartbeat": heartbeat}
    if (home / JOB_FILE).exists() and (theirs := json.loads((home / JOB_FILE).read_text())) != job:
        raise InputError("--workdir", f"{home} holds trials of another job ({theirs}, not {job})",
                         "choose another --workdir, or those settings")
    home.mkdir(parents=True, exist_ok=True)
    write_json(home / JOB_FILE, job)
    assignments = tuple(f"{key}={value}" for key, value in assigned.items())
    return Job(name, preset, override(preset, assigned), assignments, home, heartbeat, seed)


def trials_in(home: pathlib.Path) -> list[dict[str, Any]]:
    """The rows of the trials that were done. What a kill has left of a line goes, so that the next one begins its own."""
    path = home / TRIALS_FILE
    if not path.exists():
        return []
    os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
    return read_rows(home, TRIALS_FILE.removesuffix(".jsonl"))


def main(_: list[str]) -> int:
    wanted = FLAGS.faults or list(FAULTS)
    for fault in wanted:
        if fault not in FAULTS:
            raise InputError("--faults", f"unknown {fault!r}", nearest(fault, list(FAULTS)))
    deadline = time.monotonic() + 60 * FLAGS.minutes if FLAGS.minutes is not None else float("inf")
    _, preset = command_line.configured()
    home = pathlib.Path(FLAGS.workdir).expanduser().absolute()
    job = make_job(FLAGS.config, preset, parse_assignments(FLAGS["set"].value), home, FLAGS.heartbeat, FLAGS.seed)
    jax.config.update("jax_compilation_cache_dir", os.path.join(cache_of(home), "xla"))
    prepare(job, wanted)
    rows = trials_in(home)
    done = {(row["fault"], row["trial"]) for row in rows}
    left = [(fault, number) for number in range(FLAGS.trials) for fault in wanted if (fault, number) not in done]
    with tqdm(total=len(left), desc="trials", disable=not sys.stderr.isatty()) as bar:
        while left and time.monotonic() < deadline:
            fault, number = left.pop(0)
            row = trial(job, fault, number)
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
        command_line.print_json({"faults": table, "trials": rows})
    else:
        head = ["fault", *next(iter(table.values()))]
        command_line.print_table([head, *([fault, *map(str, figures.values())] for fault, figures in table.items())])
    if left:
        raise Interrupted(f"the minutes are over, {len(left)} trials to go; the same command goes on")
    return EXIT_DONE


if __name__ == "__main__":
    command_line.run(main)
