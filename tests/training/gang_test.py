"""Who is lost, hangs, is late or slow: the judgement over every case; and a whole job in which one process is killed."""

import dataclasses
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from etils import epath

from research.errors import Diverged, InputError
from research.schema import EXIT_INTERRUPTED
from research.training import gang
from research.training.gang import Beat, Gang, judge, notices
from research.training.goodput import Clock
from research.training.workdir import Ledger, read_rows

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
WELL = Beat(7, "a", "training", 100, still=0.2, own=0.01, pace=0.5)


@pytest.fixture(autouse=True)
def started(devices):
    """JAX looks for its devices before a test takes the coordinator's client away from it."""


def roll(*changes: dict) -> gang.Roll:
    """Process i is on host "a", "b", ...; `silence` is the age of its beat."""
    found = {}
    for i, change in enumerate(changes):
        silence = change.pop("silence", 1.0)
        found[i] = dataclasses.replace(WELL, host="abcd"[i], **change), silence
    return found


# What the processes say -> the words of the verdict and its exit code, or None. The heartbeat is 10 s.
VERDICTS = {
    "all well": (roll({}, {}, {}), None),
    "one beat late": (roll({}, {"silence": 9.9}), None),
    "dead": (roll({}, {"silence": 10.5, "step": 99}),
             ("process 1 (b) is lost: no sign of life for 10 s, last seen training, step 99", 75)),
    "dead while it saves": (roll({"silence": 10.5, "phase": "saving"}, {}), ("process 0 (a) is lost", 75)),
    "compiling holds the lock": (roll({}, {"silence": 19, "phase": "compiling"}), None),
    "dead while it compiles": (roll({}, {"silence": 21, "phase": "compiling"}), ("process 1 (b) is lost", 75)),
    "preparing the corpus": (roll({"silence": 5000, "phase": "initialising"}, {"still": 9999}), None),
    "left in peace": (roll({}, {"left": 0, "silence": 500}), None),
    "just left by an error": (roll({}, {"left": 2, "silence": 3}), None),
    "left by bad input": (roll({}, {"left": 2, "why": "a: b; c", "silence": 11}), ("process 1 (b) ended with 2: a: b; c", 2)),
    "left by the guard": (roll({"left": 3, "why": "nan", "silence": 11}, {}), ("process 0 (a) ended with 3: nan", 3)),
    "left by a bug": (roll({}, {"left": 1, "silence": 11}), ("process 1 (b) ended with 1", 75)),
    "long steps": (roll({"still": 119}, {"still": 119, "step": 99}), None),
    "one hangs": (roll({"still": 121}, {"still": 121, "step": 99}), ("process 1 (b) hangs", 75)),
    "one hangs in its data": (roll({"still": 121}, {"still": 121, "phase": "data_wait"}), ("process 1 (b) hangs", 75)),
    "steps of a minute": (roll({"still": 900, "pace": 60.0}, {"still": 900}), None),
    "all hang": (roll({"still": 121}, {"still": 121}), ("no process gets on, none is behind", 75)),
    "one gets on": (roll({"still": 121}, {"still": 121}, {}), None),
    "a long save": (roll({"still": 1799, "phase": "saving"}, {"still": 1799}), None),
    "a save that hangs": (roll({"still": 1801, "step": 101}, {"still": 1801, "phase": "saving"}), ("process 1 (b) hangs", 75)),
}


@pytest.mark.parametrize("case", VERDICTS)
def test_verdicts(case):
    beats, wanted = VERDICTS[case]
    found = judge(beats, 10.0)
    assert (found is None) == (wanted is None), found
    if found:
        assert found.text.startswith(wanted[0]) and found.code == wanted[1]


NOTICES = {
    "all well": (roll({}, {}, {}), []),
    "late": (roll({"still": 11}, {"still": 10, "step": 98, "phase": "data_wait"}, {"still": 11}),
             ["process 1 (b) is late: 11 s in data_wait, step 98; the others wait"]),
    "long steps": (roll({"still": 11, "pace": 3.0}, {"still": 11, "step": 98}), []),
    "all late": (roll({"still": 11}, {"still": 11}), []),
    "compiling": (roll({"still": 11}, {"still": 11, "step": 0, "phase": "compiling"}), []),
    "straggler": (roll({}, {"own": 0.3}, {}),
                  ["process 1 (b) is a straggler: 0.300 s a step outside the collectives, the others' median is 0.010 s"]),
    "of two": (roll({"own": 0.3}, {}), ["process 0 (a) is a straggler: 0.300 s a step outside the collectives, "
                                        "the others' median is 0.010 s"]),
    "slow, but it costs little": (roll({}, {"own": 0.1}), []),
    "all slow alike": (roll({"own": 0.4}, {"own": 0.3}), []),
    "too few steps yet": (roll({"own": 0.0, "pace": 0.0}, {"own": 0.3}), []),
    "alone": (roll({"own": 0.4}), []),
}


