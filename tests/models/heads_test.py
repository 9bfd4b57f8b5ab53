"""The loss on four devices is that of one, and where the unembedding rests split it is never whole on any of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies

from kernels import cross_entropy
from research import sharding
from research.aot.compile import no_cache
from research.models import heads
from research.models.mlp import GatedMlp
from research.schema import MeshConfig, ModelConfig, Stage
from tests.jaxprs import equations

MESHES = {
    "fsdp": MeshConfig(rules="fsdp"),
    "fsdp and data": MeshConfig(rules="fsdp", data=2),
    "fsdp_tp": MeshConfig(rules="fsdp_tp", tensor=2),
    "cp": MeshConfig(rules="cp", context=2),
    "ep": MeshConfig(rules="ep", expert=2),
}
ROWS, LENGTH, DIM, VOCAB = 4, 12, 16, 300
CFG = ModelConfig(vocab_size=VOCAB, dim=DIM, stages=(Stage((GatedMlp(hidden=8),), 1),), max_len=LENGTH)


def arguments() -> tuple[jax.Array, ...]:
    noise = np.random.default_rng(0)
    hidden, unembedding = noise.normal(size=(ROWS, LENGTH, DIM)), noise.normal(size=(DIM, VOCAB))
    weights = noise.random((ROWS, LENGTH))
    return *(jnp.asarray(x, jnp.float32) for x in (hidden, unembedding)), *(
        jnp.asarray(noise.integers(0, VOCAB, (ROWS, LENGTH)), jnp.int32), jnp.asarray(weights, jnp.float32))


def small_blocks(monkeypatch, words: int) -> None:
    monkeypatch.setattr(cross_entropy, "MAX_BLOCK_LOGITS", 1)
    monkeypatch.setattr(cross_entropy, "MIN_BLOCK", words)


def sizes_moved(jaxpr) -> list[int]:
    """Elements of what is gathered, and of what is summed and scattered, anywhere in a jaxpr."""
    gathered = [x.aval.size for eqn in equations(jaxpr) if eqn.primitive.name == "all_gather" for x in eqn.outvars]
    return gathered + [x.aval.size for eqn in equations(jaxpr) if eqn.primitive.name == "reduce_scatter" for x in eqn.invars]


def loss_and_gradients(tied: bool, hidden, weight, targets, weights):
    def loss(hidden, weight):
        loss_sum, *others = heads.token_loss(CFG, hidden, weight.T if tied else weight, targets, weights, z_loss=1e-2)
        return loss_sum, others

    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(hidden, weight)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", MESHES)
def test_four_devices_give_what_one_gives(name: str, tied: bool, devices, monkeypatch):
    monkeypatch.setattr(heads, "WHOLE_UNEMBEDDING", 0)
    small_blocks(monkeypatch, words=128)  # three, the last one filled up
    hidden, unembedding, targets, weights = arguments()
    weight, axes = (unembedding.T, ("vocab", "embed")) if tied else (unembedding, ("embed", "vocab"))
    run = functools.partial(loss_and_gradients, tied)
    expected = jax.jit(run)(hidden, weight, targets, weights)
    mesh, rules = sharding.make_mesh(MESHES[name], devices), sharding.rules_named(MESHES[name].rules)
    rows = sharding.batch_sharding(mesh, rules, ("batch", "length"))
    rest = jax.NamedSharding(mesh, jax.P(*(rules.weights.get(axis) for axis in axes)))
    placed = [jax.device_put(x, place) for x, place in ((hidden, rows), (weight, rest), (targets, rows), (weights, rows))]
    with sharding.use(mesh, rules):
        traced = jax.jit(run).trace(*placed)
        got = traced.lower().compile()(*placed)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, expected)
    moved = sizes_moved(traced.jaxpr.jaxpr)
    assert bool(moved) == (name != "fsdp_tp")  # whose vocabulary is split already
    assert all(size <= DIM * 128 for size in moved)


def test_a_small_unembedding_is_taken_whole(devices):
    """In chunks of tokens: one product less."""
    mesh, rules = sharding.make_mesh(MESHES["fsdp"], devices), sharding.rules_named("fsdp")
    with sharding.use(mesh, rules):
        assert not sizes_moved(jax.make_jaxpr(functools.partial(loss_and_gradients, False))(*arguments()).jaxpr)


@pytest.fixture
def no_persistent_cache():
    with no_cache():
        yield


def test_a_tpu_has_no_room_for_it_either(monkeypatch, no_persistent_cache):
    """Compiled for four chips: temporaries are a fraction of the unembedding's gradient, and of what they are with it whole."""
    pytest.importorskip("libtpu", reason="the extra tpu is not installed")
    chips = topologies.get_topology_desc("v5e:2x2", platform="tpu").devices
    small_blocks(monkeypatch, words=1024)
    mesh, rules, D, V = sharding.make_mesh(MESHES["fsdp"], chips), sharding.rules_named("fsdp"), 512, 65536
    place = lambda shape, dtype, *spec: jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(mesh, jax.P(*spec)))
    shapes = (place((4, 256, D), jnp.bfloat16, "fsdp"), place((D, V), jnp.bfloat16, "fsdp"), place((4, 256), jnp.int32, "fsdp"),
              place((4, 256), jnp.float32, "fsdp"))
    temporaries = {}
    for name, whole in (("blocked", 0), ("chunked", 2**40)):
        monkeypatch.setattr(heads, "WHOLE_UNEMBEDDING", whole)
        run = lambda *x, name=name: loss_and_gradients(False, *x)
        with sharding.use(mesh, rules):
            temporaries[name] = jax.jit(run).lower(*shapes).compile().memory_analysis().temp_size_in_bytes
    assert temporaries["blocked"] < 4 * D * V / 3 and temporaries["blocked"] < temporaries["chunked"] / 3, temporaries
