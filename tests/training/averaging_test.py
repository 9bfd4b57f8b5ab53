"""Averages of the parameters: in the state, over checkpoints, and in what evaluation, sampling and export read."""

import dataclasses
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from configs import preset
from research.config import override
from research.errors import InputError, Interrupted
from research.models.attention import Attention
from research.models.moe import Moe
from research.params import flatten, params_sha256
from research.schema import CheckpointConfig, Stage
from research.training import loop, reporting
from research.training.averaging import averaged_steps, due_steps, evaluation_params, mean_of, update_ema
from research.training.checkpoint import Checkpointer, steps_to_delete
from research.training.loop import Launch, run
from research.training.optimizers import OPTIMIZERS
from research.training.program import make_program
from research.training.restore import load_params
from research.training.state import init_state, restart_from
from research.training.workdir import read_rows
from tests.training.common import one_device, random_batch, small

STEPS = 14


@pytest.mark.parametrize("decay", [0.5, 0.99])
def test_the_moving_average_is_its_recurrence(decay):
    rng = np.random.default_rng(0)
    ema = wanted = rng.standard_normal(5).astype(np.float32)
    for step in range(20):
        p = rng.standard_normal(5)
        ema = update_ema(ema, jnp.asarray(p, jnp.float32), decay, jnp.int32(step))
        d = min(decay, (1 + step) / (10 + step))
        wanted = d * np.asarray(wanted, np.float64) + (1 - d) * p
        np.testing.assert_allclose(ema, wanted, atol=1e-5)


def test_it_is_made_in_the_step_and_leaves_the_training_alone():
    histories = []
    for decay in (0.0, 0.9):
        program = one_device(small(train__ema=decay))
        state = init_state(program.model.init, program.optimizer, program.layout, 0)
        compiled, ema = program.compile(), jax.device_get(state.params)
        assert (state.ema is None) == (decay == 0.0)
        for number in range(4):
            state, _ = compiled(state, None, jax.device_put(random_batch(program.config, number), program.layout.batch()))
            d = min(decay, (1 + number) / (10 + number))
            ema = jax.tree.map(lambda e, p: d * np.float64(e) + (1 - d) * np.float64(p), ema, jax.device_get(state.params))
        histories.append(params_sha256(state.params))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), jax.device_get(state.ema), ema)
    assert histories[0] == histories[1]


def test_it_rests_where_its_parameters_do_and_starts_from_them(devices):
    program = make_program(small(train__ema=0.9, mesh__rules="fsdp"), devices)
    for ema, p in zip(jax.tree.leaves(program.abstract.ema), jax.tree.leaves(program.abstract.params), strict=True):
        assert ema.sharding == p.sharding and ema.shape == p.shape and ema.dtype == jnp.float32
    params = program.model.init(jax.random.key(5))
    state = restart_from(params, jax.random.key_data(jax.random.key(0)), program.optimizer, program.layout)
    jax.tree.map(np.testing.assert_array_equal, state.ema, params)


def test_schedule_free_starts_from_the_parameters_it_is_given():
    program = one_device(small(optim__name="schedule_free", optim__schedule="constant"))
    params = program.model.init(jax.random.key(5))
    state = restart_from(params, jax.random.key_data(jax.random.key(0)), program.optimizer, program.layout)
    evaluated = evaluation_params(program.config, program.layout.shardings.params)(state)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), evaluated, params)


def test_what_moves_schedule_frees_parameters_moves_their_average():
    program = one_device(small(optim__name="schedule_free", optim__schedule="constant"))
    row = OPTIMIZERS["schedule_free"]
    params = program.model.init(jax.random.key(5))
    state = program.optimizer.init(jax.tree.map(lambda p: p - 0.3, params))  # z lies elsewhere
    after = jax.tree.map(lambda p: p + 0.7, params)
    x, moved = row.evaluated(state, params), row.evaluated(row.moved(state, params, after), after)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b + 0.7, atol=1e-5), moved, x)


