"""Checkpoints that can be trusted: one atomic Orbax composite a step, written in the background, checked when it is read.

checkpoints/STEP/ holds params, optimizer, keys (arrays), data (the sample index, what is skipped, the guard's memory), meta
(schema, step, weights) and manifest.json (manifest.py: every file's size and hash, every array's checksum); where what is
evaluated isn't what is trained (an EMA, schedule-free's average), `averaged` has those parameters. What fails is moved to
checkpoints/quarantine/.
"""

import collections
import concurrent.futures
import itertools
import shutil
import time
from typing import Any, Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jax.experimental import multihost_utils

from research.errors import InputError, Interrupted, is_full
from research.schema import CHECKPOINTS, SCHEMA_VERSION, CheckpointConfig
from research.training import manifest
from research.training.averaging import averaged_steps
from research.training.checksums import begin_checksums, checksums
from research.training.manifest import BrokenStep, check_step
from research.training.restore import describe_arrays, load_step, verify
from research.training.state import TrainState
from research.training.workdir import is_remote

EXPORTED = "params", "averaged"
LAYER_CHUNK = 1 << 20  # bytes
FINISH_SECONDS = 3600  # how long the processes of a job wait for each other at the end of a save
_FINISHED = itertools.count()  # numbers those waits: none may have the name of another, though a step may be saved twice


def steps_to_delete(steps: Sequence[int], good: Callable[[int], bool], config: CheckpointConfig, average: int) -> list[int]:
    """The steps that `config` doesn't keep: older than the `keep_last` newest **good** ones, no multiple of `keep_every`, not
    in `keep_at`, none of the last `average` that are due (averaging.py). While fewer than `keep_last` are good, none is."""
    kept = set(config.keep_at) | set(averaged_steps(steps, config.every_steps, average) if average else ())
    found, doomed = 0, []
    for step in sorted(steps, reverse=True):
        if found < config.keep_last:
            found += good(step)
        elif step not in kept and not (config.keep_every and step % config.keep_every == 0):
            doomed.append(step)
    return doomed


