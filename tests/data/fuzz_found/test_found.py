"""Inputs that fuzzing (`python -m tests.data.fuzz`) found, made by code: read right, or refused in one line."""

import io
import json
import resource
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from data_support import encoded, raster, scene, small_config, write_scenes
from loader_support import index
from PIL import Image
from safetensors.torch import load_file

from pera_fast import cli
from pera_fast.config import load_config, read_config
from pera_fast.data.decoding import decode
from pera_fast.data.decoding.probe import ProbeResult, ProbeSettings
from pera_fast.data.files.manifest import Manifest, to_table
from pera_fast.data.files.skipped import SkippedFiles
from pera_fast.data.index.journal import Journal
from pera_fast.data.loading.loader import Loader
from pera_fast.data.tools.pack import pack
from pera_fast.data.tools.tile import tile
from pera_fast.data.tools.tile_grid import TileSettings
from pera_fast.errors import UserError
from pera_fast.features.images import load_images
from pera_fast.features.samples import read_samples
from pera_fast.interop.published import convert
from pera_fast.model.pera import PerA
from pera_fast.train.run_folder import RunFolder

CPU = torch.device("cpu")


def one_line(error) -> str:
    text = str(error.value)
    assert text
    assert "\n" not in text
    assert len(text) < 2000
    return text


# Images


def test_a_png_whose_checksum_is_wrong_is_not_decoded(tmp_path):
    """Pillow stops at the last pixel, before the checksum: most pixels came out as others."""
    picture = Image.fromarray(np.dstack([scene(1, 24, 24), scene(2, 24, 24)[..., 0]]), "RGBA")
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", compress_level=0)
    data = bytearray(buffer.getvalue())
    data[data.index(b"IDAT") + 500] ^= 0x55
    folder = tmp_path / "data"
    write_scenes(folder, 1)
    (folder / "damaged.png").write_bytes(data)
    bands = index(folder, tmp_path, channels=3).unreadable()
    assert bands == [("damaged.png", "checksum of the PNG's IDAT chunk is wrong")]
    with pytest.raises(UserError, match="checksum of the PNG's IDAT chunk is wrong"):
        load_images([folder / "damaged.png"], 16)


def test_a_text_with_a_wrong_checksum_costs_no_png(tmp_path):
    buffer = io.BytesIO()
    Image.fromarray(scene(1, 24, 24)).save(buffer, "PNG")
    text = struct.pack(">I", 4) + b"tEXta\0bc" + struct.pack(">I", zlib.crc32(b"something else"))
    data = buffer.getvalue()
    folder = tmp_path / "data"
    write_scenes(folder, 1)
    (folder / "text.png").write_bytes(data[:33] + text + data[33:])
    assert index(folder, tmp_path).unreadable() == []


def test_colours_with_nodata_become_gray(tmp_path):
    """Pixels without data were blackened in memory that belongs to Pillow: the file was lost when it was first read."""
    folder = tmp_path / "data"
    folder.mkdir()
    planes = np.moveaxis(scene(2, 40, 56), -1, 0).copy()
    planes[:, :8] = 7
    (folder / "masked.tif").write_bytes(raster(planes, nodata=7))
    cfg = small_config("model.in_chans=1")
    skipped = SkippedFiles(tmp_path / "skipped.csv")
    with Loader(cfg, index(folder, tmp_path, channels=1), batch_size=1, device=CPU, skipped=skipped) as loader:
        assert next(loader).global_.pixels.shape == (2, 48, 48, 1)
    assert not skipped.path.exists()


def test_a_small_image_in_a_huge_block_takes_no_memory(tmp_path):
    """56 x 40 pixels in a JPEG 2000 tile of 56 x 134,217,768: GDAL took 7 GiB a band."""
    data = bytearray(encoded(Image.fromarray(scene(1, 40, 56)), "JPEG2000", no_jp2=True))
    tile_height = data.index(b"\xff\x4f\xff\x51") + 28
    data[tile_height] = 8
    before = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:
        mapped = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + 2**32, before[1]))
    try:
        with pytest.raises(ValueError, match="has blocks of 56 x 134217768 pixels, the image 56 x 40"):
            decode.read(bytes(data), "rasterio", 3)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


# Index


def rows(count: int) -> list[ProbeResult]:
    return [
        ProbeResult(f"{n:03d}.png", True, "", "dali", "png", 64, 48, 3, "uint8", 1000 + n, 9 + n) for n in range(count)
    ]


def test_a_damaged_index_is_never_taken_for_another(tmp_path):
    """A bit of a size, a path or the description flipped: other rows were believed, or pyarrow raised anything."""
    path = tmp_path / "index.parquet"
    Manifest(Path("/data"), to_table(rows(9)), ProbeSettings(), "2.4", decided={"depth": "8"}).save(path)
    whole = path.read_bytes()
    for at in range(0, len(whole), 13):
        data = bytearray(whole)
        data[at] ^= 1 << (at % 8)
        path.write_bytes(data)
        with pytest.raises(UserError) as error:
            Manifest.load(path)
        assert str(path) in one_line(error)
    for end in (0, 3, 7, 20, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:end])
        with pytest.raises(UserError):
            Manifest.load(path)


