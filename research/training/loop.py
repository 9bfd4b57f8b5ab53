"""The one loop: dispatch step n, then read the metrics of n - 1; evaluate, sample, save; stop cleanly, resume bitwise."""

import contextlib
import json
import math
import os
import shutil
import sys
import time
from typing import Any, Iterator, Mapping

import jax
import numpy as np
from absl import logging
from etils import epath
from tqdm import tqdm

from research import hardware
from research.data import pipeline
from research.data.loader import Loader
from research.errors import Diverged, InputError, Interrupted
from research.schema import PREDICTION_FILE, RESULT_FILE, TOKENIZER, Config
from research.training import step as steps
from research.training.averaging import averages, evaluation_params
from research.training.checkpoint import Checkpointer, initialise_from
from research.training.metrics import Clock, Recorder, Speed, run_name
from research.training.mirrors import Announced, WandbMirror, check_wandb
from research.training.preemption import exit_on_sigterm, stop_requests
from research.training.program import BATCH_FIELDS, Program, make_program
from research.training.reporting import evaluate_sets, finish, model_utilization, sample_text, saturated
from research.training.session import Launch, Session, evaluated_until
from research.training.state import TrainState, init_state, restart_from
from research.training.workdir import Ledger, Lock, check_config, write_config


def run(config: Config, launch: Launch) -> dict[str, Any]:
    """Trains `config` in `launch.workdir`, from where an earlier launch stopped; returns what `result.json` holds.

    Raises:
      InputError: bad input; nothing in the workdir was changed.
      Diverged: the loss or a gradient is not finite.
      Interrupted: asked to stop (SIGINT, SIGTERM, minutes); all is saved.
    """
    clock, first = Clock(), jax.process_index() == 0
    workdir, name = epath.Path(launch.workdir).expanduser(), run_name(config, launch.preset)
    if launch.wandb:
        check_wandb()
    announced = Announced(launch.webhook if first else None, name, launch.workdir)
    with announced, clock.measure("initialising"), exit_on_sigterm(), contextlib.ExitStack() as stack:
        program = make_program(config)
        known = check_config(workdir, config) if workdir.exists() else False
        if launch.prediction and not os.path.exists(launch.prediction):
            raise InputError("--prediction", f"{launch.prediction} does not exist", "name the file that predict wrote")
        data = pipeline.prepare(config.data, config.model.vocab_size, config.seed, quiet=launch.quiet)
        if data.tokenizer.vocab_size > config.model.vocab_size:
            raise InputError("model.vocab_size",
                             f"{config.model.vocab_size} is below the tokenizer's {data.tokenizer.vocab_size}",
                             f"set model.vocab_size={data.tokenizer.vocab_size}")
        workdir.mkdir(parents=True, exist_ok=True)
        if first:
            stack.callback(Lock(workdir).release)
        checkpointer = stack.enter_context(Checkpointer(workdir, config.checkpoint, config.train.average))
        result = json.loads((workdir / RESULT_FILE).read_text()) if (workdir / RESULT_FILE).exists() else None
        if result and checkpointer.latest_step() == result["steps"]:
            logging.info("%s has %s at step %d already", workdir, result["status"], result["steps"])
            announced.finished(result)
            return result
        state, start = _start(program, checkpointer, clock)
        if first:
            _open_workdir(workdir, config, launch, data, known, start)
        evaluated = evaluated_until(workdir, start)
        mirror = WandbMirror(launch.wandb, config, name, os.fspath(workdir)) if first and launch.wandb else None
        recorder = Recorder(workdir, start, mirror) if first else None
        if recorder:
            stack.callback(recorder.close)
            recorder.hparams(config, name)
            recorder.layout([validation.name for validation in config.data.validation])
        ledger = Ledger(workdir) if first else None
        bar = stack.enter_context(_progress(config, start, launch.quiet))
        session = Session(launch, program, data, workdir, recorder, ledger, checkpointer, clock,
                          steps.evaluation_step(program.model, config, program.layout), _peak_flops(config), bar,
                          evaluation_params(config, program.layout.shardings.params), evaluated)
        with clock.measure("compiling"):
            checkpointer.prepare(state, session.averaged(state) if averages(config) else None)
        session.note_checkpoints()
        session.note("resumed" if start else "started", start)
        state, number = _train(session, state, start)
        result = finish(session, state, start, number)
        announced.finished(result)
        return result


