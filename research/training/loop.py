"""The one loop: dispatch step n, then read the metrics of n - 1; evaluate, sample, save; stop cleanly, resume bitwise.

What changes from step to step is in `Running`. When the guard finds something wrong, `_steps` returns an alarm, `roll_back`
puts the run back to where a checkpoint was made, and the compiled step goes on from there. `Launch.fault` puts faults in.
"""

import contextlib
import functools
import json
import os
import sys
import time
from typing import Any, Callable, Mapping

import jax
import numpy as np
from absl import logging
from etils import epath
from tqdm import tqdm

from research import hardware
from research.data import pipeline
from research.data.loader import Loader
from research.data.mixture import sample_at
from research.errors import InputError, Interrupted
from research.scaling.prediction import (
    CLOCKS,
    Prediction,
    check_before,
    check_target,
    read_prediction,
    registered,
    stored_prediction,
)
from research.schema import LEDGER_PREFIX, PREDICTION_FILE, RESULT_FILE, TOKENIZER, Config
from research.training import step as steps
from research.training.averaging import averages, evaluation_params
from research.training.checkpoint import Checkpointer
from research.training.gang import Gang
from research.training.goodput import Clock, Goodput
from research.training.guard import Alarm
from research.training.metrics import Recorder, Speed, run_name
from research.training.mirrors import Announced, WandbMirror, check_wandb
from research.training.preemption import exit_on_sigterm, stop_requests
from research.training.program import BATCH_FIELDS, make_program
from research.training.replicas import disagreements
from research.training.reporting import evaluate_sets, finish, model_utilization, sample_text, saturated, show_prediction
from research.training.running import Running, learn, roll_back, start_at
from research.training.session import Launch, Session, as_first, evaluated_until
from research.training.workdir import Ledger, Lock, check_config, read_rows, write_config, write_json


def run(config: Config, launch: Launch) -> dict[str, Any]:
    """Trains `config` in `launch.workdir`, from where an earlier launch stopped; returns what `result.json` holds.

    Raises:
      InputError: bad input; nothing in the workdir was changed.
      Diverged: the guard gave up: loss or gradient not finite, or a spike, after every rollback that it was allowed.
      Interrupted: asked to stop (SIGINT, SIGTERM, minutes); all is saved.
    """
    clock, first = Clock(launch.began), jax.process_index() == 0
    workdir, name = epath.Path(launch.workdir).expanduser(), run_name(config, launch.preset)
    if launch.wandb:
        check_wandb()
    announced = Announced(launch.webhook, name, launch.workdir, first)
    with (announced, exit_on_sigterm(),
          Gang(clock, workdir, launch.heartbeat, announced) as gang, contextlib.ExitStack() as stack, gang.failures()):
        program = make_program(config)
        known = check_config(workdir, config) if workdir.exists() else False
        prediction = read_prediction(launch.prediction) if launch.prediction else None
        if prediction:
            check_target(prediction, config)
        data = pipeline.prepare(config.data, config.model.vocab_size, config.seed, quiet=launch.quiet)
        workdir.mkdir(parents=True, exist_ok=True)
        if first:
            stack.callback(Lock(workdir).release)
        checkpointer = stack.enter_context(Checkpointer(workdir, config.checkpoint, config.train.average))
        result = json.loads((workdir / RESULT_FILE).read_text()) if (workdir / RESULT_FILE).exists() else None
        if result and checkpointer.latest_step() == result["steps"]:
            _register(workdir, prediction, result["steps"])
            logging.info("%s has %s at step %d already", workdir, result["status"], result["steps"])
            announced.finished(result)
            return result
        goodput = Goodput(workdir, clock, hardware.chip_count(jax.devices()))
        if first:
            goodput.start()
            stack.callback(goodput.close)
            gang.goodput = goodput
        running = start_at(program, checkpointer, clock)
        start = running.number
        learn(running, config, workdir)
        if first:
            newly = _register(workdir, prediction, start)
            _open_workdir(workdir, config, data, known)
        evaluated = evaluated_until(workdir, start)
        mirror = WandbMirror(launch.wandb, config, name, os.fspath(workdir)) if first and launch.wandb else None
        recorder = Recorder(workdir, start, mirror) if first else None
        if recorder:
            stack.callback(recorder.close)
            recorder.hparams(config, name)
            recorder.layout(list(data.validation))
        prediction = stored_prediction(workdir) if first else None
        ledger = gang.ledger = Ledger(workdir, announced.ledger_line) if first else None
        bar = stack.enter_context(_progress(config, start, launch.quiet))
        session = Session(launch, program, data, workdir, recorder, ledger, checkpointer, clock, goodput,
                          steps.evaluation_step(program.model, config, program.layout), _peak_flops(config), bar,
                          evaluation_params(config, program.layout.shardings.params), evaluated, gang, prediction)
        with clock.measure("compiling"):
            checkpointer.prepare(running.state, session.averaged(running.state) if averages(config) else None)
            disagreements(running.state)
        session.note_checkpoints()
        session.note("resumed" if start else "started", start)
        if first and newly:
            session.note("predicted", start, **{name: prediction[name] for name in ("value", "low", "high", "law", "sha256")})
        show_prediction(session, start)
        stack.push(functools.partial(_note_exit, session, running))
        _train(session, running)
        with clock.measure("saving"):
            result = finish(session, running.state, running.number, running.dispatched)
        announced.finished(result)
        return result


