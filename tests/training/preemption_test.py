"""A run that is asked to stop: the step is finished and saved, the exit code is 75, and a restart compiles nothing again."""

import os
import re
import signal
import subprocess
import sys
import threading
import time

import jax
import pytest
from etils import epath
from jax.experimental import multihost_utils

from configs import preset
from research.config import override
from research.schema import EXIT_INTERRUPTED
from research.training import preemption
from research.training.loop import Launch, run
from research.training.manifest import check_step, saved_steps
from research.training.preemption import exit_on_sigterm, stop_requests
from research.training.program import Program
from research.training.workdir import read_rows
from tests.training.common import Job

GRACE = 30  # seconds from the signal to the end


def test_signals_become_an_answer_and_the_handlers_come_back():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    for number in (signal.SIGTERM, signal.SIGINT):
        with stop_requests() as requests:
            assert requests.asked(1) is None
            signal.raise_signal(number)
            assert requests.asked(2) == number.name == requests.asked(3)
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_minutes():
    with stop_requests(1.0) as requests:
        assert requests.asked(1) is None
    with stop_requests(1e-9) as requests:
        time.sleep(0.001)
        assert requests.asked(1) == "minutes are over"


def test_another_thread_leaves_the_handlers_alone():
    before, found = signal.getsignal(signal.SIGTERM), []

    def work():
        with stop_requests() as requests, exit_on_sigterm():
            found.extend([requests.asked(1), signal.getsignal(signal.SIGTERM)])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [None, before]


def test_outside_of_training_sigterm_ends_at_once():
    with pytest.raises(SystemExit) as ended, exit_on_sigterm():
        with stop_requests() as requests:  # not while the steps run
            signal.raise_signal(signal.SIGTERM)
            assert requests.asked(1) == "SIGTERM"
        signal.raise_signal(signal.SIGTERM)
    assert ended.value.code == EXIT_INTERRUPTED


def test_several_processes_leave_sigterm_to_the_service_and_ask_it(monkeypatch):
    """What asks this process to stop becomes one SIGTERM to itself; the answer is the service's."""
    before, sent, reached = signal.getsignal(signal.SIGTERM), [], []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(preemption.os, "kill", lambda process, number: sent.append((process, number)))
    monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", lambda step: step in reached)
    with stop_requests() as requests:
        assert signal.getsignal(signal.SIGTERM) is before
        assert requests.asked(1) is None and not sent
        signal.raise_signal(signal.SIGINT)
        assert requests.asked(2) is None and requests.asked(3) is None
        assert sent == [(os.getpid(), signal.SIGTERM)]
        reached.append(4)
        assert requests.asked(4) == "SIGINT"
    with stop_requests() as requests:  # the other process was asked
        assert requests.asked(4) == "SIGTERM"


def stop(job: Job, processes: list[subprocess.Popen], target: int = 0) -> float:
    """Sends SIGTERM to one of them; the seconds until all have ended, with 75."""
    began = time.monotonic()
    processes[target].send_signal(signal.SIGTERM)
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == EXIT_INTERRUPTED, errors[-3000:]
    return time.monotonic() - began


def test_sigterm_while_it_trains(tmp_path):
    job = Job(tmp_path, "train.steps=100000", "train.log_every=1")
    processes = job.start()
    job.wait_for(processes, "metrics-*")
    assert stop(job, processes) < GRACE
    last = read_rows(job.workdir, "ledger-")[-1]
    assert last["event"] == "preempted" and last["reason"] == "SIGTERM"
    checkpoints = epath.Path(job.workdir) / "checkpoints"
    assert saved_steps(checkpoints)[-1] == last["step"]
    check_step(checkpoints / str(last["step"]), last["step"])
    assert not (job.workdir / "result.json").exists()


def test_sigterm_before_it_trains(tmp_path):
    job = Job(tmp_path, "train.steps=100000")
    processes = job.start()
    job.wait_for(processes, ".lock")
    assert stop(job, processes) < GRACE


def test_sigterm_while_it_compiles_is_in_the_ledger(tmp_path, monkeypatch):
    monkeypatch.setattr(Program, "compile", lambda _: signal.raise_signal(signal.SIGTERM))
    config = override(preset("debug"), {"data.cache_dir": str(tmp_path), "model.dim": 16})
    with pytest.raises(SystemExit) as ended:
        run(config, Launch(str(tmp_path / "run"), preset("debug"), quiet=True))
    assert ended.value.code == EXIT_INTERRUPTED
    last = read_rows(tmp_path / "run", "ledger-")[-1]
    assert (last["event"], last["step"], last["reason"]) == ("preempted", 0, "SIGTERM")


COUNTING = """
import collections, runpy, sys, jax
seen = collections.Counter()
jax.monitoring.register_event_listener(lambda name, **_: seen.update([name]))
sys.argv = ["experiments.train", *sys.argv[1:]]
try:
    runpy.run_module("experiments.train", run_name="__main__", alter_sys=True)
finally:
    print("compiled", seen["/jax/compilation_cache/cache_misses"], "found", seen["/jax/compilation_cache/cache_hits"])
"""


@pytest.mark.slow
def test_a_restart_compiles_nothing_again(tmp_path):
    """The cache lies in the run directory: the second launch could be on another machine. What only a restart does
    (restoring: two programs at most) the first one compiles, and no later one."""
    job, counts = Job(tmp_path, "train.steps=1000", "checkpoint.every_steps=100"), []
    environment = job.environment(0, 1) | {"HOME": str(tmp_path)}
    del environment["RUNG_CACHE"]
    for _ in range(3):
        words = [sys.executable, "-c", COUNTING, *job.words(), "--minutes=0.0001"]
        done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == EXIT_INTERRUPTED, done.stderr[-3000:]
        counts.append(tuple(map(int, re.search(r"compiled (\d+) found (\d+)", done.stdout).groups())))
    assert counts[0][0] > 5 and counts[0][1] == 0
    assert counts[1][0] <= 2 and counts[1][1] >= 5
    assert counts[2][0] == 0
    assert (job.workdir / "compiled").is_dir() and not (tmp_path / ".cache").exists()


@pytest.mark.slow
def test_processes_stop_after_the_same_step(tmp_path):
    """SIGTERM at one of two, which talk through gloo: first not the one that writes, then it, after the same command again."""
    job = Job(tmp_path, "train.steps=100000", "train.log_every=1", "checkpoint.every_steps=50")
    processes = job.start(processes=2, devices=1)
    job.wait_for(processes, "metrics-*")
    assert stop(job, processes, target=1) < GRACE
    last = read_rows(job.workdir, "ledger-")[-1]
    assert last["event"] == "preempted"
    assert saved_steps(epath.Path(job.workdir) / "checkpoints")[-1] == last["step"]
    processes = job.start(processes=2, devices=1)
    job.wait_for(processes, "metrics-0001*")
    assert stop(job, processes, target=0) < GRACE
    rows = [row["step"] for row in read_rows(job.workdir, "metrics-")]
    assert rows == sorted(set(rows)) and rows[-1] > last["step"]