@pytest.mark.parametrize("case", NOTICES)
def test_notices(case):
    beats, wanted = NOTICES[case]
    assert list(notices(beats, 10.0).values()) == wanted


def test_a_job_of_one_watches_nothing(tmp_path):
    with Gang(Clock(), tmp_path) as alone, alone.failures():
        for number in range(1, 25):
            alone.step(number)
            with alone.blocked():
                time.sleep(0.002)
    times = list(alone._times)
    assert len(times) == 20 and all(0 <= own <= whole - 0.002 for whole, own in times)
    with pytest.raises(ZeroDivisionError), Gang(Clock(), tmp_path) as alone, alone.failures():
        1 // 0


class Store:
    """The coordinator's key-value store, in this process."""

    def __init__(self):
        self.values: dict[str, str] = {}

    def key_value_set(self, key: str, value: str, allow_overwrite: bool = False) -> None:
        assert allow_overwrite
        self.values[key] = value

    def key_value_dir_get(self, prefix: str) -> list[tuple[str, str]]:
        return [(key, value) for key, value in self.values.items() if key.startswith(prefix)]


def test_the_word_of_process_0_reaches_the_others(tmp_path, monkeypatch, caplog):
    store, members = Store(), [Gang(Clock(), epath.Path(tmp_path), 10.0) for _ in range(3)]
    for i, member in enumerate(members):
        member._process, member._prefix, member._host = i, "gang", "abc"[i]
    monkeypatch.setattr(gang.distributed.global_state, "client", store)
    monkeypatch.setattr(Gang, "_exit", lambda self, code: sys.exit(code))
    monkeypatch.setattr(gang.time, "sleep", lambda seconds: None)
    for i in (1, 2, 0, 1, 2):
        members[i]._exchange(store, Beat(0, "abc"[i], "training", 5 + i))
    assert sorted(members[0]._heard) == [0, 1, 2] and sorted(members[1]._heard) == [0]  # not everybody reads all
    members[0].ledger = Ledger(epath.Path(tmp_path))
    members[0]._heard[2] = members[0]._heard[2][0], time.monotonic() - 60
    members[0]._exchange(store, Beat(1, "a", "training", 5))
    members[1]._exchange(store, Beat(1, "b", "training", 6))
    assert members[1]._word["silent"] == ["process 2 (c)"]  # what a SIGABRT would be taken for
    verdict = judge(members[0]._roll(), 10.0)
    with pytest.raises(SystemExit, match="75"):
        members[0]._end(verdict)
    with pytest.raises(SystemExit, match="75"):
        members[1]._exchange(store, Beat(2, "b", "training", 6))
    assert caplog.text.count("process 2 (c) is lost: no sign of life for 60 s, last seen training, step 7") == 2
    assert [row["reason"] for row in read_rows(tmp_path, "ledger-")] == [verdict.text]


def test_an_abort_is_75_only_where_a_process_is_lost(tmp_path, monkeypatch):
    monkeypatch.setattr(Gang, "_exit", lambda self, code: sys.exit(code))
    with socket.socket() as coordinator:
        coordinator.bind(("localhost", 0))
        coordinator.listen()
        address = f"localhost:{coordinator.getsockname()[1]}"
        monkeypatch.setattr(gang.distributed.global_state, "coordinator_address", address)
        member = Gang(Clock(), epath.Path(tmp_path), 10.0)
        member._process = 1
        member._aborting(signal.SIGABRT)  # comes back: the abort goes on
        member._word = {"silent": ["process 2 (c)"], "notices": {}}
        with pytest.raises(SystemExit, match="75"):
            member._aborting(signal.SIGABRT)
        member._word = {"silent": [], "notices": {}}
    with pytest.raises(SystemExit, match="75"):
        member._aborting(signal.SIGABRT)
    reasons = [row["reason"] for row in read_rows(tmp_path, "ledger-")]
    assert reasons == ["process 2 (c) is lost", f"process 0 ({address}) is lost"]
    member._left = 3
    with pytest.raises(SystemExit, match="3"):
        member._aborting(signal.SIGABRT)