@pytest.mark.slow
def test_weights_moved_by_statistics_are_averaged_where_they_are():
    """A balancing bias has no gradient and no decay: after each step, what is evaluated has the bias that is trained."""
    config = small(optim__name="schedule_free", optim__schedule="constant", optim__weight_decay=0.1)
    stage = Stage((Attention(heads=2), Moe(hidden=8, experts=4, top_k=2, balance_rate=0.1)), repeats=2)
    program = one_device(dataclasses.replace(config, model=dataclasses.replace(config.model, stages=(stage,))))
    state = init_state(program.model.init, program.optimizer, program.layout, 0)
    compiled, path = program.compile(), "decoder/stage_0/moe_1/balance_bias"
    for number in range(3):
        state, _ = compiled(state, None, jax.device_put(random_batch(program.config, number), program.layout.batch()))
    evaluated = flatten(evaluation_params(program.config, program.layout.shardings.params)(state))
    bias = flatten(state.params)[path]
    assert np.count_nonzero(bias) > bias.size / 2  # an expert may have just its share
    np.testing.assert_allclose(evaluated[path], bias, atol=1e-7)


def test_bfloat16_parameters_are_averaged_in_float32_and_exported_as_they_are(tmp_path):
    program = one_device(small(train__ema=0.9, model__param_dtype="bfloat16"))
    state = init_state(program.model.init, program.optimizer, program.layout, 0)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.ema)} == {jnp.dtype(jnp.float32)}
    state = state.replace(ema=jax.tree.map(lambda x: x + 1.0, state.ema))
    with Checkpointer(epath.Path(tmp_path), program.config.checkpoint) as checkpointer:
        checkpointer.save(state, {"sample": 0}, state.ema)
    loaded, _ = load_params(tmp_path)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b.astype(jnp.bfloat16)), loaded, state.ema)


def test_the_mean_of_checkpoints():
    trees = {step: {"a": jnp.full((2,), float(step)), "b": {"c": jnp.arange(3.0) * step}} for step in (3, 6, 10, 11)}
    mean = mean_of(trees.__getitem__, [3, 6, 11])
    np.testing.assert_allclose(mean["a"], 20 / 3)
    np.testing.assert_allclose(mean["b"]["c"], np.arange(3) * 20 / 3, rtol=1e-6)


def test_which_checkpoints_are_due():
    assert due_steps(14, 4) == [4, 8, 12, 14] and due_steps(12, 4) == [4, 8, 12] and due_steps(3, 4) == [3]
    # 9 and 13 were saved because the run was stopped there.
    assert averaged_steps([4, 8, 9, 12, 13, 14], 4, 3) == [8, 12, 14]
    kept: list[int] = []
    for step in (4, 8, 9, 12, 13, 14):
        saved = [*kept, step]
        kept = sorted(set(saved) - set(steps_to_delete(saved, lambda s: True, CheckpointConfig(every_steps=4, keep_last=1), 3)))
    assert kept == [8, 12, 14]


def config_in(cache, **changes):
    base = {"data.cache_dir": str(cache), "train.steps": STEPS, "train.log_every": 1, "train.eval_every": 6,
            "model.dim": 16, "checkpoint.keep_last": 1, "checkpoint.every_steps": 4}
    return override(preset("debug"), base | {key.replace("__", "."): value for key, value in changes.items()})


