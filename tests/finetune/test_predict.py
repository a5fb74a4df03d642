"""Predictions: classes in a CSV, masks with the image's place, windows of large rasters, resuming, unreadable files."""

import csv
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from finetune_support import SHORT, masks, scenes, small_config, small_weights, write_csv
from PIL import Image
from rasterio.control import GroundControlPoint
from rasterio.transform import from_origin

from pera_fast import cli
from pera_fast.errors import UserError
from pera_fast.features.images import ImageReader
from pera_fast.features.inputs import find_inputs
from pera_fast.features.windows import WindowReader
from pera_fast.finetune import predict as module
from pera_fast.finetune.api import finetune
from pera_fast.finetune.classes_out import ClassesFile
from pera_fast.finetune.masks_out import colors
from pera_fast.finetune.predict import predict

PLACE = from_origin(500000, 5600000, 10, 10)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of each task, of a few steps."""
    root = tmp_path_factory.mktemp("runs")
    weights = small_weights(root / "w.safetensors")
    data = {
        "scene": scenes(root / "scenes"),
        "segmentation": masks(root / "masks", count=4),
        "change": masks(root / "pairs", count=4, pairs=True),
    }
    settings = [*SHORT, "train.steps=3", "optim.lr=3e-3"]
    return {task: finetune(task, data[task], root / task, weights, overrides=settings).out for task in data}


def _raster(path: Path, pixels: np.ndarray, **place) -> Path:
    """Pixels [H, W, C] as a GeoTIFF."""
    height, width, count = pixels.shape
    sizes = {"height": height, "width": width, "count": count, "dtype": pixels.dtype}
    with rasterio.open(path, "w", driver="GTiff", **sizes, **place) as file:
        file.write(np.moveaxis(pixels, -1, 0))
    return path


def _picture(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_scenes_give_a_row_each(runs: dict[str, Path], tmp_path: Path) -> None:
    root = scenes(tmp_path / "new", count=4)
    (root / "broken.png").write_bytes(b"no image")
    found = predict(runs["scene"], root, tmp_path / "out", batch_size=3)
    assert (found.written, found.skipped) == (4, 1)
    rows = _rows(tmp_path / "out" / "predictions.csv")
    assert [row["file"] for row in rows] == ["dark/0.png", "dark/1.png", "light/0.png", "light/1.png"]
    for row in rows:
        shares = [float(row["p(dark)"]), float(row["p(light)"])]
        assert sum(shares) == pytest.approx(1, abs=1e-5)
        assert row["class"] == ("dark", "light")[int(np.argmax(shares))]
    skipped = _rows(tmp_path / "out" / "skipped.csv")
    assert len(skipped) == 1
    assert skipped[0]["file"].endswith("broken.png")
    assert not list((tmp_path / "out").glob("*.partial"))


def test_a_stopped_call_goes_on(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root, out = scenes(tmp_path / "new", count=6), tmp_path / "out"
    add, calls = ClassesFile.add, []

    def stopping(self, files, logits):
        add(self, files, logits)
        calls.append(files)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ClassesFile, "add", stopping)
        with pytest.raises(SystemExit) as caught:
            predict(runs["scene"], root, out, batch_size=2)
    assert caught.value.code == 130
    assert not (out / "predictions.csv").exists()
    partial = out / ".predictions.csv.partial"
    partial.write_text(partial.read_text() + "light/0.png,li")  # killed while it wrote
    command = ["predict", "--weights", str(runs["scene"]), "--data", str(root), "--out", str(out)]
    (out / "note.txt").touch()
    assert cli.run(command) == 2
    assert "holds something already; give another folder, or --resume" in capsys.readouterr().err
    assert cli.run([*command, "--resume"]) == 0
    again = [row["file"] for row in _rows(out / "predictions.csv")]
    assert again == [f"{name}/{number}.png" for name in ("dark", "light") for number in range(3)]
    before = (out / "predictions.csv").read_bytes()
    assert cli.run([*command, "--resume"]) == 0
    assert (out / "predictions.csv").read_bytes() == before


def test_many_classes_name_the_five_most_probable(tmp_path: Path) -> None:
    classes = tuple(f"c{number}" for number in range(40))
    with ClassesFile(tmp_path / "p.csv", classes, several=False) as file:
        file.add(["a"], torch.arange(40.0)[None])
    (row,) = _rows(tmp_path / "p.csv")
    assert [row["class"], *(row[f"class_{n}"] for n in range(1, 6))] == ["c39", "c39", "c38", "c37", "c36", "c35"]
    with ClassesFile(tmp_path / "q.csv", ("a", "b", "c"), several=True) as file:
        file.add(["a"], torch.tensor([[2.0, -1.0, 3.0]]))
    assert _rows(tmp_path / "q.csv")[0]["class"] == "a|c"


def test_masks_have_the_place_of_their_image(runs: dict[str, Path], tmp_path: Path) -> None:
    root = tmp_path / "new"
    (root / "sub").mkdir(parents=True)
    pixels = _picture(300, 41, 3)
    pixels[:9] = 0
    _raster(root / "sub" / "a.tif", pixels, crs="EPSG:32632", transform=PLACE, nodata=0)
    points = [GroundControlPoint(r, c, 10 + c / 100, 50 - r / 100) for r, c in ((0, 0), (0, 40), (30, 0), (30, 40))]
    _raster(root / "b.tif", pixels[20:60], gcps=points, crs="EPSG:4326")
    Image.fromarray(pixels[20:60]).save(root / "c.png")
    found = predict(runs["segmentation"], root, tmp_path / "out", overlap=0.5, batch_size=5)
    assert found.written == 3
    with rasterio.open(tmp_path / "out" / "sub" / "a.tif") as mask:
        assert (mask.crs, mask.transform, mask.shape) == ("EPSG:32632", PLACE, (300, 41))
        assert (mask.profile["tiled"], mask.profile["compress"], mask.nodata) == (True, "deflate", 255)
        assert mask.colormap(1)[1] == (255, 140, 0, 255)
        assert mask.tags()["CLASSES"] == "0, 1"
        values = mask.read(1)
    assert (values[:9] == 255).all()
    assert set(np.unique(values[9:])) <= {0, 1, 255}
    assert (values[9:] == 255).sum() == (pixels[9:] == 0).all(-1).sum()
    with rasterio.open(tmp_path / "out" / "b.tif") as mask:
        assert [(p.row, p.col, p.x, p.y) for p in mask.gcps[0]] == [(p.row, p.col, p.x, p.y) for p in points]
        places = mask.read(1)
    picture = Image.open(tmp_path / "out" / "c.png")
    assert picture.mode == "P"
    # The PNG was read whole, the GeoTIFF in windows.
    assert np.array_equal(np.asarray(picture), places)


def test_large_scenes_are_read_in_windows_and_whole_masks_appear(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = _raster(tmp_path / "scene.tif", _picture(200, 90, 3), crs="EPSG:32632", transform=PLACE, tiled=True,
                    blockxsize=64, blockysize=64)  # fmt: skip
    read, seen = WindowReader._read, []

    def noted(self, top, left, height, width):
        seen.append(height * width)
        return read(self, top, left, height, width)

    monkeypatch.setattr(WindowReader, "_read", noted)
    monkeypatch.setattr(module, "ImageReader", None)
    predict(runs["segmentation"], scene, tmp_path / "out", overlap=0.25)
    assert max(seen) == 16 * 16
    assert (tmp_path / "out" / "scene.tif").exists()
    before = (tmp_path / "out" / "scene.tif").stat().st_mtime_ns
    count = len(seen)
    predict(runs["segmentation"], scene, tmp_path / "out", resume=True)
    assert (len(seen), (tmp_path / "out" / "scene.tif").stat().st_mtime_ns) == (count, before)
    monkeypatch.setattr(module, "tiled", lambda *_: iter([(0, torch.zeros(2, 9, 90)), 1 / 0]))
    with pytest.raises(ZeroDivisionError):
        predict(runs["segmentation"], scene, tmp_path / "other")
    assert not list((tmp_path / "other").glob("*.tif"))


def test_changes_of_folders_and_of_a_csv(runs: dict[str, Path], tmp_path: Path) -> None:
    root = masks(tmp_path / "pairs", count=2, pairs=True)
    predict(runs["change"], root, tmp_path / "out")
    rows = [("before", "after"), ("before/0.png", "after/0.png"), ("before/1.png", "after/gone.png")]
    table = write_csv(root / "pairs.csv", rows)
    found = predict(runs["change"], table, tmp_path / "again", root=root)
    assert (found.written, found.skipped) == (1, 1)
    first, second = (Image.open(path) for path in (tmp_path / "out" / "0.png", tmp_path / "again" / "before" / "0.png"))
    assert np.array_equal(np.asarray(first), np.asarray(second))
    Image.new("RGB", (5, 5)).save(root / "after" / "1.png")
    table = write_csv(root / "pairs.csv", [("before", "after"), ("before/1.png", "after/1.png")])
    with pytest.raises(UserError, match=r"none of the 1 input"):
        predict(runs["change"], table, tmp_path / "none", root=root)
    assert "the images of a pair are of one size" in (tmp_path / "none" / "skipped.csv").read_text()


def test_windows_are_parts_of_the_whole_image(tmp_path: Path) -> None:
    cfg = small_config(["data.bands=[2,4]", "data.band_range=[[0,900],[100,2000]]", "data.depth=16"])
    pixels = np.random.default_rng(0).integers(0, 2000, (30, 50, 4), dtype=np.uint16)
    path = _raster(tmp_path / "a.tif", pixels, nodata=7)
    whole = ImageReader(cfg)(path)
    with WindowReader(path, cfg) as reader:
        assert (reader.height, reader.width) == (30, 50)
        assert np.array_equal(reader(3, 10, 8, 20), whole[3:11, 10:30])
        valid = reader.valid(0, 0, 30, 50)
        assert valid is None or np.array_equal(valid, (pixels[..., [1, 3]] != 7).any(-1))
    floats = _raster(tmp_path / "f.tif", pixels[..., :3].astype(np.float32))
    with pytest.raises(UserError, match="values of float32 are scaled by the whole image"):
        WindowReader(floats, small_config())
    Image.new("RGB", (9, 9)).save(tmp_path / "p.png")
    with pytest.raises(UserError, match="a png is read whole"):
        WindowReader(tmp_path / "p.png", small_config())


def test_names_of_inputs(tmp_path: Path) -> None:
    for name in ("a.png", "a.jpg", "sub/b.png", ".hidden/c.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    found = find_inputs(tmp_path, pairs=False)
    assert [(one.name, one.file) for one in found] == [
        ("a.jpg", "a.jpg"), ("a.png", "a.png"), ("sub/b", "sub/b.png")
    ]  # fmt: skip
    assert [one.name for one in find_inputs(tmp_path / "a.png", pairs=False)] == ["a"]
    for column in ("file", "image"):
        table = write_csv(tmp_path / "t.csv", [(column, "more"), ("../x/a.png", 1), ("sub/b.png", 2)])
        assert [one.name for one in find_inputs(table, pairs=False)] == ["x/a", "sub/b"]
    table = write_csv(tmp_path / "t.csv", [("file",), ("a.png",), ("a.png",)])
    with pytest.raises(UserError, match=r"a.png is there twice; results would overwrite"):
        find_inputs(table, pairs=False)
    for data, pairs, why in (
        (tmp_path / "none", False, "no such file or folder"),
        (tmp_path / "a.png", True, "is one file, and changes want pairs"),
        (tmp_path / ".hidden" / "..", True, "has no folder before"),
    ):
        with pytest.raises(UserError, match=why):
            find_inputs(data, pairs)


def test_wrong_calls_get_one_line(runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = tmp_path / "a.png"
    Image.new("RGB", (9, 9)).save(image)
    command = ["predict", "--weights", str(runs["segmentation"]), "--data", str(image), "--out", str(tmp_path / "out")]
    for more, why in (
        (["--overlap", "0.9"], "--overlap 0.9: wants a fraction of a tile from 0 to 0.75"),
        (["--size", "18"], "--size 18: must be a multiple of the patch size 4; nearest: 16"),
        (["--root", str(tmp_path)], "is for a CSV, and --data"),
    ):
        assert cli.run([*command, *more]) == 2
        error = capsys.readouterr().err
        assert why in error
        assert error.count("\n") == 1
    assert cli.run([*command, "--size", "20"]) == 0


def test_colours_differ() -> None:
    found = colors(60)
    assert len(set(found)) == 60
    assert found[:2] == [(0, 0, 0), (255, 140, 0)]
