"""Curves of bounded size: a million points come in, a few thousand means with their extremes stay."""

import numpy as np

MOST = 2048  # buckets of a curve; a picture is about as many pixels wide


class Thinned:
    """Keeps the mean, least and most of every `width` successive points; the width doubles as points come.

    Args:
        most: buckets that may be full at a time, an even number.
    """

    def __init__(self, most: int = MOST):
        self._most = most
        self.width = 1
        self._full = np.empty((4, 0))  # x, mean, least, most
        self._rest = np.empty((2, 0))  # points of the bucket that is not full yet

    def add(self, x: np.ndarray, y: np.ndarray) -> None:
        """Adds points [N] in order."""
        points = np.concatenate([self._rest, np.stack([x, y])], axis=1)
        while points.shape[1]:
            room = (self._most - self._full.shape[1]) * self.width
            taken = min(room, points.shape[1]) // self.width * self.width
            if not taken:
                break
            x, y = points[:, :taken].reshape(2, -1, self.width)
            self._full = np.concatenate([self._full, _buckets(x, y, y, y)], axis=1)
            points = points[:, taken:]
            if self._full.shape[1] == self._most:
                self._full = _buckets(*self._full.reshape(4, -1, 2))
                self.width *= 2
        self._rest = points

    def points(self) -> np.ndarray:
        """float64 [4, M]: x, mean, least and most of each bucket."""
        if not self._rest.shape[1]:
            return self._full
        x, y = self._rest[:, None]
        return np.concatenate([self._full, _buckets(x, y, y, y)], axis=1)


def _buckets(x: np.ndarray, mean: np.ndarray, least: np.ndarray, most: np.ndarray) -> np.ndarray:
    """[4, M] of arrays [M, points of a bucket]."""
    return np.stack([x.mean(1), mean.mean(1), least.min(1), most.max(1)])


class Smoother:
    """The mean over the last `count` points, at the first ones over as many as there are."""

    def __init__(self, count: int):
        self._count = count
        self._before = np.empty(0)  # the last count - 1 values

    def __call__(self, y: np.ndarray) -> np.ndarray:
        """Means [N] of the next values [N]."""
        known = np.concatenate([self._before, y])
        sums = np.concatenate([[0.0], np.cumsum(known)])
        last = np.arange(len(self._before) + 1, len(known) + 1)
        first = np.maximum(last - self._count, 0)
        self._before = known[max(0, len(known) - self._count + 1) :] if self._count > 1 else self._before
        return (sums[last] - sums[first]) / (last - first)
