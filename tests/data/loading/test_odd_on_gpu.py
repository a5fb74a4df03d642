"""Unusual, malformed and hostile files through the pipeline that decodes on a GPU: what the CPU's makes of them.

nvJPEG, nvJPEG2000 and nvTIFF refuse other files than the CPU's decoders do, and may turn, scale or convert what they
take otherwise. The reference is the same loader on the CPU, which other tests hold against Pillow and GDAL.
"""

import csv
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from data_support import good_files, shared_data, small_config
from loader_support import index, skipped_rows

from pera_fast.data.files.skipped import SkippedFiles
from pera_fast.data.index.build import open_or_build
from pera_fast.data.loading.decode_on import Decoding
from pera_fast.data.loading.loader import Loader
from pera_fast.errors import UserError

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
CPU = torch.device("cpu")
WHOLE = (  # the one global crop is the image itself
    "views.global_scale=[1,1]", "views.aspect=[1,1]", "views.hflip=0", "views.vflip=0", "views.num_global=1",
    "views.num_local=0", "data.reduced_decoding=null",
)  # fmt: skip
MEAN, MOST = 1.0, 0.02  # of 255: mean difference; share of values that may differ by more than 8
FAULTS = (
    "float_dem", "float_nodata", "sidecars", "jp2_15_bit", "sentinel2_offset", "gcp_scene", "png_long_text", "planar",
)  # fmt: skip


def images_of(cfg, manifest, device, tmp_path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Pixels [H, W, C] of each readable file as a step on this device gets them, and what was skipped."""
    files = manifest.readable
    skipped = SkippedFiles(tmp_path / f"{device.type}" / "skipped.csv")
    Path(skipped.path).parent.mkdir(exist_ok=True)
    on = "cpu" if device == CPU else "gpu"
    found: dict[str, np.ndarray] = {}
    with Loader(cfg, manifest, batch_size=1, device=device, skipped=skipped, decoding=Decoding(on, 2, "")) as loader:
        for _ in range(len(files)):
            batch = next(loader)
            pixels = batch.global_.pixels.cpu().numpy()
            found |= {files.paths[int(row)].as_py(): pixels[slot] for slot, row in enumerate(batch.samples)}
    return found, skipped_rows(tmp_path / device.type)


def assert_the_gpu_agrees(root, tmp_path, *overrides):
    cfg = small_config(*WHOLE, *overrides)
    manifest = open_or_build(root, cfg, progress=False)
    expected, skipped_by_cpu = images_of(cfg, manifest, CPU, tmp_path)
    found, skipped = images_of(cfg, manifest, torch.device("cuda"), tmp_path)
    assert found.keys() == expected.keys(), "every file keeps its slot"
    assert skipped == skipped_by_cpu
    largest = 65535 if next(iter(expected.values())).dtype == np.uint16 else 255
    for name, pixels in expected.items():
        difference = np.abs(found[name].astype(np.float64) - pixels) * (255 / largest)
        inner = difference[2:-2, 2:-2]  # a GPU's resize sees the image's own last pixel beyond the border
        assert inner.mean() <= MEAN, f"{name}: {inner.mean():.2f}"
        assert (inner > 8).mean() <= MOST, f"{name}: {(inner > 8).mean():.1%}"


@pytest.mark.parametrize("channels", [3, 1])
def test_formats_and_kinds_of_pixels(tmp_path, monkeypatch, channels):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = tmp_path / "data"
    root.mkdir()
    for name, data in good_files().items():
        (root / name).write_bytes(data)
    assert_the_gpu_agrees(root, tmp_path, f"model.in_chans={channels}", "data.depth=8")


def odd_rows():
    try:
        folder = shared_data()
    except pytest.skip.Exception:
        return [pytest.param("", marks=pytest.mark.skip(reason="no real images: set PERA_SHARED_DATA"))]
    with open(folder / "odd.csv", newline="") as file:
        return [row["file"] for row in csv.DictReader(file)]


@pytest.mark.parametrize("name", odd_rows())
def test_a_row_of_odd(tmp_path, monkeypatch, name):
    """A file that the index refuses never meets the GPU; one that it takes is the same picture there."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = tmp_path / "data"
    root.mkdir()
    shutil.copyfile(shared_data() / "odd" / name, root / name)
    try:
        index(root, tmp_path)
    except UserError:  # no readable image
        return
    assert_the_gpu_agrees(root, tmp_path, "data.depth=8")


@pytest.fixture(scope="module")
def faults(tmp_path_factory):
    script = shared_data().parent / "faults" / "make_inputs.py"
    if not script.is_file():
        pytest.skip(f"no inputs of faults: {script}")
    out = tmp_path_factory.mktemp("faults")
    subprocess.run([sys.executable, str(script), str(out)], check=True, stdout=subprocess.DEVNULL)
    return out


@pytest.mark.parametrize("depth", ["8", "16"])
@pytest.mark.parametrize("name", FAULTS)
def test_inputs_of_faults(faults, tmp_path, monkeypatch, name, depth):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert_the_gpu_agrees(faults / name, tmp_path, f"data.depth={depth}")
