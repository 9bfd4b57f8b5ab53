"""The guard's judgement on curves, and its decisions as tables."""

import dataclasses
import json
import math

import numpy as np
import pytest

from configs import preset
from research.config import override
from research.schema import GuardConfig
from research.training.guard import CHECKED, Alarm, Guard, Rollback, decide, rollbacks_of, spike_score, story

SMALL = GuardConfig(window=16, patience=2, rollback_steps=10, skip_batches=5, max_rollbacks=3)


def values(loss: float, **changes: float) -> dict[str, float]:
    return {**dict.fromkeys(CHECKED, 1.0), "objective": loss, **changes}


def alarms_of(config: GuardConfig, losses) -> list[Alarm]:
    """Those of a whole curve; after each one the guard starts afresh."""
    guard, found = Guard(config), []
    for step, loss in enumerate(losses, start=1):
        if alarm := guard.check(step, values(float(loss))):
            found.append(alarm)
            guard = Guard(config)
    return found


def healthy_curves(steps: int = 20_000) -> dict[str, np.ndarray]:
    """Curves of runs that nothing is wrong with."""
    rng, t = np.random.default_rng(0), np.arange(steps)
    trend = 1.8 + 8.0 * (t + 10.0) ** -0.35
    noise = rng.standard_normal(steps)
    slow = np.convolve(noise, np.ones(8) / np.sqrt(8), "same")  # neighbours alike
    return {
        "gaussian": trend + 0.05 * noise,
        "without noise": trend,
        "nothing is learned": np.full(steps, 3.0),
        "student, 3 degrees of freedom": trend + 0.05 * rng.standard_t(3, steps),
        "student, 2 degrees of freedom": trend + 0.05 * rng.standard_t(2, steps),
        "lognormal": trend + 0.05 * np.exp(rng.standard_normal(steps)),
        "one batch in ten from a harder source": trend + 0.02 * noise + (rng.random(steps) < 0.1),
        "three batches in a hundred from a harder source": trend + 0.02 * noise + 2.0 * (rng.random(steps) < 0.03),
        "neighbours alike": trend + 0.05 * slow,
        "warm-up: up first, then down": trend + 0.05 * noise + 0.4 * np.sin(np.minimum(t / 200, np.pi)),
        "decay at the end": trend - 0.3 * np.maximum(0, t / steps - 0.8) + 0.05 * noise,
        "near zero": 0.01 + 0.1 / (t + 1) + 0.001 * np.abs(noise),
        "slowly getting worse": 2.0 + t / steps + 0.02 * noise,
    }


@pytest.mark.parametrize("name", healthy_curves(1))
def test_false_alarms_are_rare(name):
    losses = healthy_curves()[name]
    assert len(alarms_of(GuardConfig(), losses)) < 0.001 * len(losses)


@pytest.mark.parametrize("rise", [0.3, 1.0, 5.0])
@pytest.mark.parametrize("name", ["gaussian", "student, 3 degrees of freedom", "without noise", "neighbours alike"])
def test_a_spike_is_found_when_patience_is_over(name, rise):
    config, losses = GuardConfig(), healthy_curves(4000)[name]
    at = 3000
    losses[at:] += 0.4 + rise
    first = alarms_of(config, losses)[0]
    assert at <= first.first <= at + 10 and first.step == first.first + config.patience - 1
    assert "the loss is" in first.reason and "deviations high" in first.reason


def test_a_rise_over_some_steps_is_found():
    losses = healthy_curves(4000)["gaussian"]
    losses[3000:] += np.minimum(np.arange(1000) * 0.2, 3.0)
    assert 3000 <= alarms_of(GuardConfig(), losses)[0].first < 3010


def test_single_outliers_and_falls_are_no_alarm():
    losses = healthy_curves(4000)["gaussian"]
    losses[500::50] += 100.0
    losses[1001::50] += 100.0  # two in a row
    losses[2000:] -= 1.0
    assert alarms_of(GuardConfig(), losses) == []


@pytest.mark.parametrize("name", CHECKED)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_not_finite_is_an_alarm_at_once(name, bad):
    guard = Guard(dataclasses.replace(SMALL, spike_zscore=0.0))
    assert guard.check(1, values(2.0)) is None
    assert guard.check(2, values(**{"loss": 2.0, name: bad}) if name != "objective" else values(bad)) == Alarm(
        2, 2, f"{name} is {bad}")


def test_spikes_can_be_left_alone():
    assert alarms_of(dataclasses.replace(SMALL, spike_zscore=0.0), [1.0] * 50 + [100.0] * 50) == []


