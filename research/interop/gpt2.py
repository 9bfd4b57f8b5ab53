"""GPT-2 (Radford et al. 2019): learned positions, LayerNorm, biases, one matrix for query, key and value."""

from research.interop.family import Family, Settings, activation, depth, same_layers, their_activation
from research.interop.tensor_map import Row
from research.models.attention import Attention
from research.models.mlp import Mlp
from research.schema import ModelConfig, Norm, Stage

_KNOWN = {"vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12, "n_inner": None,
          "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True}
_FIXED = {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False}
_PARTS = ("query", "key", "value")  # of c_attn, in this order
_ROWS = (
    Row("embedding/table", "transformer.wte.weight"),
    Row("embedding/positions", "transformer.wpe.weight"),
    *(Row(f"norm_{i}/{ours}", f"transformer.h.{{layer}}.ln_{i + 1}.{theirs}")
      for i in (0, 1) for ours, theirs in (("gain", "weight"), ("bias", "bias"))),
    *(Row(f"attention/{part}", "transformer.h.{layer}.attn.c_attn.weight", "conv1d") for part in _PARTS),
    *(Row(f"attention/{part}_bias", "transformer.h.{layer}.attn.c_attn.bias", "flat") for part in _PARTS),
    Row("attention/output", "transformer.h.{layer}.attn.c_proj.weight", "conv1d"),
    Row("attention/output_bias", "transformer.h.{layer}.attn.c_proj.bias"),
    *(Row(f"mlp/{ours}{suffix}", f"transformer.h.{{layer}}.mlp.{theirs}.{kind}", layout)
      for ours, theirs in (("up", "c_fc"), ("down", "c_proj"))
      for suffix, kind, layout in (("", "weight", "conv1d"), ("_bias", "bias", "same"))),
    Row("final_norm/gain", "transformer.ln_f.weight"),
    Row("final_norm/bias", "transformer.ln_f.bias"),
    Row("unembedding/kernel", "lm_head.weight", "linear"),
)


def _read(settings: Settings) -> ModelConfig:
    layer = (Attention(heads=settings["n_head"], positions="none", bias=True),
             Mlp(hidden=settings["n_inner"] or 4 * settings["n_embd"], bias=True,
                 activation=activation("activation_function", settings["activation_function"])))
    return ModelConfig(
        vocab_size=settings["vocab_size"], dim=settings["n_embd"], max_len=settings["n_positions"], positions="learned",
        stages=(Stage(layer, settings["n_layer"]),), norm=Norm("layernorm", eps=settings["layer_norm_epsilon"]),
        tie_embeddings=settings["tie_word_embeddings"])


def _write(model: ModelConfig) -> Settings | None:
    layer = same_layers(model, Attention, Mlp)
    if layer is None:
        return None
    attention, mlp = layer
    return {"vocab_size": model.vocab_size, "n_positions": model.max_len, "n_embd": model.dim, "n_layer": depth(model),
            "n_head": attention.heads, "n_inner": mlp.hidden, "activation_function": _activation(mlp.activation),
            "layer_norm_epsilon": model.norm.eps, "tie_word_embeddings": model.tie_embeddings}


def _activation(ours: str) -> str:
    return "gelu_new" if ours == "gelu" else their_activation(ours)


GPT2 = Family("gpt2", "GPT2LMHeadModel", _KNOWN, _FIXED, _read, _write, _ROWS, optional_prefix="transformer.",
              ignored=r"transformer\.h\.\d+\.attn\.(masked_)?bias")
