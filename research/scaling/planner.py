"""What a training run costs, from any two of budget, model and tokens: FLOPs, time, money, energy, memory, and then serving.

One plan is a function of exact numbers (`_row`). What isn't known exactly (utilization, power, ...) is a `Range`; the plan is
computed in its middle and at every corner, and a figure that differs between them is {"value", "low", "high"}.

Formulas and defaults, with their sources: docs/planning.md.
"""

import dataclasses
import itertools
import math
from typing import Any, Literal, Mapping, NamedTuple, Sequence

from research.errors import InputError
from research.hardware import CHIPS, parse_topology
from research.models.lm import LanguageModel
from research.scaling import footprint
from research.scaling.footprint import Range
from research.schema import Config
from research.training.objectives import objective_named
from research.training.program import TRAINING_COST

FLOPS_PER_PARAM = 6.0  # Kaplan et al. 2020, section 2.1: 2 forward, 4 backward
TOKENS_PER_PARAM = 20.0  # Hoffmann et al. 2022, table 3: 67B parameters, 1.5T tokens
UTILIZATION = Range(0.4, 0.3, 0.55)
BANDWIDTH_SHARE = Range(0.7, 0.5, 0.9)
PUE = 1.1
GRID_KG_PER_KWH = 0.37
AGREEMENT = 0.02  # budget, model and tokens may all be given if they agree so well

POWERS = sorted(chip.power_watts for chip in CHIPS.values() if chip.power_watts)
UNKNOWN_POWER = Range(math.sqrt(POWERS[0] * POWERS[-1]), POWERS[0], POWERS[-1])


@dataclasses.dataclass(frozen=True)
class Budget:
    """FLOPs, USD, or days of one chip."""

    kind: Literal["flops", "money", "chip_days"]
    amount: float


@dataclasses.dataclass(frozen=True)
class Machine:
    """`chips` equal chips. None: not known, and what needs it stays None."""

    name: str | None
    chips: int
    peak_flops: float | None  # FLOP/s of a chip
    price: float | None  # USD per chip-hour
    power_watts: Range  # of a chip
    hbm_bytes: float | None
    hbm_bandwidth: float | None  # bytes/s
    sources: Mapping[str, str]  # field -> where its figure is from


@dataclasses.dataclass(frozen=True)
class Model:
    """Parameters (total, and those that a token passes through) and training FLOPs a token."""

    params: float
    active_params: float
    flops_per_token: float
    config: Config | None = None


@dataclasses.dataclass(frozen=True)
class Question:
    """What is given. At least one of budget, model and tokens; where it is only one, `tokens_per_param` is the second."""

    machine: Machine
    budget: Budget | None = None
    model: Model | None = None
    tokens: float | None = None
    tokens_per_param: float | None = None  # None: TOKENS_PER_PARAM, where it is needed
    utilization: Range = UTILIZATION
    bandwidth_share: Range = BANDWIDTH_SHARE
    pue: float = PUE
    grid_kg_per_kwh: float = GRID_KG_PER_KWH
    serving: footprint.Serving = footprint.Serving()


class _Point(NamedTuple):
    """One choice of everything uncertain."""

    utilization: float
    power_watts: float
    bandwidth_share: float
    activations: float | None
    four_bits: float


