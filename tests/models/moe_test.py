"""The Moe mixer against a plain loop over tokens and experts in float64, and what is special to it: routing, capacity, losses,
counts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research import sharding
from research.errors import InputError
from research.models.attention import Attention
from research.models.lm import LanguageModel
from research.models.mixers import row
from research.models.moe import Moe, MoeMixer
from research.schema import MeshConfig, ModelConfig, Stage
from tests.models.cases import DIM
from tests.models.harness import QUICK, Layout, apply, assert_close, context, jitted, make_params, random

LAYOUT = Layout((((1, 5), (2, 6), (0, 1)), ((1, 3), (0, 1), (1, 4), (2, 3), (0, 1))))
VALID = LAYOUT.segment_ids_BxL != 0
CONFIGS = {
    "mixtral": Moe(experts=4, top_k=2, hidden=8),
    "deepseek_v3": Moe(experts=8, top_k=3, hidden=8, shared_hidden=8, scores="sigmoid", scale=2.5, groups=4, top_groups=2,
                       balance_rate=1e-3),
    "deepseek_v2": Moe(experts=6, top_k=2, hidden=8, shared_hidden=4, renormalize=False, groups=3, top_groups=2),
    "switch": Moe(experts=4, top_k=1, hidden=8, renormalize=False, activation="gelu"),
    "every_expert": Moe(experts=3, top_k=3, hidden=8),
}


def silu(x):
    return x / (1 + np.exp(-x))


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def choose(cfg: Moe, params: dict, x_D: np.ndarray) -> tuple[list[int], np.ndarray]:
    """(a token's experts, its weight for each)."""
    logits = x_D @ params["router"]
    scores = 1 / (1 + np.exp(-logits)) if cfg.scores == "sigmoid" else np.exp(logits) / np.exp(logits).sum()
    choice = scores + params["balance_bias"] if "balance_bias" in params else scores.copy()
    if cfg.groups > 1:
        size, best = cfg.experts // cfg.groups, 2 if cfg.scores == "sigmoid" else 1
        by_group = [np.sort(choice[g * size : (g + 1) * size])[-best:].sum() for g in range(cfg.groups)]
        for group in np.argsort(by_group)[: -cfg.top_groups]:
            choice[group * size : (group + 1) * size] = -np.inf
    chosen = np.argsort(-choice)[: cfg.top_k]
    weights = scores[chosen] / (scores[chosen].sum() if cfg.renormalize else 1.0)
    return chosen.tolist(), weights * cfg.scale


def oracle(cfg: Moe, params: dict, x_BxLxD: np.ndarray, capacity: int | None = None) -> tuple[np.ndarray, int]:
    """(y_BxLxD, dropped choices): one token after another, in float64."""
    params, x_BxLxD = jax.tree.map(lambda a: np.asarray(a, np.float64), params), x_BxLxD.astype(np.float64)
    y, dropped, activation = np.zeros_like(x_BxLxD), 0, {"silu": silu, "gelu": gelu}[cfg.activation]
    for b, tokens in enumerate(x_BxLxD):
        taken = np.zeros(cfg.experts, int)
        for l, x_D in enumerate(tokens):
            if cfg.shared_hidden:
                h = activation(x_D @ params["shared_gate"]) * (x_D @ params["shared_up"])
                y[b, l] += h @ params["shared_down"]
            for expert, weight in zip(*choose(cfg, params, x_D)) if VALID[b, l] else ():
                taken[expert] += 1
                if capacity is not None and taken[expert] > capacity:
                    dropped += 1
                    continue
                h = activation(x_D @ params["gate"][expert]) * (x_D @ params["up"][expert])
                y[b, l] += weight * (h @ params["down"][expert])
    return y, dropped


@pytest.mark.parametrize("name", CONFIGS)
def test_the_loop_over_tokens(name):
    cfg, x = CONFIGS[name], random(2, 12, DIM)
    y, _, aux = jitted(cfg, make_params(cfg), x, context(LAYOUT))
    expected, _ = oracle(cfg, make_params(cfg), x)
    assert_close(y, expected)
    loads = np.zeros(cfg.experts)
    for x_D in x[VALID]:
        loads[choose(cfg, jax.tree.map(np.asarray, make_params(cfg)), x_D)[0]] += 1
    fair = VALID.sum() * cfg.top_k / cfg.experts
    np.testing.assert_allclose([aux["max_load"], aux["min_load"]], [loads.max() / fair, loads.min() / fair], rtol=1e-6)
    if cfg.balance_rate is not None:
        np.testing.assert_array_equal(aux["statistics"]["balance_bias"], loads)


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
def test_gradients_are_those_of_running_every_expert(name):
    """Every expert on every token, weights of those not chosen zero: the same, differentiated by JAX in float64."""
    cfg, params, x, probe = CONFIGS[name], make_params(CONFIGS[name]), random(2, 12, DIM), random(2, 12, DIM, seed=3)
    plain = jax.tree.map(np.asarray, params)
    chosen = np.zeros((2, 12, cfg.experts))
    for b, l in zip(*np.nonzero(VALID)):
        chosen[b, l, choose(cfg, plain, x[b, l])[0]] = 1.0

    def dense(params, x):
        logits = x @ params["router"]
        scores = (jax.nn.sigmoid if cfg.scores == "sigmoid" else jax.nn.softmax)(logits) * chosen
        weights = cfg.scale * scores / jnp.maximum(scores.sum(-1, keepdims=True), 1e-30)
        h = jax.nn.silu(jnp.einsum("bld,edf->blef", x, params["gate"])) * jnp.einsum("bld,edf->blef", x, params["up"])
        y = jnp.einsum("blef,efd,ble->bld", h, params["down"], weights)
        if cfg.shared_hidden:
            y += (jax.nn.silu(x @ params["shared_gate"]) * (x @ params["shared_up"])) @ params["shared_down"]
        return jnp.sum(y * probe)

    with jax.enable_x64(True):
        wide = jax.tree.map(lambda a: jnp.asarray(np.asarray(a), jnp.float64), (params, x))
        expected = jax.tree.map(np.asarray, jax.grad(dense, argnums=(0, 1))(*wide))
    loss = lambda params, x: jnp.sum(apply(cfg, params, x, context(LAYOUT))[0] * probe)
    actual = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, x)
    assert_close(actual, expected)


