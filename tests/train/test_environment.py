"""The machine is checked before a run creates anything, with one line for each fault."""

import collections
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from train_support import SMALL, state

from pera_fast import cli
from pera_fast.config import load_config
from pera_fast.errors import UserError
from pera_fast.model.pera import PerA
from pera_fast.train import api
from pera_fast.train.checkpoint import checkpoint_path
from pera_fast.train.checkpoint_size import saved_bytes
from pera_fast.train.environment import _check_compilers, check_launcher
from pera_kernels import backend

LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "SLURM_PROCID", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")
Usage = collections.namedtuple("Usage", "total used free")


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    for name in LAUNCHED:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def images(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for i in range(4):
        pixels = np.full((40, 40, 3), 60 * i, dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{i}.png")
    return tmp_path / "images"


def refused(capsys: pytest.CaptureFixture[str], images: Path, out: Path, *settings: str) -> str:
    """The one line of a command line that is refused and creates nothing."""
    line = ["pretrain", "--data", str(images), "--out", str(out), "--recipe", "tiny", *SMALL, *settings]
    before = sorted(out.parent.rglob("*"))
    assert cli.run(line) == 2
    assert sorted(out.parent.rglob("*")) == before
    said = capsys.readouterr()
    assert said.out == ""
    (message,) = said.err.splitlines()
    return message.removeprefix("error: ")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "RANK and WORLD_SIZE are set, but not MASTER_ADDR and MASTER_PORT: start"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is set, but not RANK, MASTER_ADDR and MASTER_PORT: start"),
        (
            {"RANK": "0", "WORLD_SIZE": "two", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"},
            "RANK=0 WORLD_SIZE=two MASTER_PORT=1: wants 0 <= RANK < WORLD_SIZE",
        ),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "2"}, "srun started 2 processes, which do not know of each other"),
        (
            {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"},
            "srun started 2 processes, which do not know of each other",
        ),
        ({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3"}, "mpirun started 4 processes"),
    ],
)
def test_processes_that_cannot_find_each_other(
    given: dict[str, str], words: str, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert words in refused(capsys, images, tmp_path / "run")


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "1"},
        {"SLURM_NTASKS": "2"},  # a shell of salloc
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "ENVIRONMENT": "BATCH"},  # the script itself
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_ID": "0"},
        {**dict.fromkeys(("RANK", "WORLD_SIZE"), "1"), "RANK": "0", "MASTER_ADDR": "h", "MASTER_PORT": "29500"},
        {
            "RANK": "1",
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "h",
            "MASTER_PORT": "1",
            "SLURM_PROCID": "0",
            "SLURM_NTASKS": "2",
        },
    ],
)
def test_launchers_that_are_right(given: dict[str, str]):
    check_launcher(given)


def test_no_cxx_compiler(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    message = refused(capsys, images, tmp_path / "run", "train.compile=true", "train.device=cpu")
    assert message == (
        "train.compile=true: needs a C++ compiler, and there is no g++; install g++ (or set CXX), or leave it out"
    )
    monkeypatch.setenv("CXX", shutil.which("false", path=os.defpath) or "/bin/false")
    assert "false fails" in refused(capsys, images, tmp_path / "run", "train.compile=true", "train.device=cpu")


def test_no_c_compiler_for_triton(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A GPU's driver as far as a machine without a GPU has it: the module that Triton compiles for it."""
    build = pytest.importorskip("triton.runtime.build")
    from triton.runtime import driver

    class Driver:
        @property
        def utils(self) -> Any:
            return build.compile_module_from_src(f"// {tmp_path}", "cuda_utils")

    monkeypatch.setattr(type(driver), "active", Driver())
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    cfg, gpu = load_config("tiny", SMALL), torch.device("cuda")
    with pytest.raises(UserError, match="Triton cannot build what starts its kernels \\(Failed to find C compiler"):
        _check_compilers(cfg, gpu)
    _check_compilers(cfg, torch.device("cpu"))
    with backend.use("reference"):
        _check_compilers(cfg, gpu)


def test_folders_that_cannot_be_written(images: Path, tmp_path: Path, capsys: Any):
    (tmp_path / "file").write_text("")
    index = tmp_path / "file" / "index.parquet"
    assert "--out" in refused(capsys, images, tmp_path / "file" / "run")
    message = refused(capsys, images, tmp_path / "run", f"data.index={index}")
    assert message == f"cannot write the index {index}: Not a directory (data.index=PATH puts it elsewhere)"


@pytest.mark.parametrize("recipe", ["tiny", "vit_s16"])
@pytest.mark.parametrize("more", [[], ["data.bands=[1,2,3,4]", "model.mlp_ratio=3.3", "views.global_size=96"]])
def test_size_of_a_checkpoint_is_predicted(recipe: str, more: list[str]):
    cfg = load_config(recipe, [*more, "model.depth=2", "model.prototypes=1000"])
    model, size = PerA(cfg), saved_bytes(cfg)
    held = sum(value.nbytes for value in model.state_dict().values())
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    assert size.model + size.teacher == held
    assert size.optimizer == 2 * trained
    assert size.export == sum(p.nbytes for p in model.teacher.backbone.parameters())


def test_room_for_two_checkpoints(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    free = [40 * 2**20]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(2**40, 0, free[0]))
    settings = ["--recipe", "vit_b16", "train.steps=2", "train.device=cpu"]
    out = tmp_path / "run"
    assert cli.run(["pretrain", "--data", str(images), "--out", str(out), *settings]) == 2
    assert capsys.readouterr().err == (
        f"error: --out {out}: 40 MiB are free, two checkpoints with the exported teacher take 2 x 2.5 GiB (model"
        " 573 MiB, optimizer 1.1 GiB, teacher 547 MiB, exported 329 MiB); make room or give another folder\n"
    )
    assert not out.exists()
    size = saved_bytes(load_config("tiny", SMALL))
    free[0] = 2 * (size.checkpoint + size.export) - 1
    assert "two checkpoints" in refused(capsys, images, out)
    free[0] += 1
    assert api.pretrain(images, out, "tiny", overrides=[*SMALL, "train.steps=1", "data.loader_threads=1"]).steps == 1


def test_room_for_one_more_checkpoint_where_there_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from pera_fast.train.environment import _check_room
    from pera_fast.train.run_folder import RunFolder, Start

    cfg, folder = load_config("tiny", SMALL), RunFolder(tmp_path)
    one = saved_bytes(cfg).checkpoint + saved_bytes(cfg).export
    folder.checkpoints.mkdir()
    for step in (2, 4):
        checkpoint_path(folder.checkpoints, step).write_bytes(b"x" * 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(2**40, 0, one - 1000))
    _check_room(Start(cfg, cfg, state(4), True), folder)  # the older one makes room
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(2**40, 0, one - 1001))
    with pytest.raises(UserError, match="another checkpoint"):
        _check_room(Start(cfg, cfg, state(4), True), folder)
    _check_room(Start(cfg, cfg, state(6), True), folder)  # done: nothing is written
