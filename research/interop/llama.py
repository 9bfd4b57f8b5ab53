"""Llama (Touvron et al. 2023; Llama 3: 2024), Qwen3 (2025) and Mixtral (Jiang et al. 2024): RoPE, RMSNorm, gated MLPs."""

from typing import Any, Mapping

from research.config import nearest
from research.errors import InputError
from research.interop.family import Family, Settings, activation, depth, same_layers, their_activation
from research.interop.tensor_map import Row
from research.models.attention import Attention
from research.models.mlp import GatedMlp
from research.models.moe import Moe
from research.models.rope import RopeScaling
from research.schema import ModelConfig, Norm, Stage

_KNOWN = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": None, "head_dim": None, "hidden_act": "silu", "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "rope_theta": 10000.0, "rope_scaling": None, "rope_parameters": None,
    "attention_bias": False, "mlp_bias": False,
}
_ATTENTION = tuple(Row(f"attention/{ours}", f"model.layers.{{layer}}.self_attn.{theirs}", layout) for ours, theirs, layout in (
    ("query", "q_proj.weight", "linear"), ("query_bias", "q_proj.bias", "flat"), ("query_norm", "q_norm.weight", "same"),
    ("key", "k_proj.weight", "linear"), ("key_bias", "k_proj.bias", "flat"), ("key_norm", "k_norm.weight", "same"),
    ("value", "v_proj.weight", "linear"), ("value_bias", "v_proj.bias", "flat"),
    ("output", "o_proj.weight", "linear"), ("output_bias", "o_proj.bias", "same")))
_MLP = tuple(Row(f"gated_mlp/{name}{ours}", f"model.layers.{{layer}}.mlp.{name}_proj.{theirs}", layout)
             for name in ("gate", "up", "down")
             for ours, theirs, layout in (("", "weight", "linear"), ("_bias", "bias", "same")))
_EXPERTS = (Row("moe/router", "model.layers.{layer}.block_sparse_moe.gate.weight", "linear"), *(
    Row(f"moe/{ours}", f"model.layers.{{layer}}.block_sparse_moe.experts.{{expert}}.{theirs}.weight", "linear")
    for ours, theirs in (("gate", "w1"), ("up", "w3"), ("down", "w2"))))
_AROUND = (
    Row("embedding/table", "model.embed_tokens.weight"),
    Row("norm_0/gain", "model.layers.{layer}.input_layernorm.weight"),
    Row("norm_1/gain", "model.layers.{layer}.post_attention_layernorm.weight"),
    Row("final_norm/gain", "model.norm.weight"),
    Row("unembedding/kernel", "lm_head.weight", "linear"),
)
_BUFFERS = r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"


def read_rope(settings: Settings) -> tuple[float, RopeScaling | None]:
    """(base, scaling), from rope_parameters, or from rope_theta and rope_scaling as older files have them."""
    rope: Mapping[str, Any] = settings["rope_parameters"] or settings["rope_scaling"] or {}
    rope = {key: value for key, value in rope.items() if value is not None}
    base = rope["rope_theta"] if "rope_theta" in rope else settings["rope_theta"]
    kind = next((rope[key] for key in ("rope_type", "type") if key in rope), "default")
    names = {"linear": {"factor": "factor"},
             "llama3": {"factor": "factor", "original_max_position_embeddings": "original_len", "low_freq_factor": "low",
                        "high_freq_factor": "high"},
             "yarn": {"factor": "factor", "original_max_position_embeddings": "original_len", "beta_slow": "low",
                      "beta_fast": "high", "attention_factor": "magnitude"}}
    if kind == "default":
        return base, None
    if not isinstance(kind, str) or kind not in names:
        raise InputError("config.json: rope_type", f"{kind!r} is not implemented", nearest(str(kind), list(names)))
    for key in rope:
        if key not in (*names[kind], "rope_type", "type", "rope_theta", "partial_rotary_factor"):
            raise InputError(f"config.json: {key}", f"is not implemented for {kind}", f"known: {', '.join(names[kind])}")
    if "partial_rotary_factor" in rope and rope["partial_rotary_factor"] != 1.0:
        raise InputError("config.json: partial_rotary_factor", "is not implemented", "only 1.0 is")
    values = {ours: rope[theirs] for theirs, ours in names[kind].items() if theirs in rope}
    if kind == "yarn" and "original_len" not in values:
        values["original_len"] = settings["max_position_embeddings"]
    try:
        return base, RopeScaling(kind=kind, **values)
    except (InputError, TypeError) as error:
        raise InputError("config.json: rope_scaling", str(error), "download the model again") from None


def write_rope(attention: Attention) -> Settings:
    scaling = attention.rope_scaling
    if scaling is None:
        return {"rope_theta": attention.rope_base, "rope_scaling": None}
    table: Settings = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind != "linear":
        low, high = {"llama3": ("low_freq_factor", "high_freq_factor"), "yarn": ("beta_slow", "beta_fast")}[scaling.kind]
        table |= {"original_max_position_embeddings": scaling.original_len, low: scaling.low, high: scaling.turns_kept}
    if scaling.magnitude is not None:
        table["attention_factor"] = scaling.magnitude
    return {"rope_theta": attention.rope_base, "rope_scaling": table}