def launch(config, workdir):
    return run(config, Launch(str(workdir), preset("debug"), quiet=True))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def averaged(cache, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("averaged")
    config = config_in(cache, train__ema=0.9, train__average=3)
    return workdir, config, launch(config, workdir)


def restored(config, workdir):
    program = make_program(config)
    with Checkpointer(epath.Path(workdir), config.checkpoint, config.train.average) as checkpointer:
        return program, checkpointer.restore(program.abstract)[0]


def test_a_run_evaluates_its_averages(averaged):
    workdir, config, result = averaged
    assert list(result["final_eval"]) == ["heldout", "heldout/average"]
    moving, mean = (entry["loss"] for entry in result["final_eval"].values())
    assert result["final_eval_loss"] == moving != mean
    rows = [(row["step"], row["set"]) for row in read_rows(workdir, "metrics-") if "set" in row]
    assert rows == [(6, "heldout"), (12, "heldout"), (14, "heldout"), (14, "heldout/average")]
    assert sorted(int(p.name) for p in (workdir / "checkpoints").iterdir()) == [8, 12, 14]
    program, state = restored(config, workdir)
    assert params_sha256(state.params) == result["params_sha256"] != params_sha256(state.ema)
    exported, _ = load_params(workdir)
    assert params_sha256(exported) == params_sha256(state.ema)


def test_what_is_evaluated_is_what_is_exported(averaged, monkeypatch):
    """A launch that finds everything trained evaluates again: it must be given the EMA and the mean of the checkpoints."""
    workdir, config, result = averaged
    seen = []
    evaluate = reporting.evaluate
    monkeypatch.setattr(reporting, "evaluate", lambda nll, params, *rest: seen.append(params) or evaluate(nll, params, *rest))
    kept = (workdir / "result.json").read_text()
    (workdir / "result.json").unlink()
    launch(config, workdir)
    (workdir / "result.json").write_text(kept)
    program, state = restored(config, workdir)
    assert params_sha256(seen[0]) == params_sha256(state.ema)
    with Checkpointer(epath.Path(workdir), config.checkpoint, config.train.average) as checkpointer:
        saved = [flatten(checkpointer.restore_step(program.abstract, step)[0].params) for step in (8, 12, 14)]
    for path, value in flatten(seen[1]).items():
        np.testing.assert_allclose(value, np.mean([np.float64(p[path]) for p in saved], axis=0), atol=1e-6, err_msg=path)


def test_stopped_and_resumed_the_averages_are_bitwise_the_same(averaged, tmp_path, monkeypatch):
    workdir, config, result = averaged
    report = loop._report

    def stopping(session, speed, number, metrics):
        report(session, speed, number, metrics)
        if number == 9:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(loop, "_report", stopping)
    with pytest.raises(Interrupted):
        launch(config, tmp_path)
    monkeypatch.setattr(loop, "_report", report)
    again = launch(config, tmp_path)
    assert again["final_eval"] == result["final_eval"] and again["params_sha256"] == result["params_sha256"]
    assert params_sha256(load_params(tmp_path)[0]) == params_sha256(load_params(workdir)[0])


def test_schedule_free_evaluates_and_exports_its_average(cache, tmp_path):
    config = config_in(cache, optim__name="schedule_free", optim__schedule="constant", train__eval_every=0)
    result = launch(config, tmp_path)
    program, state = restored(config, tmp_path)
    x = evaluation_params(config, program.layout.shardings.params)(state)
    assert params_sha256(load_params(tmp_path)[0]) == params_sha256(x) != params_sha256(state.params)
    assert params_sha256(state.params) == result["params_sha256"]


@pytest.mark.parametrize("changes, message", [
    ({"train__ema": 1.0}, "train.ema: 1.0 must be below 1.0"),
    ({"train__ema": -0.1}, "train.ema: -0.1 must be at least 0.0"),
    ({"train__average": 2}, "train.average: needs checkpoints at known steps; set checkpoint.every_steps"),
    ({"train__average": 6, "checkpoint__every_steps": 4},
     "train.average: 6 checkpoints are more than the 5 that checkpoint.every_steps=4 makes in 20 steps"),
    ({"train__ema": 0.9, "optim__name": "schedule_free", "optim__schedule": "constant"},
     "train.ema: is 0.9, but schedule_free averages already; set train.ema=0"),
    ({"train__average": 2, "checkpoint__every_steps": 4, "optim__name": "schedule_free", "optim__schedule": "constant"},
     "train.average: is 2, but schedule_free averages already"),
])
def test_bad_input(changes, message):
    with pytest.raises(InputError, match=message):
        one_device(small(**changes))
