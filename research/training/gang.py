"""Several processes watch each other: one that dies, hangs or is slow is named, and the job ends with 75 to be restarted.

What JAX does by itself, as measured: a process that dies is noticed after 100 s, the coordinator's (process 0) at once; then
every survivor is aborted in C++, with no word of ours about who it was, no ledger line and exit code -6. gloo raises in the
main thread as soon as a connection closes; a process that stands still blocks the others.

So each process has two daemon threads. One tells: every fifth of a heartbeat it puts a beat (phase, step, seconds since either
changed, seconds a step of its own) into the coordinator's key-value store, which needs no further port. The other judges, and
never waits for anything. Process 0 reads all beats and answers with one word that everybody reads (the traffic grows with
the number of processes, not its square):

- No new beat for `heartbeat` seconds: the process is lost (killed, stopped, its host or network gone). Process 0 is judged by
  the others, from the age of its word. Ages are taken on the reader's own monotonic clock.
- A process that ended by an error of its own ends the others, with 2 or 3 where that is its exit code.
- Beats come, but no process gets on: named after one heartbeat as late is who is behind in steps, or still waits for its data
  where the others wait for the devices; the end comes after 12 heartbeats or 20 steps' time, 180 heartbeats in slow phases.
- A process whose time a step outside the collectives (data, host) is over twice the others' and costs a quarter of the step is
  a straggler: named, nothing else. A slow chip can't be told this way, as all wait for it inside the step.

Whoever reads a verdict logs it and leaves by os._exit: the main thread may be inside a collective that never returns. Process
0 writes the ledger's line, process 1 where it is about process 0; it waits a little for the webhook, if there is one, to take
it. JAX's own heartbeat stays, three times as long, for what this can't see (native code that holds Python's lock stops the
beats, so none is expected while the corpus is prepared, and one in twice the time while compiling). Its abort, and the one
that follows when the coordinator dies, become 75 through a handler of SIGABRT if a process is lost; any other abort stays what
it is.
"""

import collections
import contextlib
import ctypes
import dataclasses
import itertools
import json
import math
import os
import signal
import socket
import statistics
import sys
import threading
import time
import traceback
from typing import Any, Iterator, Mapping

import jax
from absl import logging
from etils import epath
from jax._src import distributed  # the coordinator's key-value store has no public name

from research.errors import Diverged, InputError, Interrupted
from research.schema import EXIT_DONE, EXIT_INTERRUPTED, HEARTBEAT
from research.training.goodput import Clock, Goodput
from research.training.mirrors import Announced
from research.training.workdir import Ledger

_SILENT_PHASES = {"initialising": math.inf, "compiling": 2.0}  # heartbeats to wait for a beat; 1 in the others
_STEPPING = ("training", "repeated")
_WORKING = (*_STEPPING, "data_wait")
_LAST_WORDS = 3.0  # seconds at most that a process which leaves waits for the webhook
_LAST_ACCOUNTS = 0.25  # and for goodput.json: its disk may be what hangs
_WINDOW = 20  # steps that medians are taken over
_runs = itertools.count()


@dataclasses.dataclass(frozen=True)
class Beat:
    """What a process says of itself. Times in seconds; `left`: its exit code, once it has one."""

    count: int
    host: str
    phase: str = "initialising"
    step: int = 0
    still: float = 0.0  # since phase or step changed
    own: float = 0.0  # median a step outside the collectives
    pace: float = 0.0  # median a step; both 0 before there are enough steps
    left: int | None = None
    why: str = ""


@dataclasses.dataclass(frozen=True)
class Verdict:
    text: str
    code: int = EXIT_INTERRUPTED


Roll = Mapping[int, tuple[Beat, float]]  # process -> its last beat, and the seconds since it was heard


def name(process: int, beat: Beat) -> str:
    return f"process {process} ({beat.host})"


def lost(roll: Roll, heartbeat: float, *, phases: Mapping[str, float] = _SILENT_PHASES) -> list[int]:
    """Processes that should have beaten."""
    return [process for process, (beat, silence) in sorted(roll.items()) if beat.left is None
            and silence > heartbeat * (phases[beat.phase] if beat.phase in phases else 1.0)]


