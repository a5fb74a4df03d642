"""`data stats`: what it says is what NumPy says of all values, and what training then makes of them."""

import json

import numpy as np
import pytest
import rasterio
import torch
from data_support import encoded, raster, scene, small_config, write_scenes
from PIL import Image
from tar_support import write_tar

from pera_fast import cli
from pera_fast.config import load_config
from pera_fast.data.files.skipped import SkippedFiles
from pera_fast.data.index.build import build_index, open_or_build
from pera_fast.data.loading.loader import Loader
from pera_fast.data.tools.measure import measure_data, write_json
from pera_fast.data.tools.measure_plot import write_plot
from pera_fast.errors import UserError


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def run(data, **options):
    return measure_data(data, **{"workers": 2, "progress": False, **options})


def settings_of(measured):
    return dict(line.split("=", 1) for line in measured.settings())


def test_eight_bits_are_measured_exactly(tmp_path):
    write_scenes(tmp_path / "data", 7, 31, 45)
    measured = run(tmp_path / "data")
    everything = np.stack([scene(number, 31, 45) for number in range(7)]).reshape(-1, 3) / 255
    assert (measured.files, measured.failed, measured.of) == (7, 0, 7)
    assert list(settings_of(measured)) == ["views.mean", "views.std"]
    mean, std = measured.normalisation()
    assert mean == pytest.approx(everything.mean(0), abs=1e-5)
    assert std == pytest.approx(everything.std(0), abs=1e-5)
    for number, band in enumerate(measured.as_dict()["bands"]):
        values = everything[:, number] * 255
        assert band["percentiles"]["98.0"] == round(np.percentile(values, 98, method="inverted_cdf"))
        assert (band["min"], band["max"]) == (values.min(), values.max())
        assert sum(band["histogram"]["counts"]) == band["count"] == 7 * 31 * 45


def deep_folder(folder, kind="uint16", count=6):
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    scale = np.array([300, 700, 1200, 90, 2000])[:, None, None]
    pictures = [(rng.gamma(3, 0.3, (5, 40, 56)) * scale + 50).astype(kind) for _ in range(count)]
    for number, picture in enumerate(pictures):
        picture[:, :4] = 0
        (folder / f"{number}.tif").write_bytes(raster(picture, nodata=0))
    return np.stack(pictures)[:, :, 4:].astype(np.float64)


@pytest.mark.parametrize("kind", ["uint16", "float32"])
def test_deep_bands_get_ranges_and_what_is_no_data_does_not_count(tmp_path, kind):
    values = deep_folder(tmp_path / "data", kind).swapaxes(0, 1).reshape(5, -1)
    measured = run(tmp_path / "data", overrides=["model.in_chans=5"])
    settings = settings_of(measured)
    assert settings["data.depth"] == "16"
    assert settings["model.in_chans"] == "5"
    ranges = np.array(json.loads(settings["data.band_range"]))
    for number, band in enumerate(measured.as_dict()["bands"]):
        assert band["count"] == values.shape[1]
        assert band["mean"] == pytest.approx(values[number].mean(), rel=1e-6)
        assert band["std"] == pytest.approx(values[number].std(), rel=1e-6)
        low, high = ranges[number]
        scaled = ((values[number] - low) / (high - low)).clip(0, 1)
        assert band["views.mean"] == pytest.approx(scaled.mean(), abs=2e-5)
        assert band["views.std"] == pytest.approx(scaled.std(), abs=2e-5)
        assert [low, high] == pytest.approx(np.percentile(values[number], [0.5, 99.5]), rel=0.05)


def test_the_settings_normalise_what_training_gets(tmp_path):
    """Whole images as crops: their normalised values have mean 0 and deviation 1, up to the resizing."""
    folder = tmp_path / "data"
    folder.mkdir()
    rng = np.random.default_rng(1)
    for number in range(8):
        smooth = rng.uniform(100, 3000, (5, 3, 3)).repeat(16, 1).repeat(16, 2).astype(np.uint16)
        (folder / f"{number}.tif").write_bytes(raster(smooth))
    lines = run(folder, overrides=["model.in_chans=5"]).settings()
    whole = ["views.global_scale=[1,1]", "views.aspect=[1,1]", "views.num_local=0"]
    cfg = load_config("tiny", [*lines, *whole, "views.global_size=48", "data.loader_threads=1"])
    manifest = open_or_build(folder, cfg, progress=False)
    skipped = SkippedFiles(tmp_path / "skipped.csv")
    with Loader(cfg, manifest, batch_size=8, device=torch.device("cpu"), skipped=skipped) as loader:
        pixels = next(loader).global_.pixels.numpy().astype(np.float64) / 65535
    normalised = (pixels - cfg.views.mean) / cfg.views.std
    assert np.abs(normalised.mean((0, 1, 2))).max() < 0.02
    assert np.abs(normalised.std((0, 1, 2)) - 1).max() < 0.02


def test_chosen_bands_shards_and_manifests(tmp_path):
    values = deep_folder(tmp_path / "data")
    measured = run(tmp_path / "data", overrides=["data.bands=[5,1]"])
    assert measured.names() == ["5", "1"]
    assert settings_of(measured)["data.bands"] == "[5,1]"
    assert measured.stored[0].moments.mean == pytest.approx(values[:, 4].mean())
    files = {path.name: path.read_bytes() for path in (tmp_path / "data").iterdir()}
    write_tar(tmp_path / "shards" / "0.tar", files)
    again = run(tmp_path / "shards", overrides=["data.bands=[5,1]"])
    assert again.settings() == measured.settings()
    manifest = build_index(tmp_path / "data", out=tmp_path / "i.parquet", channels=5, workers=1, progress=False)
    from_file = run(manifest.path)
    assert from_file.stored[4].moments == measured.stored[0].moments