def _start(program: Program, checkpointer: Checkpointer, clock: Clock) -> tuple[TrainState, int]:
    """The newest saved state, else a fresh one (from `train.init_from` where that is given)."""
    if checkpointer.latest_step() is not None:
        with clock.measure("restoring"):
            state, data = checkpointer.restore(program.abstract)
        step = int(jax.device_get(state.step))
        if data["sample"] != step * program.config.train.batch_size:
            raise InputError("train.batch_size", f"the checkpoint is at sample {data['sample']} of step {step}",
                             "resume with the batch size it was made with")
        return state, step
    state = init_state(program.model.init, program.optimizer, program.layout, program.config.seed)
    if program.config.train.init_from:
        params = initialise_from(program.config.train.init_from, state.params)
        state = restart_from(params, state.key, program.optimizer, program.layout)
    return state, 0


def _open_workdir(workdir: epath.Path, config: Config, launch: Launch, data: Any, known: bool, start: int) -> None:
    write_config(workdir, config, data.corpus_hash)
    if not known or not (workdir / TOKENIZER).exists():
        (workdir / TOKENIZER).mkdir(parents=True, exist_ok=True)
        data.tokenizer.save(os.fspath(workdir / TOKENIZER))
    if launch.prediction and not (workdir / PREDICTION_FILE).exists():
        if start:
            raise InputError("--prediction", f"the run is at step {start} already", "register a prediction before step 0")
        shutil.copyfile(launch.prediction, os.fspath(workdir / PREDICTION_FILE))


def _peak_flops(config: Config) -> float | None:
    """Peak FLOP/s of all devices together; measured where they are this host's cores, None if the chip isn't known."""
    device = jax.devices()[0]
    if device.platform == "cpu":
        return hardware.measured_cpu_peak() * jax.process_count()
    try:
        peaks = hardware.chip_of(device).peak_flops
    except InputError as error:
        logging.warning("no MFU, cost or energy: %s", error)
        return None
    name = config.model.compute_dtype
    return peaks[name if name in peaks else "bfloat16"] * hardware.chip_count(jax.devices())


def _progress(config: Config, start: int, quiet: bool) -> tqdm:
    """A bar on a terminal; elsewhere one log line a logged step (`_report`)."""
    return tqdm(total=config.train.steps, initial=start, desc=config.name, unit="step", dynamic_ncols=True,
                disable=quiet or jax.process_index() != 0 or not sys.stderr.isatty(), smoothing=0.1)


def _train(session: Session, state: TrainState, start: int) -> tuple[TrainState, int]:
    """The steps after `start`; returns the last state and its step."""
    config, clock, program = session.program.config, session.clock, session.program
    train, layout = config.train, program.layout
    if start >= train.steps or saturated(session):
        return state, start
    with clock.measure("compiling"):
        logging.info("compiling the step")
        compiled = program.compile()
    session.bar.unpause()  # the time left is that of steps, not of the compiler
    loader = Loader(session.data.train, session.data.weights, config.seed, train.batch_size, train.microbatches,
                    jax.process_index(), jax.process_count(), start * train.batch_size)
    speed, pending, saved_at = Speed(), None, time.monotonic()
    with contextlib.closing(loader), stop_requests(session.launch.minutes) as requests, clock.measure("training"):
        batches = iter(loader)
        for number in range(start + 1, train.steps + 1):
            began = time.monotonic()
            with clock.measure("data_wait"):
                batch = put_batch(next(batches), layout.batch())
            wait = time.monotonic() - began
            with _profile(session, number - start), jax.transfer_guard("disallow"):
                state, metrics = compiled(state, None, batch)
            if pending:
                _report(session, speed, *pending)
            pending = (number, metrics)
            speed.add(time.monotonic() - began, wait)
            session.bar.update(1)
            session.note_checkpoints()
            stop = requests.asked(number)
            evaluates = train.eval_every and number % train.eval_every == 0 and number < train.steps
            samples = train.sample_every and number % train.sample_every == 0 and number < train.steps
            saves = _save_due(config, number, saved_at) or stop or number == train.steps
            if evaluates or samples or saves:
                _report(session, speed, *pending)  # a step whose loss isn't finite is never saved
                pending = None
            flat = False
            if evaluates:
                evaluate_sets(session, session.averaged(state), number)
                flat = saturated(session)
            if samples:
                sample_text(session, session.averaged(state), number)
            if saves or flat:
                _save(session, state, number)
                saved_at = time.monotonic()
            if flat:
                logging.info("step %d: saturated, no improvement beyond the standard error in %d evaluations", number,
                             train.stop_after_flat)
                return state, number
            if stop and number < train.steps:
                with clock.measure("saving"):
                    session.checkpointer.wait()
                session.note_checkpoints()
                session.note("preempted", number, reason=stop)
                raise Interrupted(f"stopped after step {number} of {train.steps}; the same command goes on from there")
    return state, train.steps


