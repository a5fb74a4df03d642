"""Masks of every form give class numbers, and what is no mask gets one line."""

from pathlib import Path

import numpy as np
import pytest
import rasterio
from PIL import Image

from pera_fast.errors import UserError
from pera_fast.features.masks import IGNORED, Masks, masks_of, read_mask
from pera_fast.features.samples import Samples

VALUES = np.array([[0, 1, 2], [3, 1, 0]], np.uint8)


def samples(*masks: Path) -> Samples:
    return Samples("segmentation", tuple((mask,) for mask in masks), (), masks, ("",) * len(masks), (), "set.csv")


def written(path: Path, values: np.ndarray, **options) -> Path:
    if path.suffix == ".tif":
        bands = values if values.ndim == 3 else values[None]
        sizes = {"count": bands.shape[0], "height": bands.shape[1], "width": bands.shape[2]}
        with rasterio.open(path, "w", driver="GTiff", dtype=bands.dtype, **sizes, **options) as file:
            file.write(bands)
    else:
        Image.fromarray(values).save(path, **options)
    return path


def test_palette_png_gives_its_index(tmp_path: Path) -> None:
    image = Image.fromarray(VALUES, mode="P")
    image.putpalette([200, 10, 10, 10, 200, 10, 10, 10, 200, 90, 90, 90])
    image.save(tmp_path / "a.png")
    assert read_mask(tmp_path / "a.png").tolist() == VALUES.tolist()
    image.save(tmp_path / "transparent.png", transparency=0)
    assert read_mask(tmp_path / "transparent.png").tolist() == VALUES.tolist()


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "int32", "float32"])
def test_tiff_of_whole_numbers(tmp_path: Path, dtype: str) -> None:
    assert read_mask(written(tmp_path / "a.tif", VALUES.astype(dtype))).tolist() == VALUES.tolist()


def test_png_of_16_bits_and_of_few_bits(tmp_path: Path) -> None:
    assert read_mask(written(tmp_path / "deep.png", VALUES.astype(np.uint16) * 300)).max() == 900
    assert read_mask(written(tmp_path / "one.png", VALUES > 1)).tolist() == (VALUES > 1).astype(int).tolist()
    for bits in (2, 4):
        path = tmp_path / f"{bits}.png"
        with rasterio.open(path, "w", driver="PNG", dtype="uint8", count=1, height=2, width=3, nbits=bits) as file:
            file.write(VALUES[None])
        assert path.read_bytes()[24] == bits
        assert read_mask(path).tolist() == VALUES.tolist()


def test_tiff_of_few_bits_is_as_stored(tmp_path: Path) -> None:
    assert read_mask(written(tmp_path / "a.tif", VALUES, nbits=4)).tolist() == VALUES.tolist()
    path = written(tmp_path / "b.tif", (VALUES > 1).astype(np.uint8), nbits=1, photometric="MINISWHITE")
    assert read_mask(path).tolist() == (VALUES > 1).astype(int).tolist()


def test_equal_channels_are_one_and_others_are_refused(tmp_path: Path) -> None:
    gray = np.repeat(VALUES[..., None], 3, 2)
    assert read_mask(written(tmp_path / "gray.png", gray)).tolist() == VALUES.tolist()
    assert read_mask(written(tmp_path / "gray.tif", np.moveaxis(gray, 2, 0))).tolist() == VALUES.tolist()
    alpha = np.concatenate([gray, np.full((2, 3, 1), 9, np.uint8)], 2)
    assert read_mask(written(tmp_path / "alpha.png", alpha)).tolist() == VALUES.tolist()
    gray[0, 0, 2] = 200
    with pytest.raises(UserError, match=r"colour.png: .*has 3 bands that differ"):
        read_mask(written(tmp_path / "colour.png", gray))


