"""Known laws come back: without noise exactly, in any units, and with noise inside their intervals."""

import numpy as np
import pytest

from research.errors import InputError
from research.scaling.laws import LAWS, at_optimum, optimum
from research.scaling.points import Points, make
from research.scaling.uncertainty import interval, predictive

CHINCHILLA = {"E": 1.69, "A": 406.4, "B": 410.7, "alpha": 0.34, "beta": 0.28}  # Hoffmann et al. 2022, equation 10
KAPLAN = {"alpha_N": 0.076, "N_c": 8.8e13, "alpha_D": 0.095, "D_c": 5.4e13}  # Kaplan et al. 2020, equations 1.1, 1.2


def chinchilla(params_P, tokens_P):
    p = CHINCHILLA
    return p["E"] + p["A"] / params_P ** p["alpha"] + p["B"] / tokens_P ** p["beta"]


def ladder(noise: float = 0.0, seed: int = 0) -> Points:
    """8 budgets of 10 sizes around 20 tokens a parameter."""
    flops_P = np.repeat(np.geomspace(1e18, 1e21, 8), 10)
    params_P = np.sqrt(flops_P / 120) * np.tile(np.exp(np.linspace(-2, 2, 10)), 8)
    loss_P = chinchilla(params_P, flops_P / 6 / params_P)
    return make(params_P, loss_P * np.exp(noise * np.random.default_rng(seed).standard_normal(80)), flops=flops_P)


def parabolas(noise: float = 0.0, seed: int = 0) -> Points:
    """6 budgets of 7 sizes, off centre; the loss is a parabola in log N with N_opt = 0.1 C^0.48, so D_opt = C^0.52 / 0.6."""
    flops_P = np.repeat(np.geomspace(1e18, 1e21, 6), 7)
    x_P = np.tile(np.linspace(-1.3, 1.1, 7), 6)
    loss_P = 1.7 + 1000 / flops_P**0.15 + 0.06 * x_P**2
    return make(0.1 * flops_P**0.48 * np.exp(x_P), loss_P * np.exp(noise * np.random.default_rng(seed).standard_normal(42)),
                flops=flops_P)


def values(approach: str, points: Points) -> dict[str, float]:
    return {name: float(found[0]) for name, found in LAWS[approach].fit(points, 0, 0).parameters.items()}


def test_the_parametric_law_comes_back_without_noise():
    found = values("3", ladder())
    assert {name: found[name] for name in CHINCHILLA} == pytest.approx(CHINCHILLA, rel=1e-5)
    assert found["a_opt"] == pytest.approx(0.28 / 0.62, rel=1e-6) and found["a_opt"] + found["b_opt"] == pytest.approx(1)
    law = LAWS["3"].fit(ladder(), 0, 0)
    best = {name: float(v[0]) for name, v in optimum(LAWS["3"], law.parameters, 1e23).items()}
    sizes = best["N_opt"] * np.exp(np.linspace(-1, 1, 2001))
    losses = chinchilla(sizes, 1e23 / 6 / sizes)
    assert sizes[losses.argmin()] == pytest.approx(best["N_opt"], rel=1e-3) and best["loss"] == pytest.approx(losses.min())
    assert best["N_opt"] * best["D_opt"] * 6 == pytest.approx(1e23)


def test_kaplans_law_comes_back_without_noise():
    points, p = ladder(), KAPLAN
    inner_P = (p["N_c"] / points.params_P) ** (p["alpha_N"] / p["alpha_D"]) + p["D_c"] / points.tokens_P
    points = make(points.params_P, inner_P ** p["alpha_D"], flops=points.flops_P)
    found = values("kaplan", points)
    assert {name: found[name] for name in p} == pytest.approx(p, rel=1e-4)
    fitted = LAWS["kaplan"].fit(points, 0, 0)
    best = optimum(LAWS["kaplan"], fitted.parameters, 1e23)
    assert best["loss"][0] == pytest.approx((found["C_c"] / 1e23) ** found["alpha_C"], rel=1e-6)
    nearby = LAWS["kaplan"].log_loss(fitted.parameters, best["N_opt"] * 1.1, best["D_opt"] / 1.1, None)
    assert nearby[0, 0] > np.log(best["loss"][0])


