"""Mixtures: exact shares over any window, reached at any position at once."""

import numpy as np
import pytest

from dtron.data.order import CYCLE, Mixture
from dtron.errors import UserError

WEIGHTS = [
    [1.0],
    [1, 1],
    [7, 2, 1],
    [0.5, 0.3, 0.2],
    [1, 1, 1],
    [97, 1, 1, 0.5, 0.5],
    [1 / 3, 2 / 3],
    [3, 2, 2, 2, 2, 1],
]


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_every_beginning_has_its_share(weights):
    sources, numbers = Mixture(weights)(0, 2 * CYCLE)
    shares = Mixture(weights).counts / Mixture(weights).counts.sum()
    assert np.abs(shares - np.array(weights) / sum(weights)).max() <= 1 / CYCLE
    t = np.arange(1, 2 * CYCLE + 1)
    for source, share in enumerate(shares):
        taken = np.cumsum(sources == source)
        assert np.abs(taken - share * t).max() < 1
        assert (numbers[sources == source] == np.arange(taken[-1])).all()


@pytest.mark.parametrize("start", [0, 1, 17, CYCLE - 3, CYCLE, 10**12 + 7])
def test_any_position_is_reached_at_once(start):
    mixture = Mixture([7, 2, 1])
    sources, numbers = mixture(start, 50)
    for i in range(50):
        one = mixture(start + i, 1)
        assert (one[0][0], one[1][0]) == (sources[i], numbers[i])
    if start < 2 * CYCLE:
        whole = mixture(0, start + 50)
        assert (whole[0][start:] == sources).all() and (whole[1][start:] == numbers).all()


@pytest.mark.parametrize("weights", [[], [1, 0], [1, -1], [1, 1e-5]])
def test_weights_that_come_to_nothing_are_refused(weights):
    with pytest.raises(UserError, match="mixture weights"):
        Mixture(weights)


@pytest.mark.parametrize("size", [4, 16, 96])
@pytest.mark.parametrize("weights", WEIGHTS + [[3, 1], [2, 1], [16, 1], [3863, 6137]], ids=str)
def test_rows_of_a_batch_are_spread_over_the_sources(weights, size):
    """Every batch has the same samples as without, and every row its share of each source."""
    mixture, rows = Mixture(weights), np.zeros((len(weights), size))
    for step in range(1000):
        source, number = mixture.spread(step * size, size)
        assert sorted(zip(source, number, strict=True)) == sorted(zip(*mixture(step * size, size), strict=True))
        rows[source, np.arange(size)] += 1
        assert np.abs(rows - rows.mean(1, keepdims=True)).max() < 24
    if len(weights) == 1:
        assert (number == np.arange(999 * size, 1000 * size)).all()
