"""S4, S4D, H3, Mamba and Mamba-2, the whole mixers, against their equations: one document and one token at a time, in float64.

Convolutions, gates, projections, norms and the discretised system are written out here from the mixer's weights alone.
"""

from __future__ import annotations

import functools

import numpy as np
import pytest

from research.models.h3 import H3
from research.models.mamba import Mamba
from research.models.mamba2 import Mamba2
from research.models.s4 import S4
from research.models.s4d import S4d
from tests.models.cases import CASES
from tests.models.oracles import check_mixer, sigmoid

silu = lambda x: x * sigmoid(x)
softplus = lambda x: np.logaddexp(0, x)
gelu = lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
rms = lambda x, eps: x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps)
both = lambda z: np.concatenate([z, z.conj()], axis=-1)  # a mode and its conjugate


def convolved(x_Lxx: np.ndarray, taps_Wxx: np.ndarray) -> np.ndarray:
    """The last tap meets the token itself."""
    before = np.concatenate([np.zeros((len(taps_Wxx) - 1, *x_Lxx.shape[1:])), x_Lxx])
    return sum(before[w : w + len(x_Lxx)] * tap for w, tap in enumerate(taps_Wxx))


def part(p: dict, name: str) -> np.ndarray:
    return p[f"{name}_real"] + 1j * p[f"{name}_imaginary"]


def gated_output(p: dict, y_LxI: np.ndarray) -> np.ndarray:
    return (y_LxI @ p["output"]) * sigmoid(y_LxI @ p["output_gate"])


def s4(cfg: S4, tokens: dict, p: dict, state: None) -> tuple[np.ndarray, dict]:
    """x' = A x + B u with A = diag(rate) - p p*, dense, over all modes; the bilinear rule by a matrix inverse."""
    x_LxD = tokens["x"]
    rate_DxN = both(-np.exp(p["a_log"]) + 1j * p["a_imaginary"])
    p_DxN, b_DxN, c_DxN = (both(part(p, name)) for name in "pbc")
    a_DxNxN = rate_DxN[..., None] * np.eye(rate_DxN.shape[1]) - p_DxN[..., :, None] * p_DxN[..., None, :].conj()
    half_DxNxN = np.exp(p["log_dt"])[:, None, None] / 2 * a_DxNxN
    inverse = np.linalg.inv(np.eye(a_DxNxN.shape[-1]) - half_DxNxN)
    step_DxNxN = inverse @ (np.eye(a_DxNxN.shape[-1]) + half_DxNxN)
    input_DxN = np.einsum("dmn,dn->dm", inverse, np.exp(p["log_dt"])[:, None] * b_DxN)
    h_DxN, y_LxD = np.zeros_like(b_DxN), np.zeros_like(x_LxD)
    for t, u_D in enumerate(x_LxD):
        h_DxN = np.einsum("dmn,dn->dm", step_DxNxN, h_DxN) + input_DxN * u_D[:, None]
        y_LxD[t] = (c_DxN * h_DxN).sum(axis=-1).real
    return gated_output(p, gelu(y_LxD + p["skip"] * x_LxD)), {}


def diagonal(cfg: S4d | H3, p: dict, u_LxCxM: np.ndarray) -> np.ndarray:
    """Each channel's system on each of its M inputs."""
    if cfg.init == "real":
        rate_CxN, c_CxN = -np.exp(p["a_log"]), p["c_real"]
    else:
        rate_CxN, c_CxN = both(-np.exp(p["a_log"]) + 1j * p["a_imaginary"]), both(part(p, "c"))
    z_CxN = np.exp(p["log_dt"])[:, None] * rate_CxN
    if cfg.discretization == "zoh":
        step_CxN, input_CxN = np.exp(z_CxN), (np.exp(z_CxN) - 1) / rate_CxN
    else:
        step_CxN, input_CxN = (1 + z_CxN / 2) / (1 - z_CxN / 2), np.exp(p["log_dt"])[:, None] / (1 - z_CxN / 2)
    h_CxMxN, y_LxCxM = np.zeros((*u_LxCxM.shape[1:], z_CxN.shape[1]), z_CxN.dtype), np.zeros_like(u_LxCxM)
    for t, u_CxM in enumerate(u_LxCxM):
        h_CxMxN = step_CxN[:, None] * h_CxMxN + input_CxN[:, None] * u_CxM[..., None]
        y_LxCxM[t] = (c_CxN[:, None] * h_CxMxN).sum(axis=-1).real
    return y_LxCxM


