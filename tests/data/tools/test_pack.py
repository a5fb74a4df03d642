"""Packing: the same bits however often it is stopped, nothing lost, nothing twice, readable by DALI and by training."""

import csv
import errno
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time

import numpy as np
import pytest
import torch
from data_support import bad_files, encoded, good_files, scene, small_config, write_scenes
from loader_support import index, same, take
from PIL import Image

from pera_fast import cli
from pera_fast.data.decoding.dali import require_dali
from pera_fast.data.files.shard_writer import ShardWriter
from pera_fast.data.files.skipped import SkippedFiles
from pera_fast.data.loading.loader import Loader
from pera_fast.data.tools import pack as pack_module
from pera_fast.data.tools.pack import pack
from pera_fast.data.tools.pack_images import ImagePacker, PackSettings, _starts
from pera_fast.errors import UserError

COUNT = 24
SMALL = PackSettings(size_mib=50 / 1024)  # a few samples each


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    write_scenes(folder, COUNT)
    return folder


def packed(root, out, settings=SMALL, **options):
    return pack(root, out, settings, progress=False, **{"workers": 2, **options})


def shards_of(folder):
    """Tars and their indices, by name."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.suffix in (".tar", ".idx")}


def members_of(folder):
    """All members of all shards, in order."""
    found = []
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            found += [(member.name, tar.extractfile(member).read()) for member in tar]
    return found


def test_files_go_in_as_they_are_with_their_names_beside_them(scenes, tmp_path):
    said = packed(scenes, tmp_path / "out")
    members = members_of(tmp_path / "out")
    assert len(members) == 2 * COUNT
    for number in range(COUNT):
        (image, data), (about, told) = members[2 * number : 2 * number + 2]
        assert (image, about) == (f"{number:09d}.png", f"{number:09d}.json")
        assert data == (scenes / f"{number:03d}.png").read_bytes()
        assert json.loads(told) == {"path": f"{number:03d}.png", "height": 48, "width": 64}
    shards = sorted((tmp_path / "out").glob("*.tar"))
    assert len(shards) > 3
    assert all(path.stat().st_size <= 50 * 1024 for path in shards)
    assert f"{COUNT} samples in {len(shards)} shards" in said


def test_dali_reads_the_shards_by_their_index(scenes, tmp_path):
    packed(scenes, tmp_path / "out")
    dali = require_dali()
    shards = sorted(map(str, (tmp_path / "out").glob("*.tar")))
    pipe = dali.Pipeline(batch_size=COUNT, num_threads=1, device_id=None)
    with pipe:
        indices = [shard.replace(".tar", ".idx") for shard in shards]
        pipe.set_outputs(*dali.fn.readers.webdataset(paths=shards, index_paths=indices, ext=["png", "json"]))
    pipe.build()
    images, told = pipe.run()
    for number in range(COUNT):
        assert images.at(number).tobytes() == (scenes / f"{number:03d}.png").read_bytes()
        assert json.loads(told.at(number).tobytes())["path"] == f"{number:03d}.png"


def test_dalis_own_tool_writes_the_same_index(scenes, tmp_path):
    wds2idx = pytest.importorskip("wds2idx")
    packed(scenes, tmp_path / "out")
    for shard in (tmp_path / "out").glob("*.tar"):
        with wds2idx.IndexCreator(str(shard), str(tmp_path / "theirs.idx"), verbose=False) as creator:
            creator.create_index()
        assert (tmp_path / "theirs.idx").read_bytes() == shard.with_suffix(".idx").read_bytes()


def test_training_from_the_shards_is_training_from_the_folder(scenes, tmp_path):
    packed(scenes, tmp_path / "out")
    batches = []
    for root in (scenes, tmp_path / "out"):
        skipped = SkippedFiles(tmp_path / "skipped.csv")
        manifest = index(root, tmp_path / root.name)
        with Loader(small_config(), manifest, batch_size=4, device=torch.device("cpu"), skipped=skipped) as loader:
            batches.append(take(loader, 8))
    assert all(map(same, *batches))


def test_what_cannot_be_read_is_listed_and_the_rest_is_packed(tmp_path):
    root = tmp_path / "data"
    root.mkdir()
    for name, data in good_files().items():
        (root / name).write_bytes(data)
    for name, (data, _) in bad_files().items():
        (root / name).write_bytes(data)
    packed(root, tmp_path / "out", PackSettings())
    told = [json.loads(data)["path"] for name, data in members_of(tmp_path / "out") if name.endswith(".json")]
    assert told == sorted(good_files())
    with open(tmp_path / "out" / "skipped.csv", newline="") as file:
        assert {row["file"] for row in csv.DictReader(file)} == set(bad_files())
    assert len(index(tmp_path / "out", tmp_path).readable) == len(good_files()), "what was readable still is"


@pytest.mark.parametrize("stop", [0, 1, 7, 12, 23])
def test_stopped_anywhere_it_goes_on_to_the_same_bits(scenes, tmp_path, monkeypatch, stop):
    settings = PackSettings(size_mib=50 / 1024, tile=32)
    packed(scenes, tmp_path / "whole", settings, workers=1)
    make = ImagePacker.__call__

    def interrupted(self, number, *rest):
        if number == stop:
            raise KeyboardInterrupt
        return make(self, number, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(ImagePacker, "__call__", interrupted)
        with pytest.raises(KeyboardInterrupt):
            packed(scenes, tmp_path / "out", settings)
    left = shards_of(tmp_path / "out")
    whole = shards_of(tmp_path / "whole")
    assert len(left) < len(whole)
    assert left == {name: whole[name] for name in left}, "only whole shards are there"
    assert not list((tmp_path / "out").glob(".*.part"))
    packed(scenes, tmp_path / "out", settings)
    assert shards_of(tmp_path / "out") == whole
    before = (tmp_path / "out" / "shard-000000.tar").stat()
    assert "samples in" in packed(scenes, tmp_path / "out", settings), "once more: nothing to do"
    assert (tmp_path / "out" / "shard-000000.tar").stat() == before


KILLED = """
import sys
from pera_fast.data.tools.pack import pack
from pera_fast.data.tools.pack_images import ImagePacker, PackSettings
make, done = ImagePacker.__call__, []
def slow(self, number, *rest):
    if number >= 16:
        input()  # for ever: nothing is written there
    return make(self, number, *rest)