def test_score_against_hand_made_windows():
    even = [1.0 + 0.1 * i for i in range(11)]  # median 1.5, deviations up to 0.5: their median 0.3; 95th percentile 2.0
    assert spike_score(1.5, even) == 0.0
    assert spike_score(2.5, even) == pytest.approx(1.0 / (0.3 * 1.4826))
    flat = [2.0] * 20
    assert spike_score(3.0, flat) == pytest.approx(1.0 / 0.02)  # 1% of the median
    skewed = [1.0] * 18 + [4.0] * 2
    assert spike_score(4.0, skewed) == pytest.approx(1.6449)
    rng = np.random.default_rng(1)
    scores = [spike_score(x, window) for window in rng.normal(10, 1, (2000, 128)) for x in [rng.normal(10, 1)]]
    assert np.std(scores) == pytest.approx(1.0, abs=0.12) and abs(np.mean(scores)) < 0.1


def test_the_memory_goes_through_json():
    """A guard that is put down and taken up anywhere sees what one that isn't does."""
    losses = np.concatenate([2.0 + 0.1 * np.random.default_rng(0).standard_normal(40), [9.0, 9.0]])
    whole = alarms_of(SMALL, losses)
    assert whole == [Alarm(41, 42, whole[0].reason)]
    for cut in range(len(losses)):
        guard = Guard(SMALL)
        for step in range(cut):
            guard.check(step + 1, values(losses[step]))
        guard = Guard(SMALL, json.loads(json.dumps(guard.saved())))
        later = [guard.check(step + 1, values(losses[step])) for step in range(cut, len(losses))]
        assert later[-1:] == whole and set(later[:-1]) <= {None}


NAN = Alarm(50, 50, "objective is nan")
SPIKE = Alarm(49, 50, "the loss is 9, 40.0 deviations high")


def past(first: int, at: int, to: int = 40, batches: int = 0) -> Rollback:
    return Rollback(first, at, "x", to, to if batches else 0, batches)


@pytest.mark.parametrize("alarm, history, kept, wanted", [
    # the first time: the newest checkpoint before it, the same data
    (NAN, [], [30, 40], (40, 0, 0)),
    (NAN, [], [], (0, 0, 0)),
    (SPIKE, [], [40, 48, 49, 50], (48, 0, 0)),  # what was saved while it rose is not good
    (SPIKE, [], [49], (0, 0, 0)),
    # again at the same place: about rollback_steps (10) before it, without skip_batches (5) or what there is until the alarm
    (NAN, [past(50, 50)], [30, 40], (30, 39, 11)),
    (NAN, [past(50, 50)], [39, 40], (39, 39, 11)),
    (NAN, [past(50, 50)], [42, 45], (42, 42, 8)),
    (NAN, [past(50, 50)], [47, 48], (47, 47, 5)),
    (NAN, [past(50, 50)], [], (0, 39, 11)),
    (SPIKE, [past(48, 49)], [30], (30, 38, 12)),
    # at another place, or after a skip: a new one
    (NAN, [past(20, 20)], [30, 40], (40, 0, 0)),
    (NAN, [past(50, 50), past(50, 50, 30, 11)], [30], (30, 0, 0)),
    (NAN, [past(50, 50, 30, 11), past(51, 51)], [30], (30, 39, 11)),
    # too often in one place (3), but not if it was long ago
    (NAN, [past(50, 50)] * 3, [30], None),
    (NAN, [past(40, 40), past(44, 44), past(60, 60)], [30], None),
    (NAN, [past(39, 39), past(44, 44), past(60, 60)], [30], (30, 0, 0)),
])
def test_decisions(alarm, history, kept, wanted):
    found = decide(SMALL, history, alarm, kept)
    assert (found and (found.to, found.skip_from, found.batches)) == wanted
    if found:
        assert (found.first, found.at, found.reason) == (alarm.first, alarm.step, alarm.reason)
        assert all(found.to < step or found.to == 0 or found.to in kept for step in (alarm.first,))


def test_no_rollbacks_ends_the_run_at_once():
    assert decide(dataclasses.replace(SMALL, max_rollbacks=0), [], NAN, [40]) is None


def test_the_same_trouble_again_and_again_ends():
    """However it goes on, at one place there are no more than so many."""
    history: list[Rollback] = []
    while (rollback := decide(SMALL, history, NAN, [30, 40])) is not None:
        history.append(rollback)
    assert [bool(r.batches) for r in history] == [False, True, False]
    words = story(history, NAN)
    assert words.count("objective is nan") == 4 and "without 11 batches after step 39" in words
    assert "back to step 40, with the same data" in words


def test_rollbacks_come_back_from_the_ledger():
    history = [past(50, 50), past(48, 50, 30, 11)]
    rows = [{"time": 0.0, "event": "rolled_back", "step": r.to, **r.details()} for r in history]
    rows.insert(1, {"time": 0.0, "event": "saved", "step": 60})
    assert rollbacks_of(json.loads(json.dumps(rows))) == history


def test_fields_are_set_by_name():
    assert override(preset("debug"), {"guard.spike_zscore": 5.0, "guard.window": 64}).guard.window == 64
