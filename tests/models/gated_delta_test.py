"""The gated delta mixer against its equations, one head and one token at a time, and against transformers' layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.models.context import one_document
from research.models.gated_delta import GatedDelta, GatedDeltaMixer
from research.params import flatten
from tests.models.cases import CASES, DIM
from tests.models.harness import QUICK, apply, make_params, random
from tests.models.oracles import check_mixer, sigmoid

silu = lambda x: x * sigmoid(x)


def document(tokens: dict, p: dict, state: None) -> tuple[np.ndarray, dict]:
    x = tokens["x"]

    def short(name):
        """silu of the convolution, head by head."""
        z = np.tensordot(x, p[name], axes=1)
        taps = len(p[f"{name}_conv"])
        before = np.concatenate([np.zeros_like(z[: 1].repeat(taps - 1, axis=0)), z])
        return silu(sum(before[w : w + len(x)] * p[f"{name}_conv"][w] for w in range(taps)))

    unit = lambda z: z / np.sqrt((z**2).sum(axis=-1, keepdims=True) + 1e-6)
    q, k, v = unit(short("query")), unit(short("key")), short("value")
    q = q / np.sqrt(q.shape[-1])
    a = np.exp(-np.exp(p["a_log"]) * np.log1p(np.exp(x @ p["decay"] + p["dt_bias"])))
    b = sigmoid(x @ p["write"]) if "write" in p else None
    y = np.zeros_like(v)
    for h in range(v.shape[1]):
        g = h // (v.shape[1] // k.shape[1])
        S = np.zeros((v.shape[2], k.shape[2]))
        for t in range(len(x)):
            forget = np.eye(k.shape[2]) - b[t, h] * np.outer(k[t, g], k[t, g]) if b is not None else np.eye(k.shape[2])
            S = a[t, h] * S @ forget + (1 if b is None else b[t, h]) * np.outer(v[t, h], k[t, g])
            y[t, h] = S @ q[t, g]
    y = y / np.sqrt((y**2).mean(axis=-1, keepdims=True) + 1e-5) * p["norm"] * silu(np.tensordot(x, p["gate"], axes=1))
    return np.tensordot(y, p["output"], axes=2), {}


@pytest.mark.parametrize("name", CASES["GatedDelta"])
def test_is_the_published_layer(name):
    check_mixer(CASES["GatedDelta"][name].cfg, document)


def test_transformers_layer():
    """Qwen3-Next's layer, whose fused weights hold, for each key head, q, k, v and the gate, and b and a."""
    torch = pytest.importorskip("torch")
    module = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    cfg = GatedDelta(heads=4, key_heads=2, key_dim=3, value_dim=5, eps=1e-6, chunk=4)
    config = module.Qwen3NextConfig(
        hidden_size=DIM, linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=3, num_hidden_layers=1,
        linear_value_head_dim=5, linear_conv_kernel_dim=4, rms_norm_eps=1e-6, layer_types=["linear_attention"])  # fmt: skip
    layer = module.Qwen3NextGatedDeltaNet(config, 0).eval()
    params = make_params(cfg)
    p = {name: np.asarray(x) for name, x in params.items()}
    pairs = lambda x: x.reshape(DIM, 2, -1)  # value heads 0, 1 belong to key head 0
    fused = [p["query"], p["key"], pairs(p["value"]), pairs(p["gate"])]
    convolutions = [p[f"{name}_conv"].reshape(4, -1) for name in ("query", "key", "value")]
    tensors = {
        "in_proj_qkvz.weight": np.concatenate(fused, axis=-1).reshape(DIM, -1).T,
        "in_proj_ba.weight": np.concatenate([pairs(p["write"]), pairs(p["decay"])], axis=-1).reshape(DIM, -1).T,
        "conv1d.weight": np.concatenate(convolutions, axis=-1).T[:, None],
        "dt_bias": p["dt_bias"], "A_log": p["a_log"], "norm.weight": p["norm"],
        "out_proj.weight": p["output"].reshape(-1, DIM).T,
    }  # fmt: skip
    layer.load_state_dict({name: torch.tensor(x) for name, x in tensors.items()})
    x = random(2, 13, DIM)
    with torch.no_grad():
        expected = layer(torch.tensor(x)).numpy()
    y, _, _ = jax.jit(lambda params, x: apply(cfg, params, x, one_document(2, 13)))(params, x)
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-5)


def test_initial_values_are_published():
    cfg = GatedDelta(heads=64, key_dim=2)
    make = jax.jit(GatedDeltaMixer(cfg).init, compiler_options=QUICK)
    init = make({"params": jax.random.key(0)}, jnp.zeros((1, 1, DIM)), one_document(1, 1))
    p = {name: np.asarray(box.value) for name, box in flatten(init["params"]).items()}
    rate, step = np.exp(p["a_log"]), np.log1p(np.exp(p["dt_bias"]))
    assert 0.01 <= rate.min() < 3 and 13 < rate.max() <= 16
    assert 9e-4 <= step.min() < 3e-3 and 0.03 < step.max() <= 0.11 and np.median(step) == pytest.approx(0.01, rel=0.5)
    assert np.abs(p["key_conv"]).max() <= 0.5 and np.all(p["norm"] == 1)
