"""One device = four devices, for every mixer and every rule: values, gradients, losses and statistics."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest

from research import sharding
from research.models.context import Context
from research.params import Declared, Weight
from research.schema import MeshConfig
from tests.models.cases import CASES, DIM
from tests.models.harness import (
    QUICK,
    Layout,
    apply,
    assert_close,
    context,
    declared,
    make_params,
    memory_of,
    random,
    reads_memory,
)

MESHES = {
    "dp": MeshConfig(rules="dp"),
    "fsdp": MeshConfig(rules="fsdp"),
    "fsdp_tp": MeshConfig(rules="fsdp_tp", tensor=2),
    "cp": MeshConfig(rules="cp", context=2),
    "ring": MeshConfig(rules="ring", context=2),
    "ep": MeshConfig(rules="ep", expert=2),
}
ONLY = {"ep": ("Moe", "Parallel"), "ring": ("Attention", "LatentAttention", "Parallel")}  # the others have no such axis
PAIRS = [(rules, row) for rules in MESHES for row in CASES if rules not in ONLY or row in ONLY[rules]]
LAYOUT = Layout((((1, 5), (2, 7)), ((1, 7), (2, 5)), ((1, 12),), ((1, 3), (0, 1), (1, 4), (2, 3), (0, 1))))


def weights_of_mixer(cfg) -> dict[str, Weight]:
    flat = {
        "/".join(entry.key for entry in path): box
        for path, box in jax.tree_util.tree_leaves_with_path(
            declared(cfg), is_leaf=lambda leaf: isinstance(leaf, Declared)
        )
    }
    return {
        path: Weight(box.value.shape, tuple(box.names), box.inputs, box.role, "")
        for path, box in flat.items()
    }


def run_all(cfgs, all_params, x, memory, ctx, probe):
    """Every case of a row in one program: fewer compilations."""

    def total(all_params, x, memory):
        losses, outputs = [], []
        for cfg, params in zip(cfgs, all_params):
            inner = (
                ctx.replace(memory_BxSxD=memory)
                if reads_memory(cfg)
                else ctx.replace(memory_BxSxD=None, memory_segment_ids_BxS=None)
            )
            y, _, aux = apply(cfg, params, x, inner)
            losses.append(
                jnp.sum(y * probe)
                + sum(jnp.sum(leaf) for name, leaf in aux.items() if name.endswith("_loss"))
            )
            outputs.append((y, aux))
        return sum(losses), outputs

    grads, outputs = jax.grad(total, argnums=(0, 1, 2), has_aux=True)(all_params, x, memory)
    return outputs, grads


@functools.cache
def one_device(row: str):
    return jax.jit(functools.partial(run_all, cfgs_of(row)), compiler_options=QUICK)(*arguments(row))


def cfgs_of(row: str) -> tuple:
    return tuple(case.cfg for case in CASES[row].values() if case.sharded)


def arguments(row: str) -> tuple:
    x, probe, memory = random(4, 12, DIM), random(4, 12, DIM, seed=1), memory_of(LAYOUT)
    ctx = context(LAYOUT, memory_segment_ids_BxS=jnp.asarray(LAYOUT.memory_segment_ids_BxS))
    return (
        tuple(make_params(cfg) for cfg in cfgs_of(row)),
        jnp.asarray(x),
        jnp.asarray(memory),
        ctx,
        jnp.asarray(probe),
    )


@pytest.mark.parametrize("rules_name, row", PAIRS)
def test_four_devices_give_what_one_gives(row: str, rules_name: str, devices):
    mesh, rules = sharding.make_mesh(MESHES[rules_name], devices), sharding.rules_named(rules_name)
    all_params, x, memory, ctx, probe = arguments(row)
    placed = tuple(
        jax.device_put(params, sharding.weight_shardings(weights_of_mixer(cfg), mesh, rules))
        for cfg, params in zip(cfgs_of(row), all_params)
    )
    rows = sharding.batch_sharding(mesh, rules, ("batch", "length"))
    whole = sharding.batch_sharding(mesh, rules, ("batch", None))
    put = functools.partial(jax.device_put, device=rows)
    ctx = ctx.replace(
        positions_BxL=put(ctx.positions_BxL),
        segment_ids_BxL=put(ctx.segment_ids_BxL),
        memory_segment_ids_BxS=jax.device_put(ctx.memory_segment_ids_BxS, whole),
    )
    with sharding.use(mesh, rules):
        outputs, grads = jax.jit(functools.partial(run_all, cfgs_of(row)), compiler_options=QUICK)(
            placed, put(x), jax.device_put(memory, whole), ctx, put(probe)
        )
    expected_outputs, expected_grads = one_device(row)
    assert_close(outputs, expected_outputs, what="outputs")
    assert_close(grads, expected_grads, what="gradients")
    assert len(outputs[0][0].sharding.device_set) == 4


@pytest.mark.parametrize("platform, kernels", [("tpu", 2), ("cpu", 0)])
def test_the_platform_picks_the_kernel_at_lowering(platform, kernels, devices):
    """Lowered for a TPU on this machine, the sharded step holds Mosaic calls both ways; else none."""
    case = CASES["PallasScale"]["blocks"]
    mesh, rules = sharding.make_mesh(MESHES["fsdp"], devices), sharding.rules_named("fsdp")
    rows = sharding.batch_sharding(mesh, rules, ("batch", "length", None))
    x = jax.ShapeDtypeStruct((4, 128, 128), jnp.float32, sharding=rows)
    cfg = dataclasses.replace(case.cfg, block=64)

    def loss(params, x):
        y, _, _ = apply(cfg, params, x, Context(*[jnp.ones((4, 128), jnp.int32)] * 2))
        return jnp.sum(y**2)

    with sharding.use(mesh, rules):
        traced = jax.jit(jax.grad(loss, argnums=(0, 1))).trace({"scale": jnp.ones(128)}, x)
        text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert text.count("tpu_custom_call") == kernels
