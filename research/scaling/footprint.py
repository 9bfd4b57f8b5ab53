"""How many bytes a model takes to train and to serve, and what serving it costs. Formulas: docs/planning.md."""

import dataclasses
import math
from typing import Any, Mapping

import jax

from research.models.lm import LanguageModel
from research.schema import Config
from research.training.objectives import objective_named
from research.training.optimizers import make_optimizer
from research.training.program import BATCH_FIELDS

FLOAT32 = 4  # bytes


@dataclasses.dataclass(frozen=True)
class Range:
    """A figure that isn't known exactly: its middle, and between what it lies."""

    value: float
    low: float
    high: float

    @classmethod
    def point(cls, value: float) -> "Range":
        return cls(value, value, value)


FOUR_BITS = Range(4.0, 4.0, 4.25)  # high: with a 16-bit scale for each 64 weights
BITS = (16, 8, 4)


@dataclasses.dataclass(frozen=True)
class Serving:
    """`batch` sequences decoded at once, each `context` tokens long, weights of `bits`. Prices are USD per million tokens."""

    context: int = 4096
    batch: int = 64
    bits: int = 16
    api_price: float | None = None


def _bytes(tree: Any) -> int:
    """Of the arrays of a tree of shapes; random keys, a few bytes each, aren't counted."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)
               if not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key))


def _model(config: Config) -> LanguageModel:
    return LanguageModel(config.model, objective_named(config.train.objective).heads)


def state_bytes(config: Config, context: int) -> int:
    """Of one sequence's decode state."""
    return _model(config).state_bytes(context)


def adamw_states(params: float) -> dict[str, float]:
    """Everything in float32: 16 bytes a parameter."""
    return {"weights": FLOAT32 * params, "gradients": FLOAT32 * params, "optimizer": 2 * FLOAT32 * params}


def training_states(config: Config) -> dict[str, float]:
    """Of weights, gradients (float32) and optimizer, exact, from shapes; the average, where there is one, and the copy of the
    weights in the compute dtype, where it is another."""
    model = _model(config)
    params = jax.eval_shape(model.init, jax.random.key(0))
    count = model.param_counts()["total"]
    optimizer = make_optimizer(config.optim, config.train.steps, model.weights)
    states = {"weights": _bytes(params), "gradients": FLOAT32 * count,
              "optimizer": _bytes(jax.eval_shape(optimizer.init, params))}
    if config.train.ema:
        states["average"] = FLOAT32 * count
    if config.model.compute_dtype != config.model.param_dtype:
        states["compute_copy"] = _bytes(jax.eval_shape(model.cast, params))
    return states


def on_hosts(config: Config) -> tuple[float, float]:
    """Bytes that rest in the hosts' memory: of the optimizer's state (`optim.offload`), and of what the backward pass keeps of
    a microbatch (`remat=offload`)."""
    model = _model(config)
    optimizer = make_optimizer(config.optim, config.train.steps, model.weights)
    moments = jax.eval_shape(lambda: optimizer.init(model.init(jax.random.key(0)))) if config.optim.offload else ()
    rows = config.train.batch_size // config.train.microbatches
    kept = rows * _kept_bytes_per_row(config) if config.model.remat == "offload" else 0
    return _bytes([leaf for leaf in jax.tree.leaves(moments) if leaf.ndim]), kept


def activations(config: Config) -> Range:
    """Of a microbatch on all chips together: what the backward pass keeps, traced, so with the config's remat and mixers.

    low: that alone; nothing where it goes to the hosts (`remat=offload`). value: and twice what one layer keeps without remat:
    what its backward pass reads, and the gradients of that. high: four times. XLA's own count of five small programs on a CPU
    lay within (docs/planning.md).
    """
    rows = config.train.batch_size // config.train.microbatches
    kept = 0 if config.model.remat == "offload" else _kept_bytes_per_row(config)
    plain = dataclasses.replace(config, model=dataclasses.replace(config.model, remat="none"))
    layers = sum(stage.repeats for stage in (*config.model.stages, *config.model.encoder_stages))
    layer = _kept_bytes_per_row(plain) / layers
    return Range(rows * (kept + 2 * layer), rows * kept, rows * (kept + 4 * layer))


