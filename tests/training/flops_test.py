"""The flop counter against counts by hand, construct by construct, on whole training steps."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.sharding import AxisType, PartitionSpec

from kernels.cross_entropy import cross_entropy
from research.training.flops import count_flops

T, D, F, LAYERS = 6, 8, 24, 5  # tokens, width, hidden width, layers
X = jax.ShapeDtypeStruct((T, D), jnp.float32)
SQUARE = jax.ShapeDtypeStruct((D, D), jnp.float32)
PRODUCT = 2 * T * D * D  # of X @ SQUARE


def mlp(x_TxD, weights):
    up_DxF, down_FxD = weights
    return x_TxD + jnp.tanh(x_TxD @ up_DxF) @ down_FxD, None


def stack_loss(wrap):
    def loss(weights, x_TxD):
        y_TxD, _ = jax.lax.scan(wrap(mlp), x_TxD, weights)
        return jnp.sum(y_TxD**2)

    return loss


WEIGHTS = (
    jax.ShapeDtypeStruct((LAYERS, D, F), jnp.float32),
    jax.ShapeDtypeStruct((LAYERS, F, D), jnp.float32),
)
N = 2 * LAYERS * D * F


def test_training_a_scanned_stack_is_6ND():
    """With the gradient of the input: 2ND forward, 2ND for the weights, 2ND for the activations."""
    step = jax.value_and_grad(stack_loss(lambda layer: layer), argnums=(0, 1))
    assert count_flops(step, WEIGHTS, X) == 6 * N * T
    assert count_flops(jax.jit(step), WEIGHTS, X) == 6 * N * T
    assert count_flops(stack_loss(lambda layer: layer), WEIGHTS, X) == 2 * N * T


def test_full_rematerialisation_is_7_6_of_it():
    """The first product of each layer is made again; the second isn't: no gradient needs its result."""
    step = jax.value_and_grad(stack_loss(jax.checkpoint), argnums=(0, 1))
    assert count_flops(step, WEIGHTS, X) == 7 * N * T


def test_rematerialisation_of_one_product_a_layer_is_8_6():
    """Where a nonlinearity follows the layer's only product, all of the forward pass is made again."""

    def loss(weights_NxDxD, x_TxD):
        layer = jax.checkpoint(lambda x_TxD, w_DxD: (jnp.tanh(x_TxD @ w_DxD), None))
        return jnp.sum(jax.lax.scan(layer, x_TxD, weights_NxDxD)[0])

    weights = jax.ShapeDtypeStruct((LAYERS, D, D), jnp.float32)
    step = jax.value_and_grad(loss, argnums=(0, 1))
    assert count_flops(step, weights, X) == 8 * LAYERS * D * D * T


def test_a_checkpoint_policy_that_saves_products_costs_nothing():
    wrap = lambda layer: jax.checkpoint(layer, policy=jax.checkpoint_policies.dots_saveable)
    assert count_flops(jax.value_and_grad(stack_loss(wrap), argnums=(0, 1)), WEIGHTS, X) == 6 * N * T


def test_chunked_cross_entropy_is_three_products_and_one_for_evaluation():
    rows, length, vocab = 2, 12, 10
    shapes = [(rows, length, D), (D, vocab), (rows, length), (rows, length)]
    args = [jax.ShapeDtypeStruct(s, t) for s, t in zip(shapes, "ffif", strict=True)]
    loss = lambda *a: cross_entropy(*a, chunk=4)[0]
    product = 2 * rows * length * D * vocab
    assert count_flops(loss, *args) == product
    assert count_flops(jax.grad(loss, argnums=(0, 1)), *args) == 3 * product


@jax.custom_vjp
def custom(x, w):
    return x @ w


custom.defvjp(lambda x, w: (x @ w, (x, w)), lambda saved, d: (d @ saved[1].T, saved[0].T @ d))


@jax.custom_jvp
def custom_forward(x, w):
    return x @ w


custom_forward.defjvp(lambda p, t: (custom_forward(*p), t[0] @ p[1] + p[0] @ t[1]))


