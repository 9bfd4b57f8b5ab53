"""The model around the mixers: scan over layers, norms, positions, dropout, remat, tied embeddings, heads,
decode state."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.errors import InputError
from research.models import mixers
from research.models.attention import Attention
from research.models.heads import scalar
from research.models.lm import Embedding, Layer, dropout, sinusoids
from research.models.mixers import Parallel
from research.models.mlp import GatedMlp, Mlp
from research.models.norm import NormLayer
from research.params import flatten
from research.schema import Norm, Scales, Stage
from research.training.flops import count_flops
from tests.models.harness import QUICK, Layout, assert_close, context
from tests.models.small_models import (
    DENSE,
    DENSE_THEN_MOE,
    DIM,
    LENGTH,
    PACKED,
    VOCAB,
    all_logits,
    decode_in_calls,
    generic_params,
    loss_and_grads,
    make_model,
    random_tokens,
)
from tests.spikes.recurrence import LinearRecurrence
from tests.spikes.value_residual import ValueResidual

SHARED_VALUE = (Stage((Attention(heads=2), ValueResidual(width=8)), 2), Stage((ValueResidual(width=8),), 2))
PARALLEL = Parallel((Attention(heads=2), GatedMlp(hidden=24)))

MODELS = {
    "dense": make_model(Stage(DENSE, 2)),
    "dense_then_moe": make_model(*DENSE_THEN_MOE),
    "post_norm_tied_learned": make_model(
        Stage((Attention(heads=2, positions="none"), Mlp(hidden=24, bias=True)), 2),
        tie_embeddings=True,
        norm=Norm(kind="layernorm", placement="post"),
        positions="learned",
    ),
    "sinusoidal": make_model(
        Stage((Attention(heads=2, positions="none"), Mlp(hidden=24)), 1),
        positions="sinusoidal",
        scales=Scales(embedding=4.0, residual=0.5, logits=0.25),
    ),
    "recurrent": make_model(Stage((LinearRecurrence(width=12), GatedMlp(hidden=24)), 2)),
    "shared_value": make_model(*SHARED_VALUE),
    "parallel": make_model(Stage((PARALLEL,), 2), heads=("reward", "value")),
    "hybrid_window": make_model(
        Stage((LinearRecurrence(width=12), Attention(heads=2, window=3), Mlp(hidden=24)), 1)
    ),
}
every_model = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())


def by_hand(model, params, tokens_BxL, ctx):
    """`hidden` as a plain loop over layers, without nn.scan: the definition it must match."""
    cfg = model.cfg
    x = Embedding(cfg).apply({"params": params["embedding"]}, tokens_BxL, ctx.positions_BxL)
    x = dropout(x, cfg.dropout, ctx)
    shared, layer = {}, 0
    for stage in cfg.stages:
        for mixer in stage.pattern:
            if isinstance(mixer, ValueResidual):
                shared = {"first_value_BxLxN": jnp.zeros((*x.shape[:2], mixer.width))}
    for index, stage in enumerate(cfg.stages):
        for repeat in range(stage.repeats):
            weights = jax.tree.map(lambda w: w[repeat], params["decoder"][f"stage_{index}"])
            (x, shared), _ = Layer(cfg, stage).apply(
                {"params": weights}, (x, shared), jnp.int32(layer), None, ctx
            )
            layer += 1
    if cfg.norm.placement == "pre":
        x = NormLayer(cfg.norm).apply({"params": params["decoder"]["final_norm"]}, x)
    return x


@every_model
def test_scan_is_a_loop_over_layers(model):
    """With dropout on: each layer, over all stages, gets its own index, key, weights and shared values."""
    model = dataclasses.replace(model, cfg=dataclasses.replace(model.cfg, dropout=0.25))
    params, tokens = generic_params(model), random_tokens(2)
    ctx = context(PACKED, deterministic=False, key=jax.random.key(3, impl="unsafe_rbg"))
    run = jax.jit(lambda p, t, c: model.hidden(p, t, c)[0], compiler_options=QUICK)
    loop = jax.jit(lambda p, t, c: by_hand(model, p, t, c), compiler_options=QUICK)
    assert_close(run(params, tokens, ctx), loop(params, tokens, ctx))


@every_model
def test_describe_has_every_weight(model):
    params = flatten(jax.eval_shape(model.init, jax.random.key(0)))
    assert {path: weight.shape for path, weight in model.weights.items()} == {
        p: v.shape for p, v in params.items()
    }
    for path, weight in model.weights.items():
        assert len(weight.axes) == len(weight.shape) == len(set(weight.axes))
        assert (weight.axes[0] == "layers") == ("/stage_" in path)
        assert path.startswith(weight.stage + "/") or path == weight.stage
        assert weight.inputs or weight.role == "vector"
    counts = model.param_counts()
    assert counts["total"] == sum(value.size for value in params.values())
    assert counts["active"] <= counts["total"]


def test_init_has_the_declared_scale():
    model = make_model(*DENSE_THEN_MOE, param_dtype="bfloat16")
    params = flatten(jax.jit(model.init, compiler_options=QUICK)(jax.random.key(0)))
    assert {value.dtype.name for value in params.values()} == {"bfloat16"}
    for path, weight in model.weights.items():
        value = np.asarray(params[path], np.float32)
        if weight.role == "vector":
            assert np.all(value == (1.0 if "norm" in path else 0.0)), path
        else:
            std = 0.02 if weight.role == "input" else weight.fan_in**-0.5
            assert value.std() == pytest.approx(std, rel=0.25), path
        if weight.axes[0] == "layers" and weight.role != "vector" and weight.shape[0] > 1:
            assert np.any(value[0] != value[1]), path  # every layer draws its own


@every_model
def test_packed_rows_and_cached_calls(model):
    """The whole model keeps the mixers' promises: a document alone = packed; one call = prefill and steps."""
    params, tokens = generic_params(model), random_tokens(2)
    run = jax.jit(lambda p, t, c: model.hidden(p, t, c)[0], compiler_options=QUICK)
    hidden = np.asarray(run(params, tokens, context(PACKED)))
    alone = run(
        params, np.stack([tokens[0, 5:], tokens[1, :7]]), context(Layout((((1, 7),),) * 2), packed=False)
    )
    assert_close(np.stack([hidden[0, 5:], hidden[1, :7]]), alone)
    assert_close(decode_in_calls(model, params, tokens, PACKED, (4, 1, 1, 1, 1, 4)), hidden)
    state, axes = model.init_state(2, LENGTH), model.state_axes()
    is_axes = lambda leaf: isinstance(leaf, tuple)
    assert jax.tree.map(jnp.ndim, state) == jax.tree.map(len, axes, is_leaf=is_axes)
    assert model.state_bytes(LENGTH) * 2 == sum(leaf.nbytes for leaf in jax.tree.leaves(state))


