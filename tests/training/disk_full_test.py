"""A run on a small real disk (tmpfs) that fills up: it goes on or stops cleanly, and ends with the bits of one with room.

Where the tests may not mount one, checkpoint_test.py still has the kernel refuse to let files grow.
"""

import json
import os
import subprocess

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from configs import preset
from research.config import override
from research.errors import Interrupted
from research.training.checkpoint import Checkpointer
from research.training.loop import Launch, run
from research.training.workdir import Parts, PatientFile, read_rows
from tests.training.common import Job

STEPS = 14


@pytest.fixture
def disk(tmp_path):
    """A file system of 4 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place)], capture_output=True).returncode:
        pytest.skip("no right to mount a tmpfs here")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def fill(disk) -> None:
    """To the last byte."""
    with open(disk / "filler", "wb", buffering=0) as file:
        for size in (1 << 16, 1 << 10, 1):
            try:
                while True:
                    file.write(b"x" * size)
            except OSError:
                pass


def launch(config, workdir):
    return run(config, Launch(str(workdir), preset("debug"), quiet=True))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    config = override(preset("debug"), {
        "data.cache_dir": str(cache), "train.steps": STEPS, "train.log_every": 1, "checkpoint.every_steps": 4, "model.dim": 16})
    return config, launch(config, tmp_path_factory.mktemp("undisturbed"))


@pytest.mark.parametrize("on_full", ["continue", "stop"])
def test_a_run_survives_a_full_disk(undisturbed, disk, monkeypatch, on_full):
    config, result = undisturbed
    config = override(config, {"checkpoint.on_full": on_full})
    save = Checkpointer.save

    def filling(self, state, *rest):
        if int(state.step) == 8 and not (disk / "filler").exists():
            fill(disk)
        if int(state.step) == 12:
            (disk / "filler").unlink()
        save(self, state, *rest)
        self.wait()

    monkeypatch.setattr(Checkpointer, "save", filling)
    if on_full == "stop":
        with pytest.raises(Interrupted, match="the disk is full"):
            launch(config, disk / "run")
        assert sorted(path.name for path in (disk / "run" / "checkpoints").iterdir()) == ["4"]
        (disk / "filler").unlink()
        monkeypatch.setattr(Checkpointer, "save", save)
    ended = launch(config, disk / "run")
    assert ended["params_sha256"] == result["params_sha256"]
    rows = read_rows(disk / "run", "metrics-")
    assert [row["step"] for row in rows if "set" not in row] == list(range(1, STEPS + 1))
    alarms = [row for row in read_rows(disk / "run", "ledger-") if row["event"] == "alarm"]
    if on_full == "continue":  # the ledger's own line waited for room, too
        assert alarms[0]["step"] == 8 and "step 8 isn't saved, 4 is the last" in alarms[0]["reason"]
    board = EventAccumulator(str(disk / "run"))
    board.Reload()
    shown = [event.step for event in board.Scalars("train/loss")]
    if on_full == "continue":
        assert shown == list(range(1, STEPS + 1))
    else:  # what the first launch still had in memory found no room as it ended
        assert shown == list(range(5, STEPS + 1))


def test_without_room_for_the_last_step_no_run_has_finished(undisturbed, disk, monkeypatch):
    config, result = undisturbed
    save = Checkpointer.save

    def filling(self, state, *rest):
        if int(state.step) == STEPS:
            self.wait()
            fill(disk)
        save(self, state, *rest)

    monkeypatch.setattr(Checkpointer, "save", filling)
    with pytest.raises(Interrupted, match=f"the last step, {STEPS}, isn't saved; .* goes on from step 12"):
        launch(config, disk / "run")
    (disk / "filler").unlink()
    assert not (disk / "run" / "result.json").exists()
    monkeypatch.setattr(Checkpointer, "save", save)
    assert launch(config, disk / "run")["params_sha256"] == result["params_sha256"]


FILLING = """
from pathlib import Path
from experiments import command_line
import experiments.train as command
import jax
from research.training.checkpoint import Checkpointer
from tests.training.disk_full_test import fill

disk, save = Path({disk!r}), Checkpointer.save

def filling(self, state, *rest):
    self.wait()  # a disk that fills up in the middle of a save ends a job of several
    if jax.process_index() == 0 and int(state.step) == 8:
        fill(disk)
    if jax.process_index() == 0 and int(state.step) == 12:
        (disk / "filler").unlink()
    save(self, state, *rest)

Checkpointer.save = filling
command_line.run(command.main)
"""


@pytest.mark.slow
def test_a_job_of_several_goes_on_without_the_save(disk, tmp_path):
    """Two processes find the disk full before they begin; with room again they save, and end with the bits of a quiet job."""
    settings = f"train.steps={STEPS}", "checkpoint.every_steps=4"
    job, quiet = Job(tmp_path, *settings), Job(tmp_path, *settings, name="quiet")
    job.workdir = disk / "run"
    processes = job.start(processes=2, command=lambda index: ["-c", FILLING.format(disk=str(disk))])
    seen = [process.communicate(timeout=200)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], seen[0][-3000:] + seen[1][-3000:]
    assert [process.wait(200) for process in quiet.start(processes=2)] == [0, 0]
    ended, expected = (json.loads((workdir / "result.json").read_text()) for workdir in (job.workdir, quiet.workdir))
    assert "step 8 isn't saved, 4 is the last that is" in seen[0]
    assert ended["params_sha256"] == expected["params_sha256"]
    assert sorted(int(path.name) for path in (disk / "run" / "checkpoints").iterdir())[-2:] == [12, STEPS]


def test_rows_and_events_wait_for_room(disk):
    parts, events = Parts(disk, "rows-"), PatientFile(str(disk / "events"))
    written = b""
    for number in range(4):
        if number == 1:
            fill(disk)
        if number == 3:
            (disk / "filler").unlink()
        parts.write({"step": number, "text": "x" * 5000})
        block = bytes([number]) * 9000
        written += block
        events.write(block)
        events.flush()
        found = (disk / "rows-0000.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in found] == ([0] if number in (1, 2) else list(range(number + 1)))
        assert written.startswith((disk / "events").read_bytes())
    events.close()
    assert (disk / "events").read_bytes() == written and os.path.getsize(disk / "rows-0000.jsonl") > 20000
