"""Workers that die: one file is lost at most, and often not even that."""

import os
import time

import pytest
from data_support import encoded, scene
from PIL import Image

from pera_fast.data.decoding import sandbox as sandbox_module
from pera_fast.data.decoding.probe import ProbeSettings
from pera_fast.data.decoding.sandbox import Sandbox
from pera_fast.data.decoding.worker_process import WorkerProcess


@pytest.fixture(autouse=True)
def _own_workers(monkeypatch):
    """Not those of `kept_workers`: started here and ended here."""
    monkeypatch.setattr(sandbox_module, "WorkerProcess", WorkerProcess)


@pytest.fixture
def dying(tmp_path):
    sandbox = Sandbox(timeout=20.0, module="dying_worker")
    yield sandbox
    sandbox.close()


def write(folder, *names):
    for name in names:
        (folder / name).write_bytes(encoded(Image.fromarray(scene(1)), "PNG"))
    return [str(folder / name) for name in names]


def test_a_killed_decoder_costs_neither_its_batch_nor_the_decoders_after_it(tmp_path, dying):
    paths = write(tmp_path, "a.png", "kills-dali.png", "b.png", "kills-all.png", "c.png")
    results = dying.probe(paths, ProbeSettings())
    assert [result.path for result in results] == paths
    assert [result.decoder for result in results] == ["dali", "pillow", "dali", "", "dali"]
    assert [result.ok for result in results] == [True, True, True, False, True]
    assert results[3].reason == "DALI: killed by SIGSEGV; rasterio: killed by SIGSEGV; Pillow: killed by SIGSEGV"
    assert results[3].size == os.path.getsize(paths[3])


def test_a_hanging_decoder_is_given_up(tmp_path):
    paths = write(tmp_path, "hangs-dali.png", "a.png")
    sandbox = Sandbox(timeout=20.0, module="dying_worker")
    try:
        sandbox.probe(paths[1:], ProbeSettings())  # started and warm: from here a second is long
        sandbox._worker.timeout = 1.5
        start = time.monotonic()
        results = sandbox.probe(paths[:1], ProbeSettings())
        assert time.monotonic() - start < 20
        assert results[0].ok
        assert results[0].decoder == "pillow"
    finally:
        sandbox.close()


def test_a_worker_that_does_not_start_is_an_error_of_its_own_not_of_the_files(tmp_path):
    sandbox = Sandbox(module="no_such_module")
    with pytest.raises(RuntimeError, match="does not start: ended with exit code 1"):
        sandbox.probe(write(tmp_path, "a.png"), ProbeSettings())


def test_close_ends_the_process_and_later_calls(tmp_path):
    sandbox = Sandbox()
    paths = write(tmp_path, "a.png")
    assert sandbox.probe(paths, ProbeSettings())[0].ok
    process = sandbox._worker.process
    sandbox.close()
    assert process.poll() is not None
    with pytest.raises(RuntimeError, match="closed"):
        sandbox.probe(paths, ProbeSettings())
