"""Lines through peaks, cards, and what is compared: exact on points whose line is known."""

import pytest
from profile_support import DENSE, GIB, SPARSE, line, synthetic

from pera_fast.profile.fits import (
    CARDS,
    GB,
    MemoryFit,
    claims,
    compare_simulated,
    fit_line,
    fit_points,
    largest_batch,
    usable,
)


def test_a_line_is_found_exactly() -> None:
    fit = fit_line([8, 16, 32], [1800.0, 2600.0, 4200.0])
    assert fit is not None
    assert (fit.fixed, fit.slope, fit.points) == (pytest.approx(1000), pytest.approx(100), 3)
    assert fit.deviation < 1e-12
    assert fit.at(64) == pytest.approx(7400)


def test_one_batch_size_is_no_line() -> None:
    assert fit_line([8, 8], [1.0, 2.0]) is None
    assert fit_points([]) is None
    assert fit_points(line(SPARSE, "cpu", 2, 0.1, (8,))) is None


def test_deviation_is_relative_to_the_point() -> None:
    fit = fit_line([1, 2, 3], [100.0, 200.0, 330.0])  # the line: 95, 210, 325
    assert fit is not None
    assert fit.deviation == pytest.approx(0.05, rel=1e-6)


def test_a_simulated_peak_that_moves_goes_on_as_its_end() -> None:
    """Of two moments, 10 + batch and 2 * batch, the second is the larger one from batch 10 on."""
    points = line(SPARSE, "simulate", 0, 0, (4, 8, 20, 40))
    for p in points:
        p.peak = max(10 + p.batch_size, 2 * p.batch_size)
    fit = fit_points(points)
    assert fit is not None
    assert (fit.fixed, fit.slope) == (pytest.approx(0), pytest.approx(2))
    assert largest_batch(points, 200) == 100, "on the line"
    assert largest_batch(points, 60) == 30
    assert largest_batch(points, 16) == 6, "between points, where the line does not hold"
    assert largest_batch(points[:1], 60) is None
    for p in points:
        p.device = "cuda"
    assert largest_batch(points, 200) != 100, "measured peaks: least squares"


def test_largest_batch_on_a_card() -> None:
    fit = MemoryFit(fixed=1e9, slope=1e8)
    assert fit.largest_batch(usable(16)) == int((16e9 * 0.95 - 1e9 - 1e9) / 1e8)
    assert fit.largest_batch(usable(16, gaps_counted=True)) == 140
    assert fit.largest_batch(0.5e9) == 0
    assert MemoryFit(1e9, 0.0).largest_batch(1e12) is None
    room = [usable(card) for card in CARDS]
    assert room == sorted(room)
    assert all(space < card * GB for space, card in zip(room, CARDS, strict=True))


@pytest.mark.parametrize("device", ["simulate", "cuda"])
def test_the_claim_is_a_ratio_of_slopes(device: str) -> None:
    (claim,) = claims(synthetic(device).points)
    assert claim.memory == pytest.approx(4.0)
    assert claim.flops == 1.0
    assert claim.speed == (None if device == "simulate" else 2.0)
    assert "4.00x less memory an image" in str(claim)


def test_no_claim_without_both_sides() -> None:
    assert claims(line(SPARSE, "cpu", 2, 0.1)) == []
    assert claims([*line(SPARSE, "cpu", 2, 0.1), *line(DENSE, "cpu", 2, 0.1, (8,))]) == []


@pytest.mark.parametrize(("slope", "within"), [(0.108, True), (0.112, False), (0.091, True), (0.089, False)])
def test_simulated_slopes_are_held_to_ten_percent(slope: float, within: bool) -> None:
    measured = [*line(SPARSE, "cuda", 3, 0.1), *line(DENSE, "cuda", 3, 0.4)]
    measured[-1].status = "out of memory"
    simulated = [*line(SPARSE, "simulate", 2, slope), *line(DENSE, "simulate", 2, 0.4)]
    simulated[-1].peak += 5 * GIB  # did not run on the device, so it does not count
    first, second = compare_simulated(measured, simulated)
    assert first.ratio == pytest.approx(slope / 0.1)
    assert first.within is within
    assert second.ratio == pytest.approx(1.0)
