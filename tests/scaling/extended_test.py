"""Laws with a further regressor come back from their own losses; the optimum at a budget; serving prefers small models."""

import dataclasses

import numpy as np
import pytest

from research.errors import InputError
from research.scaling.analysis import analyse
from research.scaling.extended import EXTENDED, inference_optimum, optimum_at
from research.scaling.laws import log_loss
from research.scaling.points import make
from research.scaling.uncertainty import interval
from tests.scaling.laws_test import CHINCHILLA, chinchilla

NOISE = 0.002
# Hoffmann et al. 2022 with Muennighoff et al. 2023's constants; s, P, C and kappa are ours.
MORE = {"repeated": {"R_D": 15.39, "R_N": 5.31}, "moe": {"s": 0.4}, "precision": {"P": 3.0}, "state": {"C": 30.0, "kappa": 0.5}}
THIRD = {"moe": [1, 2, 8, 32], "precision": [3, 4, 8, 16], "state": [1e3, 1e4, 1e5, 1e6]}  # of moe: total over active


def repeated_loss(n_P, d_P, u_P, r_d=15.39, r_n=5.31):
    p = CHINCHILLA
    u_P = np.minimum(u_P, d_P)
    best_P = (p["alpha"] * p["A"] / p["beta"] / p["B"] * u_P ** p["beta"]) ** (1 / p["alpha"])
    u_n_P = np.minimum(n_P, best_P)
    d_eff_P = u_P + u_P * r_d * (1 - np.exp(-(d_P / u_P - 1) / r_d))
    n_eff_P = u_n_P + u_n_P * r_n * (1 - np.exp(-(n_P / u_n_P - 1) / r_n))
    return chinchilla(n_eff_P, d_eff_P)


def loss_of(name, n_P, d_P, z_P):
    more = MORE[name]
    if name == "repeated":
        return repeated_loss(n_P, d_P, z_P, more["R_D"], more["R_N"])
    if name == "moe":
        return chinchilla(n_P ** (1 - more["s"]) * z_P ** more["s"], d_P)
    if name == "precision":
        return chinchilla(n_P * (1 - np.exp(-z_P / more["P"])), d_P)
    return chinchilla(n_P, d_P) + more["C"] / z_P ** more["kappa"]


def runs(name, noise=0.0, most_params=1e10):
    """4 sizes x 4 token counts x 4 values of the regressor."""
    n, d = np.geomspace(most_params / 1e3, most_params, 4), np.geomspace(1e9, 1e12, 4)
    n_P, d_P, z_P = (a.ravel() for a in np.meshgrid(n, d, [1 / 60, 1 / 10, 1 / 3, 1] if name == "repeated" else THIRD[name]))
    z_P = {"repeated": d_P * z_P, "moe": n_P * z_P}[name] if name in ("repeated", "moe") else z_P
    loss_P = loss_of(name, n_P, d_P, z_P) * np.exp(noise * np.random.default_rng(0).standard_normal(len(n_P)))
    return make(n_P, loss_P, tokens=d_P, extra={EXTENDED[name].extra[0]: z_P})


@pytest.mark.parametrize("name", EXTENDED)
def test_the_law_comes_back_without_noise_and_inside_its_intervals(name):
    truth = CHINCHILLA | MORE[name]
    exact = EXTENDED[name].fit(runs(name), 0, 0)
    assert {key: float(exact.parameters[key][0]) for key in truth} == pytest.approx(truth, rel=1e-3)
    assert np.abs(exact.residual_P).max() < 1e-6 and exact.notes == ()
    noisy = EXTENDED[name].fit(runs(name, NOISE), 60, 0)
    assert np.std(noisy.residual_P) == pytest.approx(NOISE, rel=0.3)
    for key, true in truth.items():  # 5 to 7 intervals, and a bootstrap of 60: their ends may be a little short
        band = interval(noisy.parameters[key])
        reach = 0.5 * (band["high"] - band["low"])
        assert band["low"] - reach < true < band["high"] + reach, key


@pytest.mark.parametrize("name, at", [("repeated", 1e10), ("moe", 8.0), ("precision", 4.0), ("state", 1e4)])
def test_the_optimum_at_a_budget_is_the_lowest_loss_there(name, at):
    parameters = {key: np.array([value, value]) for key, value in (CHINCHILLA | MORE[name]).items()}
    parameters |= {"G": np.array([0.6, 0.6]), "a_opt": np.array([0.45, 0.45])}  # where the search looks
    best = optimum_at(EXTENDED[name], parameters, 1e22, 6.0, at)
    n_P = best["N_opt"][0] * np.exp(np.linspace(-2, 2, 4001))
    losses = loss_of(name, n_P, 1e22 / 6 / n_P, at * n_P if name == "moe" else at)
    assert best["N_opt"][0] == pytest.approx(n_P[losses.argmin()], rel=0.01)
    assert best["loss"][0] == pytest.approx(losses.min(), rel=1e-4)
    assert best["N_opt"] * best["D_opt"] * 6 == pytest.approx(1e22)


def test_without_excess_parameters_only_the_datas_decay_is_fitted_and_said():
    fitted = EXTENDED["repeated"].fit(runs("repeated", most_params=2e5), 0, 0)
    assert "R_N" not in fitted.parameters and fitted.notes[0].startswith("no R_N: 0 runs")
    assert fitted.parameters["R_D"][0] == pytest.approx(15.39, rel=0.02)


