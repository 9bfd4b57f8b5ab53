"""A bit that flips on one device is found, on that device and no other; layouts without replicas have nothing to compare."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from configs import preset
from research.config import override
from research.errors import Interrupted
from research.training import loop
from research.training.loop import Launch, run
from research.training.program import make_program
from research.training.replicas import disagreements
from research.training.state import init_state
from research.training.workdir import read_rows
from tests.training.common import small


def corrupted(x: jax.Array, device: jax.Device) -> jax.Array:
    """`x` with the lowest bit of one element flipped in the copy that `device` holds."""
    shards = []
    for shard in x.addressable_shards:
        data = np.array(shard.data)
        if shard.device == device:
            data.view(np.uint8).reshape(-1)[0] ^= 1
        shards.append(jax.device_put(data, shard.device))
    return jax.make_array_from_single_device_arrays(x.shape, x.sharding, shards)


@pytest.mark.parametrize("spec,culprits", [
    (PartitionSpec(), [[0], [1], [2], [3]]), (PartitionSpec(("data", "fsdp")), None),
    (PartitionSpec(None, "fsdp"), [[0, 2], [1, 3]] * 2)])
def test_the_device_is_named(devices, spec, culprits):
    mesh = jax.make_mesh((2, 2), ("data", "fsdp"), devices=devices, axis_types=(jax.sharding.AxisType.Auto,) * 2)
    x = jax.device_put(jnp.arange(32.0).reshape(4, 8), NamedSharding(mesh, spec))
    assert disagreements({"a": x, "b": x}) == []
    for index, device in enumerate(devices):
        found = disagreements({"a": x, "b": corrupted(x, device)})
        named = [] if culprits is None else culprits[index]  # of two replicas either may be the wrong one
        assert [line.split(" of ")[0] for line in found] == [f"device {i}" for i in named]
        assert all(line.endswith(": b") for line in found)


def test_what_a_faulty_device_made_is_never_saved(devices, tmp_path, monkeypatch):
    """The run stops with 75 at the next save; started again it goes on from the last good one."""
    config = override(preset("debug"), {"data.cache_dir": str(tmp_path), "train.steps": 6, "checkpoint.every_steps": 2})
    honest = loop._save

    def faulty(session, running):
        if running.number == 4:
            params = jax.tree.map(lambda x: corrupted(x, devices[3]), running.state.params)
            running.state = running.state.replace(params=params)
        return honest(session, running)

    monkeypatch.setattr(loop, "_save", faulty)
    with pytest.raises(Interrupted, match="corruption: replicas differ on device 3 of process 0 .*: params/.* and .* more"):
        run(config, Launch(str(tmp_path / "run"), preset("debug"), quiet=True))
    assert [row["event"] for row in read_rows(tmp_path / "run", "ledger-")] == ["started", "saved", "alarm"]
    monkeypatch.setattr(loop, "_save", honest)
    assert run(config, Launch(str(tmp_path / "run"), preset("debug"), quiet=True))["steps"] == 6


@pytest.mark.parametrize("rules", ["dp", "fsdp", "fsdp_tp"])
def test_a_fresh_state_agrees(devices, rules):
    program = make_program(small(mesh__rules=rules), devices)
    state = init_state(program.model.init, program.optimizer, program.layout, 0)
    assert disagreements(state) == []
