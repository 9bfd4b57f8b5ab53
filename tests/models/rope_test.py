"""RoPE and its stretching: relative, partial, and equal to the published frequencies."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from research.config import from_json, override, to_json
from research.errors import InputError
from research.models.attention import Attention
from research.models.mixers import kinds
from research.models.rope import RopeScaling, frequencies, rotate, yarn_magnitude
from research.schema import Stage
from tests.models.harness import random


def test_rotation_is_relative():
    """q.k after rotation depends on the distance alone, and position 0 isn't rotated."""
    q, k = jnp.asarray(random(1, 1, 1, 8)), jnp.asarray(random(1, 1, 1, 8, seed=1))
    score = lambda i, j: jnp.sum(rotate(q, jnp.array([[i]]), 100.0) * rotate(k, jnp.array([[j]]), 100.0))
    assert float(score(7, 4)) == pytest.approx(float(score(103, 100)), rel=1e-4)
    assert abs(float(score(7, 4) - score(7, 5))) > 1e-3
    np.testing.assert_array_equal(rotate(q, jnp.array([[0]]), 100.0), q)
    angle, half = 3.0 * 100.0 ** (-1 / 4), 4  # pair 1 is (1, 1 + K/2)
    x = jnp.zeros((1, 1, 1, 8)).at[..., 1].set(1.0)
    turned = rotate(x, jnp.array([[3]]), 100.0)[0, 0, 0]
    np.testing.assert_allclose([turned[1], turned[1 + half]], [np.cos(angle), np.sin(angle)], rtol=1e-5)


def test_the_rest_of_a_partly_rotated_head_passes_through():
    x, positions = jnp.asarray(random(2, 3, 2, 10)), jnp.array([[0, 1, 2], [5, 6, 7]])
    y = rotate(x, positions, 100.0, width=4)
    np.testing.assert_array_equal(y[..., 4:], x[..., 4:])
    np.testing.assert_array_equal(y[..., :4], rotate(x[..., :4], positions, 100.0))


LLAMA = RopeScaling("llama3", 8.0, 8192)
YARN = RopeScaling("yarn", 40.0, 4096)  # DeepSeek-V3, but for its magnitude
DEEPSEEK = RopeScaling("yarn", 40.0, 4096, magnitude=1.0)
SCALINGS = {
    "linear": (RopeScaling("linear", 4.0), 128, 10000.0, {"rope_type": "linear", "factor": 4.0}),
    "llama3": (LLAMA, 128, 500000.0, {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192}),
    "yarn": (YARN, 64, 10000.0, {
        "rope_type": "yarn", "factor": 40.0, "beta_fast": 32, "beta_slow": 1, "original_max_position_embeddings": 4096}),
    "deepseek": (DEEPSEEK, 64, 10000.0, {
        "rope_type": "yarn", "factor": 40.0, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096}),
    "yarn_narrow": (RopeScaling("yarn", 4.0, 64, low=2.0, high=8.0), 8, 1000.0, {
        "rope_type": "yarn", "factor": 4.0, "beta_fast": 8, "beta_slow": 2, "original_max_position_embeddings": 64}),
}


@pytest.mark.parametrize("name", SCALINGS)
def test_frequencies_are_those_of_transformers(name):
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers", minversion="5")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling, width, base, published = SCALINGS[name]
    config = transformers.LlamaConfig(
        hidden_size=2 * width, num_attention_heads=2, head_dim=width, rope_parameters={"rope_theta": base, **published})
    expected, magnitude = ROPE_INIT_FUNCTIONS[published["rope_type"]](config, "cpu")
    frequency, own_magnitude = frequencies(width, base, scaling)
    np.testing.assert_allclose(frequency, expected.numpy(), rtol=2e-6)
    assert own_magnitude == pytest.approx(magnitude)


def test_llama3_by_hand():
    """Three wavelengths of width 6 at base 1000: kept, half way, divided."""
    frequency, magnitude = frequencies(6, 1000.0, RopeScaling("llama3", 8.0, 628, low=1.0, high=19.0))
    turns = 628 * np.array([1.0, 0.1, 0.01]) / (2 * math.pi)  # 99.9, 9.99, 0.99
    kept = (turns[1] - 1) / 18
    np.testing.assert_allclose(frequency, [1.0, 0.1 * (kept + (1 - kept) / 8), 0.01 / 8])
    assert magnitude == 1.0


def test_yarn_keeps_the_fast_and_divides_the_slow():
    frequency, magnitude = frequencies(64, 10000.0, YARN)
    plain, _ = frequencies(64, 10000.0)
    np.testing.assert_array_equal(frequency[:11], plain[:11])  # 32 turns: pair 10.5
    np.testing.assert_allclose(frequency[23:], plain[23:] / 40)  # one turn: pair 22.5
    assert np.all((frequency[11:23] < plain[11:23]) & (frequency[11:23] > plain[11:23] / 40))
    assert magnitude == yarn_magnitude(40.0) == pytest.approx(0.1 * math.log(40) + 1)
    x = jnp.asarray(random(1, 1, 1, 64))
    np.testing.assert_allclose(rotate(x, jnp.array([[0]]), 10000.0, YARN), x * magnitude, rtol=1e-6)
    assert yarn_magnitude(1.0) == yarn_magnitude(0.5) == 1.0 and yarn_magnitude(40.0, 0.707) < magnitude


def test_a_node_inside_a_mixer_goes_through_json_and_overrides():
    stage = Stage((Attention(heads=2, rope_scaling=LLAMA),))
    assert from_json(Stage, to_json(stage), kinds()) == stage
    changed = override(stage, {"pattern.0.rope_scaling.factor": "32"})
    assert changed.pattern[0].rope_scaling == RopeScaling("llama3", 32.0, 8192)
    assert override(stage, {"pattern.0.rope_scaling": "none"}).pattern[0].rope_scaling is None
    with pytest.raises(InputError, match=r"^pattern\.0\.rope_scaling\.facto: unknown key; did you mean factor"):
        override(stage, {"pattern.0.rope_scaling.facto": "32"})


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: RopeScaling("ntk", 2.0), r"^kind: unknown 'ntk'; "),
        (lambda: RopeScaling("llama3", 8.0), r"^original_len: llama3 needs the length of pretraining; "),
        (lambda: RopeScaling("yarn", 8.0, 4096, low=40.0), r"^high: 32.0 is not above low=40.0; raise it$"),
        (lambda: RopeScaling("linear", 0.0), r"^factor: 0.0 must be above 0.0; "),
    ],
)
def test_bad_scalings(build, message):
    with pytest.raises(InputError, match=message):
        build()
