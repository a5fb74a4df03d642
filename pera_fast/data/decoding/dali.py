"""DALI as a decoder, imported late; the processes that check files load this without torch."""

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from pera_fast.errors import UserError

_ERROR, _MOST_SAID = b"[ERROR]", 2**16


def require_dali() -> SimpleNamespace:
    """DALI's Pipeline, fn and types. Raises UserError where it is not installed."""
    os.environ.setdefault("OPENCV_LOG_LEVEL", "ERROR")  # one of DALI's decoders; it would remark on odd TIFF tags
    try:
        from nvidia.dali import fn, types
        from nvidia.dali.pipeline import Pipeline
    except ImportError as error:
        raise UserError(
            f"reading images needs NVIDIA DALI, also on a CPU ({error}): pip install 'pera-fast[cuda13]' (or [cuda12])"
        ) from error
    return SimpleNamespace(Pipeline=Pipeline, fn=fn, types=types)


class DaliDecoder:
    """Decodes on the CPU exactly as the training pipeline does, and tells the shapes.

    Args:
        channels: 3 for RGB, 1 for gray.
        batch_size: the most files of one call.
    """

    def __init__(self, channels: int, batch_size: int):
        self._channels, self._batch_size = channels, batch_size
        self._dali = require_dali()
        self._pipe: Any = None

    def _build(self) -> Any:
        dali = self._dali
        pipe = dali.Pipeline(
            batch_size=self._batch_size, num_threads=1, device_id=None, prefetch_queue_depth=1, set_affinity=False
        )
        with pipe:
            images = dali.fn.decoders.image(
                dali.fn.external_source(name="images", device="cpu"),
                device="cpu",
                output_type=dali.types.RGB if self._channels == 3 else dali.types.GRAY,
            )
            pipe.set_outputs(images)
        pipe.build()
        return pipe

    def shapes(self, encoded: Sequence[np.ndarray]) -> list[tuple[int, int]]:
        """(height, width) of each decoded image. Raises RuntimeError if any cannot be decoded."""
        return [(int(height), int(width)) for height, width, _ in self._run(encoded).shape()]

    def decode(self, encoded: bytes) -> np.ndarray:
        """One image, uint8 [H, W, channels]. Raises RuntimeError if it cannot be decoded."""
        return np.array(self._run([np.frombuffer(encoded, np.uint8)]).at(0))

    def _run(self, encoded: Sequence[np.ndarray]) -> Any:
        if self._pipe is None:
            self._pipe = self._build()
        try:
            self._pipe.feed_input("images", list(encoded))
            (images,) = self._pipe.run()
        except Exception:
            self._pipe = None  # a pipeline that raised is of no use any more
            raise
        return images


class CpuDecoder:
    """Decodes single images on the CPU for any number of threads, one at a time.

    Args:
        channels: 3 for RGB, 1 for gray.
    """

    def __init__(self, channels: int):
        self._channels, self._lock = channels, threading.Lock()
        self._decoder: DaliDecoder | None = None  # made when it is needed, which is hardly ever

    def __call__(self, encoded: bytes) -> np.ndarray:
        """One image, uint8 [H, W, channels]. Raises RuntimeError if it cannot be decoded."""
        with self._lock:
            if self._decoder is None:
                self._decoder = DaliDecoder(self._channels, 1)
            return self._decoder.decode(encoded)


@contextlib.contextmanager
def complaints() -> Iterator[Callable[[], bool]]:
    """Inside, stderr is kept from the terminal; yields a function that says whether a decoder wrote an error there.

    For processes of one thread. nvImageCodec writes them whatever DALI_NVIMGCODEC_LOG_LEVEL says.
    """
    said = b""
    heard, before = os.memfd_create("stderr"), os.dup(2)
    os.dup2(heard, 2)
    try:
        yield lambda: _ERROR in said
    finally:
        os.dup2(before, 2)
        said = os.pread(heard, _MOST_SAID, 0)
        os.close(heard)
        os.close(before)


def error_reason(error: BaseException) -> str:
    """The telling line of a DALI exception, which spreads over many lines and repeats itself."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    after = [i for i, line in enumerate(lines) if line.startswith("encountered")]
    told = lines[after[0] + 1] if after and after[0] + 1 < len(lines) else (lines[0] if lines else repr(error))
    return told.split(" sample #")[0].strip(" :") or "cannot decode"
