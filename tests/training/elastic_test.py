"""One run that goes on with other devices, another layout or other processes: the same tokens in every step and losses."""

import json

import jax
import numpy as np
import pytest

from configs import preset
from research.config import override
from research.errors import Interrupted
from research.schema import EXIT_INTERRUPTED
from research.training import loop
from research.training.loop import Launch, run
from research.training.preemption import StopRequests
from research.training.program import make_program
from research.training.workdir import read_rows
from tests.training.common import Job

TOLERANCE = 1e-5  # nats/token, in float32


def losses(workdir) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in read_rows(workdir, "metrics-") if "set" not in row}


def close(found: dict[int, float], wanted: dict[int, float]) -> None:
    assert list(found) == list(wanted)
    assert max(abs(found[step] - wanted[step]) for step in wanted) < TOLERANCE


class Recorded:
    """Launches in this process, each on devices and rules of its own and up to a step; the token ids of each step."""

    def __init__(self, patch: pytest.MonkeyPatch, config, workdir):
        self._patch, self._config, self.workdir, self.tokens = patch, config, workdir, []

    def launch(self, devices: int, rules: str, until: int = 0) -> None:
        put = loop.put_batch

        def recording(_step, _sample, batch):
            self.tokens.append(np.array(batch["tokens_BxL"]))
            return batch

        def placing(batch, sharding):
            assert len(sharding.device_set) == devices
            return put(batch, sharding)

        with self._patch.context() as patch:
            patch.setattr(loop, "put_batch", placing)
            patch.setattr(loop, "make_program", lambda config: make_program(config, jax.devices()[:devices]))
            patch.setattr(StopRequests, "asked", lambda _self, _: "the test" if len(self.tokens) == until else None)
            config = override(self._config, {"mesh.rules": rules})
            launch = Launch(str(self.workdir), preset("debug"), quiet=True, fault=recording)
            if until:
                with pytest.raises(Interrupted):
                    run(config, launch)
            else:
                run(config, launch)


def test_devices_and_layouts_change(devices, tmp_path, monkeypatch):
    """1 -> 4 devices, dp -> fsdp, and back to 1, on the way of one run."""
    config = override(preset("debug"), {
        "data.cache_dir": str(tmp_path), "train.steps": 13, "train.log_every": 1, "train.batch_size": 8, "model.dim": 16,
        "checkpoint.every_steps": 5})
    whole = Recorded(monkeypatch, config, tmp_path / "whole")
    whole.launch(1, "dp")
    moving = Recorded(monkeypatch, config, tmp_path / "moving")
    for count, rules, until in ((1, "dp", 3), (4, "dp", 6), (4, "fsdp", 10), (1, "dp", 0)):
        moving.launch(count, rules, until)
    assert len(moving.tokens) == len(whole.tokens) == 13
    for found, wanted in zip(moving.tokens, whole.tokens):
        np.testing.assert_array_equal(found, wanted)
    close(losses(moving.workdir), losses(whole.workdir))
    restarts = [row["step"] for row in read_rows(moving.workdir, "ledger-") if row["event"] == "resumed"]
    assert restarts == [3, 6, 10]


RECORDING = """
import dataclasses, json, os, runpy, sys, zlib
import research.environment
research.environment.prepare()
from research.training import loop, preemption
steps, place, run = int(sys.argv[1]), sys.argv[2], loop.run
def recording(step, sample, batch):
    rows = batch["tokens_BxL"].reshape(-1, batch["tokens_BxL"].shape[-1])
    with open(place, "a") as file:
        file.write(json.dumps([zlib.crc32(row.tobytes()) for row in rows]) + "\\n")
    return batch
loop.run = lambda config, launch: run(config, dataclasses.replace(launch, fault=recording))
preemption.StopRequests.asked = lambda self, dispatched: "the test" if dispatched == steps else None
sys.argv = ["experiments.train", *sys.argv[3:]]
runpy.run_module("experiments.train", run_name="__main__", alter_sys=True)
""".replace("\\n", "\\n")


@pytest.mark.slow
def test_processes_come_and_go(tmp_path):
    """2 -> 1 -> 2 processes (gloo) in one run, beside a run of one process."""
    settings = ("train.steps=12", "train.log_every=1", "train.batch_size=8", "checkpoint.every_steps=5")

    def launch(job: Job, name: str, processes: int, until: int, steps: int) -> None:
        start = job.start(processes=processes, command=lambda index: [
            "-c", RECORDING, str(steps), str(tmp_path / f"{name}-{until or 99}-{index}")])
        for process in start:
            _, errors = process.communicate(timeout=200)
            assert process.returncode == (EXIT_INTERRUPTED if until else 0), errors[-3000:]

    def rows_by_step(name: str) -> list[list[int]]:
        """Checksums of the rows of each step, of all processes."""
        steps: list[list[int]] = []
        for until in sorted({int(path.name.split("-")[1]) for path in tmp_path.glob(f"{name}-*")}):
            parts = [path.read_text().splitlines() for path in sorted(tmp_path.glob(f"{name}-{until}-*"))]
            steps += [sorted(sum(map(json.loads, lines), [])) for lines in zip(*parts, strict=True)]
        return steps

    whole, moving = Job(tmp_path, *settings, name="whole"), Job(tmp_path, *settings, name="moving")
    launch(whole, "whole", 1, 0, 0)
    for processes, until, steps in ((2, 4, 4), (1, 8, 4), (2, 0, 0)):
        launch(moving, "moving", processes, until, steps)
    assert len(rows_by_step("whole")) == 12 and rows_by_step("moving") == rows_by_step("whole")
    close(losses(moving.workdir), losses(whole.workdir))
