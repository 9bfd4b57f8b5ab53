"""A ladder's grid, what its prefixes predict, and how its intervals are widened."""

import csv

import numpy as np
import pytest

from research.errors import InputError
from research.scaling import ladder
from research.scaling.ladder import (
    Size,
    backtests,
    corrected,
    drift,
    drift_figure,
    forecast,
    grid,
    rung_at,
    widening,
    write_csv,
)
from research.scaling.points import Points, make

SIZES = [Size(dim, {}, 1000 * dim, 900 * dim, 7000.0 * dim, 1024, 0.01) for dim in (16, 32, 64, 128)]


def law(n: np.ndarray, d: np.ndarray) -> np.ndarray:
    return 1.2 + 60 / n**0.4 + 199 / d**0.4  # best at 20 tokens a parameter


def climb(noise: float, bend: float = 0.0, seed: int = 1) -> Points:
    """5 budgets of 4 sizes; `bend` adds what the law doesn't know of: a loss that falls ever faster with compute."""
    rng, n, d = np.random.default_rng(seed), [], []
    for flops in np.geomspace(1e11, 4e12, 5):
        sizes = np.sqrt(flops / 120) * np.geomspace(0.4, 2.5, 4)
        n += sizes.tolist()
        d += (flops / 6 / sizes).tolist()
    n, d = np.array(n), np.array(d)
    loss = law(n, d) * np.exp(noise * rng.standard_normal(len(n))) * (1 - bend * np.log(6 * n * d / 1e11) ** 2)
    return make(n, loss, d)