def test_parameters_that_lose_nothing_have_no_decay_and_no_figure():
    """R_N would be 1e50 or so: it is said to be undecided, and N' = N."""
    points = runs("repeated")
    exact = repeated_loss(points.params_P, points.tokens_P, points.extra["unique_tokens"], r_n=1e8)
    noise_P = np.exp(NOISE * np.random.default_rng(1).standard_normal(len(points)))
    fitted = EXTENDED["repeated"].fit(make(points.params_P, exact * noise_P, points.tokens_P, extra=points.extra), 20, 0)
    assert "R_N" not in fitted.parameters and "no R_N: undecided, as nothing is lost" in fitted.notes[0]
    assert fitted.parameters["R_D"][0] == pytest.approx(15.39, rel=0.1)
    endless = chinchilla(points.params_P, points.tokens_P) * noise_P
    fitted = EXTENDED["repeated"].fit(make(points.params_P, endless, points.tokens_P, extra=points.extra), 20, 0)
    assert any("R_D is undecided, whatever its figure says" in note for note in fitted.notes)


def test_one_epoch_is_chinchillas_law():
    points = runs("repeated")
    once = make(points.params_P, points.loss_P, tokens=points.tokens_P, extra={"unique_tokens": points.tokens_P})
    parameters = {key: np.array([value]) for key, value in (CHINCHILLA | {"R_D": 15.39}).items()}
    told = log_loss(EXTENDED["repeated"], parameters, once)[0]
    np.testing.assert_allclose(np.exp(told), chinchilla(once.params_P, once.tokens_P), rtol=1e-9)


@pytest.mark.parametrize("size, served, best_size, saved, less", [
    (13e9, 2e12, 7e9, 0.17, 1.7e22), (30e9, 1e13, 13.6e9, 0.28, 2.5e23)])
def test_serving_prefers_smaller_models(size, served, best_size, saved, less):
    """Sardana et al. 2023, figure 1: of Chinchilla's 13B quality, for 2e12 served tokens, a 7B saves 17%, 1.7e22 FLOPs."""
    p = {"E": 1.69, "A": 406.4, "B": 410.7, "alpha": 0.336, "beta": 0.283}
    parameters = {name: np.array([value, value]) for name, value in p.items()}
    g = (p["alpha"] * p["A"] / p["beta"] / p["B"]) ** (1 / (p["alpha"] + p["beta"]))
    tokens = (size / g) ** (p["alpha"] / p["beta"]) / g
    loss_T = np.full(2, p["E"] + p["A"] / size ** p["alpha"] + p["B"] / tokens ** p["beta"])
    alone, both = inference_optimum(parameters, loss_T, 1e-9), inference_optimum(parameters, loss_T, served)
    assert alone["N_opt"][0] == pytest.approx(size, rel=1e-3) and alone["saved"][0] == pytest.approx(0, abs=1e-9)
    assert both["N_opt"][0] == pytest.approx(best_size, rel=0.01) and both["saved"][0] == pytest.approx(saved, abs=0.005)
    assert both["flops"][0] * both["saved"][0] / (1 - both["saved"][0]) == pytest.approx(less, rel=0.02)
    reached = p["E"] + p["A"] / both["N_opt"][0] ** p["alpha"] + p["B"] / both["D_opt"][0] ** p["beta"]
    assert reached == pytest.approx(loss_T[0])
    assert np.isnan(inference_optimum(parameters, np.full(2, 1.6), served)["N_opt"]).all()  # below E


BAD = [
    ("moe", lambda: make([1e7] * 9, [3.0] * 9, tokens=[1e9] * 9), "this law needs total_params=NAME"),
    ("moe", lambda: dataclasses.replace(runs("moe"), extra={"total_params": np.full(64, 1e7)}), "run 12 has 1e.07, and more"),
    ("moe", lambda: runs("moe").take(np.arange(64) % 4 == 0), "fewer than 2 different ratios of total to active"),
    ("precision", lambda: runs("precision").take(np.arange(64) % 4 == 0), "fewer than 2 different values of bits"),
    ("state", lambda: runs("state").take(np.arange(64) % 4 < 2), "fewer than 3 different values of state"),
    ("repeated", lambda: runs("repeated").take(np.arange(64) % 4 == 3), "0 runs see their unique tokens more than 1.5 times"),
    ("repeated", lambda: runs("repeated").take(np.arange(9)), "9 runs can't decide 7 parameters; give at least 10"),
]


@pytest.mark.parametrize("name, points, message", BAD)
def test_too_little_is_refused_in_one_line(name, points, message):
    with pytest.raises(InputError, match=message):
        EXTENDED[name].fit(points(), 20, 0)


@pytest.mark.parametrize("options, message", [
    ({"budget": 1e20}, "--at: approach precision at a budget needs its bits; give --budget and --at=bits=NUMBER"),
    ({"at": ("bits", 8.0)}, "--at: says nothing without a budget"),
    ({"budget": 1e20, "at": ("state", 8.0)}, "--at: state isn't"),
    ({"budget": 1e20, "at": ("bits", -1.0)}, "--at: -1 is not"),
    ({"budget": 1e20, "at": ("bits", 8.0), "served_tokens": 1e9}, "--served_tokens: needs --approach=3"),
])
def test_bad_questions_are_one_line(options, message):
    with pytest.raises(InputError, match=message):
        analyse(runs("precision"), "precision", **options)


def test_an_answer_at_a_budget_has_intervals():
    answer = analyse(runs("precision", NOISE), "precision", bootstrap=20, budget=1e21, at=("bits", 4.0))["optimum"]
    exact = optimum_at(EXTENDED["precision"], EXTENDED["precision"].fit(runs("precision"), 0, 0).parameters, 1e21, 6.0, 4.0)
    assert answer["bits"] == 4.0 and answer["loss"]["low"] < exact["loss"][0] < answer["loss"]["high"]
    assert answer["N_opt"]["low"] < answer["N_opt"]["value"] < answer["N_opt"]["high"]
