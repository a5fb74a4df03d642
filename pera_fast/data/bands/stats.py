"""Statistics of band values in one pass over any number of images, of any numeric type, mergeable.

Every band keeps a table of counts. Integers of up to 16 bits have a bin for each value, so everything about them is
exact. The others are counted by their float32 bits in an order-preserving code: bins are 1/512 of their value wide,
wherever the values lie, and mean, deviation and extremes are kept beside the table, exactly.
"""

from dataclasses import dataclass

import numpy as np

_SHORT_LOW, _SHORT_BINS = -(2**15), 2**15 + 2**16  # -32768 ... 65535
_WIDE_BITS = 18  # of the float32: sign, exponent, 9 of the mantissa
_DROPPED = 32 - _WIDE_BITS
_CHUNK = 2**22  # values counted at a time


@dataclass
class Moments:
    """Count, mean and sum of squared deviations; adds as Chan, Golub and LeVeque (1983) have it."""

    count: int = 0
    mean: float = 0.0
    deviation: float = 0.0  # sum of (value - mean)**2
    low: float = float("inf")
    high: float = float("-inf")

    def add(self, other: "Moments") -> None:
        """Takes in what another has seen."""
        count = self.count + other.count
        if not other.count:
            return
        step = other.mean - self.mean
        self.mean += step * other.count / count
        self.deviation += other.deviation + step * step * self.count * other.count / count
        self.count, self.low, self.high = count, min(self.low, other.low), max(self.high, other.high)

    @classmethod
    def of(cls, values: np.ndarray, counts: np.ndarray | None = None) -> "Moments":
        """Build from float64 values, each counted once or `counts` times (> 0)."""
        if not len(values):
            return cls()
        weights = np.ones(len(values)) if counts is None else counts
        mean = float(np.average(values, weights=weights))
        deviation = float((weights * (values - mean) ** 2).sum())
        return cls(int(weights.sum()), mean, deviation, float(values.min()), float(values.max()))