def machine(chip: str | None, chips: int | None, dtype: str, *, peak_flops: float | None = None, price: float | None = None,
            power_watts: float | None = None, hbm_bytes: float | None = None, hbm_bandwidth: float | None = None) -> Machine:
    """A machine by a chip's name or a slice's ("v5p:4x4x4", which counts its chips); what is given beside it replaces the
    table's figure.

    Raises:
      InputError: an unknown chip; a slice and another number of chips; no peak for `dtype`.
    """
    given = {"peak_flops": peak_flops, "price": price, "power_watts": power_watts, "hbm_bytes": hbm_bytes,
             "hbm_bandwidth": hbm_bandwidth}
    sources = {name: f"--{name}" for name, value in given.items() if value}
    unknown = "isn't published" if chip else "no --chip"
    if chip is None:
        power = UNKNOWN_POWER if power_watts is None else Range.point(power_watts)
        sources = {"peak_flops": unknown, "price": f"{unknown}, no --price",
                   "power_watts": f"{unknown}: the range of the chips in research/hardware.py"} | sources
        return Machine(None, chips or 1, peak_flops, price, power, hbm_bytes, hbm_bandwidth, sources)
    topology = parse_topology(chip, "--chip")
    row, named = topology.chip, topology.chips > 1 or ":" in chip
    if named and chips is not None and chips != topology.chips:
        raise InputError("--chips", f"is {chips}, but {chip} has {topology.chips}", "leave --chips out")
    if price is None and row.price_per_hour is not None:
        sources["price"] = f"list price of {row.name}, {row.price_date}"
    elif price is None:
        sources["price"] = f"{row.name} has no list price, no --price"
    sources = {"peak_flops": f"{row.name}, {dtype}", "power_watts": row.name if row.power_watts else
               f"{row.name}'s {unknown}: the range of the chips in research/hardware.py"} | sources
    power = power_watts or row.power_watts
    return Machine(row.name, topology.chips if named else chips or 1, peak_flops or row.peak(dtype),
                   row.price_per_hour if price is None else price, Range.point(power) if power else UNKNOWN_POWER,
                   hbm_bytes or row.hbm_bytes, hbm_bandwidth or row.hbm_bandwidth, sources)


def model_of_number(params: float) -> Model:
    """A dense model of so many parameters: 6 FLOPs a parameter and token."""
    return Model(params, params, FLOPS_PER_PARAM * params)


def model_of_config(config: Config, exact: bool = False) -> Model:
    """`exact`: the mixers' own count of FLOPs at `data.seq_len`, attention included, instead of 6 an active parameter."""
    model = LanguageModel(config.model, objective_named(config.train.objective).heads)
    counts = model.param_counts()
    flops = TRAINING_COST * model.flops_per_token(config.data.seq_len) if exact else FLOPS_PER_PARAM * counts["active"]
    return Model(counts["total"], counts["active"], flops, config)


def plan(question: Question) -> dict[str, Any]:
    """Every figure of the plan, and `from`: figure -> what it follows from. Units are in docs/planning.md.

    A figure is a number, None where something that it needs isn't known, or {"value", "low", "high"}.

    Raises:
      InputError: nothing is given, or all three, and they disagree; money without a price, or time without a peak.
    """
    config = question.model.config if question.model else None
    activations = footprint.activations(config) if config else None
    points = _points(question.utilization, question.machine.power_watts, question.bandwidth_share, activations,
                     footprint.FOUR_BITS)
    states = footprint.training_states(config) if config else None
    hosts = footprint.on_hosts(config) if config else (0.0, 0.0)
    figures = _spread([_row(question, point, states, hosts) for point in points])
    return figures | {"from": _sources(question)}


def _points(*ranges: Range | None) -> list[_Point]:
    """The middle first, then the corners; a range that is a point has one."""
    middle = _Point(*[None if r is None else r.value for r in ranges])
    ends = [(None,) if r is None else tuple(dict.fromkeys((r.low, r.high))) for r in ranges]
    return [middle, *[_Point(*corner) for corner in itertools.product(*ends)]]


def _spread(rows: Sequence[Any]) -> Any:
    """Nested dicts of the same keys -> one, whose numbers are the first row's, with their extremes where they differ;
    of words all, of a yes here and a no there None."""
    first = rows[0]
    if isinstance(first, dict):
        return {key: _spread([row[key] for row in rows]) for key in first}
    if isinstance(first, str):
        return " or ".join(sorted(set(rows)))
    if first is None or isinstance(first, bool):
        return first if all(row == first for row in rows) else None
    low, high = min(rows), max(rows)
    return first if math.isclose(low, high, rel_tol=1e-9) else {"value": first, "low": low, "high": high}


