"""Near-duplicates are found, reported, and moved only on request; nothing is lost."""

import csv
import os

import numpy as np
import pytest
from data_support import encoded, scene, write_scenes
from PIL import Image
from tar_support import write_tar

from pera_fast import cli
from pera_fast.data.tools import dedupe as module
from pera_fast.data.tools.dedupe import _Alike, dedupe, find_duplicates
from pera_fast.errors import UserError


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def run(root, out, **options):
    return dedupe(root, out=out, **{"workers": 2, "progress": False, **options})


def report(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "data"
    write_scenes(root / "own", 5, 200, 240)
    large = Image.fromarray(scene(100, 400, 480))
    (root / "copies").mkdir()
    files = {
        "a-small.png": encoded(large.resize((240, 200), Image.Resampling.BILINEAR), "PNG"),
        "b-large.jpg": encoded(large, "JPEG", quality=80),
        "c-large.png": encoded(large, "PNG"),
        "black.png": encoded(Image.new("RGB", (64, 64)), "PNG"),
        "black, again.png": encoded(Image.new("RGB", (64, 64)), "PNG", compress_level=1),
        "white.png": encoded(Image.new("RGB", (64, 64), (255, 255, 255)), "PNG"),
        "broken.png": b"no image",
    }
    for name, data in files.items():
        (root / "copies" / name).write_bytes(data)
    return root


def tree(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_the_report_names_each_group_and_changes_nothing(folder, tmp_path):
    before = tree(folder)
    said = run(folder, tmp_path / "report.csv")
    assert said.startswith("3 of 11 images are near-duplicates of 2 others, ")
    assert said.endswith("; nothing was changed")
    rows = report(tmp_path / "report.csv")
    assert [(row["group"], row["action"], row["file"], row["width"]) for row in rows] == [
        ("1", "keep", "copies/b-large.jpg", "480"),  # of two equally large ones the first by path
        ("1", "duplicate", "copies/a-small.png", "240"),
        ("1", "duplicate", "copies/c-large.png", "480"),
        ("2", "keep", "copies/black, again.png", "64"),
        ("2", "duplicate", "copies/black.png", "64"),
    ]
    assert all(int(row["bits"]) <= 5 and int(row["bytes"]) == len(before[row["file"]]) for row in rows)
    assert tree(folder) == before


def test_moving_keeps_the_paths_and_loses_nothing(folder, tmp_path):
    before, to = tree(folder), tmp_path / "moved"
    (to / "copies").mkdir(parents=True)
    (to / "copies" / "black.png").write_bytes(b"precious")
    assert run(folder, tmp_path / "report.csv", move_to=to).endswith(f"2 moved to {to}, 1 left")
    assert sorted(tree(to)) == ["copies/a-small.png", "copies/black.png", "copies/c-large.png"]
    assert (to / "copies" / "black.png").read_bytes() == b"precious"
    assert {**tree(folder), **{name: data for name, data in tree(to).items() if data != b"precious"}} == before
    assert run(folder, tmp_path / "report.csv").startswith("1 of 9 images")


def test_what_changed_meanwhile_stays(folder, tmp_path):
    manifest, duplicates = find_duplicates(folder, workers=1, progress=False)
    (folder / "copies" / "black.png").write_bytes(b"another")
    (folder / "copies" / "a-small.png").unlink()
    assert module.move(manifest, duplicates, tmp_path / "moved") == (1, 2)
    assert (folder / "copies" / "black.png").read_bytes() == b"another"


def test_a_file_that_goes_after_the_index_is_left_alone(folder, tmp_path, monkeypatch, caplog):
    built = module.build_index

    def build_and_lose(*args, **options):
        manifest = built(*args, **options)
        (folder / "own" / "000.png").unlink()
        (folder / "own" / "001.png").write_bytes(b"changed")
        return manifest

    monkeypatch.setattr(module, "build_index", build_and_lose)
    assert "; 2 could not be read; nothing" in run(folder, tmp_path / "report.csv")
    assert "was changed since the index was made" in caplog.text


def test_a_report_may_be_replaced_but_no_other_file(folder, tmp_path, capsys):
    report, line = tmp_path / "report.csv", ["data", "dedupe", str(folder), "--out", str(tmp_path / "report.csv")]
    report.write_text("my thesis\n")
    assert cli.run(line) == 2
    said = f"error: --out {report}: exists already; give another name, or --overwrite to replace it\n"
    assert capsys.readouterr().err == said
    assert report.read_text() == "my thesis\n"
    assert cli.run([*line, "--overwrite"]) == 0
    first = report.read_text()
    assert first.startswith("group,action,file,")
    assert cli.run([*line, "--threshold", "0"]) == 0


def test_a_duplicate_is_alike_to_the_one_that_is_kept():
    """A chain: each is 4 bits from the next, so the third is 8 from the first."""
    hashes = np.array([0, 0xF, 0xFF, 0xFFF, 0xF], np.uint64)
    means = np.zeros((5, 48), np.uint8)
    alike = _Alike(hashes, means, 5, lambda part: None)
    assert dict(alike.duplicates()) == {1: 0, 4: 0, 3: 2}
    means[4] = 200  # equal hash, another colour
    assert dict(_Alike(hashes, means, 5, lambda part: None).duplicates()) == {1: 0, 3: 2}


def test_a_thousand_equal_images_are_one_group():
    hashes, means = np.zeros(3000, np.uint64), np.repeat(np.array([[0], [90], [9]], np.uint8), 1000, 0)
    means = np.repeat(means, 48, 1)
    found = dict(_Alike(hashes, means, 5, lambda part: None).duplicates())
    assert set(found.values()) == {0, 1000}
    assert len(found) == 2998


def test_shards_are_reported_but_not_moved(folder, tmp_path):
    shards = tmp_path / "shards"
    write_tar(shards / "0.tar", {name: data for name, data in tree(folder).items() if "broken" not in name})
    assert run(shards, tmp_path / "report.csv").startswith("3 of 11 images")
    assert run(shards, tmp_path / "report.csv", channels=1).startswith("3 of 11 images")
    with pytest.raises(UserError, match=r"--move .*: .*shards holds shards, from which nothing can be moved"):
        run(shards, tmp_path / "report.csv", move_to=tmp_path / "moved")


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"bits": 12}, "--threshold 12: must be 0 to 11 of the 64 bits of a hash"),
        (
            {"out": "{t}/none/report.csv"},
            "--out {t}/none/report.csv: give the name of a CSV file in a folder that exists",
        ),
        (
            {"move_to": "{t}/data/moved"},
            "--move {t}/data/moved: lies in the folder of images {t}/data, and "
            "what is written there would be taken for images; give a place outside it",
        ),
    ],
)
def test_wrong_use_is_one_line(tmp_path, options, line):
    write_scenes(tmp_path / "data", 1)
    given = {name: value.format(t=tmp_path) if isinstance(value, str) else value for name, value in options.items()}
    with pytest.raises(UserError) as caught:
        run(tmp_path / "data", **{"out": tmp_path / "report.csv", **given})
    assert str(caught.value) == line.format(t=tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written(folder, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(UserError, match=r"--move .*: cannot write there \(Permission denied\); 0 file\(s\) were moved"):
        run(folder, tmp_path / "report.csv", move_to=tmp_path / "locked" / "moved")


def test_the_command(folder, tmp_path, capsys):
    line = ["data", "dedupe", str(folder), "--threshold", "3", "--out", str(tmp_path / "r.csv"), "--workers", "1"]
    assert cli.run([*line, "--move", str(tmp_path / "moved")]) == 0
    assert "moved to" in capsys.readouterr().out
    assert (tmp_path / "moved" / "copies" / "black.png").exists()