def test_isoflop_parabolas_are_exact():
    found = values("2", parabolas())
    expected = {"G": 0.1, "a_opt": 0.48, "H": 1 / 0.6, "b_opt": 0.52, "E": 1.7, "K": 1000, "gamma": 0.15}
    assert found == pytest.approx(expected, rel=1e-5)


def test_the_envelope_finds_the_optimum_of_a_grid():
    params_P, tokens_P = (a.ravel() for a in np.meshgrid(np.geomspace(1e7, 1e10, 25), np.geomspace(1e8, 1e12, 40)))
    found = values("1", make(params_P, chinchilla(params_P, tokens_P), tokens=tokens_P))
    assert found["a_opt"] == pytest.approx(0.28 / 0.62, abs=0.01) and found["b_opt"] == pytest.approx(0.34 / 0.62, abs=0.01)
    assert found["gamma"] == pytest.approx(0.34 * 0.28 / 0.62, rel=0.03) and found["E"] == pytest.approx(1.69, abs=0.02)


@pytest.mark.parametrize("approach", ["2", "3", "kaplan"])
def test_units_change_nothing_but_scales(approach):
    """Parameters in millions, FLOPs in 1e18, loss in bits: the same law, in those units."""
    points = parabolas(0.003) if approach == "2" else ladder(0.003)
    other = make(points.params_P / 1e6, points.loss_P / np.log(2), points.tokens_P / 1e9, points.flops_P / 1e18)
    ours, theirs = values(approach, points), values(approach, other)
    free = {"2": ("a_opt", "b_opt"), "3": ("alpha", "beta", "a_opt"), "kaplan": ("alpha_N", "alpha_D", "a_opt", "alpha_C")}
    for name in free[approach]:
        assert theirs[name] == pytest.approx(ours[name], rel=1e-5), name
    if approach != "kaplan":
        assert theirs["E"] * np.log(2) == pytest.approx(ours["E"], rel=1e-5)
    assert theirs["G"] * 1e6 * 1e-18 ** ours["a_opt"] == pytest.approx(ours["G"], rel=1e-4)


def test_a_gross_outlier_hardly_moves_the_parametric_law():
    points = ladder(0.002)
    spoilt = make(points.params_P, np.where(np.arange(80) == 7, 2 * points.loss_P, points.loss_P), flops=points.flops_P)
    assert values("3", spoilt)["alpha"] == pytest.approx(values("3", points)["alpha"], abs=0.01)


def coverage(approach: str, trials: int, resamples: int, noise: float = 0.005) -> dict[str, float]:
    """The share of trials in which each parameter, N_opt and a new run's loss at 10 times the largest budget are inside their
    95% interval."""
    law, runs, budget = LAWS[approach], ladder if approach == "3" else parabolas, 1e22
    if approach == "3":
        true = {name: np.array([value]) for name, value in CHINCHILLA.items()}
        true |= at_optimum(true["alpha"], true["beta"], np.log(true["A"]), np.log(true["B"]), 6.0)
        best = optimum(law, true, budget)
        truth = {name: true[name][0] for name in (*CHINCHILLA, "a_opt")} | {name: best[name][0] for name in ("N_opt", "loss")}
    else:
        truth = {"a_opt": 0.48, "b_opt": 0.52, "E": 1.7, "gamma": 0.15, "N_opt": 0.1 * budget**0.48,
                 "loss": 1.7 + 1000 / budget**0.15}
    hits = dict.fromkeys(truth, 0)
    for trial in range(trials):
        fitted = law.fit(runs(noise, trial), resamples, trial)
        best = optimum(law, fitted.parameters, budget)
        best["loss"] = predictive(np.log(best["loss"]), fitted.residual_P, fitted.estimated, trial)
        new_run = truth["loss"] * np.exp(noise * np.random.default_rng([trial, 1]).standard_normal())
        for name, true_value in (truth | {"loss": new_run}).items():
            band = interval((fitted.parameters | best)[name])
            hits[name] += band["low"] <= true_value <= band["high"]
    return {name: count / trials for name, count in hits.items()}


