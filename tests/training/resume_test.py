"""A run that is killed, or asked to stop, and started again ends with the bits of one that nothing happened to."""

import json
import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from etils import epath

from configs import preset
from research.config import override
from research.errors import InputError, Interrupted
from research.params import flatten, params_sha256
from research.schema import EXIT_BAD_INPUT, EXIT_INTERRUPTED
from research.training import restore
from research.training.checkpoint import Checkpointer
from research.training.loop import Launch, run
from research.training.program import make_program
from research.training.restore import initialise_from, load_params
from research.training.state import init_state
from research.training.workdir import read_config, read_rows
from tests.training.common import one_device, random_batch

STEPS = 14


def config_in(cache, **changes):
    base = {"data.cache_dir": str(cache), "train.steps": STEPS, "train.log_every": 1, "checkpoint.every_steps": 4,
            "train.eval_every": 6, "model.dim": 16, "model.dropout": 0.1}
    return override(preset("debug"), base | {key.replace("__", "."): value for key, value in changes.items()})


def arguments(config, workdir) -> list[str]:
    fields = ("data.cache_dir", "train.steps", "train.log_every", "checkpoint.every_steps", "train.eval_every", "model.dim",
              "model.dropout")
    from research.config import flatten as paths

    flat = paths(config)
    words = [f"--set={name}={flat[name]}" for name in fields]
    return [sys.executable, "-m", "experiments.train", "--config=debug", f"--workdir={workdir}", *words]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def undisturbed(cache, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed")
    config = config_in(cache)
    return workdir, config, run(config, Launch(str(workdir), preset("debug"), quiet=True))


def steps_of(workdir) -> list[int]:
    return [row["step"] for row in read_rows(workdir, "metrics-") if "set" not in row]


def evaluations(workdir) -> list[dict]:
    return [row for row in read_rows(workdir, "metrics-") if "set" in row]


def test_the_run_directory_is_that_of_the_interfaces(undisturbed):
    workdir, config, result = undisturbed
    names = {p.name for p in workdir.iterdir()}
    assert {"config.json", "result.json", "checkpoints", "tokenizer", "metrics-0000.jsonl", "ledger-0000.jsonl"} <= names
    assert any(name.startswith("events.out.tfevents.") for name in names)
    assert read_config(workdir) == config
    assert steps_of(workdir) == list(range(1, STEPS + 1))
    wanted = {"schema", "status", "steps", "samples", "tokens", "flops", "params", "final_eval", "final_eval_loss",
              "final_eval_loss_se", "bits_per_byte", "tokens_per_second", "mfu", "goodput", "chip_seconds", "cost",
              "energy_kwh", "params_sha256"}
    assert wanted <= set(result) and json.loads((workdir / "result.json").read_text()) == result
    row = next(r for r in read_rows(workdir, "metrics-") if "set" not in r)
    wanted = {"step", "samples", "tokens", "flops", "loss", "loss_se", "lr", "grad_norm", "param_norm", "update_norm",
              "tokens_per_second", "mfu", "step_seconds_p50", "step_seconds_p95", "data_wait_share", "device_bytes"}
    assert wanted <= set(row)
    assert [r["event"] for r in read_rows(workdir, "ledger-")][0] == "started"
    assert sorted(int(p.name) for p in (workdir / "checkpoints").iterdir()) == [12, 14]  # keep_last=2
    saved = json.loads((workdir / "config.json").read_text())
    assert saved["schema"] == 1 and saved["versions"]["jax"] and saved["corpus_sha256"] == result["corpus_sha256"]


def test_again_is_bitwise_the_same(undisturbed, tmp_path):
    _, config, result = undisturbed
    assert run(config, Launch(str(tmp_path), preset("debug"), quiet=True))["params_sha256"] == result["params_sha256"]
    other = run(override(config, {"seed": 1}), Launch(str(tmp_path / "other"), preset("debug"), quiet=True))
    assert other["params_sha256"] != result["params_sha256"]


def test_a_finished_run_is_left_alone(undisturbed):
    workdir, config, result = undisturbed
    before = steps_of(workdir)
    assert run(config, Launch(str(workdir), preset("debug"), quiet=True)) == result
    assert steps_of(workdir) == before


@pytest.mark.parametrize("stop_at", [1, 5, 8])
def test_stopped_at_any_step_and_resumed(undisturbed, tmp_path, monkeypatch, stop_at):
    """A stop request after step `stop_at`, whichever side of a checkpoint or an evaluation that is."""
    from research.training import loop

    quiet, config, result = undisturbed
    report = loop._report

    def stopping(session, speed, number, metrics):
        report(session, speed, number, metrics)
        if number == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(loop, "_report", stopping)
    with pytest.raises(Interrupted, match="the same command goes on"):
        run(config, Launch(str(tmp_path), preset("debug"), quiet=True))
    assert not (tmp_path / "result.json").exists()
    last = read_rows(tmp_path, "ledger-")[-1]
    assert last["event"] == "preempted" and last["step"] not in [row["step"] for row in evaluations(tmp_path)]  # no time for it
    monkeypatch.setattr(loop, "_report", report)
    assert run(config, Launch(str(tmp_path), preset("debug"), quiet=True))["params_sha256"] == result["params_sha256"]
    assert steps_of(tmp_path) == list(range(1, STEPS + 1))
    assert {"started", "preempted", "resumed", "finished"} <= {r["event"] for r in read_rows(tmp_path, "ledger-")}
    assert evaluations(tmp_path) == evaluations(quiet)


def test_killed_and_resumed(undisturbed, cache, tmp_path):
    """SIGKILL once the first checkpoint is there; then the same command; the ledger and metrics tell it right."""
    _, config, result = undisturbed
    config = override(config, {"train.steps": STEPS})
    # The same bits take the same compiler: this process compiles with few optimisations (tests/conftest.py).
    environment = {**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": str(jax.config.read("jax_disable_most_optimizations"))}
    process = subprocess.Popen(arguments(config, tmp_path), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < deadline:
        if (tmp_path / "checkpoints" / "4").exists():
            break
        time.sleep(0.002)
    process.kill()
    _, errors = process.communicate()
    assert (tmp_path / "checkpoints" / "4").exists(), errors.decode()
    resumed = run(config, Launch(str(tmp_path), preset("debug"), quiet=True))
    assert resumed["params_sha256"] == result["params_sha256"]
    assert steps_of(tmp_path) == list(range(1, STEPS + 1))


def test_sigterm_exits_with_75_and_a_second_job_with_2(cache, tmp_path):
    config = config_in(cache, train__steps=100000)
    process = subprocess.Popen(arguments(config, tmp_path), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 300
    while process.poll() is None and not list(tmp_path.glob("metrics-*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    second = subprocess.run(arguments(config, tmp_path), capture_output=True)
    assert second.returncode == EXIT_BAD_INPUT
    assert b"--workdir" in second.stderr and b"is in use by process" in second.stderr, second.stderr
    process.terminate()
    _, errors = process.communicate(timeout=120)
    assert process.returncode == EXIT_INTERRUPTED, errors.decode()
    assert not (tmp_path / "result.json").exists() and list((tmp_path / "checkpoints").iterdir())


def test_another_config_is_refused_and_free_fields_are_not(undisturbed, cache):
    workdir, config, result = undisturbed
    before = (workdir / "config.json").read_text()
    with pytest.raises(InputError, match=r"--workdir: .* another config \(optim.lr is 0.01 there, 0.5 here\)"):
        run(override(config, {"optim.lr": 0.5}), Launch(str(workdir), preset("debug"), quiet=True))
    assert (workdir / "config.json").read_text() == before
    free = override(config, {"train.log_every": 7, "checkpoint.keep_last": 3})
    assert run(free, Launch(str(workdir), preset("debug"), quiet=True)) == result


def test_a_checkpoint_of_another_shape_is_refused(undisturbed, cache):
    workdir, config, _ = undisturbed
    wider = one_device(override(config, {"model.stages.0.pattern.1.hidden": 48}))
    with Checkpointer(epath.Path(workdir), config.checkpoint) as checkpointer:
        message = r"checkpoint: decoder/stage_0/gated_mlp_1/down is float32\[2, 64, 16\], the model wants"
        with pytest.raises(InputError, match=message):
            checkpointer.restore(wider.abstract)
    with pytest.raises(InputError, match="has no checkpoint of step 3 .found: 12, 14."):
        load_params(workdir, step=3)


def test_params_load_by_path_and_say_what_is_missing(undisturbed, cache, tmp_path, caplog):
    workdir, config, result = undisturbed
    params, step = load_params(workdir)
    assert step == STEPS and params_sha256(params) == result["params_sha256"]
    tied = override(config, {"train.init_from": str(workdir), "model.tie_embeddings": True, "train.steps": 1,
                             "optim.warmup_steps": 0, "optim.lr": 0.0})
    run(tied, Launch(str(tmp_path), preset("debug"), quiet=True))
    loaded, _ = load_params(tmp_path)
    np.testing.assert_array_equal(flatten(loaded)["embedding/table"], flatten(params)["embedding/table"])
    assert "unembedding/kernel is not used by this model" in caplog.text


def test_weights_to_begin_with_go_where_they_will_rest(undisturbed, monkeypatch):
    """Read by each device for itself: a model that no one device holds begins from another run, too."""
    workdir, config, result = undisturbed
    program = make_program(override(config, {"mesh.rules": "fsdp", "model.tie_embeddings": True}))
    params = init_state(program.model.init, program.optimizer, program.layout, 1).params
    wanted = {path: x.sharding for path, x in flatten(params).items()}
    assert any(not sharding.is_fully_replicated for sharding in wanted.values())
    checked = {}
    monkeypatch.setattr(restore, "verify", lambda arrays, *_: checked.update(arrays["params"]))
    found = initialise_from(str(workdir), params)
    assert {path: x.sharding for path, x in checked.items()} == wanted  # as they were read; the unused one isn't there
    assert {path: x.sharding for path, x in flatten(found).items()} == wanted
    monkeypatch.undo()
    whole, _ = load_params(workdir)
    for path, value in flatten(initialise_from(str(workdir), params)).items():
        np.testing.assert_array_equal(value, flatten(whole)[path])


def test_the_saved_state_is_the_state_though_it_was_donated(tmp_path, cache):
    """Saving is asynchronous and the next step reuses the buffers: the file must hold the values of its step."""
    program = one_device(config_in(cache))
    compiled = program.compile()
    state = init_state(program.model.init, program.optimizer, program.layout, 0)
    digests = {}
    with Checkpointer(epath.Path(tmp_path), override(program.config, {"checkpoint.keep_last": 10}).checkpoint) as checkpointer:
        for number in range(1, 5):
            batch = random_batch(program.config, number)
            state, _ = compiled(state, None, jax.device_put(batch, program.layout.batch()))
            digests[number] = params_sha256(state.params)
            checkpointer.save(state, {"sample": number})
        checkpointer.wait()
        for number, digest in digests.items():
            restored, data = checkpointer.restore_step(program.abstract, number)
            assert params_sha256(restored.params) == digest and data == {"sample": number}