def test_an_index_without_a_digest_is_read_if_it_is_of_an_older_version(tmp_path, monkeypatch):
    path = tmp_path / "index.parquet"
    monkeypatch.setattr("pera_fast.data.files.manifest.seal", lambda path: None)
    made = Manifest(Path("/data"), to_table(rows(9)), ProbeSettings(), "2.4")
    made.save(path)
    with pytest.raises(UserError, match="its digest is missing"):
        Manifest.load(path)
    monkeypatch.setattr("pera_fast.data.files.manifest._SEALED", {})
    made.save(path)
    assert Manifest.load(path).table.equals(made.table)


@pytest.mark.parametrize("name", ["00x-000000.parquet", "000000.parquet", "0\n1-000.parquet", "1-2-3.parquet"])
def test_strange_names_in_a_journal_are_left_alone(tmp_path, name):
    folder = tmp_path / "data"
    names = write_scenes(folder, 2)
    with Journal(tmp_path / "index.parquet", folder, ProbeSettings(), "2.4") as journal:
        pass
    (journal.folder / name).write_bytes(b"PAR1")
    assert index(folder, tmp_path).readable.paths.to_pylist() == names


# Settings


@pytest.mark.parametrize(
    "override",
    [
        "data.decode_on=" + "9" * 5000, "[" * 2000, "{a: " * 500, "views.mean=" + "[" * 2000,
        "optim.lr=" + "9" * 400, "train.steps" + "{a: " * 400 + "=1", "views.mean=[" + "1" * 400 + ",1,1]",
        "model.embed_dim=384" + "9" * 400, "model.embed_dim=3849999999999999999",
    ],
    ids=["long", "no key", "braces", "deep", "no float", "long key", "no float in a list", "no width", "huge width"],
)  # fmt: skip
def test_long_and_deep_settings_are_refused_in_one_line(override):
    with pytest.raises(UserError) as error:
        load_config("tiny", [override])
    one_line(error)


@pytest.mark.parametrize(
    "data",
    [
        b"train:\n  steps: " + b"[" * 3000, b"a" * 3000 + b":\n  b: 1\n", b"train:\n  " + b"a" * 3000 + b": 1",
        b"recipe: tiny\n\xff\xfe", b"\x94",
    ],
    ids=["deep", "long section", "long key", "no text", "no text at all"],
)  # fmt: skip
def test_recipes_that_are_no_text_or_too_deep(tmp_path, data):
    path = tmp_path / "my.yaml"
    path.write_bytes(data)
    for read in (load_config, read_config):
        with pytest.raises(UserError) as error:
            read(path)
        one_line(error)


# Runs


@pytest.fixture
def run(tmp_path):
    """Folder of a run that ended after six steps, as far as `--resume` looks before it needs the images."""
    folder = RunFolder(tmp_path / "run")
    folder.make()
    cfg = small_config("train.steps=6")
    folder.write_config(cfg, cfg)
    return folder


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("finished.json", b'{"step": [6], "position": 6, "steps_per_epoch": 3, "total_batch": 4}'),
        ("finished.json", b'{"step": 6, "position": "6", "steps_per_epoch": null, "total_batch": 4}'),
        ("finished.json", b"[" * 100000),
        ("finished.json", b"[6]"),
        ("config.yaml", b"train:\n  steps: 6\n\x94"),
        ("asked.yaml", b"\xff"),
    ],
)
def test_damaged_files_of_a_run_are_passed_over_or_named(run, tmp_path, capsys, name, data):
    run.finished.write_text("{}")
    (run.root / name).write_bytes(data)
    for resume in ("--resume", "--resume=auto"):
        settings = ["--recipe", "tiny", "train.steps=6"] if resume.endswith("auto") else []
        assert cli.run(["pretrain", "--data", str(tmp_path / "none"), "--out", str(run.root), resume, *settings]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_a_damaged_index_of_a_run_is_named(run, tmp_path, capsys):
    write_scenes(tmp_path / "images", 2)
    Manifest(tmp_path / "images", to_table(rows(9)), ProbeSettings(), "2.4").save(run.index)
    data = bytearray(run.index.read_bytes())
    data[100] ^= 1
    run.index.write_bytes(data)
    assert cli.run(["pretrain", "--data", str(tmp_path / "images"), "--out", str(run.root), "--resume"]) == 2
    told = "damaged: its digest is not that of its contents; delete it, and the images are indexed anew"
    assert capsys.readouterr().err == f"error: cannot read the index {run.index}: {told}\n"


def test_metrics_with_bytes_that_are_no_text_are_cut(run):
    lines = [json.dumps({"step": step, "loss": 1.0}).encode() for step in range(1, 7)]
    lines[2] = b'{"step": 3, "loss": "\x94"}'
    lines[3] = b"[" * 100000
    run.metrics.write_bytes(b"\n".join(lines) + b"\n")
    run.cut_metrics(5)
    assert [json.loads(line)["step"] for line in run.metrics.read_text().splitlines()] == [1, 2, 5]


# Weights


@pytest.fixture(scope="module")
def network():
    """Parameters of a small network, and its settings."""
    cfg = load_config("tiny", ["model.depth=1", "model.embed_dim=16", "model.num_heads=2", "model.prototypes=24",
                               "model.head_hidden=16", "model.bottleneck=8"])  # fmt: skip
    return cfg, PerA(cfg).state_dict()


def test_a_damaged_published_checkpoint_is_not_converted(network, tmp_path):
    """PyTorch reads past the checksums that it writes: other weights came out."""
    path = tmp_path / "pera.params"
    torch.save({"model": network[1]}, path)
    data = bytearray(path.read_bytes())
    weight = network[1]["teacher.backbone.pos_embed"].numpy().tobytes()
    data[data.index(weight) + len(weight) // 2] ^= 0x10
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"pera.params: not a PyTorch checkpoint \(damaged: checksum of .* is wrong\)"):
        convert(path, tmp_path / "out", 2)
    assert not (tmp_path / "out").exists()


ODD_WEIGHTS = {
    "nan": (lambda weight: weight.fill_(float("nan")), "is not finite"),
    "integers": (lambda weight: weight.long(), "weights are dense floats"),
    "sparse": (lambda weight: weight.to_sparse(), "weights are dense floats"),
    "complex": (lambda weight: weight.to(torch.complex64), "weights are dense floats"),
}


@pytest.mark.parametrize("kind", ODD_WEIGHTS)
def test_odd_weights_are_not_converted(network, tmp_path, kind):
    change, told = ODD_WEIGHTS[kind]
    state = {**network[1], "teacher.backbone.norm.weight": change(network[1]["teacher.backbone.norm.weight"].clone())}
    torch.save({"model": state}, tmp_path / "pera.params")
    with pytest.raises(UserError, match=told) as error:
        convert(tmp_path / "pera.params", tmp_path / "out", 2)
    one_line(error)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("teacher.safetensors", b"\x80" + bytes(7) + b"{" * 200),  # begins as a pickle does
        ("old.params", b"\x80\x02u."),
        ("old.params", b"\x80\x02}q\x00."),
    ],
)
def test_bytes_that_begin_as_a_checkpoint(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError) as error:
        convert(tmp_path / name, tmp_path / "out")
    one_line(error)