@every_model
def test_every_weight_gets_a_gradient(model):
    params = generic_params(model)
    (_, (_, statistics)), grads = loss_and_grads(model, params, random_tokens(2), PACKED)
    for path, grad in flatten(grads).items():
        head = path.split("/")[0] in model.heads
        assert bool(np.any(np.asarray(grad) != 0)) == (path not in statistics and not head), path


@pytest.mark.parametrize("name", ["dense", "dense_then_moe", "shared_value"])
def test_remat_gives_equal_gradients_by_more_work(name):
    work, losses, grads = {}, {}, {}
    for remat in ("none", "dots", "full"):
        model = make_model(*MODELS[name].cfg.stages, remat=remat)
        params, tokens = generic_params(model), random_tokens(2)
        (losses[remat], _), grads[remat] = loss_and_grads(model, params, tokens, PACKED)
        gradient = jax.grad(lambda p: jnp.sum(model.hidden(p, tokens, context(PACKED))[0] ** 2))
        work[remat] = count_flops(gradient, params)
    assert work["none"] < work["dots"] < work["full"]
    for remat in ("dots", "full"):
        assert_close(losses[remat], losses["none"])
        assert_close(grads[remat], grads["none"], 1e-6)


def test_depth_does_not_grow_the_program():
    programs = []
    for repeats in (2, 8):
        model = make_model(Stage(DENSE, repeats))
        jaxpr = jax.make_jaxpr(lambda p: model.hidden(p, random_tokens(2), context(PACKED))[0])(
            jax.eval_shape(model.init, jax.random.key(0))
        )
        programs.append(str(jaxpr).count("dot_general"))
    assert programs[0] == programs[1] > 0


