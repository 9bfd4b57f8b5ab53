"""Intervals, outliers, the budget that is left out, and the whole analysis as plain data."""

import json
import re

import numpy as np
import pytest

from research.errors import InputError
from research.scaling.analysis import analyse, crossing
from research.scaling.laws import LAWS, Fitted
from research.scaling.points import make
from research.scaling.uncertainty import interval, outliers, predictive, resamples
from tests.scaling.laws_test import chinchilla, ladder, parabolas


def test_resamples_hold_as_many_runs_and_are_decided_by_the_seed():
    counts = resamples(7, 50, seed=3)
    assert counts.shape == (50, 7) and (counts.sum(1) == 7).all() and (counts == resamples(7, 50, seed=3)).all()
    assert (counts != resamples(7, 50, seed=4)).any()


def test_a_rungs_seeds_are_drawn_together():
    counts = resamples(5, 40, seed=1, rung_P=np.array([0, 1, 0, 2, 1]))
    assert (counts[:, 0] == counts[:, 2]).all() and (counts[:, 1] == counts[:, 4]).all()
    assert (counts[:, [0, 1, 3]].sum(1) == 3).all()


def test_an_interval_is_the_percentiles_of_the_resamples():
    figure = interval(np.array([5.0, *range(1001)]))
    assert figure == pytest.approx({"value": 5.0, "low": 25.0, "high": 975.0})
    with pytest.raises(ValueError, match="bootstrap resamples"):
        interval(np.array([5.0]))


def test_what_is_missing_or_infinite_widens_an_interval_and_stays_json():
    values = np.arange(1001, dtype=np.float64)
    values[1:200] = np.nan
    values[300] = np.inf
    figure = interval(values)
    assert figure["low"] == -1e300 and figure["high"] == 1e300 and json.loads(json.dumps(figure, allow_nan=False)) == figure


def test_a_prediction_holds_the_residual_noise():
    residual_P = 0.01 * np.random.default_rng(0).standard_normal(400)
    drawn = predictive(np.zeros(20001), residual_P, parameters=100)
    assert drawn[0] == 1 and np.log(drawn[1:]).std() == pytest.approx(0.01 * np.sqrt(4 / 3), rel=0.08)


def test_outliers_are_named_with_their_sign():
    residual_P = 0.01 * np.random.default_rng(0).standard_normal(100)
    residual_P[[3, 50]] = 0.2, -0.4
    found = outliers(residual_P, tuple(f"line {i}" for i in range(100)))
    assert [(f["run"], np.sign(f["z"])) for f in found] == [("line 50", -1), ("line 3", 1)]


@pytest.fixture(scope="module")
def analysed():
    points = ladder(0.003)
    spoilt = make(points.params_P, np.where(np.arange(80) == 7, 1.09 * points.loss_P, points.loss_P), flops=points.flops_P)
    return analyse(spoilt, "3", bootstrap=60, budget=1e22)


def test_every_figure_has_its_interval(analysed):
    figures = [*analysed["parameters"].values(), *(analysed["optimum"][name] for name in ("N_opt", "D_opt", "loss")),
               analysed["leave_largest_out"]["relative_error"]]
    assert all(set(f) == {"value", "low", "high"} and f["low"] <= f["high"] for f in figures)
    assert json.loads(json.dumps(analysed, allow_nan=False)) == analysed
    assert [found["run"] for found in analysed["outliers"]] == ["run 7"]
    assert any("10 times the largest" in note for note in analysed["notes"])


def test_ten_times_the_compute_is_predicted(analysed):
    params = 1e22 ** (0.28 / 0.62) * ((0.34 * 406.4 / (0.28 * 410.7)) ** (1 / 0.62) / 6 ** (0.28 / 0.62))
    loss = chinchilla(params, 1e22 / 6 / params)
    best = analysed["optimum"]
    assert best["N_opt"]["low"] < params < best["N_opt"]["high"] and best["loss"]["low"] < loss < best["loss"]["high"]
    held = analysed["leave_largest_out"]
    assert held["runs"] == 10 and abs(held["relative_error"]["value"]) < 0.005 and held["covered"] >= 0.6


def test_the_largest_budget_is_not_seen_when_it_is_predicted():
    """Its losses are 10% above the law: the error says so, and no run is inside its interval."""
    points = ladder(0.002)
    off = make(points.params_P, points.loss_P * np.where(np.arange(80) >= 70, 1.1, 1.0), flops=points.flops_P)
    held = analyse(off, "3", bootstrap=20)["leave_largest_out"]
    assert held["relative_error"]["value"] == pytest.approx(1 / 1.1 - 1, abs=0.005) and held["covered"] == 0


def test_approach_2_without_enough_budgets_for_a_loss_says_so():
    answer = analyse(parabolas(0.002).take(np.arange(21)), "2", bootstrap=50, budget=1e20)
    assert answer["optimum"]["loss"] is None and "gamma" not in answer["parameters"]
    assert answer["leave_largest_out"] is None
    assert any("at least 4 budgets" in note for note in answer["notes"])