def _budget_flops(budget: Budget, machine: Machine, utilization: float) -> float:
    if budget.kind == "flops":
        return budget.amount
    if machine.peak_flops is None:
        raise InputError(f"--{budget.kind}", "buys time, not FLOPs", "name a --chip or its --peak_flops")
    if budget.kind == "chip_days":
        return budget.amount * 86400 * machine.peak_flops * utilization
    if machine.price is None:
        raise InputError("--money", machine.sources["price"], "give --price per chip-hour")
    return budget.amount / machine.price * 3600 * machine.peak_flops * utilization


def _solve(question: Question, utilization: float) -> tuple[Model, float, float]:
    """(model, tokens, flops)."""
    model, tokens = question.model, question.tokens
    flops = _budget_flops(question.budget, question.machine, utilization) if question.budget else None
    if _all_given(question):  # they agree (`_check_agreement`); what isn't known of the budget is its time, and so its cost
        return model, tokens, tokens * model.flops_per_token
    given = [name for name, value in (("budget", flops), ("model", model), ("tokens", tokens)) if value is not None]
    ratio = question.tokens_per_param or TOKENS_PER_PARAM
    if not given:
        raise InputError("plan", "nothing is given", "two of budget (--flops, --money or --chip_days), model (--params or "
                         "--config) and --tokens, or one and --tokens_per_param")
    if len(given) > 1 and question.tokens_per_param is not None:
        raise InputError("--tokens_per_param", f"{' and '.join(given)} already decide it", "leave one out")
    if model is None and tokens is None:
        model = model_of_number(math.sqrt(flops / (FLOPS_PER_PARAM * ratio)))
    elif model is None:
        model = model_of_number(tokens / ratio if flops is None else flops / (FLOPS_PER_PARAM * tokens))
    if tokens is None:
        tokens = ratio * model.active_params if flops is None else flops / model.flops_per_token
    needed = tokens * model.flops_per_token
    return model, tokens, needed if flops is None else flops


def _all_given(question: Question) -> bool:
    return question.budget is not None and question.model is not None and question.tokens is not None


def _check_agreement(question: Question) -> None:
    """Budget, model and tokens, all three: refused unless they say the same."""
    if not _all_given(question):
        return
    budget = _budget_flops(question.budget, question.machine, question.utilization.value)
    needed = question.tokens * question.model.flops_per_token
    if abs(needed / budget - 1) > AGREEMENT:
        raise InputError(f"--{question.budget.kind}", f"pays for {budget:.4g} FLOPs, but the model and --tokens take "
                         f"{needed:.4g}", "give two of budget, model and tokens")


def _row(question: Question, point: _Point, states: Mapping[str, float] | None, hosts: tuple[float, float]) -> dict[str, Any]:
    """The plan at one point, without ranges."""
    on = question.machine
    _check_agreement(question)
    model, tokens, flops = _solve(question, point.utilization)
    chip_hours = None if on.peak_flops is None else flops / (on.peak_flops * point.utilization) / 3600
    energy = None if chip_hours is None else chip_hours * point.power_watts / 1000 * question.pue
    cost = None if chip_hours is None or on.price is None else chip_hours * on.price
    serving = question.serving
    state_bytes = footprint.state_bytes(model.config, serving.context) if model.config else None
    memory = {"train": footprint.training_memory(states or footprint.adamw_states(model.params), point.activations, on.chips,
                                                 on.hbm_bytes, hosts),
              "serve": footprint.serving_memory(model.params, state_bytes, serving, point.four_bits)}
    return {
        "params": model.params, "active_params": model.active_params, "tokens": tokens,
        "tokens_per_param": tokens / model.active_params, "flops": flops, "flops_per_token": flops / tokens,
        "chip": on.name, "chips": on.chips, "peak_flops": on.peak_flops, "utilization": point.utilization,
        "days": None if chip_hours is None else chip_hours / 24 / on.chips, "chip_hours": chip_hours,
        "chip_days": None if chip_hours is None else chip_hours / 24, "price": on.price, "cost": cost,
        "power_watts": point.power_watts, "pue": question.pue, "energy_kwh": energy,
        "grid_kg_per_kwh": question.grid_kg_per_kwh,
        "co2_kg": None if energy is None else energy * question.grid_kg_per_kwh, "memory": memory,
        "serving": footprint.serving_cost(
            serving, memory["serve"], flops_per_token=model.flops_per_token / TRAINING_COST, price=on.price,
            peak_flops=on.peak_flops and on.peak_flops * point.utilization, hbm_bytes=on.hbm_bytes,
            bandwidth=on.hbm_bandwidth and on.hbm_bandwidth * point.bandwidth_share)}


