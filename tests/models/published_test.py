"""Mixers against the modules of `transformers` that run the published checkpoints, with the same random weights."""

import jax.numpy as jnp
import numpy as np
import pytest

from research.models import mixers
from research.models.context import one_document
from research.models.latent_attention import LatentAttention
from research.models.moe import Moe
from research.models.rope import RopeScaling, yarn_magnitude
from tests.models.cases import DIM
from tests.models.harness import apply, assert_close, declared, random

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5")

HIDDEN, EXPERTS = 8, 8


def moe_pairs() -> dict:
    """Name -> (our config, their module)."""
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
    from transformers.models.jamba.modeling_jamba import JambaSparseMoeBlock
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    sizes = dict(hidden_size=DIM, num_experts_per_tok=3)
    return {
        "mixtral": (Moe(experts=EXPERTS, top_k=3, hidden=HIDDEN), MixtralSparseMoeBlock(transformers.MixtralConfig(
            **sizes, intermediate_size=HIDDEN, num_local_experts=EXPERTS))),
        "qwen3": (Moe(experts=EXPERTS, top_k=3, hidden=HIDDEN), Qwen3MoeSparseMoeBlock(transformers.Qwen3MoeConfig(
            **sizes, moe_intermediate_size=HIDDEN, num_experts=EXPERTS, norm_topk_prob=True))),
        "jamba": (Moe(experts=EXPERTS, top_k=3, hidden=HIDDEN, renormalize=False), JambaSparseMoeBlock(transformers.JambaConfig(
            **sizes, intermediate_size=HIDDEN, num_experts=EXPERTS, num_attention_heads=2, num_key_value_heads=2))),
        "deepseek_v3": (
            Moe(experts=EXPERTS, top_k=3, hidden=HIDDEN, shared_hidden=2 * HIDDEN, scores="sigmoid", scale=2.5, groups=4,
                top_groups=2, balance_rate=1e-3),
            DeepseekV3MoE(transformers.DeepseekV3Config(
                **sizes, moe_intermediate_size=HIDDEN, n_routed_experts=EXPERTS, n_shared_experts=2, n_group=4, topk_group=2,
                routed_scaling_factor=2.5, norm_topk_prob=True)),
        ),
    }


def to_array(tensor) -> jnp.ndarray:
    return jnp.asarray(tensor.detach().numpy())


def fill(module) -> dict:
    """Random weights in place; the state by name."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in module.state_dict().values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.5)
    return module.state_dict()


def ours(cfg, x, params):
    assert {name: box.value.shape for name, box in declared(cfg).items()} == {name: w.shape for name, w in params.items()}
    y, _, _ = apply(cfg, params, jnp.asarray(x), one_document(*x.shape[:2]))
    return y


@pytest.mark.parametrize("name", ["mixtral", "qwen3", "jamba", "deepseek_v3"])
def test_experts(name):
    cfg, module = moe_pairs()[name]
    weights = fill(module)
    gate_up = to_array(weights["experts.gate_up_proj"])
    params = {"router": to_array(weights["router.weight" if name == "jamba" else "gate.weight"]).T,
              "gate": gate_up[:, :HIDDEN].swapaxes(1, 2), "up": gate_up[:, HIDDEN:].swapaxes(1, 2),
              "down": to_array(weights["experts.down_proj"]).swapaxes(1, 2)}
    if cfg.shared_hidden:
        shared = {part: weights[f"shared_experts.{part}_proj.weight"] for part in ("gate", "up", "down")}
        params |= {f"shared_{part}": to_array(weight).T for part, weight in shared.items()}
        params["balance_bias"] = to_array(weights["gate.e_score_correction_bias"])
    x = random(2, 6, DIM)
    with torch.no_grad():
        expected = module(torch.tensor(x))
    assert_close(ours(cfg, x, params), np.asarray(expected))


@pytest.mark.parametrize("query_rank", [None, 6])
@pytest.mark.parametrize("yarn", [False, True])
def test_latent_attention(query_rank, yarn):
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention, DeepseekV3RotaryEmbedding

    heads, nope, rope, value, rank, length = 2, 4, 6, 5, 8, 12
    stretched = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16, beta_fast=4, beta_slow=1, mscale=1.0,
                     mscale_all_dim=1.0)
    config = transformers.DeepseekV3Config(
        hidden_size=DIM, num_attention_heads=heads, num_key_value_heads=heads, q_lora_rank=query_rank, kv_lora_rank=rank,
        qk_nope_head_dim=nope, qk_rope_head_dim=rope, v_head_dim=value, attn_implementation="eager",
        rope_parameters={"rope_theta": 100.0, **(stretched if yarn else {"rope_type": "default"})})
    module = DeepseekV3Attention(config, 0).eval()
    weights = {name: to_array(tensor) for name, tensor in fill(module).items()}
    x = random(2, length, DIM)
    causal = torch.full((length, length), torch.finfo(torch.float32).min).triu(1)[None, None]
    positions = DeepseekV3RotaryEmbedding(config)(torch.tensor(x), torch.arange(length)[None])
    with torch.no_grad():
        expected, _ = module(torch.tensor(x), position_embeddings=positions, attention_mask=causal)

    halves = np.r_[0:rope:2, 1:rope:2]  # DeepSeek rotates neighbours, we halves
    columns = np.r_[0:nope, nope + halves]
    query = weights["q_b_proj.weight" if query_rank else "q_proj.weight"].T.reshape(-1, heads, nope + rope)[..., columns]
    kv_down, kv_up = weights["kv_a_proj_with_mqa.weight"].T, weights["kv_b_proj.weight"].T.reshape(rank, heads, nope + value)
    params = {"query": query, "kv_down": kv_down[:, :rank], "key_rope": kv_down[:, rank:][:, halves],
              "kv_norm": weights["kv_a_layernorm.weight"], "key": kv_up[..., :nope], "value": kv_up[..., nope:],
              "output": weights["o_proj.weight"].T.reshape(heads, value, DIM)}
    if query_rank:
        params |= {"query_down": weights["q_a_proj.weight"].T, "query_norm": weights["q_a_layernorm.weight"]}
    scaling = RopeScaling("yarn", 4.0, 16, low=1.0, high=4.0, magnitude=1.0) if yarn else None
    cfg = LatentAttention(
        heads=heads, kv_rank=rank, nope_dim=nope, rope_dim=rope, value_dim=value, query_rank=query_rank, rope_base=100.0,
        rope_scaling=scaling, scale=yarn_magnitude(4.0) ** 2 / (nope + rope) ** 0.5 if yarn else None)
    assert_close(ours(cfg, x, params), np.asarray(expected))
    state = mixers.row(cfg).module.init_state(cfg, 2, DIM, length, jnp.float32)
    y, state, _ = apply(cfg, params, jnp.asarray(x[:, :7]), one_document(2, 7), state)
    assert_close(y, np.asarray(expected)[:, :7])
