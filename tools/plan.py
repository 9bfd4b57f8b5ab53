"""What a training run takes, before it is paid for: `python -m tools.plan --params=7e9 --chip=v5p:4x4x4 [--tokens=2e12]`

From any two of budget (--flops, --money or --chip_days), model (--params or --config) and --tokens: the rest; from one, with
20 tokens a parameter. Time, price, energy and CO2 on named chips, memory to train and to serve, the cost of serving against
an API's. A figure that isn't known exactly has its interval. Formulas and sources: docs/planning.md.
"""

import math
from typing import Any

from absl import flags

from experiments import command_line
from research import sharding
from research.errors import InputError
from research.scaling import footprint, planner
from research.scaling.planner import Budget, Machine, Model, Question, Range

SMALLEST, LARGEST = 1e-30, 1e40  # so that no product of all the numbers is beyond a float
MOST = 10**9  # of what is counted

command_line.define_config_flags()
command_line.define_json_flag()
flags.DEFINE_float("params", None, "Parameters of the model, where it isn't a preset (--config).")
flags.DEFINE_float("tokens", None, "Tokens to train on.")
flags.DEFINE_float("flops", None, "Budget in FLOPs.")
flags.DEFINE_float("money", None, "Budget in USD.")
flags.DEFINE_float("chip_days", None, "Budget in days of one chip.")
flags.DEFINE_float("tokens_per_param", None, f"Where only one of the three is given; default {planner.TOKENS_PER_PARAM:g}.")
flags.DEFINE_boolean("exact", False, "Count the preset's FLOPs by its layers, instead of 6 a parameter and token.")
flags.DEFINE_string("chip", None, "A chip or a slice of research/hardware.py: h100, v5p:4x4x4, v6e-256.")
flags.DEFINE_integer("chips", None, "How many; default: 1, or the slice's.", lower_bound=1, upper_bound=MOST)
flags.DEFINE_string("dtype", None, "Of the peak; default: the preset's compute_dtype, else bfloat16.")
flags.DEFINE_float("peak_flops", None, "FLOP/s of a chip, instead of the table's.")
flags.DEFINE_string("utilization", None, "Share of the peak, as 0.4 or 0.3,0.55; default: the latter around the former.")
flags.DEFINE_float("price", None, "USD per chip-hour, instead of the list price.")
flags.DEFINE_float("power_watts", None, "Of a chip, instead of the table's.")
flags.DEFINE_float("hbm_bytes", None, "Memory of a chip, instead of the table's.")
flags.DEFINE_float("hbm_bandwidth", None, "Bytes/s of a chip's memory, instead of the table's.")
flags.DEFINE_float("pue", planner.PUE, "The data centre's energy over the machines'.")
flags.DEFINE_float("grid_kg_per_kwh", planner.GRID_KG_PER_KWH, "CO2 of the electricity.")
flags.DEFINE_integer("context", 4096, "Tokens a sequence when serving.", lower_bound=1, upper_bound=MOST)
flags.DEFINE_integer("serve_batch", 64, "Sequences decoded at once.", lower_bound=1, upper_bound=MOST)
flags.DEFINE_enum("serve_bits", "16", [str(bits) for bits in footprint.BITS], "Of the weights when serving.")
flags.DEFINE_string("bandwidth_utilization", None, "Share of the memory's bandwidth when serving, as --utilization.")
flags.DEFINE_float("api_price", None, "USD per million tokens of an API, to compare.")
flags.adopt_module_key_flags(command_line)
FLAGS = flags.FLAGS

POSITIVE = ("params", "tokens", "flops", "money", "chip_days", "tokens_per_param", "peak_flops", "price", "power_watts",
            "hbm_bytes", "hbm_bandwidth", "api_price")
BUDGETS = ("flops", "money", "chip_days")


