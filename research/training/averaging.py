"""Averages of the parameters: an exponential moving one in the state, and the mean of the last checkpoints."""

from typing import Any, Callable, Sequence

import jax
import jax.numpy as jnp

from research.errors import InputError
from research.schema import Config
from research.training.optimizers import OPTIMIZERS


def check_averages(config: Config) -> None:
    """Raises InputError where the averages asked for can't be made."""
    train, every = config.train, config.checkpoint.every_steps
    if config.optim.name in OPTIMIZERS and OPTIMIZERS[config.optim.name].evaluated:
        for field in ("ema", "average"):
            if getattr(train, field):
                raise InputError(f"train.{field}", f"is {getattr(train, field)}, but {config.optim.name} averages already",
                                 f"set train.{field}=0")
    if train.average and not every:
        raise InputError("train.average", "needs checkpoints at known steps", "set checkpoint.every_steps")
    if train.average and len(due_steps(train.steps, every)) < train.average:
        raise InputError("train.average", f"{train.average} checkpoints are more than the {len(due_steps(train.steps, every))}"
                         f" that checkpoint.every_steps={every} makes in {train.steps} steps", "average or save otherwise")


def due_steps(last: int, every: int) -> list[int]:
    """The steps at which a run that ends with `last` saves by the count of steps, the last one included."""
    return [*range(every, last, every), last]


def averaged_steps(saved: Sequence[int], every: int, count: int) -> list[int]:
    """Of the `saved` steps, the last `count` that are due; those saved by the clock or on a stop don't enter."""
    due = [step for step in sorted(saved) if step % every == 0 or step == max(saved)]
    return due[-count:]


def start_ema(params: Any) -> Any:
    """The average of nothing but `params`: float32 copies, as small weights on new values vanish in bfloat16."""
    return jax.tree.map(lambda p: jnp.array(p, jnp.float32, copy=True), params)


def update_ema(ema: Any, params: Any, decay: float, step: jax.Array) -> Any:
    """ema += (1 - d) * (params - ema) with d = min(decay, (1 + step) / (10 + step)), so that the random start is soon
    forgotten (the correction of TensorFlow's ExponentialMovingAverage); `step` counts from 0."""
    step = step.astype(jnp.float32)
    rate = 1.0 - jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda e, p: e + rate * (p.astype(jnp.float32) - e), ema, params)


def averages(config: Config) -> bool:
    """Whether what is evaluated isn't what is trained."""
    return bool(config.train.ema) or OPTIMIZERS[config.optim.name].evaluated is not None


def evaluation_params(config: Config, shardings: Any) -> Callable[[Any], Any]:
    """state -> the parameters to evaluate, sample and export: its EMA where it has one, schedule-free's x, else the trained.

    `shardings`: those of the parameters, for what has to be computed.
    """
    evaluated = OPTIMIZERS[config.optim.name].evaluated
    if config.train.ema:
        return lambda state: state.ema
    if evaluated is None:
        return lambda state: state.params
    jitted = jax.jit(evaluated, out_shardings=shardings)
    return lambda state: jitted(state.optimizer, state.params)


def mean_of(load: Callable[[int], Any], steps: Sequence[int]) -> Any:
    """The mean over `steps` of `load(step)`, one at a time: two copies in memory, sums in float32."""
    add = jax.jit(lambda mean, params, n: jax.tree.map(lambda m, p: m + (p.astype(jnp.float32) - m) / n, mean, params),
                  donate_argnums=0)
    mean = jax.jit(start_ema)(load(steps[0]))
    for number, step in enumerate(steps[1:], start=2):
        mean = add(mean, load(step), number)
    return mean