def test_a_row_that_the_mesh_does_not_divide(devices):
    """One row on four experts' devices: each of them sends it all, and values and gradients are those of one device."""
    cfg, x, probe = Moe(experts=4, top_k=2, hidden=8), random(1, 6, DIM), random(1, 6, DIM, seed=3)
    ctx = context(Layout((((1, 5), (0, 1)),)))
    mesh, rules = sharding.make_mesh(MeshConfig(rules="ep", expert=4), devices), sharding.rules_named("ep")

    def loss(params, x):
        y = apply(cfg, params, x, ctx)[0]
        return jnp.sum(y * probe), y

    run = lambda: jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True), compiler_options=QUICK)(make_params(cfg), x)
    expected = run()
    with sharding.use(mesh, rules):
        assert_close(run(), expected)


@pytest.mark.parametrize("factor, capacity", [(0.5, 3), (1.0, 6), (2.0, 12)])
def test_capacity_drops_the_last_tokens_of_a_row(factor, capacity):
    """Tokens of L=12 with top 2 of 4 experts: six a fair share; padding takes no place."""
    cfg, x = Moe(experts=4, top_k=2, hidden=8, capacity_factor=factor), random(2, 12, DIM)
    y, _, aux = jitted(cfg, make_params(cfg), x, context(LAYOUT))
    expected, dropped = oracle(cfg, make_params(cfg), x, capacity)
    assert_close(y, expected)
    assert float(aux["dropped_share"]) == pytest.approx(dropped / (2 * VALID.sum()))
    assert (dropped == 0) == (capacity == 12)


def test_padding_is_routed_nowhere():
    """Whatever it holds, it changes no value, no load and no loss."""
    cfg = Moe(experts=4, top_k=2, hidden=8, balance_rate=0.1, balance_loss=0.1, z_loss=0.1)
    x = random(2, 12, DIM)
    other = np.where(VALID[..., None], x, 100.0 * random(2, 12, DIM, seed=4)).astype(np.float32)
    y, _, aux = jitted(cfg, make_params(cfg), x, context(LAYOUT))
    y_other, _, aux_other = jitted(cfg, make_params(cfg), other, context(LAYOUT))
    np.testing.assert_array_equal(np.asarray(y)[VALID], np.asarray(y_other)[VALID])
    jax.tree.map(np.testing.assert_array_equal, aux, aux_other)
    assert not np.any(np.asarray(y)[~VALID]) and float(jnp.sum(aux["statistics"]["balance_bias"])) == 2 * VALID.sum()
    _, _, empty = jitted(cfg, make_params(cfg), x, context(Layout((((0, 12),),) * 2)))
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(empty))


def test_losses_by_hand():
    """Two experts, three tokens and a padding; logits (0, ln 3), (0, ln 3), (ln 3, 0): probabilities 1/4 and 3/4."""
    cfg = Moe(experts=2, top_k=1, hidden=8, renormalize=False, balance_loss=0.5, z_loss=0.1)
    params = {**make_params(cfg), "router": jnp.zeros((DIM, 2)).at[0, 0].set(1.0).at[1, 1].set(1.0)}
    x = np.zeros((1, 4, DIM), np.float32)
    x[0, :2, 1] = x[0, 2, 0] = x[0, 3, 0] = np.log(3)
    _, _, aux = jitted(cfg, params, x, context(Layout((((1, 3), (0, 1)),))))
    share, probability = np.array([1 / 3, 2 / 3]), np.array([(1 + 1 + 3) / 12, (3 + 3 + 1) / 12])
    assert float(aux["balance_loss"]) == pytest.approx(0.5 * 2 * np.sum(share * probability))
    assert float(aux["router_z_loss"]) == pytest.approx(0.1 * np.log(4) ** 2)
    assert float(aux["max_load"]) == pytest.approx(4 / 3) and float(aux["min_load"]) == pytest.approx(2 / 3)


