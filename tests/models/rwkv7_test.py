"""RWKV-7's mixers against the authors' equations, one head and one token at a time; its initial values."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.models.context import Context
from research.models.lm import LanguageModel
from research.models.rwkv7 import Rwkv7ChannelMix, Rwkv7TimeMix
from research.params import flatten, unflatten
from research.schema import ModelConfig, Norm, Stage
from tests.models.cases import CASES
from tests.models.harness import QUICK, Layout, random
from tests.models.oracles import check_mixer, shifted, sigmoid


def time_mix(tokens: dict, p: dict, state: None) -> tuple[np.ndarray, dict]:
    """Layer 1 of the model, whose first layer's value is what the harness says."""
    x = tokens["x"]
    (L, D), (H, K) = x.shape, p["w0"].shape
    heads = lambda name, z: (z @ p[name].reshape(-1, D)).reshape(L, H, K)
    mixed = {name: x + (shifted(x) - x) * p[f"x_{name}"] for name in "rwkvag"}
    low_rank = lambda name, f: heads(f"{name}2", f(mixed[name] @ p[f"{name}1"]))
    same = lambda z: z
    r, k, v = heads("receptance", mixed["r"]), heads("key", mixed["k"]), heads("value", mixed["v"])
    soft_clamped = -np.log1p(np.exp(-(p["w0"] + low_rank("w", np.tanh)))) - 0.5
    w = np.exp(-np.exp(soft_clamped))
    a = sigmoid(p["a0"] + low_rank("a", same))
    g = low_rank("g", sigmoid)
    if "v0" in p:
        first = np.sin(np.sin(x.sum(axis=-1))[:, None] + np.arange(D)).reshape(L, H, K)
        v = v + (first - v) * sigmoid(p["v0"] + low_rank("v", same))
    kappa = k * p["k_k"]
    kappa = kappa / np.linalg.norm(kappa, axis=-1, keepdims=True)
    k = k * (1 + (a - 1) * p["k_a"])
    y = np.zeros((L, H, K))
    for h in range(H):
        S = np.zeros((K, K))
        for t in range(L):
            S = S * w[t, h] + np.outer(S @ -kappa[t, h], kappa[t, h] * a[t, h]) + np.outer(v[t, h], k[t, h])
            y[t, h] = S @ r[t, h]
    y = y - y.mean(axis=-1, keepdims=True)
    y = y / np.sqrt((y**2).mean(axis=-1, keepdims=True) + 64e-5) * p["ln_x_gain"] + p["ln_x_bias"]
    y = y + (r * k * p["r_k"]).sum(axis=-1, keepdims=True) * v
    return (y * g).reshape(L, D) @ p["output"].reshape(D, D), {}


def channel_mix(tokens: dict, p: dict, state: None) -> tuple[np.ndarray, dict]:
    x = tokens["x"]
    k = x + (shifted(x) - x) * p["x_k"]
    return np.maximum(k @ p["key"], 0) ** 2 @ p["value"], {}


@pytest.mark.parametrize("case", CASES["Rwkv7TimeMix"])
def test_time_mix_is_the_authors(case):
    check_mixer(CASES["Rwkv7TimeMix"][case].cfg, time_mix)


def test_channel_mix_is_the_authors():
    check_mixer(CASES["Rwkv7ChannelMix"]["plain"].cfg, channel_mix)


@pytest.mark.parametrize("dim, ranks", [
    (768, (64, 64, 32, 128)), (2048, (96, 96, 64, 256)), (2560, (96, 96, 64, 320))])
def test_ranks_are_published(dim, ranks):
    assert tuple(Rwkv7TimeMix(depth=1).ranks(dim).values()) == ranks


LAYERS, MODEL_DIM, WIDTH = 3, 16, 8
MIXERS = Rwkv7TimeMix(head_dim=WIDTH, depth=LAYERS, chunk=4), Rwkv7ChannelMix(hidden=32, depth=LAYERS)
STAGES = Stage((dataclasses.replace(MIXERS[0], first=True), MIXERS[1]), 1), Stage(MIXERS, LAYERS - 1)
CONFIG = ModelConfig(vocab_size=11, dim=MODEL_DIM, stages=STAGES, norm=Norm(kind="layernorm"), embedding_norm=True)
MODEL = LanguageModel(CONFIG)


