"""planner: textbook cases and hand computations, every way to ask, intervals, memory against real arrays, refusals."""

import dataclasses
import itertools
import math

import jax
import pytest

from configs import preset
from research.config import override
from research.errors import InputError
from research.hardware import CHIPS
from research.models.lm import LanguageModel
from research.scaling import footprint, planner
from research.scaling.footprint import Range, Serving
from research.scaling.planner import Budget, Question, model_of_config, model_of_number, plan
from research.training.program import make_program

FULL = Range.point(1.0)
V100 = planner.machine(None, 256, "bfloat16", peak_flops=6.02e13, price=2.0, power_watts=300.0)
GPT3 = Question(V100, Budget("flops", 3.14e23), model_of_number(175e9), utilization=FULL)


def ask(base: Question = GPT3, **changes) -> dict:
    return plan(dataclasses.replace(base, **changes))


def middle(value):
    return value["value"] if isinstance(value, dict) else value


def test_gpt3_on_256_gpus():
    """5.2e18 FLOPs a day each: 236 days; at 70% and $2 an hour $4.14 million."""
    assert V100.peak_flops * 86400 == pytest.approx(5.2e18, rel=1e-3)
    full, realistic = ask(), ask(utilization=Range.point(0.7))
    assert round(full["days"]) == 236 and full["tokens"] == pytest.approx(3.14e23 / 6 / 175e9)
    assert realistic["cost"] == pytest.approx(3.14e23 / (6.02e13 * 0.7) / 3600 * 2) == pytest.approx(4.14e6, rel=1e-3)
    assert realistic["days"] == pytest.approx(full["days"] / 0.7)
    hours = 3.14e23 / 6.02e13 / 3600
    assert full["chip_hours"] == pytest.approx(hours) and full["chip_days"] == pytest.approx(hours / 24)
    assert full["energy_kwh"] == pytest.approx(hours * 0.3 * planner.PUE)
    assert full["co2_kg"] == pytest.approx(hours * 0.3 * planner.PUE * planner.GRID_KG_PER_KWH)


def test_twenty_tokens_a_parameter_where_one_thing_is_given():
    """Chinchilla: 70B parameters, 1.4T tokens, 5.9e23 FLOPs."""
    for given in ({"budget": Budget("flops", 5.88e23)}, {"model": model_of_number(70e9)}, {"tokens": 1.4e12}):
        answer = plan(Question(V100, utilization=FULL, **given))
        assert (answer["params"], answer["tokens"], answer["flops"]) == pytest.approx((70e9, 1.4e12, 5.88e23))
        assert any("compute-optimal by default" in answer["from"][name] for name in ("params", "tokens"))
    answer = plan(Question(V100, utilization=FULL, model=model_of_number(1e9), tokens_per_param=100.0))
    assert answer["tokens"] == pytest.approx(1e11) and "--tokens_per_param" in answer["from"]["tokens"]


@pytest.mark.parametrize("utilization", (Range.point(0.5), Range(0.4, 0.3, 0.5)))
def test_any_two_say_the_third(utilization):
    whole = ask(utilization=utilization)
    things = {"model": model_of_number(175e9), "tokens": whole["tokens"],
              "budgets": [Budget("flops", 3.14e23), Budget("money", middle(whole["cost"])),
                          Budget("chip_days", middle(whole["chip_days"]))]}
    asked = [{"model": things["model"], "tokens": things["tokens"]}]
    asked += [{"budget": b, name: things[name]} for b, name in itertools.product(things["budgets"], ("model", "tokens"))]
    for given in asked:
        answer = plan(Question(V100, utilization=utilization, **given))
        for name in ("params", "tokens", "flops", "days", "cost", "chip_hours", "energy_kwh"):
            assert middle(answer[name]) == pytest.approx(middle(whole[name])), (given, name)