def check_numbers() -> None:
    for name in (*POSITIVE, "grid_kg_per_kwh", "pue"):
        value, least = FLAGS[name].value, 1.0 if name == "pue" else 0.0
        if value is None:
            continue
        if not math.isfinite(value) or value < least or (name in POSITIVE and value == 0):
            wanted = "positive" if name in POSITIVE else f"at least {least:g}"
            raise InputError(f"--{name}", f"{value:g} isn't {wanted}", "give a finite number")
        if value > LARGEST or 0 < value < SMALLEST:
            raise InputError(f"--{name}", f"{value:g} is too {'large' if value > 1 else 'small'} to be meant",
                             f"give a number from {SMALLEST:g} to {LARGEST:g}")


def share(name: str, default: Range) -> Range:
    """A share of a peak by a flag: 0.4 is a point, 0.3,0.55 an interval around its mean."""
    text = FLAGS[name].value
    if text is None:
        return default
    try:
        numbers = [float(word) for word in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) not in (1, 2) or not all(1e-6 <= number <= 1 for number in numbers) or numbers[0] > numbers[-1]:
        raise InputError(f"--{name}", f"{text!r} isn't a share of the peak",
                         "give 0.4, or an interval like 0.35,0.5, up to 1")
    return Range(sum(numbers) / len(numbers), numbers[0], numbers[-1])


def budget() -> Budget | None:
    given = [name for name in BUDGETS if FLAGS[name].value is not None]
    if len(given) > 1:
        raise InputError(f"--{given[1]}", f"is a second budget beside --{given[0]}", "give one")
    return Budget(given[0], FLAGS[given[0]].value) if given else None


def model() -> Model | None:
    if FLAGS.config is None:
        if FLAGS.exact or FLAGS.set:
            raise InputError("--exact" if FLAGS.exact else "--set", "needs a preset", "name it with --config")
        return None if FLAGS.params is None else planner.model_of_number(FLAGS.params)
    if FLAGS.params is not None:
        raise InputError("--params", f"is a second model beside --config={FLAGS.config}", "give one")
    config = command_line.configured()[0]
    sharding.rules_named(config.mesh.rules)  # the plan splits evenly, whatever they are; a name that is none is a mistake
    return planner.model_of_config(config, FLAGS.exact)


def machine(chosen: Model | None) -> Machine:
    dtype = FLAGS.dtype or (chosen.config.model.compute_dtype if chosen and chosen.config else "bfloat16")
    return planner.machine(FLAGS.chip, FLAGS.chips, dtype, peak_flops=FLAGS.peak_flops, price=FLAGS.price,
                           power_watts=FLAGS.power_watts, hbm_bytes=FLAGS.hbm_bytes, hbm_bandwidth=FLAGS.hbm_bandwidth)


def show(value: Any) -> str:
    """A figure in a cell: `3.12 (2.27 to 4.16)`, `unknown`."""
    if value is None:
        return "unknown"
    if isinstance(value, dict):
        return f"{show(value['value'])} ({show(value['low'])} to {show(value['high'])})"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (int, float)):
        return f"{value:,.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.4g}"
    return str(value)


def rows(figures: dict, sources: dict, prefix: str = "") -> list[list[str]]:
    """Name, figure, and what it follows from, one a line; nested figures by their path."""
    found = []
    for name, value in figures.items():
        if isinstance(value, dict) and "low" not in value:
            found += rows(value, {}, f"{prefix}{name}.") if name != "from" else []
        else:
            found.append([prefix + name, show(value), sources[name] if name in sources else ""])
    return found


def main(_: list[str]) -> int:
    check_numbers()
    chosen = model()
    serving = footprint.Serving(FLAGS.context, FLAGS.serve_batch, int(FLAGS.serve_bits), FLAGS.api_price)
    answer = planner.plan(Question(
        machine(chosen), budget(), chosen, FLAGS.tokens, FLAGS.tokens_per_param, share("utilization", planner.UTILIZATION),
        share("bandwidth_utilization", planner.BANDWIDTH_SHARE), FLAGS.pue, FLAGS.grid_kg_per_kwh, serving))
    if FLAGS.json:
        command_line.print_json(answer)
        return 0
    command_line.print_table([["figure", "value", "from"], *rows(answer, answer["from"])])
    print(f"\nmemory: {answer['from']['memory']}\nserving: {answer['from']['serving']}")
    return 0


if __name__ == "__main__":
    command_line.run(main)
