"""Draws of windows, flips and colours: docs/method.md section 2."""

import itertools
import math
import random

import numpy as np
import pytest
from scipy import stats

from pera_fast.config.tree import ViewsConfig
from pera_fast.data.sampling.views import GRAYSCALE, NOTHING, draw_colors, draw_windows
from pera_fast.keyed import Purpose, generator

SEED, EPOCH = 11, 3


def test_a_sample_is_drawn_alike_whatever_its_company():
    views = ViewsConfig()
    sizes = np.array([[300, 200], [512, 512], [40, 900], [7, 5]])
    samples = np.array([5, 1234, 99, 10**7])
    together = draw_windows(views, SEED, EPOCH, samples, sizes)
    colors = draw_colors(views, SEED, EPOCH, samples)
    for slot in range(4):
        alone = draw_windows(views, SEED, EPOCH, samples[slot : slot + 1], sizes[slot : slot + 1])
        for name in ("top", "left", "height", "width", "hflip", "vflip"):
            np.testing.assert_array_equal(getattr(alone, name)[:, 0], getattr(together, name)[:, slot])
        for ours, theirs in zip(draw_colors(views, SEED, EPOCH, samples[slot : slot + 1]), colors, strict=True):
            np.testing.assert_array_equal(ours[0][:, 0], theirs[0][:, slot])
            np.testing.assert_array_equal(ours[1][:, 0], theirs[1][:, slot])


def test_seed_epoch_and_sample_each_change_the_draws():
    views, size = ViewsConfig(), np.array([[256, 256]])

    def window(seed, epoch, sample):
        drawn = draw_windows(views, seed, epoch, np.array([sample]), size)
        return np.stack([drawn.top, drawn.left, drawn.height, drawn.width]).tobytes()

    assert len({window(*key) for key in itertools.product((0, 1), (0, 1), (0, 1))}) == 8


