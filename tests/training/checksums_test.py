"""Any change of one element is seen; layout, mesh and order of shards are not; a flipped bit in a file is refused by name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from research.errors import InputError
from research.training import restore
from research.training.checkpoint import Checkpointer
from research.training.checksums import checksums
from research.training.program import make_program
from research.training.state import init_state
from tests.training.common import one_device, small


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "bool", "uint32"])
def test_every_bit_of_every_element_counts(dtype):
    x = np.asarray(jnp.asarray(np.random.default_rng(0).integers(0, 2, (3, 5))).astype(dtype))
    before, missed = checksums({"x": jnp.asarray(x)})["x"], []
    bits = 1 if dtype == "bool" else 8 * x.dtype.itemsize
    for element in range(x.size):
        for bit in range(bits):
            raw = bytearray(x.tobytes())
            raw[element * x.dtype.itemsize + bit // 8] ^= 1 << (bit % 8)
            flipped = jnp.asarray(np.frombuffer(bytes(raw), x.dtype).reshape(x.shape))
            missed += [(element, bit)] if checksums({"x": flipped})["x"] == before else []
    assert not missed


def test_swapped_elements_are_seen():
    x = jnp.arange(12.0).reshape(3, 4)
    sums = [checksums({"x": y})["x"] for y in (x, x[::-1], x[:, ::-1], x.reshape(4, 3), x.at[0, 0].set(1).at[0, 1].set(0))]
    assert len({sums[0], sums[1], sums[2], sums[4]}) == 4 and sums[3] == sums[0]


def test_the_mesh_does_not_matter(devices):
    one = one_device(small())
    four = make_program(small(mesh__rules="fsdp"), devices)
    state = init_state(one.model.init, one.optimizer, one.layout, 3)
    split = jax.device_put(state, four.layout.shardings)
    first, second = ({"params": s.params, "optimizer": s.optimizer} for s in (state, split))
    assert checksums(first) == checksums(second) and len(checksums(first)) > 20
    assert len(jax.tree.leaves(split.params)[0].sharding.device_set) == 4


@pytest.mark.parametrize("item", ["params", "optimizer"])
def test_an_array_that_changed_is_refused_by_name(tmp_path, item):
    """The values are changed under a checksum that was true when they were saved."""
    program = one_device(small())
    state = init_state(program.model.init, program.optimizer, program.layout, 0)
    honest = restore.checksums
    with Checkpointer(epath.Path(tmp_path), program.config.checkpoint) as checkpointer:
        checkpointer.save(state, {"sample": 0})
        checkpointer.wait()
        checkpointer.restore(program.abstract)

        def flipped(trees):
            def flip(path, x):
                name = jax.tree_util.keystr(path, simple=True, separator="/")
                return x.at[(0,) * x.ndim].add(1) if name.startswith(item) and name.endswith("gated_mlp_1/up") else x

            return honest(jax.tree_util.tree_map_with_path(flip, trees))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(restore, "checksums", flipped)
            with pytest.raises(InputError, match=rf"no step in .* is good: step 0, {item}/.*gated_mlp_1/up doesn't have"):
                checkpointer.restore(program.abstract)
