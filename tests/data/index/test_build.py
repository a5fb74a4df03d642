"""The index: every kind of file, reuse, and what a bad folder gets."""

import csv
import logging
import os
import shutil
import stat
import threading

import numpy as np
import pytest
from data_support import IGNORED, bad_files, good_files, raster, shared_data, small_config, write_scenes

from pera_fast.data.decoding.declared import declared
from pera_fast.data.decoding.sandbox import Sandbox
from pera_fast.data.files.manifest import SCHEMA
from pera_fast.data.index import checks
from pera_fast.data.index.build import build_index, default_index_path, load_index, open_or_build
from pera_fast.errors import UserError


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def build(root, out=None, **options):
    return build_index(root, out=out, progress=False, **{"workers": 1, **options})


def rows_of(manifest):
    return {row["path"]: row for row in manifest.table.to_pylist()}


@pytest.fixture(scope="module")
def mixed_folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("mixed")
    (root / "good").mkdir()
    (root / "bad" / "deep" / "er").mkdir(parents=True)
    for name, data in good_files().items():
        (root / "good" / name).write_bytes(data)
    for name, (data, _) in bad_files().items():
        (root / "bad" / "deep" / "er" / name).write_bytes(data)
    for name, data in IGNORED.items():
        (root / name).write_bytes(data)
    return root


@pytest.fixture(scope="module")
def mixed(mixed_folder, tmp_path_factory):
    return build(mixed_folder, tmp_path_factory.mktemp("index") / "mixed.parquet")


@pytest.mark.parametrize("name", good_files())
def test_every_decodable_file_is_used(mixed, name):
    row = rows_of(mixed)[f"good/{name}"]
    assert row["ok"], row["reason"]
    assert row["reason"] == ""
    assert row["decoder"] in ("dali", "pillow", "rasterio")
    size = {"turned.jpg": (48, 64), "one-pixel.png": (1, 1), "sliver.png": (300, 2)}.get(name, (64, 48))
    assert (row["width"], row["height"]) == size
    if name == "wrong-suffix.jpg":
        assert row["format"] == "png"
    if "16" in name or "deep" in name:
        assert row["dtype"] == ("int16" if name.startswith("int16") else "uint16")


@pytest.mark.parametrize("name", bad_files())
def test_every_undecodable_file_is_listed_with_its_reason(mixed, name):
    row = rows_of(mixed)[f"bad/deep/er/{name}"]
    assert not row["ok"]
    assert bad_files()[name][1] in row["reason"]
    assert "\n" not in row["reason"]


def test_only_images_are_listed(mixed):
    assert set(rows_of(mixed)) == {f"good/{name}" for name in good_files()} | {
        f"bad/deep/er/{name}" for name in [*bad_files()]
    } | {"P6-notes"}, "a file without suffix that begins like an image is one"
    assert mixed.table["path"].to_pylist() == sorted(mixed.table["path"].to_pylist())
    assert mixed.table.schema.names == SCHEMA.names


def test_the_file_keeps_everything(mixed):
    again = load_index(mixed.path)
    assert again.table.equals(mixed.table)
    assert (again.root, again.settings) == (mixed.root, mixed.settings)
    assert len(again.readable) == len(good_files())


def test_unchanged_files_are_not_checked_again(tmp_path, monkeypatch, caplog):
    root = tmp_path / "data"
    write_scenes(root, 6)
    (root / "bad.jpg").write_bytes(b"text")
    out = tmp_path / "index.parquet"
    build(root, out)
    asked = []
    probe = Sandbox.probe
    monkeypatch.setattr(Sandbox, "probe", lambda self, paths, *rest: asked.extend(paths) or probe(self, paths, *rest))

    with caplog.at_level(logging.INFO, "pera_fast"):
        build(root, out)
    assert asked == []
    assert "6 of 7 image files are readable (7 known, 0 checked, 0 gone" in caplog.text

    (root / "000.png").unlink()
    (root / "001.png").write_bytes(b"now garbage")
    shutil.copy(root / "003.png", root / "new.png")
    os.utime(root / "004.png", ns=(1, 1))
    manifest = build(root, out)
    assert sorted(map(os.path.basename, asked)) == ["001.png", "004.png", "new.png"]
    assert set(rows_of(manifest)) == {"001.png", "002.png", "003.png", "004.png", "005.png", "bad.jpg", "new.png"}
    assert not rows_of(manifest)["001.png"]["ok"]
    assert "(4 known, 3 checked, 1 gone" in manifest.summary
    assert load_index(out).table.equals(manifest.table)


