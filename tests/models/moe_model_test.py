"""Two stages, dense then MoE, end to end: returned aux, the balancing update, and the whole sharded loss."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research import sharding
from research.models.attention import Attention
from research.models.lm import read_aux
from research.models.mixers import Parallel
from research.models.moe import Moe, MoeMixer
from research.params import flatten
from research.schema import MeshConfig, Stage
from tests.models.harness import QUICK, Layout, assert_close, context
from tests.models.small_models import (
    DENSE_THEN_MOE,
    PACKED,
    generic_params,
    loss_and_grads,
    make_model,
    mean_loss,
    random_tokens,
)

BIAS = "decoder/stage_1/moe_1/balance_bias"
MODEL = make_model(*DENSE_THEN_MOE)


def test_aux_comes_back_stacked():
    params, tokens = generic_params(MODEL), random_tokens(2)
    _, _, aux = MODEL.hidden(params, tokens, context(PACKED))
    assert set(aux) == {"stage_1"} and set(aux["stage_1"]) == {"moe_1"}
    entries = aux["stage_1"]["moe_1"]
    assert jax.tree.map(jnp.shape, entries) == {
        "router_z_loss": (2,),
        "max_load": (2,),
        "min_load": (2,),
        "statistics": {"balance_bias": (2, 4)},
    }
    loss, metrics, statistics = read_aux(aux)
    assert float(loss) == pytest.approx(float(jnp.sum(entries["router_z_loss"]))) and float(loss) > 0
    assert set(metrics) == {f"stage_1/moe_1/{name}" for name in ("router_z_loss", "max_load", "min_load")}
    assert set(statistics) == {BIAS}
    np.testing.assert_allclose(np.sum(statistics[BIAS], axis=1), tokens.size * 2)  # each token chooses two


def test_one_collapsed_layer_is_seen():
    layers = {"max_load": [1.5, 4.0, 1.1], "min_load": [0.5, 0.0, 0.9], "router_z_loss": [0.1, 0.4, 0.1]}
    loss, metrics, _ = read_aux({"stage_0": {"moe_1": {name: jnp.asarray(values) for name, values in layers.items()}}})
    expected = {"max_load": 4.0, "min_load": 0.0, "router_z_loss": 0.2}
    assert metrics == pytest.approx({f"stage_0/moe_1/{name}": value for name, value in expected.items()})
    assert float(loss) == pytest.approx(0.6)


def test_padding_is_not_counted():
    layout = Layout((((1, 5), (0, 7)), ((1, 7), (2, 2), (0, 3))))
    _, _, aux = MODEL.hidden(generic_params(MODEL), random_tokens(2), context(layout))
    np.testing.assert_allclose(np.sum(read_aux(aux)[2][BIAS], axis=1), 14 * 2)


def test_statistics_move_the_bias_towards_balance():
    params, tokens = generic_params(MODEL), random_tokens(8)
    params["decoder"]["stage_1"]["moe_1"]["balance_bias"] = (
        jnp.zeros((2, 4)).at[:, 0].set(1.0)
    )  # everyone's favourite
    step = jax.jit(
        lambda p: read_aux(MODEL.hidden(p, tokens, context(Layout((((1, 12),),) * 8)))[2])[2],
        compiler_options=QUICK,
    )
    loads = [np.asarray(step(params)[BIAS])]
    first = MODEL.apply_statistics(params, step(params))
    moved = np.asarray(flatten(first)[BIAS] - flatten(params)[BIAS])
    np.testing.assert_allclose(
        moved, 0.1 * np.sign(np.mean(loads[0], axis=1, keepdims=True) - loads[0]), atol=1e-6
    )
    others = {path: value for path, value in flatten(first).items() if path != BIAS}
    assert all(value is flatten(params)[path] for path, value in others.items())
    for _ in range(20):
        params = MODEL.apply_statistics(params, step(params))
        loads.append(np.asarray(step(params)[BIAS]))
    spread = [np.ptp(load, axis=1) for load in loads]
    assert np.all(spread[-1] < 0.6 * spread[0])


def test_update_weight_knows_its_weight():
    with pytest.raises(ValueError, match="router learns by gradient"):
        MoeMixer.update_weight(DENSE_THEN_MOE[1].pattern[1], "router", jnp.zeros(4), jnp.zeros(4))


def test_capacity_drops_and_a_wide_one_does_not():
    """With room for every token the capacity form is the exact one; with little, something is lost."""
    tokens, params = random_tokens(2), generic_params(MODEL)
    hidden = {}
    for factor in (None, 2.0, 0.5):
        sparse = dataclasses.replace(DENSE_THEN_MOE[1].pattern[1], capacity_factor=factor)
        model = make_model(DENSE_THEN_MOE[0], Stage((DENSE_THEN_MOE[1].pattern[0], sparse), 2))
        hidden[factor] = model.hidden(params, tokens, context(PACKED))[0]
    assert_close(hidden[2.0], hidden[None])
    assert np.max(np.abs(hidden[0.5] - hidden[None])) > 1e-2


def test_active_parameters():
    counts = MODEL.param_counts()
    experts = 2 * 3 * 4 * 16 * 8
    assert counts["total"] - counts["active"] >= experts / 2


def test_statistics_inside_parallel():
    """Attention and MoE side by side on one norm: aux is nested once more, and still finds its weight."""
    model = make_model(Stage((Parallel((Attention(heads=2), Moe(experts=4, top_k=2, hidden=8, balance_rate=0.1))),), 2))
    params = generic_params(model)
    (_, (_, statistics)), _ = loss_and_grads(model, params, random_tokens(2), PACKED)
    path = "decoder/stage_0/parallel_0/moe_1/balance_bias"
    assert set(statistics) == {path} <= set(model.weights)
    moved = flatten(model.apply_statistics(params, statistics))
    assert np.any(moved[path] != flatten(params)[path])
    assert model.param_counts()["active"] < model.param_counts()["total"]


LAYOUT = Layout((((1, 5), (2, 7)), ((1, 7), (2, 5)), ((1, 12),), ((1, 10), (0, 2))))
MESHES = {
    "dp": MeshConfig(rules="dp"),
    "fsdp": MeshConfig(rules="fsdp"),
    "fsdp_tp": MeshConfig(rules="fsdp_tp", tensor=2),
    "ep": MeshConfig(rules="ep", expert=2),
    "ep_4": MeshConfig(rules="ep", expert=4),
    "cp": MeshConfig(rules="cp", context=2),
}


@functools.cache
def on_one_device():
    return loss_and_grads(MODEL, generic_params(MODEL), random_tokens(4), LAYOUT)


@pytest.mark.parametrize("name", MESHES)
def test_whole_loss_on_four_devices(name, devices):
    """Scan, remat, chunked loss, heads and experts, all sharded: loss, gradients, statistics of one device."""
    mesh, rules = sharding.make_mesh(MESHES[name], devices), sharding.rules_named(MESHES[name].rules)
    model = make_model(*DENSE_THEN_MOE, remat="full")
    shardings = sharding.weight_shardings(model.weights, mesh, rules)
    params = jax.device_put(generic_params(model), shardings)
    rows = sharding.batch_sharding(mesh, rules, ("batch", "length"))
    ctx, tokens = jax.device_put((context(LAYOUT), jnp.asarray(random_tokens(4))), rows)

    def step(params, tokens, ctx):
        result, grads = jax.value_and_grad(functools.partial(mean_loss, model), has_aux=True)(
            params, tokens, ctx
        )
        return result, grads

    with sharding.use(mesh, rules):
        result, grads = jax.jit(step, out_shardings=(None, shardings), compiler_options=QUICK)(
            params, tokens, ctx
        )
    assert_close((result, grads), on_one_device(), what=name)
    assert all(len(leaf.sharding.device_set) == 4 for leaf in jax.tree.leaves(grads))
    if name in ("ep", "ep_4"):
        gate = grads["decoder"]["stage_1"]["moe_1"]["gate"]
        assert gate.addressable_shards[0].data.shape[1] == 4 // mesh.shape["expert"]
