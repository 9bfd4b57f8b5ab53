"""Runs a job of several processes on this machine, and starts it again when one of them is lost:

    python -m tools.supervise --processes=2 -- python -m experiments.train --config=quickstart --workdir=runs/pair

What a cluster's restart policy does on a real one. Each process gets JAX_COORDINATOR_ADDRESS (a free port),
JAX_NUM_PROCESSES and JAX_PROCESS_ID; its lines begin with its number. Once one has ended by anything but 0, the others
get `--grace` seconds to end by themselves (half of it after a 75: by then the fault is known to them), then they are killed,
and all start again, at most `--max_restarts` times. Not after bad input (2) or a guard that gave up (3), and not once
SIGTERM or SIGINT came, which all processes are sent. The exit code is the job's: 0 if all end with 0, else that of the
process that ended first, or 75 if that was killed.
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

from experiments import command_line
from research.errors import Diverged, InputError
from research.schema import EXIT_DONE, EXIT_INTERRUPTED

flags.DEFINE_integer("processes", 2, "Processes of the job.", lower_bound=1)
flags.DEFINE_integer("max_restarts", 20, "Give up after so many restarts, with the job's last exit code.", lower_bound=0)
flags.DEFINE_float("grace", 20.0, "Seconds that the others have to end by themselves after a fault of one; half of it after "
                   "a 75.", lower_bound=0.0)
flags.adopt_module_key_flags(command_line)
FLAGS = flags.FLAGS

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


def wait(job: Sequence[subprocess.Popen], grace: float, asked: Sequence[int]) -> int:
    """The job's exit code, when none of its processes is left. Sends them the signals that come into `asked`; kills those
    that stay after a fault."""
    forwarded, code, deadline = 0, EXIT_DONE, None
    while True:
        running = [process for process in job if process.poll() is None]
        for number in asked[forwarded:]:
            forwarded += 1
            for process in running:
                process.send_signal(number)
        for index, process in enumerate(job):
            if code == EXIT_DONE and process.poll() not in (None, EXIT_DONE):
                code = process.returncode
                deadline = None if asked else time.monotonic() + (grace / 2 if code == EXIT_INTERRUPTED else grace)
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


def supervise(command: Sequence[str], processes: int, max_restarts: int, grace: float, asked: Sequence[int]) -> int:
    """Runs `command` as a job of `processes` until it is done, can't be helped or was sent a signal; its exit code.

    Raises:
      InputError: the command doesn't exist.
    """
    restarts = 0
    while True:
        try:
            job, copiers = launch(command, processes, os.environ)
        except OSError as error:
            raise InputError("--", f"{command[0]} can't be run ({error.strerror})", "name a program after --") from None
        try:
            code = wait(job, grace, asked)
        finally:
            for process in job:
                if process.poll() is None:
                    _kill(process)
            for copier in copiers:
                copier.join(timeout=5)
        if code == EXIT_DONE or code in _FINAL or asked:
            return code
        if restarts == max_restarts:
            logging.warning("gave up after %d restarts", restarts)
            return code
        restarts += 1
        logging.warning("the job ended with %d; restart %d of at most %d", code, restarts, max_restarts)


def main(arguments: list[str]) -> int:
    if len(arguments) < 2:
        raise InputError("--", "no command", "e.g. python -m tools.supervise --processes=2 -- python -m experiments.train ...")
    asked: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: asked.append(number))
    return supervise(arguments[1:], FLAGS.processes, FLAGS.max_restarts, FLAGS.grace, asked)


if __name__ == "__main__":
    command_line.run(main, arguments=True)