def s4d(cfg: S4d, tokens: dict, p: dict, state: None) -> tuple[np.ndarray, dict]:
    x_LxD = tokens["x"]
    return gated_output(p, gelu(diagonal(cfg, p, x_LxD[..., None])[..., 0] + p["skip"] * x_LxD)), {}


def h3(cfg: H3, tokens: dict, p: dict, state: None) -> tuple[np.ndarray, dict]:
    """Q * SSM_diagonal(SSM_shift(K) V')."""
    q_LxHxK, k_LxHxK, v_LxHxK = (np.tensordot(tokens["x"], p[name], axes=1) for name in ("query", "key", "value"))
    kv_LxHxKxV = convolved(k_LxHxK, p["shift"])[..., :, None] * v_LxHxK[..., None, :]
    u_LxHxM = kv_LxHxKxV.reshape(*kv_LxHxKxV.shape[:2], -1)
    y_LxHxM = diagonal(cfg, p, u_LxHxM) + p["skip"][:, None] * u_LxHxM
    y_LxHxV = np.einsum("lhk,lhkv->lhv", q_LxHxK, y_LxHxM.reshape(kv_LxHxKxV.shape))
    return np.tensordot(y_LxHxV, p["output"], axes=2), {}


def mamba(cfg: Mamba, tokens: dict, p: dict, state: None) -> tuple[np.ndarray, dict]:
    x_LxD = tokens["x"]
    u_LxI = silu(convolved(x_LxD @ p["input"], p["conv"]) + (p["conv_bias"] if cfg.conv_bias else 0.0))
    normed = lambda y, name: rms(y, cfg.norm_eps) * p[name] if cfg.norms else y
    dt_LxI = softplus(normed(u_LxI @ p["dt_down"], "dt_norm") @ p["dt_up"] + p["dt_bias"])
    b_LxN, c_LxN = normed(u_LxI @ p["b"], "b_norm"), normed(u_LxI @ p["c"], "c_norm")
    h_IxN, y_LxI = np.zeros_like(p["a_log"]), np.zeros_like(u_LxI)
    for t in range(len(x_LxD)):
        h_IxN = np.exp(-dt_LxI[t][:, None] * np.exp(p["a_log"])) * h_IxN + np.outer(dt_LxI[t] * u_LxI[t], b_LxN[t])
        y_LxI[t] = h_IxN @ c_LxN[t]
    return ((y_LxI + p["skip"] * u_LxI) * silu(x_LxD @ p["gate"])) @ p["output"], {}


def mamba2(cfg: Mamba2, tokens: dict, p: dict, state: None) -> tuple[np.ndarray, dict]:
    x_LxD = tokens["x"]
    short = lambda name: silu(convolved(np.tensordot(x_LxD, p[name], axes=1), p[f"{name}_conv"]) + p[f"{name}_conv_bias"])
    u_LxHxK, b_LxGxN, c_LxGxN = short("input"), short("b"), short("c")
    (L, H, K), (_, G, N) = u_LxHxK.shape, b_LxGxN.shape
    dt_LxH = softplus(x_LxD @ p["dt"] + p["dt_bias"])
    h_HxKxN, y_LxHxK = np.zeros((H, K, N)), np.zeros_like(u_LxHxK)
    for t in range(L):
        for h in range(H):
            written = dt_LxH[t, h] * np.outer(u_LxHxK[t, h], b_LxGxN[t, h // (H // G)])
            h_HxKxN[h] = np.exp(-dt_LxH[t, h] * np.exp(p["a_log"][h])) * h_HxKxN[h] + written
            y_LxHxK[t, h] = h_HxKxN[h] @ c_LxGxN[t, h // (H // G)]
    gated = (y_LxHxK + p["skip"][:, None] * u_LxHxK) * silu(np.tensordot(x_LxD, p["gate"], axes=1))
    normed = rms(gated.reshape(L, G, -1), cfg.norm_eps).reshape(L, H, K) * p["norm"]
    return np.tensordot(normed, p["output"], axes=2), {}


DOCUMENTS = {"S4": s4, "S4d": s4d, "H3": h3, "Mamba": mamba, "Mamba2": mamba2}


@pytest.mark.parametrize("row, name", [(row, name) for row in DOCUMENTS for name in CASES[row]])
def test_is_its_equations(row, name):
    cfg = CASES[row][name].cfg
    check_mixer(cfg, functools.partial(DOCUMENTS[row], cfg))
