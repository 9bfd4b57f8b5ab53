"""The contract of a mixer, over every row of MIXERS and every case of it (cases.py)."""

import functools
from typing import Iterable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.models import mixers
from research.params import Declared
from research.training.flops import count_flops
from tests.models.cases import CASES, DIM, FLAT, Case
from tests.models.harness import (
    QUICK,
    Layout,
    apply,
    assert_close,
    context,
    declared,
    jitted,
    make_params,
    memory_of,
    random,
    reads_memory,
    statistics_of,
    step_through,
    with_memory,
)
from tests.spikes.pallas_scale import KERNEL

FIRST = {f"{row}-{next(iter(cases))}" for row, cases in CASES.items()}  # `make test` takes one case of each row


def flat_cases(names: Iterable[str]) -> list:
    return [pytest.param(FLAT[name], id=name, marks=() if name in FIRST else pytest.mark.slow) for name in names]


every_case = pytest.mark.parametrize("case", flat_cases(FLAT))
exact_cases = pytest.mark.parametrize("case", flat_cases(name for name, case in FLAT.items() if case.exact))

LENGTH = 12
ONE_DOCUMENT = Layout((((1, LENGTH),),) * (LENGTH + 1))
PACKED = Layout((((1, 5), (2, 7)), ((1, 7), (2, 5))))
# Padding in the middle of a row, inside a document (a shorter prompt beside a longer one), and at the end.
PADDED = Layout((((1, 5), (0, 1), (2, 6)), ((1, 3), (0, 1), (1, 4), (2, 3), (0, 1))))
COMPACT = Layout((((1, 5), (2, 6), (0, 1)), ((1, 7), (2, 3), (0, 2))))
SPLITS = [(12,), (1,) * 12, (4, 4, 4), (4, 1, 1, 1, 1, 4)]


def test_every_row_has_a_case():
    assert set(CASES) == set(mixers.MIXERS)
    for row, cases in CASES.items():
        assert cases and all(type(case.cfg).__name__ == row for case in cases.values())
        assert all(case.why for case in cases.values() if case.extra_flops or not case.exact)


@every_case
def test_causal(case: Case):
    """Row t of the batch has another token t: what is before stays, the token itself changes."""
    x_TxLxD = np.tile(random(1, LENGTH, DIM), (LENGTH + 1, 1, 1))
    x_TxLxD[np.arange(LENGTH), np.arange(LENGTH)] += random(LENGTH, DIM, seed=1)
    ctx = with_memory(
        case.cfg,
        context(ONE_DOCUMENT),
        ONE_DOCUMENT,
        np.tile(memory_of(ONE_DOCUMENT)[:1], (LENGTH + 1, 1, 1)),
    )
    y_TxLxD, _, _ = jitted(case.cfg, make_params(case.cfg), x_TxLxD, ctx)
    changed_TxL = np.abs(np.asarray(y_TxLxD[:-1] - y_TxLxD[-1:])).max(axis=-1)
    t, l = np.indices(changed_TxL.shape)
    assert changed_TxL[l < t].max() <= 1e-6
    if not case.exact:  # a token may be dropped, and its place taken by another one
        assert changed_TxL[l == t].max() > 1e-4
        return
    assert changed_TxL[l == t].min() > 1e-4
    if case.sideways:
        assert changed_TxL[l == t + 1].min() > 1e-5
    else:
        assert changed_TxL[l > t].max() <= 1e-6


@functools.partial(jax.jit, static_argnums=0, compiler_options=QUICK)
def value_and_grads(cfg, params, x, memory, ctx, probe):
    """y, and the gradients of a weighted sum of it with respect to weights, input and memory."""

    def total(params, x, memory):
        inner = ctx.replace(memory_BxSxD=memory) if reads_memory(cfg) else ctx
        y, _, aux = apply(cfg, params, x, inner)
        return jnp.sum(y * probe), (y, statistics_of(aux))

    grads, (y, statistics) = jax.grad(total, argnums=(0, 1, 2), has_aux=True)(params, x, memory)
    return y, grads, statistics


