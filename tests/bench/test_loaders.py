"""The comparison of loaders runs in seconds, and what it writes is what it printed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytest.importorskip("nvidia.dali")


def test_three_sides_in_one_table(tmp_path):
    small = ["--recipe", "tiny", "--images", "16", "--sizes", "64", "--formats", "jpeg", "tiff", "--seconds", "0.2"]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    done = subprocess.run(
        [sys.executable, str(ROOT / "bench" / "data.py"), *small, "--out", str(tmp_path)],
        env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, check=False, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("data-*.json")
    record = json.loads(path.read_text())
    assert [row["format"] for row in record["rows"]] == ["jpeg", "tiff"]
    lines = done.stdout.splitlines()
    for row, line in zip(record["rows"], lines[2:4], strict=True):
        assert set(row["sides"]) == {"pillow", "folder", "shards"}
        for side in row["sides"].values():
            assert side["images_per_s"] > 0
            assert 0 < side["cores"] < 2 * os.cpu_count()
            assert f"{side['images_per_core_s']:.1f}" in line


def test_time_of_ended_workers_counts():
    code = (
        "import multiprocessing, time, data\n"
        "def burn():\n"
        "    while time.process_time() < 0.3: pass\n"
        "before = data.processor_seconds()\n"
        "worker = multiprocessing.get_context('fork').Process(target=burn)\n"
        "worker.start()\n"
        "worker.join()\n"
        "print(data.processor_seconds() - before)\n"
    )
    paths = os.pathsep.join(str(ROOT / name) for name in ("", "kernels", "bench"))
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, check=False, timeout=100,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert 0.25 < float(done.stdout) < 3
