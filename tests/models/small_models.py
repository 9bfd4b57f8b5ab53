"""Small models for the tests of research/models/lm.py, and what is run on them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels.cross_entropy import logits
from research.models.attention import Attention
from research.models.context import Context
from research.models.heads import token_loss
from research.models.lm import LanguageModel, read_aux
from research.models.mlp import GatedMlp
from research.models.moe import Moe
from research.params import unflatten
from research.schema import ModelConfig, Stage
from tests.models.harness import QUICK, Layout, context

VOCAB, DIM, LENGTH = 32, 16, 12

DENSE = (Attention(heads=4, kv_heads=2), GatedMlp(hidden=24))
SPARSE = (
    Attention(heads=2),
    Moe(experts=4, top_k=2, hidden=8, shared_hidden=8, scores="sigmoid", balance_rate=0.1, z_loss=1e-3),
)
DENSE_THEN_MOE = (Stage(DENSE, 1), Stage(SPARSE, 2))

PACKED = Layout((((1, 5), (2, 7)), ((1, 7), (2, 5))))


def make_model(*stages: Stage, heads: tuple[str, ...] = (), **fields: Any) -> LanguageModel:
    return LanguageModel(ModelConfig(vocab_size=VOCAB, dim=DIM, stages=stages, max_len=16, **fields), heads)


def generic_params(model: LanguageModel) -> dict:
    """Weights of the right sizes without zeros and ones, so that each matters; made without a compiler."""
    noise = np.random.default_rng(0)
    return unflatten(
        {
            path: jnp.asarray(
                noise.normal(size=w.shape) / np.sqrt(w.fan_in) + 0.5 * (w.role == "vector"), jnp.float32
            )
            for path, w in model.weights.items()
        }
    )


def random_tokens(batch: int, length: int = LENGTH, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCAB, (batch, length)).astype(np.int32)


def all_logits(model: LanguageModel, params: dict, hidden_BxLxD: jax.Array) -> jax.Array:
    return logits(hidden_BxLxD, model.unembedding(params), logit_scale=model.cfg.scales.logits)


def mean_loss(
    model: LanguageModel, params: dict, tokens_BxL: jax.Array, ctx: Context, adapters: dict | None = None
):
    """(next-token loss of every token of the row, rolled, and the auxiliary losses; (hidden, statistics))."""
    hidden_BxLxD, _, aux = model.hidden(params, tokens_BxL, ctx, adapters=adapters)
    weights_BxL = (ctx.segment_ids_BxL != 0).astype(jnp.float32)
    loss_sum, _, _ = token_loss(
        model.cfg, hidden_BxLxD, model.unembedding(params, adapters), jnp.roll(tokens_BxL, -1, 1), weights_BxL
    )
    auxiliary, _, statistics = read_aux(aux)
    return loss_sum / jnp.sum(weights_BxL) + auxiliary, (hidden_BxLxD, statistics)


def loss_and_grads(model: LanguageModel, params: dict, tokens_BxL: np.ndarray, layout: Layout, **fields: Any):
    """((loss, (hidden, statistics)), gradients), compiled."""
    ctx = context(layout, **fields)
    function = jax.value_and_grad(lambda p, t, c: mean_loss(model, p, t, c), has_aux=True)
    return jax.jit(function, compiler_options=QUICK)(params, jnp.asarray(tokens_BxL), ctx)


def decode_in_calls(
    model: LanguageModel,
    params: dict,
    tokens_BxL: np.ndarray,
    layout: Layout,
    splits: tuple[int, ...],
    **first_call: Any
) -> np.ndarray:
    """Hidden states of all columns, made with a state in calls of `splits` columns; `first_call`: context of
    the first."""
    call = jax.jit(lambda p, t, c, s: model.hidden(p, t, c, s)[:2], compiler_options=QUICK)
    state = model.init_state(tokens_BxL.shape[0], tokens_BxL.shape[1])
    outputs, start = [], 0
    for size in splits:
        columns = slice(start, start + size)
        ctx = context(layout, columns, **(first_call if start == 0 else {}))
        hidden, state = call(params, jnp.asarray(tokens_BxL[:, columns]), ctx, state)
        outputs.append(hidden)
        start += size
    return np.concatenate(outputs, axis=1)
