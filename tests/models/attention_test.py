"""What is special to the Attention mixer: masks beside the causal one, positions, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.errors import InputError
from research.models import mixers
from research.models.attention import Attention, alibi_slopes
from tests.models.cases import DIM
from tests.models.harness import Layout, apply, assert_close, context, jitted, make_params, random

LAYOUT = Layout((((1, 5), (2, 7)), ((1, 8), (2, 4))))
PREFIX_BxL = np.array([[1, 1, 0, 0, 0, 1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0, 0, 0, 1, 0, 0, 0]], bool)


def moved(cfg: Attention, ctx, row: int, column: int) -> np.ndarray:
    """Which outputs of `row` change with the token at `column`."""
    params, x = make_params(cfg), random(2, 12, DIM)
    other = x.copy()
    other[row, column] += random(DIM, seed=1)
    difference = jitted(cfg, params, other, ctx)[0] - jitted(cfg, params, x, ctx)[0]
    return np.abs(np.asarray(difference))[row].max(axis=-1) > 1e-6


@pytest.mark.parametrize(
    "mask_kind, window, column, sees",
    [
        ("causal", None, 6, range(6, 12)),
        ("bidirectional", None, 6, range(5, 12)),
        ("prefix", None, 6, range(5, 12)),  # in the prefix (5, 6, 7) of its document
        ("prefix", None, 9, range(9, 12)),  # behind it
        ("causal", 3, 6, range(6, 9)),
        ("bidirectional", 3, 8, range(6, 11)),
        ("prefix", 3, 6, range(5, 9)),
    ],
)
def test_who_sees_a_token(mask_kind, window, column, sees):
    cfg = Attention(heads=2, window=window)
    ctx = context(LAYOUT, mask_kind=mask_kind, prefix_BxL=jnp.asarray(PREFIX_BxL))
    assert np.nonzero(moved(cfg, ctx, 0, column))[0].tolist() == list(sees)


@pytest.mark.parametrize("splits", [(8, 4), (8, 1, 1, 1, 1), (12,)])
def test_cached_prefix(splits):
    """A prefix is bidirectional in a cache, too, where one call holds all of it."""
    cfg = Attention(heads=4, kv_heads=2)
    params, x = make_params(cfg), random(2, 12, DIM)
    whole = context(LAYOUT, mask_kind="prefix", prefix_BxL=jnp.asarray(PREFIX_BxL))
    y, _, _ = jitted(cfg, params, x, whole)
    state, outputs, start = mixers.row(cfg).module.init_state(cfg, 2, DIM, 12, jnp.float32), [], 0
    for size in splits:
        columns = slice(start, start + size)
        ctx = context(LAYOUT, columns, mask_kind="prefix", prefix_BxL=jnp.asarray(PREFIX_BxL[:, columns]))
        y_part, state, _ = jitted(cfg, params, jnp.asarray(x[:, columns]), ctx, state)
        outputs.append(y_part)
        start += size
    assert_close(np.concatenate(outputs, axis=1), y)


def test_alibi_slopes_are_the_published_ones():
    np.testing.assert_allclose(alibi_slopes(8), [2.0**-i for i in range(1, 9)])
    expected = [2.0**-i for i in range(1, 9)] + [2.0**-0.5, 2.0**-1.5, 2.0**-2.5, 2.0**-3.5]
    np.testing.assert_allclose(alibi_slopes(12), expected, rtol=1e-6)
    assert alibi_slopes(1).tolist() == [2.0**-8]


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: Attention(heads=4, kv_heads=3), r"^kv_heads: 3 does not divide heads=4; choose a divisor$"),
        (lambda: Attention(heads=4, cross=True), r"^cross: a memory has no positions; "),
        (
            lambda: Attention(heads=4, cross=True, positions="none", window=2),
            r"^cross: a memory has no positions; ",
        ),
        (
            lambda: Attention(heads=3).check(16),
            r"^heads: 3 does not divide dim=16; choose a divisor or set head_dim$",
        ),
        (lambda: Attention(heads=16).check(16), r"^head_dim: RoPE rotates pairs, not 1 features; make it even$"),
        (lambda: Attention(heads=2, rope_share=0.2).check(16), r"^head_dim: RoPE rotates pairs, not 1 features; "),
        (lambda: Attention(heads=2, rope_share=0.1).check(16), r"^head_dim: RoPE rotates pairs, not 0 features; "),
        (lambda: Attention(heads=2, rope_share=1.5), r"^rope_share: 1.5 must be at most 1.0; "),
        (lambda: Attention(heads=2, implementation="fast"), r"^implementation: unknown 'fast'; "),
    ],
)
def test_bad_configs(build, message):
    with pytest.raises(InputError, match=message):
        build()
    Attention(heads=16, positions="none").check(16)


def test_cross_attention_needs_something_to_read():
    cfg = Attention(heads=2, positions="none", cross=True)
    with pytest.raises(InputError, match=r"^ctx\.memory_BxSxD: cross-attention has nothing to read; "):
        mixers.row(cfg).module(cfg).apply({"params": make_params(cfg)}, random(2, 12, DIM), context(LAYOUT))


def test_gradients_through_padding_are_finite():
    """A row of padding alone sees nothing: zeros before the output bias, never NaN."""
    cfg = Attention(heads=2, softcap=3.0)
    ctx = context(Layout((((0, 12),), ((1, 3), (0, 9)))))
    loss = lambda params, x: jnp.sum(apply(cfg, params, x, ctx)[0] ** 2)
    x = jnp.asarray(random(2, 12, DIM))
    grads = jax.grad(loss, argnums=(0, 1))(make_params(cfg), x)
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(grads))
    np.testing.assert_array_equal(grads[1][0], 0.0)
    np.testing.assert_array_equal(jitted(cfg, make_params(cfg), x, ctx)[0][0], 0.0)