def behind(roll: Roll) -> list[int]:
    """Whom the others wait for: fewest steps, then not yet waiting for the devices; [] where all are alike."""
    places = {process: (beat.step, beat.phase in _STEPPING) for process, (beat, _) in sorted(roll.items()) if beat.left is None}
    found = [process for process, place in places.items() if place == min(places.values())]
    return found if len(found) < len(places) else []


def standing(roll: Roll, limit: float) -> bool:
    """Has no process got on for `limit` seconds?"""
    stills = [beat.still + silence for beat, silence in roll.values() if beat.left is None]
    return bool(stills) and min(stills) > limit


def judge(roll: Roll, heartbeat: float) -> Verdict | None:
    """The end of the job, if there is a reason for it."""
    for process in lost(roll, heartbeat):
        beat, silence = roll[process]
        return Verdict(f"{name(process, beat)} is lost: no sign of life for {silence:.0f} s, last seen {beat.phase}, "
                       f"step {beat.step}")
    for process, (beat, silence) in sorted(roll.items()):
        if beat.left not in (None, EXIT_DONE) and silence > heartbeat:
            code = beat.left if beat.left in (InputError.exit_code, Diverged.exit_code) else EXIT_INTERRUPTED
            return Verdict(f"{name(process, beat)} ended with {beat.left}: {beat.why}", code)
    here = [beat for beat, _ in roll.values() if beat.left is None]
    if len(here) > 1 and standing(roll, max(_patience(beat, heartbeat) for beat in here)):
        who = ", ".join(name(process, roll[process][0]) for process in behind(roll))
        return Verdict(f"{who} hangs" if who else "no process gets on, none is behind: a device or the network hangs")
    return None


def _patience(beat: Beat, heartbeat: float) -> float:
    if beat.phase == "initialising":
        return math.inf  # a corpus may take hours
    return max(12 * heartbeat, 20 * beat.pace) if beat.phase in _WORKING else 180 * heartbeat


def notices(roll: Roll, heartbeat: float) -> dict[str, str]:
    """What is said once and changes nothing, by what it is about: who is late, who is a straggler."""
    found, here = {}, {process: beat for process, (beat, _) in sorted(roll.items()) if beat.left is None}
    if here and standing(roll, max(heartbeat, 5 * max(beat.pace for beat in here.values()))):
        for process in behind(roll):
            beat, silence = roll[process]
            if beat.phase not in _SILENT_PHASES:
                found[f"late {process} {beat.step}"] = (f"{name(process, beat)} is late: {beat.still + silence:.0f} s in "
                                                        f"{beat.phase}, step {beat.step}; the others wait")
    timed = {process: beat for process, beat in here.items() if beat.pace}
    for process, beat in timed.items():
        others = [other.own for number, other in timed.items() if number != process]
        if others and beat.own > 2 * (usual := statistics.median(others)) and beat.own - usual > 0.25 * beat.pace:
            found[f"straggler {process}"] = (f"{name(process, beat)} is a straggler: {beat.own:.3f} s a step outside "
                                             f"the collectives, the others' median is {usual:.3f} s")
    return found


