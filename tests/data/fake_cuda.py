"""A GPU for tests without one: streams and events that keep a log, copies that stay on the CPU."""

import pytest
import torch

from pera_fast.data.loading import streams

CUDA = torch.device("cuda", 0)


class FakeStream:
    def __init__(self, device, priority: int | str = 0):
        assert device == CUDA
        self.priority = priority

    def wait_event(self, event):
        FakeCuda.log.append(("waits on the device", event.after))


class FakeEvent:
    def __init__(self, blocking=False):
        self.blocking, self.after = blocking, 0

    def record(self, stream):
        self.after = len(FakeCuda.uploads)

    def synchronize(self):
        FakeCuda.log.append(("waits on the host", self.after))


class FakeCuda:
    log: list = []  # noqa: RUF012 one at a time
    uploads: list = []  # noqa: RUF012 what was copied to the GPU
    pinned: set = set()  # noqa: RUF012 addresses of pinned memory


@pytest.fixture
def fake_cuda(monkeypatch):
    """Uploaded tensors are copies on the CPU; `FakeCuda` tells what was done."""
    FakeCuda.log, FakeCuda.uploads, FakeCuda.pinned = [], [], set()

    def host_empty(shape, dtype, pinned=False):
        tensor = torch.empty(shape, dtype=dtype)
        if pinned:
            FakeCuda.pinned.add(tensor.untyped_storage().data_ptr())
        return tensor

    def upload(tensor, device):
        assert device == CUDA
        assert is_pinned(tensor)
        FakeCuda.uploads.append(tensor)  # kept, so that no other tensor gets its address
        return tensor.clone()

    def is_pinned(tensor):
        return tensor.untyped_storage().data_ptr() in FakeCuda.pinned

    class Context:
        def __init__(self, stream):
            self.stream = stream

        def __enter__(self):
            FakeCuda.log.append(("stream", self.stream.priority))

        def __exit__(self, *error):
            pass

    monkeypatch.setattr("pera_fast.data.loading.pipeline.host_empty", host_empty)
    monkeypatch.setattr(streams, "host_empty", host_empty)
    monkeypatch.setattr(streams, "upload", upload)
    monkeypatch.setattr(torch.Tensor, "is_pinned", is_pinned)
    for name, fake in {
        "current_device": lambda: 0,
        "set_device": lambda device: FakeCuda.log.append(("device", device.index)),
        "device_count": lambda: 1,
        "get_device_capability": lambda device=None: (9, 0),
        "Stream": FakeStream,
        "stream": Context,
        "Event": FakeEvent,
        "current_stream": lambda device: FakeStream(device, "the consumer's"),
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return FakeCuda
