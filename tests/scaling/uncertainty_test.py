"""Intervals, outliers, the budget that is left out, and the whole analysis as plain data."""

import json

import numpy as np
import pytest

from research.errors import InputError
from research.scaling.analysis import analyse
from research.scaling.points import make
from research.scaling.uncertainty import interval, outliers, predictive, resamples
from tests.scaling.laws_test import chinchilla, ladder, parabolas


def test_resamples_hold_as_many_runs_and_are_decided_by_the_seed():
    counts = resamples(7, 50, seed=3)
    assert counts.shape == (50, 7) and (counts.sum(1) == 7).all() and (counts == resamples(7, 50, seed=3)).all()
    assert (counts != resamples(7, 50, seed=4)).any()


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
    spoilt = make(points.params_P, np.where(np.arange(80) == 7, 1.3 * points.loss_P, points.loss_P), flops=points.flops_P)
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