class Gang:
    """This process's place in a job of several; does nothing in a job of one. Use it around the whole of a run.

    `clock` says the phase. `ledger` and `goodput` are set by the run once there are any (on the first process).
    `announced`: told the alarms of a ledger that this process keeps in another's place.
    """

    def __init__(self, clock: Clock, workdir: epath.Path, heartbeat: float = HEARTBEAT, announced: Announced | None = None):
        self.ledger: Ledger | None = None
        self.goodput: Goodput | None = None
        self._announced = announced or Announced(None, "", "")
        self._clock, self._workdir, self._heartbeat, self._every = clock, workdir, heartbeat, heartbeat / 5
        self._process, self._several = jax.process_index(), jax.process_count() > 1
        self._host, self._step, self._left, self._why = socket.gethostname(), 0, None, ""
        self._times: collections.deque = collections.deque(maxlen=_WINDOW)  # (seconds of a step, those of its own)
        self._began, self._blocked = None, 0.0
        self._heard: dict[int, tuple[Beat, float]] = {}  # process -> beat, when it was heard
        self._word: dict[str, Any] = {"silent": [], "notices": {}}  # what process 0 says
        self._verdict: Verdict | None = None
        self._said: set[str] = set()
        self._leaving, self._told, self._ending = threading.Event(), threading.Event(), threading.Event()

    def step(self, number: int) -> None:
        """The loop begins step `number`."""
        now = time.monotonic()
        if self._began is not None:
            self._times.append((now - self._began, now - self._began - self._blocked))
        self._step, self._began, self._blocked = number, now, 0.0

    @contextlib.contextmanager
    def blocked(self) -> Iterator[None]:
        """Around what may wait for the devices, and so for the other processes."""
        began = time.monotonic()
        yield
        self._blocked += time.monotonic() - began

    def __enter__(self) -> "Gang":
        if self._several:
            self._prefix = f"rung/gang/{next(_runs)}"
            self._on_abort = ctypes.CFUNCTYPE(None, ctypes.c_int)(self._aborting)  # kept: C calls it
            ctypes.CDLL(None).signal(signal.SIGABRT, self._on_abort)
            for work in (self._tell_on, self._judge_on):
                threading.Thread(target=work, name=work.__name__, daemon=True).start()
        return self

    def __exit__(self, _: Any, error: BaseException | None, __: Any) -> None:
        if self._several:
            ours = isinstance(error, (InputError, Diverged, Interrupted))
            self._leave(EXIT_DONE if error is None else error.exit_code if ours else EXIT_INTERRUPTED, str(error))

    def failures(self) -> contextlib.ExitStack:
        """Goes around the run, inside of all that waits for other processes when it is closed.

        A collective fails where another process did: waits for the verdict on that one, or for its silence. Where there is
        neither the fault is this process's, which then leaves without waiting for anybody.
        """
        stack = contextlib.ExitStack()
        stack.push(self._failing)
        return stack

    def _failing(self, _: Any, error: BaseException | None, __: Any) -> None:
        if not self._several or error is None or isinstance(error, (
                InputError, Diverged, Interrupted, KeyboardInterrupt, SystemExit)):
            return
        logging.error("%s; is another process lost?", str(error).strip().splitlines()[0] if str(error) else repr(error))
        if self._ending.wait(self._heartbeat + 3 * self._every):
            threading.Event().wait()  # the judge ends this process
        self._end_if_silent()  # where the judge must be patient: it was lost right after it had compiled
        traceback.print_exception(error)
        self._leave(1, str(error))
        self._exit(1)

    def _leave(self, code: int, why: str) -> None:
        self._left, self._why = code, why
        self._leaving.set()
        self._told.wait(2 * self._every)

    def _tell_on(self) -> None:
        client = distributed.global_state.client
        still, place, since = 0.0, None, time.monotonic()
        for count in itertools.count():
            leaving = self._leaving.wait(self._every if count else 0.0)
            now, phase = time.monotonic(), self._clock.current()
            if (phase, self._step) != place:
                place, since = (phase, self._step), now
            still = now - since
            times = list(self._times)
            pace, own = (statistics.median(column) for column in zip(*times)) if len(times) == _WINDOW else (0.0, 0.0)
            beat = Beat(count, self._host, phase, self._step, still, own, pace, self._left, self._why)
            try:
                self._exchange(client, beat)
            except (RuntimeError, ValueError) as error:  # the judge sees to it
                logging.log_first_n(logging.WARNING, "no answer from the coordinator: %s", 1, str(error).splitlines()[0])
            if leaving:
                self._told.set()
                return

    def _exchange(self, client: Any, beat: Beat) -> None:
        if self._process:
            text = json.dumps(dataclasses.asdict(beat))
            client.key_value_set(f"{self._prefix}/beats/{self._process}", text, allow_overwrite=True)
            for _, text in client.key_value_dir_get(f"{self._prefix}/word/"):
                self._word = json.loads(text)
                self._hear(0, Beat(**self._word["beat"]))
                if self._word["verdict"]:
                    self._end(Verdict(**self._word["verdict"]))
            return
        self._hear(0, beat)
        for key, text in client.key_value_dir_get(f"{self._prefix}/beats/"):
            self._hear(int(key.rsplit("/", 1)[1]), Beat(**json.loads(text)))
        roll = self._roll()
        silent = {process: name(process, roll[process][0]) for process in lost(roll, self._heartbeat, phases={})}
        self._word = {"silent": list(silent.values()), "notices": notices(roll, self._heartbeat)}
        self._publish(client, beat)

    def _publish(self, client: Any, beat: Beat) -> None:
        word = {**self._word, "beat": dataclasses.asdict(beat),
                "verdict": dataclasses.asdict(self._verdict) if self._verdict else None}
        client.key_value_set(f"{self._prefix}/word/all", json.dumps(word), allow_overwrite=True)

    def _hear(self, process: int, beat: Beat) -> None:
        if process not in self._heard or self._heard[process][0].count != beat.count:
            self._heard[process] = beat, time.monotonic()

    def _roll(self) -> dict[int, tuple[Beat, float]]:
        now = time.monotonic()
        return {process: (beat, now - heard) for process, (beat, heard) in self._heard.copy().items()}

    def _judge_on(self) -> None:
        looked = time.monotonic()
        while not self._leaving.wait(self._every):
            now = time.monotonic()
            if now - looked > self._heartbeat / 2:  # this process was the one that stood still: all get their time again
                self._heard = {process: (beat, now) for process, (beat, _) in self._heard.copy().items()}
            looked = now
            for about, text in self._word["notices"].items():
                if about not in self._said:
                    self._said.add(about)
                    logging.warning("%s", text)
                    self._note(text)
            if verdict := judge(self._roll(), self._heartbeat):
                self._witness(verdict)
                self._end(verdict)

    def _end(self, verdict: Verdict) -> None:
        self._ending.set()
        logging.error("%s; process %d (%s) ends with %d", verdict.text, self._process, self._host, verdict.code)
        if self._process == 0:
            # The client may be locked for good: a fatal error of the coordinator's is reported with its lock held.
            watchdog = threading.Timer(5 * self._every, self._exit, [verdict.code])
            watchdog.daemon = True
            watchdog.start()
            self._note(verdict.text)
            self._verdict = verdict
            self._publish(distributed.global_state.client, self._heard[0][0])
            time.sleep(2.5 * self._every)  # for the others to read it: with this process the coordinator goes
            watchdog.cancel()
        self._exit(verdict.code)

    def _witness(self, verdict: Verdict) -> None:
        """In place of process 0, which keeps the ledger and is the one that is lost."""
        if self._process == 1 and self._workdir.exists():
            Ledger(self._workdir, self._announced.ledger_line).write("alarm", self._step, reason=verdict.text)

    def _note(self, text: str) -> None:
        if self.ledger:
            self.ledger.write("alarm", self._step, reason=text)

    def _aborting(self, _: int) -> None:
        """On SIGABRT, in the thread that aborts: leaves with 75 if another process is lost; else returns, and it aborts."""
        if self._left is not None:
            self._exit(self._left or EXIT_INTERRUPTED)
        self._end_if_silent()

    def _end_if_silent(self) -> None:
        """In a process whose collective has failed: names those that give no sign of life, whatever they were doing."""
        address = distributed.global_state.coordinator_address
        host = self._heard[0][0].host if 0 in self._heard else address
        if gone := list(self._word["silent"]) or ([] if _answers(address) else [f"process 0 ({host})"]):
            verdict = Verdict(f"{', '.join(gone)} is lost")
            self._witness(verdict)
            self._end(verdict)

    def _exit(self, code: int) -> None:
        self._announced.wait(_LAST_WORDS)
        if self.goodput:
            self.goodput.close(_LAST_ACCOUNTS)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _answers(address: str) -> bool:
    host, port = address.rsplit(":", 1)
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=2).close()
    except OSError:
        return False
    return True