def test_a_rung_costs_what_it_is_asked_to_and_its_parts_add_up():
    rung = rung_at(SIZES[1], 5e12)
    assert rung.flops == pytest.approx(5e12, rel=1e-3) and rung.tokens == rung.steps * 1024
    assert rung.branch_step + rung.decay_steps == rung.steps and rung.decay_steps == -(-rung.steps // 5)


def test_a_budget_takes_the_sizes_whose_tokens_a_parameter_are_in_the_window():
    rungs = grid(SIZES, [1e12, 2e11], warmup_steps=3, ratios=(2.0, 300.0))
    # 1.7 tokens a parameter at 2e11 FLOPs and width 128, 558 at 1e12 and width 16
    assert [rung.size.dim for rung in rungs] == [16, 32, 64, 32, 64, 128]
    assert [round(rung.flops / 1e11) for rung in rungs] == [2, 2, 2, 10, 10, 10]


@pytest.mark.parametrize("budgets, warmup, message", [
    ([1e9], 3, "give 0 of 4 sizes"), ([1e12], 2000, "of which 2000 warm up")])
def test_a_grid_without_a_parabola_or_a_plateau_is_refused(budgets, warmup, message):
    with pytest.raises(InputError, match=f"--budgets: .*{message}"):
        grid(SIZES, budgets, warmup, ratios=(2.0, 300.0))


def test_a_diverged_run_is_written_without_a_loss(tmp_path):
    row = {"params": 1, "non_embedding": 1, "tokens": 2, "flops": 12, "loss": None, "loss_se": None, "seed": 0, "run": "a",
           "diverged": 1}
    write_csv(str(tmp_path / "l.csv"), [row])
    found, = csv.DictReader(open(tmp_path / "l.csv"))
    assert tuple(found) == ladder.COLUMNS and found["loss"] == "nan" and found["diverged"] == "1"


@pytest.fixture(scope="module")
def tests():
    return backtests(climb(0.002), "3", bootstrap=64)


def test_every_prefix_that_decides_the_law_predicts_all_later_runs(tests):
    # 4 runs don't decide five parameters: the prefixes are of 2, 3 and 4 budgets.
    assert len(tests) == 4 * (3 + 2 + 1) and sum(row["next"] for row in tests) == 12
    assert all(row["times"] > 1 for row in tests)
    assert sum(row["covered"] for row in tests) >= 0.8 * len(tests)
    assert np.mean([abs(row["relative_error"]) for row in tests if row["next"]]) < 0.01


def test_what_is_predicted_does_not_depend_on_the_losses_to_come():
    points = climb(0.002)
    seen, unseen = points.take(np.arange(12)), points.take(np.arange(12, 20))
    shifted = make(unseen.params_P, 2 * unseen.loss_P, unseen.tokens_P)
    assert forecast(seen, "3", unseen, 32) == forecast(seen, "3", shifted, 32)


def test_no_backtest_depends_on_the_losses_to_come():
    """Neither a prefix's law nor the drift that corrects it."""
    points = climb(0.002, bend=0.003)
    last = points.flops_P > 2e12
    shifted = make(points.params_P, np.where(last, 1.1, 1.0) * points.loss_P, points.tokens_P)
    found, other = (backtests(p, "3", bootstrap=16) for p in (points, shifted))
    assert sum(last) == 4 and [row["predicted"] for row in found] == [row["predicted"] for row in other]
    assert [row["observed"] for row in found] != [row["observed"] for row in other]


def test_a_law_that_errs_ever_more_in_one_direction_is_corrected(tests):
    assert abs(drift(tests)) < 0.002 and drift([]) == 0.0
    points = climb(0.0005, bend=0.003)
    rows = [row for row in backtests(points, "3", bootstrap=16) if row["drift"]]
    assert {row["seen"] for row in rows} == {row["seen"] for row in rows if row["drift"] < 0} and len(rows) == 8 + 4
    alone = [np.log(row["observed"] / row["law"]["value"]) for row in rows]
    moved = [np.log(row["observed"] / row["predicted"]["value"]) for row in rows]
    assert np.max(alone) < 0 and np.sum(np.square(moved)) < 0.5 * np.sum(np.square(alone))
    assert all(row["covered"] for row in rows)


def test_the_drift_has_an_interval_over_the_budgets(tests):
    told = drift_figure(tests)
    assert told["value"] == drift(tests) and told["low"] < 0 < told["high"] and told["high"] - told["low"] < 0.02
    bent = drift_figure(backtests(climb(0.0005, bend=0.003), "3", bootstrap=16))
    assert bent["low"] < bent["value"] < bent["high"] < 0
    few = drift_figure([row for row in tests if row["budget"] > 2])
    assert few["low"] == -1e300 and few["high"] == 1e300 and drift_figure([])["value"] == 0


def test_a_correction_may_be_none_or_twice_as_large():
    sure = {"value": 2.0, "low": 2.0, "high": 2.0}
    found = corrected(sure, -0.01, np.exp(3.0))
    assert [found[name] for name in ("low", "value", "high")] == pytest.approx([2 * np.exp(-0.06), 2 * np.exp(-0.03), 2.0])
    band = {"value": 2.0, "low": 1.9, "high": 2.2}
    for same in (corrected(band, 0.0, 10.0), corrected(band, 0.5, 0.3)):  # no drift, and no run beyond what was seen
        assert same == pytest.approx(band)


def test_intervals_are_widened_where_the_errors_were_larger(tests):
    assert 1.0 <= widening(tests) < 2.0 and widening([]) == 1.0
    said = [row["predicted"]["value"] for row in tests]
    worse = [row | {"observed": value * (row["observed"] / value) ** 5} for row, value in zip(tests, said)]
    assert widening(worse) > 2 * widening(tests)
    band = {"value": 2.0, "low": 1.9, "high": 2.2}
    wide = corrected(band, 0.0, 10.0, widen=2.0)
    assert wide["value"] == 2.0
    for name in ("low", "high"):
        assert np.log(wide[name] / 2.0) == pytest.approx(2 * np.log(band[name] / 2.0))


def test_a_law_of_the_optimum_is_held_to_each_budgets_best_run():
    rows = backtests(climb(0.002), "2", bootstrap=64)
    assert len(rows) == 1 and rows[0]["next"]  # 4 budgets decide L(C)
