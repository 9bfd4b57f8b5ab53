"""The supervisor with jobs of shell commands: what it starts, restarts, kills, forwards and returns."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from research.errors import InputError
from tools.supervise import supervise


def shell(script: str, processes: int = 2, restarts: int = 3, grace: float = 1.0, asked: list | None = None) -> int:
    return supervise(["sh", "-c", script], processes, restarts, grace, [] if asked is None else asked)


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
    assert shell('start() { echo x >> $D/$JAX_PROCESS_ID; wc -l < $D/$JAX_PROCESS_ID | tr -d " "; }; ' + script) == code
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


def test_a_signal_goes_to_all_and_nothing_is_restarted(tmp_path, monkeypatch):
    monkeypatch.setenv("D", str(tmp_path))
    asked: list[int] = []

    def ask() -> None:
        deadline = time.monotonic() + 20
        while len(list(tmp_path.iterdir())) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        asked.append(signal.SIGTERM)

    threading.Thread(target=ask).start()
    script = 'trap "sleep 1; exit 75" TERM; touch $D/$JAX_PROCESS_ID; while :; do sleep 0.05; done'
    assert shell(script, grace=0.2, asked=asked) == 75  # the second they take to save is longer than the grace: it isn't theirs
    assert len(list(tmp_path.iterdir())) == 2


def test_an_unknown_command():
    with pytest.raises(InputError, match="--: nothing-like-it can't be run"):
        supervise(["nothing-like-it"], 2, 0, 1.0, [])


def test_the_command_line(tmp_path):
    environment = {**os.environ, "RUNG_CACHE": str(tmp_path)}
    words = [sys.executable, "-m", "tools.supervise", "--processes=2", "--max_restarts=0"]
    done = subprocess.run([*words, "--", "sh", "-c", "exit 3"], capture_output=True, text=True, env=environment)
    assert done.returncode == 3 and "process 0 ended with 3" in done.stderr, done.stderr
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    assert done.returncode == 2 and done.stderr.startswith("error: --: no command"), done.stderr
