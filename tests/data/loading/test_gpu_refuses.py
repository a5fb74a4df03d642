"""Files that only the GPU's decoder refuses are decoded on the CPU, in their slots: a stand-in refuses some."""

import logging

import pytest
import torch
from data_support import small_config, write_scenes
from fake_cuda import CUDA
from loader_support import index, same, skipped_rows, take

from pera_fast.data.files.skipped import SkippedFiles
from pera_fast.data.loading import producer
from pera_fast.data.loading.decode_on import Decoding
from pera_fast.data.loading.loader import Loader
from pera_fast.data.loading.pipeline import CropPipeline

CPU = torch.device("cpu")
FILES = 8
REFUSED = ("002.jpg", "005.png")


class RefusingPipeline(CropPipeline):
    """A pipeline "on a GPU" whose decoder refuses some files: the batch fails as a whole, and all batches after it."""

    refused: frozenset[bytes] = frozenset()
    broken = False  # the device itself

    def __init__(self, views, channels, batch_size, threads, device, *, pinned=False, **options):
        assert device == CUDA
        super().__init__(views, channels, batch_size, threads, CPU, pinned=True, **options)
        self._bad, self._failed = [], False

    def submit(self, images, start, end):
        self._bad.append(self.broken or any(image.tobytes() in self.refused for image in images))
        super().submit(images, start, end)

    def collect(self):
        crops = super().collect()
        self._failed = self._failed or self._bad.pop(0)
        if self._failed:
            raise RuntimeError("Critical error in pipeline:\nencountered:\nnvJPEG error (8): NOT_SUPPORTED sample #0")
        return crops


@pytest.fixture
def batches_of(tmp_path, fake_cuda, monkeypatch):
    """Batches of a folder of JPEG and PNG files, decoded on the CPU or on the GPU that refuses some."""
    pytest.importorskip("nvidia.dali")
    folder = tmp_path / "images"
    write_scenes(folder, FILES // 2, suffix=".jpg")
    for name in write_scenes(tmp_path / "more", FILES)[FILES // 2 :]:
        (tmp_path / "more" / name).rename(folder / name)
    manifest = index(folder, tmp_path)
    monkeypatch.setattr(producer, "CropPipeline", RefusingPipeline)
    monkeypatch.setattr(RefusingPipeline, "refused", frozenset())

    def batches(count, refused=(), broken=False):
        RefusingPipeline.refused = frozenset((folder / name).read_bytes() for name in refused)
        monkeypatch.setattr(RefusingPipeline, "broken", broken)
        with Loader(
            small_config("data.reduced_decoding=null"), manifest, batch_size=2, device=CUDA,
            skipped=SkippedFiles(tmp_path / "skipped.csv"), decoding=Decoding("gpu", 2, ""),
        ) as loader:  # fmt: skip
            return take(loader, count)

    return batches


def test_what_the_gpu_refuses_keeps_its_slot_and_its_pixels(batches_of, tmp_path, caplog):
    """Over three epochs, so that the files are also in batches that had been read before the refusal was known."""
    expected = batches_of(12)
    assert {sample for batch in expected for sample in batch.samples.tolist()} == set(range(FILES))
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        found = batches_of(12, refused=REFUSED)
    assert all(map(same, found, expected))
    assert skipped_rows(tmp_path) == {}
    for name in REFUSED:
        (told,) = [record.getMessage() for record in caplog.records if name in record.getMessage()]
        why = "the GPU's decoder refuses it (nvJPEG error (8): NOT_SUPPORTED); it is decoded on the CPU"
        assert told.endswith(f"{name}: {why}")


def test_a_gpu_that_fails_on_every_image_is_not_held_against_the_files(batches_of, tmp_path, caplog):
    with pytest.raises(RuntimeError, match="nvJPEG error"):
        batches_of(1, broken=True)
    assert skipped_rows(tmp_path) == {}
    assert "refuses" not in caplog.text
