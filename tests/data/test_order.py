"""The seekable shuffle: a bijection, a different one each epoch and seed, without structure."""

import numpy as np
import pytest

from dtron.data.order import Permutation, sample_indices

SIZES = [1, 2, 3, 5, 100, 1000] + [2**bits + d for bits in (2, 3, 4, 6, 8, 10, 16) for d in (-1, 0, 1)]


@pytest.mark.parametrize("n", SIZES)
def test_is_a_bijection(n):
    for seed, epoch in ((0, 0), (1, 0), (0, 7), (2**63, 10**12)):
        assert np.array_equal(np.sort(Permutation(n, seed, epoch)(np.arange(n))), np.arange(n))


def test_seeks_without_computing_what_lies_before():
    permutation = Permutation(10**15, seed=3)
    far = np.array([[0, 10**15 - 1], [123456789012345, 7]])
    images = permutation(far)
    assert images.shape == far.shape and images.dtype == np.int64
    assert all(permutation(index[None])[0] == image for index, image in zip(far.ravel(), images.ravel(), strict=True))
    assert (images >= 0).all() and (images < 10**15).all() and len(np.unique(images)) == 4


def test_order_never_changes_between_versions():
    # A run resumed with a later version must see the samples it has not seen yet: these may never change.
    assert Permutation(10, seed=0)(np.arange(10)).tolist() == [3, 6, 0, 7, 5, 4, 2, 1, 8, 9]
    assert sample_indices(10**9, 4, 12345, seed=42).tolist() == [2333, 12012, 6236, 1695]


def test_seeds_and_epochs_give_unrelated_orders():
    n = 4096
    orders = [Permutation(n, seed, epoch)(np.arange(n)) for seed in range(4) for epoch in range(4)]
    for i, one in enumerate(orders):
        for other in orders[:i]:
            # Two random orders agree in about 1 +- 1 places and correlate by about 0 +- 1/64.
            assert (one == other).sum() <= 8
            assert abs(np.corrcoef(one, other)[0, 1]) < 5 / np.sqrt(n)


@pytest.mark.parametrize("n", [4096, 10007, 65537])
def test_position_says_nothing_about_the_index(n):
    index = np.arange(n)
    cells = 16
    for seed in range(5):
        image = Permutation(n, seed)(index)
        assert abs(np.corrcoef(index, image)[0, 1]) < 5 / np.sqrt(n)
        assert abs(np.corrcoef(image[:-1], image[1:])[0, 1]) < 5 / np.sqrt(n)
        table = np.histogram2d(index, image, bins=cells)[0]
        expected = n / cells**2
        chi2 = ((table - expected) ** 2 / expected).sum()
        freedom = (cells - 1) ** 2
        assert abs(chi2 - freedom) < 6 * np.sqrt(2 * freedom)


@pytest.mark.parametrize("n", [3, 4])
def test_every_order_of_a_tiny_set_is_as_likely(n):
    seeds = 2400
    orders, counts = np.unique([Permutation(n, s)(np.arange(n)) for s in range(seeds)], axis=0, return_counts=True)
    n_orders = {3: 6, 4: 24}[n]
    assert len(orders) == n_orders
    expected = seeds / n_orders
    assert ((counts - expected) ** 2 / expected).sum() < (n_orders - 1) + 6 * np.sqrt(2 * (n_orders - 1))


def test_rejects_what_is_outside():
    for bad in (-1, 10):
        with pytest.raises(IndexError, match=r"\[0, 10\)"):
            Permutation(10, 0)(np.array([0, bad]))
    with pytest.raises(ValueError, match="n = 0"):
        Permutation(0, 0)


@pytest.mark.parametrize("shuffle", [True, False])
def test_stream_is_one_permutation_an_epoch_and_the_same_in_any_pieces(shuffle):
    n, epochs = 13, 5
    stream = sample_indices(0, n * epochs, n, seed=1, shuffle=shuffle)
    assert stream.dtype == np.int64
    for epoch in range(epochs):
        assert sorted(stream[epoch * n : (epoch + 1) * n]) == list(range(n))
    for start in range(0, 40, 3):
        for count in (0, 1, 2, 12, 13, 14, 25):  # inside an epoch, to its edge, over one and two edges
            assert np.array_equal(
                sample_indices(start, count, n, seed=1, shuffle=shuffle), stream[start : start + count]
            )
    different = {tuple(stream[epoch * n : (epoch + 1) * n]) for epoch in range(epochs)}
    assert len(different) == (epochs if shuffle else 1)
    if not shuffle:
        assert stream[:n].tolist() == list(range(n))


def test_next_epoch_is_not_the_next_seed():
    assert not np.array_equal(sample_indices(100, 100, 100, seed=0), sample_indices(0, 100, 100, seed=1))