ImagePacker.__call__ = slow
pack(sys.argv[1], sys.argv[2], PackSettings(size_mib=50 / 1024), workers=1, progress=False)
"""


def test_killed_it_leaves_whole_shards_and_goes_on(scenes, tmp_path):
    """A process that is killed while a shard is half written."""
    packed(scenes, tmp_path / "whole")
    out = tmp_path / "out"
    command = [sys.executable, "-c", KILLED, str(scenes), str(out)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 100
        while not (out / ".shard-000002.tar.part").exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        process.kill()
        process.wait()
    left, whole = shards_of(out), shards_of(tmp_path / "whole")
    assert left == {name: whole[name] for name in left}
    assert sorted(left)[-1] == "shard-000001.tar"
    packed(scenes, out)
    assert shards_of(out) == whole
    assert not list(out.glob(".*.part"))


def test_a_kill_between_two_files_is_mended(scenes, tmp_path):
    """Killed after a shard got its name but before that was noted; one shard lost, one changed."""
    packed(scenes, tmp_path / "out")
    whole = shards_of(tmp_path / "out")
    state = tmp_path / "out" / "pack.json"

    def forget(shards):
        told = json.loads(state.read_text())
        told["shards"], told["complete"] = told["shards"][:shards], False
        state.write_text(json.dumps(told))
        (tmp_path / "out" / ".shard-000002.tar.part").write_bytes(b"left")

    for spoil in (
        lambda: forget(2),
        lambda: forget(0),
        lambda: (tmp_path / "out" / "shard-000001.tar").unlink(),
        lambda: (tmp_path / "out" / "shard-000002.tar").write_bytes(b"short"),
    ):
        spoil()
        packed(scenes, tmp_path / "out")
        assert shards_of(tmp_path / "out") == whole
        assert not list((tmp_path / "out").glob(".*.part"))


def test_a_full_disk_is_one_line_and_leaves_whole_shards(scenes, tmp_path, monkeypatch):
    packed(scenes, tmp_path / "whole")
    add, count = ShardWriter.add, []

    def full(self, *rest):
        count.append(1)
        if len(count) == 10:
            raise OSError(errno.ENOSPC, "No space left on device")
        add(self, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "add", full)
        with pytest.raises(UserError, match=r"--out .*: cannot write there \(No space left on device\); the same comm"):
            packed(scenes, tmp_path / "out")
    packed(scenes, tmp_path / "out")
    assert shards_of(tmp_path / "out") == shards_of(tmp_path / "whole")


def test_files_that_go_while_packing_are_listed(scenes, tmp_path, monkeypatch):
    root = tmp_path / "data"
    shutil.copytree(scenes, root)
    build = pack_module.build_index

    def spoil(*args, **options):
        manifest = build(*args, **options)
        (root / "003.png").unlink()
        (root / "005.png").write_bytes(b"another")
        return manifest

    monkeypatch.setattr(pack_module, "build_index", spoil)
    packed(root, tmp_path / "out")
    keys = {name.split(".")[0] for name, _ in members_of(tmp_path / "out")}
    assert keys == {f"{number:09d}" for number in range(COUNT)} - {"000000003", "000000005"}
    assert "was changed since the index was made" in (tmp_path / "out" / "skipped.csv").read_text()


def test_tiles_cover_the_image_and_are_of_one_size(tmp_path):
    root = tmp_path / "data"
    root.mkdir()
    picture = scene(1, 150, 210)
    Image.fromarray(picture).save(root / "large.png")
    Image.fromarray(scene(2, 60, 64)).save(root / "small.png")
    packed(root, tmp_path / "out", PackSettings(tile=64))
    members = members_of(tmp_path / "out")
    covered = np.zeros(picture.shape[:2], bool)
    for (name, data), (_, told) in zip(members[:-2:2], members[1:-2:2], strict=True):
        about = json.loads(told)
        assert (about["height"], about["width"]) == (64, 64)
        window = np.s_[about["top"] : about["top"] + 64, about["left"] : about["left"] + 64]
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(data))), picture[window])
        covered[window] = True
        row, column = (0, 43, 86).index(about["top"]), (0, 49, 97, 146).index(about["left"])
        assert name == f"000000000_{row:03d}_{column:03d}.png"
    assert covered.all()
    assert len(members) == 2 * (3 * 4 + 1)
    assert members[-2] == ("000000001.png", (root / "small.png").read_bytes()), "what needs no cut keeps its bytes"


def test_starts_of_tiles():
    assert [_starts(n, 64) for n in (1, 64, 65, 128, 150)] == [[0], [0], [0, 1], [0, 64], [0, 43, 86]]


def test_resized_and_encoded_anew(tmp_path):
    root = tmp_path / "data"
    root.mkdir()
    Image.fromarray(scene(1, 100, 200)).save(root / "a.png")
    (root / "b.jpg").write_bytes(encoded(Image.fromarray(scene(2, 40, 40)), "JPEG", quality=90))
    (root / "c.gif").write_bytes(good_files()["first-frame.gif"])
    packed(root, tmp_path / "out", PackSettings(resize=50, reencode="jpeg", quality=80))
    images = {name: Image.open(io.BytesIO(data)) for name, data in members_of(tmp_path / "out") if "jpg" in name}
    assert {name: (image.format, image.size) for name, image in images.items()} == {
        "000000000.jpg": ("JPEG", (100, 50)),
        "000000001.jpg": ("JPEG", (40, 40)),
        "000000002.jpg": ("JPEG", (64, 48)),  # never enlarged
    }
    packed(root, tmp_path / "same", PackSettings(resize=50))
    names = [name for name, _ in members_of(tmp_path / "same") if not name.endswith("json")]
    assert names == ["000000000.png", "000000001.jpg", "000000002.gif"]
    small = np.asarray(Image.open(io.BytesIO(dict(members_of(tmp_path / "same"))["000000000.png"])))
    expected = np.asarray(Image.fromarray(scene(1, 100, 200)).resize((100, 50), Image.Resampling.LANCZOS))
    np.testing.assert_array_equal(small, expected)


def test_shards_can_be_packed_again(scenes, tmp_path):
    packed(scenes, tmp_path / "one")
    packed(tmp_path / "one", tmp_path / "two", PackSettings(size_mib=1))
    images = [[data for name, data in members_of(tmp_path / out) if name.endswith("png")] for out in ("one", "two")]
    assert images[0] == images[1]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--tile", "32"], "was begun with tile None; give the same, or another folder"),
        (["--channels", "4", "--resize", "64"], "only images of 1 or 3 channels can be resized, tiled or encoded anew"),
        (["--reencode", "webp"], "Invalid value for '--reencode'"),
    ],
)
def test_wrong_use_is_one_line(scenes, tmp_path, capsys, options, said):
    packed(scenes, tmp_path / "out", PackSettings())
    assert cli.run(["data", "pack", str(scenes), "--out", str(tmp_path / "out"), *options]) == 2
    assert said in capsys.readouterr().err


def test_wrong_folders_are_one_line(scenes, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("")
    packed(scenes, tmp_path / "out", PackSettings())
    (tmp_path / "else").mkdir()
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "pack.json").write_text("{")
    for root, out, said in (
        (scenes, tmp_path / "full", "holds other files (thesis.txt); give an empty folder"),
        (scenes, scenes, "lies in the folder of images"),
        (scenes, tmp_path / "full" / "thesis.txt", "is a file; give a folder"),
        (tmp_path / "else", tmp_path / "out", f"holds the shards of {scenes}; give another folder"),
        (tmp_path / "none", tmp_path / "new", "data folder .*none does not exist".replace(".*", str(tmp_path) + "/")),
        (scenes, broken, f"delete {broken} and pack anew"),
    ):
        assert cli.run(["data", "pack", str(root), "--out", str(out)]) == 2
        captured = capsys.readouterr().err
        assert said in captured
        assert captured.count("\n") == 1


def test_the_command_passes_everything_on(scenes, tmp_path, capsys):
    out = tmp_path / "out"
    line = ["data", "pack", str(scenes), "--out", str(out), "--size-mib", "1", "--tile", "48", "--resize", "40"]
    assert cli.run([*line, "--reencode", "jpeg", "--quality", "70", "--workers", "1"]) == 0
    assert f"{COUNT * 2} samples in 1 shards" in capsys.readouterr().out
    settings = json.loads((out / "pack.json").read_text())["settings"]
    expected = {"size_mib": 1, "tile": 48, "resize": 40, "reencode": "jpeg", "quality": 70, "channels": 3}
    assert settings == expected
