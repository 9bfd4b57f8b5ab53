"""What is special to LatentAttention: masks, its small cache, absorbed steps, sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.errors import InputError
from research.models import mixers
from research.models.latent_attention import LatentAttention
from research.models.lm import LanguageModel
from research.models.rope import rotate
from research.schema import ModelConfig, Stage
from research.training.flops import count_flops
from tests.models.cases import DIM
from tests.models.harness import Layout, apply, assert_close, context, jitted, make_params, random

CFG = LatentAttention(heads=2, kv_rank=8, nope_dim=4, rope_dim=2, value_dim=5, query_rank=8)
LAYOUT = Layout((((1, 5), (2, 7)), ((1, 8), (2, 4))))
PREFIX_BxL = np.array([[1, 1, 0, 0, 0, 1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0, 0, 0, 1, 0, 0, 0]], bool)


def rms(x):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-6)


@pytest.mark.parametrize("mask_kind", ["causal", "bidirectional", "prefix"])
def test_a_plain_loop_over_queries(mask_kind):
    """float64, one query of one head after another, with the keys that its mask lets it see."""
    x = random(2, 12, DIM)
    ctx = context(LAYOUT, mask_kind=mask_kind, prefix_BxL=jnp.asarray(PREFIX_BxL))
    y, _, _ = jitted(CFG, make_params(CFG), x, ctx)
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), make_params(CFG))
    x = x.astype(np.float64)
    turn = lambda part: np.asarray(rotate(jnp.asarray(part, jnp.float32), ctx.positions_BxL, CFG.rope_base), np.float64)
    query = np.einsum("blr,rhk->blhk", rms(x @ p["query_down"]) * p["query_norm"], p["query"])
    query[..., 4:] = turn(query[..., 4:])
    latent, shared = rms(x @ p["kv_down"]) * p["kv_norm"], turn((x @ p["key_rope"])[:, :, None])[:, :, 0]
    expected, segments, positions = np.zeros_like(x), LAYOUT.segment_ids_BxL, LAYOUT.positions_BxL
    for b, l, h in np.ndindex(2, 12, 2):
        seen = segments[b] == segments[b, l]
        if mask_kind != "bidirectional":
            seen &= (positions[b] <= positions[b, l]) | (PREFIX_BxL[b] if mask_kind == "prefix" else False)
        keys = np.concatenate([latent[b, seen] @ p["key"][:, h], shared[b, seen]], axis=-1)
        scores = keys @ query[b, l, h] / np.sqrt(6)
        weights = np.exp(scores - scores.max())
        expected[b, l] += (weights / weights.sum()) @ (latent[b, seen] @ p["value"][:, h]) @ p["output"][h]
    assert_close(y, expected)


@pytest.mark.parametrize("splits", [(8, 4), (8, 1, 1, 1, 1)])
def test_cached_prefix(splits):
    params, x = make_params(CFG), random(2, 12, DIM)
    y, _, _ = jitted(CFG, params, x, context(LAYOUT, mask_kind="prefix", prefix_BxL=jnp.asarray(PREFIX_BxL)))
    state, outputs, start = mixers.row(CFG).module.init_state(CFG, 2, DIM, 12, jnp.float32), [], 0
    for size in splits:
        columns = slice(start, start + size)
        ctx = context(LAYOUT, columns, mask_kind="prefix", prefix_BxL=jnp.asarray(PREFIX_BxL[:, columns]))
        y_part, state, _ = jitted(CFG, params, jnp.asarray(x[:, columns]), ctx, state)
        outputs.append(y_part)
        start += size
    assert_close(np.concatenate(outputs, axis=1), y)


def test_the_cache_holds_the_latent_and_one_key():
    """A token: kv_rank + rope_dim numbers, whatever the heads; two int32 and a bool; a row: two counters."""
    for heads in (2, 64):
        cfg = LatentAttention(heads=heads, kv_rank=512, nope_dim=128, rope_dim=64, value_dim=128)
        assert mixers.state_bytes(cfg, 7168, 4096, jnp.bfloat16) == 4096 * ((512 + 64) * 2 + 9) + 8


def test_a_step_never_expands_the_cache():
    """Its FLOPs grow with the slots by scores and values over the latents alone."""

    def flops(slots: int) -> float:
        state = mixers.row(CFG).module.init_state(CFG, 1, DIM, slots, jnp.float32)
        ctx = context(Layout((((1, 1),),)))
        return count_flops(lambda state: apply(CFG, make_params(CFG), random(1, 1, DIM), ctx, state)[0], state)

    assert flops(20) - flops(10) == 10 * 2 * 2 * ((8 + 2) + 8)


def test_causal_flops_count_visible_keys():
    module = mixers.row(CFG).module
    scores = 2.0 * 2 * (6 + 5)
    assert module.flops(CFG, DIM, 12) == pytest.approx(module.flops(CFG, DIM, 12, causal=False) - scores * (12 - 6.5))


def test_deepseek_v3_s_attention_has_its_published_size():
    """187,107,328 a layer: the shapes of its checkpoint (arXiv:2412.19437, section 4.2), norms of the latents included."""
    cfg = LatentAttention(heads=128, kv_rank=512, nope_dim=128, rope_dim=64, value_dim=128, query_rank=1536)
    weights = LanguageModel(ModelConfig(vocab_size=2, dim=7168, stages=(Stage((cfg,)),))).weights
    size = sum(w.size for path, w in weights.items() if "latent_attention_0" in path)
    assert size == (7168 * 1536 + 1536 + 1536 * 128 * 192) + (7168 * 576 + 512 + 512 * 128 * 256) + 128 * 128 * 7168
    assert size == 187_107_328


def test_bad_configs():
    with pytest.raises(InputError, match=r"^rope_dim: 3 is odd, RoPE rotates pairs; make it even$"):
        LatentAttention(heads=2, kv_rank=8, nope_dim=4, rope_dim=3, value_dim=4)
