"""Reading what was saved: the whole state, or the parameters alone, of this run or another; each array is checked."""

from typing import Any, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath

from research.errors import InputError
from research.params import flatten, unflatten
from research.schema import CHECKPOINTS
from research.training import manifest
from research.training.checksums import checksums
from research.training.manifest import BrokenStep, check_step
from research.training.state import TrainState


def describe_arrays(params: Any) -> dict[str, list]:
    """Path -> [shape, dtype], for meta and for saying what doesn't fit."""
    return {path: [list(x.shape), str(jnp.dtype(x.dtype))] for path, x in flatten(params).items()}


def load_step(reader: Any, place: epath.Path, abstract: TrainState, step: int) -> tuple[TrainState, dict[str, Any]]:
    """The state and `data` of the step at `place`. Raises BrokenStep; InputError where the parameters differ."""
    meta = reader.restore(place, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
    _same_arrays(meta["params"], describe_arrays(abstract.params))
    items = {"params": ocp.args.StandardRestore(abstract.params), "optimizer": ocp.args.StandardRestore(abstract.optimizer),
             "keys": ocp.args.StandardRestore({"root": abstract.key}), "data": ocp.args.JsonRestore()}
    if abstract.ema is not None:
        items["averaged"] = ocp.args.StandardRestore(abstract.ema)
    saved = reader.restore(place, args=ocp.args.Composite(**items))
    verify({name: saved[name] for name in items if name != "data"}, manifest.read_manifest(place, step), step)
    step_array = jax.device_put(jnp.int32(step), abstract.step.sharding)
    ema = None if abstract.ema is None else saved["averaged"]
    return TrainState(step_array, saved["params"], saved["optimizer"], saved["keys"]["root"], ema), saved["data"]


def load_state(run_at_step: str, abstract: TrainState) -> tuple[TrainState, dict[str, Any]]:
    """The whole state of another run, `RUN@STEP`, and what was saved as `data`; nothing is moved or changed there.

    Raises:
      InputError: not RUN@STEP, no such checkpoint, other parameters; BrokenStep: the step isn't what was saved.
    """
    run, at, number = run_at_step.rpartition("@")
    if not at or not number.isdigit():
        raise InputError("train.branch_from", f"{run_at_step!r} is not RUN@STEP", "e.g. runs/trunk@1000")
    step = checkpoint_step(run, int(number), "train.branch_from")
    place = epath.Path(run).absolute() / CHECKPOINTS / number
    check_step(place, step)
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
        return load_step(reader, place, abstract, step)


def verify(arrays: Mapping[str, Any], signed: Mapping[str, Any], step: int) -> None:
    """Raises BrokenStep, by name, for an array that isn't what was saved."""
    for path, value in checksums(arrays).items():
        if path not in signed["arrays"] or signed["arrays"][path] != value:
            raise BrokenStep(step, f"{path} doesn't have the checksum it was saved with")


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


def checkpoint_step(workdir: str | epath.Path, step: int | None, field: str) -> int:
    """`step`, else the latest, if `workdir` has a checkpoint of it; InputError names those that it has."""
    directory = epath.Path(workdir).absolute() / CHECKPOINTS
    steps = manifest.saved_steps(directory)
    if not steps or (step is not None and step not in steps):
        found = ", ".join(map(str, steps)) or "none"
        raise InputError(field, f"{workdir} has no checkpoint{'' if step is None else f' of step {step}'} (found: {found})",
                         "train there first, or name another run")
    return steps[-1] if step is None else step


def load_params(workdir: str | epath.Path, abstract: Any | None = None, step: int | None = None, *,
                places: Mapping[str, jax.Array] | None = None, field: str = "--workdir") -> tuple[dict, int]:
    """The parameters alone of a run's checkpoint (the latest by default) and its step; laid out like `abstract` if given.

    Else they go to the first device; with `places`, those that it has (by path and shape) go where it has them, and the
    others to the host, as numpy's arrays, unchecked.

    Where the run averages (an EMA, schedule-free), they are the averaged ones, in the dtype of the trained.

    Nothing is moved or changed there.

    Raises:
      InputError: no checkpoint there, or arrays of another shape; BrokenStep, which is one: the step isn't what was saved.
    """
    step = checkpoint_step(workdir, step, field)
    directory = epath.Path(workdir).absolute() / CHECKPOINTS
    place = directory / str(step)
    signed = check_step(place, step, items=("params", "averaged", "meta"))
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
        meta = reader.restore(place, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
        if abstract is None:
            abstract = unflatten({path: _placed(path, tuple(shape), jnp.dtype(dtype), places)
                                  for path, (shape, dtype) in meta["params"].items()})
        else:
            _same_arrays(meta["params"], describe_arrays(abstract))
        item = "averaged" if "averaged" in meta else "params"
        args = ocp.args.Composite(**{item: ocp.args.StandardRestore(abstract)})  # casts to the dtype of `abstract`
        found = reader.restore(place, args=args)[item]
    if meta[item] == describe_arrays(abstract):  # else the checksums are of the dtype before the cast
        on_devices = {path: x for path, x in flatten(found).items() if isinstance(x, jax.Array)}
        verify({item: on_devices}, signed, step)
    return found, step


def _placed(path: str, shape: tuple[int, ...], dtype: jnp.dtype, places: Mapping[str, jax.Array] | None) -> Any:
    """What Orbax is to restore an array as."""
    if places is None:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    if path in places and places[path].shape == shape:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=places[path].sharding)
    return np.broadcast_to(np.zeros((), dtype), shape)  # of no memory


def initialise_from(workdir: str, params: Any) -> Any:
    """`params` with those that the run at `workdir` also has (same path and shape) replaced; logs what isn't found there."""
    ours = flatten(params)
    found, step = load_params(workdir, places=ours, field="train.init_from")
    theirs = flatten(found)
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
