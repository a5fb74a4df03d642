"""`crop_resize` against its float64 definition, and the definition against Pillow."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pera_kernels import backend
from pera_kernels.crop_resize import crop_resize
from pera_kernels.crop_resize.reference import weights

LARGEST = {torch.uint8: 255, torch.uint16: 65535}
HAS_NATIVE = backend.needs_native("crop_resize")(torch.device("cpu")) is None


def image(height: int, width: int, channels: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Noise with black and white in it, so that neighbours are as far apart as they can be."""
    noise = np.random.default_rng(seed).integers(-9000, 75000, (height, width, channels)).clip(0, 65535)
    return torch.from_numpy((noise if dtype == torch.uint16 else noise // 257).astype(str(dtype)[6:]))


def exact(window: torch.Tensor, flip_y: bool, flip_x: bool, height: int, width: int) -> np.ndarray:
    """float64, not rounded."""
    down, across = weights(window.shape[0], height).numpy(), weights(window.shape[1], width).numpy()
    crop = np.einsum("yi,xj,ijc->yxc", down, across, window.numpy().astype(np.float64), optimize=True)
    return crop[:: -1 if flip_y else 1, :: -1 if flip_x else 1]


@pytest.fixture(
    params=["reference", pytest.param("native", marks=pytest.mark.skipif(not HAS_NATIVE, reason="not built"))]
)
def implementation(request):
    with backend.use(request.param):
        yield request.param


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.sampled_from([torch.uint8, torch.uint16]),
    st.tuples(st.integers(1, 90), st.integers(1, 90), st.integers(1, 40), st.integers(1, 40)),
    st.integers(1, 19),
    st.tuples(st.booleans(), st.booleans()),
)
def test_any_shape_is_within_the_rounding_of_the_definition(dtype, sizes, channels, flips):
    top, left = 2, 3
    whole = image(sizes[0] + 5, sizes[1] + 7, channels, dtype)
    window = whole[top : top + sizes[0], left : left + sizes[1]]  # lines with a gap between them
    right = exact(window, flips[0], flips[1], *sizes[2:])
    for name in ("reference", "native") if HAS_NATIVE else ("reference",):
        guarded = torch.full((sizes[2] + 2, sizes[3], channels), 77, dtype=torch.int32).to(dtype)
        with backend.use(name):
            crop_resize(window, flips[0], flips[1], guarded[1:-1])
        assert (guarded[0].numpy() == 77).all(), "written before the crop"
        assert (guarded[-1].numpy() == 77).all(), "written behind the crop"
        # Float32 sums of values up to the largest: some 1e-6 of that beyond the half that rounding costs.
        assert np.abs(guarded[1:-1].numpy() - right).max() <= 0.5 + 2e-6 * LARGEST[dtype]


@pytest.mark.parametrize(("height", "width", "side"), [(1500, 1100, 224), (470, 512, 448), (60, 80, 96)])
def test_sizes_of_recipes_and_pillow(implementation, height, width, side):
    window = image(height, width, 1, torch.uint16)
    out = torch.empty((side, side, 1), dtype=torch.uint16)
    crop_resize(window, False, True, out)
    pixels = Image.fromarray(window[..., 0].numpy().astype(np.float32))
    expected = np.asarray(pixels.resize((side, side), Image.Resampling.BILINEAR))[:, ::-1]
    assert np.abs(out[..., 0].numpy() - expected).max() <= 0.6


def test_a_window_of_the_crops_size_is_copied(implementation):
    for dtype in (torch.uint8, torch.uint16):
        window = image(33, 47, 5, dtype)
        out = torch.empty_like(window)
        crop_resize(window, True, True, out)
        np.testing.assert_array_equal(out.numpy(), window.numpy()[::-1, ::-1])


def test_the_largest_value_stays(implementation):
    """Weights that sum to a little more than 1 must not make white black."""
    for dtype, largest in LARGEST.items():
        window = torch.full((203, 177, 3), largest, dtype=torch.int32).to(dtype)
        out = torch.zeros((96, 96, 3), dtype=torch.int32).to(dtype)
        crop_resize(window, False, False, out)
        assert (out.numpy() == largest).all()


def test_what_is_wrong_is_named(implementation):
    window, out = image(20, 20, 4, torch.uint16), torch.empty((8, 8, 4), dtype=torch.uint16)
    with pytest.raises(TypeError, match=r"both be uint8 or both uint16, got torch\.uint16 and torch\.uint8"):
        crop_resize(window, False, False, torch.empty((8, 8, 4), dtype=torch.uint8))
    with pytest.raises(TypeError, match=r"got torch\.float32"):
        crop_resize(window.float(), False, False, out)
    with pytest.raises(ValueError, match=r"must be \[H, W, C\], got \[20, 20, 4\] and \[8, 8, 3\]"):
        crop_resize(window, False, False, torch.empty((8, 8, 3), dtype=torch.uint16))
    with pytest.raises(ValueError, match="must hold pixels"):
        crop_resize(window[:0], False, False, out)
    with pytest.raises(ValueError, match="one after the other"):
        crop_resize(window[..., :2], False, False, out[..., :2])
