"""What a conversion holds in memory: a few copies of the largest tensor, however many of them there are."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from research.interop import safetensors_files
from research.interop.llama import LLAMA
from research.interop.tensor_map import tensor_map
from research.models.lm import LanguageModel

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
LAYERS, MIB = 24, 2**20
SETTINGS = {"model_type": "llama", "vocab_size": 1024, "hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8,
            "max_position_embeddings": 64}
LARGEST = 4 * 512 * 2048  # bytes of a matrix of an MLP
# The high-water mark of the process itself: ru_maxrss of a child begins with its parent's. A model of one layer goes first,
# of which all is compiled that the other needs.
CONVERT = """
import pathlib, re, sys
from research.interop.huggingface import export_model, import_model

def peak():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", pathlib.Path("/proc/self/status").read_text())[1])

for convert, source, place in (
        (import_model, "theirs", "run"), (export_model, "run", "back"), (export_model, "trained", "out")):
    if sys.argv[1] == place:
        convert(f"{sys.argv[2]}/{source}_1", f"{sys.argv[2]}/{place}_1")
        before = peak()
        convert(f"{sys.argv[2]}/{source}_24", f"{sys.argv[2]}/{place}_24")
        print(peak() - before)
"""
# What a run's checkpoint is, of the weights of another run.
SAVE = """
import dataclasses
import sys
import jax
from etils import epath
from research.config import override
from research.training.checkpoint import Checkpointer
from research.training.program import make_program
from research.training.restore import load_params
from research.training.state import init_state
from research.training.workdir import read_config, write_config

for layers in ("1", "24"):
    run, trained = (epath.Path(sys.argv[1]) / f"{name}_{layers}" for name in ("run", "trained"))
    config = override(read_config(run), {"optim.name": "sgd"})
    program = make_program(config, jax.devices()[:1])
    state = init_state(program.model.init, program.optimizer, program.layout, 0)
    params = jax.tree.map(lambda old, new: jax.device_put(new, old.sharding), state.params, load_params(run)[0])
    state = dataclasses.replace(state, params=params)
    trained.mkdir()
    write_config(trained, config, "")
    with Checkpointer(trained, config.checkpoint) as checkpointer:
        checkpointer.save(state, {"sample": 0, "skips": [], "guard": {}})
"""


def make(directory: pathlib.Path, layers: int) -> int:
    """A Llama of random float32 weights; returns its bytes."""
    settings = SETTINGS | {"num_hidden_layers": layers}
    theirs = tensor_map(LanguageModel(LLAMA.model(settings)), LLAMA.rows, LLAMA.per_layer)
    random = np.random.default_rng(0)
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(settings))
    shapes = {name: (np.dtype(np.float32), t.shape) for name, t in theirs.items()}
    for _ in safetensors_files.write(directory, shapes, lambda name: random.normal(size=theirs[name].shape).astype(np.float32),
                                     10**10):
        pass
    return (directory / "model.safetensors").stat().st_size


@pytest.mark.slow
@pytest.mark.skipif(not pathlib.Path("/proc/self/status").exists(), reason="peaks are read from Linux' /proc")
def test_a_conversion_holds_a_few_copies_of_the_largest_tensor(tmp_path):
    make(tmp_path / "theirs_1", 1)
    whole = make(tmp_path / "theirs_24", LAYERS)
    assert whole > 90 * LARGEST
    for place in ("run", "back", "trained", "out"):
        words = [SAVE] if place == "trained" else [CONVERT, place]
        done = subprocess.run([sys.executable, "-c", *words, str(tmp_path)], capture_output=True, text=True,
                              cwd=REPOSITORY, env={**os.environ, "XLA_FLAGS": ""})
        assert done.returncode == 0, done.stderr
        if place == "trained":
            continue
        held = int(done.stdout.split()[-1])
        print(f"{place}: {held / MIB:.0f} MiB of {whole / MIB:.0f}, the largest tensor has {LARGEST / MIB:.0f}")
        # Some ten MiB are buffers, and it varies; with one array of all layers, read and compressed, it were half of the whole.
        assert held < whole / 3
    theirs, back, out = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("theirs_24", "back_24", "out_24"))
    assert theirs == back == out
