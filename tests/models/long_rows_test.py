"""Long rows: every mixer's values and gradients, and what a recurrent one is for, a state that doesn't grow with them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.models import mixers
from research.models.attention import Attention
from research.models.context import Context
from research.models.gated_delta import GatedDelta
from research.models.latent_attention import LatentAttention
from research.models.mamba import Mamba
from research.models.mamba2 import Mamba2
from research.models.mixers import Parallel
from research.models.mlp import GatedMlp, Mlp
from research.models.moe import Moe
from research.models.rglru import RgLru
from research.models.rwkv4 import Rwkv4ChannelMix, Rwkv4TimeMix
from research.models.rwkv7 import Rwkv7ChannelMix, Rwkv7TimeMix
from tests.models.cases import DIM
from tests.models.harness import QUICK, apply, declared
from tests.spikes import SPIKES

# At the default chunk sizes.
RECURRENT = {
    "gated delta": GatedDelta(heads=2, key_dim=8),
    "gated linear": GatedDelta(heads=2, key_dim=8, delta=False),
    "mamba": Mamba(state=4),
    "mamba2": Mamba2(head_dim=8, state=8),
    "rglru": RgLru(heads=2),
    "rwkv4 time mix": Rwkv4TimeMix(depth=1),
    "rwkv4 channel mix": Rwkv4ChannelMix(hidden=32, depth=1),
    "rwkv7 time mix": Rwkv7TimeMix(depth=1, head_dim=8, decay_rank=4, rate_rank=4, value_rank=4, gate_rank=4),
    "rwkv7 channel mix": Rwkv7ChannelMix(hidden=32, depth=1),
}
OTHERS = {
    "attention": Attention(heads=2, kv_heads=1),
    "attention in a window": Attention(heads=2, window=1000, qk_norm=True),
    "alibi, soft-capped": Attention(heads=2, positions="alibi", softcap=20.0),
    "latent attention": LatentAttention(heads=2, kv_rank=8, nope_dim=4, rope_dim=4, value_dim=4, query_rank=8),
    "gated mlp": GatedMlp(hidden=32),
    "mlp": Mlp(hidden=32, activation="relu_squared", bias=True),
    "softmax experts": Moe(experts=4, top_k=2, hidden=8, balance_loss=0.1, z_loss=0.1),
    "sigmoid experts": Moe(experts=4, top_k=2, hidden=8, shared_hidden=8, scores="sigmoid", balance_rate=1e-3),
    "parallel": Parallel((Attention(heads=2), GatedMlp(hidden=32))),
}
ELSEWHERE = {"S4", "S4d", "H3"}  # s4_test.py
recurrent = pytest.mark.parametrize("cfg", RECURRENT.values(), ids=RECURRENT)


@recurrent
def test_the_state_is_as_large_after_any_length(cfg):
    sizes = {mixers.state_bytes(cfg, DIM, seq_len, jnp.bfloat16) for seq_len in (1, 4096, 2**20)}
    assert len(sizes) == 1 and sizes.pop() > 0


@recurrent
def test_sums_over_a_document_are_float32(cfg):
    """In a bfloat16 model, too; only what a state keeps of its last inputs is in the model's dtype."""
    state = mixers.row(cfg).module.init_state(cfg, 1, DIM, 16, jnp.bfloat16)
    for name, array in state.items():
        of_inputs = name == "last_BxD" or "_BxPx" in name
        assert array.dtype == (jnp.bfloat16 if of_inputs else jnp.float32), name


def test_every_row_is_here():
    here = {type(cfg).__name__ for cfg in (RECURRENT | OTHERS).values()}
    assert here | ELSEWHERE == set(mixers.MIXERS) - set(SPIKES) and not here & ELSEWHERE


@pytest.mark.slow
@pytest.mark.parametrize("cfg", (RECURRENT | OTHERS).values(), ids=RECURRENT | OTHERS)
def test_8192_tokens_in_bfloat16(cfg):
    """One document over the whole row, and one of many: values and gradients are finite, of inputs far from 0, too."""
    L = 8192
    positions_BxL = jnp.stack([jnp.arange(L), jnp.arange(L) % 321])
    segment_ids_BxL = jnp.stack([jnp.ones(L, jnp.int32), 1 + jnp.arange(L) // 321])
    random = np.random.default_rng(0)
    params = jax.tree.map(
        lambda box: jnp.asarray(
            random.normal(size=box.value.shape) / np.sqrt(box.value.shape[0]),
            jnp.float32 if box.role == "vector" else jnp.bfloat16),
        declared(cfg), is_leaf=lambda leaf: hasattr(leaf, "role"),
    )  # fmt: skip
    x = jnp.asarray(random.normal(size=(2, L, DIM)) * 4, jnp.bfloat16)

    def loss(params, x):
        y, _, aux = apply(cfg, params, x, Context(positions_BxL, segment_ids_BxL))
        return jnp.mean(jnp.square(y.astype(jnp.float32))), (y, aux)

    grads, (y, aux) = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True), compiler_options=QUICK)(params, x)
    assert y.dtype == jnp.bfloat16 and float(jnp.std(y.astype(jnp.float32))) > 1e-3
    for path, leaf in jax.tree_util.tree_leaves_with_path((y, aux, grads)):
        assert bool(jnp.all(jnp.isfinite(leaf.astype(jnp.float32)))), jax.tree_util.keystr(path)
