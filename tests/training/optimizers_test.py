"""The contract of every row of OPTIMIZERS and SCHEDULES."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath

from configs import preset
from research.config import override
from research.data import pipeline
from research.data.loader import Loader
from research.errors import InputError
from research.models.lm import LanguageModel
from research.params import flatten
from research.schema import CheckpointConfig, OptimConfig, RoleLr
from research.training.checkpoint import Checkpointer
from research.training.loop import put_batch
from research.training.optimizers import OPTIMIZERS, SCHEDULES, decay_mask, make_optimizer, make_schedule
from research.training.program import make_program
from research.training.state import mirrored, restart_from
from tests.training.common import one_device, run_steps, small

# For every row: learning rates that lower the quadratic and that train the debug preset, and what else it needs.
CASES = {
    "adamw": (0.05, 1e-2, {}),
    "sgd": (0.05, 1e-1, {}),
    "lion": (0.05, 2e-3, {}),
    "adafactor": (0.05, 1e-2, {}),
    "muon": (0.3, 1e-2, {}),
    "schedule_free": (0.1, 1e-2, {"schedule": "constant"}),
}


def optim(name: str, **fields) -> OptimConfig:
    return OptimConfig(name=name, **CASES[name][2] | fields)


def program_of(name: str, devices, **fields):
    changes = {f"optim.{key}": value for key, value in ({"name": name} | CASES[name][2] | fields).items()}
    return make_program(override(small(), changes), devices)


def random_gradients(params, seed):
    """Of very different sizes from weight to weight, as real ones."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: (rng.standard_normal(p.shape) * 10.0 ** rng.uniform(-4, 0)).astype(np.float32), params)


def updated(program, state, seeds):
    """The state after one optimizer update a seed, the gradients given: no model in between."""

    def step(state, gradients):
        updates, optimizer = program.optimizer.update(gradients, state.optimizer, state.params)
        return state.replace(step=state.step + 1, params=optax.apply_updates(state.params, updates), optimizer=optimizer)

    jitted = jax.jit(step, out_shardings=program.layout.shardings)
    for seed in seeds:
        gradients = random_gradients(program.abstract.params, seed)
        state = jitted(state, jax.device_put(gradients, program.layout.shardings.params))
    return state


@pytest.fixture(scope="module")
def params():
    return jax.device_get(LanguageModel(small().model).init(jax.random.key(0)))


def begin(program, params):
    key = jax.random.key_data(jax.random.key(0))
    return restart_from(params, key, program.optimizer, program.layout)


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_a_step_has_the_shapes_of_the_parameters_and_lowers_a_quadratic(name):
    model = LanguageModel(small().model)
    params = model.init(jax.random.key(0))
    optimizer = make_optimizer(optim(name, lr=CASES[name][0]), 60, model.weights)
    state = optimizer.init(params)
    distance = lambda p: sum(jnp.sum(jnp.square(x - 0.3)) for x in jax.tree.leaves(p))
    before = distance(params)

    @jax.jit
    def step(params, state):
        updates, state = optimizer.update(jax.grad(distance)(params), state, params)
        assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, params)
        return optax.apply_updates(params, updates), state

    for _ in range(60):
        params, state = step(params, state)
    evaluated = OPTIMIZERS[name].evaluated
    assert distance(params) < 0.1 * before
    assert evaluated is None or distance(evaluated(state, params)) < 0.1 * before


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_zero_gradient_decays_matrices_and_leaves_vectors(name):
    model = LanguageModel(small().model)
    params = jax.tree.map(jnp.ones_like, model.init(jax.random.key(0)))
    optimizer = make_optimizer(optim(name, lr=0.1, schedule="constant", weight_decay=0.5), 10, model.weights)
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    for path, update in flatten(updates).items():
        expected = 0.0 if model.weights[path].role == "vector" else -0.1 * 0.5
        np.testing.assert_allclose(update, expected, atol=1e-7, err_msg=path)


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_roles_have_their_own_learning_rates(name):
    """The first update of a role is that of the plain optimizer times its factor, decay included; 0 freezes."""
    model = LanguageModel(small().model)
    params = model.init(jax.random.key(0))
    gradients = random_gradients(params, 0)

    def first_update(**factors):
        changes = {"lr": 0.1, "schedule": "constant", "weight_decay": 0.5} | CASES[name][2]
        config = override(OptimConfig(name=name, **changes), {f"role_lr.{role}": value for role, value in factors.items()})
        optimizer = make_optimizer(config, 10, model.weights)
        return flatten(optimizer.update(gradients, optimizer.init(params), params)[0])

    plain, scaled = first_update(), first_update(input=3.0, output=0.5, vector=0.0)
    for path, update in plain.items():
        factor = {"hidden": 1.0, "input": 3.0, "output": 0.5, "vector": 0.0}[model.weights[path].role]
        np.testing.assert_allclose(scaled[path], factor * update, rtol=1e-4, atol=1e-6, err_msg=path)


