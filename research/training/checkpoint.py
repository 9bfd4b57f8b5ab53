"""Checkpoints: one atomic Orbax composite a step, written in the background.

checkpoints/STEP/ holds params, optimizer, keys (arrays), data (the sample index, what is skipped, the guard's memory) and meta
(schema, step, weights, a checksum for every array, verified when it is read); where what is evaluated isn't what is
trained (an EMA, schedule-free's average), `averaged` has those parameters.
"""

import dataclasses
from typing import Any, Mapping, Sequence

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from orbax.checkpoint import checkpoint_managers as policy

from research.errors import InputError
from research.params import flatten, unflatten
from research.schema import CHECKPOINTS, SCHEMA_VERSION, CheckpointConfig
from research.training.averaging import averaged_steps
from research.training.checksums import checksums
from research.training.state import TrainState

ITEMS = ("params", "optimizer", "keys", "data", "meta", "averaged")


def describe_arrays(params: Any) -> dict[str, list]:
    """Path -> [shape, dtype], for meta and for saying what doesn't fit."""
    return {path: [list(x.shape), str(jnp.dtype(x.dtype))] for path, x in flatten(params).items()}


@dataclasses.dataclass(frozen=True)
class KeepForAverage:
    """Keeps the checkpoints that `averaged_steps` would take now. It serves Orbax as a preservation policy."""

    every: int
    count: int

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        wanted = averaged_steps([info.step for info in checkpoints], self.every, self.count)
        return [info.step in wanted for info in checkpoints]


class Checkpointer:
    """Saves and restores a run's state under `workdir`/checkpoints. Call `close` (or use `with`) to finish writing.

    `average`: so many of the last checkpoints that `config.every_steps` makes are kept besides, to be averaged.
    """

    def __init__(self, workdir: epath.Path, config: CheckpointConfig, average: int = 0):
        directory = epath.Path(workdir).absolute() / CHECKPOINTS
        policies = [policy.LatestN(config.keep_last)]
        policies += [policy.EveryNSteps(config.keep_every)] if config.keep_every else []
        policies += [KeepForAverage(config.every_steps, average)] if average else []
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policy.AnyPreservationPolicy(policies), create=True,
            cleanup_tmp_directories=True, enable_async_checkpointing=True)
        self._manager = ocp.CheckpointManager(directory, options=options, item_names=ITEMS)

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def saved_steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def delete_after(self, step: int) -> None:
        """Deletes what was saved after `step`: of a past that the run leaves behind."""
        for later in [saved for saved in self.saved_steps() if saved > step]:
            self._manager.delete(later)

    def save(self, state: TrainState, data: Mapping[str, Any], averaged: Any = None) -> None:
        """Copies the state off the devices, then writes in the background; a step already there is left alone.

        `averaged`: the parameters to evaluate, sample and export, where they aren't state.params.
        """
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        arrays = {"params": state.params, "optimizer": state.optimizer, "keys": {"root": state.key}}
        arrays |= {} if averaged is None else {"averaged": averaged}
        meta = {"schema": SCHEMA_VERSION, "step": step, "params": describe_arrays(state.params), "checksums": checksums(arrays)}
        items = {"params": ocp.args.StandardSave(state.params), "optimizer": ocp.args.StandardSave(state.optimizer),
                 "keys": ocp.args.StandardSave({"root": state.key}), "data": ocp.args.JsonSave(dict(data))}
        if averaged is not None:
            meta["averaged"] = describe_arrays(averaged)
            items["averaged"] = ocp.args.StandardSave(averaged)
        self._manager.save(step, args=ocp.args.Composite(**items, meta=ocp.args.JsonSave(meta)))

    def restore(self, abstract: TrainState, step: int | None = None) -> tuple[TrainState, dict[str, Any]]:
        """The state saved at `step` (default: the latest), laid out like `abstract`, and the data position.

        Raises:
          InputError: the checkpoint's parameters have other names or shapes.
        """
        step = self._manager.latest_step() if step is None else step
        meta = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
        _same_arrays(meta["params"], describe_arrays(abstract.params))
        items = {"params": ocp.args.StandardRestore(abstract.params), "optimizer": ocp.args.StandardRestore(abstract.optimizer),
                 "keys": ocp.args.StandardRestore({"root": abstract.key}), "data": ocp.args.JsonRestore()}
        if abstract.ema is not None:
            items["averaged"] = ocp.args.StandardRestore(abstract.ema)
        saved = self._manager.restore(step, args=ocp.args.Composite(**items))
        _verify({name: saved[name] for name in items if name != "data"}, meta, step)
        step_array = jax.device_put(jnp.int32(step), abstract.step.sharding)
        ema = None if abstract.ema is None else saved["averaged"]
        return TrainState(step_array, saved["params"], saved["optimizer"], saved["keys"]["root"], ema), saved["data"]

    def restore_params(self, abstract: Any, step: int) -> Any:
        """The trained parameters alone, laid out like `abstract`."""
        args = ocp.args.Composite(params=ocp.args.StandardRestore(abstract), meta=ocp.args.JsonRestore())
        saved = self._manager.restore(step, args=args)
        _verify({"params": saved["params"]}, saved["meta"], step)
        return saved["params"]

    def wait(self) -> None:
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.wait_until_finished()
        self._manager.close()