def test_other_settings_check_again(tmp_path):
    root, out = tmp_path / "data", tmp_path / "index.parquet"
    write_scenes(root, 3)
    header_only = build(root, out, verify=False)
    assert [(row["ok"], row["decoder"], row["width"]) for row in rows_of(header_only).values()] == [(True, "", 64)] * 3
    assert "3 checked" in build(root, out).summary
    assert "3 known" in build(root, out, verify=False).summary, "a full check is also a header check"
    assert "3 checked" in build(root, out, channels=1).summary
    assert "3 checked" in build(root, out, max_pixels=5000).summary


def test_headers_alone_still_refuse_what_is_no_image(mixed_folder, tmp_path):
    rows = rows_of(build(mixed_folder, tmp_path / "index.parquet", verify=False))
    assert rows["good/turned.jpg"]["width"] == 48, "upright, as the decoder will turn it"
    for name in ("empty.jpg", "text.jpg", "zeros.png"):
        assert not rows[f"bad/deep/er/{name}"]["ok"]


def test_images_larger_than_allowed_are_refused(tmp_path):
    write_scenes(tmp_path / "data", 1)
    write_scenes(tmp_path / "data" / "large", 1, 200, 300)
    rows = rows_of(build(tmp_path / "data", max_pixels=50_000))
    assert rows["000.png"]["ok"]
    assert rows["large/000.png"]["reason"] == "300 x 200 is more than data.max_pixels=50000"


def test_other_numbers_of_bands(mixed_folder, tmp_path):
    rows = rows_of(build(mixed_folder, tmp_path / "index.parquet", channels=4))
    assert rows["good/alpha.png"]["ok"]
    assert rows["good/alpha.png"]["decoder"] == "pillow"
    assert "has 3 band(s), model.in_chans is 4" in rows["good/planar.tif"]["reason"]


def test_a_decoder_that_dies_or_hangs_costs_one_file(tmp_path, monkeypatch):
    root = tmp_path / "data"
    write_scenes(root, 8)
    for name in ("kills-all.png", "kills-dali.png", "hangs-all-not.png"):
        shutil.copy(root / "000.png", root / name)
    monkeypatch.setattr(checks, "Sandbox", lambda timeout: Sandbox(timeout, module="dying_worker"))
    manifest = build(root)
    rows = rows_of(manifest)
    assert [name for name, row in rows.items() if not row["ok"]] == ["kills-all.png"]
    assert "killed by SIGSEGV" in rows["kills-all.png"]["reason"]
    assert rows["kills-dali.png"]["decoder"] == "pillow"
    assert manifest.unreadable() == [("kills-all.png", rows["kills-all.png"]["reason"])]


def test_links_loops_pipes_and_unreadable_folders(tmp_path, caplog):
    root = tmp_path / "data"
    write_scenes(root / "a", 2)
    write_scenes(tmp_path / "elsewhere", 1)
    (root / "a" / "loop").symlink_to(root)
    (root / "self").symlink_to(root / "self")
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    (root / "gone.png").symlink_to(tmp_path / "nowhere.png")
    os.mkfifo(root / "pipe.png")
    (root / "locked").mkdir()
    (root / "locked").chmod(0)
    try:
        rows = rows_of(build(root))
    finally:
        (root / "locked").chmod(stat.S_IRWXU)
    assert {name for name, row in rows.items() if row["ok"]} == {"a/000.png", "a/001.png", "linked/000.png"}
    assert rows["gone.png"]["reason"] == "cannot read: No such file or directory"
    assert rows["pipe.png"]["reason"] == "cannot read: not a regular file"
    if os.geteuid() != 0:  # root may read everything
        assert "cannot read the folder" in caplog.text


def test_a_name_that_is_not_utf8_is_reported(tmp_path):
    write_scenes(tmp_path / "data", 1)
    with open(os.fsencode(tmp_path / "data") + b"/caf\xe9.png", "wb") as file:
        file.write(b"x")
    (row,) = (row for row in rows_of(build(tmp_path / "data")).values() if not row["ok"])
    assert (row["path"], row["reason"]) == ("caf\\xe9.png", "file name is not UTF-8: rename it")


def test_the_index_is_kept_out_of_the_data_folder(tmp_path):
    root = tmp_path / "some data"
    write_scenes(root, 1)
    before = sorted(os.listdir(root))
    manifest = open_or_build(root, small_config(), progress=False)
    assert manifest.path == default_index_path(root)
    assert manifest.path.name.startswith("some_data-")
    assert manifest.path.is_relative_to(os.environ["XDG_CACHE_HOME"])
    assert sorted(os.listdir(root)) == before
    assert default_index_path(tmp_path / "some data" / "..") != default_index_path(root)
    chosen = open_or_build(root, small_config(f"data.index={tmp_path / 'here.parquet'}"), progress=False)
    assert chosen.path == tmp_path / "here.parquet"
    assert chosen.path.is_file()


