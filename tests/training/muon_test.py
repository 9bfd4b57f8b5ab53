"""Muon and Adafactor against float64 oracles: per layer, by the declared inputs and outputs."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from research.models.lm import LanguageModel
from research.params import Weight, flatten, unflatten
from research.schema import OptimConfig
from research.training.adafactor import scale_by_factored_moment
from research.training.muon import MOMENTUM, hidden_matrices, matrix_axes, muon_direction, orthogonal
from research.training.optimizers import OPTIMIZERS, make_optimizer
from tests.training.common import small

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # Jordan 2024

# axes, inputs -> (stacked, inputs, outputs)
AXES = [
    ("layers embed mlp", "embed", ((0,), (1,), (2,))),
    ("layers embed heads head_dim", "embed", ((0,), (1,), (2, 3))),
    ("layers heads head_dim embed", "heads head_dim", ((0,), (1, 2), (3,))),
    ("layers expert embed mlp", "embed", ((0, 1), (2,), (3,))),
    ("layers embed expert", "embed", ((0,), (1,), (2,))),  # a router: experts are its outputs
    ("layers heads head_dim state", "head_dim", ((0, 1), (2,), (3,))),  # a block for each head
    ("layers mlp embed", "embed", ((0,), (2,), (1,))),  # written the other way round
    ("vocab embed", "vocab", ((), (0,), (1,))),
    ("layers embed", "embed", None),  # a scalar head
    ("layers embed", "", None),
]


@pytest.mark.parametrize("axes, inputs, wanted", AXES)
def test_a_weight_is_a_stack_of_matrices_by_its_declaration(axes, inputs, wanted):
    axes = tuple(axes.split())
    assert matrix_axes(Weight((2,) * len(axes), axes, tuple(inputs.split()), "hidden", "s")) == wanted
    assert matrix_axes(Weight((2,) * len(axes), axes, tuple(inputs.split()), "vector", "s")) is None


def as_matrices(x, axes):
    """(stack, inputs, outputs) float64."""
    stacked, inputs, outputs = axes
    x = np.asarray(jax.device_get(x), np.float64).transpose(*stacked, *inputs, *outputs)
    sizes = np.array(x.shape)
    cut, end = len(stacked), len(stacked) + len(inputs)
    return x.reshape(int(np.prod(sizes[:cut])), int(np.prod(sizes[cut:end])), int(np.prod(sizes[end:])))


def model_and_gradients(seeds):
    model = LanguageModel(small().model)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    gradients = []
    for seed in seeds:
        rng = np.random.default_rng(seed)
        gradients.append(jax.tree.map(lambda p: rng.standard_normal(p.shape).astype(np.float32), shapes))
    return model, gradients


def newton_schulz_by_svd(m):
    """The quintic acts on the singular values alone: apply it to them, in float64."""
    u, s, vt = np.linalg.svd(m, full_matrices=False)
    s = s / np.linalg.norm(m)
    for _ in range(5):
        s = COEFFICIENTS[0] * s + COEFFICIENTS[1] * s**3 + COEFFICIENTS[2] * s**5
    return u @ np.diag(s) @ vt


def test_muon_is_newton_schulz_on_nesterov_momentum_layer_by_layer():
    model, gradients = model_and_gradients(range(3))
    direction = muon_direction(OptimConfig(), model.weights)
    state = direction.init(gradients[0])
    for g in gradients:
        updates, state = direction.update(g, state)
    numbers = hidden_matrices(model.weights)
    assert {path.rsplit("/", 1)[1] for path in numbers} == {"query", "key", "value", "output", "gate", "up", "down"}
    for path in numbers:
        axes = matrix_axes(model.weights[path])
        matrices = [as_matrices(flatten(g)[path], axes) for g in gradients]
        momentum = np.zeros_like(matrices[0])
        for m in matrices:
            momentum = MOMENTUM * momentum + (1 - MOMENTUM) * m
        t = len(matrices)
        ahead = MOMENTUM * momentum / (1 - MOMENTUM ** (t + 1)) + (1 - MOMENTUM) * matrices[-1] / (1 - MOMENTUM**t)
        ours = as_matrices(flatten(updates)[path], axes)
        scale = 0.2 * np.sqrt(max(ours.shape))  # stack 2 is the smallest here
        for ours_IxO, ahead_IxO in zip(ours, ahead, strict=True):
            np.testing.assert_allclose(ours_IxO, scale * newton_schulz_by_svd(ahead_IxO), atol=2e-4 * scale, err_msg=path)


def test_before_the_scale_singular_values_are_near_one():
    model, (g,) = model_and_gradients([7])
    numbers = hidden_matrices(model.weights)
    masked = unflatten({path: x if path in numbers else optax.MaskedNode() for path, x in flatten(g).items()})
    transform = orthogonal(model.weights)
    updates, _ = transform.update(masked, transform.init(masked))
    checked = 0
    for path in numbers:
        axes = matrix_axes(model.weights[path])
        before, after = as_matrices(flatten(g)[path], axes), as_matrices(flatten(updates)[path], axes)
        for b, a in zip(before, after, strict=True):
            given = np.linalg.svd(b, compute_uv=False) / np.linalg.norm(b)
            found = np.linalg.svd(a, compute_uv=False)
            assert found[given > 0.02].min() > 0.6 and found.max() < 1.25, path
            checked += 1
            assert given.max() / given[given > 0.02].min() > 1.5  # the gradient's own were spread wider
    assert checked == 2 * 7


def test_a_muon_update_has_the_root_mean_square_of_adams():
    """0.2 * sqrt(max(I, O)) * sqrt(min(I, O) / (I * O)) = 0.2 for every shape, if singular values are 1."""
    model, gradients = model_and_gradients([0])
    direction = muon_direction(OptimConfig(), model.weights)
    updates, _ = direction.update(gradients[0], direction.init(gradients[0]))
    for path in hidden_matrices(model.weights):
        assert 0.14 < np.sqrt(np.mean(np.square(flatten(updates)[path]))) < 0.24, path


def test_what_is_no_hidden_matrix_gets_adamw():
    model, (g,) = model_and_gradients([0])
    updates = {}
    for name in ("muon", "adamw"):
        optimizer = make_optimizer(OptimConfig(name=name, lr=0.1, weight_decay=0.3), 10, model.weights)
        updates[name] = flatten(optimizer.update(g, optimizer.init(g), g)[0])
    for path, weight in model.weights.items():
        same = np.array_equal(updates["muon"][path], updates["adamw"][path])
        assert same == (weight.role != "hidden"), path


def factored_oracle(matrices, b2):
    """Shazeer and Stern 2018, algorithm 4, with the decay capped, in float64; (inputs, outputs) matrices of each step."""
    row, col = 0.0, 0.0
    for t, m in enumerate(matrices, start=1):
        decay = min(1 - t**-0.8, b2)
        row = decay * row + (1 - decay) * np.mean(np.square(m) + 1e-30, axis=1)
        col = decay * col + (1 - decay) * np.mean(np.square(m) + 1e-30, axis=0)
    update = matrices[-1] / np.sqrt(np.outer(row, col) / row.mean())
    return update / max(1.0, np.sqrt(np.mean(np.square(update))))


@pytest.mark.parametrize("b2", [0.5, 0.999])
def test_adafactor_is_its_algorithm_layer_by_layer(b2):
    model, gradients = model_and_gradients(range(4))
    # Layers of very different sizes: a second moment or a clip shared between them would show.
    grow = lambda x: x * np.float32(np.arange(x.shape[0]) + 0.01).reshape(-1, *[1] * (x.ndim - 1))
    gradients = [jax.tree.map(grow, g) for g in gradients]
    transform = scale_by_factored_moment(model.weights, b2)
    state = transform.init(gradients[0])
    for g in gradients:
        updates, state = transform.update(g, state)
    for path, weight in model.weights.items():
        axes = matrix_axes(weight)
        if axes is None:
            continue
        ours = as_matrices(flatten(updates)[path], axes)
        steps = [as_matrices(flatten(g)[path], axes) for g in gradients]
        for layer, ours_IxO in enumerate(ours):
            np.testing.assert_allclose(ours_IxO, factored_oracle([m[layer] for m in steps], b2), rtol=2e-4, err_msg=path)


def test_adafactor_is_optaxs_on_one_matrix():
    weights = {"w": Weight((12, 20), ("embed", "mlp"), ("embed",), "hidden", "s")}
    theirs = optax.chain(optax.scale_by_factored_rms(min_dim_size_to_factor=1), optax.clip_by_block_rms(1.0))
    ours, params = scale_by_factored_moment(weights, 0.999), {"w": jnp.ones((12, 20))}
    states = [ours.init(params), theirs.init(params)]
    for seed in range(4):
        g = {"w": jax.random.normal(jax.random.key(seed), (12, 20)) * 10.0**-seed}
        (a, states[0]), (b, states[1]) = ours.update(g, states[0], params), theirs.update(g, states[1], params)
        np.testing.assert_allclose(a["w"], b["w"], rtol=1e-5)


def test_adafactor_without_momentum_keeps_rows_and_columns_only():
    model = LanguageModel(small().model)
    params = jax.eval_shape(model.init, jax.random.key(0))
    optimizer = make_optimizer(OptimConfig(name="adafactor", b1=0.0), 10, model.weights)
    state = jax.eval_shape(optimizer.init, params)
    held = sum(leaf.size for leaf in jax.tree.leaves(state))
    assert held < 0.25 * sum(leaf.size for leaf in jax.tree.leaves(params))


def test_schedule_free_evaluates_the_weighted_mean_of_its_iterates():
    """Defazio et al. 2024, equations 3-5, with Adam's second moment, warm-up weights lr^2 and decay at y, in float64."""
    weights = {"w": Weight((6, 5), ("embed", "mlp"), ("embed",), "hidden", "s")}
    config = OptimConfig(name="schedule_free", lr=0.1, schedule="constant", warmup_steps=4, weight_decay=0.2)
    optimizer = make_optimizer(config, 20, weights)
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.standard_normal((6, 5)), jnp.float32)}
    state = optimizer.init(params)
    z = x = y = np.asarray(params["w"], np.float64)
    v, total = 0.0, 0.0
    for t in range(1, 9):
        g = rng.standard_normal((6, 5))
        updates, state = optimizer.update({"w": jnp.asarray(g, jnp.float32)}, state, params)
        params = optax.apply_updates(params, updates)
        lr = 0.1 * min(t / 4, 1.0)
        v = config.b2 * v + (1 - config.b2) * g**2
        z = z - lr * (g / (np.sqrt(v / (1 - config.b2**t)) + config.eps) + 0.2 * y)
        total += lr**2
        x = x + lr**2 / total * (z - x)
        y = config.b1 * x + (1 - config.b1) * z
        np.testing.assert_allclose(params["w"], y, atol=1e-5)
        np.testing.assert_allclose(OPTIMIZERS["schedule_free"].evaluated(state, params)["w"], x, atol=1e-5)
