"""Batches come from a stream of their own: memory is not taken back early, and training does not hold them up."""

import time
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from data_support import small_config, write_scenes
from fake_cuda import CUDA

from pera_fast.config import load_config
from pera_fast.data.files.skipped import SkippedFiles
from pera_fast.data.index.build import build_index
from pera_fast.data.loading import streams
from pera_fast.data.loading.decode_on import Decoding
from pera_fast.data.loading.loader import Loader
from pera_fast.model.inputs import StepInputs
from pera_fast.profile.batches import blank_batch, random_inputs
from pera_fast.train.inputs import make_inputs

CPU = torch.device("cpu")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_every_tensor_of_a_batch_and_of_a_steps_inputs_is_found():
    cfg = load_config("tiny", ["train.batch_size=2"])
    batch = blank_batch(cfg, 2)
    assert len(list(streams.tensors(batch))) == 2 * (1 + 2 + 2)  # of each group: pixels, two views' order and factors
    inputs = make_inputs(batch, cfg)
    assert isinstance(inputs, StepInputs)
    pointers = {tensor.data_ptr() for tensor in streams.tensors(inputs)}
    assert {inputs.global_.crops.data_ptr(), inputs.local.crops.data_ptr()} <= pointers
    assert len(list(streams.tensors({"a": [inputs.global_.crops], "b": (torch.zeros(1), 3, None)}))) == 2


def test_the_consumers_stream_waits_and_is_recorded(fake_cuda):
    recorded = []

    class OnGpu:
        device = CUDA

        def record_stream(self, stream):
            recorded.append(stream.priority)

    @dataclass
    class Item:
        value: object

    event = torch.cuda.Event()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streams, "tensors", lambda item: [OnGpu(), torch.zeros(1)])
        item = Item(1)
        assert streams.receive(streams.Shipped(item, event), CUDA) is item
    assert recorded == ["the consumer's"]
    assert fake_cuda.log == [("waits on the device", 0)]
    assert streams.receive(item, CPU) is item


def test_a_device_without_a_number_is_the_current_one(fake_cuda, monkeypatch):
    assert streams.with_index(torch.device("cuda")) == CUDA
    assert streams.with_index(torch.device("cuda", 3)).index == 3
    assert streams.with_index(CPU) == CPU
    with streams.own_stream(torch.device("cuda")):
        pass
    assert fake_cuda.log == [("device", 0), ("stream", streams.LOWEST)]


def test_the_step_goes_before_the_loader(fake_cuda):
    with streams.step_stream(CUDA):
        pass
    with streams.own_stream(CUDA):
        streams.wait(CUDA)
    assert fake_cuda.log == [("stream", -1), ("device", 0), ("stream", 0), ("waits on the host", 0)]
    with streams.own_stream(CPU), streams.step_stream(CPU):
        streams.wait(CPU)
    assert len(fake_cuda.log) == 4


@pytest.mark.parametrize("locals_", [0, 3])
def test_small_tensors_cross_together_and_pinned_ones_from_where_they_are(fake_cuda, locals_):
    cfg = small_config(f"views.num_local={locals_}", "model.drop_path=0.3")
    inputs = random_inputs(cfg, 2)
    for group in (inputs.global_, inputs.local):
        crops = streams.host_empty(tuple(group.crops.shape), torch.uint8, pinned=True)
        group.crops = crops.copy_(group.crops)
    item = {"inputs": inputs, "again": [inputs.keep, 5, None], "name": "batch"}
    shipped = streams.ship(item, CUDA)
    assert shipped.arrives.after == len(fake_cuda.uploads)
    small = [tensor for tensor in fake_cuda.uploads if tensor.dim() == 1]
    assert len(small) == 1
    made = streams.receive(shipped, CUDA)
    assert made["name"] == "batch"
    assert made["again"][1:] == [5, None]
    assert made["again"][0] is made["inputs"].keep
    pairs = list(zip(streams.tensors(item), streams.tensors(made), strict=True))
    assert len(pairs) == 19
    for here, there in pairs:
        assert (there.dtype, there.shape) == (here.dtype, here.shape)
        assert torch.equal(here, there)
        assert here.data_ptr() != there.data_ptr() or not here.numel()
        if here is not inputs.global_.crops and here is not inputs.local.crops:
            assert there.storage_offset() * there.element_size() % 256 == 0


def test_crops_of_a_loader_for_a_gpu_are_those_for_the_cpu(tmp_path, fake_cuda):
    """The CPU decodes for a GPU: the same bits, pinned, in three copies, and nothing waits for them."""
    pytest.importorskip("nvidia.dali")
    write_scenes(tmp_path / "images", 24)
    manifest = build_index(tmp_path / "images", out=tmp_path / "index.parquet", workers=1, progress=False)
    batches = {}
    cfg = small_config()
    for device in (CPU, CUDA):
        skipped = SkippedFiles(tmp_path / "skipped.csv")
        decoding = Decoding("cpu", 2, "")
        with Loader(
            cfg, manifest, batch_size=4, device=device, skipped=skipped, decoding=decoding,
            transform=lambda batch: make_inputs(batch, cfg),
        ) as loader:  # fmt: skip
            batches[device] = [next(loader) for _ in range(3)]
    for here, there in zip(batches[CPU], batches[CUDA], strict=True):
        assert all(torch.equal(*pair) for pair in zip(streams.tensors(here), streams.tensors(there), strict=True))
    assert [what for what, _ in fake_cuda.log].count("waits on the device") == 3
    assert "waits on the host" not in [what for what, _ in fake_cuda.log]
    assert len(fake_cuda.uploads) % 3 == 0
    waited = [after for what, after in fake_cuda.log if what == "waits on the device"]
    assert waited == [3, 6, 9]


