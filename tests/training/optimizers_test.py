"""The contract of every row of OPTIMIZERS and SCHEDULES."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from research.errors import InputError
from research.models.lm import LanguageModel
from research.params import flatten
from research.schema import OptimConfig
from research.training.optimizers import OPTIMIZERS, SCHEDULES, decay_mask, make_optimizer, make_schedule
from research.training.program import make_program
from tests.training.common import one_device, run_steps, small


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_a_step_has_the_shapes_of_the_parameters_and_lowers_a_quadratic(name):
    model = LanguageModel(small().model)
    params = model.init(jax.random.key(0))
    optimizer = make_optimizer(OptimConfig(name=name, lr=0.05), 60, model.weights)
    state = optimizer.init(params)
    distance = lambda p: sum(jnp.sum(jnp.square(x - 0.3)) for x in jax.tree.leaves(p))  # noqa: E731
    before = distance(params)

    @jax.jit
    def step(params, state):
        updates, state = optimizer.update(jax.grad(distance)(params), state, params)
        assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, params)
        return optax.apply_updates(params, updates), state

    for _ in range(60):
        params, state = step(params, state)
    assert distance(params) < 0.1 * before


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_zero_gradient_decays_matrices_and_leaves_vectors(name):
    model = LanguageModel(small().model)
    params = jax.tree.map(jnp.ones_like, model.init(jax.random.key(0)))
    optimizer = make_optimizer(OptimConfig(name=name, lr=0.1, schedule="constant", weight_decay=0.5), 10, model.weights)
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    for path, update in flatten(updates).items():
        expected = 0.0 if model.weights[path].role == "vector" else -0.1 * 0.5
        np.testing.assert_allclose(update, expected, atol=1e-7, err_msg=path)


def test_the_decay_mask_covers_every_parameter():
    model = LanguageModel(small().model)
    mask = flatten(decay_mask(model.weights))
    assert set(mask) == set(flatten(model.init(jax.random.key(0))))
    assert not mask["decoder/stage_0/norm_0/gain"] and mask["decoder/stage_0/attention_0/query"]


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_state_is_sharded_like_the_parameters_it_mirrors(name, devices):
    program = make_program(small(mesh__rules="fsdp", optim__name=name), devices)
    by_shape = {}
    for path, leaf in flatten(program.abstract.params).items():
        by_shape.setdefault(leaf.shape, set()).add(leaf.sharding.spec)
    mirrored = [leaf for leaf in jax.tree.leaves(program.abstract.optimizer) if leaf.ndim]
    assert mirrored and all(leaf.sharding.spec in by_shape[leaf.shape] for leaf in mirrored)
    assert any("fsdp" in leaf.sharding.spec for leaf in mirrored)


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_schedules_warm_up_to_the_peak_and_never_exceed_it(name):
    schedule = make_schedule(OptimConfig(lr=2.0, schedule=name, warmup_steps=10), 100)
    rates = np.array([float(schedule(step)) for step in range(100)])
    assert np.isclose(rates[0], 0.2) and np.isclose(rates[9], 2.0) and rates.max() <= 2.0 + 1e-6
    assert np.all(np.diff(rates[:10]) > 0) and np.all(np.diff(rates[10:]) <= 1e-7)
    last = {"constant": 2.0, "linear": 0.03, "cosine": 0.21, "wsd": 0.11}[name]
    assert rates[-1] <= last and rates[-1] > 0


def test_wsd_is_stable_until_the_decay():
    schedule = make_schedule(OptimConfig(lr=1.0, schedule="wsd", warmup_steps=5, decay_steps=20), 100)
    rates = np.array([float(schedule(step)) for step in range(100)])
    np.testing.assert_allclose(rates[5:80], 1.0)
    assert np.all(np.diff(rates[80:]) < 0) and np.isclose(rates[90], 0.5)


def test_clipping_bounds_the_update_and_reports_the_norm_before():
    program = one_device(small(optim__name="sgd", optim__b1=0.0, optim__lr=1.0, optim__schedule="constant", optim__clip_norm=1e-3,
                               optim__warmup_steps=0))
    _, history = run_steps(program, 1)
    assert history[0]["grad_norm"] > 1e-2
    np.testing.assert_allclose(history[0]["update_norm"], 1e-3, rtol=1e-4)


def test_stage_norms_add_up():
    _, history = run_steps(one_device(small()), 1)
    for name in ("grad_norm", "param_norm", "update_norm"):
        parts = [value for key, value in history[0].items() if key.startswith(f"{name}/")]
        assert len(parts) == 4  # embedding, stage_0, the decoder's final norm, unembedding
        np.testing.assert_allclose(np.sqrt(np.sum(np.square(parts))), history[0][name], rtol=1e-5)


def test_unknown_optimizer():
    with pytest.raises(InputError, match="optim.name: unknown 'adam'; did you mean adamw"):
        make_optimizer(OptimConfig(name="adam"), 1, {})
