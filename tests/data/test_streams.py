"""Batches come from a stream of their own: memory is not taken back early, and training does not hold them up."""

import time

import pytest
import torch
from data_support import small_config, write_scenes

from pera_fast.config import load_config
from pera_fast.data import streams
from pera_fast.data.index import build_index
from pera_fast.data.loader import Loader
from pera_fast.data.skipped import SkippedFiles
from pera_fast.model.inputs import StepInputs
from pera_fast.profile.batches import blank_batch
from pera_fast.train.inputs import make_inputs

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_every_tensor_of_a_batch_and_of_a_steps_inputs_is_found():
    cfg = load_config("tiny", ["train.batch_size=2"])
    batch = blank_batch(cfg, 2)
    assert len(list(streams.tensors(batch))) == 2 * (1 + 2 + 2)  # of each group: pixels, two views' order and factors
    inputs = make_inputs(batch, cfg)
    assert isinstance(inputs, StepInputs)
    pointers = {tensor.data_ptr() for tensor in streams.tensors(inputs)}
    assert {inputs.global_.crops.data_ptr(), inputs.local.crops.data_ptr()} <= pointers
    assert len(list(streams.tensors({"a": [inputs.global_.crops], "b": (torch.zeros(1), 3, None)}))) == 2


def test_the_consumers_stream_is_recorded(monkeypatch):
    recorded = []

    class OnGpu:
        device = CUDA

        def record_stream(self, stream):
            recorded.append(stream)

    monkeypatch.setattr(streams, "tensors", lambda item: [OnGpu(), torch.zeros(1)])
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "the consumer's")
    streams.adopt(object(), CUDA)
    assert recorded == ["the consumer's"]
    streams.adopt(object(), CPU)
    assert recorded == ["the consumer's"]


def test_work_runs_on_a_stream_of_its_own_and_is_waited_for(monkeypatch):
    done = []

    class Stream:
        def __init__(self, device):
            assert device == CUDA

        def synchronize(self):
            done.append("waited")

        def __enter__(self):
            done.append("own")

        def __exit__(self, *error):
            done.append("left")

    monkeypatch.setattr(torch.cuda, "set_device", lambda device: done.append("device"))
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream(device))
    with streams.own_stream(CUDA):
        streams.finish(CUDA)
    assert done == ["device", "own", "waited", "left"]
    with streams.own_stream(CPU):
        streams.finish(CPU)
    assert len(done) == 4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_training_does_not_hold_batches_up(tmp_path):
    pytest.importorskip("nvidia.dali")
    write_scenes(tmp_path / "images", 24)
    manifest = build_index(tmp_path / "images", out=tmp_path / "index.parquet", progress=False)
    skipped = SkippedFiles(tmp_path / "skipped.csv")
    with Loader(small_config(), manifest, batch_size=4, device=CUDA, skipped=skipped) as loader:
        for _ in range(4):
            next(loader)
        seconds = 3.0
        torch.cuda._sleep(int(seconds * 2e9))  # about as many cycles
        began = time.perf_counter()
        for _ in range(8):
            next(loader)
        assert time.perf_counter() - began < seconds / 2
        torch.cuda.synchronize()
