"""What a config.json says by null: what transformers makes of it."""

from typing import Any

import pytest

from research.errors import InputError
from research.interop.families import FAMILIES
from research.interop.huggingface import _plain
from research.models.attention import Attention
from research.schema import ModelConfig

DECODER = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
           "max_position_embeddings": 64, "attn_layer_period": 2, "attn_layer_offset": 1}
# family -> settings that may be null, with what null stands for; as published configs and transformers' own have them.
NULLS: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 4, "head_dim": 8, "rope_scaling": None, "rope_parameters": None,
              "partial_rotary_factor": 1.0, "attention_bias": False, "mlp_bias": False},
    "qwen3": {"num_key_value_heads": 4, "head_dim": 8, "rope_scaling": None, "sliding_window": None,
              "use_sliding_window": False},
    "mixtral": {"num_key_value_heads": 4, "head_dim": 8, "sliding_window": None, "rope_scaling": None},
    "jamba": {"num_key_value_heads": 4, "mamba_dt_rank": "auto", "mamba_proj_bias": False},
    "gpt2": {"n_inner": 3072, "add_cross_attention": False},
    "mamba": {"time_step_rank": "auto"},
    "mamba2": {"time_step_limit": [0.0, float("inf")]},
    "rwkv": {"attention_hidden_size": 4096, "intermediate_size": 16384},
}


def attention_of(model: ModelConfig) -> Attention:
    return next(mixer for stage in model.stages for mixer in stage.pattern if isinstance(mixer, Attention))


@pytest.mark.parametrize("name", FAMILIES)
def test_null_stands_for_what_it_does_there(name):
    family = FAMILIES[name]
    base = DECODER if "num_attention_heads" in family.known else {}
    expected = _plain(family.model(base | NULLS[name]))
    assert _plain(family.model(base | dict.fromkeys(NULLS[name]))) == expected
    for setting in NULLS[name]:
        assert _plain(family.model(base | NULLS[name] | {setting: None})) == expected, setting


@pytest.mark.parametrize("name, absent", [("llama", 64), ("qwen3", 32), ("mixtral", 8), ("jamba", 8)])
def test_key_value_heads_that_are_null_are_as_many_as_heads(name, absent):
    """Which isn't the family's default: that is what a config.json means that doesn't name them."""
    family, heads = FAMILIES[name], {"num_attention_heads": 64}
    unnamed, null = (attention_of(family.model(heads | more)) for more in ({}, {"num_key_value_heads": None}))
    assert (unnamed.kv_heads or unnamed.heads, null.kv_heads or null.heads) == (absent, 64)


@pytest.mark.parametrize("name", ["llama", "qwen3"])  # the others' classes want a number by now, but their code takes null
def test_they_are_as_many_for_transformers(name):
    transformers = pytest.importorskip("transformers")
    assert transformers.AutoConfig.for_model(name, **DECODER, num_key_value_heads=None).num_key_value_heads == 4


def test_nulls_inside_the_rope_s_table_are_left_out():
    family = FAMILIES["llama"]
    linear = {"rope_type": "linear", "factor": 2.0}
    nulls = dict.fromkeys(("type", "rope_theta", "attention_factor", "beta_fast", "partial_rotary_factor"))
    expected = _plain(family.model(DECODER | {"rope_scaling": linear}))
    assert _plain(family.model(DECODER | {"rope_scaling": linear | nulls})) == expected
    assert _plain(family.model(DECODER | {"rope_parameters": {"rope_type": None, "rope_theta": None}})) == _plain(
        family.model(DECODER))


def test_what_isn_t_implemented_is_still_refused():
    for name, settings in {"llama": {"partial_rotary_factor": 0.5}, "qwen3": {"use_sliding_window": True}}.items():
        with pytest.raises(InputError, match=f"{next(iter(settings))}: .* is not implemented"):
            FAMILIES[name].model(DECODER | settings)