def restated_window(height, width, scale, aspect, uniforms):
    """RandomResizedCrop.get_params, one crop, from the ten tries' uniforms (area, log aspect, top, left)."""
    for u_area, u_ratio, u_top, u_left in uniforms:
        target = height * width * (scale[0] + (scale[1] - scale[0]) * u_area)
        low, high = math.log(aspect[0]), math.log(aspect[1])
        ratio = math.exp(low + (high - low) * u_ratio)
        w = round(math.sqrt(target * ratio))
        h = round(math.sqrt(target / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(u_top * (height - h + 1)), int(u_left * (width - w + 1)), h, w
    if width / height < aspect[0]:
        w, h = width, round(width / aspect[0])
    elif width / height > aspect[1]:
        w, h = round(height * aspect[1]), height
    else:
        w, h = width, height
    return (height - h) // 2, (width - w) // 2, h, w


@pytest.mark.parametrize("size", [(256, 256), (500, 333), (40, 900), (900, 40), (1, 1), (2, 300), (5, 7)])
def test_windows_are_those_of_the_restated_rule(size):
    views = ViewsConfig()
    samples = np.arange(40)
    windows = draw_windows(views, SEED, EPOCH, samples, np.tile(size, (40, 1)))
    crops = views.num_global + views.num_local
    for sample in samples:
        uniforms = generator(SEED, Purpose.WINDOW, EPOCH, sample).random((crops, 42))
        for crop in range(crops):
            scale = views.global_scale if crop < views.num_global else views.local_scale
            expected = restated_window(*size, scale, views.aspect, uniforms[crop, :40].reshape(10, 4))
            found = tuple(
                int(values[crop, sample]) for values in (windows.top, windows.left, windows.height, windows.width)
            )
            assert found == expected


@pytest.mark.parametrize("size", [(256, 256), (300, 100)])
def test_windows_have_the_distribution_of_an_independent_sampler(size):
    """Against the rule driven by another generator: area, aspect and place, Kolmogorov-Smirnov with p > 1e-4."""
    views = ViewsConfig(num_global=1, num_local=1)
    count = 3000
    windows = draw_windows(views, SEED, EPOCH, np.arange(count), np.tile(size, (count, 1)))
    other = random.Random(5)
    for crop, scale in enumerate((views.global_scale, views.local_scale)):
        expected = np.array(
            [
                restated_window(*size, scale, views.aspect, [[other.random() for _ in range(4)] for _ in range(10)])
                for _ in range(count)
            ]
        )
        found = np.stack([windows.top, windows.left, windows.height, windows.width], -1)[crop]
        for measure in (lambda w: w[:, 2] * w[:, 3], lambda w: w[:, 3] / w[:, 2], lambda w: w[:, 0], lambda w: w[:, 1]):
            assert stats.ks_2samp(measure(found), measure(expected)).pvalue > 1e-4


def test_windows_lie_inside_and_flips_swap_the_roi():
    views = ViewsConfig()
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 700, size=(500, 2))
    windows = draw_windows(views, SEED, EPOCH, np.arange(500), sizes)
    assert (windows.height >= 1).all()
    assert (windows.width >= 1).all()
    assert (windows.top >= 0).all()
    assert (windows.left >= 0).all()
    assert (windows.top + windows.height <= sizes[:, 0]).all()
    assert (windows.left + windows.width <= sizes[:, 1]).all()
    start, end = windows.roi()
    assert start.dtype == end.dtype == np.float32
    assert start.shape == end.shape == (10, 500, 2)
    np.testing.assert_array_equal(start[..., 0] > end[..., 0], windows.vflip)
    np.testing.assert_array_equal(start[..., 1] > end[..., 1], windows.hflip)
    np.testing.assert_array_equal(np.minimum(start, end)[..., 0], windows.top)
    np.testing.assert_array_equal(np.maximum(start, end)[..., 1], windows.left + windows.width)


def share_is(hits: int, total: int, probability: float) -> bool:
    """Within five standard deviations."""
    return abs(hits - total * probability) <= 5 * math.sqrt(total * probability * (1 - probability))


@pytest.fixture(scope="module")
def many_colors():
    return draw_colors(ViewsConfig(), SEED, EPOCH, np.arange(4000))


def test_shares_of_unchanged_gray_and_jittered_views(many_colors):
    (student, _), (teacher, _) = many_colors
    total = student.shape[0] * student.shape[1]
    gray = (student[..., 0] == GRAYSCALE).sum()
    nothing = (student == NOTHING).all(-1).sum()
    assert share_is(nothing, total, 0.2)
    assert share_is(gray, total, 0.8 * 0.1)
    assert share_is((student >= 0).all(-1).sum(), total, 0.8 * 0.9)
    assert share_is((teacher >= 0).all(-1).sum(), total, 0.1)
    assert share_is((teacher == NOTHING).all(-1).sum(), total, 0.9)
    assert not (teacher == GRAYSCALE).any()
    assert (student[student[..., 0] == GRAYSCALE][:, 1:] == NOTHING).all()
    jitter = student[(student >= 0).all(-1)]
    assert (np.sort(jitter, -1) == np.arange(4)).all()


def test_student_and_teacher_are_coloured_independently(many_colors):
    (student, _), (teacher, _) = many_colors
    both = ((student[..., 0] != NOTHING) & (teacher[..., 0] != NOTHING)).sum()
    assert share_is(both, student[..., 0].size, 0.8 * 0.1)


@pytest.mark.parametrize("view", [0, 1])
def test_every_order_is_equally_likely(many_colors, view):
    order = many_colors[view][0]
    jitter = order[(order >= 0).all(-1)]
    _, counts = np.unique(jitter @ np.array([64, 16, 4, 1]), return_counts=True)
    assert len(counts) == 24
    assert stats.chisquare(counts).pvalue > 1e-4


@pytest.mark.parametrize("view", [0, 1])
def test_factors_are_uniform_in_their_range_and_neutral_where_unused(many_colors, view):
    order, factors = many_colors[view]
    jitter = (order >= 0).all(-1)
    ranges = [(0.6, 1.4), (0.6, 1.4), (0.8, 1.2), (-0.1, 0.1)]
    for op, (low, high) in enumerate(ranges):
        values = factors[jitter][:, op].astype(np.float64)
        assert low - 1e-6 <= values.min() < values.max() <= high + 1e-6
        assert stats.kstest((values - low) / (high - low), "uniform").pvalue > 1e-4
    assert (factors[~jitter] == np.array([1, 1, 1, 0], np.float32)).all()
    assert order.dtype == np.int32
    assert factors.dtype == np.float32


def test_flips_are_fair_and_independent():
    windows = draw_windows(ViewsConfig(), SEED, EPOCH, np.arange(2000), np.tile([64, 64], (2000, 1)))
    total = windows.hflip.size
    assert share_is(windows.hflip.sum(), total, 0.5)
    assert share_is(windows.vflip.sum(), total, 0.5)
    assert share_is((windows.hflip & windows.vflip).sum(), total, 0.25)


def test_probabilities_and_ranges_come_from_the_configuration():
    views = ViewsConfig(
        student_color=1, student_gray=0, teacher_color=1, brightness=0, contrast=0.1, saturation=0, hue=0.5
    )
    (order, factors), (teacher, _) = draw_colors(views, SEED, EPOCH, np.arange(300))
    assert (order >= 0).all()
    assert (teacher >= 0).all()
    assert (factors[..., [0, 2]] == 1).all()
    assert 0.9 <= factors[..., 1].min() < 0.91
    assert 0.48 < factors[..., 3].max() <= 0.5
    never = draw_windows(ViewsConfig(hflip=0, vflip=1), 0, 0, np.arange(50), np.tile([9, 9], (50, 1)))
    assert not never.hflip.any()
    assert never.vflip.all()


def test_images_without_colours_get_no_op_that_needs_them():
    (with_rgb, factors), _ = draw_colors(ViewsConfig(), SEED, EPOCH, np.arange(200))
    (without, same), _ = draw_colors(ViewsConfig(), SEED, EPOCH, np.arange(200), has_colors=False)
    assert set(np.unique(without)) == {-1, 0, 1}
    np.testing.assert_array_equal(without, np.where(with_rgb >= 2, -1, with_rgb))
    np.testing.assert_array_equal(factors, same)
