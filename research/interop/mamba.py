"""Mamba (Gu and Dao 2023), Mamba-2 (Dao and Gu 2024) and RWKV-4 (Peng et al. 2023): one state of constant size a layer."""

import math
from typing import Any

from research.errors import InputError
from research.interop.family import Family, Settings, depth, same_layers
from research.interop.tensor_map import Row
from research.models.mamba import Mamba
from research.models.mamba2 import Mamba2
from research.models.rwkv4 import Rwkv4ChannelMix, Rwkv4TimeMix
from research.schema import ModelConfig, Norm, Stage

UNBOUNDED = 2**20  # tokens; a state has no longest row, our config has
_KNOWN = {
    "vocab_size": 50280, "hidden_size": 768, "state_size": 16, "num_hidden_layers": 32, "layer_norm_epsilon": 1e-5,
    "expand": 2, "conv_kernel": 4, "use_conv_bias": True, "time_step_rank": None, "tie_word_embeddings": True,
    "max_position_embeddings": UNBOUNDED,
}
_FIXED = {"use_bias": False, "hidden_act": "silu"}


def mamba_rows(module: str) -> tuple[Row, ...]:
    """Of a Mamba mixer that their layer holds as `module` (Jamba's has norms)."""
    names = (
        ("input", "in_proj.weight", "linear"), ("gate", "in_proj.weight", "linear"),
        ("conv", "conv1d.weight", "depthwise"), ("conv_bias", "conv1d.bias", "flat"),
        ("dt_down", "x_proj.weight", "linear"), ("b", "x_proj.weight", "linear"), ("c", "x_proj.weight", "linear"),
        ("dt_up", "dt_proj.weight", "linear"), ("dt_bias", "dt_proj.bias", "same"),
        ("a_log", "A_log", "same"), ("skip", "D", "same"), ("output", "out_proj.weight", "linear"),
        ("dt_norm", "dt_layernorm.weight", "same"), ("b_norm", "b_layernorm.weight", "same"),
        ("c_norm", "c_layernorm.weight", "same"))
    return tuple(Row(f"mamba/{ours}", f"{module}.{theirs}", layout) for ours, theirs, layout in names)


_AROUND = (
    Row("embedding/table", "backbone.embeddings.weight"), Row("norm_0/gain", "backbone.layers.{layer}.norm.weight"),
    Row("final_norm/gain", "backbone.norm_f.weight"), Row("unembedding/kernel", "lm_head.weight", "linear"))
_CONVOLVED = ("input", "b", "c")  # of Mamba-2's convolution, in this order; its in_proj has the gate before, dt after
_MAMBA2 = tuple(Row(f"mamba2/{ours}", f"backbone.layers.{{layer}}.mixer.{theirs}", layout) for ours, theirs, layout in (
    *((name, "in_proj.weight", "linear") for name in ("gate", *_CONVOLVED, "dt")),
    *((f"{name}_conv", "conv1d.weight", "depthwise") for name in _CONVOLVED),
    *((f"{name}_conv_bias", "conv1d.bias", "flat") for name in _CONVOLVED),
    ("dt_bias", "dt_bias", "same"), ("a_log", "A_log", "same"), ("skip", "D", "same"), ("norm", "norm.weight", "flat"),
    ("output", "out_proj.weight", "linear")))


def _model(settings: Settings, mixer: Any) -> ModelConfig:
    return ModelConfig(
        vocab_size=settings["vocab_size"], dim=settings["hidden_size"], max_len=settings["max_position_embeddings"],
        stages=(Stage((mixer,), settings["num_hidden_layers"]),), norm=Norm(eps=settings["layer_norm_epsilon"]),
        tie_embeddings=settings["tie_word_embeddings"])


def rank(value: Any, dim: int) -> int | None:
    """dt_rank of ours; None where it is the usual one, which files call "auto"."""
    return None if value in (None, "auto", math.ceil(dim / 16)) else value


def _read_mamba(settings: Settings) -> ModelConfig:
    return _model(settings, Mamba(
        expand=settings["expand"], state=settings["state_size"], conv=settings["conv_kernel"],
        conv_bias=settings["use_conv_bias"], dt_rank=rank(settings["time_step_rank"], settings["hidden_size"])))


def _read_mamba2(settings: Settings) -> ModelConfig:
    limit = settings["time_step_limit"]
    if limit is not None and (len(limit) != 2 or limit[0] != 0 or limit[1] not in (math.inf, {"__float__": "Infinity"})):
        raise InputError("config.json: time_step_limit", f"{limit!r} is not implemented", "only [0, Infinity] is")
    inner = settings["expand"] * settings["hidden_size"]
    if inner != settings["num_heads"] * settings["head_dim"]:
        raise InputError("config.json: num_heads", f"heads of {settings['head_dim']} don't add up to {inner}", "correct it")
    eps = settings["layer_norm_epsilon"]
    return _model(settings, Mamba2(
        expand=settings["expand"], head_dim=settings["head_dim"], groups=settings["n_groups"], state=settings["state_size"],
        conv=settings["conv_kernel"], conv_bias=settings["use_conv_bias"], chunk=settings["chunk_size"], norm_eps=eps))


