"""The supervisor with jobs of shell commands: what it starts, restarts, kills, forwards and returns."""

import os
import pathlib
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest

from configs import preset
from research.config import override
from research.errors import InputError, Interrupted
from research.schema import EXIT_INTERRUPTED
from research.training.loop import Launch, run
from tools import supervise as tool
from tools.faults import Disk
from tools.supervise import supervise, workdir_of

START = 'F=$D/${JAX_PROCESS_ID:-0}; start() { echo x >> $F; wc -l < $F | tr -d " "; }; '


def shell(script: str, processes: int = 2, restarts: int = 3, grace: float = 1.0, asked: list | None = None,
          stop_grace: float = 20.0, workdir: pathlib.Path | None = None) -> int:
    words = ["sh", "-c", START + script, *([f"--workdir={workdir}"] if workdir else [])]
    return supervise(words, processes, restarts, grace, stop_grace, [] if asked is None else asked)


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(tool, "FIRST_PAUSE", 0.01)


# A script (process $JAX_PROCESS_ID; $D is its directory, `start` counts launches) -> exit code, launches.
JOBS = {
    "done": ("exit 0", 0, 1),
    "preempted once": ("[ $(start) = 1 ] && exit 75; exit 0", 0, 2),
    "one lost, the other hangs": (
        "n=$(start); [ $n = 1 ] && [ $JAX_PROCESS_ID = 1 ] && kill -9 $$; [ $n = 1 ] && sleep 100; exit 0", 0, 2),
    "a bug each time": ("start; exit 1", 1, 4),
    "killed each time": ("start; kill -9 $$", 75, 4),
    "bad input": ("start; exit 2", 2, 1),
    "the guard gave up, the others end with 75": ("start; [ $JAX_PROCESS_ID = 1 ] && { sleep 0.05; exit 3; }; exit 75", 3, 1),
}


@pytest.mark.parametrize("case", JOBS)
def test_jobs(case, tmp_path, monkeypatch):
    script, code, launches = JOBS[case]
    monkeypatch.setenv("D", str(tmp_path))
    began = time.monotonic()
    assert shell(script) == code
    for path in tmp_path.iterdir():
        assert len(path.read_text().splitlines()) == launches
    assert time.monotonic() - began < 30


def test_each_process_knows_its_place_and_its_lines_are_marked(capfdbinary):
    assert shell('echo "$JAX_PROCESS_ID of $JAX_NUM_PROCESSES at $JAX_COORDINATOR_ADDRESS"; printf end >&2', processes=3) == 0
    output, errors = capfdbinary.readouterr()
    lines = sorted(output.decode().splitlines())
    assert [line.rsplit(":", 1)[0] for line in lines] == [f"[{i}] {i} of 3 at localhost" for i in range(3)]
    assert len({line.rsplit(":", 1)[1] for line in lines}) == 1
    assert {f"[{i}] end" for i in range(3)} <= set(errors.decode().splitlines())


def test_a_job_of_one_is_no_job_of_several(capfdbinary, monkeypatch):
    monkeypatch.delenv("JAX_PROCESS_ID", raising=False)
    assert shell('echo "here${JAX_PROCESS_ID}"', processes=1) == 0
    assert capfdbinary.readouterr()[0] == b"[0] here\n"


def launches(directory: pathlib.Path) -> int:
    return len((directory / "0").read_text().splitlines())


@pytest.mark.parametrize("limit", [1, 3])
def test_restarts_are_counted_from_the_last_saved_step(tmp_path, monkeypatch, limit):
    """Six launches get on, two that save nothing between them, and then none does."""
    monkeypatch.setenv("D", str(tmp_path))
    script = 'n=$(start); case $n in 3|6) ;; *) [ $n -le 8 ] && mkdir -p $D/run/checkpoints/$n;; esac; exit 75'
    assert shell(script, processes=1, restarts=limit, workdir=tmp_path / "run") == EXIT_INTERRUPTED
    assert launches(tmp_path) == (3 if limit == 1 else 8 + 3)


def test_what_was_saved_before_is_no_progress(tmp_path, monkeypatch):
    """A run that goes back from step 40 and reaches it again, and so on, like one that meets its spike each time."""
    monkeypatch.setenv("D", str(tmp_path))
    (tmp_path / "run" / "checkpoints" / "40").mkdir(parents=True)
    script = 'cd $D/run/checkpoints; n=$(start); [ $n -gt 6 ] && exit 0; [ -d 40 ] && mv 40 30 || mv 30 40; exit 1'
    assert shell(script, 1, restarts=4, workdir=tmp_path / "run") == 1
    assert launches(tmp_path) <= 6


def test_pauses_grow_and_end_with_a_signal(tmp_path, monkeypatch):
    monkeypatch.setenv("D", str(tmp_path))
    monkeypatch.setattr(tool, "FIRST_PAUSE", 0.3)
    monkeypatch.setattr(tool, "LONGEST_PAUSE", 0.5)
    assert shell("date +%s.%N >> $D/0; exit 1", 1, restarts=4) == 1
    times = [float(line) for line in (tmp_path / "0").read_text().splitlines()]
    gaps = [after - before for before, after in zip(times, times[1:])]
    assert len(gaps) == 4 and all(gap >= least for gap, least in zip(gaps, (0, 0.3, 0.5, 0.5))), gaps
    monkeypatch.setattr(tool, "FIRST_PAUSE", 60.0)
    monkeypatch.setattr(tool, "LONGEST_PAUSE", 60.0)
    asked, began = [], time.monotonic()
    pausing = tmp_path / "0"
    threading.Thread(target=when, args=(
        lambda: launches(tmp_path) == 7 and time.time() - pausing.stat().st_mtime > 1, asked)).start()
    assert shell("date +%s.%N >> $D/0; exit 1", 1, restarts=4, asked=asked) == 1
    assert time.monotonic() - began < 25 and launches(tmp_path) == 7


