"""Runs a job of several processes on this machine, and starts it again when one of them is lost:

    python -m tools.supervise --processes=2 -- python -m experiments.train --config=quickstart --workdir=runs/pair

What a cluster's restart policy does on a real one. Each process gets JAX_COORDINATOR_ADDRESS (a free port),
JAX_NUM_PROCESSES and JAX_PROCESS_ID; its lines begin with its number. Once one has ended by anything but 0, the others
get `--grace` seconds to end by themselves (half of it after a 75: by then the fault is known to them), then they are killed,
and all start again: at once, and after a pause that doubles up to a minute while nothing new is saved in the command's
--workdir. A step saved there is progress: `--max_restarts` counts from it (from the beginning, where the command names no
workdir). Not after bad input (2) or a guard that gave up (3), nor after a stop that was asked for: --minutes are over, the disk
is full under checkpoint.on_full=stop (as the run's ledger tells), or SIGTERM or SIGINT, which all processes are sent; they have
`--stop_grace` seconds to save and end. The exit code is the job's: 0 if all end with 0, else that of the process that ended
first, or 75 if that was killed.
"""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import BinaryIO, Mapping, Sequence

from absl import flags, logging
from etils import epath

from experiments import command_line
from research.errors import Diverged, InputError
from research.schema import CHECKPOINTS, EXIT_DONE, EXIT_INTERRUPTED, LEDGER_PREFIX
from research.training.manifest import saved_steps
from research.training.workdir import read_config, read_rows

flags.DEFINE_integer("processes", 2, "Processes of the job.", lower_bound=1)
flags.DEFINE_integer("max_restarts", 20, "Give up after so many restarts without a newly saved step, with the job's last exit "
                     "code.", lower_bound=0)
flags.DEFINE_float("grace", 20.0, "Seconds that the others have to end by themselves after a fault of one; half of it after "
                   "a 75.", lower_bound=0.0)
flags.DEFINE_float("stop_grace", 60.0, "Seconds that all have to save and end after SIGTERM or SIGINT.", lower_bound=0.0)
flags.adopt_module_key_flags(command_line)
FLAGS = flags.FLAGS

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds, before the second restart without progress, and before any
_FINAL = (InputError.exit_code, Diverged.exit_code)  # a restart would end the same way


def launch(command: Sequence[str], processes: int,
           environment: Mapping[str, str]) -> tuple[list[subprocess.Popen], list[threading.Thread]]:
    """Starts the job. Threads copy standard output and error of process i, line by line, to ours, after "[i] "."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    started, copiers = [], []
    for index in range(processes):
        place = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(processes), "JAX_PROCESS_ID": str(index)}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL,
                                   env={**environment, **(place if processes > 1 else {})}, start_new_session=True)
        for source, target in ((process.stdout, sys.stdout), (process.stderr, sys.stderr)):
            copiers.append(threading.Thread(target=_copy, args=(source, target.buffer, f"[{index}] ".encode()), daemon=True))
            copiers[-1].start()
        started.append(process)
        logging.info("process %d is pid %d", index, process.pid)
    return started, copiers


def _copy(source: BinaryIO, target: BinaryIO, prefix: bytes) -> None:
    for line in source:
        target.write(prefix + line if line.endswith(b"\n") else prefix + line + b"\n")
        target.flush()


def wait(job: Sequence[subprocess.Popen], grace: float, stop_grace: float, asked: Sequence[int]) -> int:
    """The job's exit code, when none of its processes is left. Sends them the signals that come into `asked`; kills those
    that stay, `stop_grace` seconds after the first signal or `grace` after a fault."""
    forwarded, code, deadline = 0, EXIT_DONE, None
    while True:
        running = [process for process in job if process.poll() is None]
        for number in asked[forwarded:]:
            deadline = deadline or time.monotonic() + stop_grace
            forwarded += 1
            for process in running:
                process.send_signal(number)
        for index, process in enumerate(job):
            if code == EXIT_DONE and process.poll() not in (None, EXIT_DONE):
                code = process.returncode
                if not asked:
                    deadline = time.monotonic() + (grace / 2 if code == EXIT_INTERRUPTED else grace)
                logging.warning("process %d %s", index, _words(code))
        if not running:
            final = [process.returncode for process in job if process.returncode in _FINAL]
            return final[0] if final else EXIT_INTERRUPTED if code < 0 else code
        if deadline is not None and time.monotonic() > deadline:
            logging.warning("%d of %d processes are still there: killed", len(running), len(job))
            for process in running:
                _kill(process)
            deadline = None
        time.sleep(0.05)


def _kill(process: subprocess.Popen) -> None:
    """With what it has started: each process of the job leads a group of its own. A stopped one dies, too."""
    os.killpg(process.pid, signal.SIGKILL)


def _words(code: int) -> str:
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"


def workdir_of(command: Sequence[str]) -> epath.Path | None:
    """The run directory that the command's --workdir names, if it has one."""
    words = [word.removeprefix("--workdir=") if word.startswith("--workdir=") else after
             for word, after in zip(command, [*command[1:], ""]) if word.split("=")[0] == "--workdir"]
    return epath.Path(words[-1]).expanduser() if words else None