def test_pre_norm_ends_in_a_norm_and_post_norm_does_not():
    pre, post = MODELS["dense"], MODELS["post_norm_tied_learned"]
    assert "decoder/final_norm/gain" in pre.weights and "decoder/final_norm/gain" not in post.weights
    params = generic_params(post)
    last = params["decoder"]["stage_0"]["norm_1"]
    params = {
        **params,
        "decoder": {
            "stage_0": params["decoder"]["stage_0"]
            | {"norm_1": {"gain": jnp.ones_like(last["gain"]), "bias": jnp.zeros_like(last["bias"])}}
        },
    }
    hidden = post.hidden(params, random_tokens(2), context(PACKED))[0]
    np.testing.assert_allclose(np.mean(hidden, axis=-1), 0.0, atol=1e-5)  # just normalised
    np.testing.assert_allclose(np.var(hidden, axis=-1), 1.0, atol=1e-3)


def test_tied_embedding_is_the_output_too():
    model = MODELS["post_norm_tied_learned"]
    weight = model.weights["embedding/table"]
    assert weight.role == "input+output" and not any(path.startswith("unembedding") for path in model.weights)
    params = generic_params(model)
    hidden = model.hidden(params, random_tokens(2), context(PACKED))[0]
    np.testing.assert_allclose(
        all_logits(model, params, hidden), hidden @ params["embedding"]["table"].T, atol=1e-5
    )
    _, grads = loss_and_grads(model, params, np.zeros((2, LENGTH), np.int32), PACKED)
    assert np.all(np.any(np.asarray(grads["embedding"]["table"]) != 0, axis=1))  # as output, every row learns


def test_scales_multiply_embedding_residual_and_logits():
    plain, scaled = make_model(Stage(DENSE, 1)), make_model(
        Stage(DENSE, 1), scales=Scales(embedding=3.0, logits=0.5)
    )
    params, tokens, ctx = generic_params(plain), random_tokens(2), context(PACKED)
    tripled = {**params, "embedding": {"table": 3.0 * params["embedding"]["table"]}}
    hidden = scaled.hidden(params, tokens, ctx)[0]
    assert_close(hidden, plain.hidden(tripled, tokens, ctx)[0])
    assert_close(all_logits(scaled, params, hidden), 0.5 * all_logits(plain, params, hidden))
    tiny = make_model(Stage(DENSE, 1), scales=Scales(residual=1e-12))
    without = NormLayer(tiny.cfg.norm).apply(
        {"params": params["decoder"]["final_norm"]}, params["embedding"]["table"][tokens]
    )
    assert_close(tiny.hidden(params, tokens, ctx)[0], without)


def test_sinusoids_are_vaswani_s():
    wave = np.asarray(sinusoids(jnp.array([[0, 1, 7]]), 6))[0]
    for row, position in zip(wave, (0, 1, 7)):
        angles = [position / 10000 ** (2 * i / 6) for i in range(3)]
        np.testing.assert_allclose(row, np.concatenate([np.sin(angles), np.cos(angles)]), atol=1e-6)
    assert sinusoids(jnp.zeros((1, 1), jnp.int32), 5).shape == (1, 1, 5)


@pytest.mark.parametrize("positions", ["learned", "sinusoidal", "none"])
def test_positions_tell_order(positions):
    """Attention without positions sees a set (but for the mask): only added positions tell orders apart."""
    model = make_model(Stage((Attention(heads=2, positions="none"),), 1), positions=positions)
    params, tokens = generic_params(model), random_tokens(1, 6)
    swapped = tokens[:, [1, 0, 2, 3, 4, 5]]
    ctx = context(Layout((((1, 6),),)))
    last = [model.hidden(params, t, ctx)[0][0, -1] for t in (tokens, swapped)]
    assert np.allclose(*last, atol=1e-6) == (positions == "none")


