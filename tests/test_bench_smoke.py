"""Every benchmark runs on the CPU in seconds and says what it measured."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BENCHES = sorted((ROOT / "bench").glob("test_*.py"))


@pytest.mark.parametrize("bench", BENCHES, ids=lambda path: path.stem)
def test_bench_runs(bench, tmp_path):
    results = tmp_path / "results.json"
    options = ["--recipe=tiny", "--images=2", "--copy-mib=16"]
    short = ["--benchmark-max-time=0.01", "--benchmark-min-rounds=2", f"--benchmark-json={results}"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *options, *short]
    # Under xdist a benchmark does not measure; this run is no worker of it.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_XDIST")}
    done = subprocess.run(
        [*command, str(bench)], cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=200
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "images/s" in done.stdout
    measured = json.loads(results.read_text())["benchmarks"]
    assert any("reference" in row["name"] for row in measured)
    for row in measured:
        info = row["extra_info"]
        assert info["images_per_s"] > 0
        assert 0 < info["gb_per_s"] < 1e5
        assert info["error"] < 0.05, f"{row['name']} is wrong by {info['error']}"