def _kept_bytes_per_row(config: Config) -> int:
    """Residuals between the forward and the backward pass, by their growth from one row to two (which leaves out weights)."""
    model = _model(config)
    loss = objective_named(config.train.objective).make(model, config)
    params = jax.eval_shape(model.init, jax.random.key(0))

    def kept(rows: int) -> int:
        batch = {name: jax.ShapeDtypeStruct((rows, config.data.seq_len), dtype) for name, dtype in BATCH_FIELDS.items()}

        def residuals(params: Any, batch: Any) -> Any:
            return jax.vjp(lambda p: loss(p, None, batch, jax.random.key(0))[0], params)[1]

        return _bytes(jax.eval_shape(residuals, params, batch))

    return kept(2) - kept(1)


def training_memory(states: Mapping[str, float], activations: float | None, chips: int, hbm_bytes: float | None,
                    hosts: tuple[float, float] = (0.0, 0.0)) -> dict[str, Any]:
    """Bytes by what takes them; `total`: on the chips at the fullest moment, and per chip; `host`: in the hosts' memory;
    `fits`: None where activations or the chip's memory aren't known, and it isn't too much without them.

    hosts: as `on_hosts` gives them. The optimizer's state comes whole for the update, when the activations are gone.
    """
    moments, kept = hosts
    total = sum(states.values()) - moments + max(moments, activations or 0.0)
    fits = None if hbm_bytes is None else total / chips <= hbm_bytes
    return dict(states) | {"activations": activations, "total": total, "per_chip": total / chips, "host": moments + kept,
                           "hbm": hbm_bytes, "fits": None if fits and activations is None else fits}


def serving_memory(params: float, state_bytes: float | None, serving: Serving, four_bits: float) -> dict[str, Any]:
    """Bytes of the weights at 16, 8 and 4 bits, and of the decode states."""
    weights = {str(bits): params * (four_bits if bits == 4 else bits) / 8 for bits in BITS}
    return {"weights": weights, "context": serving.context, "batch": serving.batch, "cache_per_sequence": state_bytes,
            "cache": None if state_bytes is None else state_bytes * serving.batch}


def serving_cost(serving: Serving, memory: Mapping[str, Any], *, flops_per_token: float, price: float | None,
                 peak_flops: float | None, hbm_bytes: float | None, bandwidth: float | None) -> dict[str, Any] | None:
    """Decoding on the fewest chips that hold weights and cache, as if split without loss; None where the chip isn't known.

    `peak_flops` and `bandwidth` are of a chip, as achieved. A step of the whole batch reads every weight (of every expert)
    and every state once. `cost_per_million_tokens` is at full load. Against an API: `load_to_break_even` is the share of the
    time that the chips have to be busy for the same cost, above 1 the API is always cheaper.
    """
    if None in (peak_flops, hbm_bytes, bandwidth):
        return None
    read = memory["weights"][str(serving.bits)] + (memory["cache"] or 0.0)
    chips = math.ceil(read / hbm_bytes)
    reading, computing = read / bandwidth / chips, serving.batch * flops_per_token / peak_flops / chips
    speed = serving.batch / max(reading, computing)
    cost = None if price is None else chips * price / 3600 / speed * 1e6
    answer = {"chips": chips, "bits": serving.bits, "tokens_per_second": speed,
              "bound": "bandwidth" if reading >= computing else "compute", "cost_per_million_tokens": cost}
    if serving.api_price is not None:
        answer |= {"api_price": serving.api_price, "load_to_break_even": None if cost is None else cost / serving.api_price,
                   "tokens_per_day_to_break_even": None if price is None else chips * price * 24 / serving.api_price * 1e6}
    return answer