@pytest.mark.parametrize("wanted", ["auto", "gpu", "cpu"])
def test_on_a_cpu_it_is_all_the_same(tmp_path, wanted):
    pytest.importorskip("nvidia.dali")
    write_scenes(tmp_path / "images", 8)
    manifest = build_index(tmp_path / "images", out=tmp_path / "index.parquet", workers=1, progress=False)
    found = []
    for override in (f"data.decode_on={wanted}", "data.loader_threads=1"):
        skipped = SkippedFiles(tmp_path / "skipped.csv")
        with Loader(small_config(override), manifest, batch_size=4, device=CPU, skipped=skipped) as loader:
            assert (loader.decoding.on, loader.decoding.reason) == ("cpu", "this run has no GPU")
            found.append(next(loader))
    assert np.array_equal(found[0].samples, found[1].samples)
    for one, other in zip(streams.tensors(found[0]), streams.tensors(found[1]), strict=True):
        assert torch.equal(one, other)


def gpu_loader(tmp_path, on, size=(48, 64), kind=".png", count=24, **options):
    """A loader for the GPU and one for the CPU, of the same files."""
    pytest.importorskip("nvidia.dali")
    if not (tmp_path / "images").exists():
        write_scenes(tmp_path / "images", count, *size, suffix=kind)
    manifest = build_index(tmp_path / "images", out=tmp_path / "index.parquet", workers=1, progress=False)
    device = CPU if on == "host" else torch.device("cuda")
    decoding = Decoding("cpu" if on == "host" else on, 2, "")
    skipped = SkippedFiles(tmp_path / "skipped.csv")
    cfg = small_config()
    return Loader(cfg, manifest, batch_size=4, device=device, skipped=skipped, decoding=decoding, **options)


def both(tmp_path, on, **options):
    """Four batches of the GPU's loader, and the same of the CPU's."""
    with gpu_loader(tmp_path, on, **options) as loader, gpu_loader(tmp_path, "host", **options) as host:
        pairs = [(next(loader), next(host)) for _ in range(4)]
    for there, here in pairs:
        assert np.array_equal(there.samples, here.samples)
        assert {tensor.device.type for tensor in streams.tensors(there)} == {"cuda"}
        for name in ("student", "teacher"):
            for group in ("global_", "local"):
                mine, its = (getattr(getattr(batch, group), name) for batch in (there, here))
                assert torch.equal(mine.order.cpu(), its.order)
                assert torch.equal(mine.factors.cpu(), its.factors)
    return pairs


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("kind", [".png", ".jpg"])
def test_crops_that_the_cpu_makes_for_the_gpu_are_the_cpus(tmp_path, kind):
    for there, here in both(tmp_path, "cpu", kind=kind):
        assert torch.equal(there.global_.pixels.cpu(), here.global_.pixels)
        assert torch.equal(there.local.pixels.cpu(), here.local.pixels)


@pytest.mark.gpu
@needs_gpu
def test_crops_of_the_gpu_are_nearly_the_cpus(tmp_path):
    """Two JPEG decoders differ by a level or two, the resize at the borders of a window (`pipeline.py`)."""
    for there, here in both(tmp_path, "gpu", kind=".jpg", size=(256, 320)):
        for group in ("global_", "local"):
            mine, its = (getattr(batch, group).pixels.cpu().float() for batch in (there, here))
            inner = (mine - its).abs()[:, 2:-2, 2:-2]
            assert inner.mean() < 1
            assert inner.max() <= 8


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("on", ["gpu", "cpu"])
def test_training_does_not_hold_batches_up(tmp_path, on):
    """Nor does the host wait for a batch, while the device is busy with the step."""
    with gpu_loader(tmp_path, on) as loader, streams.step_stream(torch.device("cuda")):
        for _ in range(4):
            next(loader)
        seconds = 3.0
        torch.cuda._sleep(int(seconds * 2e9))  # about as many cycles
        began = time.perf_counter()
        for _ in range(8):
            next(loader)
        assert time.perf_counter() - began < seconds / 2
        torch.cuda.synchronize()


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("on", ["gpu", "cpu"])
def test_memory_of_a_batch_is_not_reused_while_a_step_reads_it(tmp_path, on):
    """Each batch is let go of while a kernel that is queued in the step's stream has still to read it."""
    with gpu_loader(tmp_path, on) as loader, gpu_loader(tmp_path, "host" if on == "cpu" else on) as again:
        with streams.step_stream(torch.device("cuda")):
            sums = []
            for _ in range(12):
                torch.cuda._sleep(50_000_000)  # some 25 ms
                batch = next(loader)
                sums.append((batch.global_.pixels.long().sum(), batch.local.pixels.long().sum()))
                del batch
            found = [(int(a), int(b)) for a, b in sums]
        expected = []
        for _ in range(12):
            batch = next(again)
            torch.cuda.synchronize()
            expected.append((int(batch.global_.pixels.long().sum()), int(batch.local.pixels.long().sum())))
    assert found == expected
