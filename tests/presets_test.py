"""The presets: sizes as published, every tiny one learns real text."""

import json
import pathlib

import jax
import numpy as np
import pytest

from configs import PRESETS
from experiments import command_line  # noqa: F401  (defines the flags that tools.inspect_model reads)
from research.interop.huggingface import _family_of
from research.models.attention import Attention
from research.models.gated_delta import GatedDelta
from research.models.mixers import MIXERS
from research.training.loop import Launch, run
from tests.spikes import SPIKES
from tools.inspect_model import summary

# Exact numbers of parameters, of the published checkpoints named. transformers' model of the config.json that we write gives
# the same number (test_sizes_are_those_of_transformers).
TOTAL = {
    "llama2_7b": 6_738_415_616,  # meta-llama/Llama-2-7b-hf
    "llama2_13b": 13_015_864_320,  # meta-llama/Llama-2-13b-hf
    "llama2_70b": 68_976_648_192,  # meta-llama/Llama-2-70b-hf
    "llama3_8b": 8_030_261_248,  # meta-llama/Meta-Llama-3-8B
    "llama3_70b": 70_553_706_496,  # meta-llama/Meta-Llama-3-70B
    "llama3_405b": 405_853_388_800,  # meta-llama/Llama-3.1-405B
    "qwen3_8b": 8_190_735_360,  # Qwen/Qwen3-8B
    "mixtral_8x7b": 46_702_792_704,  # mistralai/Mixtral-8x7B-v0.1
    "gpt2_124m": 124_439_808,  # openai-community/gpt2
    "gpt2_355m": 354_823_168,  # openai-community/gpt2-medium
    "gpt2_774m": 774_030_080,  # openai-community/gpt2-large
    "gpt2_1558m": 1_557_611_200,  # openai-community/gpt2-xl
    "gpt3_175b": 174_604_259_328,  # GPT-2's formula at Brown et al. 2020, table 2.1: 175.0B
    "deepseek_v3": 671_026_419_200,  # deepseek-ai/DeepSeek-V3 without its multi-token head, balancing biases included
    "mamba_130m": 129_135_360,  # state-spaces/mamba-130m-hf
    "mamba_370m": 371_516_416,  # state-spaces/mamba-370m-hf
    "mamba_790m": 793_204_224,  # state-spaces/mamba-790m-hf
    "mamba_1_4b": 1_372_178_432,  # state-spaces/mamba-1.4b-hf
    "mamba_2_8b": 2_768_345_600,  # state-spaces/mamba-2.8b-hf
    "mamba2_2_7b": 2_702_599_680,  # state-spaces/mamba2-2.7b
    "jamba_v0_1": 51_570_323_328,  # ai21labs/Jamba-v0.1
    "rwkv4_169m": 169_342_464,  # Peng et al. 2023, table 2, RWKV/rwkv-4-169m-pile
    "rwkv4_430m": 430_397_440,
    "rwkv4_1_5b": 1_515_106_304,
    "rwkv4_3b": 2_984_627_200,
    "rwkv4_7b": 7_392_649_216,
    "rwkv4_14b": 14_148_597_760,
    # Peng et al. 2025, table of the "Goose" World models.
    "rwkv7_190m": 191_034_624,
    "rwkv7_450m": 450_767_872,
    "rwkv7_1_5b": 1_527_404_544,
    "rwkv7_2_9b": 2_947_735_040,
}
ACTIVE = {"mixtral_8x7b": 12.9e9, "deepseek_v3": 37e9, "jamba_v0_1": 12e9}  # as their reports round them


class Rows(dict):
    def __missing__(self, name: str) -> dict:
        self[name] = summary(PRESETS[name]())
        return self[name]


@pytest.fixture(scope="module")
def rows():
    """What `tools.inspect_model --list --json` says, by name; made when asked for."""
    return Rows()


@pytest.mark.parametrize("name", TOTAL)
def test_sizes_are_the_published_ones(name, rows):
    assert rows[name]["params"] == TOTAL[name]


