"""Pretraining on images of many bands: from the command line, resumed, and what the run folder says."""

import json
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
import yaml
from safetensors import safe_open
from train_support import SMALL

from pera_fast import cli
from pera_fast.errors import UserError
from pera_fast.train import api

pytest.importorskip("nvidia.dali")
pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
NAMES = ("blue", "green", "red", "red edge", "nir", "swir")
KEYS = [*SMALL, "data.loader_threads=1", "views.rgb_bands=[red,green,blue]", f"data.bands=[{','.join(NAMES)}]"]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten 6-band GeoTIFFs of 12 bits, planar and interleaved."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for key in range(10):
        bands = (rng.random((6, 48, 56)) * np.linspace(900, 4095, 6)[:, None, None]).astype(np.uint16)
        way = "band" if key % 2 else "pixel"
        profile = {"driver": "GTiff", "count": 6, "height": 48, "width": 56, "dtype": "uint16", "interleave": way}
        with rasterio.open(folder / f"{key}.tif", "w", **profile) as file:
            file.write(bands)
            for number, name in enumerate(NAMES, 1):
                file.set_band_description(number, name)
    return folder


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def test_six_bands_of_16_bits_pretrain_and_resume(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = ["pretrain", "--data", str(images), "--out", str(out), "--recipe", "tiny"]
    assert cli.run([*command, *KEYS, "train.steps=4"]) == 0
    assert "6 band(s) at 16 bits; auto scale [" in (out / "train.log").read_text()
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all(np.isfinite(row["loss"]) for row in rows)
    config = yaml.safe_load((out / "config.yaml").read_text())
    assert config["data"]["depth"] == "16"
    assert config["model"]["in_chans"] == 6
    highs = [high for _, high in config["data"]["band_range"]]
    np.testing.assert_allclose(highs, np.linspace(900, 4095, 6) * 0.995, rtol=0.01)
    with safe_open(out / "exported" / "teacher.safetensors", "pt") as file:
        assert file.get_tensor("patch_embed.proj.weight").shape[1] == 6
        about = {key: json.loads(value) for key, value in file.metadata().items()}
    assert about["bands"] == list(NAMES)
    assert about["band_range"] == config["data"]["band_range"]
    assert (about["depth"], str(about["bits"])) == (config["model"]["depth"], "16")

    result = api.pretrain(images, out, None, resume=True, overrides=["train.steps=6"])
    assert (result.exit_code, result.steps) == (0, 6)
    assert yaml.safe_load((out / "config.yaml").read_text())["data"]["band_range"] == config["data"]["band_range"]
    whole = api.pretrain(images, tmp_path / "whole", "tiny", overrides=[*KEYS, "train.steps=6"])
    assert whole.metrics["loss"] == pytest.approx(result.metrics["loss"], rel=0.2)
    with pytest.raises(UserError, match=r"cannot be continued with data.band_scale=divide:9 \(was auto\)"):
        api.pretrain(images, out, None, resume=True, overrides=["data.band_scale=divide:9"])


def test_bands_that_no_file_has(images: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"no readable image among the 10 file\(s\).*has no band cirrus: its bands are blue"
    ):
        api.pretrain(images, tmp_path / "run", "tiny", overrides=[*SMALL, "data.bands=[red,cirrus]"])


def test_the_first_step_sees_what_the_files_hold(images: Path, tmp_path: Path) -> None:
    """8 bits of the same files: close, not equal: the depth reaches the network."""
    losses = {}
    for depth in ("8", "16"):
        keys = [*KEYS, f"data.depth={depth}", "data.band_scale=divide:4095", "train.steps=1"]
        losses[depth] = api.pretrain(images, tmp_path / depth, "tiny", overrides=keys).metrics["loss"]
    assert losses["8"] == pytest.approx(losses["16"], rel=0.01)
    assert losses["8"] != losses["16"]
    assert torch.isfinite(torch.tensor(list(losses.values()))).all()
