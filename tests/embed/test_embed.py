"""`embed`: vectors, places and metadata; resuming after a stop; bands of a sensor; wrong inputs."""

import csv
import json
from pathlib import Path

import embed_support as support
import numpy as np
import pyarrow.parquet as pq
import pytest
from data_support import raster, write_scenes
from embed_support import SIZE, close, expected, images, run
from PIL import Image
from safetensors.torch import save_file
from tar_support import write_shards

from pera_fast import cli
from pera_fast.config import load_config
from pera_fast.embed import parts as parts_module
from pera_fast.embed import writer
from pera_fast.embed.stored import Embeddings
from pera_fast.embed.table import patches_of, vectors_of
from pera_fast.errors import UserError
from pera_fast.features.extract import Extractor
from pera_fast.weights.backbone import random_backbone

pytest.importorskip("nvidia.dali")


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """Indexes go to a folder of the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "images"
    root.mkdir()
    images(root)
    return root


@pytest.fixture(scope="module")
def paths():
    return sorted([*support.PLACES, *(f"plain/{number:03d}.png" for number in range(7))])


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """The output of a call that nothing stopped."""
    out = tmp_path_factory.mktemp("whole") / "out.parquet"
    run(folder, out, patches=True, pooling="both")
    return out


def test_rows_are_the_features_of_the_images(folder, paths, whole):
    table = pq.read_table(whole)
    assert table["path"].to_pylist() == paths
    assert close(vectors_of(table), expected(folder, paths, "both"))
    assert patches_of(table).shape == (10, (SIZE // 8) ** 2, 128)
    mean = patches_of(table).astype(np.float32).mean(1)
    assert np.abs(mean - vectors_of(table)[:, 128:]).max() < 0.01
    about = json.loads(table.schema.metadata[b"pera_fast"])
    assert (about["weights"], about["pooling"], about["size"], about["width"]) == ("random:tiny", "both", SIZE, 256)
    assert (about["root"], about["precision"], about["channels"]) == (str(folder), "float32", 3)


def test_only_georeferenced_images_have_a_place(whole):
    rows = pq.read_table(whole, columns=["path", "lon", "lat", "crs", "bounds"]).to_pylist()
    placed, plain = rows[:3], rows[3:]
    assert [row["path"] for row in placed] == list(support.PLACES)
    assert all(row[key] is None for row in plain for key in ("lon", "lat", "crs", "bounds"))
    assert placed[0]["bounds"] == [500000, 5_760_600, 500400, 5_761_000]
    assert [row["crs"] for row in placed] == ["EPSG:32631", "EPSG:32631", "EPSG:32618"]
    assert [row["lon"] for row in placed] == pytest.approx([3.003, 5.91, -74.997], abs=0.01)


def test_unreadable_files_are_listed(whole):
    with open(whole.with_name("out.skipped.csv"), newline="") as file:
        (row,) = list(csv.DictReader(file))
    assert row["file"] == "plain/broken.jpg"
    assert not parts_module.parts_folder(whole).exists()


def test_npy_has_its_paths_beside_it(folder, paths, whole, tmp_path):
    done = run(folder, tmp_path / "out.npy", patches=True, pooling="both")
    assert (done.images, done.skipped) == (10, 1)
    table = pq.read_table(whole)
    assert np.array_equal(np.load(tmp_path / "out.npy"), vectors_of(table))
    assert np.array_equal(np.load(tmp_path / "out.patches.npy"), patches_of(table))
    with open(tmp_path / "out.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["path"] for row in rows] == paths
    assert float(rows[0]["lon"]) == pytest.approx(3.003, abs=0.01)
    assert rows[3]["lon"] == rows[3]["left"] == ""


def test_row_groups_are_bounded_and_the_rows_the_same(folder, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(parts_module, "_ROW_GROUP", 3)
    run(folder, tmp_path / "out.parquet", patches=True, pooling="both")
    file = pq.ParquetFile(tmp_path / "out.parquet")
    assert [file.metadata.row_group(group).num_rows for group in range(4)] == [3, 3, 3, 1]
    assert file.read().equals(pq.read_table(whole))
    table = Embeddings(tmp_path / "out.parquet")
    assert table.take([9, 0, 4, 0], ["path"])["path"].to_pylist() == [
        pq.read_table(whole)["path"][row].as_py() for row in (9, 0, 4, 0)
    ]


def stopped(folder, out, monkeypatch, after: int, **options):
    """A call that is stopped by Ctrl-C after some batches, each a part."""
    tokens, calls = Extractor.tokens, []

    def stop(self, pixels, *args):
        calls.append(len(pixels))
        if len(calls) > after:
            raise KeyboardInterrupt
        return tokens(self, pixels, *args)

    with monkeypatch.context() as patch:
        patch.setattr(writer, "_PART_SECONDS", 0.0)
        patch.setattr(Extractor, "tokens", stop)
        with pytest.raises(writer.StoppedError, match="the same command with --resume goes on") as told:
            run(folder, out, **options)
    assert told.value.exit_code == 130


@pytest.mark.parametrize("name", ["out.parquet", "out.npy"])
def test_a_stopped_call_goes_on_to_the_same_output(folder, whole, tmp_path, monkeypatch, name):
    out = tmp_path / name
    options = {"pooling": "both", "patches": True}
    stopped(folder, out, monkeypatch, after=2, **options)
    assert not out.exists()
    with pytest.raises(UserError, match=r"is begun already .*go on with --resume, or --overwrite"):
        run(folder, out, **options)
    with pytest.raises(UserError, match="was begun with pooling both; give the same, or --overwrite to begin anew"):
        run(folder, out, resume=True, patches=True)
    seen = []
    tokens = Extractor.tokens
    with monkeypatch.context() as patch:
        patch.setattr(Extractor, "tokens", lambda self, x, *args: seen.append(len(x)) or tokens(self, x, *args))
        run(folder, out, resume=True, **options)
    assert sum(seen) == 10 - 4  # one batch was written
    if name == "out.parquet":
        assert out.read_bytes() == whole.read_bytes()
    else:
        assert np.array_equal(np.load(out), vectors_of(pq.read_table(whole)))
    with pytest.raises(UserError, match="exists already; give another name, or --overwrite"):
        run(folder, out, resume=True, **options)


def test_a_resumed_call_takes_the_files_of_the_first(tmp_path, monkeypatch):
    root, out = tmp_path / "images", tmp_path / "out.parquet"
    names = write_scenes(root, 9)
    stopped(root, out, monkeypatch, after=2)
    Image.open(root / names[0]).save(root / "000a.png")  # new
    (root / names[6]).unlink()
    (root / names[7]).write_bytes((root / names[0]).read_bytes())  # another picture
    done = run(root, out, resume="auto")
    assert (done.images, done.skipped) == (8, 1)
    table = pq.read_table(out)
    kept = [name for name in names if name != names[6]]
    assert table["path"].to_pylist() == kept
    assert close(vectors_of(table), expected(root, kept))
    with open(tmp_path / "out.skipped.csv", newline="") as file:
        assert [row["file"] for row in csv.DictReader(file)] == [names[6]]


def test_overwrite_begins_anew(folder, tmp_path, monkeypatch):
    out = tmp_path / "out.parquet"
    stopped(folder, out, monkeypatch, after=2)
    done = run(folder, out, overwrite=True, pooling="mean")
    assert (done.images, pq.read_metadata(out).num_rows) == (10, 10)
    assert run(folder, out, overwrite=True, resume="auto").rate > 0


def test_shards(tmp_path):
    root = write_shards(tmp_path / "shards", 2, 3)
    run(root, tmp_path / "out.parquet")
    table = pq.read_table(tmp_path / "out.parquet")
    assert table["path"].to_pylist() == [
        f"shard-{shard}.tar/{3 * shard + n:03d}.png" for shard in (0, 1) for n in range(3)
    ]
    plain = tmp_path / "plain"
    names = write_scenes(plain, 6)
    assert close(vectors_of(table), expected(plain, names))


BANDS = [*range(1, 13)]


@pytest.fixture(scope="module")
def sensor(tmp_path_factory):
    """Weights of a run on 12 bands of 16 bits, and images of that sensor."""
    root = tmp_path_factory.mktemp("sensor")
    sizes = ["model.in_chans=12", f"views.mean={[0.5] * 12}", f"views.std={[0.25] * 12}", f"data.bands={BANDS}"]
    cfg = load_config("tiny", [*sizes, "data.depth=16", "data.band_range=[[0,4000]]"])
    state = random_backbone(cfg, "test").model.state_dict()
    about = {
        "num_heads": 4,
        "bands": BANDS,
        "bits": 16,
        "band_range": [[0, 4000]],
        "mean": [0.5] * 12,
        "std": [0.25] * 12,
    }
    save_file(state, root / "weights.safetensors", {key: json.dumps(value) for key, value in about.items()})
    (root / "images").mkdir()
    rng = np.random.default_rng(0)
    for number in range(3):
        pixels = rng.integers(0, 4000, (12, 24, 24)).astype(np.uint16)
        (root / "images" / f"{number}.tif").write_bytes(raster(pixels))
    return root


def test_bands_bits_and_ranges_are_those_of_the_weights(sensor, tmp_path):
    weights, names = sensor / "weights.safetensors", ["0.tif", "1.tif", "2.tif"]
    run(sensor / "images", tmp_path / "out.parquet", weights)
    table = pq.read_table(tmp_path / "out.parquet")
    assert close(vectors_of(table), expected(sensor / "images", names, weights=weights))
    about = Embeddings(tmp_path / "out.parquet").about
    assert (about.channels, about.bands, about.depth, about.band_range) == (12, BANDS, "16", [[0, 4000]])
    assert about.weights == str(weights)


def test_images_of_other_bands_are_refused(sensor, folder, tmp_path):
    with pytest.raises(
        UserError, match=r"weights random:tiny take 3 channels, and in .* 3 of 3 file\(s\) have 12 bands"
    ):
        run(sensor / "images", tmp_path / "out.parquet")
    with pytest.raises(UserError, match=r"take 12 channels, and no image in .* has them: the first has 3 band\(s\)"):
        run(folder, tmp_path / "out.parquet", sensor / "weights.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_single_files_of_other_bands_are_left_out(sensor, tmp_path):
    root = tmp_path / "images"
    names = write_scenes(root, 2)
    (root / "deep.tif").write_bytes((sensor / "images" / "0.tif").read_bytes())
    done = run(root, tmp_path / "out.parquet")
    assert (done.images, done.skipped) == (2, 1)
    assert pq.read_table(tmp_path / "out.parquet")["path"].to_pylist() == names
    assert 'deep.tif,"has 12 bands, not 3"' in (tmp_path / "out.skipped.csv").read_text()


@pytest.mark.parametrize(
    ("out", "options", "told"),
    [
        ("out.csv", {}, "--out {}/out.csv: wants a name that ends in .parquet or .npy"),
        ("no/out.npy", {}, "--out {0}/no/out.npy: there is no folder {0}/no"),
        ("out.parquet", {"pooling": "clss"}, "--pooling clss: wants one of cls, mean, both; did you mean cls?"),
        ("out.parquet", {"size": 20}, "--size 20: must be a multiple of the patch size 8; nearest: 16"),
        ("out.parquet", {"resume": True}, "--out {}/out.parquet: nothing to resume there; leave --resume out to begin"),
        ("out.parquet", {"weights": "no.pt"}, "--weights no.pt: no such file or folder"),
        ("out.parquet", {"folder": "nowhere"}, "data folder nowhere does not exist"),
    ],
)
def test_wrong_inputs_get_one_line(folder, tmp_path, out, options, told):
    options = dict(options)
    with pytest.raises(UserError) as error:
        run(options.pop("folder", folder), tmp_path / out, **options)
    assert told.format(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_an_output_among_the_images_is_refused(folder):
    with pytest.raises(UserError, match="lies in the folder of images"):
        run(folder, folder / "out.parquet")


def test_command_line(folder, tmp_path, capsys):
    out = tmp_path / "out.npy"
    line = f"embed {folder} --weights random:tiny --out {out} --size {SIZE} --pooling mean --resume auto"
    assert cli.run(line.split()) == 0
    told = capsys.readouterr().out.splitlines()[-1]
    assert told.startswith(f"{out}: 10 embeddings of 128 values (mean, 16 px), ")
    assert told.endswith(f"1 of 11 files could not be used ({tmp_path}/out.skipped.csv)")
    assert Path(out).with_suffix(".csv").is_file()
    assert cli.run(line.split()) == 2
    assert "exists already" in capsys.readouterr().err