@pytest.mark.parametrize("name", ACTIVE)
def test_active_sizes_are_the_published_ones(name, rows):
    assert rows[name]["active_params"] == pytest.approx(ACTIVE[name], rel=0.02)


@pytest.mark.parametrize("name, tokens, published, attention", [
    ("gpt3_175b", 300e9, 3.14e23, 1.015),  # Brown et al. 2020, table D.1
    ("llama3_405b", 15.6e12, 3.8e25, 1.036)])  # Dubey et al. 2024, section 3.2
def test_flops_of_training_are_the_published_ones(name, tokens, published, attention, rows):
    """Both papers count 6ND; ours adds attention, causal: 6 * layers * width * row a token."""
    model, row = PRESETS[name]().model, PRESETS[name]().data.seq_len
    ours = rows[name]["flops_per_token"] * tokens
    assert ours == pytest.approx(published * attention, rel=0.01)
    layers = sum(stage.repeats for stage in model.stages)
    assert ours - 6.0 * layers * model.dim * row * tokens == pytest.approx(published, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in TOTAL if not name.startswith(("deepseek", "rwkv7"))])
def test_sizes_are_those_of_transformers(name):
    """The size of transformers' model of the settings that an export would write, on the meta device."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    family, settings = _family_of(PRESETS[name]().model)
    with torch.device("meta"):
        model = getattr(transformers, family.architecture)(transformers.AutoConfig.for_model(family.model_type, **settings))
    assert sum(parameter.numel() for parameter in model.parameters()) == TOTAL[name]


@pytest.mark.slow
def test_the_size_of_deepseek_v3_is_that_of_transformers():
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    with torch.device("meta"):
        model = transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config())  # V3's own values
    biases = [buffer.numel() for name, buffer in model.named_buffers() if name.endswith("e_score_correction_bias")]
    assert sum(parameter.numel() for parameter in model.parameters()) + sum(biases) == TOTAL["deepseek_v3"]


def test_every_preset_is_listed(rows):
    """By its own name; tiny and small ones come in pairs, and small is about 10 million parameters."""
    for name in PRESETS:
        row = rows[name]
        assert row["name"] == name and row["family"]
        assert 0 < row["active_params"] <= row["params"] and row["flops_per_token"] > 0 and row["state_bytes_4096"] > 0
        if name.endswith("_small"):
            assert 8e6 < row["params"] < 13e6, (name, row["params"])
    assert {name.removesuffix("_tiny") for name in PRESETS if name.endswith("_tiny")} == {
        name.removesuffix("_small") for name in PRESETS if name.endswith("_small")}


def test_every_mixer_has_a_tiny_preset():
    """Linear attention without the delta rule, and windows beside whole rows, too."""
    tiny = {name: PRESETS[name]().model.stages for name in PRESETS if name.endswith("_tiny")}
    used = {name: [mixer for stage in stages for mixer in stage.pattern] for name, stages in tiny.items()}
    kinds = {type(mixer).__name__ for pattern in used.values() for mixer in pattern}
    assert set(MIXERS) - set(SPIKES) - kinds == {"Parallel"}
    assert {mixer.delta for pattern in used.values() for mixer in pattern if isinstance(mixer, GatedDelta)} == {True, False}
    windows = [{mixer.window for mixer in pattern if isinstance(mixer, Attention)} for pattern in used.values()]
    assert any(None in found and len(found) == 2 for found in windows)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in PRESETS if name.endswith("_tiny")])
def test_tiny_presets_learn_real_text(name, tmp_path):
    config = PRESETS[name]()
    result = run(config, Launch(str(tmp_path / "run"), config, quiet=True))
    rows = [json.loads(line) for path in pathlib.Path(tmp_path / "run").glob("metrics-*.jsonl") for line in path.open()]
    losses = [row["loss"] for row in rows if "loss" in row and "set" not in row]
    # The first logged loss is step 10's, after the steepest part; the start is the logarithm of the vocabulary.
    assert np.mean(losses[-2:]) < losses[0] - 0.5 and np.all(np.isfinite(losses))
    assert result["final_eval_loss"] < 0.75 * np.log(config.model.vocab_size)
    jax.clear_caches()
