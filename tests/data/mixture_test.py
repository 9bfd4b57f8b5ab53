"""The global order: exact shares, every row once an epoch, a pure function of the sample's number."""

import collections
import concurrent.futures

import numpy as np
import pytest

from research.data import mixture, order
from research.data.mixture import BLOCK, Mixture
from research.errors import InputError

MIXES = {"one": [3.0], "half": [1, 1], "thirds": [1, 1, 1], "uneven": [0.7, 0.2, 0.1],
         "tiny": [1.0, 1e-4, 3e-5, 1e-4],
         "many": [0.1 * i for i in range(1, 40)]}


@pytest.mark.parametrize("name", MIXES)
def test_shares_are_exact_over_blocks(name):
    weights = MIXES[name]
    mix = Mixture(weights, [50] * len(weights), seed=0)
    shares = np.array(weights) / np.sum(weights)
    counts = np.array([mix._counts(block) for block in range(400)])
    each = np.diff(counts, axis=0)
    assert (each.sum(1) == BLOCK).all() and (each >= 0).all()
    assert np.abs(counts - np.arange(400)[:, None] * BLOCK * shares).max() < 2  # never drifts
    assert (counts[-1] > 0).all()


@pytest.mark.parametrize("name", ["one", "thirds", "uneven"])
def test_samples_have_the_counts_of_their_block(name):
    mix = Mixture(MIXES[name], [7, 11, 5][: len(MIXES[name])], seed=4)
    sources = [mix.sample(i)[0] for i in range(3 * BLOCK)]
    assert tuple(np.bincount(sources, minlength=len(MIXES[name]))) == mix._counts(3)
    if len(MIXES[name]) > 1:
        assert sources[:50] != sorted(sources[:50])  # shuffled in the block


@pytest.mark.parametrize("lengths", [[1, 5], [300, 7], [2000, 1]])
def test_each_row_once_an_epoch(lengths):
    mix = Mixture([0.6, 0.4], lengths, seed=2)
    found = collections.defaultdict(list)
    for i in range(5 * BLOCK):
        source, row = mix.sample(i)
        found[source].append(row)
    # Within a block ranks are taken in order, so each source's rows come epoch after epoch.
    for source, length in enumerate(lengths):
        epochs = [found[source][i:i + length] for i in range(0, len(found[source]) - length + 1, length)]
        assert epochs and all(sorted(epoch) == list(range(length)) for epoch in epochs)
        if length > 5 and len(epochs) > 1:
            assert epochs[0] != epochs[1]


def test_sample_is_pure_on_any_path_and_thread():
    expected = [Mixture([2, 1], [100, 37], seed=9).sample(i) for i in range(0, 4000, 7)]
    mix = Mixture([2, 1], [100, 37], seed=9)
    assert [mix.sample(i) for i in reversed(range(0, 4000, 7))] == expected[::-1]
    fresh = Mixture([2, 1], [100, 37], seed=9)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert list(pool.map(fresh.sample, range(0, 4000, 7))) == expected
    assert [Mixture([2, 1], [100, 37], seed=8).sample(i) for i in range(0, 4000, 7)] != expected
    assert Mixture([4, 2], [100, 37], seed=9).sample(1234) == mix.sample(1234)  # weights need not sum to one


def test_the_order_never_changes():
    """Values written down: they must hold on every machine, numpy and Python."""
    assert order.permutation(6, "documents", 0).tolist() == [4, 2, 1, 0, 3, 5]
    assert [int(b) for b in order.bits(2, "x", 1)] == [6371376645643479665, 12682001676940545045]
    mix = Mixture([2, 1], [100, 37], seed=0)
    assert [mix.sample(i) for i in (0, 1, 2, 1023, 1024, 10**6)] == [
        (0, 38), (1, 36), (0, 62), (1, 16), (0, 32), (0, 33)]
    assert mixture.BLOCK == 1024


def shares_of(mix: Mixture, blocks: int) -> np.ndarray:
    return np.diff(np.array([mix._counts(block) for block in range(blocks + 1)]), axis=0) / BLOCK


