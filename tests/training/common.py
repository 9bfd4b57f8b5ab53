"""Batches, programs and commands that the training tests share."""

import os
import pathlib
import socket
import subprocess
import sys
import time
from typing import Callable

import jax
import jax.numpy as jnp
import numpy as np

from configs import preset
from research.config import override
from research.schema import Config
from research.training.program import Program, make_program


def small(**changes) -> Config:
    """The debug preset, made narrower; keyword names have __ for the dot."""
    base = {"model.dim": 16, "model.vocab_size": 40, "data.seq_len": 16, "train.batch_size": 8, "train.steps": 20}
    return override(preset("debug"), base | {key.replace("__", "."): value for key, value in changes.items()})


def random_batch(config: Config, seed: int = 0) -> dict[str, np.ndarray]:
    """(M, B/M, L) rows of two documents each, with very uneven numbers of counted tokens; two rows hold padding only."""
    rng = np.random.default_rng(seed)
    rows, length = config.train.batch_size, config.data.seq_len
    tokens = rng.integers(0, config.model.vocab_size, (rows, length + 1)).astype(np.int32)
    cut = rng.integers(1, length - 1, rows)
    index = np.arange(length)
    second = index >= cut[:, None]
    weights = (rng.random((rows, length)) < np.linspace(0.05, 1.0, rows)[:, None]).astype(np.float32)
    segments = 1 + second.astype(np.int32)
    weights[-2:], segments[-2:] = 0.0, 0
    batch = {"tokens_BxL": tokens[:, :-1], "targets_BxL": tokens[:, 1:], "weights_BxL": weights,
             "positions_BxL": np.where(second, index - cut[:, None], index).astype(np.int32), "segment_ids_BxL": segments}
    return {name: x.reshape(config.train.microbatches, -1, length) for name, x in batch.items()}


def run_steps(program: Program, steps: int, frozen=None, seed: int = 0):
    """(state, list of metrics) after `steps` steps on different random batches."""
    from research.training.state import init_state

    compiled = program.compile(frozen)
    state = init_state(program.model.init, program.optimizer, program.layout, program.config.seed)
    history = []
    for number in range(steps):
        batch = random_batch(program.config, seed + number)
        state, metrics = compiled(state, frozen, jax.device_put(batch, program.layout.batch()))
        history.append({name: float(value) for name, value in metrics.items()})
    return state, history


def one_device(config: Config) -> Program:
    return make_program(config, jax.devices()[:1])


def to_device(batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    return {name: jnp.asarray(x) for name, x in batch.items()}


class Job:
    """The debug preset by the real command, in `directory`/`name`: one process, or several that talk through gloo."""

    def __init__(self, directory: pathlib.Path, *settings: str, name: str = "run"):
        self.workdir, self._directory = directory / name, directory
        self._settings = [f"data.cache_dir={directory}", "model.dim=16", *settings]

    def words(self, *extra: str) -> list[str]:
        return ["--config=debug", f"--workdir={self.workdir}", *(f"--set={s}" for s in self._settings), *extra]

    def environment(self, index: int, processes: int, devices: int = 1, port: int = 0) -> dict[str, str]:
        job = {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": str(processes),
               "JAX_PROCESS_ID": str(index)} if processes > 1 else {}
        flags = f"--xla_force_host_platform_device_count={devices}"
        return {**os.environ, "RUNG_CACHE": str(self._directory), "XLA_FLAGS": flags, **job}

    def start(self, *extra: str, processes: int = 1, devices: int = 1,
              command: Callable[[int], list[str]] = lambda index: ["-m", "experiments.train"]) -> list[subprocess.Popen]:
        """`command`: what Python is given before the flags, by process."""
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            port = probe.getsockname()[1]
        words = [[sys.executable, *command(index), *self.words(*extra)] for index in range(processes)]
        return [subprocess.Popen(words[index], env=self.environment(index, processes, devices, port), stdout=subprocess.DEVNULL,
                                 stderr=subprocess.PIPE, text=True) for index in range(processes)]

    def wait_for(self, processes: list[subprocess.Popen], pattern: str) -> None:
        """Until the run directory has a file like that."""
        deadline = time.monotonic() + 200
        while not list(self.workdir.glob(pattern)) and time.monotonic() < deadline:
            for process in processes:
                assert process.poll() is None, process.communicate()[1][-3000:]
            time.sleep(0.01)
