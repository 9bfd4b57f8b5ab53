"""Presets: plain functions that return a typed Config. A new preset is its function and its place in PRESETS."""

from typing import Callable

from configs import deepseek, gpt, hybrids, ladder, llama, recurrent, state_space
from configs.quickstart import debug, quickstart, text
from research.config import nearest
from research.errors import InputError
from research.schema import Config

PRESETS: dict[str, Callable[[], Config]] = {function.__name__: function for function in (
    debug, quickstart, text,
    llama.llama_tiny, llama.llama_small, llama.llama2_7b, llama.llama2_13b, llama.llama2_70b, llama.llama3_8b,
    llama.llama3_70b, llama.llama3_405b, llama.qwen3_tiny, llama.qwen3_small, llama.qwen3_8b,
    llama.mixtral_tiny, llama.mixtral_small, llama.mixtral_8x7b,
    gpt.gpt2_tiny, gpt.gpt2_small, gpt.gpt2_124m, gpt.gpt2_355m, gpt.gpt2_774m, gpt.gpt2_1558m, gpt.gpt3_175b,
    deepseek.deepseek_tiny, deepseek.deepseek_small, deepseek.deepseek_v3,
    state_space.mamba_tiny, state_space.mamba_small, state_space.mamba_130m, state_space.mamba_370m, state_space.mamba_790m,
    state_space.mamba_1_4b, state_space.mamba_2_8b, state_space.mamba2_tiny, state_space.mamba2_small, state_space.mamba2_2_7b,
    state_space.s4_tiny, state_space.s4_small, state_space.s4d_tiny, state_space.s4d_small,
    state_space.h3_tiny, state_space.h3_small,
    recurrent.rwkv4_tiny, recurrent.rwkv4_small, recurrent.rwkv4_169m, recurrent.rwkv4_430m, recurrent.rwkv4_1_5b,
    recurrent.rwkv4_3b, recurrent.rwkv4_7b, recurrent.rwkv4_14b, recurrent.rwkv7_tiny, recurrent.rwkv7_small,
    recurrent.rwkv7_190m, recurrent.rwkv7_450m, recurrent.rwkv7_1_5b, recurrent.rwkv7_2_9b,
    recurrent.gated_delta_tiny, recurrent.gated_delta_small, recurrent.gated_linear_tiny, recurrent.gated_linear_small,
    hybrids.jamba_tiny, hybrids.jamba_small, hybrids.jamba_v0_1, hybrids.griffin_tiny, hybrids.griffin_small,
    hybrids.hybrid_tiny, hybrids.hybrid_small, hybrids.windowed_tiny, hybrids.windowed_small,
    ladder.ladder_transformer, ladder.ladder_mamba2)}


def preset(name: str) -> Config:
    """The preset called `name`.

    Raises:
      InputError: there is none; names the nearest.
    """
    if name not in PRESETS:
        raise InputError("--config", f"unknown preset {name!r}", nearest(name, list(PRESETS)))
    return PRESETS[name]()
