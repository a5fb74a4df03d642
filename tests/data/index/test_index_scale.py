"""Large and interrupted indexes: what was checked is not lost, what is found has one path, memory stays."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from data_support import encoded, write_scenes
from PIL import Image

from pera_fast.data.decoding import probe
from pera_fast.data.decoding.probe import ProbeSettings
from pera_fast.data.decoding.sandbox import Sandbox
from pera_fast.data.files.scan import scan
from pera_fast.data.index.build import build_index, load_index
from pera_fast.data.index.journal import Journal

ROOT = Path(__file__).resolve().parents[3]
KILLED = """
import os, signal, sys
from pera_fast.data.index import checks, build as index, journal, sorted_parts
journal._SECONDS = 0.0
checks.MAX_FILES = 4
sorted_parts._WRITTEN_ROWS, sorted_parts._ROWS_AT_A_TIME = 8, 8
written = index.Journal.add
def add(self, rows, left=[int(sys.argv[3])]):
    written(self, rows)
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
index.Journal.add = add
index.build_index(sys.argv[1], out=sys.argv[2], workers=1, progress=False)
"""


def build(root, out, **options):
    return build_index(root, out=out, progress=False, **{"workers": 1, **options})


def kill_after(batches, root, out):
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    command = [sys.executable, "-c", KILLED, str(root), str(out), str(batches)]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}, check=False, timeout=100)
    assert done.returncode == -signal.SIGKILL


@pytest.fixture
def asked(monkeypatch):
    """Names of the files that are checked."""
    names = []
    probe = Sandbox.probe

    def note(self, paths, *rest):
        names.extend(map(os.path.basename, paths))
        return probe(self, paths, *rest)

    monkeypatch.setattr(Sandbox, "probe", note)
    return names


def test_a_killed_index_goes_on_where_it_stopped(tmp_path, asked):
    root, out = tmp_path / "data", tmp_path / "index.parquet"
    names = write_scenes(root, 40, 8, 8)
    (root / "021.png").write_bytes(b"text")
    kill_after(3, root, out)
    kill_after(2, root, out)
    assert not out.exists()
    (root / "000.png").write_bytes((root / "001.png").read_bytes() + b" ")  # changed since it was checked
    manifest = build(root, out)
    assert asked == ["000.png", *names[20:]], "five batches of four had been checked"
    assert manifest.table["path"].to_pylist() == names
    assert manifest.table["ok"].to_pylist() == [name != "021.png" for name in names]
    assert "(19 known, 21 checked, 0 gone" in manifest.summary.replace("gone;", "gone")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".index.parquet.lock", "data", "index.parquet"]

    asked.clear()
    (root / "new.png").write_bytes((root / "001.png").read_bytes())
    kill_after(1, root, out)
    assert load_index(out).table.num_rows == 40, "the last whole one stays until there is another"
    (root / "new.png").unlink()
    manifest = build(root, out)
    assert asked == []
    assert manifest.table["path"].to_pylist() == names


def test_what_a_killed_index_left_serves_the_same_settings_only(tmp_path, asked):
    root, out = tmp_path / "data", tmp_path / "index.parquet"
    write_scenes(root, 12, 8, 8)
    kill_after(2, root, out)
    build(root, out, channels=1)
    assert len(asked) == 12


def test_a_damaged_part_of_what_was_left_is_passed_over(tmp_path, asked):
    root, out = tmp_path / "data", tmp_path / "index.parquet"
    names = write_scenes(root, 12, 8, 8)
    kill_after(2, root, out)
    parts = sorted((tmp_path / ".index.parquet.unfinished").glob("*.parquet"))
    parts[0].write_bytes(parts[0].read_bytes()[:50])
    (parts[0].parent / "listed-00000.arrow").write_bytes(b"scrap")
    (parts[0].parent / ".000000-000009.parquet.partial").write_bytes(b"scrap")
    assert build(root, out).table["path"].to_pylist() == names
    assert asked == [*names[:4], *names[8:]]


def test_an_interrupt_keeps_what_was_checked(tmp_path, monkeypatch, caplog):
    root, out = tmp_path / "data", tmp_path / "index.parquet"
    write_scenes(root, 100, 8, 8)
    added = Journal.add

    def interrupted(self, rows):
        added(self, rows)
        raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "add", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build(root, out)
    assert "what was checked is kept" in caplog.text
    monkeypatch.undo()
    assert "(64 known, 36 checked" in build(root, out).summary


def test_a_folder_that_links_reach_too_is_listed_once_under_its_own_name(tmp_path):
    root = tmp_path / "data"
    write_scenes(root / "z", 2)
    write_scenes(tmp_path / "away" / "deep", 1)
    for name, to in {
        "a": root / "z",
        "up": tmp_path,
        "m": tmp_path / "away",
        "n": tmp_path / "away",
        "o": tmp_path / "away" / "deep",
        "z/loop": root,
    }.items():
        (root / name).symlink_to(to)
    for _ in range(5):
        found = []
        listing = scan(str(root), lambda batch, found=found: found.extend(batch["path"].to_pylist()))
        assert sorted(found) == ["m/deep/000.png", "z/000.png", "z/001.png"]
        assert listing.files == 3


def test_an_error_of_the_taker_ends_the_scan(tmp_path):
    write_scenes(tmp_path / "a", 1)
    write_scenes(tmp_path / "b", 1)

    def full(batch):
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        scan(str(tmp_path), full)


def test_readable_rows_are_the_tables_own_where_all_are(tmp_path):
    root, out = tmp_path / "data", tmp_path / "index.parquet"
    write_scenes(root, 4)
    files = build(root, out).readable
    assert not files.size.flags.owndata
    (root / "002.png").write_bytes(b"text")
    files = build(root, out).readable
    assert files.paths.to_pylist() == ["000.png", "001.png", "003.png"]
    assert files.size.tolist() == [os.path.getsize(root / name) for name in files.paths.to_pylist()]


def test_headers_alone_are_read_from_the_beginning_of_a_file_unless_they_stand_further_back(tmp_path, monkeypatch):
    root = tmp_path / "data"
    root.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (300, 400, 3), np.uint8)
    (root / "noise.jpg").write_bytes(encoded(Image.fromarray(noise), "JPEG", quality=100))
    tiff = encoded(Image.fromarray(noise), "TIFF", compression="raw")
    directory = tiff[8 : 8 + 2 + 12 * int.from_bytes(tiff[8:10], "little") + 4]
    (root / "back.tif").write_bytes(tiff[:4] + len(tiff).to_bytes(4, "little") + bytes(8) + tiff[16:] + directory)
    read = []
    reader = probe.read_file
    monkeypatch.setattr(probe, "read_file", lambda path, most=None: read.append((path, most)) or reader(path, most))
    results = probe.Prober()([str(root / "noise.jpg"), str(root / "back.tif")], ProbeSettings(verify=False), ("dali",))
    assert [(result.ok, result.width, result.height) for result in results] == [(True, 400, 300)] * 2
    assert [most for path, most in read if path.endswith("jpg")] == [2**16]
    assert [result.size for result in results] == [os.path.getsize(root / name) for name in ("noise.jpg", "back.tif")]


def test_a_journal_of_nothing_leaves_nothing(tmp_path):
    with Journal(tmp_path / "index.parquet", tmp_path, ProbeSettings(), "") as journal:
        assert journal.earlier() == []
        journal.delete()
    assert list(tmp_path.iterdir()) == []


def test_the_benchmark_runs(tmp_path):
    command = [sys.executable, str(ROOT / "bench" / "index_scale.py"), "--files", "70", "--folder", str(tmp_path)]
    done = subprocess.run(
        [*command, "--no-verify", "--workers", "1"], capture_output=True, text=True, check=False, timeout=100
    )
    assert done.returncode == 0, done.stderr
    assert "69 of 70 image files are readable" in done.stdout
    assert re.search(r"^70 files, headers: \d+\.\d s; peak \d+ MiB in the main process, \d+ MiB in", done.stdout, re.M)