def _attention(settings: Settings, **fields: Any) -> Attention:
    heads = settings["num_attention_heads"]
    kv_heads = settings["num_key_value_heads"] or heads
    base, scaling = read_rope(settings)
    return Attention(
        heads=heads, kv_heads=None if kv_heads == heads else kv_heads, rope_base=base, rope_scaling=scaling,
        head_dim=None if settings["head_dim"] in (None, settings["hidden_size"] // heads) else settings["head_dim"], **fields)


def _model(settings: Settings, *mixers: Any) -> ModelConfig:
    return ModelConfig(
        vocab_size=settings["vocab_size"], dim=settings["hidden_size"], max_len=settings["max_position_embeddings"],
        stages=(Stage(mixers, settings["num_hidden_layers"]),), norm=Norm(eps=settings["rms_norm_eps"]),
        tie_embeddings=settings["tie_word_embeddings"])


def _shared_settings(model: ModelConfig, attention: Attention) -> Settings:
    return {
        "vocab_size": model.vocab_size, "hidden_size": model.dim, "num_hidden_layers": depth(model),
        "num_attention_heads": attention.heads, "num_key_value_heads": attention.kv_heads or attention.heads,
        "head_dim": attention.width(model.dim), "max_position_embeddings": model.max_len, "rms_norm_eps": model.norm.eps,
        "tie_word_embeddings": model.tie_embeddings, **write_rope(attention)}


def read_llama(settings: Settings) -> ModelConfig:
    mlp = GatedMlp(settings["intermediate_size"], activation("hidden_act", settings["hidden_act"]), settings["mlp_bias"])
    return _model(settings, _attention(settings, bias=settings["attention_bias"]), mlp)


def read_qwen3(settings: Settings) -> ModelConfig:
    mlp = GatedMlp(settings["intermediate_size"], activation("hidden_act", settings["hidden_act"]))
    attention = _attention(settings, bias=settings["attention_bias"], qk_norm=True, qk_norm_eps=settings["rms_norm_eps"])
    return _model(settings, attention, mlp)


def read_mixtral(settings: Settings) -> ModelConfig:
    moe = Moe(experts=settings["num_local_experts"], top_k=settings["num_experts_per_tok"],
              hidden=settings["intermediate_size"], activation=activation("hidden_act", settings["hidden_act"]))
    return _model(settings, _attention(settings, window=settings["sliding_window"]), moe)


def _write_dense(model: ModelConfig, qk_norm: bool) -> Settings | None:
    layer = same_layers(model, Attention, GatedMlp)
    if layer is None or layer[0].qk_norm != qk_norm:
        return None
    attention, mlp = layer
    return _shared_settings(model, attention) | {
        "intermediate_size": mlp.hidden, "hidden_act": their_activation(mlp.activation), "attention_bias": attention.bias}


def write_llama(model: ModelConfig) -> Settings | None:
    settings = _write_dense(model, qk_norm=False)
    return None if settings is None else settings | {"mlp_bias": model.stages[0].pattern[1].bias}


def write_qwen3(model: ModelConfig) -> Settings | None:
    return _write_dense(model, qk_norm=True)


def write_mixtral(model: ModelConfig) -> Settings | None:
    layer = same_layers(model, Attention, Moe)
    if layer is None:
        return None
    attention, moe = layer
    return _shared_settings(model, attention) | {
        "intermediate_size": moe.hidden, "hidden_act": their_activation(moe.activation), "sliding_window": attention.window,
        "num_local_experts": moe.experts, "num_experts_per_tok": moe.top_k}


_UNBIASED = {name: value for name, value in _KNOWN.items() if name not in ("mlp_bias", "attention_bias")}
LLAMA = Family("llama", "LlamaForCausalLM", _KNOWN, {"partial_rotary_factor": 1.0}, read_llama, write_llama,
               (*_AROUND, *(row for row in _ATTENTION if "_norm" not in row.ours), *_MLP), ignored=_BUFFERS)
QWEN3 = Family(
    "qwen3", "Qwen3ForCausalLM",
    _UNBIASED | {"vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32, "head_dim": 128,
                 "max_position_embeddings": 32768, "attention_bias": False},
    {"use_sliding_window": False}, read_qwen3, write_qwen3, (*_AROUND, *_ATTENTION, *_MLP),
    derived=("num_key_value_heads", "head_dim"))
MIXTRAL = Family(
    "mixtral", "MixtralForCausalLM",
    _UNBIASED | {"intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5,
                 "rope_theta": 1e6, "sliding_window": None, "num_experts_per_tok": 2, "num_local_experts": 8},
    {}, read_mixtral, write_mixtral, (*_AROUND, *(row for row in _ATTENTION if row.layout == "linear"), *_EXPERTS),
    derived=("num_key_value_heads",))