def platforms(x, w):
    return jax.lax.platform_dependent(
        x, w, tpu=lambda x, w: x @ w @ w @ w, cuda=lambda x, w: x @ w @ w, default=lambda x, w: x @ w
    )


def platforms_without_default(x, w):
    return jax.lax.platform_dependent(x, w, tpu=lambda x, w: x @ w @ w, cpu=lambda x, w: x @ w)


def cond(x, w):
    return jax.lax.cond(x.sum() > 0, lambda: x @ w @ w, lambda: x)


def switch(x, w):
    return jax.lax.switch(x.sum().astype(int), [lambda: x, lambda: x @ w @ w @ w, lambda: x @ w])


def nested_scans(x, w):
    inner = lambda x, _: (x @ w, None)
    return jax.lax.scan(lambda x, _: jax.lax.scan(inner, x, length=3), x, length=4)[0]


def loop_without_products(x, w):
    return jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: x + 1, x) @ w


CONSTRUCTS = {  # in products of X @ SQUARE
    "one": (lambda x, w: x @ w, 1),
    "none": (lambda x, w: x + w.sum(), 0),
    "jit": (jax.jit(lambda x, w: jax.jit(jnp.matmul)(x, w) @ w), 2),
    "cond": (cond, 2),
    "switch": (switch, 3),
    "nested scans": (nested_scans, 12),
    "fori_loop": (lambda x, w: jax.lax.fori_loop(0, 7, lambda i, x: x @ w, x), 7),
    "while without products": (loop_without_products, 1),
    "map": (lambda x, w: jax.lax.map(lambda row: row @ w, x), 1),
    "vmap": (lambda x, w: jax.vmap(jnp.matmul, (0, None))(x, w), 1),
    "custom_vjp": (custom, 1),
    "custom_vjp, gradient": (jax.grad(lambda x, w: custom(x, w).sum(), argnums=(0, 1)), 3),
    "custom_jvp": (custom_forward, 1),
    "custom_jvp, gradient": (jax.grad(lambda x, w: custom_forward(x, w).sum(), argnums=(0, 1)), 3),
    "remat": (jax.checkpoint(lambda x, w: x @ w), 1),
    "remat, gradient": (jax.grad(jax.checkpoint(lambda x, w: jnp.tanh(x @ w).sum()), argnums=(0, 1)), 4),
    "platform_dependent": (platforms, 1),
    "platform_dependent without default": (platforms_without_default, 2),
}


@pytest.mark.parametrize("name", CONSTRUCTS)
def test_construct(name):
    fn, products = CONSTRUCTS[name]
    assert count_flops(fn, X, SQUARE) == products * PRODUCT


@pytest.mark.parametrize("platform, products", [(None, 1), ("tpu", 3), ("cuda", 2), ("cpu", 1)])
def test_platform_dependent_counts_the_branch_of_a_platform(platform, products):
    assert count_flops(platforms, X, SQUARE, platform=platform) == products * PRODUCT


def test_einsum_with_batch_axes():
    q, k = jax.ShapeDtypeStruct((2, 5, 3, 4), "f"), jax.ShapeDtypeStruct((2, 7, 3, 4), "f")
    fn = lambda q, k: jnp.einsum("blhk,bshk->bhls", q, k)
    assert count_flops(fn, q, k) == 2 * (2 * 3) * 5 * 7 * 4


def test_shard_map_counts_every_shard(devices):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    split, whole = PartitionSpec("data"), PartitionSpec()
    x = jax.ShapeDtypeStruct((8, D), jnp.float32)
    fn = jax.shard_map(jnp.matmul, mesh=mesh, in_specs=(split, whole), out_specs=split)
    assert count_flops(fn, x, SQUARE) == 2 * 8 * D * D  # a quarter on each
    everywhere = jax.shard_map(jnp.matmul, mesh=mesh, in_specs=(whole, whole), out_specs=whole)
    assert count_flops(everywhere, x, SQUARE) == 4 * 2 * 8 * D * D  # all of it on each


