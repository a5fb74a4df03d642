"""The rule that chooses the decoder of a run, and its inputs: files and cores."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from data_support import small_config

from pera_fast.config import load_config
from pera_fast.cores import usable_cores
from pera_fast.data.decoding.probe import ProbeResult, ProbeSettings
from pera_fast.data.files.manifest import Manifest, to_table
from pera_fast.data.loading import decode_on
from pera_fast.data.loading.decode_on import choose, image_seconds, pixels, plan
from pera_fast.errors import UserError
from pera_fast.train.flops import fastest_rate, flops_per_image

CUDA = torch.device("cuda", 0)


def rule(wanted="auto", cores=16.0, rate: float | None = 1000.0, seconds=0.005, **options):
    return choose(wanted, has_gpu=True, cores=cores, image_seconds=seconds, step_rate=rate, **options)


def test_the_cpu_decodes_where_its_cores_are_enough_with_some_to_spare():
    """15 cores beside the step's own make 3000 images/s; a step takes at most 3000 / 1.25."""
    assert rule(rate=2400).on == "cpu"
    assert rule(rate=2401).on == "gpu"
    assert rule(cores=6, rate=800).on == "cpu"
    assert rule(cores=5.9, rate=800).on == "gpu"
    assert rule(cores=1, rate=0.1).on == "gpu"
    assert rule(seconds=0.02, rate=700).on == "gpu"


def test_no_more_threads_than_twice_what_the_step_needs():
    assert rule(rate=1000).threads == 13  # 6.25 cores
    assert rule(rate=100).threads == 4
    assert rule(cores=3.5, rate=100).threads == 2
    assert rule(rate=9999).threads == 4  # the GPU decodes
    assert rule("cpu", cores=4, rate=9999).threads == 3
    assert rule("cpu", cores=1, rate=9999).threads == 1
    assert rule("cpu", cores=192, rate=None).threads == 16
    assert rule(rate=1000, threads=4).on == "gpu"  # 800 images/s with four
    assert rule(rate=600, threads=4) == replace(rule(rate=600), reason=rule(rate=600, threads=4).reason, threads=4)


def test_who_says_where_has_it_there():
    assert (rule("cpu", cores=1).on, rule("gpu", cores=99).on) == ("cpu", "gpu")
    assert rule("cpu").reason == "data.decode_on=cpu"
    assert rule(rate=None).on == "gpu"
    for wanted in ("auto", "cpu", "gpu"):
        made = choose(wanted, has_gpu=False, cores=64, image_seconds=0.001, step_rate=1)
        assert (made.on, made.threads, made.reason) == ("cpu", 4, "this run has no GPU")


def test_one_line_says_what_and_why():
    told = "16 cores make about 3,000 images/s of these files, the step takes 1,000 at most"
    assert str(rule()) == f"images are decoded and cropped on the CPU, 13 threads: {told}"
    assert "on the GPU, 2 threads: 16 cores and data.loader_threads=2 make about 400" in str(rule(threads=2))


def manifest_of(*rows):
    results = [
        ProbeResult(path=f"{i}", ok=ok, reason="" if ok else "bad", format=kind, width=w, height=h, decoder="dali")
        for i, (kind, w, h, ok) in enumerate(rows)
    ]
    return Manifest(Path("/nowhere"), to_table(results), ProbeSettings(3, 2**28))


def test_pixels_of_readable_files_by_format():
    rows = ("jpeg", 100, 50, True), ("png", 10, 10, True), ("jpeg", 900, 900, False), ("", 4, 5, True)
    assert pixels(manifest_of(*rows)) == (5000 / 3, 120 / 3)
    assert pixels(manifest_of(rows[2])) == (0.0, 0.0)