class BandStats:
    """Statistics of one band's finite values."""

    def __init__(self) -> None:
        self._short: np.ndarray | None = None  # int64 [_SHORT_BINS]
        self._wide: np.ndarray | None = None  # int64 [2 ** _WIDE_BITS]
        self._wide_moments = Moments()

    def add(self, values: np.ndarray, valid: np.ndarray | None = None) -> None:
        """Takes in values of any real type and shape; `valid`, a bool of that shape, leaves the others out."""
        flat = (values if valid is None else values[valid]).reshape(-1)
        for start in range(0, len(flat), _CHUNK):
            chunk = flat[start : start + _CHUNK]
            if chunk.dtype == np.bool_ or (chunk.dtype.kind in "iu" and chunk.dtype.itemsize <= 2):
                self._add_short(chunk)
            else:
                self._add_wide(chunk)

    def merge(self, other: "BandStats") -> None:
        """Takes in what another has seen."""
        if other._short is not None:
            self._short = other._short.copy() if self._short is None else self._short + other._short
        if other._wide is not None:
            self._wide = other._wide.copy() if self._wide is None else self._wide + other._wide
        self._wide_moments.add(other._wide_moments)

    def _add_short(self, values: np.ndarray) -> None:
        if self._short is None:
            self._short = np.zeros(_SHORT_BINS, np.int64)
        first = -_SHORT_LOW
        if values.dtype.kind == "i":
            counts = np.bincount(values.astype(np.int32) - _SHORT_LOW)
            first = 0
        else:
            counts = np.bincount(values)
        self._short[first : first + len(counts)] += counts

    def _add_wide(self, values: np.ndarray) -> None:
        values = values.astype(np.float64)
        values = values[np.isfinite(values)]
        self._wide_moments.add(Moments.of(values))
        if self._wide is None:
            self._wide = np.zeros(2**_WIDE_BITS, np.int64)
        if len(values):
            counts = np.bincount(_code(values))
            self._wide[: len(counts)] += counts

    @property
    def moments(self) -> Moments:
        """Count, mean, squared deviation, least and greatest value."""
        total = Moments()
        total.add(self._wide_moments)
        if self._short is not None:
            total.add(Moments.of(*_present(self._short, _short_values)))
        return total

    @property
    def count(self) -> int:
        """Values that count."""
        return self.moments.count

    def bins(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(low, high, count) of the bins that hold something, float64, float64 and int64 [n], in rising order of low.

        An exact value's bin has low == high.
        """
        parts = []
        if self._short is not None:
            values, counts = _present(self._short, _short_values)
            parts.append((values, values, counts))
        if self._wide is not None:
            codes = np.flatnonzero(self._wide)
            lows, highs = _edges(codes)
            extremes = self._wide_moments.low, self._wide_moments.high
            parts.append((lows.clip(*extremes), highs.clip(*extremes), self._wide[codes]))
        if not parts:
            return np.empty(0), np.empty(0), np.empty(0, np.int64)
        low, high, count = (np.concatenate(column) for column in zip(*parts, strict=True))
        order = np.argsort(low, kind="stable")
        return low[order], high[order], count[order]

    def percentiles(self, wanted: list[float]) -> list[float]:
        """The least value that is not below so many per cent of the values; NaN where there are none.

        Exact for integers of up to 16 bits; else to 1/512 of the value.
        """
        low, high, count = self.bins()
        if not len(count):
            return [float("nan")] * len(wanted)
        upto = np.cumsum(count)
        found = []
        for percent in wanted:
            rank = max(percent / 100 * upto[-1], 1)
            at = min(int(np.searchsorted(upto, rank - 1e-9 * upto[-1])), len(count) - 1)
            inside = (rank - (upto[at] - count[at])) / count[at]
            found.append(float(low[at] + (high[at] - low[at]) * min(max(inside, 0.0), 1.0)))
        return found

    def scaled(self, low: float, high: float) -> tuple[float, float]:
        """(mean, standard deviation) of the values mapped linearly, low to 0 and high to 1, and clamped to [0, 1]."""
        starts, ends, count = self.bins()
        if not len(count):
            return float("nan"), float("nan")
        mapped = (((starts + ends) / 2 - low) / (high - low)).clip(0, 1)
        moments = Moments.of(mapped, count)
        return moments.mean, (moments.deviation / moments.count) ** 0.5

    def histogram(self, bins: int) -> tuple[np.ndarray, np.ndarray]:
        """(counts int64 [bins], edges float64 [bins + 1]) from the least value to the greatest."""
        low, high, count = self.bins()
        if not len(count):
            return np.zeros(bins, np.int64), np.linspace(0, 1, bins + 1)
        first, last = float(low.min()), float(high.max())
        if bins > last - first >= 0 and self._wide is None:  # whole numbers, fewer than bins: one each
            first, last = first - 0.5, last + 0.5
        last = last if last > first else first + 1
        counts, edges = np.histogram((low + high) / 2, bins, (first, last), weights=count)
        return counts.astype(np.int64), edges


def _present(counts: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    at = np.flatnonzero(counts)
    return values[at], counts[at]


_short_values = np.arange(_SHORT_LOW, _SHORT_LOW + _SHORT_BINS, dtype=np.float64)


def _code(values: np.ndarray) -> np.ndarray:
    """A bin of each float64: float32 bits so that they order as the numbers do, the lowest ones dropped."""
    limit = float(np.finfo(np.float32).max)
    bits = values.clip(-limit, limit).astype(np.float32).view(np.uint32)
    ordered = np.where(bits >> 31, ~bits, bits | np.uint32(2**31))
    return (ordered >> np.uint32(_DROPPED)).astype(np.int64)


def _edges(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The least and the greatest float64 of each bin."""

    def value(ordered: np.ndarray) -> np.ndarray:
        bits = np.where(ordered >> 31, ordered & np.uint32(2**31 - 1), ~ordered)
        return bits.astype(np.uint32).view(np.float32).astype(np.float64)

    first = codes.astype(np.uint32) << np.uint32(_DROPPED)
    return value(first), value(first | np.uint32(2**_DROPPED - 1))
