"""What is said of whole blocks holds for each of their pairs, whatever the arguments hold."""

import jax
import numpy as np
import pytest

from kernels.visibility import MASK_KINDS, Context, Rule, visible, visible_blocks

L, S, BLOCK_Q, BLOCK_K = 24, 32, 4, 8


def packed(random, rows: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """(positions, segment ids) of documents in order, padding last."""
    positions, segments = np.zeros((2, rows, length), np.int32)
    for row in range(rows):
        ends = np.sort(random.choice(np.arange(1, length + 1), size=2, replace=False))
        for segment, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True), 1):
            positions[row, start:end], segments[row, start:end] = np.arange(end - start), segment
    return positions, segments


def scattered(random, rows: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Nothing in order: documents that come again, padding between; long runs, so that blocks agree at times."""
    positions = random.integers(0, 40, (rows, length)).astype(np.int32)
    return positions, np.repeat(random.integers(0, 4, (rows, length // 8)), 8, axis=1).astype(np.int32)


def block_truths(context: Context, rule: Rule) -> tuple[np.ndarray, np.ndarray]:
    seen = np.asarray(visible(context, rule))
    blocks = seen.reshape(len(seen), L // BLOCK_Q, BLOCK_Q, S // BLOCK_K, BLOCK_K)
    return blocks.any(axis=(2, 4)), blocks.all(axis=(2, 4))


@pytest.mark.parametrize("window", [None, 6, 30])
@pytest.mark.parametrize("mask_kind", MASK_KINDS)
def test_blocks_are_judged_exactly(mask_kind, window):
    random = np.random.default_rng(0)
    rule = Rule(mask_kind, window, None, 1.0)
    judge = jax.jit(lambda context: visible_blocks(context, rule, BLOCK_Q, BLOCK_K))
    found = np.zeros(2, int)
    for make in (packed, scattered):
        (q_positions, q_segments), (k_positions, k_segments) = make(random, 200, L), make(random, 200, S)
        prefix = (k_positions < 3) | (np.arange(200) % 3 == 0)[:, None]
        context = Context(q_positions, k_positions, q_segments, k_segments, prefix)
        some, every = map(np.asarray, judge(context))
        some_true, every_true = block_truths(context, rule)
        assert not (some_true & ~some).any()  # nothing visible is left out
        assert not (every & ~every_true).any()  # nothing invisible is let through
        found += [(~some).sum(), every.sum()]
    assert found[0] > 500
    assert found[1] > 50 or window == 6  # less than a block of keys


@pytest.mark.parametrize("window", [None, 3])
def test_packed_self_attention_leaves_out_all_that_it_can(window):
    """Blocks of equal size over packed rows: no block above the diagonal, of other documents or beyond the window is kept."""
    positions, segments = packed(np.random.default_rng(1), 300, S)
    context = Context(positions, positions, segments, segments, None)
    rule = Rule("causal", window, None, 1.0)
    some, _ = visible_blocks(context, rule, BLOCK_K, BLOCK_K)
    seen = np.asarray(visible(context, rule)).reshape(300, S // BLOCK_K, BLOCK_K, S // BLOCK_K, BLOCK_K).any(axis=(2, 4))
    np.testing.assert_array_equal(some, seen)
