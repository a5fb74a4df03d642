"""`crop_resize` against its float64 definition, and the definition against Pillow."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pera_kernels import backend
from pera_kernels.crop_resize import crop_resize, crops_of_image
from pera_kernels.crop_resize.reference import weights

LARGEST = {torch.uint8: 255, torch.uint16: 65535}
HAS_NATIVE = backend.needs_native("crop_resize", "crops_of_image")(torch.device("cpu")) is None


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


def corners(crops: int, images: int, height: int, width: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Windows of images of one size, some flipped."""
    rng = np.random.default_rng(seed)
    near = rng.integers(0, (height - 1, width - 1), (crops, images, 2))
    far = near + 1 + (rng.random((crops, images, 2)) * ((height, width) - near - 1)).astype(np.int64)
    flip = rng.random((crops, images, 2)) < 0.5
    return torch.from_numpy(np.where(flip, far, near)), torch.from_numpy(np.where(flip, near, far))


def pytorchs(image: torch.Tensor, start: list[int], end: list[int], side: int) -> np.ndarray:
    (top, bottom), (left, right) = (sorted(axis) for axis in zip(start, end, strict=True))
    window = image[top:bottom, left:right].permute(2, 0, 1)[None]
    crop = torch.nn.functional.interpolate(window, size=(side, side), mode="bilinear", antialias=True)[0]
    return crop.permute(1, 2, 0).numpy()[:: -1 if start[0] > end[0] else 1, :: -1 if start[1] > end[1] else 1]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("side", [1, 2, 7, 48, 130])
def test_plain_crops_of_an_image_are_pytorchs_to_the_bit(implementation, channels, side):
    pictures = [image(61, 83, channels, torch.uint8, seed) for seed in range(3)]
    start, end = corners(9, 3, 61, 83, side)
    out = torch.full((9, 3, side, side, channels), 7, dtype=torch.uint8)
    crops_of_image(pictures[2], start, end, 2, out)
    assert (out[:, :2] == 7).all()
    for crop in range(9):
        expected = pytorchs(pictures[2], start[crop, 2].tolist(), end[crop, 2].tolist(), side)
        np.testing.assert_array_equal(out[crop, 2].numpy(), expected)


@pytest.mark.parametrize(("channels", "dtype"), [(5, torch.uint8), (3, torch.uint16), (8, torch.uint16)])
def test_other_crops_of_an_image_are_those_of_single_windows(implementation, channels, dtype):
    picture = image(40, 50, channels, dtype)
    start, end = corners(6, 1, 40, 50)
    out = torch.empty((6, 1, 16, 16, channels), dtype=dtype)
    crops_of_image(picture, start, end, 0, out)
    for crop in range(6):
        a, b = start[crop, 0].tolist(), end[crop, 0].tolist()
        window = picture[min(a[0], b[0]) : max(a[0], b[0]), min(a[1], b[1]) : max(a[1], b[1])]
        expected = torch.empty((16, 16, channels), dtype=dtype)
        crop_resize(window, a[0] > b[0], a[1] > b[1], expected)
        np.testing.assert_array_equal(out[crop, 0].numpy(), expected.numpy())


def test_a_window_that_reaches_beyond_the_image_is_cut_off(implementation):
    picture = image(20, 30, 3, torch.uint8)
    start, end = torch.tensor([[[4, 31]]]), torch.tensor([[[23, 10]]])
    out = torch.empty((1, 1, 8, 8, 3), dtype=torch.uint8)
    crops_of_image(picture, start, end, 0, out)
    np.testing.assert_array_equal(out[0, 0].numpy(), pytorchs(picture, [4, 30], [20, 10], 8))
    with pytest.raises(ValueError, match="crop 0 of image 0 has no pixel of it"):
        crops_of_image(picture, start, torch.tensor([[[4, 10]]]), 0, out)
    crops_of_image(picture, start[:0], end[:0], 0, out[:0])


@pytest.mark.skipif(not HAS_NATIVE, reason="not built")
def test_the_native_call_refuses_what_it_cannot_read():
    picture, out = image(20, 30, 3, torch.uint8), torch.empty((2, 3, 8, 8, 3), dtype=torch.uint8)
    start, end = corners(2, 3, 20, 30)
    for wrong in (
        (picture.short(), start, end, 0, out.short()),
        (picture, start.int(), end.int(), 0, out),
        (picture, start[:1], end[:1], 0, out),
        (picture[:, ::2], start, end, 0, out),
        (picture, start, end, 0, out[:, :, :, ::2]),
        (picture[..., :2], start, end, 0, out),
    ):
        with pytest.raises(ValueError, match=r"image|start"):
            crops_of_image(*wrong)
    with pytest.raises(IndexError, match="slot 3 of 3"):
        crops_of_image(picture, start, end, 3, out)


ALONE = """
import os, threading, torch
from pera_kernels.crop_resize import crops_of_image
torch.set_num_threads(8)
image = torch.randint(0, 255, (512, 512, 3), dtype=torch.uint8)
start, end = torch.zeros(2, 1, 2, dtype=torch.int64), torch.full((2, 1, 2), 500)
out = torch.empty(2, 1, 448, 448, 3, dtype=torch.uint8)

def work():
    before = len(os.listdir("/proc/self/task"))
    for _ in range(3):
        crops_of_image(image, start, end, 0, out)
    print(len(os.listdir("/proc/self/task")) - before)
    assert torch.get_num_threads() == 8

thread = threading.Thread(target=work)
thread.start()
thread.join()
"""


@pytest.mark.skipif(not HAS_NATIVE, reason="the native library was not built")
def test_crops_of_an_image_start_no_threads_of_their_own():
    """A team for each of the loader's threads would be many times as many threads as cores."""
    env = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    found = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True, env=env, check=True)
    assert found.stdout.strip() == "0"