def test_intervals():
    """What follows from the uncertain has low and high, and only that; a sum of money buys certain hours."""
    answer = ask(utilization=Range(0.4, 0.35, 0.5))
    hours = 3.14e23 / 6.02e13 / 3600
    assert answer["chip_hours"] == pytest.approx({"value": hours / 0.4, "low": hours / 0.5, "high": hours / 0.35})
    assert answer["params"] == 175e9 and isinstance(answer["tokens"], float)
    answer = plan(Question(V100, Budget("money", 1e6), utilization=Range(0.4, 0.35, 0.5)))
    assert answer["chip_hours"] == pytest.approx(5e5) and answer["cost"] == pytest.approx(1e6)
    root = math.sqrt(5e5 * 3600 * 6.02e13 / 120)
    assert answer["params"] == pytest.approx({"value": root * 0.4**0.5, "low": root * 0.35**0.5, "high": root * 0.5**0.5})
    assert answer["memory"]["train"]["weights"]["low"] == pytest.approx(4 * answer["params"]["low"])


def test_unknown_power_is_a_range_and_says_so():
    answer = ask(machine=planner.machine("v5p:4x4x4", None, "bfloat16"))
    assert answer["chips"] == 64 and "v5p's isn't published" in answer["from"]["power_watts"]
    ratio = answer["energy_kwh"]["high"] / answer["energy_kwh"]["low"]
    powers = [chip.power_watts for chip in CHIPS.values() if chip.power_watts]
    assert ratio == pytest.approx(max(powers) / min(powers))


@pytest.mark.parametrize("name", [name for name in CHIPS if name != "cpu"])
def test_every_chip(name):
    chip = CHIPS[name]
    answer = ask(machine=planner.machine(name, 16, "bfloat16"))
    hours = 3.14e23 / chip.peak_flops["bfloat16"] / 3600
    assert answer["chip_hours"] == pytest.approx(hours) and answer["days"] == pytest.approx(hours / 24 / 16)
    assert answer["cost"] == pytest.approx(hours * chip.price_per_hour) and chip.price_date in answer["from"]["price"]
    assert answer["serving"]["chips"] == math.ceil(350e9 / chip.hbm_bytes)
    assert answer["memory"]["train"]["fits"] is (None if 2.8e12 / 16 <= chip.hbm_bytes else False)


def test_nothing_is_made_up():
    answer = plan(Question(planner.machine(None, None, "bfloat16"), model=model_of_number(1e9), tokens=1e9))
    assert answer["flops"] == 6e18
    for name in ("days", "chip_hours", "cost", "energy_kwh", "co2_kg", "serving"):
        assert answer[name] is None
    assert answer["from"]["serving"].startswith("not known without a --chip that has them, or --peak_flops, --hbm_bytes,")
    assert answer["memory"]["train"]["activations"] is None and answer["memory"]["serve"]["cache"] is None


def test_memory_of_a_number():
    def weights(params):
        return plan(Question(V100, model=model_of_number(params)))["memory"]["serve"]["weights"]

    assert weights(7e9)["16"] == 14e9 and weights(7e9)["8"] == 7e9
    assert weights(70e9)["4"]["value"] == 35e9 and 35e9 < weights(70e9)["4"]["high"] <= 38e9
    train = ask()["memory"]["train"]
    assert train["total"] == 16 * 175e9 and train["per_chip"] == 16 * 175e9 / 256


@pytest.mark.parametrize("optimizer", ("adamw", "sgd", "lion", "adafactor", "muon"))
def test_training_states_are_the_arrays_of_the_run(optimizer):
    config = override(preset("debug"), {"optim.name": optimizer, "train.ema": 0.9})
    state = make_program(config, jax.devices()[:1]).abstract
    states = footprint.training_states(config)

    def size(tree):
        return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))

    assert states["weights"] == size(state.params) and states["optimizer"] == size(state.optimizer)
    assert states["average"] == states["gradients"] == 4 * LanguageModel(config.model).param_counts()["total"]


def test_activations_know_remat_rows_and_compute_dtype():
    def of(**changes):
        return footprint.activations(override(preset("debug"), {k.replace("__", "."): v for k, v in changes.items()}))

    config = preset("debug")
    plain, full = of(model__remat="none"), of(model__remat="full")
    layers = sum(stage.repeats for stage in config.model.stages)
    carry = config.train.batch_size * config.data.seq_len * config.model.dim * 4 * layers
    assert carry <= full.low < 3 * carry < plain.low  # what remat keeps beside the carry is small, and weights are not in it
    assert all(r.low <= r.value <= r.high for r in (plain, full))
    offload = of(model__remat="offload")  # the carry rests on the hosts
    assert offload.low == 0 and offload.value == full.value - full.low
    assert of(model__remat="none", train__batch_size=2 * config.train.batch_size).low == 2 * plain.low
    assert of(model__remat="none", model__compute_dtype="bfloat16").low < plain.low