def put_batch(batch: Mapping[str, np.ndarray], sharding: jax.sharding.Sharding) -> dict[str, jax.Array]:
    """This process's rows -> global arrays of the fields that the step reads."""
    return {name: jax.make_array_from_process_local_data(sharding, batch[name]) for name in BATCH_FIELDS}


@contextlib.contextmanager
def _profile(session: Session, done: int) -> Iterator[None]:
    """Traces `--profile_steps` steps, from the third on, for TensorBoard's profile tab."""
    count, begin = session.launch.profile_steps, 3
    if count and done == begin:
        jax.profiler.start_trace(os.fspath(session.workdir))
    yield
    if count and done == begin + count - 1:
        jax.profiler.stop_trace()


def _save_due(config: Config, number: int, saved_at: float) -> bool:
    every, minutes = config.checkpoint.every_steps, config.checkpoint.every_minutes
    return bool(every and number % every == 0) or bool(minutes and time.monotonic() - saved_at > 60 * minutes)


def _report(session: Session, speed: Speed, number: int, metrics: Mapping[str, jax.Array]) -> None:
    """Reads a step's metrics; stops on a number that isn't finite; logs every `log_every` steps and the last."""
    config, program = session.program.config, session.program
    values = {name: float(value) for name, value in jax.device_get(dict(metrics)).items()}
    for name in ("objective", "grad_norm"):
        if not math.isfinite(values[name]):
            raise Diverged(f"step {number}: {name} is {values[name]}; nothing since the last checkpoint was saved")
    if (number % config.train.log_every and number != config.train.steps) or not speed.steps:
        return
    timing = speed.take()
    tokens_per_second = timing.pop("steps") * program.tokens_per_step / max(timing.pop("seconds"), 1e-9)
    mfu = model_utilization(session, tokens_per_second)
    memory = jax.local_devices()[0].memory_stats()
    row = {"samples": number * config.train.batch_size, "tokens": number * program.tokens_per_step,
           "flops": number * program.tokens_per_step * program.flops_per_token, **values,
           "tokens_per_second": tokens_per_second, "mfu": mfu, **timing,
           "device_bytes": memory["bytes_in_use"] if memory else resident_bytes()}
    if session.recorder:
        session.recorder.row(number, row)
    loss = values["loss"] if "loss" in values else values["objective"]
    words = {"loss": f"{loss:.3f}", "tok/s": f"{tokens_per_second:,.0f}", **({"mfu": f"{100 * mfu:.0f}%"} if mfu else {})}
    session.bar.set_postfix(words, refresh=False)
    if session.bar.disable and not session.launch.quiet and jax.process_index() == 0:
        left = (config.train.steps - number) * timing["step_seconds_p50"]
        logging.info("step %d/%d  %s  %.0f s left", number, config.train.steps,
                     "  ".join(f"{key} {value}" for key, value in words.items()), left)


def resident_bytes() -> int:
    """This process's resident memory, where the device doesn't count its own (CPU on Linux); 0 if unknown."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def _save(session: Session, state: TrainState, number: int) -> None:
    with session.clock.measure("saving"):
        config = session.program.config
        averaged = session.averaged(state) if averages(config) else None
        session.checkpointer.save(state, {"sample": number * config.train.batch_size}, averaged)