@pytest.mark.parametrize("approach", ["2", "3"])
def test_intervals_cover_in_a_few_trials(approach):
    """12 trials: below 8 hits has a chance of 1e-4 at 95%."""
    assert min(coverage(approach, 12, 100).values()) >= 8 / 12


@pytest.mark.slow
@pytest.mark.parametrize("approach", ["2", "3"])
def test_intervals_cover_95_percent(approach):
    """60 trials: below 52 hits has a chance of 0.3% at 95%. docs/results/scaling-coverage.json has 200 trials."""
    assert min(coverage(approach, 60, 192).values()) >= 52 / 60


BAD = [
    ("3", lambda: ladder().take(np.arange(0, 80, 12)), "7 runs can't decide 5 parameters; give at least 8"),
    ("3", lambda: ladder().take(np.repeat(np.arange(0, 80, 12), 3)), "7 rungs .21 runs; seeds don't count. can't decide 5"),
    ("kaplan", lambda: ladder().take(np.arange(6)), "6 runs can't decide 4 parameters; give at least 7"),
    ("3", lambda: make([1e6] * 9, np.linspace(4, 3, 9), tokens=np.geomspace(1e7, 1e9, 9)), "fewer than 3 different sizes"),
    ("3", lambda: make(np.geomspace(1e6, 1e9, 9), np.linspace(4, 3, 9), tokens=[1e9] * 9), "fewer than 3 different token"),
    ("3", lambda: make(np.geomspace(1e6, 1e9, 9), np.linspace(4, 3, 9), tokens=20 * np.geomspace(1e6, 1e9, 9)),
     "always change together"),
    ("3", lambda: make(np.geomspace(1e6, 1e9, 9), np.linspace(4, 3, 9), flops=np.linspace(1, 1.05, 9) * 1e18),
     "one budget only, of about 1.02e.18 FLOPs; a law in N and D needs runs at several"),
    ("3", lambda: make(ladder().params_P, np.full(80, 3.0), flops=ladder().flops_P), "loss: every run has the same, 3; name"),
    ("2", lambda: parabolas().take(np.arange(7)), "1 budget only; approach 2 needs at least 2 budgets"),
    ("2", lambda: parabolas().take(np.arange(42) % 7 < 2), "0 of 6 budgets have a minimum among 3 sizes or more"),
    ("1", ladder, "80 runs have no envelope"),
]


@pytest.mark.parametrize("approach, points, message", BAD)
def test_too_little_is_refused_in_one_line(approach, points, message):
    with pytest.raises(InputError, match=message):
        LAWS[approach].fit(points(), 20, 0)


def test_a_budget_without_a_minimum_is_left_out_and_named():
    points = parabolas()
    falling = np.where(np.arange(42) < 7, 5 - 0.01 * np.arange(42), points.loss_P)
    fitted = LAWS["2"].fit(make(points.params_P, falling, flops=points.flops_P), 20, 0)
    assert fitted.notes == ("the budget of 1e+18 FLOPs has no minimum among its sizes (7 runs): left out",)
    assert fitted.parameters["a_opt"][0] == pytest.approx(0.48) and len(fitted.residual_P) == 35


def test_a_budget_whose_parabola_opens_downwards_is_left_out_and_named():
    """Over its sizes, or over its token counts alone (one run's tokens are off by much)."""
    points = parabolas()
    middle = np.where(np.arange(42) < 7, 6 - points.loss_P, points.loss_P)
    tokens_P = np.where(np.arange(42) == 3, 40 * points.tokens_P, points.tokens_P)
    for spoilt in (make(points.params_P, middle, flops=points.flops_P),
                   make(points.params_P, points.loss_P, tokens_P, points.flops_P)):
        fitted = LAWS["2"].fit(spoilt, 20, 0)
        assert fitted.notes == ("the budget of 1e+18 FLOPs has no minimum among its sizes (7 runs): left out",)
        assert fitted.parameters["b_opt"][0] == pytest.approx(0.52) and len(fitted.minima["flops"]) == 5