def test_a_coordinator_that_answers_no_more_keeps_nobody(tmp_path, monkeypatch):
    """Seen where the coordinator's own abort and the judge ended process 0 together: publishing the verdict never returned."""
    left, codes, freed = threading.Event(), [], []

    class Locked(Store):
        def key_value_set(self, key, value, allow_overwrite=False):
            freed.append(left.wait(10))  # locked for good: only the process's end frees it

    def leave(member: Gang, code: int) -> None:
        codes.append(code)
        left.set()

    monkeypatch.setattr(Gang, "_exit", leave)
    monkeypatch.setattr(gang.distributed.global_state, "client", Locked())
    member = Gang(Clock(), epath.Path(tmp_path), 0.05)
    member._process, member._prefix, member._heard = 0, "gang", {0: (Beat(0, "a"), 0.0)}
    member._end(gang.Verdict("process 1 (b) is lost"))
    assert codes[0] == EXIT_INTERRUPTED and freed == [True]


def test_a_failed_collective_names_who_was_lost_in_a_phase_that_is_given_more_time(tmp_path, monkeypatch):
    """Its last sign of life may be from compiling, where the judge waits longer: killed in its first steps."""
    monkeypatch.setattr(Gang, "_exit", lambda self, code: sys.exit(code))
    monkeypatch.setattr(gang.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(gang.distributed.global_state, "client", Store())
    member = Gang(Clock(), epath.Path(tmp_path), 0.01)
    member._several, member._process, member._prefix, member.ledger = True, 0, "gang", Ledger(epath.Path(tmp_path))
    member._heard = {0: (Beat(9, "a", "training", 6), 0.0), 1: (Beat(4, "b", "compiling", 0), 0.0)}
    member._word = {"silent": ["process 1 (b)"], "notices": {}}
    with pytest.raises(SystemExit, match="75"):
        member._failing(None, RuntimeError("Gloo AllGather failed"), None)
    assert [row["reason"] for row in read_rows(tmp_path, "ledger-")] == ["process 1 (b) is lost"]
    with socket.socket() as coordinator:
        coordinator.bind(("localhost", 0))
        coordinator.listen()
        monkeypatch.setattr(gang.distributed.global_state, "coordinator_address", f"localhost:{coordinator.getsockname()[1]}")
        member = Gang(Clock(), epath.Path(tmp_path), 0.01)
        member._several, member._word = True, {"silent": [], "notices": {}}
        with pytest.raises(SystemExit, match="1"):  # nobody is lost: the fault is its own
            member._failing(None, RuntimeError("out of memory"), None)


def test_exit_codes_are_those_of_the_errors():
    assert (InputError.exit_code, Diverged.exit_code, EXIT_INTERRUPTED) == (2, 3, 75)


@pytest.mark.slow
@pytest.mark.parametrize("victim,number", [(0, signal.SIGKILL)])  # the others: chaos_test
def test_a_lost_process_is_named_and_the_job_ends_with_75(tmp_path_factory, tmp_path, victim, number):
    home, heartbeat = tmp_path_factory.getbasetemp() / "gang", 3.0
    words = [sys.executable, "-m", "tools.supervise", "--processes=2", "--max_restarts=0", "--grace=8", "--",
             sys.executable, "-m", "experiments.train", "--config=debug", f"--workdir={tmp_path / 'run'}",
             f"--heartbeat={heartbeat}", f"--set=data.cache_dir={home}", "--set=train.steps=1000000",
             "--set=checkpoint.every_steps=100"]
    environment = {**os.environ, "RUNG_CACHE": str(home), "XLA_FLAGS": "", "PYTHONUNBUFFERED": "1"}
    job = subprocess.Popen(words, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, cwd=REPOSITORY,
                           env=environment)
    lines, process = [], None
    for line in job.stderr:  # until the run has saved, and so both processes are in their steps
        lines.append(line)
        if (tmp_path / "run" / "checkpoints" / "100").exists() and process is None:
            process = int(next(text for text in lines if f"process {victim} is pid " in text).rsplit(" ", 1)[1])
            os.kill(process, number)
            began = time.monotonic()
        if process and f"process {victim} (" in line and "is lost" in line:
            named = time.monotonic() - began
    assert job.wait(timeout=60) == EXIT_INTERRUPTED, "".join(lines)
    assert named < 2 * heartbeat + 2, "".join(lines)  # the bound is 20 s for a heartbeat of 10; 2 s for a busy machine
    ledger = [row for row in read_rows(tmp_path / "run", "ledger-") if row["event"] == "alarm"]
    assert any(f"process {victim} (" in row["reason"] and "is lost" in row["reason"] for row in ledger), json.dumps(ledger)
