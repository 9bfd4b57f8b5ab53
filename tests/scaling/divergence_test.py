"""Diverged runs are found wherever they are, and noise, hard data and overfitting are none."""

import itertools

import numpy as np
import pytest

from research.scaling.analysis import analyse
from research.scaling.divergence import without_diverged
from research.scaling.extended import EXTENDED
from research.scaling.points import Points, make
from tests.scaling.extended_test import MORE, loss_of, repeated_loss, runs
from tests.scaling.laws_test import chinchilla, values


def noisy(params_P, tokens_P, noise: float, seed: int) -> Points:
    noise_P = np.exp(noise * np.random.default_rng(seed).standard_normal(len(params_P)))
    return make(params_P, chinchilla(params_P, tokens_P) * noise_P, tokens_P)


def grid(noise: float = 0.0, seed: int = 0, seeds: int = 1) -> Points:
    """5 sizes by 5 token counts, smallest first; losses about 4."""
    params_P, tokens_P = (a_P.ravel() for a_P in np.meshgrid(np.geomspace(1e6, 1e8, 5), np.geomspace(2e7, 2e9, 5)))
    return noisy(np.tile(params_P, seeds), np.tile(tokens_P, seeds), noise, seed)


def scatter(noise: float = 0.0, seed: int = 0) -> Points:
    """171 runs of any size at any budget, as far apart as Chinchilla's."""
    rng = np.random.default_rng([seed, 1])
    params_P, flops_P = (np.exp(rng.uniform(*np.log(ends), 171)) for ends in ((4e7, 1.6e10), (6e18, 3e21)))
    return noisy(params_P, flops_P / 6 / params_P, noise, seed)


def isoflop(noise: float = 0.0, seed: int = 0) -> Points:
    """5 budgets of 10 sizes; the smallest run is of index 0."""
    flops_P = np.repeat(np.geomspace(1e17, 1e20, 5), 10)
    params_P = np.sqrt(flops_P / 120) * np.tile(np.exp(np.linspace(-2, 2, 10)), 5)
    return noisy(params_P, flops_P / 6 / params_P, noise, seed)


def short(noise: float = 0.0, seed: int = 0) -> Points:
    """5 budgets of 4 sizes: so few runs that one at an end bends the law of all, and another one hides it."""
    flops_P = np.repeat(np.geomspace(1e16, 4e17, 5), 4)
    params_P = np.sqrt(flops_P / 120) * np.tile(np.exp(np.linspace(-1, 1, 4)), 5)
    return noisy(params_P, flops_P / 6 / params_P, noise, seed)


DESIGNS = {"grid": grid, "seeds": lambda *args: grid(*args, seeds=3), "isoflop": isoflop, "scatter": scatter}


def spoilt(points: Points, index, factor: float) -> Points:
    loss_P = points.loss_P.copy()
    loss_P[list(index)] *= factor
    return make(points.params_P, loss_P, points.tokens_P, points.flops_P, extra=points.extra)


def named(points: Points) -> set[int]:
    return {int(run.split()[1]) for run, _ in without_diverged(points).left_out}


@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("noise", [0.005, 0.03, 0.06])
def test_noise_is_no_divergence(design, noise):
    for seed in range(3):
        assert without_diverged(DESIGNS[design](noise, seed)).left_out == ()


@pytest.mark.slow
@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("noise", [0.005, 0.03, 0.06])
def test_noise_is_no_divergence_in_twenty_data_sets(design, noise):
    for seed in range(20):
        assert without_diverged(DESIGNS[design](noise, seed)).left_out == ()