@pytest.mark.parametrize(("side", "jpeg", "png"), [(512, 5.74e-3, 6.126e-3), (1024, None, 15.95e-3)])
def test_times_are_near_those_that_were_measured(side, jpeg, png):
    """Processor time of the loader for vit_b16, see decode_on.py."""
    views = load_config("vit_b16").views
    if jpeg is not None:
        assert image_seconds(views, 3, side * side, 0) == pytest.approx(jpeg, rel=0.25)
    assert image_seconds(views, 3, 0, side * side) == pytest.approx(png, rel=0.35)
    assert image_seconds(views, 6, side * side, 0) == pytest.approx(2 * image_seconds(views, 3, side * side, 0))


def test_a_plan_counts_the_ranks_that_share_the_cores(monkeypatch):
    monkeypatch.setattr(decode_on, "usable_cores", lambda: 64.0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    files = manifest_of(*[("jpeg", 512, 512, True)] * 4)
    cfg = load_config("vit_b16")
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert plan(cfg, files, CUDA, step_rate=1100).on == "cpu"
    assert plan(cfg, files, CUDA, ranks=8, step_rate=500).reason.startswith("8 cores make")
    assert plan(cfg, files, CUDA, ranks=8, step_rate=500).on == "cpu"
    assert plan(cfg, files, CUDA, ranks=8, step_rate=1100).on == "gpu"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert plan(cfg, files, CUDA, ranks=8, step_rate=1300).reason.startswith("32 cores make")
    assert plan(cfg, files, torch.device("cpu")).on == "cpu"


def write(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text + "\n")


def test_a_quota_counts_if_it_is_less_than_the_cores(tmp_path, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(16)), raising=False)
    groups, member = tmp_path / "cgroup", tmp_path / "membership"
    assert usable_cores(groups, member) == 16
    member.write_text("0::/job/task\n")
    write(groups / "job" / "task", cpu__max="max 100000")
    assert usable_cores(groups, member) == 16
    write(groups / "job", cpu__max="650000 100000")
    assert usable_cores(groups, member) == 6.5
    write(groups, cpu__max="250000 100000")
    assert usable_cores(groups, member) == 2.5
    write(tmp_path, cpu__max="1000 100000")  # no group: outside of the mount
    assert usable_cores(groups, member) == 2.5


def test_a_quota_of_the_old_kind(tmp_path, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(16)), raising=False)
    groups, member = tmp_path / "cgroup", tmp_path / "membership"
    member.write_text("12:cpuset:/a\n4:cpu,cpuacct:/docker/abc\n1:name=systemd:/x\n")
    write(groups / "cpu,cpuacct", cpu__cfs_quota_us="-1", cpu__cfs_period_us="100000")
    assert usable_cores(groups, member) == 16
    write(groups / "cpu,cpuacct", cpu__cfs_quota_us="300000", cpu__cfs_period_us="100000")
    assert usable_cores(groups, member) == 3


def test_the_fastest_step(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    cfg = load_config("vit_b16")
    rate = fastest_rate(cfg, CUDA) or 0.0
    assert rate == pytest.approx(0.5 * 989.4e12 / flops_per_image(cfg))
    assert fastest_rate(load_config("vit_b16", ["train.precision=fp32"]), CUDA) == pytest.approx(rate / 8)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A card of next year")
    assert fastest_rate(cfg, CUDA) == rate
    assert fastest_rate(cfg, torch.device("cpu")) is None


def test_hardware_is_known_by_compute_capability(monkeypatch):
    for capability, expected in (((8, 0), True), ((9, 0), True), ((10, 0), True), ((8, 9), False), ((7, 5), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert decode_on.has_jpeg_hardware(CUDA) is expected
    assert not decode_on.has_jpeg_hardware(torch.device("cpu"))


def test_the_key(monkeypatch):
    assert small_config().data.decode_on == "auto"
    assert load_config("vit_b16").data.loader_threads is None
    with pytest.raises(UserError, match=r"data.decode_on=gpus: allowed: auto \| gpu \| cpu; did you mean gpu\?"):
        small_config("data.decode_on=gpus")