def test_sizes_far_from_the_best_one_are_in_no_parabola():
    """9 budgets of 13 sizes over four decades: among all of them the loss is no parabola, and N_opt would be up to 26% off."""
    flops_P = np.repeat(np.geomspace(1e18, 1e21, 9), 13)
    params_P = np.tile(np.geomspace(1e7, 1e11, 13), 9)
    points = make(params_P, chinchilla(params_P, flops_P / 6 / params_P), flops=flops_P)
    fitted = LAWS["2"].fit(points, 20, 0)
    assert all("are more than 10 times larger or smaller than its best size" in note for note in fitted.notes)
    p, best = CHINCHILLA, np.exp(np.log(fitted.minima["flops"] / 6) * 0.28 / 0.62)
    best *= (p["alpha"] * p["A"] / p["beta"] / p["B"]) ** (1 / 0.62)
    np.testing.assert_allclose(fitted.minima["N_opt"][0], best, rtol=0.05)
    assert fitted.parameters["a_opt"][0] == pytest.approx(0.28 / 0.62, abs=0.01)
    assert len(fitted.residual_P) == fitted.minima["runs"].sum() < len(points)


def test_an_envelope_of_one_winner_has_no_slope():
    """3 sizes: only the middle one can win, and its size doesn't grow with compute."""
    params_P, tokens_P = (a.ravel() for a in np.meshgrid(np.geomspace(1e8, 1e10, 3), np.geomspace(1e9, 1e12, 20)))
    with pytest.raises(InputError, match="60 runs have no envelope: 1 sizes win .*; approach 1 needs at least 4 sizes"):
        LAWS["1"].fit(make(params_P, chinchilla(params_P, tokens_P), tokens=tokens_P), 20, 0)


def test_budgets_that_scatter_by_a_few_percent_lead_to_the_same_optimum():
    """Every run's FLOPs are up to 4% off; the loss follows, and so do the fitted optima, within 1%."""
    flops_P = np.repeat(np.geomspace(1e18, 1e21, 6), 7) * np.exp(0.04 * np.random.default_rng(1).uniform(-1, 1, 42))
    params_P = 0.1 * flops_P**0.48 * np.exp(np.tile(np.linspace(-1.3, 1.1, 7), 6))
    loss_P = 1.7 + 1000 / flops_P**0.15 + 0.06 * np.log(params_P / (0.1 * flops_P**0.48)) ** 2
    fitted = LAWS["2"].fit(make(params_P, loss_P, flops=flops_P), 0, 0)
    assert fitted.notes == () and fitted.parameters["a_opt"][0] == pytest.approx(0.48, abs=0.005)
    for flops in (1e18, 1e21):
        assert optimum(LAWS["2"], fitted.parameters, flops)["N_opt"][0] == pytest.approx(0.1 * flops**0.48, rel=0.01)


def test_a_budget_that_barely_decides_its_minimum_barely_counts():
    """3 sizes close together, with a minimum far off the law's: the others' optima stand."""
    points = parabolas()
    x_P, flops = np.array([0.5, 0.6, 0.7]), 3e21
    vague_P = 1.7 + 1000 / flops**0.15 + 0.06 * (x_P - 0.62) ** 2
    joined = make(np.concatenate([points.params_P, 0.1 * flops**0.48 * np.exp(x_P)]),
                  np.concatenate([points.loss_P, vague_P]), flops=np.concatenate([points.flops_P, [flops] * 3]))
    assert LAWS["2"].fit(joined, 0, 0).parameters["a_opt"][0] == pytest.approx(0.48, abs=1e-3)


@pytest.mark.parametrize("approach", ["2", "3"])
def test_seeds_are_resampled_together(approach):
    """Copying every run thrice adds nothing: the intervals stay as wide. As separate runs they would shrink by sqrt(3)."""
    points = (parabolas if approach == "2" else ladder)(0.005)
    copies = points.take(np.repeat(np.arange(len(points)), 3))
    once, thrice = (interval(LAWS[approach].fit(p, 200, 0).parameters["a_opt"]) for p in (points, copies))
    assert thrice["value"] == pytest.approx(once["value"], rel=1e-3)
    assert thrice["high"] - thrice["low"] == pytest.approx(once["high"] - once["low"], rel=0.25)