def test_a_sample_is_the_same_each_time_and_another_for_another_seed(tmp_path):
    write_scenes(tmp_path / "data", 20, 8, 8)
    first, again, other = (run(tmp_path / "data", sample=5, seed=seed) for seed in (0, 0, 1))
    assert (first.files, first.of) == (5, 20)
    assert first.as_dict() == again.as_dict()
    assert first.normalisation() != other.normalisation()
    assert run(tmp_path / "data", sample=0).files == 20


def test_kinds_that_only_one_library_reads_and_files_that_go(tmp_path):
    root = tmp_path / "data"
    write_scenes(root, 2)
    planes = np.moveaxis(scene(3), -1, 0)
    (root / "planar.tif").write_bytes(raster(planes, interleave="band"))
    (root / "gray.jpg").write_bytes(encoded(Image.fromarray(scene(4)).convert("L"), "JPEG"))
    (root / "bad.jpg").write_bytes(b"text")
    manifest = build_index(root, out=tmp_path / "i.parquet", workers=1, progress=False)
    (root / "000.png").unlink()
    measured = run(manifest.path)
    assert (measured.files, measured.failed, measured.of) == (3, 1, 4)


def test_the_command_prints_writes_and_draws(tmp_path, capsys):
    deep_folder(tmp_path / "data")
    line = f"data stats {tmp_path / 'data'} model.in_chans=5 --json {tmp_path / 's.json'} --plot {tmp_path / 's.png'}"
    assert cli.run([*line.split(), "--sample", "4", "--workers", "1"]) == 0
    out = capsys.readouterr().out
    assert cli.run(line.split()) == 2
    assert "s.json: exists already; give another name, or --overwrite to replace it" in capsys.readouterr().err
    told = json.loads((tmp_path / "s.json").read_text())
    assert "stored values of 4 of 6 files" in out
    assert all(f"  {setting}\n" in out for setting in told["settings"])
    load_config("tiny", told["settings"])
    assert len(told["bands"]) == 5
    with Image.open(tmp_path / "s.png") as opened:
        assert opened.format == "PNG"
        colours = {pixel for _, pixel in opened.convert("RGB").getcolors(2**20) if max(pixel) - min(pixel) > 100}
    assert len(colours) >= 4, "bands can be told apart"
    measured = run(tmp_path / "data", sample=1, overrides=["model.in_chans=5"])
    with pytest.raises(UserError, match=r"--json .*s.json: cannot be written \(No such file or directory\)"):
        write_json(measured, tmp_path / "no" / "s.json")
    with pytest.raises(UserError, match=r"--plot .*s.doc: cannot be written \(Format 'doc' is not supported"):
        write_plot(measured, tmp_path / "s.doc")


def test_the_legend_stands_beside_the_curves_and_names_each_band(tmp_path, monkeypatch):
    """12 named bands, in two files that agree on all names but the last."""
    (tmp_path / "data").mkdir()
    values = np.arange(12 * 64, dtype=np.uint16).reshape(12, 8, 8)
    for file, last in (("a.tif", "swir"), ("b.tif", "other")):
        (tmp_path / "data" / file).write_bytes(raster(values))
        with rasterio.open(tmp_path / "data" / file, "r+") as opened:
            opened.descriptions = [*(f"name{n}" for n in range(1, 12)), last]
    measured = run(tmp_path / "data", overrides=["model.in_chans=12"])
    figures = []
    monkeypatch.setattr("matplotlib.pyplot.close", figures.append)
    write_plot(measured, tmp_path / "s.png")
    (axes,) = figures[0].axes
    legend = axes.get_legend()
    assert [text.get_text() for text in legend.get_texts()] == [
        *(f"band {n} name{n}" for n in range(1, 12)), "band 12"
    ]  # fmt: skip
    assert not legend.get_window_extent().overlaps(axes.get_window_extent())
    styles = {(curve.get_edgecolor(), str(curve.get_linestyle())) for curve in axes.patches}
    assert len(styles) == 12
    assert [band["name"] for band in measured.as_dict()["bands"]] == [*(f"name{n}" for n in range(1, 12)), ""]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{t}/data --sample -1", "--sample -1: give a number of files, or 0 for all"),
        ("{t}/none", "data folder {t}/none does not exist"),
        ("{t}/notes.txt", "cannot read the index {t}/notes.txt: "),
    ],
)
def test_wrong_use_is_one_line(tmp_path, capsys, line, said):
    (tmp_path / "notes.txt").write_text("x" * 50)
    assert cli.run(["data", "stats", *line.format(t=tmp_path).split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: " + said.format(t=tmp_path))
    assert error.count("\n") == 1


def test_a_band_without_data(tmp_path):
    (tmp_path / "data").mkdir()
    empty = np.zeros((2, 8, 8), np.uint16)
    empty[0] = 5
    (tmp_path / "data" / "a.tif").write_bytes(raster(empty, nodata=0))
    overrides = ["model.in_chans=2", "data.band_range=[[0,100]]"]
    with pytest.raises(UserError, match=r"data .*: band 2 has no value in the 1 file\(s\) that were read"):
        run(tmp_path / "data", overrides=overrides)
    assert small_config().model.in_chans == 3