def test_what_rests_on_the_hosts_is_counted_apart():
    """The moments are on the chips for the update, instead of the activations. The hosts hold what remat=full keeps."""
    sets = {"model.remat": "full", "train.batch_size": 64}
    plain, moved, both = (plan(Question(V100, model=model_of_config(override(preset("debug"), sets | more))))["memory"]["train"]
                          for more in ({}, {"optim.offload": True}, {"optim.offload": True, "model.remat": "offload"}))
    moments = 2 * 4 * LanguageModel(preset("debug").model).param_counts()["total"]
    kept = footprint.activations(override(preset("debug"), sets)).low
    assert (plain["host"], moved["host"], both["host"]) == (0, moments, moments + kept)
    assert moments <= moved["optimizer"] == plain["optimizer"] < moments + 100  # and counters
    assert plain["activations"]["low"] > moments
    for end in ("value", "low", "high"):
        assert moved["total"][end] == plain["total"][end] - moments
    small = {"model.remat": "full", "train.batch_size": 1, "data.seq_len": 8}
    few, moved = (plan(Question(V100, model=model_of_config(override(preset("debug"), small | more))))
                  for more in ({}, {"optim.offload": True}))
    assert few["memory"]["train"]["activations"]["high"] < moments
    states = sum(moved["memory"]["train"][name] for name in ("weights", "gradients", "optimizer"))
    assert middle(moved["memory"]["train"]["total"]) == states  # nothing is saved but the activations' room
    assert "the optimizer rests on the hosts" in moved["from"]["memory"] and "hosts" not in few["from"]["memory"]


def test_what_serving_leaves_out_is_said():
    number, config = (plan(Question(V100, model=model))["from"]["serving"]
                      for model in (model_of_number(1e9), model_of_config(preset("debug"))))
    assert "the cache isn't in it" in number and "the cache isn't in it" not in config


@pytest.mark.slow
@pytest.mark.parametrize("remat", ("none", "full"))
def test_activations_against_the_compiler(remat):
    """What XLA sets aside for a step beside its arguments: gradients and activations."""
    config = override(preset("quickstart"), {"model.remat": remat, "train.microbatches": 1, "train.batch_size": 8})
    temporary = make_program(config, jax.devices()[:1]).compile().memory_analysis().temp_size_in_bytes
    found = footprint.activations(config)
    assert found.low < temporary - footprint.training_states(config)["gradients"] < found.high


def test_a_preset_and_its_exact_flops():
    config = preset("mixtral_8x7b")
    rough, exact = model_of_config(config), model_of_config(config, exact=True)
    model = LanguageModel(config.model)
    counts = model.param_counts()
    assert (rough.params, rough.active_params) == (counts["total"], counts["active"]) and counts["active"] < counts["total"]
    assert rough.flops_per_token == 6 * counts["active"]
    assert exact.flops_per_token == 3 * model.flops_per_token(config.data.seq_len) != rough.flops_per_token
    question = Question(V100, model=exact, utilization=FULL, serving=Serving(context=1000, batch=3))
    answer = plan(question)
    assert answer["tokens"] == 20 * counts["active"]
    assert answer["flops"] == pytest.approx(answer["tokens"] * exact.flops_per_token)
    assert answer["memory"]["serve"]["cache"] == 3 * model.state_bytes(1000)
    assert answer["memory"]["train"]["compute_copy"] < answer["memory"]["train"]["weights"] == 4 * counts["total"]


def serve(batch: int, api: float | None = None, bits: int = 16) -> dict:
    question = Question(planner.machine("h100", 1, "bfloat16"), model=model_of_number(7e9), utilization=FULL,
                        bandwidth_share=FULL, serving=Serving(batch=batch, bits=bits, api_price=api))
    return plan(question)["serving"]


