"""The contract of every row of OBJECTIVES, the spikes' included: exact accumulation, padding, devices, heads, frozen."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tests.spikes.preference  # noqa: F401  (adds its row)
from research.models.lm import LanguageModel
from research.training.objectives import OBJECTIVES
from research.training.program import make_program
from research.training.state import init_state
from tests.training.common import one_device, random_batch, run_steps, small, to_device

NAMES = sorted(OBJECTIVES)


def config_of(name: str, **changes):
    return small(train__objective=name, **changes)


@functools.cache
def evaluated(name: str):
    """(gradient of the mean loss, metrics) of one batch taken whole."""
    config = config_of(name)
    objective = OBJECTIVES[name]
    model = LanguageModel(config.model, objective.heads)
    loss = objective.make(model, config)
    params, frozen = model.init(jax.random.key(1)), model.init(jax.random.key(2))

    def split(params, batch):
        loss_sum, *rest = loss(params, frozen, batch, jax.random.key(3))
        return loss_sum, rest

    grad = jax.jit(jax.value_and_grad(split, has_aux=True))
    return config, params, grad


@pytest.mark.parametrize("name", NAMES)
def test_accumulation_is_exact_with_uneven_weights(name):
    """The sum over microbatches of sums, divided once, is the whole batch's loss and gradient."""
    config, params, grad = evaluated(name)
    batch = {k: x[0] for k, x in random_batch(config).items()}
    (whole, (weight, metrics, _)), whole_grad = grad(params, to_device(batch))
    parts = [grad(params, to_device({k: x[i:i + 2] for k, x in batch.items()})) for i in range(0, 8, 2)]
    weights = [float(p[0][1][0]) for p in parts]
    assert len(set(weights)) > 1 and weight > 0
    np.testing.assert_allclose(sum(p[0][0] for p in parts), whole, rtol=1e-5)
    np.testing.assert_allclose(sum(weights), weight, rtol=1e-6)
    for key, (total, count) in metrics.items():
        np.testing.assert_allclose(sum(p[0][1][1][key][0] for p in parts), total, rtol=1e-4, atol=1e-5, err_msg=key)
        np.testing.assert_allclose(sum(p[0][1][1][key][1] for p in parts), count, rtol=1e-5, err_msg=key)
    summed = jax.tree.map(lambda *g: sum(g), *[p[1] for p in parts])
    for a, b in zip(jax.tree.leaves(summed), jax.tree.leaves(whole_grad)):
        largest = max(1.0, float(jnp.max(jnp.abs(b))))
        # Sums over all tokens, taken in another order: float32's rounding of some hundred terms.
        np.testing.assert_allclose(a, b, rtol=0, atol=16 * np.finfo(np.float32).eps * largest)


@pytest.mark.parametrize("name", NAMES)
def test_padding_rows_change_nothing(name):
    config, params, grad = evaluated(name)
    batch = {k: x[0].copy() for k, x in random_batch(config).items()}
    other = {k: x.copy() for k, x in batch.items()}
    other["tokens_BxL"][-2:] = 3
    other["targets_BxL"][-2:] = 5
    (first, _), first_grad = grad(params, to_device(batch))
    (second, _), second_grad = grad(params, to_device(other))
    np.testing.assert_allclose(first, second, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), first_grad, second_grad)


@pytest.mark.parametrize("name", NAMES)
def test_the_step_accumulates_like_one_batch(name):
    """Through the whole step: 1 and 4 microbatches give the same parameters after two steps."""
    frozen = None
    results = []
    for microbatches in (1, 4):
        program = one_device(config_of(name, train__microbatches=microbatches, optim__name="sgd", optim__lr=0.5))
        if name == "preference":
            frozen = init_state(program.model.init, program.optimizer, program.layout, 9).params
        state, history = run_steps(program, 2, frozen)
        results.append((state.params, history))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-6), results[0][0], results[1][0])
    for one, four in zip(*[r[1] for r in results]):
        for key in ("objective", "grad_norm", "weight"):
            np.testing.assert_allclose(one[key], four[key], rtol=1e-4)


@pytest.mark.parametrize(
    "rules,axis", [("dp", None), ("fsdp", None), ("fsdp_tp", "tensor"), ("cp", "context"), ("ring", "context")])
def test_four_devices_are_one(rules, axis, devices):
    """Loss and parameters after two steps are those of one device, under every family of rules."""
    reference, expected = run_steps(one_device(config_of("next_token")), 2)
    changes = {"mesh__rules": rules, **({f"mesh__{axis}": 2} if axis else {})}
    state, history = run_steps(make_program(config_of("next_token", **changes), devices), 2)
    for ours, theirs in zip(history, expected):
        for key in ("loss", "grad_norm", "accuracy", "weight"):
            np.testing.assert_allclose(ours[key], theirs[key], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), state.params, reference.params)


def test_the_frozen_reference_gets_no_gradient_and_sets_the_margin():
    config, params, grad = evaluated("preference")
    model = LanguageModel(config.model, ("reward",))
    loss = OBJECTIVES["preference"].make(model, config)
    batch = to_device({k: x[0] for k, x in random_batch(config).items()})
    _, _, metrics, _ = loss(params, params, batch, jax.random.key(0))
    np.testing.assert_allclose(metrics["margin"][0], 0.0, atol=1e-5)  # the policy is its own reference
    _, head_grad = grad(params, batch)
    assert float(jnp.linalg.norm(head_grad["reward"]["kernel"])) > 1e-4
    assert float(jnp.linalg.norm(head_grad["decoder"]["stage_0"]["attention_0"]["query"])) > 1e-6


def test_unknown_objective_names_the_nearest():
    from research.errors import InputError
    from research.training.objectives import objective_named

    with pytest.raises(InputError, match="train.objective: unknown 'next_tokn'; did you mean next_token"):
        objective_named("next_tokn")