def _register(workdir: epath.Path, prediction: Prediction | None, start: int) -> bool:
    """Stores a prediction that is new here, at step 0 and before the run began; True where it did."""
    if prediction is None:
        return False
    if stored := stored_prediction(workdir):
        if stored["sha256"] != prediction["sha256"]:
            raise InputError("--prediction", f"{workdir} has another one registered", "keep that one: leave the flag out")
        return False
    if start:
        raise InputError("--prediction", f"the run is at step {start} already", "register a prediction before step 0")
    begun = [row["time"] for row in read_rows(workdir, LEDGER_PREFIX)[:1]]
    check_before(prediction, begun[0] if begun else time.time() + CLOCKS)
    write_json(workdir / PREDICTION_FILE, registered(prediction))
    return True


def _open_workdir(workdir: epath.Path, config: Config, data: Any, known: bool) -> None:
    write_config(workdir, config, data.corpus_hash)
    if not known or not (workdir / TOKENIZER).exists():
        (workdir / TOKENIZER).mkdir(parents=True, exist_ok=True)
        data.tokenizer.save(os.fspath(workdir / TOKENIZER))


def _note_exit(session: Session, running: Running, kind: type[BaseException] | None, *_: Any) -> None:
    """SIGTERM outside of the steps (preemption.exit_on_sigterm), where the loop doesn't note it."""
    if kind is SystemExit:
        session.note("preempted", running.number, reason="SIGTERM")


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


def _train(session: Session, running: Running) -> None:
    """All steps that are left, through rollbacks."""
    train, number = session.program.config.train, running.number
    left = session.checkpointer.latest_step() == number and number not in {step for step, _ in session.evaluated}
    if _due(train.eval_every, session, number) and as_first(left):  # by a launch that was asked to stop here
        evaluate_sets(session, session.averaged(running.state), number)
    if number >= train.steps or saturated(session):
        return
    with session.clock.measure("compiling"):
        logging.info("compiling the step")
        compiled = session.program.compile()
    session.bar.unpause()  # the time left is that of steps, not of the compiler
    with (stop_requests(session.launch.minutes) as requests, session.clock.measure("training"),
          _Profile(session.workdir, session.launch.profile_steps) as profile):
        while alarm := _steps(session, running, compiled, requests.asked, profile):
            roll_back(session, running, alarm)


def _steps(session: Session, running: Running, compiled: Any, stop: Callable[[int], str | None],
           profile: "_Profile") -> Alarm | None:
    """Steps until the run ends, or until something is wrong with one."""
    config, clock, goodput, fault = session.program.config, session.clock, session.goodput, session.launch.fault
    train, place, speed = config.train, functools.partial(put_batch, sharding=session.program.layout.batch()), Speed()
    loader = Loader(session.data.train, session.data.weights, config.seed, train.batch_size, train.microbatches,
                    jax.process_index(), jax.process_count(), running.number * train.batch_size, skips=running.skips,
                    place=None if fault else place)
    with contextlib.closing(loader):
        batches = iter(loader)
        for number in range(running.number + 1, train.steps + 1):
            with clock.measure(goodput.category(number)):
                began = time.monotonic()
                session.gang.step(number)
                with clock.measure("data_wait"):
                    batch = next(batches)
                    if fault:
                        batch = place(fault(number, sample_at((number - 1) * train.batch_size, running.skips), batch))
                wait = time.monotonic() - began
                with jax.transfer_guard("disallow"), session.gang.blocked():
                    running.state, metrics = profile.step(running.dispatched + 1, compiled, running.state, None, batch)
                alarm = _settle(session, running, speed)  # of the step before
                running.number, running.pending, running.dispatched = number, (number, metrics), running.dispatched + 1
                goodput.reached = max(goodput.reached, number)
                speed.add(time.monotonic() - began, wait)
                session.bar.update(1)
                session.note_checkpoints()
                asked = stop(running.dispatched)  # it rises, also where steps are repeated
                alarm = alarm or _between_steps(session, running, speed, asked)
            if alarm or running.ended:
                return alarm
    return None


def _settle(session: Session, running: Running, speed: Speed) -> Alarm | None:
    """Reads the metrics of the pending step, if there is one: the guard's alarm, or they are reported."""
    if not running.pending:
        return None
    (number, metrics), running.pending = running.pending, None
    with session.gang.blocked():
        values = {name: float(value) for name, value in jax.device_get(dict(metrics)).items()}
    alarm = running.guard.check(number, values)
    if not alarm:
        _report(session, speed, number, values)
    return alarm


