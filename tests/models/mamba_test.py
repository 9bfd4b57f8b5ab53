"""Mamba and Mamba-2: the same numbers as `transformers`, published initial values, a state that doesn't grow."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.errors import InputError
from research.models import mixers
from research.models.context import one_document
from research.models.mamba import Mamba
from research.models.mamba2 import Mamba2
from tests.models.harness import apply, assert_close, make_params, random

DIM, ROWS, LENGTH = 16, 2, 11


@functools.cache
def init(cfg, dim: int = DIM) -> dict:
    module, x = mixers.row(cfg).module(cfg), jnp.zeros((1, 2, dim))
    boxes = jax.jit(module.init)(jax.random.key(0), x, one_document(1, 2))["params"]
    return {name: np.asarray(box.value) for name, box in boxes.items()}


def torch_weights(torch, weights: dict[str, list[np.ndarray] | np.ndarray]) -> dict:
    """Parts of a fused tensor are rows, one below the other."""
    join = lambda parts: np.concatenate(parts) if isinstance(parts, list) else parts
    return {name: torch.tensor(np.ascontiguousarray(join(parts))) for name, parts in weights.items()}


def assert_parity(cfg, torch_mixer, weights: dict, torch) -> None:
    torch_mixer.load_state_dict(torch_weights(torch, weights), strict=True)
    torch_mixer.eval()
    x = random(ROWS, LENGTH, DIM)
    with torch.no_grad():
        expected = torch_mixer(torch.tensor(x))
    expected = expected[0] if isinstance(expected, tuple) else expected
    y, _, _ = apply(cfg, make_params(cfg), x, one_document(ROWS, LENGTH))
    assert_close(y, expected.numpy(), 1e-4)


def test_mamba_is_that_of_transformers():
    torch = pytest.importorskip("torch")
    hf = pytest.importorskip("transformers.models.mamba.modeling_mamba")
    cfg = Mamba(state=4, dt_rank=3)
    config = hf.MambaConfig(hidden_size=DIM, state_size=4, num_hidden_layers=1, time_step_rank=3, vocab_size=8)
    p = {name: np.asarray(value) for name, value in make_params(cfg).items()}
    weights = {
        "A_log": p["a_log"], "D": p["skip"], "conv1d.weight": p["conv"].T[:, None], "conv1d.bias": p["conv_bias"],
        "in_proj.weight": [p["input"].T, p["gate"].T], "x_proj.weight": [p["dt_down"].T, p["b"].T, p["c"].T],
        "dt_proj.weight": p["dt_up"].T, "dt_proj.bias": p["dt_bias"], "out_proj.weight": p["output"].T,
    }  # fmt: skip
    assert_parity(cfg, hf.MambaMixer(config, layer_idx=0), weights, torch)


@pytest.mark.parametrize("groups", [1, 2])
def test_mamba2_is_that_of_transformers(groups):
    torch = pytest.importorskip("torch")
    hf = pytest.importorskip("transformers.models.mamba2.modeling_mamba2")
    cfg = Mamba2(head_dim=8, groups=groups, state=3, chunk=4)
    config = hf.Mamba2Config(
        hidden_size=DIM, state_size=3, num_hidden_layers=1, vocab_size=8, num_heads=4, head_dim=8, n_groups=groups,
        chunk_size=4, layer_norm_epsilon=cfg.norm_eps)  # fmt: skip
    p = {name: np.asarray(value) for name, value in make_params(cfg).items()}
    rows = lambda name: p[name].reshape(DIM, -1).T
    parts = ("input", "b", "c")
    weights = {
        "A_log": p["a_log"], "D": p["skip"], "dt_bias": p["dt_bias"], "norm.weight": p["norm"].reshape(-1),
        "in_proj.weight": [rows(name) for name in ("gate", *parts, "dt")],
        "conv1d.weight": [p[f"{name}_conv"].reshape(4, -1).T[:, None] for name in parts],
        "conv1d.bias": [p[f"{name}_conv_bias"].reshape(-1) for name in parts],
        "out_proj.weight": p["output"].reshape(-1, DIM).T,
    }  # fmt: skip
    assert_parity(cfg, hf.Mamba2Mixer(config, layer_idx=0), weights, torch)


@pytest.mark.parametrize("cfg", [Mamba(), Mamba2(head_dim=2, state=4)], ids=["mamba", "mamba2"])
def test_steps_begin_as_published(cfg):
    """softplus(dt_bias) fills [1e-3, 0.1] evenly in its logarithm."""
    bias = init(cfg, 512)["dt_bias"]
    share = (np.log(np.logaddexp(0, bias.astype(np.float64))) - np.log(1e-3)) / np.log(100)
    assert share.min() >= -1e-4 and share.max() <= 1 + 1e-4
    np.testing.assert_allclose(np.quantile(share, [0.25, 0.5, 0.75]), [0.25, 0.5, 0.75], atol=0.06)


def test_the_floor_of_a_step():
    bias = init(Mamba(dt_min=1e-6, dt_max=1e-5))["dt_bias"]
    np.testing.assert_allclose(np.logaddexp(0, bias.astype(np.float64)), 1e-4, rtol=1e-3)


def test_decays_begin_as_published():
    np.testing.assert_allclose(np.exp(init(Mamba(state=5))["a_log"]), np.tile(np.arange(1, 6), (2 * DIM, 1)), rtol=1e-6)
    rates = np.exp(init(Mamba2(head_dim=2, state=4), 512)["a_log"])
    assert 1 <= rates.min() < 1.2 and 15.5 < rates.max() <= 16


@pytest.mark.parametrize(
    "cfg, size", [(Mamba(), 32 * 16 * 4 + 3 * 32 * 2), (Mamba2(head_dim=8, state=4), 32 * 4 * 4 + 3 * 40 * 2)]
)
def test_the_state_does_not_grow(cfg, size):
    assert {mixers.state_bytes(cfg, DIM, length, jnp.bfloat16) for length in (1, 1024, 1 << 20)} == {size}


def test_bad_input():
    with pytest.raises(InputError, match="dt_min"):
        Mamba(dt_min=1.0)
    with pytest.raises(InputError, match="head_dim"):
        Mamba2(head_dim=5).check(DIM)
    with pytest.raises(InputError, match="groups"):
        Mamba2(head_dim=8, groups=3).check(DIM)
