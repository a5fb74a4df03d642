"""Choice of implementation: order, forcing, reasons, and a native library that is missing or broken."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pera_kernels import backend

CPU = torch.device("cpu")
CUDA = torch.device("cuda")  # a device object needs no GPU


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    """An op with two fast implementations, an op with none; nothing forced."""
    monkeypatch.setattr(backend, "_registry", {})
    monkeypatch.delenv(backend.ENVIRONMENT, raising=False)
    backend.register("both", "triton", available=lambda device: None if device.type == "cuda" else "no GPU")
    backend.register("both", "native", available=lambda device: None if device.type == "cpu" else "CPU only")
    backend.register("plain", "reference")


def test_first_available_runs():
    assert backend.choose("both", CUDA) == "triton"
    assert backend.choose("both", CPU) == "native"
    assert backend.choose("both", torch.device("mps")) == "reference"
    assert backend.choose("plain", CPU) == "reference"


def test_registering_again_keeps_place_and_replaces_check():
    backend.register("both", "triton", available=lambda device: None)
    assert backend.choose("both", CPU) == "triton"


def test_unknown_op_is_named():
    with pytest.raises(KeyError, match=r"no op 'bth'.*both, plain"):
        backend.choose("bth", CPU)


def test_use_forces_and_restores():
    with backend.use("reference"):
        assert backend.choose("both", CPU) == "reference"
        with backend.use("native"):
            assert backend.choose("both", CPU) == "native"
        assert backend.choose("both", CPU) == "reference"
    with pytest.raises(ZeroDivisionError), backend.use("reference"):
        raise ZeroDivisionError
    assert backend.choose("both", CPU) == "native"


def test_environment_forces_and_use_overrides_it(monkeypatch):
    monkeypatch.setenv(backend.ENVIRONMENT, "Reference")
    assert backend.choose("both", CPU) == "reference"
    with backend.use("native"):
        assert backend.choose("both", CPU) == "native"
    monkeypatch.setenv(backend.ENVIRONMENT, "auto")
    assert backend.choose("both", CPU) == "native"


def test_forced_but_unavailable_says_why(monkeypatch):
    monkeypatch.setenv(backend.ENVIRONMENT, "triton")
    with pytest.raises(RuntimeError, match="both: the triton implementation was asked for, but no GPU"):
        backend.choose("both", CPU)
    assert backend.choose("plain", CPU) == "reference"  # has no triton: chooses as usual


def test_unknown_name_lists_the_allowed(monkeypatch):
    monkeypatch.setenv(backend.ENVIRONMENT, "cutlass")
    with pytest.raises(ValueError, match=r"PERA_BACKEND=cutlass: .*auto, native, reference, triton"):
        backend.choose("both", CPU)
    with pytest.raises(ValueError, match="cutlass"), backend.use("cutlass"):
        pass


def test_report_gives_the_reason_for_every_faster_one(monkeypatch):
    assert backend.report("cpu") == [
        backend.Row("both", "native", {"triton": "no GPU"}),
        backend.Row("plain", "reference", {}),
    ]
    monkeypatch.setenv(backend.ENVIRONMENT, "reference")
    assert backend.report("cpu")[0] == backend.Row(
        "both", "reference", {"triton": "reference is forced", "native": "reference is forced"}
    )
    monkeypatch.setenv(backend.ENVIRONMENT, "triton")  # forced and unavailable: reported, not raised
    assert backend.report("cpu")[0].missing["triton"] == "no GPU"


def test_missing_library_is_a_reason(monkeypatch, tmp_path):
    monkeypatch.setattr(backend, "LIBRARY", tmp_path / "_native.so")
    assert backend.native() is None
    assert "not built" in (backend.needs_native("anything")(CPU) or "")
    assert "CPU, not on cuda" in (backend.needs_native("anything")(CUDA) or "")


def test_broken_library_is_a_reason(monkeypatch, tmp_path):
    library = tmp_path / "_native.so"
    library.write_text("not a library")
    monkeypatch.setattr(backend, "LIBRARY", library)
    assert backend.native() is None
    reason = backend.needs_native("anything")(CPU) or ""
    assert "does not load" in reason
    assert "\n" not in reason


def test_processor_without_avx2_is_a_reason(monkeypatch, tmp_path):
    """Asked is the processor, not what torch was told to use of it."""
    library = tmp_path / "_native.so"
    library.write_bytes(backend.LIBRARY.read_bytes())
    monkeypatch.setattr(backend, "LIBRARY", library)
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr("torch.cpu._is_avx2_supported", lambda: False)
    assert backend.native() is None
    assert backend.needs_native("anything")(CPU) == "this processor has no AVX2"


def test_library_without_the_op_is_a_reason(monkeypatch):
    monkeypatch.setattr(backend, "_load", lambda path: None)
    assert "lacks no_such_op" in (backend.needs_native("no_such_op")(CPU) or "")


def test_import_needs_neither_triton_nor_the_library_nor_the_compiler():
    """The compiler of torch takes longer to import than the rest of torch."""
    code = (
        "import sys; sys.modules['triton'] = None; import pera_kernels.backend as b; b.report()\n"
        "assert 'torch._dynamo' not in sys.modules"
    )
    source_root = Path(backend.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=source_root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_implementations_can_be_left_out() -> None:
    backend.register("left_out_test", "fast")
    device = torch.device("cpu")
    assert backend.choose("left_out_test", device) == "fast"
    with backend.without("fast"):
        assert backend.choose("left_out_test", device) == "reference"
    assert backend.choose("left_out_test", device) == "fast"
    del backend._registry["left_out_test"]