# How a run of ours was stopped -> is it started again?
STOPS = {"minutes are over": False, "full, on_full=stop": False, "SIGTERM": True, "full, on_full=continue, then SIGTERM": True}


@pytest.mark.parametrize("stop", STOPS)
def test_a_stop_that_was_asked_for_is_not_restarted(stop, tmp_path, monkeypatch):
    """A run in this process leaves its workdir; the supervised job copies that to its own, as if it had been the run."""
    monkeypatch.setenv("D", str(tmp_path))
    rule = "stop" if stop == "full, on_full=stop" else "continue"
    config = override(preset("debug"), {"data.cache_dir": str(tmp_path), "model.dim": "16", "checkpoint.every_steps": "2",
                                        "checkpoint.on_full": rule})
    with Disk(tmp_path / "disk", 200_000) as disk:

        def fault(step, _, batch):
            if stop.startswith("full"):
                disk.fill()
            if step == 6 and "SIGTERM" in stop:
                os.kill(os.getpid(), signal.SIGTERM)
            return batch

        minutes = 1e-9 if stop.startswith("minutes") else None
        with pytest.raises(Interrupted):
            run(config, Launch(str(tmp_path / "disk" / "run"), preset("debug"), minutes, quiet=True, fault=fault))
        disk.free()
        shutil.copytree(tmp_path / "disk" / "run", tmp_path / "left", ignore=shutil.ignore_patterns("checkpoints"))
    script = 'n=$(start); [ $n = 1 ] || exit 0; mkdir $D/run; cp -r $D/left/. $D/run; exit 75'
    assert shell(script, 1, workdir=tmp_path / "run") == (0 if STOPS[stop] else EXIT_INTERRUPTED)
    assert launches(tmp_path) == (2 if STOPS[stop] else 1)
    # What the ledger tells of an earlier launch is not about this one.
    (tmp_path / "0").unlink()
    assert shell("n=$(start); [ $n = 1 ] && exit 75; exit 0", 1, workdir=tmp_path / "run") == 0


@pytest.mark.parametrize("words,workdir", [
    ("train --workdir=a/b --config=debug", "a/b"), ("train --config=debug --workdir a", "a"), ("train", None),
    ("train --workdir=a --workdir=b", "b"), ("train --workdirs=a", None), ("train --workdir", "")])
def test_the_workdir_of_a_command(words, workdir):
    found = workdir_of(words.split())
    assert found is None if workdir is None else found == type(found)(workdir)


def when(condition, asked: list[int]) -> None:
    """SIGTERM, once `condition` holds."""
    deadline = time.monotonic() + 20
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    asked.append(signal.SIGTERM)


def test_who_stays_after_a_signal_is_killed(tmp_path, monkeypatch):
    """One of two saves and ends, the other hangs; without the signal neither would."""
    monkeypatch.setenv("D", str(tmp_path))
    asked: list[int] = []
    threading.Thread(target=when, args=(lambda: len(list(tmp_path.iterdir())) == 2, asked)).start()
    script = ('[ $JAX_PROCESS_ID = 0 ] && trap "" TERM || trap "exit 75" TERM; touch $D/$JAX_PROCESS_ID; '
              'for i in $(seq 200); do sleep 0.1; done; exit 0')
    began = time.monotonic()
    assert shell(script, asked=asked, stop_grace=0.5) == EXIT_INTERRUPTED
    assert time.monotonic() - began < 15


def test_a_signal_goes_to_all_and_nothing_is_restarted(tmp_path, monkeypatch):
    monkeypatch.setenv("D", str(tmp_path))
    asked: list[int] = []
    threading.Thread(target=when, args=(lambda: len(list(tmp_path.iterdir())) == 2, asked)).start()
    script = 'trap "sleep 1; exit 75" TERM; touch $D/$JAX_PROCESS_ID; while :; do sleep 0.05; done'
    assert shell(script, grace=0.2, asked=asked) == 75  # the second they take to save is longer than the grace: it isn't theirs
    assert len(list(tmp_path.iterdir())) == 2


def test_an_unknown_command():
    with pytest.raises(InputError, match="--: nothing-like-it can't be run"):
        supervise(["nothing-like-it"], 2, 0, 1.0, 1.0, [])


def test_the_command_line(tmp_path):
    environment = {**os.environ, "RUNG_CACHE": str(tmp_path)}
    words = [sys.executable, "-m", "tools.supervise", "--processes=2", "--max_restarts=0"]
    done = subprocess.run([*words, "--", "sh", "-c", "exit 3"], capture_output=True, text=True, env=environment)
    assert done.returncode == 3 and "process 0 ended with 3" in done.stderr, done.stderr
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    assert done.returncode == 2 and done.stderr.startswith("error: --: no command"), done.stderr