@pytest.mark.parametrize("options, message", [
    ({"approach": "4"}, "--approach: unknown '4'"), ({"bootstrap": 0}, "--bootstrap: 0 resamples"),
    ({"budget": -1.0}, "--budget: -1 is not"), ({"budget": float("nan")}, "--budget: nan is not"),
])
def test_bad_options_are_one_line(options, message):
    with pytest.raises(InputError, match=message):
        analyse(ladder(), **({"approach": "3"} | options))


def test_left_out_runs_are_said_and_perplexities_are_suspected():
    points = ladder(0.003)
    losses_P = np.where(np.arange(80) == 75, 9.0, points.loss_P)
    answer = analyse(make(points.params_P, losses_P, flops=points.flops_P), "3", bootstrap=20)
    assert [found["run"] for found in answer["left_out"]] == ["run 75"] and answer["points"] == answer["rungs"] == 79
    assert analyse(points, "3", bootstrap=20)["notes"] == []
    notes = analyse(make(points.params_P, np.exp(1 + points.loss_P), flops=points.flops_P), "3", bootstrap=20)["notes"]
    assert any("perplexities?" in note for note in notes)


def test_losses_that_do_not_fall_with_size_are_said_to_decide_nothing():
    """The loss depends on the tokens alone: whatever A and alpha come out, they mean nothing."""
    points = ladder()
    noise_P = np.exp(0.003 * np.random.default_rng(0).standard_normal(80))
    points = make(points.params_P, (1.7 + 400 / points.tokens_P**0.28) * noise_P, flops=points.flops_P)
    answer = analyse(points, "3", bootstrap=20)
    assert [note.split(":")[1][:9] for note in answer["notes"]] == [" A, alpha"]


def family(name: str, e: float, k: float, noise: float = 0.002, seed: int = 0):
    """A fit of approach 2 on a family with the optimum's loss e + k / C^0.15."""
    base = parabolas()
    loss_P = (base.loss_P - 1.7 - 1000 / base.flops_P**0.15 + e + k / base.flops_P**0.15)
    noisy_P = loss_P * np.exp(noise * np.random.default_rng(seed).standard_normal(42))
    return name, LAWS["2"], LAWS["2"].fit(make(base.params_P, noisy_P, flops=base.flops_P), 200, 0)


def test_two_families_cross_where_their_laws_do():
    """1.7 + 1000/C^0.15 and 1.8 + 934.1/C^0.15: equal at C = (65.9/0.1)^(1/0.15)."""
    truth = (65.9 / 0.1) ** (1 / 0.15)
    small, large = family("small", 1.8, 1000 - 65.9, seed=1), family("large", 1.7, 1000, seed=2)
    found = crossing(small, large, 1e17, 1e21)
    turn, = found["crossings"]
    assert turn["flops"]["low"] < truth < turn["flops"]["high"] and turn["to"] == "large" and not turn["extrapolated"]
    first, last = found["at"][0], found["at"][-1]
    assert (first["flops"], last["flops"]) == pytest.approx((1e17, 1e21))
    assert last["prefers"] == "large" and last["difference"]["low"] > 0 and last["first_share"] < 0.03
    assert first["difference"]["value"] < 0 and first["first_share"] > 0.5
    turn, = crossing(small, large, 1e20, 1e21, beyond=1e3)["crossings"]  # the runs of both begin above it
    assert turn["extrapolated"] and turn["flops"]["value"] == pytest.approx(truth, rel=3)


def test_families_that_do_not_cross():
    better, worse = family("a", 1.7, 1000, seed=1), family("b", 1.9, 1000, seed=2)
    found = crossing(better, worse, 1e18, 1e21)
    assert found["crossings"] == [] and found["crossing_share"] < 0.2 and found["at"][4]["prefers"] == "a"
    same = crossing(family("a", 1.7, 1000, seed=1), family("b", 1.7, 1000, seed=2), 1e18, 1e21)
    assert all(row["prefers"] is None for row in same["at"])
    with pytest.raises(InputError, match="no range"):
        crossing(better, worse, 1e21, 1e18)


def known(name: str, e_T, k_T, gamma_T):
    """A family whose optimum's loss is e + k / C^gamma."""
    found = {"G": 1.0, "a_opt": 0.5, "H": 1.0, "b_opt": 0.5}
    parameters = {key: np.full(21, value) for key, value in found.items()}
    parameters |= {"E": np.array(e_T), "K": np.array(k_T), "gamma": np.array(gamma_T)}
    return name, LAWS["2"], Fitted(parameters, np.zeros(9), ("",) * 9, 3)


@pytest.mark.parametrize("e, k, end", [(1.6, 1000.0, 1e300), (1.9, 1000.0, 0.0)])
def test_resamples_that_do_not_cross_count_as_beyond_the_end_where_they_would(e, k, end):
    """The first is better at small budgets. Where it always is, a resample crosses later; where it never is, earlier."""
    first = known("a", [1.8] + [e] * 20, [1000 - 65.9] + [k] * 20, [0.15] * 21)
    found = crossing(first, known("b", [1.7] * 21, [1000.0] * 21, [0.15] * 21), 1e17, 1e21)
    turn, = found["crossings"]
    assert turn["flops"]["value"] == pytest.approx((65.9 / 0.1) ** (1 / 0.15), rel=0.01)
    assert turn["flops"]["low"] == turn["flops"]["high"] == end and turn["share"] == found["crossing_share"] == 0