def test_converted_weights_are_those_of_the_checkpoint(network, tmp_path):
    torch.save({"model": network[1]}, tmp_path / "pera.params")
    convert(tmp_path / "pera.params", tmp_path / "out", 2)
    found = load_file(tmp_path / "out" / "pera.safetensors")
    assert all(torch.equal(found[name], value) for name, value in network[1].items())


# Tables and states


@pytest.mark.parametrize(
    "data",
    [
        b"file,class\n\xcb.jpg,a\n",
        b"file,class\na.jpg\n",
        b"file,class\na\0.jpg,a\n",
        b'file,class\n"a\nb.jpg",a\n',
        b"file,class\n" + 300 * b"a" + b".jpg,a\n",
    ],
)
def test_labels_that_are_no_table(tmp_path, data):
    (tmp_path / "labels.csv").write_bytes(data)
    with pytest.raises(UserError) as error:
        read_samples("scene", tmp_path / "labels.csv")
    assert "labels.csv" in one_line(error)


@pytest.mark.parametrize(
    "change",
    [
        lambda state: 1.5, lambda state: {**state, "shards": [1]}, lambda state: {**state, "settings": None},
        lambda state: {**state, "shards": [{**state["shards"][0], "next": [None, 1]}]}, lambda state: [[state]],
        lambda state: {**state, "a\n" * 3000: 1}, lambda state: {**state, "root": "\n"},
        lambda state: {**state, "settings": {**state["settings"], "tile": "\n" + "9" * 9000}},
    ],
)  # fmt: skip
def test_a_damaged_state_of_a_pack(tmp_path, change):
    write_scenes(tmp_path / "images", 2)
    pack(tmp_path / "images", tmp_path / "out", workers=1, progress=False)
    state = tmp_path / "out" / "pack.json"
    state.write_text(json.dumps(change(json.loads(state.read_text()))))
    with pytest.raises(UserError) as error:
        pack(tmp_path / "images", tmp_path / "out", workers=1, progress=False)
    one_line(error)


@pytest.mark.parametrize("counts", [{"written": "4"}, {}])
def test_a_damaged_marker_of_a_scene_cuts_it_again(tmp_path, counts):
    write_scenes(tmp_path / "images", 1, 40, 40)
    settings = TileSettings(size=32)
    told = tile(tmp_path / "images", tmp_path / "out", settings, workers=1, progress=False)
    (marker,) = (tmp_path / "out").rglob("scene-*.json")
    state = json.loads(marker.read_text())
    marker.write_text(json.dumps({**state, **counts} if counts else {"state": state["state"]}))
    again = tile(tmp_path / "images", tmp_path / "out", settings, workers=1, progress=False)
    assert again.split(":")[0] == told.split(":")[0]
    assert json.loads(marker.read_text()) == state