def test_balance_loss_is_its_weight_at_balance_and_pushes_towards_it():
    cfg = Moe(experts=4, top_k=2, hidden=8, balance_loss=1.0)
    params, x = make_params(cfg), random(2, 12, DIM)
    even = {**params, "router": jnp.zeros((DIM, 4))}
    assert float(jitted(cfg, even, x, context(LAYOUT))[2]["balance_loss"]) == pytest.approx(1.0)  # any choice: P is 1/4
    loss = jax.jit(jax.value_and_grad(lambda r: apply(cfg, {**params, "router": r}, x, context(LAYOUT))[2]["balance_loss"]))
    router, losses = params["router"].at[:, 0].add(1.0), []
    for _ in range(30):
        value, grad = loss(router)
        losses.append(float(value))
        router -= 0.5 * grad
    assert losses[-1] < 0.5 + 0.5 * losses[0] and losses[-1] < 1.1


def test_the_bias_chooses_but_does_not_weigh():
    cfg = Moe(experts=4, top_k=2, hidden=8, balance_rate=0.1)
    x = random(2, 12, DIM)
    params = {**make_params(cfg), "balance_bias": jnp.array([0.0, 0.0, 9.0, 9.0])}
    y, _, aux = jitted(cfg, params, x, context(LAYOUT))
    np.testing.assert_array_equal(aux["statistics"]["balance_bias"], VALID.sum() * np.array([0, 0, 1, 1]))
    assert_close(y, oracle(cfg, params, x)[0])
    moved = MoeMixer.update_weight(cfg, "balance_bias", params["balance_bias"], aux["statistics"]["balance_bias"])
    np.testing.assert_allclose(moved - params["balance_bias"], [0.1, 0.1, -0.1, -0.1], atol=1e-6)


MIXTRAL = ModelConfig(
    vocab_size=32000, dim=4096, max_len=32768,
    stages=(Stage((Attention(heads=32, kv_heads=8, rope_base=1e6), Moe(experts=8, top_k=2, hidden=14336)), 32),))


def test_mixtral_8x7b_has_its_published_size():
    """https://huggingface.co/mistralai/Mixtral-8x7B-v0.1: 46,702,792,704 parameters, about 12.9 billion active."""
    counts = LanguageModel(MIXTRAL).param_counts()
    assert counts["total"] == 46_702_792_704
    assert counts["active"] == 46_702_792_704 - 32 * 3 * 6 * 4096 * 14336 == 12_879_925_248


def test_router_and_bias_are_always_active():
    mixer = Moe(experts=8, top_k=2, hidden=4, shared_hidden=6, balance_rate=0.1)
    counts = LanguageModel(ModelConfig(vocab_size=10, dim=16, stages=(Stage((mixer,), 3),))).param_counts()
    experts = 3 * 3 * 8 * 16 * 4
    assert counts["total"] - counts["active"] == experts * 6 // 8


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(experts=4, top_k=5, hidden=8), r"^top_k: 5 is above the 4 experts of the chosen groups; choose fewer$"),
        (dict(experts=8, top_k=3, hidden=8, groups=4), r"^top_k: 3 is above the 2 experts of the chosen groups; "),
        (dict(experts=8, top_k=1, hidden=8, groups=3), r"^groups: 3 does not divide experts=8 or is below top_groups=1; "),
        (dict(experts=8, top_k=1, hidden=8, groups=2, top_groups=3), r"^groups: 2 does not divide .* top_groups=3; "),
        (dict(experts=4, top_k=2, hidden=8, groups=4, top_groups=2, scores="sigmoid"), r"^groups: .* no best two; "),
        (dict(experts=4, top_k=1, hidden=8), r"^renormalize: makes the weight of one expert 1: its router would not learn; "),
    ],
)
def test_bad_configs(fields, message):
    with pytest.raises(InputError, match=message):
        Moe(**fields)


def test_the_reference_and_ragged_products_agree():
    cfg, x = CONFIGS["deepseek_v3"], random(2, 12, DIM)
    y, _, _ = jitted(dataclasses.replace(cfg, implementation="reference"), make_params(cfg), x, context(LAYOUT))
    assert_close(y, jitted(cfg, make_params(cfg), x, context(LAYOUT))[0])
    assert row(cfg).module.active_share(cfg) == 3 / 8
