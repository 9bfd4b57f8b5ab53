"""Optimizers and schedules: two tables. Each optimizer is a pure optax pair; masks and groups come from the weights' roles."""

import math
from typing import Any, Callable, Mapping, NamedTuple

import jax
import jax.numpy as jnp
import optax

from research.config import nearest
from research.errors import InputError
from research.params import Weight, unflatten
from research.schema import OptimConfig
from research.training.adafactor import scale_by_factored_moment
from research.training.muon import muon_direction

Schedule = Callable[[int], float]  # step -> learning rate


def _final(config: OptimConfig, steps: int) -> int:
    """Steps after the warm-up over which the rate falls: all of them, or decay_steps."""
    return config.decay_steps or max(steps - config.warmup_steps, 1)


def constant(config: OptimConfig, steps: int) -> Schedule:
    return optax.constant_schedule(config.lr)


def linear(config: OptimConfig, steps: int) -> Schedule:
    """To zero at the last step."""
    return optax.linear_schedule(config.lr, 0.0, _final(config, steps))


def cosine(config: OptimConfig, steps: int) -> Schedule:
    """To a tenth of the peak, as Hoffmann et al. 2022."""
    return optax.cosine_decay_schedule(config.lr, _final(config, steps), alpha=0.1)


def wsd(config: OptimConfig, steps: int) -> Schedule:
    """Warm-up, stable, then linearly to zero over the last decay_steps (0: a fifth of the run). Hu et al. 2024."""
    decay = min(config.decay_steps or math.ceil(steps / 5), steps)
    stable = max(steps - config.warmup_steps - decay, 0)
    parts = [optax.constant_schedule(config.lr), optax.linear_schedule(config.lr, 0.0, decay)]
    return optax.join_schedules(parts, [stable])


def rsqrt(config: OptimConfig, steps: int) -> Schedule:
    """lr * sqrt(t / (t + step)) after the warm-up, t = decay_steps, or 0: warmup_steps (Vaswani et al. 2017, section 5.3)."""
    scale = config.decay_steps or max(config.warmup_steps, 1)
    return lambda step: config.lr * jnp.sqrt(scale / (scale + jnp.maximum(step, 0)))


SCHEDULES = {"constant": constant, "linear": linear, "cosine": cosine, "wsd": wsd, "rsqrt": rsqrt}


def make_schedule(config: OptimConfig, steps: int) -> Schedule:
    """Linear warm-up from lr / warmup_steps to the peak, then the named schedule."""
    main = SCHEDULES[config.schedule](config, steps)
    if not config.warmup_steps:
        return main
    warmup = optax.linear_schedule(config.lr / config.warmup_steps, config.lr, max(config.warmup_steps - 1, 1))
    return optax.join_schedules([warmup, main], [config.warmup_steps])


def decay_mask(weights: Mapping[str, Weight]) -> dict:
    """True for the weights that decay: all but vectors (biases, gains, ...)."""
    return unflatten({path: weight.role != "vector" for path, weight in weights.items()})


def lr_factors(config: OptimConfig, weights: Mapping[str, Weight]) -> dict[str, float]:
    """Path -> factor on the learning rate, by role; a tied embedding has both of its roles'."""
    by_role = {"hidden": 1.0, "input": config.role_lr.input, "output": config.role_lr.output, "vector": config.role_lr.vector}
    return {path: math.prod(by_role[role] for role in weight.role.split("+")) for path, weight in weights.items()}


def descend(direction: optax.GradientTransformation, config: OptimConfig, schedule: Schedule,
            weights: Mapping[str, Weight]) -> optax.GradientTransformation:
    """params -= schedule * factor of the role * (direction + weight_decay * params): what every row ends with.

    The decay is decoupled (Loshchilov and Hutter 2019) and, as theirs in PyTorch, multiplied by the learning rate.
    """
    factors = lr_factors(config, weights)
    parts = [direction, optax.add_decayed_weights(config.weight_decay, mask=decay_mask(weights))]
    if set(factors.values()) - {1.0}:
        tree = unflatten(factors)
        parts.append(optax.stateless(lambda updates, _: jax.tree.map(lambda u, factor: u * factor, updates, tree)))
    return optax.chain(*parts, optax.scale_by_learning_rate(schedule))


def adamw(config: OptimConfig, schedule: Schedule, weights: Mapping[str, Weight]) -> optax.GradientTransformation:
    """Loshchilov and Hutter 2019."""
    return descend(optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps), config, schedule, weights)