class _Run:
    """What the job tells in its run directory, where the command names one."""

    def __init__(self, workdir: epath.Path | None):
        self._workdir, self._told, self._reached = workdir, 0, 0

    def _newest(self) -> int:
        return max(saved_steps(self._workdir / CHECKPOINTS), default=0) if self._workdir else 0

    def _rows(self) -> list[dict]:
        return read_rows(self._workdir, LEDGER_PREFIX) if self._workdir and self._workdir.exists() else []

    def begin(self) -> None:
        """A launch of the job begins: what the ledger holds by now is of earlier ones."""
        self._told = len(self._rows())

    def got_on(self) -> bool:
        """Has a later step been saved than ever before?"""
        before, self._reached = self._reached, max(self._reached, self._newest())
        return self._reached > before

    def stop_asked_for(self) -> str:
        """Why the launch stopped, in the ledger's words, where its user wants that; nothing where a restart is wanted."""
        for row in self._rows()[self._told:]:
            full = row["event"] == "alarm" and "the disk is full" in row["reason"]
            if (row["event"] == "preempted" and row["reason"] == "minutes are over"
                    or full and read_config(self._workdir).checkpoint.on_full == "stop"):
                return row["reason"]
        return ""


def supervise(command: Sequence[str], processes: int, max_restarts: int, grace: float, stop_grace: float,
              asked: Sequence[int]) -> int:
    """Runs `command` as a job of `processes` until it is done, can't be helped or was asked to stop; its exit code.

    Raises:
      InputError: the command doesn't exist.
    """
    run, restarts = _Run(workdir_of(command)), 0  # since the last progress
    while True:
        run.begin()
        try:
            job, copiers = launch(command, processes, os.environ)
        except OSError as error:
            raise InputError("--", f"{command[0]} can't be run ({error.strerror})", "name a program after --") from None
        try:
            code = wait(job, grace, stop_grace, asked)
        finally:
            for process in job:
                if process.poll() is None:
                    _kill(process)
            for copier in copiers:
                copier.join(timeout=5)
        if code == EXIT_DONE or code in _FINAL or asked:
            return code
        if code == EXIT_INTERRUPTED and (reason := run.stop_asked_for()):
            logging.info("not restarted: %s; the same command goes on", reason)
            return code
        if run.got_on():
            restarts = 0
        if restarts == max_restarts:
            logging.warning("gave up after %d restarts", restarts)
            return code
        pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** min(restarts - 1, 10)) if restarts else 0.0
        restarts += 1
        logging.warning("the job ended with %d; restart %d of at most %d since the last saved step%s", code, restarts,
                        max_restarts, f", in {pause:.0f} s" if pause else "")
        again = time.monotonic() + pause
        while time.monotonic() < again and not asked:
            time.sleep(0.05)
        if asked:
            return code


def main(arguments: list[str]) -> int:
    if len(arguments) < 2:
        raise InputError("--", "no command", "e.g. python -m tools.supervise --processes=2 -- python -m experiments.train ...")
    asked: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: asked.append(number))
    return supervise(arguments[1:], FLAGS.processes, FLAGS.max_restarts, FLAGS.grace, FLAGS.stop_grace, asked)


if __name__ == "__main__":
    command_line.run(main, arguments=True)