def test_shard_map_over_some_axes(devices):
    """Inside, shapes are whole along the axis that stays automatic: it must not multiply."""
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    split = PartitionSpec("data")
    fn = jax.shard_map(
        jnp.matmul, mesh=mesh, in_specs=(split, PartitionSpec()), out_specs=split, axis_names={"data"}
    )
    assert count_flops(fn, jax.ShapeDtypeStruct((8, D), jnp.float32), SQUARE) == 2 * 8 * D * D


def test_ragged_dot_and_its_gradients():
    """Every token meets one expert's weights: the number of experts doesn't count."""
    weights = jax.ShapeDtypeStruct((3, D, F), jnp.float32)
    sizes = jax.ShapeDtypeStruct((3,), jnp.int32)
    loss = lambda x, w, sizes: jax.lax.ragged_dot(x, w, sizes).sum()
    assert count_flops(loss, X, weights, sizes) == 2 * T * D * F
    assert count_flops(jax.value_and_grad(loss, argnums=(0, 1)), X, weights, sizes) == 3 * 2 * T * D * F


def conv(x_BxLxC, w_KxIxO, *, groups, stride):
    axes = ("NLC", "LIO", "NLC")
    return jax.lax.conv_general_dilated(
        x_BxLxC, w_KxIxO, (stride,), "SAME", dimension_numbers=axes, feature_group_count=groups
    )


@pytest.mark.parametrize("groups, stride", [(1, 1), (2, 1), (8, 1), (1, 2), (8, 2)])
def test_convolutions(groups, stride):
    """Dense, grouped, depthwise; each gradient (dilated inputs, batch groups) costs as much as forward."""
    B, L, C, K = 2, 16, 8, 4
    x, w = jax.ShapeDtypeStruct((B, L, C), "f"), jax.ShapeDtypeStruct((K, C // groups, C), "f")
    fn = lambda x, w: conv(x, w, groups=groups, stride=stride).sum()
    once = 2 * B * (L // stride) * C * K * (C // groups)
    assert count_flops(fn, x, w) == once
    assert count_flops(jax.value_and_grad(fn, argnums=0), x, w) == 2 * once
    assert count_flops(jax.value_and_grad(fn, argnums=1), x, w) == 2 * once


def kernel(x_ref, o_ref):
    o_ref[...] = x_ref[...] @ x_ref[...]


def pallas(x, w):
    return pl.pallas_call(kernel, out_shape=jax.ShapeDtypeStruct((D, D), jnp.float32), name="square")(w)


def test_a_pallas_kernel_may_say_its_own_cost():
    cost = pl.CostEstimate(flops=11, bytes_accessed=0, transcendentals=0)
    said = lambda x, w: pl.pallas_call(
        kernel, out_shape=jax.ShapeDtypeStruct((D, D), jnp.float32), name="said", cost_estimate=cost)(w)
    assert count_flops(said, X, SQUARE) == 11
    assert count_flops(said, X, SQUARE, pallas_flops={"said": 7.0}) == 7


def test_pallas_kernels_count_by_name():
    assert count_flops(pallas, X, SQUARE, pallas_flops={"square": 7.0}) == 7
    by_shape = {"square": lambda w: 2 * w.shape[0] ** 3}
    twice = lambda x, w: pallas(x, pallas(x, w))
    assert count_flops(twice, X, SQUARE, pallas_flops=by_shape) == 2 * 2 * D**3


def loop(x, w):
    return jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: x @ w, x)


def solve(x, w):
    return jax.lax.custom_linear_solve(lambda v: w @ v, x[0], lambda mv, b: mv(b))


BAD = {"while": (loop, "while loop"), "pallas": (pallas, "square"), "solve": (solve, "custom_linear_solve")}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_counted_says_so(name):
    fn, words = BAD[name]
    with pytest.raises(ValueError, match=words) as caught:
        count_flops(fn, X, SQUARE)
    assert "\n" not in str(caught.value)


def test_counting_runs_nothing():
    big = jax.ShapeDtypeStruct((2**20, 2**20), jnp.bfloat16)
    assert np.isclose(count_flops(jnp.matmul, big, big), 2.0**61)