@exact_cases
def test_packed_is_standalone(case: Case):
    """A packed row gives the values and gradients of its documents alone; every weight learns."""
    cfg, params = case.cfg, make_params(case.cfg)
    x, probe, memory = random(2, LENGTH, DIM), random(2, LENGTH, DIM, seed=2), memory_of(PACKED)
    ctx = with_memory(cfg, context(PACKED), PACKED, memory)
    y, (d_params, d_x, d_memory), statistics = value_and_grads(cfg, params, x, memory, ctx, probe)
    total = jax.tree.map(jnp.zeros_like, d_params)
    total_statistics = jax.tree.map(jnp.zeros_like, statistics)
    for length in (5, 7):
        alone = Layout((((1, length),),) * 2)
        places = [(b, np.nonzero((PACKED.segment_ids_BxL[b] == s))[0], s) for b in (0, 1) for s in (1, 2)]
        places = [place for place in places if len(place[1]) == length]
        cut = lambda array: np.stack([np.asarray(array)[b, columns] for b, columns, _ in places])
        cut_memory = lambda array: np.stack(
            [np.asarray(array)[b, PACKED.memory_segment_ids_BxS[b] == s] for b, _, s in places]
        )
        alone_ctx = with_memory(cfg, context(alone, packed=False), alone, cut_memory(memory))
        y_alone, (d_params_alone, d_x_alone, d_memory_alone), some_statistics = value_and_grads(
            cfg, params, cut(x), cut_memory(memory), alone_ctx, cut(probe)
        )
        assert_close(cut(y), y_alone, what="values")
        assert_close(cut(d_x), d_x_alone, what="gradient of the input")
        assert_close(cut_memory(d_memory), d_memory_alone, what="gradient of the memory")
        total = jax.tree.map(jnp.add, total, d_params_alone)
        total_statistics = jax.tree.map(jnp.add, total_statistics, some_statistics)
    assert_close(d_params, total, what="gradients of the weights")
    assert_close(statistics, total_statistics, what="statistics")
    assert_every_weight_learns(d_params, statistics)


def assert_every_weight_learns(d_params: dict, statistics: dict) -> None:
    """By gradient or by statistics, never by both: an unused weight is a bug, one moved twice, too."""
    for path, grad in jax.tree_util.tree_leaves_with_path(d_params):
        keys = tuple(entry.key for entry in path)
        assert bool(np.any(np.asarray(grad) != 0)) != (keys in statistics), keys


@exact_cases
def test_a_neighbour_leaves_no_trace(case: Case):
    """Another first document, of huge values, changes neither the second's values nor its gradients, by a bit."""
    cfg, params, memory = case.cfg, make_params(case.cfg), memory_of(PACKED)
    ctx = with_memory(cfg, context(PACKED), PACKED, memory)
    second = PACKED.segment_ids_BxL == 2
    x, probe = random(2, LENGTH, DIM), random(2, LENGTH, DIM, seed=2) * second[..., None]
    other = np.where(second[..., None], x, 1e4 * random(2, LENGTH, DIM, seed=3)).astype(np.float32)
    results = []
    for tokens in (x, other):
        y, (d_params, d_x, _), _ = value_and_grads(cfg, params, tokens, memory, ctx, probe)
        results.append((np.asarray(y)[second], np.asarray(d_x)[second], d_params))
    jax.tree.map(np.testing.assert_array_equal, results[0][:2], results[1][:2])
    assert_close(results[1][2], results[0][2], what="gradients of the weights")


@pytest.mark.parametrize(
    "case", [c for c in FLAT.values() if not c.exact], ids=lambda case: type(case.cfg).__name__
)
def test_inexact_weights_learn(case: Case):
    x, memory = random(2, LENGTH, DIM), memory_of(PACKED)
    ctx = with_memory(case.cfg, context(PACKED), PACKED, memory)
    _, (d_params, _, _), statistics = value_and_grads(
        case.cfg, make_params(case.cfg), x, memory, ctx, random(2, LENGTH, DIM)
    )
    assert_every_weight_learns(d_params, statistics)


@exact_cases
def test_parallel_is_prefill_is_steps(case: Case):
    """Any split into calls gives what one parallel call gives, across resets, and with padding anywhere."""
    cfg, params = case.cfg, make_params(case.cfg)
    x = random(2, LENGTH, DIM)
    parallel = with_memory(cfg, context(PADDED), PADDED, memory_of(PADDED))
    y, state, _ = jitted(cfg, params, x, parallel)
    assert state is None
    valid = PADDED.segment_ids_BxL != 0
    states = []
    for splits in SPLITS:
        y_split, state = step_through(cfg, params, x, PADDED, splits)
        assert_close(y_split[valid], np.asarray(y)[valid], what=f"splits {splits}")
        states.append(state)
    for splits, state in zip(SPLITS[1:], states[1:]):
        assert_close(state, states[0], what=f"state after {splits}")

    # The same tokens without the padding between them.
    x_compact = random(2, LENGTH, DIM, seed=5)
    for b in (0, 1):
        x_compact[b, COMPACT.segment_ids_BxL[b] != 0] = x[b, valid[b]]
    y_compact, _, _ = jitted(
        cfg, params, x_compact, with_memory(cfg, context(COMPACT), COMPACT, memory_of(COMPACT))
    )
    assert_close(np.asarray(y_compact)[COMPACT.segment_ids_BxL != 0], np.asarray(y)[valid], what="compact")


