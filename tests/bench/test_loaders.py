"""The comparison of loaders runs in seconds, and what it writes is what it printed."""

import io
import json
import multiprocessing
import os
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from pera_bench import CORES
from pera_bench.command import Wish
from pera_bench.loaders import compare_loaders, make_images, processor_seconds
from pera_fast import cli

ROOT = Path(__file__).resolve().parents[2]
WRONG = {
    "bench data --formats gif": "--formats gif: wants some of jpeg, png, tiff, separated by commas; did you mean tiff?",
    "bench data --sizes big": "--sizes big: wants whole numbers from 1 on, separated by commas",
    "bench data --threads 4096": f"--threads 4096: there are {len(CORES)} cores",
    "bench data --data nowhere": "--data nowhere: no such folder",
    "bench data --compare old.json": "--compare does not go with `pera-fast bench data`, which compares loaders",
    "bench koleo --formats png": "--formats, --sizes and --data are of `pera-fast bench data`, which compares loaders",
}


def test_three_sides_in_one_table(tmp_path):
    pytest.importorskip("nvidia.dali")
    wish = Wish(["data"], device="cpu", recipes="tiny", images="4", threads=1, seconds=0.1)
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for number in range(3):
        Image.fromarray(rng.integers(0, 256, (48, 64, 3), np.uint8)).save(tmp_path / "images" / f"{number}.png")
    console = Console(width=170, record=True, file=io.StringIO())
    assert compare_loaders(wish, "jpeg,tiff", "64", tmp_path / "images", files=(None, tmp_path), console=console) == 0
    record = json.loads((tmp_path / "loaders.json").read_text())
    assert [row["format"] for row in record["rows"]] == ["jpeg", "tiff"]
    lines = console.export_text().splitlines()
    for row, line in zip(record["rows"], lines[3:5], strict=True):
        assert list(row["sides"]) == ["pillow", "folder", "shards"]
        for side in row["sides"].values():
            assert side["images_per_s"] > 0
            assert 0 < side["cores"] < 2 * os.cpu_count()
            assert f"{side['images_per_core_s']:.1f}" in line


@pytest.mark.parametrize("line", WRONG)
def test_wrong_input_is_one_line_and_2(line, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.run(line.split()) == 2
    assert capsys.readouterr().err == f"error: {WRONG[line]}\n"
    told = WRONG[line].replace(f"{len(CORES)} cores", "2 cores")
    assert told in (ROOT / "docs" / "messages.md").read_text(encoding="utf-8")


def test_images_keep_the_detail_of_their_sources(tmp_path):
    source = np.random.default_rng(0).integers(0, 256, (40, 30, 3), np.uint8)
    Image.fromarray(source).save(tmp_path / "source.png")
    made = make_images(tmp_path / "made", "png", 100, [tmp_path / "source.png"], 5)
    assert made["images"] == 256
    files = sorted((tmp_path / "made").iterdir())
    assert made == {"images": len(files), "bytes": sum(path.stat().st_size for path in files)}
    found = np.asarray(Image.open(files[0]))
    assert found.shape == (100, 100, 3)
    assert (found[40:80, 60:90] == source).all()


def burn() -> None:
    while time.process_time() < 0.3:
        pass


def test_time_of_ended_workers_counts():
    before = processor_seconds()
    worker = multiprocessing.get_context("spawn").Process(target=burn)
    worker.start()
    worker.join()
    assert 0.25 < processor_seconds() - before < 60
