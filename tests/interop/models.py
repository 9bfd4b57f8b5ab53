"""transformers' models with random weights and small dims, one or more a family, and what is run on them."""

import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.cross_entropy import logits
from research.models.context import one_document
from research.models.lm import LanguageModel
from research.training.restore import load_params
from research.training.workdir import read_config

VOCAB = 61
_LLAMA = dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
              num_key_value_heads=2, max_position_embeddings=64)
_LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16,
               rope_theta=500000.0)
# name -> (config class, model class, settings)
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama2": ("LlamaConfig", "LlamaForCausalLM", _LLAMA | dict(num_key_value_heads=4, rms_norm_eps=1e-5)),
    "llama3": ("LlamaConfig", "LlamaForCausalLM", _LLAMA | dict(rope_parameters=_LLAMA3, head_dim=16)),
    "llama_linear": ("LlamaConfig", "LlamaForCausalLM",
                     _LLAMA | dict(rope_parameters=dict(rope_type="linear", factor=4.0, rope_theta=10000.0))),
    "llama_yarn": ("LlamaConfig", "LlamaForCausalLM",
                   _LLAMA | dict(head_dim=16, max_position_embeddings=256, rope_parameters=dict(
                       rope_type="yarn", factor=4.0, original_max_position_embeddings=64, beta_slow=0.25, beta_fast=2.0,
                       rope_theta=10000.0))),
    "llama_tied_biased": ("LlamaConfig", "LlamaForCausalLM",
                          _LLAMA | dict(tie_word_embeddings=True, attention_bias=True, mlp_bias=True, hidden_act="gelu")),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", dict(vocab_size=VOCAB, n_positions=64, n_embd=32, n_layer=3, n_head=4)),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", _LLAMA | dict(head_dim=16, rms_norm_eps=1e-5)),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", _LLAMA | dict(num_local_experts=4, sliding_window=7)),
    "mamba": ("MambaConfig", "MambaForCausalLM",
              dict(vocab_size=VOCAB, hidden_size=32, state_size=4, num_hidden_layers=3)),
    "mamba2": ("Mamba2Config", "Mamba2ForCausalLM",
               dict(vocab_size=VOCAB, hidden_size=32, state_size=6, num_hidden_layers=3, num_heads=8, head_dim=8, n_groups=2,
                    chunk_size=4)),
    "jamba": ("JambaConfig", "JambaForCausalLM",
              _LLAMA | dict(num_hidden_layers=5, num_experts=4, attn_layer_period=4, attn_layer_offset=2, mamba_d_state=4)),
    "rwkv": ("RwkvConfig", "RwkvForCausalLM",
             dict(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=3, attention_hidden_size=40, intermediate_size=48,
                  context_length=64)),
}


@functools.cache
def make(name: str) -> Any:
    """The model, evaluated, in float32, with weights drawn anew: gains and biases matter too."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    config_class, model_class, settings = MODELS[name]
    torch.manual_seed(0)
    model = getattr(transformers, model_class)(getattr(transformers, config_class)(**settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 0.3 if parameter.ndim == 1 else 0.7 / parameter.shape[-1] ** 0.5
            parameter.add_(torch.randn_like(parameter) * spread)
    return model


def tokens(batch: int = 2, length: int = 11) -> np.ndarray:
    return np.random.default_rng(1).integers(0, VOCAB, size=(batch, length))


def their_logits(model: Any, tokens_BxL: np.ndarray) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(torch.tensor(tokens_BxL), use_cache=False).logits.float().numpy()


def our_logits(workdir: pathlib.Path, tokens_BxL: np.ndarray) -> np.ndarray:
    """Of the run's checkpoint, in one parallel call."""
    model = LanguageModel(read_config(workdir).model)
    params, _ = load_params(workdir)

    @jax.jit
    def run(params, tokens_BxL):
        hidden, _, _ = model.hidden(params, tokens_BxL, one_document(*tokens_BxL.shape))
        return logits(hidden, model.unembedding(params), logit_scale=model.cfg.scales.logits)

    return np.asarray(run(params, jnp.asarray(tokens_BxL, jnp.int32)))
