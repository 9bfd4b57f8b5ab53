"""What rests in the host's memory: the optimizer's state and the layers' inputs. Where it rests changes no bit."""

import jax
import numpy as np
import pytest

from configs import preset
from research.aot.compile import compile_for, state_bytes, tpu_topology
from research.config import override
from research.errors import Interrupted
from research.training.loop import Launch, run
from research.training.preemption import StopRequests
from research.training.program import make_program
from research.training.state import HOST
from research.training.workdir import read_rows
from tests.training.common import run_steps, small


def assert_same_bits(one, two) -> None:
    jax.tree.map(np.testing.assert_array_equal, one, two)


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_the_optimizers_state_rests_on_the_host(optimizer, devices):
    """Moments do, split like their parameters, before and after a step; counters don't. The parameters are the same."""
    changes = {"optim__name": optimizer, "mesh__rules": "fsdp"}
    state, history = run_steps(make_program(small(**changes, optim__offload=True), devices), 3)
    plain, expected = run_steps(make_program(small(**changes), devices), 3)
    assert_same_bits((state.params, state.optimizer), (plain.params, plain.optimizer))
    assert history == expected
    for leaf, on_device in zip(jax.tree.leaves(state.optimizer), jax.tree.leaves(plain.optimizer)):
        assert leaf.sharding.memory_kind == (HOST if leaf.ndim else "device")
        assert leaf.sharding.spec == on_device.sharding.spec
    assert all(leaf.sharding.memory_kind == "device" for leaf in jax.tree.leaves(state.params))


def test_a_run_goes_there_and_back(tmp_path, monkeypatch):
    """Saved from the device, restored to the host, saved there, restored to the device: the run's end is the same."""
    base = override(preset("debug"), {"model.dim": 16, "train.steps": 9, "data.cache_dir": str(tmp_path / "cache")})

    def launch(name: str, steps: int | None = None, **changes) -> None:
        asked = lambda _self, dispatched: "the test" if dispatched == steps else None
        with monkeypatch.context() as patch:
            patch.setattr(StopRequests, "asked", asked)
            run(override(base, {key.replace("__", "."): value for key, value in changes.items()}),
                Launch(str(tmp_path / name), preset("debug"), quiet=True))

    for offload in (False, True):
        with pytest.raises(Interrupted):
            launch("moved", 3, optim__offload=offload)
    launch("moved", optim__offload=False)
    launch("whole")
    last = [[row for row in read_rows(str(tmp_path / name), "metrics-") if "loss" in row and "set" not in row][-1]
            for name in ("moved", "whole")]
    assert last[0]["step"] == 9 and last[0]["loss"] == last[1]["loss"]


def test_layers_inputs_go_to_the_host_and_come_back():
    """The same losses as with all of it on the device, and as without remat."""
    histories = [run_steps(make_program(small(model__remat=remat), jax.devices()[:1]), 3)[1]
                 for remat in ("offload", "full", "none")]
    for other in histories[1:]:
        for ours, theirs in zip(histories[0], other):
            np.testing.assert_allclose(ours["loss"], theirs["loss"], rtol=1e-6)


@pytest.mark.slow
def test_a_chip_holds_less():
    """The TPU's compiler puts moments and layers' inputs on the host, and says so. (What that saves: docs/tpu.md.)"""
    pytest.importorskip("libtpu", reason="the extra tpu is not installed")
    base = override(preset("quickstart"), {"train.batch_size": 16, "model.stages.0.repeats": 8, "mesh.rules": "fsdp",
                                           "model.remat": "full", "model.compute_dtype": "bfloat16"})
    plain, moved = (compile_for(override(base, changes), tpu_topology("v5e:2x2")) for changes in (
        {}, {"optim.offload": True, "model.remat": "offload"}))
    inputs = 8 * 16 // 4 * base.data.seq_len * base.model.dim * 2  # of all layers, on a chip, in bfloat16
    moments = plain.memory.arguments - moved.memory.arguments
    assert plain.memory.host == 0 and moved.memory.host >= inputs + moments > inputs
    assert moments > 0.5 * plain.memory.arguments and state_bytes(moved.program) < 0.4 * state_bytes(plain.program)
    assert moved.memory.fits and moved.memory.peak is None and plain.memory.peak is not None
