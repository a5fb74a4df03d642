"""A worker process that may die: a decoder that crashes or hangs costs one file, not the run."""

import os
import threading
from collections.abc import Sequence

from pera_fast.data.decoding.probe import ProbeResult, ProbeSettings
from pera_fast.data.decoding.tar import Member
from pera_fast.data.decoding.worker_process import DiedError, WorkerProcess
from pera_fast.storage import is_passing

_LABELS = {"dali": "DALI", "pillow": "Pillow", "rasterio": "rasterio"}


class Sandbox:
    """Probes files in a worker process that is started when needed and restarted when it died. Thread-safe.

    Args:
        timeout: seconds for one call; after that the worker is killed and its files are tried one by one.
        module: what the worker runs, as `python -m`; the process gets a socket's number as its argument.
    """

    def __init__(self, timeout: float = 60.0, module: str = "pera_fast.data.decoding.worker"):
        self._worker = WorkerProcess(module, timeout)
        self._lock = threading.Lock()

    def probe(
        self, paths: Sequence[str | Member], settings: ProbeSettings, decoders: Sequence[str] | None = None
    ) -> list[ProbeResult]:
        """One result for each absolute path or member (at most probe.MAX_FILES), in order. Never raises for a file.

        Args:
            paths: the files.
            settings: how they will be used.
            decoders: what may be tried; None: settings.decoders.

        Raises:
            RuntimeError: the worker does not start, or the sandbox was closed.
        """
        with self._lock:
            return self._probe(list(paths), settings, tuple(settings.decoders if decoders is None else decoders))

    def _probe(
        self, paths: list[str | Member], settings: ProbeSettings, decoders: tuple[str, ...]
    ) -> list[ProbeResult]:
        try:
            return self._call(paths, settings, decoders)
        except DiedError as died:
            if len(paths) > 1:  # which of them was it?
                return [result for path in paths for result in self._probe([path], settings, decoders)]
            return [self._probe_rest(paths[0], settings, decoders, died)]

    def _probe_rest(
        self, path: str | Member, settings: ProbeSettings, decoders: tuple[str, ...], died: DiedError
    ) -> ProbeResult:
        """A decoder died on the file: the ones after it may still know better."""
        told, left = [], list(decoders)
        while True:
            told.append(str(died))
            left = left[left.index(died.stage) + 1 :] if died.stage in left else []
            if not left or not settings.verify:
                size, mtime_ns, fault = _state(path)
                return ProbeResult(str(path), reason="; ".join(told), size=size, mtime_ns=mtime_ns, fault=fault)
            try:
                (result,) = self._call([path], settings, tuple(left))
            except DiedError as again:
                died = again
                continue
            if not result.ok:
                result.reason = "; ".join([*told, result.reason])
            return result

    def _call(self, paths: list[str | Member], settings: ProbeSettings, decoders: tuple[str, ...]) -> list[ProbeResult]:
        try:
            return self._worker.call((paths, settings, decoders))
        except DiedError as died:
            raise DiedError(died.stage, f"{_LABELS.get(died.stage, 'reading')}: {died}") from None

    def close(self) -> None:
        """Ends the worker, even while another thread waits for it; that one's call raises RuntimeError."""
        self._worker.end()
        with self._lock:
            self._worker.close()


def _state(path: str | Member) -> tuple[int, int, int]:
    """(size, mtime_ns, fault) as a ProbeResult has them."""
    try:
        state = os.stat(path.tar if isinstance(path, Member) else path)
    except OSError as error:
        return -1, 0, (error.errno or 0) if is_passing(error) else 0
    return path.size if isinstance(path, Member) else state.st_size, state.st_mtime_ns, 0
