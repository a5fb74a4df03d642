"""Mutated files through index and loader: no crash, no hang, every file either used or named with a reason.

`pytest tests/data/decoding/test_fuzz.py` takes some; PERA_FUZZ=5000 takes that many image files, as many members of
tars, and a tenth as many tars. PERA_FUZZ_SEED=1 takes others. -s shows the counts.
"""

import os
import time
from collections import Counter

import numpy as np
import pytest
import torch
from data_support import scene, small_config
from fuzz.mutations import mutate, mutate_tar, seed_tar, seeds
from PIL import Image
from tar_support import write_tar

from pera_fast.data.files.skipped import SkippedFiles
from pera_fast.data.index.build import build_index
from pera_fast.data.loading.loader import Loader

FILES = int(os.environ.get("PERA_FUZZ", "150"))
SEED = int(os.environ.get("PERA_FUZZ_SEED", "0"))
BATCH = 4
SECONDS_A_FILE = 2.0  # far more than any takes, far less than a hang
pytestmark = pytest.mark.timeout(120 + int(FILES * SECONDS_A_FILE))


def rng_of(*key):
    return np.random.default_rng([SEED, *key])


def mutants(count):
    """(name, bytes) of mutated images; the same ones every time."""
    originals = list(seeds().items())
    for number in range(count):
        name, data = originals[number % len(originals)]
        yield f"{number:06d}-{name}", mutate(data, rng_of(0, number))


def checked(folder, tmp_path, what):
    """The index of a folder; every file in it is either used or has a reason."""
    began = time.monotonic()
    manifest = build_index(folder, out=tmp_path / "index.parquet", progress=False, workers=2, timeout=20)
    rows = manifest.table.to_pylist()
    assert all(row["ok"] != bool(row["reason"]) for row in rows)
    assert all("\n" not in row["reason"] for row in rows)
    reasons = " ".join(row["reason"] for row in rows)
    counts = Counter(row["decoder"] or "refused" for row in rows)
    killed, hung = reasons.count("killed by"), reasons.count("did not finish")
    print(f"\n{what}: {len(rows)} in {time.monotonic() - began:.0f} s: {dict(counts)}, {killed} killed a decoder")
    assert hung == 0
    return manifest, rows


def train_on(manifest, tmp_path):
    """One epoch of batches: what the index let through must not end the run."""
    began = time.monotonic()
    skipped = SkippedFiles(tmp_path / "skipped.csv")
    loader = Loader(small_config(), manifest, batch_size=BATCH, device=torch.device("cpu"), skipped=skipped)
    with loader:
        for _ in range(loader.steps_per_epoch):
            assert len(next(loader).samples) == BATCH
    assert time.monotonic() - began < 60 + SECONDS_A_FILE * len(manifest.readable)


def test_mutated_images_in_a_folder(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for name, data in mutants(FILES):
        (folder / name).write_bytes(data)
    for number in range(BATCH):
        Image.fromarray(scene(number)).save(folder / f"good-{number}.png")
    manifest, rows = checked(folder, tmp_path, "mutated images")
    assert len(rows) == FILES + BATCH
    assert len(manifest.readable) > BATCH, "some mutations leave a picture"
    train_on(manifest, tmp_path)


def test_mutated_images_in_shards(tmp_path):
    each = 500
    found = list(mutants(FILES))
    for start in range(0, FILES, each):
        write_tar(tmp_path / "data" / f"{start}.tar", dict(found[start : start + each]))
    manifest, rows = checked(tmp_path / "data", tmp_path, "mutated members")
    assert len(rows) == FILES
    train_on(manifest, tmp_path)


def test_mutated_tars(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    whole = seed_tar()
    (folder / "whole.tar").write_bytes(whole)
    for number in range(max(20, FILES // 10)):
        (folder / f"{number:06d}.tar").write_bytes(mutate_tar(whole, rng_of(1, number)))
    manifest, rows = checked(folder, tmp_path, "members of mutated tars")
    assert sum(row["path"].startswith("whole.tar/") and row["ok"] for row in rows) == 5
    train_on(manifest, tmp_path)


def test_files_mutated_while_they_are_trained_on(tmp_path):
    """The index knew them as good; every batch some of them are replaced, cut, removed or made a pipe."""
    folder = tmp_path / "data"
    folder.mkdir()
    count = min(max(40, FILES // 10), 400)
    originals = list(seeds().items())
    for number in range(count):
        name, data = originals[number % len(originals)]
        (folder / f"{number:06d}-{name}").write_bytes(data)
    Image.fromarray(scene(0)).save(folder / "never-touched.png")
    manifest = build_index(folder, out=tmp_path / "index.parquet", progress=False, workers=2)
    paths = sorted(path for path in folder.iterdir() if path.name != "never-touched.png")
    skipped = SkippedFiles(tmp_path / "skipped.csv")
    rng = rng_of(2)
    with Loader(small_config(), manifest, batch_size=BATCH, device=torch.device("cpu"), skipped=skipped) as loader:
        for number in range(2 * loader.steps_per_epoch):
            path = paths[int(rng.integers(len(paths)))]
            data = path.read_bytes() if path.is_file() else b""
            path.unlink(missing_ok=True)
            if number % 5 == 0:
                os.mkfifo(path)
            elif number % 5 > 1:
                path.write_bytes(mutate(data, rng))
            assert len(next(loader).samples) == BATCH