def _verify(arrays: Mapping[str, Any], meta: Mapping[str, Any], step: int) -> None:
    """Raises InputError, by name, for an array that isn't what was saved."""
    for path, value in checksums(arrays).items():
        if path not in meta["checksums"] or meta["checksums"][path] != value:
            raise InputError("checkpoint", f"{path} of step {step} doesn't have the checksum it was saved with",
                             f"move {CHECKPOINTS}/{step} away to go on from the step before it")


def _same_arrays(found: Mapping[str, list], wanted: Mapping[str, list]) -> None:
    for path in wanted:
        if path not in found:
            raise InputError("checkpoint", f"has no {path}", "resume with the config it was made with")
        if found[path] != wanted[path]:
            raise InputError("checkpoint", f"{path} is {_words(found[path])}, the model wants {_words(wanted[path])}",
                             "resume with the config it was made with")
    extra = [path for path in found if path not in wanted]
    if extra:
        raise InputError("checkpoint", f"holds {extra[0]}, which the model has not", "resume with the config it was made with")


def _words(entry: list) -> str:
    return f"{entry[1]}{entry[0]}"


def load_params(workdir: str | epath.Path, abstract: Any | None = None, step: int | None = None, *,
                field: str = "--workdir") -> tuple[dict, int]:
    """The parameters alone of a run's checkpoint (the latest by default) and its step; laid out like `abstract` if given.

    Where the run averages (an EMA, schedule-free), they are the averaged ones, in the dtype of the trained.

    Raises:
      InputError: no checkpoint there, or arrays of another shape.
    """
    directory = epath.Path(workdir).absolute() / CHECKPOINTS
    steps = sorted(int(p.name) for p in directory.iterdir() if p.name.isdigit()) if directory.exists() else []
    if not steps or (step is not None and step not in steps):
        found = ", ".join(map(str, steps)) or "none"
        raise InputError(field, f"{workdir} has no checkpoint{'' if step is None else f' of step {step}'} (found: {found})",
                         "train there first, or name another run")
    step = steps[-1] if step is None else step
    with ocp.CheckpointManager(directory, item_names=ITEMS, options=ocp.CheckpointManagerOptions(read_only=True)) as manager:
        meta = manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
        if abstract is None:
            device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
            abstract = unflatten({path: jax.ShapeDtypeStruct(tuple(shape), jnp.dtype(dtype), sharding=device)
                                  for path, (shape, dtype) in meta["params"].items()})
        else:
            _same_arrays(meta["params"], describe_arrays(abstract))
        item = "averaged" if "averaged" in meta else "params"
        args = ocp.args.Composite(**{item: ocp.args.StandardRestore(abstract)})  # casts to the dtype of `abstract`
        found = manager.restore(step, args=args)[item]
        if meta[item] == describe_arrays(abstract):  # else the checksums are of the dtype before the cast
            _verify({item: found}, meta, step)
        return found, step


def initialise_from(workdir: str, params: Any) -> Any:
    """`params` with those that the run at `workdir` also has (same path and shape) replaced; logs what isn't found there."""
    found, step = load_params(workdir, field="train.init_from")
    ours, theirs = flatten(params), flatten(found)
    taken = {path for path in ours if path in theirs and theirs[path].shape == ours[path].shape}
    if not taken:
        raise InputError("train.init_from", f"{workdir} shares no parameter with this model", "choose a run of this family")
    for path in sorted(set(ours) - taken):
        why = f"has shape {theirs[path].shape} there" if path in theirs else "isn't there"
        logging.warning("init_from %s: %s %s; it keeps its fresh values", workdir, path, why)
    for path in sorted(set(theirs) - set(ours)):
        logging.warning("init_from %s: %s is not used by this model", workdir, path)
    logging.info("init_from %s: %d of %d weights of step %d", workdir, len(taken), len(ours), step)
    return unflatten({path: jax.device_put(theirs[path].astype(x.dtype), x.sharding) if path in taken else x
                      for path, x in ours.items()})