def places(points: Points) -> list[int]:
    """The ends of a design, where one run can bend the law, and its middle."""
    ends = [int(i) for a_P in (points.params_P, points.tokens_P, points.flops_P) for i in (a_P.argmin(), a_P.argmax())]
    return sorted({*ends, 1, len(points) // 5, len(points) // 2})


@pytest.mark.parametrize("design", DESIGNS)
def test_one_diverged_run_is_found_wherever_it_is(design):
    points = DESIGNS[design](0.005, 1)
    for i in places(points):
        assert named(spoilt(points, [i], 1.3)) == {i}


@pytest.mark.parametrize("design", DESIGNS)
def test_one_diverged_run_is_found_among_much_noise(design):
    points = DESIGNS[design](0.06, 1)
    for i in places(points):
        assert named(spoilt(points, [i], 2.0)) == {i}


@pytest.mark.parametrize("design, pairs", [
    ("grid", [(0, 1), (0, 5), (0, 24), (7, 8)]), ("isoflop", [(0, 1), (0, 10), (9, 19), (40, 49)]),
    ("seeds", [(0, 25), (0, 1), (24, 49)]), ("short", [(0, 4), (0, 1), (0, 3), (3, 19)])])
def test_two_diverged_runs_do_not_hide_each_other(design, pairs):
    points = (DESIGNS | {"short": short})[design](0.005, 2)
    for pair, factor in itertools.product(pairs, (1.3, 3.0)):
        assert named(spoilt(points, pair, factor)) == set(pair)


def test_what_is_said_of_it():
    points = grid(0.005)
    loss_P = np.where(np.arange(25) == 0, 10.5, points.loss_P)
    found = without_diverged(make(points.params_P, loss_P, points.tokens_P))
    (run, reason), = found.left_out
    assert len(found) == 24 and run == "run 0" and reason.startswith("diverged: its loss is 10.5, ")
    assert float(reason.split(", ")[1].split()[0]) == pytest.approx(chinchilla(1e6, 2e7), rel=0.03)
    assert without_diverged(found).names == found.names and without_diverged(found).left_out == found.left_out


@pytest.mark.parametrize("approach, exponent", [("2", "a_opt"), ("3", "alpha")])
def test_the_smallest_run_diverged_and_changes_no_fit(approach, exponent):
    points = isoflop(0.003)
    truth = values(approach, points)[exponent]
    answer = analyse(spoilt(points, [0], 9.5 / points.loss_P[0]), approach, bootstrap=20)
    assert [found["run"] for found in answer["left_out"]] == ["run 0"] and answer["outliers"] == []
    assert answer["parameters"][exponent]["value"] == pytest.approx(truth, abs=0.01)


def test_where_the_law_is_wrong_runs_stay():
    """As in the runs of Hoffmann et al.'s figure 4: with ever fewer tokens they end ever higher, up to 30% above the law."""
    points = scatter(0.004)
    few_P = np.argsort(points.tokens_P)[:8]
    loss_P = points.loss_P.copy()
    loss_P[few_P] *= np.exp([0.28, 0.31, 0.12, 0.14, 0.06, 0.045, 0.05, 0.03])
    answer = analyse(make(points.params_P, loss_P, points.tokens_P), "3", bootstrap=20)
    assert answer["left_out"] == [] and answer["points"] == 171
    assert {found["run"] for found in answer["outliers"]} >= {f"run {i}" for i in few_P[:2]}


def test_runs_that_are_too_good_have_not_diverged_nor_any_other():
    assert without_diverged(spoilt(grid(0.005), [0], 0.5)).left_out == ()
    assert without_diverged(spoilt(grid(0.005, seeds=3), [0, 25, 50], 0.5)).left_out == ()  # nor those beside them


@pytest.mark.parametrize("name", MORE)
def test_what_has_less_by_a_further_column_has_not_diverged(name):
    """Few bits, a small state, few experts, much repetition are worse by themselves; a diverged run is found there, too."""
    points = runs(name, 0.005)
    assert without_diverged(points).left_out == ()
    assert named(spoilt(points, [5], 2.0)) == {5}


@pytest.mark.parametrize("name, few, most", [("precision", 1.0, 16.0), ("state", 30.0, 1e6), ("moe", 1.0, 64.0),
                                             ("repeated", 0.005, 1.0)])
def test_a_few_runs_that_alone_have_less_have_not_diverged(name, few, most):
    """Three of 25, as much above the others as diverged ones, and all that the law knows of its further column."""
    points, third_P = grid(), np.where(np.isin(np.arange(25), [4, 12, 23]), few, most)
    regressor = EXTENDED[name].extra[0]
    extra_P = third_P * {"moe": points.params_P, "repeated": points.tokens_P, "precision": 1.0, "state": 1.0}[name]
    loss_P = loss_of(name, points.params_P, points.tokens_P, extra_P)
    loss_P = loss_P * np.exp(0.005 * np.random.default_rng(3).standard_normal(25))
    assert without_diverged(make(points.params_P, loss_P, points.tokens_P, extra={regressor: extra_P})).left_out == ()
    assert without_diverged(make(points.params_P, loss_P, points.tokens_P)).left_out != ()


def test_overfitting_on_repeated_data_is_no_divergence():
    """100 epochs of all sizes: up to twice the loss of one epoch."""
    params_P, tokens_P = (a_P.ravel() for a_P in np.meshgrid(np.geomspace(1e6, 1e9, 6), np.geomspace(1e9, 1e11, 6)))
    unique_P = np.tile([1.0, 0.01], 18) * tokens_P
    loss_P = repeated_loss(params_P, tokens_P, unique_P)
    assert without_diverged(make(params_P, loss_P, tokens_P, extra={"unique_tokens": unique_P})).left_out == ()


def test_too_few_runs_say_nothing_of_each_other():
    points = spoilt(grid(), [0], 3.0)
    assert len(without_diverged(points.take(np.arange(7)))) == 7
    several = make(points.params_P, points.loss_P, points.tokens_P, extra={"bits": np.full(25, 8.0), "state": np.full(25, 1e4)})
    assert len(without_diverged(several)) == 25