def test_changing_weights_follow_their_lines_exactly_per_block():
    points = ((0, 1.0), (20 * BLOCK, 3.0), (40 * BLOCK, 0.0))
    mix = Mixture([points, 1.0, 0.5], [50, 60, 70], seed=3)
    place = np.arange(60) * BLOCK + BLOCK // 2
    weight = np.interp(place, [p for p, _ in points], [w for _, w in points])
    expected = np.stack([weight, np.full(60, 1.0), np.full(60, 0.5)], 1)
    expected /= expected.sum(1, keepdims=True)
    found = shares_of(mix, 60)
    assert np.abs(found - expected).max() < 2 / BLOCK
    assert np.abs((found - expected).cumsum(0)).max() < 2 / BLOCK  # what rounding takes comes back
    assert found[41:, 0].sum() == 0 and (found.sum(1) == 1).all()


def test_changing_weights_are_pure_and_each_row_comes_once_an_epoch():
    weights = [((0, 0.0), (3 * BLOCK, 1.0)), 1.0]
    mix = Mixture(weights, [700, 900], seed=1)
    expected = [mix.sample(i) for i in range(6 * BLOCK)]
    fresh = Mixture(weights, [700, 900], seed=1)
    assert [fresh.sample(i) for i in reversed(range(0, 6 * BLOCK, 5))] == expected[::5][::-1]
    for source, length in enumerate((700, 900)):
        rows = [row for found, row in expected if found == source]
        assert len(rows) > length and sorted(rows[:length]) == list(range(length))
    assert [mix.sample(i) for i in (0, 1023, 5000)] == [(1, 891), (1, 581), (1, 212)]  # written down


def test_points_that_are_all_the_same_are_a_constant_weight():
    constant = Mixture([2.0, 1.0], [10, 20], seed=0)
    points = Mixture([((0, 2.0), (5000, 2.0)), 1.0], [10, 20], seed=0)
    assert np.abs(shares_of(constant, 30) - shares_of(points, 30)).max() <= 1 / BLOCK


def test_random_draws_would_be_further_off_than_the_mixture_is():
    """The shares that come out are within sampling error, in any window: here 2000 samples from anywhere."""
    weights = np.array([0.5, 0.3, 0.15, 0.05])
    mix = Mixture(list(weights), [100] * 4, seed=5)
    for start in (0, 777, 123_456):
        found = np.bincount([mix.sample(i)[0] for i in range(start, start + 2000)], minlength=4) / 2000
        assert (np.abs(found - weights) < 3 * np.sqrt(weights * (1 - weights) / 2000)).all()


@pytest.mark.parametrize("weights", [
    [((0, 1.0), (100, 0.0))], [((0, 1.0), (5000, 0.0)), ((0, 1.0), (9000, 0.0))],
    [((0, 0.0), (5000, 0.0), (9000, 1.0))], [((0, 1.0), (3000, 0.0), (9000, 0.0), (9001, 1.0))]])
def test_weights_that_sum_to_nothing_somewhere_are_refused(weights):
    with pytest.raises(InputError, match="sum to nothing at sample") as caught:
        Mixture(weights, [10] * len(weights), 0)
    assert caught.value.field == "data.sources"


@pytest.mark.parametrize("weights,lengths,field", [
    ([], [], "data.sources"), ([1.0], [1, 2], "data.sources"), ([1.0, 0.0], [1, 2], "data.sources.1.weight"),
    ([-1.0], [3], "data.sources.0.weight"), ([float("nan")], [3], "data.sources.0.weight"),
    ([1.0, 1.0], [3, 0], "data.sources.1"),
    ([1.0, ((0, 0.0), (9, 0.0))], [3, 3], "data.sources.1.weight"),
    ([((0, 1.0), (9, -1.0))], [3], "data.sources.0.weight")])
def test_bad_mixtures_name_the_field(weights, lengths, field):
    with pytest.raises(InputError) as caught:
        Mixture(weights, lengths, 0)
    assert caught.value.field == field
