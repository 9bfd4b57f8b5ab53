"""Optimizers and schedules: two tables. Each optimizer is a pure optax pair; masks and groups come from the weights' roles."""

import math
from typing import Callable, Mapping

import optax

from research.config import nearest
from research.errors import InputError
from research.params import Weight, unflatten
from research.schema import OptimConfig

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


SCHEDULES = {"constant": constant, "linear": linear, "cosine": cosine, "wsd": wsd}


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


def adamw(config: OptimConfig, schedule: Schedule, weights: Mapping[str, Weight]) -> optax.GradientTransformation:
    """Loshchilov and Hutter 2019; the decay is multiplied by the learning rate."""
    return optax.adamw(schedule, b1=config.b1, b2=config.b2, eps=config.eps, weight_decay=config.weight_decay,
                       mask=decay_mask(weights))


def sgd(config: OptimConfig, schedule: Schedule, weights: Mapping[str, Weight]) -> optax.GradientTransformation:
    """Heavy-ball momentum b1 (0: none); weight decay decoupled, as in adamw."""
    decay = optax.add_decayed_weights(config.weight_decay, mask=decay_mask(weights))
    momentum = [optax.trace(decay=config.b1)] if config.b1 else []
    return optax.chain(*momentum, decay, optax.scale_by_learning_rate(schedule))


OPTIMIZERS = {"adamw": adamw, "sgd": sgd}


def make_optimizer(config: OptimConfig, steps: int, weights: Mapping[str, Weight]) -> optax.GradientTransformation:
    """The named optimizer. Clipping is done before, by the step, which measures the norm anyway."""
    if config.name not in OPTIMIZERS:
        raise InputError("optim.name", f"unknown {config.name!r}", nearest(config.name, list(OPTIMIZERS)))
    return OPTIMIZERS[config.name](config, make_schedule(config, steps), weights)