def _settings(model: ModelConfig, mixer: Mamba | Mamba2) -> Settings:
    return {"vocab_size": model.vocab_size, "hidden_size": model.dim, "state_size": mixer.state,
            "num_hidden_layers": depth(model, 1), "layer_norm_epsilon": model.norm.eps, "expand": mixer.expand,
            "conv_kernel": mixer.conv, "use_conv_bias": mixer.conv_bias, "tie_word_embeddings": model.tie_embeddings,
            "max_position_embeddings": model.max_len}


def _write_mamba(model: ModelConfig) -> Settings | None:
    layer = same_layers(model, Mamba)
    return None if layer is None else _settings(model, layer[0]) | {
        "intermediate_size": layer[0].expand * model.dim, "time_step_rank": layer[0].rank(model.dim)}


def _write_mamba2(model: ModelConfig) -> Settings | None:
    layer = same_layers(model, Mamba2)
    return None if layer is None else _settings(model, layer[0]) | {
        "num_heads": layer[0].heads(model.dim), "head_dim": layer[0].head_dim, "n_groups": layer[0].groups,
        "chunk_size": layer[0].chunk}


MAMBA = Family("mamba", "MambaForCausalLM", _KNOWN, _FIXED, _read_mamba, _write_mamba,
               (*_AROUND, *mamba_rows("backbone.layers.{layer}.mixer")), per_layer=1)
MAMBA2 = Family(
    "mamba2", "Mamba2ForCausalLM",
    {name: value for name, value in _KNOWN.items() if name != "time_step_rank"} | {
        "vocab_size": 32768, "hidden_size": 4096, "state_size": 128, "num_hidden_layers": 64, "num_heads": 128, "head_dim": 64,
        "n_groups": 8, "chunk_size": 256, "tie_word_embeddings": False, "time_step_limit": None},
    _FIXED, _read_mamba2, _write_mamba2, (*_AROUND, *_MAMBA2), per_layer=1)


_BLOCK = "rwkv.blocks.{layer}"
_RWKV = (
    Row("embedding/table", "rwkv.embeddings.weight"),
    Row("embedding/norm/gain", "rwkv.blocks.0.pre_ln.weight"), Row("embedding/norm/bias", "rwkv.blocks.0.pre_ln.bias"),
    *(Row(f"norm_{i}/{ours}", f"{_BLOCK}.ln{i + 1}.{theirs}")
      for i in (0, 1) for ours, theirs in (("gain", "weight"), ("bias", "bias"))),
    *(Row(f"{ours}/time_mix_{name}", f"{_BLOCK}.{theirs}.time_mix_{name}", "row")
      for ours, theirs, names in (("rwkv4_time_mix", "attention", ("key", "value", "receptance")),
                                  ("rwkv4_channel_mix", "feed_forward", ("key", "receptance"))) for name in names),
    *(Row(f"rwkv4_time_mix/{name}", f"{_BLOCK}.attention.{name}") for name in ("time_decay", "time_first")),
    *(Row(f"{ours}/{name}", f"{_BLOCK}.{theirs}.{name}.weight", "linear")
      for ours, theirs, names in (("rwkv4_time_mix", "attention", ("key", "value", "receptance", "output")),
                                  ("rwkv4_channel_mix", "feed_forward", ("key", "receptance", "value"))) for name in names),
    Row("final_norm/gain", "rwkv.ln_out.weight"), Row("final_norm/bias", "rwkv.ln_out.bias"),
    Row("unembedding/kernel", "head.weight", "linear"))


def _read_rwkv(settings: Settings) -> ModelConfig:
    dim, layers, width = settings["hidden_size"], settings["num_hidden_layers"], settings["attention_hidden_size"]
    mixers = (Rwkv4TimeMix(width=None if width == dim else width, depth=layers),
              Rwkv4ChannelMix(hidden=settings["intermediate_size"] or 4 * dim, depth=layers))
    return ModelConfig(
        vocab_size=settings["vocab_size"], dim=dim, max_len=settings["context_length"], stages=(Stage(mixers, layers),),
        norm=Norm("layernorm", eps=settings["layer_norm_epsilon"]), embedding_norm=True,
        tie_embeddings=settings["tie_word_embeddings"])


def _write_rwkv(model: ModelConfig) -> Settings | None:
    layer = same_layers(model, Rwkv4TimeMix, Rwkv4ChannelMix)
    return None if layer is None else {
        "vocab_size": model.vocab_size, "context_length": model.max_len, "hidden_size": model.dim,
        "num_hidden_layers": depth(model), "attention_hidden_size": layer[0].width or model.dim,
        "intermediate_size": layer[1].hidden, "layer_norm_epsilon": model.norm.eps,
        "tie_word_embeddings": model.tie_embeddings, "rescale_every": 0}


RWKV = Family(
    "rwkv", "RwkvForCausalLM",
    {"vocab_size": 50277, "context_length": 1024, "hidden_size": 4096, "num_hidden_layers": 32, "attention_hidden_size": None,
     "intermediate_size": None, "layer_norm_epsilon": 1e-5, "tie_word_embeddings": False},
    {}, _read_rwkv, _write_rwkv, _RWKV)
