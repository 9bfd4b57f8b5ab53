"""Encoder and decoder: cached decoding is teacher forcing; packed pairs don't see each other."""

import jax
import jax.numpy as jnp
import numpy as np

from research.models.attention import Attention
from research.models.mlp import GatedMlp
from research.params import flatten
from research.schema import Stage
from tests.models.harness import QUICK, Layout, assert_close, context
from tests.models.small_models import (
    DIM,
    all_logits,
    decode_in_calls,
    generic_params,
    make_model,
    random_tokens,
)

CROSS = Attention(heads=4, kv_heads=2, positions="none", cross=True)
MODEL = make_model(
    Stage((Attention(heads=2), CROSS, GatedMlp(hidden=24)), 2),
    encoder_stages=(Stage((Attention(heads=2), GatedMlp(hidden=24)), 2),),
)
SOURCE, TARGET = Layout((((1, 4), (2, 5)), ((1, 5), (2, 4)))), Layout((((1, 5), (2, 7)), ((1, 7), (2, 5))))
PADDED_SOURCE = Layout((((1, 4), (2, 5)), ((1, 5), (2, 3), (0, 1))))
PADDED_TARGET = Layout((((1, 5), (0, 1), (2, 6)), ((1, 7), (2, 4), (0, 1))))


def decode(params, source, target, source_ctx, target_ctx):
    memory = MODEL.encode(params, source, source_ctx)
    ctx = target_ctx.replace(memory_BxSxD=memory, memory_segment_ids_BxS=source_ctx.segment_ids_BxL)
    return MODEL.hidden(params, target, ctx)[0], memory


def loss(params, source, target, source_ctx, target_ctx, targets):
    hidden, _ = decode(params, source, target, source_ctx, target_ctx)
    logprobs = jax.nn.log_softmax(all_logits(MODEL, params, hidden))
    picked = jnp.take_along_axis(logprobs, targets[..., None], axis=-1)[..., 0]
    return -jnp.sum(picked * (target_ctx.segment_ids_BxL != 0)), hidden


run = jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=QUICK)


def cut(tokens: np.ndarray, layout: Layout, segments: tuple[int, int]) -> np.ndarray:
    """The tokens of one document of each row."""
    return np.stack(
        [row[ids == segment] for row, ids, segment in zip(tokens, layout.segment_ids_BxL, segments)]
    )


def test_packed_pairs_are_pairs_alone():
    params = generic_params(MODEL)
    source, target = random_tokens(2, 9), random_tokens(2, 12, seed=1)
    targets = random_tokens(2, 12, seed=2)
    (total, hidden), grads = run(params, source, target, context(SOURCE), context(TARGET), targets)
    alone_total, alone_grads = 0.0, jax.tree.map(jnp.zeros_like, grads)
    for segments, sizes in (((1, 2), (4, 5)), ((2, 1), (5, 7))):
        contexts = [context(Layout((((1, size),),) * 2), packed=False) for size in sizes]
        (one, one_hidden), one_grads = run(
            params,
            cut(source, SOURCE, segments),
            cut(target, TARGET, segments),
            *contexts,
            cut(targets, TARGET, segments)
        )
        assert_close(cut(np.asarray(hidden), TARGET, segments), one_hidden, what=str(segments))
        alone_total, alone_grads = alone_total + one, jax.tree.map(jnp.add, alone_grads, one_grads)
    assert_close(total, alone_total)
    assert_close(grads, alone_grads)
    assert all(np.any(np.asarray(g) != 0) for g in flatten(grads).values())
    assert all(path in flatten(params) for path in MODEL.weights)


def test_cached_decoding_is_teacher_forcing():
    """The memory is read once, by the first call, then its keys and values are in the state."""
    params = generic_params(MODEL)
    source, target = random_tokens(2, 9), random_tokens(2, 12, seed=1)
    hidden, memory = decode(params, source, target, context(PADDED_SOURCE), context(PADDED_TARGET))
    valid = PADDED_TARGET.segment_ids_BxL != 0
    given = {"memory_BxSxD": memory, "memory_segment_ids_BxS": jnp.asarray(PADDED_SOURCE.segment_ids_BxL)}
    for splits in ((4, 1, 1, 1, 1, 4), (1,) * 12):
        stepped = decode_in_calls(MODEL, params, target, PADDED_TARGET, splits, **given)
        assert_close(stepped[valid], np.asarray(hidden)[valid], what=str(splits))


def test_encoder_reads_both_ways_and_decoder_does_not():
    params = generic_params(MODEL)
    source, target = random_tokens(2, 9), random_tokens(2, 12, seed=1)
    hidden, memory = decode(params, source, target, context(SOURCE), context(TARGET))
    late = source.copy()
    late[0, 3] = (late[0, 3] + 1) % 32  # the last token of the first document
    changed_hidden, changed = decode(params, late, target, context(SOURCE), context(TARGET))
    moved = np.abs(np.asarray(changed - memory)).max(axis=-1)
    assert moved[0, :4].min() > 1e-5 and moved[0, 4:].max() == 0 and moved[1].max() == 0
    moved = np.abs(np.asarray(changed_hidden - hidden)).max(axis=-1)
    assert moved[0, :5].min() > 1e-6 and moved[0, 5:].max() == 0
    other = target.copy()
    other[0, 4] = (other[0, 4] + 1) % 32
    moved = np.abs(
        np.asarray(decode(params, source, other, context(SOURCE), context(TARGET))[0] - hidden)
    ).max(axis=-1)
    assert moved[0, :4].max() == 0 and moved[0, 4].max() > 1e-5 and moved[0, 5:].max() == 0


def test_counts():
    assert {w.stage for w in MODEL.weights.values()} >= {"encoder/stage_0", "decoder/stage_0", "embedding"}
    assert MODEL.param_counts()["total"] == sum(w.size for w in MODEL.weights.values())
    state = MODEL.init_state(2, 12)["stage_0"]["attention_1"]
    assert state["k_BxSxGxK"].shape == (2, 2, 12, 2, DIM // 4)