def _sources(question: Question) -> dict[str, str]:
    """Figure -> what it follows from."""
    on, model, budget = question.machine, question.model, question.budget
    per_token = "6 x active_params"
    if model and model.flops_per_token != FLOPS_PER_PARAM * model.active_params:
        per_token = f"{model.config.name}'s mixers and unembedding at length {model.config.data.seq_len}, x 3"
    ratio = (f"{question.tokens_per_param or TOKENS_PER_PARAM:g} tokens a parameter, " + (
        "--tokens_per_param" if question.tokens_per_param else "compute-optimal by default (Hoffmann et al. 2022)"))
    paid = f"--{budget.kind}" if budget else None
    alone = sum(value is not None for value in (budget, model, question.tokens)) == 1
    known = "given" if model and not model.config else f"preset {model.config.name}" if model else None
    size = f"{ratio}, and {paid or '--tokens'}" if alone else f"{paid} / (6 x tokens)"
    tokens = f"{ratio}" if alone else f"{paid} / flops_per_token"
    spent = {"flops": "given", "money": "--money / price x peak_flops x utilization",
             "chip_days": "--chip_days x peak_flops x utilization"}
    defaults = {"utilization": (question.utilization, UTILIZATION, "what well-tuned runs report"),
                "pue": (question.pue, PUE, "a large data centre"),
                "grid_kg_per_kwh": (question.grid_kg_per_kwh, GRID_KG_PER_KWH, "the mean of the United States")}
    config = model.config if model else None
    lacking = [f"--{name}" for name in ("peak_flops", "hbm_bytes", "hbm_bandwidth") if getattr(on, name) is None]
    return {
        "params": known or size, "tokens": "given" if question.tokens else tokens, "flops_per_token": per_token,
        "flops": spent[budget.kind] if budget and not _all_given(question) else "flops_per_token x tokens",
        **on.sources, **{name: f"a default, {words}; --{name}" if value == default else f"--{name}"
                         for name, (value, default, words) in defaults.items()},
        "chip_hours": "flops / (peak_flops x utilization)", "days": "chip_hours / chips / 24", "cost": "chip_hours x price",
        "energy_kwh": "chip_hours x power_watts x pue", "co2_kg": "energy_kwh x grid_kg_per_kwh",
        "memory": "bytes; train: " + (
            f"weights, float32 gradients, {config.optim.name}, and the activations of a microbatch of "
            f"{config.train.batch_size // config.train.microbatches} rows, remat={config.model.remat}" + (
                "; the optimizer rests on the hosts, and is on the chips for the update instead of the activations"
                if config.optim.offload else "") if config else
            "float32 weights, gradients and AdamW; without activations, which need a --config") +
            "; per_chip: split evenly over the chips; serve: params x bits / 8" + (
            f"; cache: {config.model.compute_dtype}" if config else "; without the cache, which needs a --config"),
        "serving": (f"not known without a --chip that has them, or {', '.join(lacking)}; " if lacking else "") +
                   f"a decode step of {question.serving.batch} sequences at context {question.serving.context}, "
                   f"{question.serving.bits} bits: the slower of reading weights and cache (bandwidth x "
                   f"{question.bandwidth_share.low:g} to {question.bandwidth_share.high:g}) and computing (at utilization)" + (
                       "" if config else "; the cache isn't in it, as it needs a --config: serving costs more than this")}
