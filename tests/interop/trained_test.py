"""Export of a run that was trained here: its checkpoint's chunks are as its devices held them, a layer or all small ones."""

import jax
import numpy as np
import pytest
from etils import epath

from configs import preset
from research.config import override
from research.interop.huggingface import export_model, import_model
from research.params import flatten
from research.training import checkpoint
from research.training.checkpoint import Checkpointer
from research.training.program import make_program
from research.training.restore import load_params
from research.training.state import init_state
from research.training.workdir import write_config


@pytest.mark.parametrize("name, chunk", [("llama_tiny", 1 << 20), ("mixtral_tiny", 1 << 20), ("mixtral_tiny", 1)])
def test_every_bit_comes_out(name, chunk, tmp_path, monkeypatch):
    """Of a run on four devices whose layers were unrolled; imported again, it is the same model."""
    monkeypatch.setattr(checkpoint, "LAYER_CHUNK", chunk)
    config = override(preset(name), {"mesh.rules": "fsdp", "model.unroll": 2})
    program = make_program(config, jax.devices()[:4])
    state = init_state(program.model.init, program.optimizer, program.layout, 0)
    workdir = epath.Path(tmp_path / "run")
    workdir.mkdir()
    write_config(workdir, config, "")
    with Checkpointer(workdir, config.checkpoint) as checkpointer:
        checkpointer.save(state, {"sample": 0, "skips": [], "guard": {}})
    export_model(str(workdir), str(tmp_path / "model"))
    import_model(str(tmp_path / "model"), str(tmp_path / "back"))
    found = flatten(load_params(tmp_path / "back")[0])
    for path, value in flatten(state.params).items():
        np.testing.assert_array_equal(found[path], value, err_msg=path)
