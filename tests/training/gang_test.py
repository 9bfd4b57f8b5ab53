"""Who is lost, hangs, is late or slow: the judgement over every case; and a whole job in which one process is killed."""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from research.errors import Diverged, InputError
from research.schema import EXIT_INTERRUPTED
from research.training import gang
from research.training.gang import Beat, Gang, judge, notices
from research.training.goodput import Clock
from research.training.workdir import read_rows

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
WELL = Beat(7, "a", "training", 100, still=0.2, own=0.01, pace=0.5)


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


def test_exit_codes_are_those_of_the_errors():
    assert (InputError.exit_code, Diverged.exit_code, EXIT_INTERRUPTED) == (2, 3, 75)


@pytest.mark.slow
@pytest.mark.parametrize("victim,number", [(0, signal.SIGKILL)])  # the others: chaos_test
def test_a_lost_process_is_named_and_the_job_ends_with_75(tmp_path_factory, tmp_path, victim, number):
    home, heartbeat = tmp_path_factory.getbasetemp() / "gang", 3.0
    words = [sys.executable, "-m", "tools.supervise", "--processes=2", "--max_restarts=0", "--grace=8", "--", sys.executable, "-m",
             "experiments.train", "--config=debug", f"--workdir={tmp_path / 'run'}", f"--heartbeat={heartbeat}",
             f"--set=data.cache_dir={home}", "--set=train.steps=1000000", "--set=checkpoint.every_steps=100"]
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