def test_laws_that_cross_twice_say_so_twice():
    """1 + 20/C^0.1 and 1.05 + 100/C^0.15: the first is lower below 3e14 FLOPs or so, and again above 3e24."""
    first, second = known("a", [1.0] * 21, [20.0] * 21, [0.1] * 21), known("b", [1.05] * 21, [100.0] * 21, [0.15] * 21)
    flops_C = np.geomspace(1e8, 1e27, 20001)
    gap_C = 1.0 + 20 / flops_C**0.1 - 1.05 - 100 / flops_C**0.15
    turns = flops_C[1:][gap_C[1:] * gap_C[:-1] < 0]
    found = crossing(first, second, 1e8, 1e27)["crossings"]
    assert [turn["to"] for turn in found] == ["b", "a"]
    assert [turn["flops"]["value"] for turn in found] == pytest.approx(turns, rel=0.01)


def test_a_law_without_a_loss_at_its_optimum_has_no_crossing():
    short = parabolas(0.002).take(np.arange(21))
    with pytest.raises(InputError, match="points: b: fewer than 4 budgets have a minimum; add budgets"):
        crossing(family("a", 1.7, 1000), ("b", LAWS["2"], LAWS["2"].fit(short, 200, 0)), 1e18, 1e21)


def test_no_value_has_no_interval():
    with pytest.raises(ValueError, match="no value"):
        interval(np.array([np.nan, 1.0, 2.0]))


def test_the_minima_of_the_budgets_are_given_with_intervals():
    answer = analyse(parabolas(0.003), "2", bootstrap=100)
    assert [row["runs"] for row in answer["budgets"]] == [7] * 6
    for row in answer["budgets"]:
        flops = row["flops"]
        best = {"N_opt": 0.1 * flops**0.48, "D_opt": flops**0.52 / 0.6, "loss": 1.7 + 1000 / flops**0.15}
        for name, truth in best.items():
            reach = row[name]["high"] - row[name]["low"]
            assert row[name]["low"] - reach < truth < row[name]["high"] + reach


def test_perplexities_are_suspected_even_of_good_models():
    """Their median is 9 here: no loss in nats or bits is impossible, but a tenth of them is above 12."""
    points = ladder(0.003)
    perplexity_P = np.exp(points.loss_P - 0.65)
    assert 8 < np.median(perplexity_P) < 10
    notes = analyse(make(points.params_P, perplexity_P, flops=points.flops_P), "3", bootstrap=20)["notes"]
    assert any("perplexities?" in note for note in notes)


def test_an_outlier_does_not_make_the_law_undecided():
    """The loss changes by 3% over all parameters; 19 of 20 runs are 0.2% off the law, one 8%."""
    points, rng = ladder(), np.random.default_rng(0)
    noise_P = 0.002 * rng.standard_normal(80) - 0.08 * (np.arange(80) % 20 == 3)
    term_P = 0.1 * (points.params_P / points.params_P.min()) ** -0.34
    points = make(points.params_P, (1.7 + term_P + 400 / points.tokens_P**0.28) * np.exp(noise_P), flops=points.flops_P)
    answer = analyse(points, "3", bootstrap=20)
    assert len(answer["outliers"]) >= 4 and answer["residual_rms"] > 0.015 and answer["notes"] == []


@pytest.mark.parametrize("field, scale, unit", [("params", 1e-9, "billions"), ("params", 1e-6, "millions or billions"),
                                                ("tokens", 1e-9, "billions")])
def test_columns_in_millions_or_billions_are_suspected(field, scale, unit):
    points = ladder(0.003).take(np.arange(80) < 40)
    columns = {"params": points.params_P, "tokens": points.tokens_P}
    columns[field] = columns[field] * scale
    notes = analyse(make(columns["params"], points.loss_P, columns["tokens"]), "3", bootstrap=20)["notes"]
    what = "parameters" if field == "params" else field
    assert any(re.search(rf"there are \S+ {what} .median.: probably {unit}.", note) for note in notes)


@pytest.mark.parametrize("change, note", [
    ({"flops": 1e-9}, "FLOPs are 6e-09 times parameters times tokens, 6 as a rule"),
    ({"params": 1e-9}, r"there are 2\S*e.10 tokens a parameter .median.: are they in other units"),
])
def test_numbers_in_other_units_are_suspected(change, note):
    points = ladder(0.003)
    scale = {"params": 1.0, "flops": 1.0} | change
    answer = analyse(make(points.params_P * scale["params"], points.loss_P, points.tokens_P,
                          points.flops_P * scale["flops"] * scale["params"]), "3", bootstrap=20)
    assert any(re.search(note, found) for found in answer["notes"])