def test_several_ranks_at_once_check_once(tmp_path, monkeypatch):
    write_scenes(tmp_path / "data", 4)
    asked, found = [], []
    probe = Sandbox.probe
    monkeypatch.setattr(Sandbox, "probe", lambda self, paths, *rest: asked.extend(paths) or probe(self, paths, *rest))
    threads = [threading.Thread(target=lambda: found.append(build(tmp_path / "data"))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(asked) == 4
    assert all(manifest.table.equals(found[0].table) for manifest in found)
    assert len(found) == 3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: None, r"data folder .*data does not exist"),
        (lambda root: root.write_bytes(b""), r"data .*data is not a folder"),
        (lambda root: root.mkdir(), r"data folder .*data holds no files"),
        (
            lambda root: [root.mkdir(), (root / "a.csv").write_text("x"), (root / "b.csv").write_text("x")],
            r"no readable image among the 2 file\(s\) in .*data: none is an image",
        ),
        (
            lambda root: [root.mkdir(), *((root / f"{i}.jpg").write_bytes(b"text") for i in range(5))],
            r"image among the 5 file\(s\) in .*: 0.jpg: not an image \(begins with b'text'\); 1.jpg.*; \.\.",
        ),
    ],
)
def test_a_folder_without_images_gets_one_clear_line(tmp_path, make, message):
    make(tmp_path / "data")
    with pytest.raises(UserError, match=message) as caught:
        build(tmp_path / "data")
    assert "\n" not in str(caught.value)


def test_a_broken_index_is_written_anew_but_not_what_the_user_named(tmp_path, caplog):
    root, out = tmp_path / "data", tmp_path / "precious.txt"
    write_scenes(root, 1)
    out.write_bytes(b"PAR1 no")
    with pytest.raises(UserError, match="cannot read the index"):
        load_index(out)
    with pytest.raises(UserError, match=r"cannot read the index .*; delete it or give another data.index"):
        build(root, out)
    assert out.read_bytes() == b"PAR1 no"
    build(root)
    default_index_path(root).write_bytes(b"PAR1 no")
    assert len(build(root).readable) == 1
    assert "it is written anew" in caplog.text
    with pytest.raises(UserError, match="no such file"):
        load_index(tmp_path / "nothing.parquet")
    with pytest.raises(UserError, match=r"cannot write the index .* \(data.index=PATH"):
        build(root, out / "below.parquet")


def test_odd_images_have_the_outcomes_that_are_known(tmp_path):
    """Every file of the odd folder: what a decoder gives as it is stored is used, what kills or defeats all is not."""
    data = shared_data()
    manifest = build(data / "odd", tmp_path / "odd.parquet", workers=2)
    rows = rows_of(manifest)
    with open(data / "odd.csv", newline="") as file:
        known = {row["file"]: row for row in csv.DictReader(file)}
    assert set(rows) == set(known)
    for name, outcome in known.items():
        row = rows[name]
        faithful = declared((data / "odd" / name).read_bytes(), row["format"]).decoders
        assert row["decoder"] in ("", *faithful), name
        if "dali" in faithful:
            assert (row["decoder"] == "dali") == (outcome["DALI 2.4 CPU"] == "yes"), name
        assert row["ok"] == (row["decoder"] != "")
        assert row["ok"] or "yes" not in (outcome["DALI 2.4 CPU"], outcome["Pillow decodes"])
        if "signal 8" in outcome["DALI 2.4 CPU"]:
            assert "DALI: killed by SIGFPE" in row["reason"]
        if row["ok"] and outcome["what Pillow sees"] != "unrecognised":
            assert f"{row['width']}x{row['height']}" == outcome["what Pillow sees"].split()[-1]


def test_deep_files_are_decoded_once_in_a_first_index(tmp_path, monkeypatch):
    """They were decoded again when most files turned out to be deep; 8-bit ones are, as DALI is out of the question."""
    for number in range(5):
        (tmp_path / f"{number}.tif").write_bytes(raster(np.full((3, 40, 40), 300 + number, np.uint16)))
    (tmp_path / "5.tif").write_bytes(raster(np.full((3, 40, 40), 7, np.uint8), photometric="RGB"))
    asked: list[str] = []
    probe = Sandbox.probe
    monkeypatch.setattr(
        Sandbox, "probe", lambda self, paths, *rest: asked.extend(map(str, paths)) or probe(self, paths, *rest)
    )
    manifest = open_or_build(tmp_path, small_config(), progress=False)
    assert manifest.decided["depth"] == "16"
    assert sorted(os.path.basename(path) for path in asked) == [*(f"{number}.tif" for number in range(6)), "5.tif"]