@exact_cases
def test_padding_leaves_state_unchanged(case: Case):
    """Bit by bit, whatever the padding holds, in a prefill and in a step."""
    cfg, params = case.cfg, make_params(case.cfg)
    state = mixers.row(cfg).module.init_state(cfg, 2, DIM, LENGTH, jnp.float32)
    columns = slice(0, 4)  # compiled for the splits already
    ctx = with_memory(cfg, context(PADDED, columns), PADDED, memory_of(PADDED))
    _, state, _ = jitted(cfg, params, jnp.asarray(random(2, LENGTH, DIM)[:, columns]), ctx, state)
    for size in (4, 1):
        _, after, _ = jitted(
            cfg, params, random(2, size, DIM, seed=9), context(Layout((((0, size),),) * 2)), state
        )
        for name, value in after.items():
            jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b, err_msg=name), value, state[name])


@every_case
def test_bfloat16_is_finite(case: Case):
    """Activations stay in bfloat16; a decode state keeps shapes and dtypes: it can be a loop's carry."""
    cfg = case.cfg
    params = jax.tree.map(
        lambda box, value: value if box.role == "vector" else value.astype(jnp.bfloat16),
        declared(cfg),
        make_params(cfg),
        is_leaf=lambda leaf: isinstance(leaf, Declared),
    )
    x = jnp.asarray(random(2, LENGTH, DIM) * 4, jnp.bfloat16)
    ctx = with_memory(cfg, context(PADDED), PADDED, jnp.asarray(memory_of(PADDED), jnp.bfloat16))
    y, _, aux = jitted(cfg, params, x, ctx)
    assert y.dtype == jnp.bfloat16 and y.shape == x.shape
    assert all(bool(jnp.all(jnp.isfinite(leaf.astype(jnp.float32)))) for leaf in jax.tree.leaves((y, aux)))
    state = mixers.row(cfg).module.init_state(cfg, 2, DIM, LENGTH, jnp.bfloat16)
    after = jax.eval_shape(functools.partial(apply, cfg), params, x, ctx, state)[1]
    assert jax.tree.map(lambda a: (a.shape, a.dtype), after) == jax.tree.map(
        lambda a: (a.shape, a.dtype), state
    )


@every_case
def test_state_is_described(case: Case):
    """`state_axes` has the tree of `init_state`, one name a dimension; the bytes are those of the arrays."""
    module, cfg = mixers.row(case.cfg).module, case.cfg
    state, axes = module.init_state(cfg, 1, DIM, LENGTH, jnp.bfloat16), module.state_axes(cfg)
    ranks = jax.tree.map(lambda names: len(names), axes, is_leaf=lambda leaf: isinstance(leaf, tuple))
    assert ranks == jax.tree.map(jnp.ndim, state)
    known = {None, "batch", "heads", "kv_heads", "state", "mlp", "embed"}
    for names in jax.tree.leaves(axes, is_leaf=lambda leaf: isinstance(leaf, tuple)):
        assert set(names) <= known and names[0] == "batch"
    assert mixers.state_bytes(cfg, DIM, LENGTH, jnp.bfloat16) == sum(
        leaf.nbytes for leaf in jax.tree.leaves(state)
    )


@every_case
def test_flops_are_the_jaxpr_s(case: Case):
    """What the config says without a mask is what the forward pass multiplies, per token."""
    cfg = case.cfg
    layout = Layout((((1, LENGTH),),) * 2)
    ctx = context(layout)
    if reads_memory(cfg):  # the config assumes a memory as long as the row
        ctx = ctx.replace(memory_BxSxD=random(2, LENGTH, DIM), memory_segment_ids_BxS=ctx.segment_ids_BxL)
    counted = count_flops(
        functools.partial(apply, cfg),
        make_params(cfg),
        random(2, LENGTH, DIM),
        ctx,
        pallas_flops={KERNEL: 0.0},
    )
    expected = mixers.row(cfg).module.flops(cfg, DIM, LENGTH, causal=False) + case.extra_flops
    assert counted / (2 * LENGTH) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("case", CASES["Attention"].values(), ids=CASES["Attention"].keys())
def test_causal_flops_count_visible_keys(case: Case):
    cfg = case.cfg
    module = mixers.row(cfg).module
    visible = [LENGTH if cfg.cross else min(t + 1, cfg.window or LENGTH) for t in range(LENGTH)]
    scores = 4.0 * cfg.heads * cfg.width(DIM) * np.mean(visible)
    unmasked = module.flops(cfg, DIM, LENGTH, causal=False) - 4.0 * cfg.heads * cfg.width(DIM) * LENGTH
    assert module.flops(cfg, DIM, LENGTH) == pytest.approx(unmasked + scores)
