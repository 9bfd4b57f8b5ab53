"""The loss on four devices is that of one, also where the unembedding is never whole on any of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research import sharding
from research.models import heads
from research.models.mlp import GatedMlp
from research.schema import MeshConfig, ModelConfig, Stage

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


def loss_and_gradients(tied: bool, hidden, weight, targets, weights):
    def loss(hidden, weight):
        loss_sum, *others = heads.token_loss(CFG, hidden, weight.T if tied else weight, targets, weights, z_loss=1e-2)
        return loss_sum, others

    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(hidden, weight)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", MESHES)
def test_four_devices_give_what_one_gives(name: str, tied: bool, devices, monkeypatch):
    monkeypatch.setattr(heads, "WHOLE_UNEMBEDDING", 0)
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
    by_blocks = "reduce_scatter" in str(traced.jaxpr)
    assert by_blocks == (name != "fsdp_tp")  # whose vocabulary is split already


def test_a_small_unembedding_is_taken_whole(devices):
    """In chunks of tokens: one product less."""
    mesh, rules = sharding.make_mesh(MESHES["fsdp"], devices), sharding.rules_named("fsdp")
    with sharding.use(mesh, rules):
        assert "reduce_scatter" not in str(jax.make_jaxpr(functools.partial(loss_and_gradients, False))(*arguments()))
