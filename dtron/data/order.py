"""The order of the training data: a seekable shuffle with no state but a position.

The stream of global samples 0, 1, 2, ... is cut into epochs of n samples; each epoch is its own
permutation of the data set, computed index by index. So any position is reached at once, no list of
n indices is held, and every rank of every layout finds the same sample at the same position.
"""

from collections.abc import Sequence

import numpy as np

from dtron.errors import UserError

__all__ = ["Mixture", "Permutation", "sample_indices", "seed_of"]

CYCLE = 10_000  # global samples after which a mixture repeats: weights are kept to 1/10,000 of their sum
GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: its multiples modulo 2^64 lie evenly, wherever one begins and ends
ROUNDS = 8  # 4 make a pseudo-random permutation (Luby & Rackoff 1988); domains of a few bits need more


def _mix(x: np.ndarray) -> np.ndarray:
    """splitmix64's finalizer (Steele, Lea & Flood 2014): uint64 -> uint64, every bit depends on every bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class Permutation:
    """A pseudo-random permutation of [0, n), fixed by (n, seed, epoch), in O(1) memory.

    A Feistel network permutes [0, 4^h), the least such range that holds n; an index that lands
    outside [0, n) is sent through again until it lands inside (cycle walking, Black & Rogaway 2002):
    fewer than 4 passes on average, since 4^h < 4 n.
    """

    def __init__(self, n: int, seed: int, epoch: int = 0) -> None:
        if n < 1:
            raise ValueError(f"a permutation needs at least one element, got n = {n}")
        self.n = n
        self._half_bits = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
        self._mask = np.uint64((1 << int(self._half_bits)) - 1)
        # Unlike seed + epoch, a spawn key keeps (seed 0, epoch 1) apart from (seed 1, epoch 0).
        self._keys = np.random.SeedSequence(seed, spawn_key=(epoch,)).generate_state(ROUNDS, np.uint64)

    def _feistel(self, x: np.ndarray) -> np.ndarray:
        left, right = x >> self._half_bits, x & self._mask
        for round_key in self._keys:
            left, right = right, left ^ (_mix(right + round_key) & self._mask)
        return (left << self._half_bits) | right

    def __call__(self, indices: np.ndarray) -> np.ndarray:
        """Images of `indices` (any shape, each in [0, n)), as int64 of the same shape."""
        indices = np.asarray(indices)
        if indices.size and (indices.min() < 0 or indices.max() >= self.n):
            raise IndexError(f"indices from {indices.min()} to {indices.max()} are not all in [0, {self.n})")
        image = self._feistel(indices.astype(np.uint64).ravel())
        while (outside := image >= self.n).any():
            image[outside] = self._feistel(image[outside])
        return image.astype(np.int64).reshape(indices.shape)


def sample_indices(start: int, count: int, n_samples: int, seed: int, shuffle: bool = True) -> np.ndarray:
    """Data-set indices [count] (int64) of the global samples start .. start + count - 1.

    Global sample g is element g % n_samples of epoch g // n_samples; with `shuffle` every epoch has
    a permutation of its own.
    """
    samples = np.arange(start, start + count, dtype=np.int64)
    if not shuffle:
        return samples % n_samples
    indices = np.empty_like(samples)
    for epoch in range(start // n_samples, -(-(start + count) // n_samples)):
        here = samples // n_samples == epoch
        indices[here] = Permutation(n_samples, seed, epoch)(samples[here] % n_samples)
    return indices


def seed_of(seed: int, source: int) -> int:
    """The seed of a mixture's source: two sources of equal length have different orders."""
    if source == 0:
        return seed
    return int(np.random.SeedSequence(seed, spawn_key=(source,)).generate_state(1, np.uint64)[0])


class Mixture:
    """Which source every global sample comes from: each source's share is exact over any window.

    Of the first t samples, for every t, source i has weight_i * t, give or take less than one: the
    chairman assignment (Tijdeman 1980, "The chairman assignment problem"), made once for a cycle of
    samples, so that any position is reached at once. Shares are rounded to 1/10,000 (`CYCLE`).
    Raises UserError for weights that are not positive or come to nothing in that rounding.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        total = sum(weights)
        if not weights or min(weights) <= 0 or min(weights) / total < 1 / CYCLE:
            raise UserError(
                f"mixture weights {', '.join(f'{w:g}' for w in weights)}: expected positive numbers, "
                f"each at least 1/{CYCLE} of their sum"
            )
        cycle = 1 if len(weights) == 1 else CYCLE
        exact = np.array(weights) / total * cycle
        self.counts = np.floor(exact).astype(np.int64)  # [sources] samples a cycle
        left = cycle - int(self.counts.sum())
        self.counts[np.argsort(self.counts - exact, kind="stable")[:left]] += 1
        self._source = _interleave(self.counts)  # [cycle]
        self._before = np.empty_like(self._source)  # [cycle] earlier samples of the same source in the cycle
        for source, n in enumerate(self.counts):
            self._before[self._source == source] = np.arange(n)

    def before(self, sample: int) -> np.ndarray:
        """How many of the global samples 0 .. sample - 1 each source gives: int64 [sources]."""
        turn, offset = divmod(sample, len(self._source))
        return turn * self.counts + np.bincount(self._source[:offset], minlength=len(self.counts))

    def __call__(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """(source, number of the sample within that source), int64 [count] each, of global samples from `start` on."""
        turn, offset = np.divmod(np.arange(start, start + count, dtype=np.int64), len(self._source))
        source = self._source[offset]
        return source, turn * self.counts[source] + self._before[offset]

    def spread(self, start: int, size: int) -> tuple[np.ndarray, np.ndarray]:
        """The samples of a call, for the rows of a global batch: in the long run each row has every source's share.

        In the order of the samples a source can come in the same rows of all batches: 3:1 repeats after 4 samples, and
        so do batches of 16. Here each source has an interval of a circle of `size` places, turned by the golden ratio
        every step: that is far from any fraction, so it falls in step with no weights. After 4,000 steps with a dozen
        weights and batches of 4 to 64, no virtual shard was off its share by more than 27 rows, with random turns 120.
        Neighbours on the circle are rows far apart, so that ranks have like numbers of rows of a source in every step.
        """
        source, number = self(start, size)
        if len(self.counts) > 1:
            turned = np.roll(source.argsort(kind="stable"), (start // size * GOLDEN % 2**64) * size >> 64)
            samples = turned[(np.arange(size, dtype=np.uint64) * np.uint64(GOLDEN)).argsort()]
            source, number = source[samples], number[samples]
        return source, number


def _interleave(counts: np.ndarray) -> np.ndarray:
    """Sources [cycle] such that each stays within one of its share of every beginning of the cycle.

    Tijdeman, "The chairman assignment problem" (1980)."""
    n, cycle = len(counts), int(counts.sum())
    if n == 1:
        return np.zeros(cycle, np.int64)
    chosen, given = np.empty(cycle, np.int64), np.zeros(n, np.int64)
    slack = 2 * n - 2
    for t in range(1, cycle + 1):
        owed = (counts * t - cycle * given) * slack  # in units of 1 / (cycle * slack) samples
        # Of those that are owed enough to be allowed, the one that would first be owed too much.
        deadline = np.where(owed >= cycle, (cycle * (slack - 1) - owed) / counts, np.inf)
        chosen[t - 1] = source = int(deadline.argmin())
        given[source] += 1
    return chosen
