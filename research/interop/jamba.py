"""Jamba (Lieber et al. 2024): one attention among Mamba layers, a mixture of experts every second layer, no positions."""

import math

from research.errors import InputError
from research.interop.family import Family, Settings, depth
from research.interop.mamba import mamba_rows, rank
from research.interop.tensor_map import Row
from research.models.attention import Attention
from research.models.mamba import Mamba
from research.models.mlp import GatedMlp
from research.models.moe import Moe
from research.schema import ModelConfig, Norm, Stage

_KNOWN = {
    "vocab_size": 65536, "tie_word_embeddings": False, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-6,
    "max_position_embeddings": 262144, "num_experts_per_tok": 2, "num_experts": 16, "expert_layer_period": 2,
    "expert_layer_offset": None, "attn_layer_period": 8, "attn_layer_offset": None, "mamba_d_state": 16, "mamba_d_conv": 4,
    "mamba_expand": 2, "mamba_dt_rank": None, "mamba_conv_bias": True,
}
_OFFSETS = {"expert_layer_offset": 1, "attn_layer_offset": 4}  # may be 0
_LAYER = "model.layers.{layer}"
_ROWS = (
    Row("embedding/table", "model.embed_tokens.weight"), Row("norm_0/gain", f"{_LAYER}.input_layernorm.weight"),
    Row("norm_1/gain", f"{_LAYER}.pre_ff_layernorm.weight"), Row("final_norm/gain", "model.final_layernorm.weight"),
    Row("unembedding/kernel", "lm_head.weight", "linear"),
    *(Row(f"attention/{ours}", f"{_LAYER}.self_attn.{theirs}_proj.weight", "linear")
      for ours, theirs in (("query", "q"), ("key", "k"), ("value", "v"), ("output", "o"))),
    *mamba_rows(f"{_LAYER}.mamba"),
    *(Row(f"gated_mlp/{name}", f"{_LAYER}.feed_forward.{name}_proj.weight", "linear") for name in ("gate", "up", "down")),
    Row("moe/router", f"{_LAYER}.feed_forward.router.weight", "linear"),
    *(Row(f"moe/{name}", f"{_LAYER}.feed_forward.experts.{{expert}}.{name}_proj.weight", "linear")
      for name in ("gate", "up", "down")))


def _read(settings: Settings) -> ModelConfig:
    s = settings
    offsets = {name: default if s[name] is None else s[name] for name, default in _OFFSETS.items()}
    heads = s["num_attention_heads"]
    kv_heads = s["num_key_value_heads"] or heads
    attention = Attention(heads=heads, kv_heads=None if kv_heads == heads else kv_heads, positions="none")
    mamba = Mamba(expand=s["mamba_expand"], state=s["mamba_d_state"], conv=s["mamba_d_conv"], conv_bias=s["mamba_conv_bias"],
                  dt_rank=rank(s["mamba_dt_rank"], s["hidden_size"]), norms=True, norm_eps=s["rms_norm_eps"])
    mlp = GatedMlp(s["intermediate_size"])
    moe = mlp if s["num_experts"] == 1 else Moe(
        experts=s["num_experts"], top_k=s["num_experts_per_tok"], hidden=s["intermediate_size"], renormalize=False)
    for name, period in (("attn_layer_offset", "attn_layer_period"), ("expert_layer_offset", "expert_layer_period")):
        if type(offsets[name]) is not int or not 0 <= offsets[name] < s[period]:
            raise InputError(f"config.json: {name}", f"{offsets[name]!r} is not in [0, {period}={s[period]})", "correct it")
    layers = [(attention if i % s["attn_layer_period"] == offsets["attn_layer_offset"] else mamba,
               moe if i % s["expert_layer_period"] == offsets["expert_layer_offset"] else mlp)
              for i in range(s["num_hidden_layers"])]
    period = math.lcm(s["attn_layer_period"], s["expert_layer_period"])
    whole = len(layers) // period
    stages = [Stage(tuple(mixer for layer in layers[:period] for mixer in layer), whole)] if whole else []
    if rest := layers[whole * period:]:
        stages.append(Stage(tuple(mixer for layer in rest for mixer in layer)))
    return ModelConfig(vocab_size=s["vocab_size"], dim=s["hidden_size"], stages=tuple(stages), norm=Norm(eps=s["rms_norm_eps"]),
                       tie_embeddings=s["tie_word_embeddings"], max_len=s["max_position_embeddings"])


def _write(model: ModelConfig) -> Settings | None:
    mixers = [mixer for stage in model.stages for mixer in stage.pattern * stage.repeats]
    attention, mamba, mlp, moe = (next((mixer for mixer in mixers if isinstance(mixer, kind)), None)
                                  for kind in (Attention, Mamba, GatedMlp, Moe))
    if attention is None or mamba is None or (mlp is None and moe is None):
        return None
    at, experts_at = (_places([isinstance(mixer, kind) for mixer in mixers[start::2]], depth(model))
                      for start, kind in ((0, Attention), (1, Moe)))
    return {
        "vocab_size": model.vocab_size, "tie_word_embeddings": model.tie_embeddings, "hidden_size": model.dim,
        "intermediate_size": (mlp or moe).hidden, "num_hidden_layers": depth(model), "num_attention_heads": attention.heads,
        "num_key_value_heads": attention.kv_heads or attention.heads, "hidden_act": "silu",
        "rms_norm_eps": model.norm.eps, "max_position_embeddings": model.max_len, "num_experts": moe.experts if moe else 1,
        "num_experts_per_tok": moe.top_k if moe else 1, "expert_layer_offset": experts_at[0],
        "expert_layer_period": experts_at[1],
        "attn_layer_offset": at[0], "attn_layer_period": at[1], "mamba_d_state": mamba.state, "mamba_d_conv": mamba.conv,
        "mamba_expand": mamba.expand, "mamba_dt_rank": mamba.rank(model.dim), "mamba_conv_bias": mamba.conv_bias}


def _places(found: list[bool], layers: int) -> tuple[int, int]:
    """(offset, period) of the layers where something is; what doesn't repeat so is found when the config is read back."""
    at = [i for i, there in enumerate(found) if there]
    return (0, 1) if not at else (at[0], at[1] - at[0] if len(at) > 1 else layers)


# hidden_act is of the Mamba layers, too, whose activation is fixed here.
JAMBA = Family("jamba", "JambaForCausalLM", _KNOWN, {"mamba_proj_bias": False, "hidden_act": "silu"}, _read, _write, _ROWS,
               derived=("num_key_value_heads",))
