"""Default numbers of workers and threads follow the CPU quota of a container."""

import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

from pera_fast import cli, cores, info
from pera_fast.profile.processes import simulating_jobs
from pera_fast.train.host_threads import hold_to_quota


@pytest.fixture
def quota(tmp_path, monkeypatch):
    """A machine of 16 cores, in a container that may use two and a half."""
    group = tmp_path / "cgroup" / "docker" / "abc"
    group.mkdir(parents=True)
    (group.parent / "cpu.max").write_text("250000 100000\n")
    (group / "cpu.max").write_text("max 100000\n")
    (tmp_path / "membership").write_text("0::/docker/abc\n")
    monkeypatch.setattr(cores, "_CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(cores, "_MEMBERSHIP", tmp_path / "membership")
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(16)), raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 16)


def test_every_command_takes_as_many_workers_as_the_quota_allows(quota, tmp_path, monkeypatch):
    pytest.importorskip("nvidia.dali")
    images = tmp_path / "images"
    images.mkdir()
    for number in range(6):
        noise = np.random.default_rng(number).integers(0, 4096, (32, 32), dtype=np.uint16)
        Image.fromarray(noise).save(images / f"{number}.png")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    threads: dict[str, int] = {}  # each of the index's and the tiler's feeds a process
    pool = ThreadPoolExecutor.__init__

    def start_pool(self, max_workers=None, thread_name_prefix="", **options):
        threads[thread_name_prefix] = max_workers
        pool(self, max_workers, thread_name_prefix, **options)

    monkeypatch.setattr(ThreadPoolExecutor, "__init__", start_pool)
    settings = ["model.in_chans=1", "views.mean=[0.5]", "views.std=[0.2]"]
    for line in (["index"], ["pack", "--out", "shards"], ["tile", "--out", "tiles", "--size", "16"], ["dedupe"]):
        assert cli.run(["data", line[0], str(images), *line[1:]]) == 0
    assert cli.run(["data", "stats", str(images), *settings]) == 0
    assert set(threads) >= {f"pera-{name}" for name in ("index", "pack", "tile", "dedupe", "measure", "stats")}
    assert {number for name, number in threads.items() if name != "pera-scan"} == {2}


def test_simulations_and_pytorch_take_no_more_either(quota):
    assert simulating_jobs() == 2
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(5)
        hold_to_quota()
        assert torch.get_num_threads() == 2
        torch.set_num_threads(1)
        hold_to_quota()
        assert torch.get_num_threads() == 1  # fewer were asked for
    finally:
        torch.set_num_threads(before)


def test_info_shows_the_cores_of_the_machine_and_those_that_may_be_used(quota):
    assert re.search(r", 16 cores, of which 2.5 may be used, \d+ GiB", str(info.collect()))
