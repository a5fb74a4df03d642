"""Pictures of a measurement: ticks that do not touch, legends beside the curves."""

from itertools import pairwise
from pathlib import Path

import pytest
from matplotlib.axis import Tick
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from pera_bench.plot import MOST_TICKS, log_ticks, plot
from pera_bench.record import Record

RECORDS = Path(__file__).parents[2] / "bench" / "results"


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that were saved."""
    saved: list[Figure] = []
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *_args, **_more: (self.draw_without_rendering(), saved.append(self))
    )
    return saved


def record(spread: float) -> Record:
    """Eight rows of a real measurement at one and at four images; the slowest takes `spread` times the fastest."""
    whole = Record.load(RECORDS / "cpu-ops.json")
    whole.rows = [
        {**row, "images": images, "median_s": images * spread ** (n / 7), "speedup": spread ** (n / 7), "of_copy": 0.9}
        for images in (1, 4)
        for n, row in enumerate(whole.rows[:8])
    ]
    return whole


def labels(ticks: list[Tick]) -> list[Bbox]:
    """Boxes of the ticks' words."""
    seen = [tick.label1 for tick in ticks if tick.label1.get_visible() and tick.label1.get_text()]
    return [label.get_window_extent() for label in seen]


@pytest.mark.parametrize("spread", [1.0, 1.3, 8.0, 700.0, 1e9])
def test_ticks_and_legends_cover_nothing(figures: list[Figure], spread: float, tmp_path: Path) -> None:
    plot(record(spread), tmp_path)
    assert len(figures) == 2
    for figure in figures:
        for axes in figure.axes:
            assert labels(axes.xaxis.get_major_ticks())
            for axis in (axes.xaxis, axes.yaxis):
                ticks = sorted(
                    labels([*axis.get_major_ticks(), *axis.get_minor_ticks()]), key=lambda box: (box.x0, box.y0)
                )
                assert not any(one.overlaps(other) for one, other in pairwise(ticks))
        legends = [*figure.legends, *filter(None, (axes.get_legend() for axes in figure.axes))]
        assert legends
        for legend in legends:
            box = legend.get_window_extent()
            assert not any(box.overlaps(axes.get_window_extent()) for axes in figure.axes)


def test_round_numbers_are_few_and_inside() -> None:
    assert log_ticks(0.66, 1.05) == pytest.approx([0.7, 0.8, 0.9, 1.0])
    assert log_ticks(0.9, 130) == [1, 3, 10, 30, 100]
    for low, high in ((3.2, 3.9), (0.94, 1.06), (2, 40), (1e-9, 1e9)):
        ticks = log_ticks(low, high)
        assert 2 <= len(ticks) <= MOST_TICKS
        assert all(low <= tick <= high for tick in ticks)