def test_jpeg_fractions_negatives_and_garbage_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="JPEG changes values"):
        read_mask(written(tmp_path / "a.jpg", VALUES))
    with pytest.raises(UserError, match="holds fractions"):
        read_mask(written(tmp_path / "a.tif", VALUES.astype(np.float32) / 2))
    with pytest.raises(UserError, match=r"has the value -3, .* --ignore -3"):
        read_mask(written(tmp_path / "b.tif", VALUES.astype(np.int16) - 3))
    (tmp_path / "c.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"c.png: cannot be read as a mask"):
        read_mask(tmp_path / "c.png")


def test_ignored_are_the_given_value_and_declared_nodata(tmp_path: Path) -> None:
    path = written(tmp_path / "a.png", VALUES)
    assert read_mask(path, ignore=3).tolist() == [[0, 1, 2], [IGNORED, 1, 0]]
    hole = VALUES.copy()
    hole[0, 1] = 255
    assert read_mask(written(tmp_path / "a.tif", hole)).max() == 255
    assert read_mask(written(tmp_path / "b.tif", hole, nodata=255)).tolist() == [[0, IGNORED, 2], [3, 1, 0]]
    assert read_mask(written(tmp_path / "c.tif", hole, nodata=0)).min() == 0  # 0 is a class
    nan = VALUES.astype(np.float32)
    nan[1, 1] = np.nan
    assert read_mask(written(tmp_path / "d.tif", nan)).tolist() == [[0, 1, 2], [3, IGNORED, 0]]


def test_mask_is_turned_as_its_image_is(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    path = written(tmp_path / "a.png", VALUES, exif=exif)
    assert read_mask(path).tolist() == np.rot90(VALUES, -1).tolist()


def test_classes_are_those_of_the_training_masks(tmp_path: Path) -> None:
    one, two = written(tmp_path / "1.png", VALUES), written(tmp_path / "2.png", VALUES % 2)
    masks = masks_of(samples(one), samples(two))
    assert masks == Masks(("0", "1", "2", "3"))
    assert masks.read(one, (2, 3)).tolist() == VALUES.tolist()
    named = masks_of(samples(two), samples(one), names=("field", "road", "water", "roof"))
    assert named.classes == ("field", "road", "water", "roof")
    assert named.notes == ("no training mask has water, roof, which test masks have: nothing can predict it",)


def test_0_and_255_are_two_classes_and_it_is_said(tmp_path: Path) -> None:
    path = written(tmp_path / "1.png", (VALUES > 1).astype(np.uint8) * 255)
    for names in ((), ("background", "road")):
        masks = masks_of(samples(path), names=names)
        assert masks.notes == ("masks hold 0 and 255, which are taken as classes 0 and 1",)
        assert masks.read(path).tolist() == (VALUES > 1).astype(int).tolist()
    assert masks.classes == ("background", "road")


def test_a_mask_of_another_size_names_both_sizes(tmp_path: Path) -> None:
    path = written(tmp_path / "1.png", VALUES)
    with pytest.raises(UserError, match=r"1.png: is 3 x 2 px, and its image .*a.jpg is 400 x 300 px"):
        Masks(("0", "1", "2", "3")).read(path, (300, 400), tmp_path / "a.jpg")


def test_wrong_values_get_one_line(tmp_path: Path) -> None:
    plain, two = written(tmp_path / "plain.png", VALUES), written(tmp_path / "two.png", VALUES % 2)
    hole = written(tmp_path / "hole.png", np.where(VALUES == 3, 255, VALUES).astype(np.uint8))
    with pytest.raises(UserError, match=r"plain.png: has the value 3, and the classes are 0 to 1 \(a, b\)"):
        masks_of(samples(plain), names=("a", "b"))
    with pytest.raises(UserError, match=r"hole.png: has the value 255 beside 0, 1, 2; give --ignore 255"):
        masks_of(samples(hole))
    assert masks_of(samples(hole), ignore=255).classes == ("0", "1", "2")
    with pytest.raises(UserError, match=r"plain.png: has class 2, which no training mask has"):
        masks_of(samples(two), samples(plain))
    with pytest.raises(UserError, match=r"set.csv: the training masks hold class 0 only"):
        masks_of(samples(written(tmp_path / "zero.png", VALUES * 0)))
    with pytest.raises(UserError, match=r"set.csv: all pixels .* have the ignore value 0"):
        masks_of(samples(tmp_path / "zero.png"), ignore=0)
    with pytest.raises(UserError, match=r"two.png: has the value 1, and the classes are 0 to 0"):
        Masks(("a",)).read(two)
