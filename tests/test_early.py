"""Answers that need no PyTorch: wrong settings, URLs, mistyped choices; and hints at the right ones."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import pera_fast
from pera_fast import cli
from pera_fast.config.keys import did_you_mean
from pera_fast.errors import UserError
from pera_fast.interop.published import convert

ROOT = Path(__file__).resolve().parents[1]
REFUSED = [
    "pretrain --data D --out R train.stepz=4",
    "pretrain --data D --out R --recipe vit_b61",
    "pretrain --data D --out R --resume model.depth=0",
    "pretrain --data D --out R --resume auto train.precision=int8",
    "data index D data.depth=12",
    "data show D --out sheet.png model.num_heads=5",
    "data stats D views.mean=[1]",
    "profile --out P model.student_ratio=0.9",
    "profile trace --out P train.steps=0",
    "bench koleo --recipe vit_b61",
    "bench koleo --precision int8",
    "bench atention",
    "config train.epochs=0",
]


def test_a_refused_setting_loads_no_torch(tmp_path: Path) -> None:
    code = (
        "import json, sys\nfrom pera_fast.cli import run\n"
        "told = [[run(line.split()), 'torch' in sys.modules] for line in json.loads(sys.argv[1])]\n"
        "print(json.dumps(told))"
    )
    path = os.pathsep.join(str(ROOT / part) for part in ("", "kernels", "bench"))
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(REFUSED)],
        capture_output=True, text=True, check=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    assert dict(zip(REFUSED, json.loads(done.stdout), strict=True)) == {line: [2, False] for line in REFUSED}
    lines = done.stderr.splitlines()
    assert len(lines) == len(REFUSED)
    assert all(line.startswith("error: ") for line in lines)


MOUNT = (
    "is a URL, and only files on a disk are read and written; copy it to a disk, or mount it"
    " (s3fs, gcsfuse, rclone mount)"
)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("pretrain --data s3://bucket/images --out R", f"--data s3://bucket/images: {MOUNT}"),
        ("pretrain --data D --out=gs://bucket/run", f"--out gs://bucket/run: {MOUNT}"),
        ("data index https://host/images", f"https://host/images: {MOUNT}"),
        ("data index D data.index=az://box/i.parquet", f"data.index az://box/i.parquet: {MOUNT}"),
        ("data tile D --out abfss://box@host/tiles", f"--out abfss://box@host/tiles: {MOUNT}"),
        ("config --recipe http://host/my.yaml", f"--recipe http://host/my.yaml: {MOUNT}"),
        ("demo --out O --data file:///images", "--data file:///images: is a URL; give the path alone: /images"),
    ],
)
def test_a_url_is_refused_by_name(line: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(line.split()) == 2
    assert capsys.readouterr().err == f"error: {said}\n"


def test_a_url_is_refused_from_python_too(tmp_path: Path) -> None:
    for data in ("s3://bucket/images", Path("s3://bucket/images")):
        with pytest.raises(UserError) as caught:
            pera_fast.pretrain(data, tmp_path / "R")
        assert str(caught.value) == f"--data s3://bucket/images: {MOUNT}"
    with pytest.raises(UserError, match=r"^data.index s3://b/i.parquet: is a URL"):
        pera_fast.pretrain("D", tmp_path / "R", overrides=["data.index=s3://b/i.parquet"])
    with pytest.raises(UserError, match=r"^s3://b/p.params: is a URL"):
        convert(Path("s3://b/p.params"), tmp_path)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("bench atention", "; did you mean attention?"),
        ("bench step/chaep", "step has none, cheap, block; did you mean cheap?"),
        ("bench koleo --device cpu --only tritn", "; did you mean triton?"),
        ("bench koleo --device cpu --only triton", "none of these benches has that on cpu; they have "),
        ("bench koleo --precision bf61", "wants bf16, fp16 or fp32; did you mean bf16?"),
        ("bench data --formats jpge", "; did you mean jpeg?"),
        ("profile --out P --policies bolck", "; did you mean block?"),
        ("profile --out P --device simulat", "; did you mean simulate?"),
        ("profile trace --out P --device cud", "; did you mean cuda?"),
        ("data tile D --out T --format tiff", "'tiff' is not one of 'tif', 'jpg', 'png'; did you mean tif?"),
        ("data pack D --out T --reencode jpg", "is not one of 'jpeg', 'png'; did you mean jpeg?"),
        ("pretain", "No such command 'pretain'. Did you mean 'pretrain'?"),
    ],
)
def test_a_mistyped_choice_names_the_right_one(line: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(line.split()) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_a_mistyped_backend_is_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERA_BACKEND", "natve")
    assert cli.run(["info"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: PERA_BACKEND=natve: no such implementation; allowed: auto, ")
    assert error.endswith("; did you mean native?\n")


def test_nothing_is_meant_by_a_word_like_none_of_them() -> None:
    assert did_you_mean("zzz", ("cpu", "cuda")) == ""
