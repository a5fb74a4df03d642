"""Streaming statistics against NumPy's on everything at once."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pera_fast.data.bands.stats import BandStats

EXACT = ("uint8", "uint16", "int8", "int16", "bool", ">u2", ">i2")
NUMBERS = st.floats(width=32, allow_nan=False, allow_infinity=False, allow_subnormal=False)
WIDE = ("float32", "float64", "int32", "uint32", "int64", "float16")


def values_of(dtype, seed=0, size=(37, 41)):
    rng = np.random.default_rng(seed)
    kind = np.dtype(dtype)
    if kind == np.bool_:
        return rng.random(size) < 0.3
    if kind.kind in "iu":
        info = np.iinfo(kind)
        low, high = (info.min, info.max) if kind.itemsize <= 2 else (-5000 if kind.kind == "i" else 0, 10**6)
        return rng.integers(low, high, size, endpoint=True).astype(kind)
    return (rng.normal(0, 300, size) ** 3).clip(-6e4, 6e4).astype(kind)


@pytest.mark.parametrize("dtype", [*EXACT, *WIDE])
def test_parts_give_what_the_whole_gives(dtype):
    whole = values_of(dtype)
    band, other = BandStats(), BandStats()
    band.add(whole[:5])
    for row in whole[5:]:
        other.add(row)
    band.merge(other)
    flat = whole.reshape(-1).astype(np.float64)
    moments = band.moments
    assert moments.count == band.count == flat.size
    assert moments.mean == pytest.approx(flat.mean(), rel=1e-12, abs=1e-9)
    assert moments.deviation == pytest.approx(((flat - flat.mean()) ** 2).sum(), rel=1e-10)
    assert (moments.low, moments.high) == (flat.min(), flat.max())
    wanted = [0, 0.5, 2, 25, 50, 75, 98, 99.5, 100]
    expected = np.percentile(flat, wanted, method="inverted_cdf")
    if dtype in EXACT:
        assert band.percentiles(wanted) == expected.tolist()
    else:
        assert band.percentiles(wanted) == pytest.approx(expected, rel=1 / 512, abs=1e-9)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.floats(width=32, allow_nan=False, allow_infinity=False, allow_subnormal=False), min_size=1, max_size=60
    ),
    st.floats(0, 100),
)
def test_percentiles_of_any_floats_are_within_a_bin(numbers, percent):
    band = BandStats()
    band.add(np.array(numbers, np.float32))
    low, high, count = band.bins()
    assert count.sum() == len(numbers)
    assert (low <= high).all()
    assert (np.diff(low) >= 0).all()
    (found,) = band.percentiles([percent])
    expected = np.percentile(np.array(numbers, np.float64), percent, method="inverted_cdf")
    assert found == pytest.approx(expected, rel=1 / 500, abs=1e-35)


def test_what_is_not_finite_or_not_valid_does_not_count():
    band = BandStats()
    band.add(np.array([1.0, np.nan, np.inf, -np.inf, 3.0]))
    assert (band.count, band.moments.mean) == (2, 2.0)
    band = BandStats()
    band.add(np.array([[7, 0], [9, 0]], np.uint16), np.array([[True, False], [True, False]]))
    assert (band.count, band.moments.low, band.moments.high) == (2, 7, 9)


def test_nothing_is_nan():
    band = BandStats()
    band.add(np.empty((0, 4), np.uint8))
    band.add(np.array([np.nan]))
    assert band.count == 0
    assert np.isnan(band.percentiles([50.0])).all()
    assert np.isnan(band.scaled(0, 1)).all()
    assert band.histogram(4)[0].tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("dtype", ["uint16", "float32"])
def test_scaled_is_the_mean_and_deviation_of_clamped_values(dtype):
    values = np.random.default_rng(1).gamma(4, 300, (200, 200)).astype(dtype)
    band = BandStats()
    band.add(values)
    low, high = band.percentiles([1, 98])
    mapped = ((values.astype(np.float64) - low) / (high - low)).clip(0, 1)
    assert band.scaled(low, high) == pytest.approx(
        (mapped.mean(), mapped.std()), rel=1e-9 if dtype == "uint16" else 1e-3
    )


def test_types_mix():
    band = BandStats()
    parts = [values_of("uint8", 1), values_of("float32", 2), values_of("int16", 3)]
    for part in parts:
        band.add(part)
    flat = np.concatenate([part.reshape(-1).astype(np.float64) for part in parts])
    assert band.moments.mean == pytest.approx(flat.mean(), rel=1e-12)
    assert band.percentiles([50.0])[0] == pytest.approx(np.percentile(flat, 50, method="inverted_cdf"), rel=1 / 512)


def test_histogram_counts_everything_between_the_extremes():
    band = BandStats()
    band.add(np.array([3, 3, 4, 9], np.uint8))
    counts, edges = band.histogram(7)
    assert counts.tolist() == [2, 1, 0, 0, 0, 0, 1]
    assert (edges[0], edges[-1]) == (2.5, 9.5)
    counts, edges = band.histogram(3)
    assert (counts.tolist(), edges[0], edges[-1]) == ([3, 0, 1], 3, 9)


def test_large_images_are_counted_in_pieces():
    band = BandStats()
    band.add(np.full((2100, 2100), 5, np.uint8))
    assert (band.count, band.moments.mean, band.moments.deviation) == (2100 * 2100, 5.0, 0.0)