class Checkpointer:
    """Saves and restores a run's state under `workdir`/checkpoints. Call `close` (or use `with`) to finish writing.

    `average`: so many of the last checkpoints that `config.every_steps` makes are kept besides, to be averaged.
    In a job of several processes all call the same methods in the same order; the first one writes, moves and deletes.
    """

    def __init__(self, workdir: epath.Path, config: CheckpointConfig, average: int = 0):
        self._directory = epath.Path(workdir).absolute() / CHECKPOINTS
        self._config, self._average, self._first = config, average, jax.process_index() == 0
        self._events: collections.deque[tuple[str, int, dict[str, Any]]] = collections.deque()
        self._directory.mkdir(parents=True, exist_ok=True)
        if self._first:
            manifest.remove_unfinished(self._directory)
        _agreed("")  # on object stores what is cut short looks like a step until it is removed
        self._writer = self._open_writer()
        self._found_good: dict[int, bool] = {}
        self._pool = concurrent.futures.ThreadPoolExecutor(1)
        self._saving: concurrent.futures.Future | None = None
        self._being_saved: tuple[int, Callable[[], dict[str, int]]] | None = None  # the step, and what waits for its checksums

    def _open_writer(self) -> ocp.AsyncCheckpointer:
        options = ocp.options.AsyncOptions(post_finalization_callback=self._sign)
        return ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler(), async_options=options)

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def latest_step(self) -> int | None:
        steps = self.saved_steps()
        return steps[-1] if steps else None

    def saved_steps(self) -> list[int]:
        """The steps that are there, good or not."""
        return manifest.saved_steps(self._directory)

    def events(self) -> list[tuple[str, int, dict[str, Any]]]:
        """What happened since the last call, as the ledger's (event, step, details): saved, quarantined, alarm (disk full)."""
        return [self._events.popleft() for _ in range(len(self._events))]

    def prepare(self, state: TrainState, averaged: Any = None) -> None:
        """Compiles what the first save needs; give it what `save` will be given."""
        arrays = _arrays(state, averaged)
        jax.block_until_ready(_copies(arrays))
        checksums(arrays)

    def save(self, state: TrainState, data: Mapping[str, Any], averaged: Any = None) -> None:
        """Begins to copy the state off the devices, and writes in the background; a step already there is left alone.

        Waits for the save before, if that isn't done. A full disk is no error: see `events`. In a job of several processes a
        disk is full that hasn't room for all arrays; where it fills up while they write, `Interrupted` is raised by one of
        them, as soon as it waits for the save: the others, in Orbax's barriers, can't be told but by its leaving the job.
        `averaged`: the parameters to evaluate, sample and export, where they aren't state.params.
        """
        step = int(state.step)  # the devices have finished it: what blocks from here on is the save
        began = time.monotonic()
        self.wait()
        place = self._directory / str(step)
        if place.exists():
            return
        arrays = _arrays(state, averaged)
        if jax.process_count() > 1 and _agreed("" if self._has_room(arrays) else "full"):
            self._note_full(step)
            return
        meta = {"schema": SCHEMA_VERSION, "step": step, "params": describe_arrays(state.params)}
        meta |= {} if averaged is None else {"averaged": describe_arrays(averaged)}
        self._being_saved = step, begin_checksums(arrays)
        copies = _copies(arrays)

        def write() -> None:
            items = {name: ocp.args.StandardSave(tree, save_args=_chunks(tree) if name in EXPORTED else None)
                     for name, tree in copies.items()}
            items |= {"data": ocp.args.JsonSave(dict(data)), "meta": ocp.args.JsonSave(meta)}
            self._writer.save(place, args=ocp.args.Composite(**items))

        if jax.process_count() > 1:  # its barriers are collectives, which other threads must not start
            try:
                write()
            except (OSError, ValueError) as error:
                self._give_up(step, error)
                return
        self._saving = self._pool.submit(self._finish, step, began, time.monotonic() - began,
                                         None if jax.process_count() > 1 else write)

    def _sign(self) -> None:
        """Orbax calls it in the background on the first process: all is written, and the step hasn't got its name yet."""
        step, arrays = self._being_saved
        manifest.write_manifest(manifest.written_directory(self._directory, step), step, arrays())

    def _finish(self, step: int, began: float, blocked: float, write: Callable[[], None] | None) -> None:
        """In the background: the step is written and becomes complete, then older ones may go."""
        try:
            if write:
                write()
            self._writer.wait_until_finished()
            if self._first:
                manifest.complete_manifest(self._directory / str(step), step)
                self._found_good[step] = True  # it was just read
                for old in steps_to_delete(self.saved_steps(), self._good, self._config, self._average):
                    manifest.delete_step(self._directory, old)
        except (OSError, ValueError) as error:
            self._give_up(step, error)
        else:
            seconds = {"seconds": round(time.monotonic() - began, 4), "blocked_seconds": round(blocked, 4)}
            self._events.append(("saved", step, seconds))
        ocp.multihost.get_barrier_sync_fn()(key=f"checkpoint_{next(_FINISHED)}", timeout_ms=1000 * FINISH_SECONDS)

    def _good(self, step: int) -> bool:
        """For `steps_to_delete`. The step before the newest is read again at each save, the others once in a launch."""
        if step not in self._found_good or step in self.saved_steps()[-2:-1]:
            try:
                check_step(self._directory / str(step), step)
                self._found_good[step] = True
            except BrokenStep as error:
                logging.warning("%s", error)
                self._found_good[step] = False
        return self._found_good[step]

    def _give_up(self, step: int, error: Exception) -> None:
        """The disk is full: removes the half-written step and says so. Raises `error` where it is another one."""
        if not is_full(error):
            raise error
        if jax.process_count() > 1:
            raise Interrupted("the disk is full; make room, and the same command goes on from the last checkpoint") from error
        self._writer = self._open_writer()  # the old one would raise this again
        if self._first:
            manifest.remove_unfinished(self._directory)
        self._note_full(step)

    def _has_room(self, arrays: Any) -> bool:
        """For all of them, from every process: they share this directory. (Object stores have.)"""
        size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(arrays))
        return is_remote(self._directory) or shutil.disk_usage(self._directory).free > size

    def _note_full(self, step: int) -> None:
        last = self.latest_step()  # the step itself, if there was just room for it
        lost = "" if last == step else f"step {step} isn't saved, "
        reason = f"the disk is full: {lost}{'nothing' if last is None else last} is the last that is"
        logging.warning("%s", reason)
        self._events.append(("alarm", step, {"reason": reason}))

    def restore(self, abstract: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The newest good state, laid out like `abstract`, and what was saved as `data`; those passed over go to quarantine.

        Raises:
          InputError: the checkpoint's parameters have other names or shapes; or no step is good: none is moved then.
        """
        self.wait()
        refused: dict[int, str] = {}
        for saved in reversed(self.saved_steps()):
            try:
                restored = self.restore_step(abstract, saved)
                break
            except BrokenStep as error:
                refused[saved] = error.flaw
        else:
            flaws = "; ".join(f"step {saved}, {flaw}" for saved, flaw in refused.items()) or "there is none"
            raise InputError("checkpoint", f"no step in {self._directory} is good: {flaws}",
                             "restore one from a copy, or move the directory away to begin at step 0")
        self.quarantine(refused)
        return restored

    def restore_step(self, abstract: TrainState, step: int) -> tuple[TrainState, dict[str, Any]]:
        """As `restore`, of this step. Raises BrokenStep."""
        self.wait()
        try:
            self._check(step)
            return load_step(self._writer, self._directory / str(step), abstract, step)
        except BrokenStep as error:
            logging.warning("%s", error)
            raise

    def quarantine(self, flaws: Mapping[int, str]) -> None:
        """Moves these steps to checkpoints/quarantine/; `flaws`: what is wrong with each."""
        for step, flaw in flaws.items():
            if self._first:
                manifest.quarantine(self._directory, step)
            self._events.append(("quarantined", step, {"reason": flaw}))
        _agreed("")  # no process goes on before they are moved

    def delete_after(self, step: int) -> None:
        """Deletes what was saved after `step`: of a past that the run leaves behind."""
        self.wait()
        if self._first:
            for later in [saved for saved in self.saved_steps() if saved > step]:
                manifest.delete_step(self._directory, later)
        _agreed("")

    def good_steps(self) -> list[int]:
        """Those of the saved steps whose parameters `restore_params` would return."""
        self.wait()
        return [step for step in self.saved_steps() if not self._flaw(step, ("params", "meta"))]

    def restore_params(self, abstract: Any, step: int) -> Any:
        """The trained parameters alone, laid out like `abstract`. Raises BrokenStep."""
        self.wait()
        self._check(step, ("params", "meta"))
        args = ocp.args.Composite(params=ocp.args.StandardRestore(abstract))
        params = self._writer.restore(self._directory / str(step), args=args)["params"]
        verify({"params": params}, manifest.read_manifest(self._directory / str(step), step), step)
        return params

    def _flaw(self, step: int, items: tuple[str, ...] = ()) -> str:
        """What is wrong with a step, as the first process finds, on all; nothing where it is good."""
        flaw = ""
        try:
            if self._first:
                check_step(self._directory / str(step), step, items=items)
        except BrokenStep as error:
            flaw = error.flaw
        return _agreed(flaw)

    def _check(self, step: int, items: tuple[str, ...] = ()) -> None:
        if flaw := self._flaw(step, items):
            raise BrokenStep(step, flaw)

    def wait(self) -> None:
        """Until the save in the background is done; raises what went wrong in it, but for a full disk."""
        saving, self._saving = self._saving, None
        if saving:
            saving.result()

    def close(self) -> None:
        try:
            self.wait()
        finally:
            self._pool.shutdown()
            self._writer.close()


def _chunks(tree: Any) -> Any:
    """How Orbax cuts the arrays: those of all layers of a stage one layer a chunk, so that an export can read it alone.

    Layers below LAYER_CHUNK bytes stay together: a chunk has a cost, and all of them are little memory."""
    def of(path: tuple[Any, ...], x: Any) -> ocp.SaveArgs:
        stacked = any(str(getattr(key, "key", "")).startswith("stage_") for key in path) and x.ndim > 1
        return ocp.SaveArgs(shard_axes=(0,) if stacked and x.nbytes // x.shape[0] >= LAYER_CHUNK else ())
    return jax.tree_util.tree_map_with_path(of, tree)


def _arrays(state: TrainState, averaged: Any) -> dict[str, Any]:
    arrays = {"params": state.params, "optimizer": state.optimizer, "keys": {"root": state.key}}
    return arrays | ({} if averaged is None else {"averaged": averaged})


@jax.jit
def _copies_beside(arrays: dict[str, Any]) -> dict[str, Any]:
    return jax.tree.map(jnp.copy, arrays)


def _copies(arrays: dict[str, Any]) -> dict[str, Any]:
    """Copies for the host, begun and not waited for; the next step, which reuses the arrays' memory, waits on the devices."""
    if jax.default_backend() == "cpu":
        return _copies_beside(arrays)
    return jax.device_put(arrays, jax.tree.map(lambda x: x.sharding.with_memory_kind("pinned_host"), arrays))


def _agreed(words: str) -> str:
    """The first process's `words`, on all of them (at most 1,000 bytes)."""
    if jax.process_count() == 1:
        return words
    sent = np.zeros(1000, np.uint8)
    data = np.frombuffer(words.encode()[:1000], np.uint8)
    sent[:len(data)] = data
    return bytes(multihost_utils.broadcast_one_to_all(sent)).rstrip(b"\0").decode(errors="replace")
