"""Where a run is: its start, fresh or from a checkpoint, and its way back after an alarm."""

import dataclasses
import time
from typing import Any, Mapping

import jax
from absl import logging
from etils import epath

from research.data.loader import documents_between
from research.data.mixture import Skips, sample_at, with_skip
from research.errors import Diverged, InputError
from research.schema import LEDGER_PREFIX, Config
from research.training.checkpoint import Checkpointer
from research.training.goodput import Clock
from research.training.guard import Alarm, Guard, Rollback, decide, rollbacks_of, story
from research.training.manifest import BrokenStep
from research.training.program import Program
from research.training.restore import initialise_from, load_state
from research.training.session import Session
from research.training.state import TrainState, init_state, restart_from
from research.training.workdir import read_rows


@dataclasses.dataclass
class Running:
    """A run between two steps: `state` after step `number`, and what the order of the data leaves out.

    `history`: the rollbacks so far; `pending`: a dispatched step whose metrics weren't read yet; `dispatched`: steps of this
    launch, repeated ones included; `ended`: before its last step.
    """

    state: TrainState | None
    number: int
    skips: Skips
    guard: Guard
    history: list[Rollback] = dataclasses.field(default_factory=list)
    pending: tuple[int, Mapping[str, jax.Array]] | None = None
    dispatched: int = 0
    ended: bool = False
    saved_at: float = dataclasses.field(default_factory=time.monotonic)

    def data(self, config: Config) -> dict[str, Any]:
        """What the checkpoint holds beside the state."""
        return {"sample": sample_at(self.number * config.train.batch_size, self.skips), "skips": self.skips,
                "guard": self.guard.saved()}


def start_at(program: Program, checkpointer: Checkpointer, clock: Clock, step: int | None = None) -> Running:
    """As it was at the newest good checkpoint, or at that of `step` (which raises BrokenStep); where none is saved, and at step
    0, as `train.branch_from` is, or fresh (with the weights of `train.init_from`)."""
    config = program.config
    saved = checkpointer.saved_steps() if step is None else step
    if saved or config.train.branch_from:
        with clock.measure("restoring"):
            state, data = (load_state(config.train.branch_from, program.abstract) if not saved else
                           checkpointer.restore(program.abstract) if step is None else
                           checkpointer.restore_step(program.abstract, step))
        number, skips = int(jax.device_get(state.step)), tuple(map(tuple, data["skips"]))
        if data["sample"] != sample_at(number * config.train.batch_size, skips):
            raise InputError("train.batch_size", f"the checkpoint is at sample {data['sample']} of step {number}",
                             "resume with the batch size it was made with")
        return Running(state, number, skips, Guard(config.guard, data["guard"]))
    state = init_state(program.model.init, program.optimizer, program.layout, config.seed)
    if config.train.init_from:
        params = initialise_from(config.train.init_from, state.params)
        state = restart_from(params, state.key, program.optimizer, program.layout)
    return Running(state, 0, (), Guard(config.guard))


def learn(running: Running, config: Config, workdir: epath.Path) -> None:
    """Takes over what the ledger tells of earlier rollbacks: what they skip from here on is skipped, saved since or not."""
    ledger = read_rows(workdir, LEDGER_PREFIX)
    here = sample_at(running.number * config.train.batch_size, running.skips)
    for row in ledger:
        if row["event"] == "skipped" and row["samples"][0] >= here:
            running.skips = with_skip(running.skips, *row["samples"])
    running.history = rollbacks_of(ledger)


def roll_back(session: Session, running: Running, alarm: Alarm) -> None:
    """Puts the run back to before the alarm, as the guard decides: state, data, records. What was saved since is deleted, once
    the step to go back to was found good; the guard decides again without one that isn't.

    Killed in here, a run still ends the same: the ledger has what is skipped before the first step without it.

    Raises:
      Diverged: the guard gave up; with the story.
    """
    config, checkpointer = session.program.config, session.checkpointer
    with session.clock.measure("saving"):
        checkpointer.wait()
    running.state = running.pending = None  # its memory, before another one comes
    kept = checkpointer.saved_steps()
    with session.clock.measure("restoring"):
        while rollback := decide(config.guard, running.history, alarm, kept):
            try:
                restored = start_at(session.program, checkpointer, session.clock, rollback.to)
                break
            except BrokenStep as error:
                checkpointer.quarantine({error.step: error.flaw})
                kept.remove(error.step)
    session.note_checkpoints()
    if rollback is None:
        text = story(running.history, alarm)
        checkpointer.delete_after(alarm.first - 1)
        session.note("alarm", alarm.step, first=alarm.first, reason=alarm.reason, story=text.splitlines())
        raise Diverged(text)
    session.note("alarm", alarm.step, first=alarm.first, reason=alarm.reason)
    logging.warning("%s", rollback)
    with session.clock.measure("restoring"):
        checkpointer.delete_after(rollback.to)
        if rollback.batches:
            places = (rollback.skip_from, rollback.skip_from + rollback.batches)
            begin, end = (sample_at(place * config.train.batch_size, running.skips) for place in places)
            running.skips = with_skip(running.skips, begin, end)
            if session.ledger:
                documents = documents_between(session.data.train, session.data.weights, config.seed, begin, end)
                session.note("skipped", rollback.to, samples=[begin, end], documents=documents)
        session.note("rolled_back", rollback.to, **rollback.details())
    session.bar.update(restored.number - running.number)
    running.state, running.number, running.guard = restored.state, restored.number, restored.guard
    running.saved_at = restored.saved_at
    running.history.append(rollback)
    for key in [key for key in session.evaluated if key[0] > running.number]:
        del session.evaluated[key]
    if session.recorder:
        session.recorder.rewind(running.number)