def test_dropout_is_by_key_layer_and_mixer():
    stage = Stage((Mlp(hidden=8), Mlp(hidden=8)), 1)
    model = make_model(stage, dropout=0.5)
    params, tokens = generic_params(model), random_tokens(2)
    ctx = context(PACKED, deterministic=False, key=jax.random.key(0))
    hidden = lambda c: np.asarray(model.hidden(params, tokens, c)[0])
    np.testing.assert_array_equal(hidden(ctx), hidden(ctx))
    assert np.any(hidden(ctx) != hidden(ctx.replace(key=jax.random.key(1))))
    off = ctx.replace(deterministic=True)
    np.testing.assert_array_equal(hidden(off), make_model(stage).hidden(params, tokens, off)[0])

    # Norms that give ones and mixers that give ones: what is left is the sum of the two masks.
    weights = jax.tree.map(lambda w: w[0], params["decoder"]["stage_0"])
    cfg = dataclasses.replace(model.cfg, norm=Norm(kind="layernorm"))
    weights |= {f"norm_{i}": {"gain": jnp.zeros(DIM), "bias": jnp.ones(DIM)} for i in (0, 1)}
    constant = {"up": jnp.eye(DIM)[:, :8] * 3.0, "down": jnp.ones((8, DIM))}
    silent = {"up": jnp.zeros((DIM, 8)), "down": jnp.zeros((8, DIM))}
    masks = []
    for layer, loud in ((0, 0), (0, 1), (1, 0)):
        chosen = weights | {f"mlp_{i}": constant if i == loud else silent for i in (0, 1)}
        (x, _), _ = Layer(cfg, stage).apply(
            {"params": chosen}, (jnp.zeros((2, LENGTH, DIM)), {}), jnp.int32(layer), None, ctx
        )
        masks.append(np.asarray(x) != 0)
        assert 0.4 < masks[-1].mean() < 0.6
    assert all(np.any(a != b) for i, a in enumerate(masks) for b in masks[:i])


def test_parallel_sums_its_mixers_on_one_norm():
    model = MODELS["parallel"]
    assert {"decoder/stage_0/norm_0/gain", "decoder/stage_0/parallel_0/attention_0/query"} <= set(
        model.weights
    )
    cfg = PARALLEL
    x = jax.random.normal(jax.random.key(0), (2, LENGTH, DIM))
    weights = jax.tree.map(lambda w: w[0], generic_params(model)["decoder"]["stage_0"]["parallel_0"])
    ctx = context(PACKED)
    y, _, aux = mixers.row(cfg).module(cfg).apply({"params": weights}, x, ctx)
    parts = [
        mixers.row(m).module(m).apply({"params": weights[name]}, x, ctx)[0]
        for name, m in mixers.named(cfg.mixers)
    ]
    assert_close(y, parts[0] + parts[1])
    assert aux == {}
    with pytest.raises(InputError, match=r"^mixers: holds fewer than two; "):
        Parallel((Mlp(hidden=8),))
    with pytest.raises(InputError, match=r"^stages\.0\.pattern\.0\.heads: 3 does not divide dim=16; "):
        make_model(Stage((Parallel((Attention(heads=3), Mlp(hidden=8))),)))


def test_scalar_heads():
    model = MODELS["parallel"]
    params = generic_params(model)
    hidden = model.hidden(params, random_tokens(2), context(PACKED))[0]
    reward = scalar(params, "reward", hidden)
    assert reward.shape == (2, LENGTH) and reward.dtype == jnp.float32
    assert_close(reward, hidden @ params["reward"]["kernel"])
    assert np.any(np.asarray(params["reward"]["kernel"]) != np.asarray(params["value"]["kernel"]))
    assert all_logits(model, params, hidden).shape == (2, LENGTH, VOCAB)


def test_bfloat16_compute_keeps_float32_parameters():
    model = make_model(*DENSE_THEN_MOE, compute_dtype="bfloat16")
    params = generic_params(model)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"float32"}
    (loss, (hidden, _)), grads = loss_and_grads(model, params, random_tokens(2), PACKED)
    (full_loss, _), _ = loss_and_grads(make_model(*DENSE_THEN_MOE), params, random_tokens(2), PACKED)
    assert hidden.dtype == jnp.bfloat16 and {leaf.dtype.name for leaf in jax.tree.leaves(grads)} == {
        "float32"
    }
    assert abs(float(loss) - float(full_loss)) < 0.05
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(grads))


def test_flops_per_token_adds_up():
    model = MODELS["dense"]

    def forward(params):
        return all_logits(model, params, model.hidden(params, random_tokens(2), context(PACKED))[0])

    counted = count_flops(forward, jax.eval_shape(model.init, jax.random.key(0)))
    assert counted / (2 * LENGTH) == pytest.approx(model.flops_per_token(LENGTH, causal=False), rel=1e-9)
    assert model.flops_per_token(LENGTH) < model.flops_per_token(LENGTH, causal=False)
