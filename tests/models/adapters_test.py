"""LoRA through `param`: under scan and remat, in every mixer, with gradients to the adapters alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.errors import InputError
from research.models.attention import Attention
from research.models.mixers import Parallel
from research.models.mlp import Mlp
from research.models.moe import Moe
from research.params import AdapterRule, LowRank, flatten, init_adapters, merge_adapters
from research.schema import Stage
from tests.models.harness import QUICK, assert_close, context
from tests.models.small_models import DENSE, PACKED, generic_params, make_model, mean_loss, random_tokens
from tests.spikes.recurrence import LinearRecurrence
from tests.spikes.value_residual import ValueResidual

STAGES = (
    Stage((Attention(heads=4, kv_heads=2), Moe(experts=4, top_k=2, hidden=8)), 1),
    Stage((Parallel((LinearRecurrence(width=12), Mlp(hidden=24))), ValueResidual(width=8)), 2),
)
MODEL = make_model(*STAGES)
RULES = (
    AdapterRule("decoder/*", rank=2, alpha=4.0),
    AdapterRule("unembedding/*", 3, 3.0),
    AdapterRule("embedding/*", 2, 2.0),
)


def trained_adapters() -> dict:
    """Adapters whose B isn't zero any more."""
    adapters = init_adapters(MODEL.weights, RULES, jax.random.key(0))
    noise = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: leaf + 0.1 * noise.normal(size=leaf.shape).astype(np.float32), adapters)


@functools.cache
def compiled(model):
    function = jax.value_and_grad(lambda a, p, t, c: mean_loss(model, p, t, c, a), has_aux=True)
    return jax.jit(function, compiler_options=QUICK)


@functools.cache
def forward():
    return jax.jit(lambda a, p, t, c: mean_loss(MODEL, p, t, c, a), compiler_options=QUICK)


def run(model, adapters):
    """((loss, ...), gradients of the adapters)."""
    return compiled(model)(adapters, generic_params(MODEL), random_tokens(2), context(PACKED))


def test_every_weight_with_inputs_has_an_adapter():
    adapters = flatten(init_adapters(MODEL.weights, RULES, jax.random.key(0)))
    assert set(adapters) == {path for path, weight in MODEL.weights.items() if weight.inputs}
    for path, adapter in adapters.items():
        assert (
            isinstance(adapter, LowRank) and not np.any(adapter.b) and np.all(np.any(adapter.a != 0, axis=-1))
        ), path
    assert (
        adapters["unembedding/kernel"].scale == 1.0
        and adapters["decoder/stage_0/attention_0/query"].scale == 2.0
    )
    output = adapters["decoder/stage_0/attention_0/output"]
    assert (output.a.shape, output.b.shape) == ((1, 4, 4, 2), (1, 2, 16))  # (layers, heads, head_dim, rank)
    up = adapters["decoder/stage_0/moe_1/up"]
    assert (up.a.shape, up.b.shape) == ((1, 16, 2), (1, 2, 4, 8))  # experts share A


def test_fresh_adapters_change_nothing():
    adapters = init_adapters(MODEL.weights, RULES, jax.random.key(0))
    arguments = generic_params(MODEL), random_tokens(2), context(PACKED)
    jax.tree.map(np.testing.assert_array_equal, forward()(adapters, *arguments), forward()(None, *arguments))


def test_merged_is_applied():
    adapters, params, tokens = trained_adapters(), generic_params(MODEL), random_tokens(2)
    merged = merge_adapters(params, adapters, MODEL.weights)
    assert jax.tree.map(jnp.shape, merged) == jax.tree.map(jnp.shape, params)
    loss = forward()(None, merged, tokens, context(PACKED))
    assert_close(forward()(adapters, params, tokens, context(PACKED)), loss)
    plain = forward()(None, params, tokens, context(PACKED))
    assert np.max(np.abs(plain[1][0] - loss[1][0])) > 1e-2


def test_gradients_reach_every_adapter_under_scan_and_remat():
    """With B zero only B learns; later both do. Remat changes nothing."""
    adapters = trained_adapters()
    (loss, _), grads = run(MODEL, adapters)
    for path, grad in flatten(grads).items():
        assert np.all(np.isfinite(grad.a)) and np.any(grad.a != 0) and np.any(grad.b != 0), path
        if path.startswith("decoder"):
            assert all(np.any(np.asarray(layer) != 0) for layer in grad.b), path
    (_, _), fresh = run(MODEL, init_adapters(MODEL.weights, RULES, jax.random.key(0)))
    assert all(not np.any(grad.a) and np.any(grad.b != 0) for grad in flatten(fresh).values())
    (remat_loss, _), remat_grads = run(make_model(*STAGES, remat="full"), adapters)
    assert_close(remat_loss, loss)
    assert_close(remat_grads, grads)


def test_gradients_are_those_of_the_merged_weights():
    """dA and dB by the chain rule from the gradient of W, for a projection with two output axes."""
    adapters, params, tokens = trained_adapters(), generic_params(MODEL), random_tokens(2)
    path = "decoder/stage_0/attention_0/query"
    _, grads = run(MODEL, adapters)
    merged = merge_adapters(params, adapters, MODEL.weights)
    d_weight = jax.jit(
        jax.grad(lambda p: mean_loss(MODEL, p, tokens, context(PACKED))[0]), compiler_options=QUICK
    )(merged)
    d_LxDxHxK, adapter, grad = flatten(d_weight)[path], flatten(adapters)[path], flatten(grads)[path]
    assert_close(grad.a, adapter.scale * jnp.einsum("ldhk,lrhk->ldr", d_LxDxHxK, adapter.b))
    assert_close(grad.b, adapter.scale * jnp.einsum("ldhk,ldr->lrhk", d_LxDxHxK, adapter.a))


def test_adapters_draw_by_path():
    """An adapter's A depends on its own path and the key, not on what else is adapted."""
    some = init_adapters(MODEL.weights, RULES[:1], jax.random.key(0))
    every = init_adapters(MODEL.weights, RULES, jax.random.key(0))
    path = "decoder/stage_0/attention_0/query"
    np.testing.assert_array_equal(flatten(some)[path].a, flatten(every)[path].a)
    twin = "decoder/stage_0/moe_1/gate", "decoder/stage_0/moe_1/up"
    assert np.any(flatten(some)[twin[0]].a != flatten(some)[twin[1]].a)


@pytest.mark.parametrize("pattern", ["decoder/*/nothing", "decoder/*/norm_0/gain", ""])
def test_a_rule_that_matches_nothing_is_an_error(pattern):
    model = make_model(Stage(DENSE, 1))
    with pytest.raises(InputError, match=r"^adapters: .* matches no weight with an input axis; "):
        init_adapters(model.weights, (AdapterRule(pattern, 2, 2.0),), jax.random.key(0))