def test_the_first_value_goes_through_the_model():
    """Prefill and steps give what one call gives; v0, which says how much of it is taken, matters in each layer that has one;
    one stage of all layers gives the same, whatever the mix of its layer 0."""
    layout = Layout((((1, 4), (2, 5)), ((1, 9),)))
    tokens = np.random.default_rng(0).integers(0, 11, size=(2, 9))
    flat = {path: jnp.asarray(random(*weight.shape, seed=i) / np.sqrt(weight.fan_in))
            for i, (path, weight) in enumerate(MODEL.weights.items())}  # fmt: skip

    @jax.jit
    def hidden(params, tokens, positions_BxL, segment_ids_BxL, state):
        return MODEL.hidden(params, tokens, Context(positions_BxL, segment_ids_BxL), state)[:2]

    def call(flat, state=None, columns=slice(None)):
        ids = layout.positions_BxL[:, columns], layout.segment_ids_BxL[:, columns]
        return hidden(unflatten(flat), tokens[:, columns], *ids, state)

    expected, _ = call(flat)
    outputs, state = [], MODEL.init_state(2, 9)
    for columns in (slice(0, 6), slice(6, 7), slice(7, 8), slice(8, 9)):
        y, state = call(flat, state, columns)
        outputs.append(y)
    np.testing.assert_allclose(np.concatenate(outputs, axis=1), expected, rtol=0, atol=2e-5)
    path = "decoder/stage_1/rwkv7_time_mix_0/v0"
    for layer in range(LAYERS - 1):
        y, _ = call({**flat, path: flat[path].at[layer].add(1.0)})
        assert float(jnp.max(jnp.abs(y - expected))) > 1e-3, layer

    one = LanguageModel(dataclasses.replace(CONFIG, stages=(Stage(MIXERS, LAYERS),)))
    joined = {path: x for path, x in flat.items() if "stage_" not in path}
    for path, x in flat.items():
        if "stage_1" in path:
            own = path.replace("stage_1", "stage_0")
            joined[own] = jnp.concatenate([flat[own] if own in flat else jnp.ones_like(x[:1]), x])
    y, _, _ = one.hidden(unflatten(joined), tokens, Context(layout.positions_BxL, layout.segment_ids_BxL))
    np.testing.assert_allclose(y, expected, rtol=0, atol=2e-5)


def test_initial_values_change_over_the_layers():
    """From the authors' formulas."""
    layers, dim, width = LAYERS, MODEL_DIM, WIDTH
    assert "embedding/norm/bias" in MODEL.weights
    params = flatten(jax.jit(MODEL.init, compiler_options=QUICK)(jax.random.key(0)))
    stages = [{path.split("rwkv7_time_mix_0/")[1]: np.asarray(x) for path, x in params.items() if f"{stage}/rwkv7_time" in path}
              for stage in ("stage_0", "stage_1")]  # fmt: skip
    assert set(stages[1]) - set(stages[0]) == {"v0", "v1", "v2"}
    mix = {name: np.concatenate([x, stages[1][name]]) for name, x in stages[0].items()}
    i = np.arange(dim)
    zigzag = np.sign(i % width - 3.5) * ((i % width - 3.5) / 3.5) ** 2
    for layer in range(layers):
        early, late = layer / (layers - 1), 1 - layer / layers
        np.testing.assert_allclose(mix["x_w"][layer], 1 - (i / dim) ** (0.9 * late), atol=1e-6)
        w0 = -6 + 6 * (i / (dim - 1)) ** (1 + early**0.3) + 0.5 + 2.5 * zigzag
        np.testing.assert_allclose(mix["w0"][layer].ravel(), w0, atol=1e-5)
        np.testing.assert_allclose(mix["ln_x_gain"][layer], ((1 + layer) / layers) ** 0.7, atol=1e-6)
    a0 = -0.19 + 0.3 * zigzag + 0.4 * (i / (dim - 1) - 0.5)
    np.testing.assert_allclose(mix["a0"][1].ravel(), a0, atol=1e-6)
    up = mix["w2"][0].reshape(-1, dim)
    np.testing.assert_allclose(up.T @ up, 0.01 * np.eye(dim), atol=1e-5)
    assert not np.any(mix["w1"]) and not np.any(mix["output"])
    assert 0.4 / 4 < np.abs(mix["receptance"]).max() <= 0.5 / 4 and np.abs(mix["key"]).max() <= 0.05 / 4