def _due(every: int, session: Session, number: int) -> bool:
    """Whether what is done `every` so many steps is due after step `number`; the end is another matter."""
    return bool(every) and 0 < number < session.program.config.train.steps and number % every == 0


def _between_steps(session: Session, running: Running, speed: Speed, stop: str | None) -> Alarm | None:
    """What is due after a step: evaluation, sample, checkpoint, the end; an alarm instead if the step was bad.

    A run that is asked to stop saves and leaves its evaluation to the next launch: there may be half a minute for all of it.
    """
    config, number = session.program.config, running.number
    train, inside = config.train, number < config.train.steps
    evaluates = _due(train.eval_every, session, number) and not stop
    samples = _due(train.sample_every, session, number) and not stop
    saves = _save_due(config, number, running.saved_at) or stop or not inside
    if not (evaluates or samples or saves):
        return None
    if alarm := _settle(session, running, speed):  # a step whose loss isn't finite is never saved
        return alarm
    if evaluates:
        evaluate_sets(session, session.averaged(running.state), number)
        running.ended = saturated(session)
    if samples:
        sample_text(session, session.averaged(running.state), number)
    if saves or running.ended:
        _save(session, running)
    if running.ended:
        logging.info("step %d: saturated, no improvement beyond the standard error in %d evaluations", number,
                     train.stop_after_flat)
    elif stop and inside:
        with session.clock.measure("saving"):
            session.checkpointer.wait()
        session.note_checkpoints()
        session.note("preempted", number, reason=stop)
        raise Interrupted(f"stopped after step {number} of {train.steps}; the same command goes on from there")
    return None


def put_batch(batch: Mapping[str, np.ndarray], sharding: jax.sharding.Sharding) -> dict[str, jax.Array]:
    """This process's rows -> global arrays of the fields that the step reads."""
    if jax.process_count() == 1:  # one call for all of them
        return jax.device_put({name: batch[name] for name in BATCH_FIELDS}, sharding)
    return {name: jax.make_array_from_process_local_data(sharding, batch[name]) for name in BATCH_FIELDS}


class _Profile:
    """Traces `count` steps of a launch, from the third on, for TensorBoard's profile tab; however it ends, the trace does."""

    FIRST = 3

    def __init__(self, workdir: epath.Path, count: int):
        self._workdir, self._count, self._traced, self._tracing = workdir, count, 0, False

    def step(self, number: int, compiled: Callable[..., Any], *args: Any) -> Any:
        """Dispatches step `number` of the launch; waits for the last that is traced, or its work would not be in the trace."""
        if self._count and number == self.FIRST:
            jax.profiler.start_trace(os.fspath(self._workdir))
            self._tracing = True
        with jax.profiler.StepTraceAnnotation("train", step_num=number):  # what the profile tab counts as a step
            results = compiled(*args)
        self._traced += self._tracing
        if self._tracing and self._traced == self._count:
            jax.block_until_ready(results)
            self._stop()
        return results

    def _stop(self) -> None:
        self._tracing = False
        jax.profiler.stop_trace()

    def __enter__(self) -> "_Profile":
        return self

    def __exit__(self, *_: Any) -> None:
        if self._traced < self._count:
            logging.warning("--profile_steps=%d: only %d were traced, as this launch ended; the first is its step %d",
                            self._count, self._traced, self.FIRST)
        if self._tracing:
            self._stop()


def _save_due(config: Config, number: int, saved_at: float) -> bool:
    every, minutes = config.checkpoint.every_steps, config.checkpoint.every_minutes
    by_steps = number in config.checkpoint.keep_at or (every and number % every == 0)
    return bool(by_steps or (minutes and time.monotonic() - saved_at > 60 * minutes))


def _report(session: Session, speed: Speed, number: int, values: Mapping[str, float]) -> None:
    """Logs a step's metrics every `log_every` steps and at the last, with the shares of the goodput."""
    config, program = session.program.config, session.program
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
        if session.goodput.due():
            for name, share in session.goodput.shares().items():
                session.recorder.scalar(number, f"goodput/{name}", share)
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


def _save(session: Session, running: Running) -> None:
    """Saves, unless replicas of the state differ: what a faulty device has made is never saved.

    Raises:
      Interrupted: they do; a restart goes on from the last checkpoint.
    """
    config, state = session.program.config, running.state
    with session.clock.measure("saving"):
        if corrupted := disagreements(state):
            reason = f"silent corruption: replicas differ on {'; '.join(corrupted[:4])}"
            session.checkpointer.wait()
            session.note_checkpoints()
            session.note("alarm", running.number, reason=reason)
            raise Interrupted(f"step {running.number}: {reason}; the same command goes on from the last checkpoint")
        session.checkpointer.save(state, running.data(config), session.averaged(state) if averages(config) else None)
    running.saved_at = time.monotonic()
