"""Files that only the GPU's decoder refuses are decoded on the CPU, in their slots: a stand-in refuses some."""

import logging

import pytest
import torch
from data_support import small_config, write_scenes
from fake_cuda import CUDA
from loader_support import index, same, skipped_rows, take

from pera_fast.data.files.skipped import SkippedFiles
from pera_fast.data.loading import producer, whole
from pera_fast.data.loading.decode_on import Decoding
from pera_fast.data.loading.loader import Loader
from pera_fast.data.loading.pipeline import CropPipeline
from pera_fast.data.loading.whole import WholeImages

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


def test_whole_images_that_the_gpu_refuses_keep_their_places(tmp_path, fake_cuda, monkeypatch):
    """In an in-order pass; the image is the same whoever decodes it."""
    pytest.importorskip("nvidia.dali")
    folder = tmp_path / "images"
    names = write_scenes(folder, FILES - 1, suffix=".jpg")
    manifest = index(folder, tmp_path)
    monkeypatch.setattr(whole, "CropPipeline", RefusingPipeline)
    monkeypatch.setattr(RefusingPipeline, "broken", False)

    def batches(refused):
        content = frozenset((folder / name).read_bytes() for name in refused)
        monkeypatch.setattr(RefusingPipeline, "refused", content)
        images = WholeImages(
            small_config("data.depth=8"), manifest, size=32, batch_size=2, device=CUDA,
            skipped=SkippedFiles(tmp_path / "skipped.csv"), decoding=Decoding("gpu", 2, ""),
        )  # fmt: skip
        return list(images.batches())

    expected = batches([])
    found = batches([names[1], names[2], names[6]])
    assert [batch.rows.tolist() for batch in found] == [[0, 1], [2, 3], [4, 5], [6]]
    assert torch.equal(*(torch.cat([batch.pixels for batch in made]) for made in (expected, found)))
    assert skipped_rows(tmp_path) == {}


def test_whole_images_for_a_gpu_are_those_for_the_cpu(tmp_path, fake_cuda):
    """The CPU decodes for a GPU: pinned, and the consumer's stream waits on the device."""
    pytest.importorskip("nvidia.dali")
    write_scenes(tmp_path / "images", 5)
    manifest, found = index(tmp_path / "images", tmp_path), {}
    for device in (CPU, CUDA):
        images = WholeImages(
            small_config("data.depth=8"), manifest, size=32, batch_size=2, device=device,
            skipped=SkippedFiles(tmp_path / "skipped.csv"), decoding=Decoding("cpu", 2, ""),
        )  # fmt: skip
        found[device] = torch.cat([batch.pixels for batch in images.batches()])
    assert torch.equal(found[CPU], found[CUDA])
    assert [what for what, _ in fake_cuda.log].count("waits on the device") == 3
