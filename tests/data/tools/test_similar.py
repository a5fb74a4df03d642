"""Pairs of alike fingerprints against comparing all with all; fingerprints against what happens to images."""

import io

import numpy as np
import pytest
from data_support import encoded, raster, scene
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pera_fast.data.tools import similar
from pera_fast.data.tools.fingerprint import fingerprint, read_small
from pera_fast.data.tools.similar import MAX_BITS, distances, similar_pairs


def planted(seed, count, flips):
    """Random hashes, and copies of some with up to `flips` bits changed."""
    rng = np.random.default_rng(seed)
    hashes = rng.integers(0, 2**64, count, dtype=np.uint64)
    for row in range(0, count - 1, 3):
        bits = rng.choice(64, rng.integers(0, flips + 1), replace=False)
        hashes[row + 1] = hashes[row] ^ np.uint64(sum(1 << int(bit) for bit in bits))
    means = rng.integers(0, 3, (count, 4)).astype(np.uint8) * np.uint8(10)
    return hashes, means


def every_pair(hashes, means, bits, levels):
    first, second = np.triu_indices(len(hashes), 1)
    near = np.array([int(a ^ b).bit_count() <= bits for a, b in zip(hashes[first], hashes[second], strict=True)], bool)
    near &= (np.abs(means[first].astype(int) - means[second]) <= levels).all(1)
    return first[near].tolist(), second[near].tolist()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 1000), st.integers(2, 60), st.integers(0, MAX_BITS), st.sampled_from([5, 10, 255]))
def test_all_pairs_are_found_and_no_others(seed, count, bits, levels):
    hashes, means = planted(seed, count, bits + 2)
    first, second = similar_pairs(hashes, means, bits, levels)
    assert (first.tolist(), second.tolist()) == every_pair(hashes, means, bits, levels)


@pytest.mark.parametrize("bits", [0, 3, 5, 6, 8])
def test_any_number_of_parts_gives_the_same(monkeypatch, bits):
    hashes, means = planted(1, 300, bits + 1)
    hashes[100:200] = hashes[100] ^ np.arange(100).astype(np.uint64)  # a crowded bucket
    expected = every_pair(hashes, means, bits, 20)
    monkeypatch.setattr(similar, "_AT_ONCE", 50)
    for hashes_in_all in (10, 10**5, 10**7):
        parts = similar._parts(hashes_in_all, bits)
        assert bits == 0 or sum(width for _, width in parts) == 64
        monkeypatch.setattr(similar, "_parts", lambda *_, parts=parts: parts)
        done = []
        first, second = similar_pairs(hashes, means, bits, 20, done.append)
        assert (first.tolist(), second.tolist()) == expected
        assert sum(done) == pytest.approx(1)
        monkeypatch.undo()
        monkeypatch.setattr(similar, "_AT_ONCE", 50)


def test_nothing_and_one():
    for count in (0, 1):
        first, second = similar_pairs(np.zeros(count, np.uint64), np.zeros((count, 4), np.uint8), 5, 12)
        assert len(first) == len(second) == 0


def look(data, decoder="dali"):
    return fingerprint(read_small(data, decoder))


def apart(a, b):
    return int(distances(np.uint64(a[0]), np.uint64(b[0]))), int(np.abs(a[1].astype(int) - b[1]).max())


@pytest.mark.parametrize("key", range(6))
def test_small_changes_hardly_move_a_fingerprint(key):
    picture = Image.fromarray(scene(key, 512, 640))
    original = look(encoded(picture, "PNG"))
    for changed in (
        encoded(picture, "JPEG", quality=75),
        encoded(picture.resize((320, 256), Image.Resampling.BILINEAR), "PNG"),
        encoded(picture.point(lambda value: min(value + 4, 255)), "JPEG"),
        encoded(picture, "WEBP", quality=80),
        encoded(picture, "TIFF"),
    ):
        bits, levels = apart(original, look(changed))
        assert bits <= 4
        assert levels <= 8


def test_other_images_are_far():
    prints = [look(encoded(Image.fromarray(scene(key, 200, 200)), "PNG")) for key in range(20)]
    assert min(apart(a, b)[0] for i, a in enumerate(prints) for b in prints[:i]) > 8
    black, white = (look(encoded(Image.new("RGB", (64, 64), (level,) * 3), "PNG")) for level in (0, 255))
    assert apart(black, white) == (0, 255), "without structure it is the means that tell"


def test_what_only_rasterio_reads_and_what_nothing_reads():
    planes = np.moveaxis(scene(3), -1, 0)
    assert (
        apart(look(raster(planes, interleave="band"), "rasterio"), look(encoded(Image.fromarray(scene(3)), "PNG")))[0]
        == 0
    )
    assert (
        apart(look(raster(planes.astype(np.float64)), "dali"), look(encoded(Image.fromarray(scene(3)), "PNG")))[0] <= 4
    )
    deep = (np.arange(4)[:, None, None] + 1) * planes[[0, 1, 2, 2]].astype(np.uint16) * 4  # 12 bits and four bands
    bits, _ = apart(look(raster(deep), "rasterio"), look(raster(deep // 16 * 16), "rasterio"))
    assert bits <= 1
    assert apart(look(raster(deep), "rasterio"), look(raster(deep[:, ::-1].copy()), "rasterio"))[0] > 12
    with pytest.raises(Exception, match="cannot identify image file"):
        read_small(b"no image", "pillow")
    gray = io.BytesIO()
    Image.fromarray(scene(3)).convert("L").save(gray, "JPEG")
    assert read_small(gray.getvalue(), "dali").shape == (48, 64, 3)
