"""Griffin's recurrent block against its equations, one token at a time, and against transformers' RecurrentGemma."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.models.context import one_document
from research.models.rglru import RgLru, RgLruMixer, bounded_root
from research.params import flatten
from tests.models.cases import CASES, DIM
from tests.models.harness import QUICK, apply, make_params, random
from tests.models.oracles import check_mixer, sigmoid


def document(tokens: dict, p: dict, state: None) -> tuple[np.ndarray, dict]:
    x = tokens["x"]
    gate = np.tensordot(x, p["gate"], axes=1) + p["gate_bias"]
    gate = 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
    z = np.tensordot(x, p["input"], axes=1) + p["input_bias"]
    taps = len(p["conv"])
    before = np.concatenate([np.zeros((taps - 1, *z.shape[1:])), z])
    u = sum(before[w : w + len(x)] * p["conv"][w] for w in range(taps)) + p["conv_bias"]
    blocks = lambda name: sigmoid(np.einsum("lhi,hij->lhj", u, p[name]) + p[f"{name}_bias"])
    r, i = blocks("recurrence_gate"), blocks("input_gate")
    a = np.exp(-8 * np.log1p(np.exp(p["lambda"])) * r)
    h = np.zeros_like(u)
    h[0] = i[0] * u[0]
    for t in range(1, len(x)):
        h[t] = a[t] * h[t - 1] + np.sqrt(1 - a[t] ** 2) * (i[t] * u[t])
    return np.tensordot(h * gate, p["output"], axes=2) + p["output_bias"], {}


def test_is_the_published_block():
    check_mixer(CASES["RgLru"]["wide"].cfg, document)


def test_transformers_block():
    torch = pytest.importorskip("torch")
    module = pytest.importorskip("transformers.models.recurrent_gemma.modeling_recurrent_gemma")
    heads, width = 4, 24
    config = module.RecurrentGemmaConfig(
        hidden_size=DIM, lru_width=width, num_attention_heads=heads, conv1d_width=4, num_hidden_layers=1)
    block = module.RecurrentGemmaRecurrentBlock(config, 0).eval()
    cfg = RgLru(heads=heads, width=width)
    params = make_params(cfg)
    p = {name: np.asarray(x) for name, x in params.items()}
    tensors = {
        "linear_y.weight": p["gate"].reshape(DIM, width).T, "linear_y.bias": p["gate_bias"].ravel(),
        "linear_x.weight": p["input"].reshape(DIM, width).T, "linear_x.bias": p["input_bias"].ravel(),
        "linear_out.weight": p["output"].reshape(width, DIM).T, "linear_out.bias": p["output_bias"],
        "conv_1d.weight": p["conv"].reshape(4, width).T[:, None], "conv_1d.bias": p["conv_bias"].ravel(),
        "rg_lru.recurrent_param": p["lambda"].ravel(), "rg_lru.input_gate_weight": p["input_gate"],
        "rg_lru.input_gate_bias": p["input_gate_bias"], "rg_lru.recurrent_gate_weight": p["recurrence_gate"],
        "rg_lru.recurrent_gate_bias": p["recurrence_gate_bias"],
    }  # fmt: skip
    block.load_state_dict({name: torch.tensor(x) for name, x in tensors.items()})
    x = random(2, 13, DIM)
    with torch.no_grad():
        expected, _ = block(torch.tensor(x), torch.arange(13)[None].repeat(2, 1), None, use_cache=False)
    y, _, _ = jax.jit(lambda params, x: apply(cfg, params, x, one_document(2, 13)))(params, x)
    np.testing.assert_allclose(y, expected.numpy(), rtol=0, atol=1e-5)


def test_initial_values_are_published():
    cfg = RgLru(heads=4, width=512, depth=8)
    make = jax.jit(RgLruMixer(cfg).init, compiler_options=QUICK)
    init = make({"params": jax.random.key(0)}, jnp.zeros((1, 1, DIM)), one_document(1, 1))
    p = {name: np.asarray(box.value) for name, box in flatten(init["params"]).items()}
    a = 1 / (1 + np.exp(p["lambda"]))
    assert 0.9 <= a.min() < 0.905 and 0.994 < a.max() <= 0.999
    assert np.mean(a**2) == pytest.approx((0.9**2 + 0.999**2) / 2, rel=0.01)
    assert p["conv"].std() == pytest.approx(0.05, rel=0.1) and not np.any(p["conv_bias"])
    assert p["output"].std() == pytest.approx(np.sqrt(2 / 8 / 512), rel=0.05)


def test_the_root_has_a_bounded_derivative():
    x = jnp.array([0.0, 1e-12, 0.25])
    np.testing.assert_allclose(bounded_root(x), jnp.sqrt(x))
    np.testing.assert_allclose(jax.vmap(jax.grad(bounded_root))(x), [1000.0, 1000.0, 1.0])