def test_a_tied_embedding_has_the_factors_of_both_roles():
    model = LanguageModel(override(small().model, {"tie_embeddings": True}))
    params = jax.tree.map(jnp.ones_like, model.init(jax.random.key(0)))
    config = OptimConfig(name="sgd", b1=0.0, lr=1.0, schedule="constant", role_lr=RoleLr(input=3.0, output=0.5))
    optimizer = make_optimizer(config, 10, model.weights)
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    np.testing.assert_allclose(updates["embedding"]["table"], -1.5)


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_four_devices_make_the_update_of_one(name, devices, params):
    one = program_of(name, devices[:1], lr=0.1, weight_decay=0.1)
    config = override(one.config, {"mesh.rules": "fsdp_tp", "mesh.fsdp": 2, "mesh.tensor": 2})
    four = make_program(config, devices)
    before = flatten(params)
    ours, theirs = (flatten(jax.device_get(updated(p, begin(p, params), range(3)).params)) for p in (four, one))
    for path, value in ours.items():
        np.testing.assert_allclose(value, theirs[path], atol=1e-5, err_msg=path)
        assert np.abs(value - before[path]).max() > 1e-5, path


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_saved_and_restored_it_goes_on_bitwise(name, devices, params, tmp_path):
    program = make_program(override(program_of(name, devices).config, {"mesh.rules": "fsdp"}), devices)
    halfway = updated(program, begin(program, params), range(2))
    with Checkpointer(epath.Path(tmp_path), CheckpointConfig()) as checkpointer:
        checkpointer.save(halfway, {"sample": 2})
        checkpointer.wait()
        restored, _ = checkpointer.restore(program.abstract)
    assert jax.tree.structure(restored) == jax.tree.structure(halfway)
    jax.tree.map(np.testing.assert_array_equal, updated(program, restored, range(2, 4)), updated(program, halfway, range(2, 4)))


@pytest.fixture(scope="module")
def debug_data(tmp_path_factory):
    config = override(preset("debug"), {"data.cache_dir": str(tmp_path_factory.mktemp("cache"))})
    return config, pipeline.prepare(config.data, config.model.vocab_size, config.seed, quiet=True)


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_it_trains_the_debug_preset(name, debug_data):
    config, data = debug_data
    changes = {f"optim.{key}": value for key, value in CASES[name][2].items()}
    program = one_device(override(config, {"optim.name": name, "optim.lr": CASES[name][1], **changes}))
    compiled, state, losses = program.compile(), begin(program, program.model.init(jax.random.key(0))), []
    loader = Loader(data.train, data.weights, config.seed, config.train.batch_size)
    for _, batch in zip(range(30), loader):
        state, metrics = compiled(state, None, put_batch(batch, program.layout.batch()))
        losses.append(float(metrics["loss"]))
    loader.close()
    assert np.mean(losses[-5:]) < np.mean(losses[:3]) - 0.3, losses


def test_the_decay_mask_covers_every_parameter():
    model = LanguageModel(small().model)
    mask = flatten(decay_mask(model.weights))
    assert set(mask) == set(flatten(model.init(jax.random.key(0))))
    assert not mask["decoder/stage_0/norm_0/gain"] and mask["decoder/stage_0/attention_0/query"]


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_state_is_sharded_like_the_parameters_it_mirrors(name, devices):
    program = make_program(override(program_of(name, devices).config, {"mesh.rules": "fsdp"}), devices)
    shardings = flatten(program.layout.shardings.params)
    split = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(program.abstract.optimizer):
        parameter = mirrored(path)
        if parameter not in shardings:
            assert leaf.size <= 3, path
            continue
        shape, spec = program.model.weights[parameter].shape, shardings[parameter].spec
        assert leaf.ndim == len(shape)
        assert list(leaf.sharding.spec) == [part if size == full else None for part, size, full in zip(spec, leaf.shape, shape)]
        split += "fsdp" in leaf.sharding.spec
    assert split > 5


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_schedules_warm_up_to_the_peak_and_never_exceed_it(name):
    schedule = make_schedule(OptimConfig(lr=2.0, schedule=name, warmup_steps=10), 100)
    rates = np.array([float(schedule(step)) for step in range(100)])
    assert np.isclose(rates[0], 0.2) and np.isclose(rates[9], 2.0) and rates.max() <= 2.0 + 1e-6
    assert np.all(np.diff(rates[:10]) > 0) and np.all(np.diff(rates[10:]) <= 1e-7)
    last = {"constant": 2.0, "linear": 0.03, "cosine": 0.21, "wsd": 0.11, "rsqrt": 0.64}[name]
    assert rates[-1] <= last and rates[-1] > 0


def test_wsd_is_stable_until_the_decay():
    schedule = make_schedule(OptimConfig(lr=1.0, schedule="wsd", warmup_steps=5, decay_steps=20), 100)
    rates = np.array([float(schedule(step)) for step in range(100)])
    np.testing.assert_allclose(rates[5:80], 1.0)
    assert np.all(np.diff(rates[80:]) < 0) and np.isclose(rates[90], 0.5)


def test_rsqrt_falls_with_the_root_of_the_steps():
    """lr * sqrt(warmup / step) (Vaswani et al. 2017, equation 3), continuous at the end of the warm-up."""
    schedule = make_schedule(OptimConfig(lr=1.0, schedule="rsqrt", warmup_steps=10), 1000)
    np.testing.assert_allclose([float(schedule(step)) for step in (10, 40, 90, 160, 1000)],
                               np.sqrt(10 / np.array([10, 40, 90, 160, 1000])), rtol=1e-5)
    slower = make_schedule(OptimConfig(lr=1.0, schedule="rsqrt", decay_steps=50), 1000)
    np.testing.assert_allclose([float(slower(step)) for step in (0, 150)], [1.0, 0.5], rtol=1e-5)


def test_clipping_bounds_the_update_and_reports_the_norm_before():
    program = one_device(small(optim__name="sgd", optim__b1=0.0, optim__lr=1.0, optim__schedule="constant",
                               optim__clip_norm=1e-3, optim__warmup_steps=0))
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


@pytest.mark.parametrize("fields, message", [
    ({"name": "schedule_free", "schedule": "cosine"}, "optim.schedule: is 'cosine', but schedule_free has none"),
    ({"name": "schedule_free", "schedule": "constant", "b1": 0.0}, "optim.b1: is 0, but schedule_free interpolates by it"),
])
def test_what_schedule_free_cannot_do(fields, message):
    with pytest.raises(InputError, match=message):
        make_optimizer(OptimConfig(**fields), 1, {})
