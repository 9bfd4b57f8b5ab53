"""What a conversion holds in memory: a few copies of the largest tensor, however many of them there are."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from research.interop import safetensors_files
from research.interop.families import FAMILIES
from research.interop.tensor_map import tensor_map
from research.models.lm import LanguageModel

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
MIB = 2**20
LLAMA_SETTINGS = {"model_type": "llama", "vocab_size": 1024, "hidden_size": 512, "intermediate_size": 2048,
                  "num_attention_heads": 8, "max_position_embeddings": 64}
# Settings, layers, bytes of the largest tensor: 390 MiB each, a matrix of an MLP being 1 in 97 and 1 in 25 of them.
MODELS = {
    "llama": (LLAMA_SETTINGS, 24, 4 * 512 * 2048),
    "llama_wide": (LLAMA_SETTINGS | {"hidden_size": 1024, "intermediate_size": 4096}, 6, 4 * 1024 * 4096),
    "mixtral": (LLAMA_SETTINGS | {"model_type": "mixtral", "num_key_value_heads": 8}, 4, 4 * 512 * 2048),
}
# What a conversion may hold: so many copies of the largest tensor, and so many bytes of buffers. 30 copies are too much, or the
# whole model.
COPIES, BUFFERS = 11, 64 * MIB
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
        convert(f"{sys.argv[2]}/{source}_all", f"{sys.argv[2]}/{place}_all")
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

for layers in ("1", "all"):
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


def make(directory: pathlib.Path, settings: dict, layers: int) -> int:
    """A model of random float32 weights; returns its bytes."""
    settings = settings | {"num_hidden_layers": layers}
    family = FAMILIES[settings["model_type"]]
    theirs = tensor_map(LanguageModel(family.model(settings)), family.rows, family.per_layer)
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
@pytest.mark.parametrize("name", MODELS)
def test_a_conversion_holds_a_few_copies_of_the_largest_tensor(name, tmp_path):
    settings, layers, largest = MODELS[name]
    make(tmp_path / "theirs_1", settings, 1)
    whole = make(tmp_path / "theirs_all", settings, layers)
    # Of a Mixtral that was trained here, all experts of a layer come in one chunk: more than these bounds.
    places = ("run", "back") if name == "mixtral" else ("run", "back", "trained", "out")
    for place in places:
        words = [SAVE] if place == "trained" else [CONVERT, place]
        done = subprocess.run([sys.executable, "-c", *words, str(tmp_path)], capture_output=True, text=True,
                              cwd=REPOSITORY, env={**os.environ, "XLA_FLAGS": ""})
        assert done.returncode == 0, done.stderr
        if place == "trained":
            continue
        held = int(done.stdout.split()[-1])
        print(f"{place}: {held / MIB:.0f} MiB of {whole / MIB:.0f}, the largest tensor has {largest / MIB:.0f}")
        most = COPIES * largest + BUFFERS
        assert held < most < min(whole, 30 * largest)
    theirs = (tmp_path / "theirs_all" / "model.safetensors").read_bytes()
    for place in places:
        if place in ("back", "out"):
            assert (tmp_path / f"{place}_all" / "model.safetensors").read_bytes() == theirs