def test_serving_is_bound_by_bandwidth_then_by_compute():
    chip = CHIPS["h100"]
    few, many = serve(1), serve(1024)
    assert few["bound"] == "bandwidth" and few["tokens_per_second"] == pytest.approx(chip.hbm_bandwidth / 14e9)
    assert many["bound"] == "compute" and many["tokens_per_second"] == pytest.approx(chip.peak_flops["bfloat16"] / 14e9)
    assert few["cost_per_million_tokens"] == pytest.approx(chip.price_per_hour / 3600 / few["tokens_per_second"] * 1e6)
    assert serve(1, bits=8)["tokens_per_second"] == pytest.approx(2 * few["tokens_per_second"])


def test_a_chip_that_is_in_no_table_can_serve():
    chip = CHIPS["h100"]
    unknown = planner.machine(None, 1, "bfloat16", peak_flops=chip.peak_flops["bfloat16"], price=chip.price_per_hour,
                              hbm_bytes=chip.hbm_bytes, hbm_bandwidth=chip.hbm_bandwidth)
    question = Question(unknown, model=model_of_number(7e9), utilization=FULL, bandwidth_share=FULL, serving=Serving(batch=64))
    answer = plan(question)
    assert answer["serving"] == serve(64) and "not known" not in answer["from"]["serving"]
    twice = planner.machine("h100", 1, "bfloat16", hbm_bytes=2 * chip.hbm_bytes)
    assert plan(Question(twice, model=model_of_number(7e9)))["memory"]["train"]["hbm"] == 2 * chip.hbm_bytes


def test_what_binds_can_be_uncertain():
    question = Question(planner.machine("h100", 1, "bfloat16"), model=model_of_number(7e9), serving=Serving(batch=140))
    assert plan(question)["serving"]["bound"] == "bandwidth or compute"


def test_serving_against_an_api():
    own = serve(64)["cost_per_million_tokens"]
    answer = serve(64, api=2 * own)
    assert answer["load_to_break_even"] == pytest.approx(0.5)
    assert answer["tokens_per_day_to_break_even"] == pytest.approx(0.5 * 86400 * answer["tokens_per_second"])
    assert "api_price" not in serve(64)


@pytest.mark.parametrize("changes, field, words", (
    ({"budget": None, "model": None}, "plan", "nothing is given"),
    ({"tokens": 1e12}, "--flops", "pays for 3.14e\\+23 FLOPs, but the model and --tokens take 1.05e\\+24"),
    ({"tokens_per_param": 20.0}, "--tokens_per_param", "budget and model already decide it"),
    ({"machine": planner.machine(None, 1, "bfloat16"), "budget": Budget("chip_days", 1.0)}, "--chip_days", "--peak_flops"),
    ({"machine": planner.machine(None, 1, "bfloat16", peak_flops=1e12), "budget": Budget("money", 1.0)}, "--money", "--price"),
))
def test_refusals(changes, field, words):
    with pytest.raises(InputError, match=words) as error:
        ask(**changes)
    assert error.value.field == field


@pytest.mark.parametrize("kind", ("flops", "money", "chip_days"))
def test_all_three_that_agree_are_taken(kind):
    """Model and tokens say the FLOPs; what isn't known is the time, and with it the cost."""
    budget = {"flops": 3.14e23, "money": 2.9e6 / 0.4, "chip_days": 60400 / 0.4}[kind]
    answer = ask(budget=Budget(kind, budget), tokens=300e9, utilization=Range(0.4, 0.3, 0.5))
    assert answer["tokens"] == 300e9 and answer["flops"] == 300e9 * answer["flops_per_token"] == 300e9 * 6 * 175e9
    hours = 3.15e23 / 6.02e13 / 3600
    assert answer["chip_hours"] == pytest.approx({"value": hours / 0.4, "low": hours / 0.5, "high": hours / 0.3})
    assert answer["cost"] == pytest.approx({name: 2 * value for name, value in answer["chip_hours"].items()})
    assert answer["from"]["flops"] == "flops_per_token x tokens"


def test_machines_that_are_refused():
    for chip, chips, dtype, words in (("h1000", 1, "bfloat16", "one of .*h100"), ("v5p:4x4x4", 8, "bfloat16", "has 64"),
                                      ("v4", 1, "float8_e4m3fn", "no published peak")):
        with pytest.raises(InputError, match=words):
            planner.machine(chip, chips, dtype)