def sgd(config: OptimConfig, schedule: Schedule, weights: Mapping[str, Weight]) -> optax.GradientTransformation:
    """Heavy-ball momentum b1 (0: none)."""
    momentum = optax.trace(decay=config.b1) if config.b1 else optax.identity()
    return descend(momentum, config, schedule, weights)


def lion(config: OptimConfig, schedule: Schedule, weights: Mapping[str, Weight]) -> optax.GradientTransformation:
    """Chen et al. 2023: the sign of an interpolated momentum. Its lr is 3-10 times smaller than AdamW's, its decay larger by
    the same factor; the paper has b2 = 0.99, and 0.98 for language models."""
    return descend(optax.scale_by_lion(b1=config.b1, b2=config.b2), config, schedule, weights)


def adafactor(config: OptimConfig, schedule: Schedule, weights: Mapping[str, Weight]) -> optax.GradientTransformation:
    """Factored second moments, then momentum b1 (0: none, which is what saves the memory); lr as AdamW's."""
    momentum = optax.ema(config.b1, debias=True) if config.b1 else optax.identity()
    return descend(optax.chain(scale_by_factored_moment(weights, config.b2), momentum), config, schedule, weights)


def muon(config: OptimConfig, schedule: Schedule, weights: Mapping[str, Weight]) -> optax.GradientTransformation:
    """Orthogonalised momentum for hidden matrices, AdamW (b1, b2, eps) for the rest; lr and weight decay as AdamW's."""
    return descend(muon_direction(config, weights), config, schedule, weights)


def schedule_free(config: OptimConfig, schedule: Schedule, weights: Mapping[str, Weight]) -> optax.GradientTransformation:
    """Schedule-free AdamW (Defazio et al. 2024): gradients at y = b1 x + (1 - b1) z, where z takes Adam's steps without
    momentum and x is the average of z, weighted by the squared learning rate. The parameters trained are y; what is
    evaluated is x (`evaluated`).

    Raises:
      InputError: a schedule that falls (the average stands for it), or b1 = 0.
    """
    if config.schedule != "constant":
        raise InputError("optim.schedule", f"is {config.schedule!r}, but schedule_free has none after the warm-up",
                         "set optim.schedule=constant")
    if not config.b1:
        raise InputError("optim.b1", "is 0, but schedule_free interpolates by it", "set optim.b1=0.9")
    second_moment = optax.scale_by_rms(decay=config.b2, eps=config.eps, eps_in_sqrt=False, bias_correction=True)
    # optax counts the averaging's steps from one, the descent's from zero.
    return optax.contrib.schedule_free(descend(second_moment, config, schedule, weights),
                                       lambda count: schedule(count - 1), b1=config.b1)


def _move_iterate(state: Any, before: Any, after: Any) -> Any:
    """z goes along with y, and so does the x between them."""
    return state._replace(z=jax.tree.map(lambda z, b, a: z + (a - b), state.z, before, after))


class Row(NamedTuple):
    """`make` -> the optimizer. `evaluated` (optimizer state, params) -> the parameters that evaluation and sampling use,
    where they aren't the trained ones. `moved` (optimizer state, params before, after) -> the state after parameters were
    changed by something else (a balancing bias by its statistics), where it holds copies of them."""

    make: Callable[[OptimConfig, Schedule, Mapping[str, Weight]], optax.GradientTransformation]
    evaluated: Callable[[optax.OptState, Any], Any] | None = None
    moved: Callable[[optax.OptState, Any, Any], optax.OptState] | None = None


OPTIMIZERS = {
    "adamw": Row(adamw),
    "sgd": Row(sgd),
    "lion": Row(lion),
    "adafactor": Row(adafactor),
    "muon": Row(muon),
    "schedule_free": Row(schedule_free, optax.contrib.schedule_free_eval_params, _move_iterate),
}


def make_optimizer(config: OptimConfig, steps: int, weights: Mapping[str, Weight]) -> optax.GradientTransformation:
    """The named optimizer. Clipping is done before, by the step, which measures the norm anyway."""
    if config.name not in OPTIMIZERS:
        raise InputError("optim.name", f"unknown {config.name!r}", nearest(config.name, list(OPTIMIZERS)))
    return OPTIMIZERS[config.name].make(config, make_schedule(config, steps), weights)
